//! A run survives the loss of a worker, and its numbers do not show it.

use std::ffi::OsStr;

use serde_json::Value;

use crate::sandbox::{World, python_json, tool};

const STEPS: u64 = 40;

#[test]
fn a_killed_worker_is_replaced_and_the_losses_are_the_same() {
    let world = World::prepared();
    let whole = world.train("whole", &["--workers", "2", "--quiet"]);
    // Worker 0 leads: it reads and writes the checkpoints.
    for worker in [1, 0] {
        let name = format!("without-{worker}");
        // A checkpoint every 5 steps: when step 17 is reported, the ones of steps 5 and 10 are complete.
        let drill = format!("{worker}@17");
        let outcome = world.done(&["train", "recipe.yaml", "--run", &name, "--workers", "2", "--kill-worker", &drill]);
        outcome.expect_words(&[&format!("worker {worker} (rank {worker}) lost: "), "generation 2 started with 2 workers from step "]);
        let run = world.run(&name);
        let lost = run.events_named("worker_lost");
        assert_eq!(lost.len(), 1, "{lost:?}");
        assert_eq!(lost[0]["worker"], worker);
        assert_eq!(lost[0]["rank"], worker);
        let generations = run.events_named("generation_started");
        assert_eq!(generations.iter().map(|event| event["generation"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(2)]);
        let restored = run.events_named("restored");
        assert!(restored[1]["step"].as_u64() >= Some(10), "{restored:?}");
        assert!(restored[1]["source"].as_str().is_some_and(|source| source.contains("/checkpoints/step-0000000000")), "{restored:?}");
        assert_eq!(run.events_named("run_finished").len(), 1);
        assert_eq!(run.loss_bits(), whole.loss_bits());
        let [weights, expected] = [&run, &whole].map(|run| run.checkpoint_file(STEPS, "model.safetensors"));
        assert!(weights == expected, "the weights differ after worker {worker} was lost");
        assert_eq!(run.live_workers(), 0);
    }
}

#[test]
fn tensorboard_reads_one_value_a_step_from_a_run_with_a_replay() {
    let Some(python) = tool("TensorBoard", "python") else { return };
    let world = World::prepared();
    // The kill comes half-way between two checkpoints, so that some steps are done twice.
    let arguments = ["--workers", "2", "--quiet", "--set", "train.steps=75", "--set", "checkpoint.every_steps=25", "--kill-worker", "1@40"];
    let run = world.train("replayed", &arguments);
    assert!(run.events_named("step").len() > 75, "no step was replayed, so there is nothing to see");
    let folder = run.path.join("tensorboard");
    let found = python_json(&python, "read_events.py", &[folder.as_os_str(), OsStr::new("train/loss")]);
    let losses = run.losses();
    assert_eq!(found["steps"], Value::from(losses.keys().copied().collect::<Vec<u64>>()));
    let values = found["values"].as_array().expect("the reader prints values");
    assert_eq!(values.len(), 75);
    for (value, (step, loss)) in values.iter().zip(&losses) {
        let value = value.as_f64().expect("a value is a number");
        assert!((value - loss).abs() <= 1e-6 * loss, "step {step}: {value}, recorded {loss}");
    }
}
