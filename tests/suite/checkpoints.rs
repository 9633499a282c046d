//! A damaged checkpoint is never loaded, and never silently passed over.

use std::path::Path;

use crate::sandbox::{Run, World, flip_middle_byte, truncate};

/// A run of 10 steps with checkpoints of steps 5 and 10.
fn trained(world: &World, name: &str) -> Run {
    world.train(name, &["--quiet", "--set", "train.steps=10"])
}

#[test]
fn a_damaged_newest_checkpoint_gives_way_to_the_one_before() {
    let world = World::prepared();
    let run = trained(&world, "run");
    let weights = run.checkpoint_file(10, "model.safetensors");
    let losses = run.loss_bits();
    let cases: [(fn(&Path), &str, &str); 3] = [
        (flip_middle_byte, "model.safetensors", "model.safetensors has BLAKE3 hash"),
        (truncate, "optimizer.safetensors", "the manifest says"),
        (truncate, "manifest.json", "manifest.json is not readable"),
    ];
    for (damage, file, reason) in cases {
        damage(&run.checkpoint_path(10, file));
        let outcome = world.done(&["resume", "run"]);
        outcome.expect_words(&["warning: checkpoint passed over: ", "step-000000000010: ", reason, "with 1 worker from step 5"]);
        // The lost steps are done again, and the checkpoint is whole again.
        assert_eq!(run.restored_steps().last(), Some(&5), "{file}");
        assert_eq!(run.loss_bits(), losses, "{file}");
        assert!(run.checkpoint_file(10, "model.safetensors") == weights, "{file}");
    }
}

#[test]
fn where_all_checkpoints_are_damaged_the_run_ends_with_one_message() {
    let world = World::prepared();
    let run = trained(&world, "run");
    flip_middle_byte(&run.checkpoint_path(5, "model.safetensors"));
    truncate(&run.checkpoint_path(10, "manifest.json"));
    let outcome = world.cloze(&["resume", "run"]).expect_code(7);
    assert_eq!(outcome.stderr.matches("error: ").count(), 1, "{}", outcome.stderr);
    let words = ["error: no checkpoint is usable", "step-000000000010: manifest.json", "step-000000000005: model.safetensors", "hint: "];
    outcome.expect_words(&words);
    assert_eq!(run.events_named("worker_restarted").len(), 0, "no restart cures damage");
    let outcome = world.cloze(&["export", "run", "--output", "model"]).expect_code(7);
    outcome.expect_words(&["no checkpoint is usable"]);
    assert!(!world.path("model").exists());
}

#[test]
fn a_cache_that_cannot_be_used_is_told_once() {
    let world = World::prepared();
    world.write("file", "no folder");
    let cache = format!("checkpoint.cache={}", world.path("file").display());
    let outcome = world.done(&["train", "recipe.yaml", "--run", "uncached", "--workers", "2", "--set", &cache]);
    assert_eq!(outcome.stderr.matches("`checkpoint.cache` cannot be used").count(), 1, "{}", outcome.stderr);
    assert_eq!(world.run("uncached").events_named("warning").len(), 1);
}
