//! A full disk is said to be full, nothing on it is half-written, and after room was made the same command goes on.

use std::path::Path;

use crate::sandbox::{SmallDisk, World, skipped};

/// Room for the first parts of a corpus of 60,000 records, or for one checkpoint.
const SIZE: &str = "1m";
/// Room for everything.
const LARGER_SIZE: &str = "64m";

fn full_disk(world: &World, test: &str) -> Option<SmallDisk> {
    let disk = SmallDisk::mount(world.path("disk"), SIZE);
    if disk.is_none() {
        skipped(test, "this process may not mount a file system; root in a virtual machine may");
    }
    disk
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("list a folder");
    entries.map(|entry| entry.expect("list a folder").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn preparing_on_a_full_disk() {
    let world = World::with_corpus(60_000);
    let Some(disk) = full_disk(&world, "preparing on a full disk") else { return };
    let prepare = ["data", "prepare", "recipe.yaml", "--set", "data.output=disk/prepared", "--set", "data.cap_per_task=null"];
    let outcome = world.cloze(&prepare).expect_code(6);
    outcome.expect_words(&["error: failed to ", "/disk/prepared/", "No space left on device", "hint: free space"]);
    let visible: Vec<String> = names_in(&disk.path().join("prepared")).into_iter().filter(|name| !name.starts_with('.')).collect();
    assert!(visible.is_empty(), "{visible:?}");
    disk.resize(LARGER_SIZE);
    world.done(&prepare);
    world.done(&["data", "verify", "recipe.yaml", "--set", "data.output=disk/prepared"]);
}

#[test]
fn saving_a_checkpoint_on_a_full_disk() {
    let world = World::prepared();
    let whole = world.train("whole", &["--quiet"]);
    let Some(disk) = full_disk(&world, "saving a checkpoint on a full disk") else { return };
    let train = ["train", "recipe.yaml", "--run", "run", "--quiet", "--set", "checkpoint.url=disk/checkpoints"];
    let outcome = world.cloze(&train).expect_code(6);
    outcome.expect_words(&["error: failed to write object: no space left on the disk", "/disk/checkpoints/step-", "hint: free space"]);
    let saved = |step: u64| disk.path().join(format!("checkpoints/step-{step:012}/manifest.json")).is_file();
    assert!(saved(5), "a checkpoint fits");
    assert!(!saved(10), "two do not fit");
    disk.resize(LARGER_SIZE);
    world.done(&["resume", "run", "--quiet"]);
    let run = world.run("run");
    assert_eq!(run.restored_steps(), [0, 5]);
    assert_eq!(run.loss_bits(), whole.loss_bits());
}
