//! Dividing the state among the workers changes where it lies, not what is computed; and a checkpoint is the state, however it was divided.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::sandbox::{Run, World, expect_close};

const MODES: [&str; 4] = ["none", "optimizer", "gradients", "parameters"];
const STEPS: u64 = 12;
/// The step whose checkpoint runs go on from.
const MIDDLE: u64 = 6;
/// The gradient's norm is added up in another order.
const RELATIVE_TOLERANCE: f64 = 1e-6;
/// With another number of workers, so is everything else.
const RESIZED_TOLERANCE: f64 = 1e-5;

fn trained(world: &World, mode: &str) -> Run {
    let (steps, every, shard) = (format!("train.steps={STEPS}"), format!("checkpoint.every_steps={MIDDLE}"), format!("train.shard={mode}"));
    world.train(mode, &["--workers", "2", "--quiet", "--set", &steps, "--set", &every, "--set", &shard])
}

/// Hash of the recipe of a run.
fn recipe_hash(world: &World, name: &str) -> String {
    let info: Value = serde_json::from_slice(&world.read(&format!("{name}/run.json"))).expect("run.json is JSON");
    info["recipe_hash"].as_str().expect("a hash").to_owned()
}

/// Copies a folder of files.
fn copy_folder(source: &Path, target: &Path) {
    fs::create_dir(target).expect("make a folder");
    for entry in fs::read_dir(source).expect("list a folder") {
        let name = entry.expect("list a folder").file_name();
        fs::copy(source.join(&name), target.join(&name)).expect("copy a file");
    }
}

/// Gives a run the middle checkpoint of another mode as its only one. The recipes differ in the mode alone, so their hash is exchanged.
fn hand_over(world: &World, from: &str, to: &str) {
    let run = world.run(to);
    let target = run.checkpoint_path(MIDDLE, "");
    for step in [MIDDLE, STEPS] {
        fs::remove_dir_all(run.checkpoint_path(step, "")).expect("remove a checkpoint");
    }
    copy_folder(&world.path(&format!("kept-{from}")), &target);
    let manifest = target.join("manifest.json");
    let text = fs::read_to_string(&manifest).expect("read a manifest");
    let (own, foreign) = (recipe_hash(world, to), recipe_hash(world, from));
    assert!(text.contains(&foreign), "the manifest names no recipe:\n{text}");
    fs::write(&manifest, text.replace(&foreign, &own)).expect("write a manifest");
}

#[test]
fn every_mode_computes_the_same_and_reads_the_others_checkpoints() {
    let world = World::prepared();
    let runs = MODES.map(|mode| trained(&world, mode));
    let whole = runs[0].losses();
    assert_eq!(whole.len() as u64, STEPS);
    assert!(whole[&STEPS] < whole[&1], "nothing was learned, so equal losses would say nothing");
    for (mode, run) in MODES.iter().zip(&runs).skip(1) {
        assert_eq!(run.losses().len() as u64, STEPS, "{mode}");
        expect_close(&run.losses(), &whole, RELATIVE_TOLERANCE);
    }

    // Each goes on from a checkpoint that it wrote itself, with another number of workers.
    for (mode, run) in MODES.iter().zip(&runs) {
        fs::remove_dir_all(run.checkpoint_path(STEPS, "")).expect("remove a checkpoint");
        world.done(&["resume", mode, "--workers", "3", "--quiet"]);
        assert_eq!(run.restored_steps(), [0, MIDDLE], "{mode}");
        expect_close(&run.losses(), &whole, RESIZED_TOLERANCE);
    }

    // And each from one that was written in another mode.
    for (mode, run) in MODES.iter().zip(&runs) {
        copy_folder(&run.checkpoint_path(MIDDLE, ""), &world.path(&format!("kept-{mode}")));
    }
    for (to, run) in MODES.iter().zip(&runs) {
        let from = MODES.iter().cycle().skip_while(|mode| *mode != to).nth(1).expect("there are several modes");
        hand_over(&world, from, to);
        world.done(&["resume", to, "--workers", "1", "--quiet"]);
        assert_eq!(run.restored_steps(), [0, MIDDLE, MIDDLE], "{to} from {from}");
        expect_close(&run.losses(), &whole, RESIZED_TOLERANCE);
    }
}
