//! Dividing the state among the workers changes where it lies, not what is computed; and a checkpoint is the state, however it was divided.

use std::fs;

use serde_json::Value;

use crate::sandbox::{Run, World, expect_close, number};

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

    // And each goes on in another mode than the one that wrote its checkpoint.
    for (from, run) in MODES.iter().zip(&runs) {
        let to = MODES.iter().cycle().skip_while(|mode| *mode != from).nth(1).expect("there are several modes");
        fs::remove_dir_all(run.checkpoint_path(STEPS, "")).expect("remove a checkpoint");
        world.done(&["resume", from, "--workers", "2", "--set", &format!("train.shard={to}"), "--quiet"]);
        assert_eq!(run.restored_steps(), [0, MIDDLE, MIDDLE], "{to} from {from}");
        expect_close(&run.losses(), &whole, RESIZED_TOLERANCE);
        let manifest = fs::read(run.checkpoint_path(STEPS, "manifest.json")).expect("read a manifest");
        let manifest: Value = serde_json::from_slice(&manifest).expect("a manifest is JSON");
        assert_eq!(&manifest["state"]["shard"], to, "{manifest}");
        assert_eq!(generations(run), [1, 2, 3], "numbers are not used again");
    }
    let none_such = world.cloze(&["resume", "none", "--set", "train.shard=everything"]).expect_code(3);
    none_such.expect_words(&["train.shard", "everything"]);
}

#[test]
fn a_share_that_is_lost_comes_from_its_replica() {
    let world = World::prepared();
    let settings =
        |mode: &str| [format!("train.shard={mode}"), "train.replicate_shards=true".to_owned(), "checkpoint.every_steps=1000000".to_owned()];
    // The first worker is the leader; and where two are lost one after the other, the second takes a replica with it that the first left behind.
    let losses = [("optimizer", &["kill:0@17"][..]), ("gradients", &["kill:2@17"]), ("parameters", &["kill:1@12", "kill:2@25"])];
    for (mode, drills) in losses {
        let settings = settings(mode);
        let common = ["--workers", "3", "--quiet", "--set", &settings[0], "--set", &settings[1], "--set", &settings[2]];
        let plain = ["--workers", "3", "--quiet", "--set", &settings[0], "--set", &settings[2]];
        let whole = world.train(&format!("whole-{mode}"), &plain);
        let run = world.train(mode, &[&common[..], &drills.iter().flat_map(|drill| ["--drill", drill]).collect::<Vec<_>>()].concat());
        let recovered = run.events_named("recovered");
        assert_eq!(recovered.len(), drills.len(), "{mode}: {recovered:?}");
        for recovery in &recovered {
            assert_eq!((&recovery["source"], &recovery["steps_lost"]), (&"memory".into(), &0.into()), "{mode}: {recovery}");
        }
        run.expect_undisturbed(&whole, recovered.len());
        let [found, expected] = [&run, &whole].map(|run| run.checkpoint_tensors(run.last_step()));
        assert!(found == expected, "{mode}: the state at the end differs");
    }
    let refused = world.cloze(&["check", "recipe.yaml", "--set", "train.replicate_shards=true"]).expect_code(3);
    refused.expect_words(&["train.replicate_shards", "shard: none"]);
}

/// Numbers of a run's generations.
fn generations(run: &Run) -> Vec<u64> {
    run.events_named("generation_started").iter().map(|event| number(&event["generation"])).collect()
}
