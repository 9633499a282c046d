//! A run survives the loss of a worker, and its numbers do not show it.

use std::ffi::OsStr;

use serde_json::Value;

use crate::sandbox::{World, python_json, tool};

const STEPS: u64 = 40;

#[test]
fn a_killed_worker_is_replaced_and_no_step_is_lost() {
    let world = World::prepared();
    let whole = world.train("whole", &["--workers", "2", "--quiet"]);
    // Worker 0 leads: it reads checkpoints and reports steps.
    for (worker, survivor) in [(1, 0), (0, 1)] {
        let name = format!("without-{worker}");
        // Between two checkpoints, which are written every 5 steps.
        let drill = format!("{worker}@17");
        let outcome = world.done(&["train", "recipe.yaml", "--run", &name, "--workers", "2", "--kill-worker", &drill]);
        outcome.expect_words(&[&format!("worker {worker} (rank {worker})"), " lost: ", "generation 2 started with 2 workers"]);
        let run = world.run(&name);
        let lost = run.events_named("worker_lost");
        assert_eq!(lost.len(), 1, "{lost:?}");
        assert_eq!(lost[0]["worker"], worker);
        assert_eq!(lost[0]["rank"], worker);
        assert_eq!(lost[0]["class"], "connection_closed");
        let generations = run.events_named("generation_started");
        assert_eq!(generations.iter().map(|event| event["generation"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(2)]);
        // The state comes from the worker that is left, not from a checkpoint.
        let restored = run.events_named("restored");
        assert!(restored[1]["step"].as_u64() >= Some(17), "{restored:?}");
        assert_eq!(restored[1]["source"], format!("memory of worker {survivor}"), "{restored:?}");
        let recovered = run.events_named("recovered");
        assert_eq!(recovered.len(), 1, "{recovered:?}");
        assert_eq!(recovered[0]["steps_lost"], 0, "{recovered:?}");
        assert_eq!(run.events_named("run_finished").len(), 1);
        run.expect_undisturbed(&whole, 1);
        let [found, expected] = [&run, &whole].map(|run| run.checkpoint_tensors(STEPS));
        assert!(found == expected, "the state at the end differs after worker {worker} was lost");
        assert_eq!(run.live_workers(), 0);
    }
}

#[test]
fn tensorboard_reads_one_value_a_step_from_a_run_with_a_replay() {
    let Some(python) = tool("TensorBoard", "python") else { return };
    let world = World::prepared();
    // Both workers are killed half-way between two checkpoints: nobody holds the state, so some steps are done twice.
    let drills = ["--drill", "kill:0@40", "--drill", "kill:1@40"];
    let settings = ["--set", "train.steps=75", "--set", "checkpoint.every_steps=25"];
    let run = world.train("replayed", &[["--workers", "2", "--quiet"].as_slice(), drills.as_slice(), settings.as_slice()].concat());
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
