//! A run that is asked to stop saves what it has.

use std::time::Duration;

use crate::sandbox::{World, wait_until};

const STEPS: u64 = 200;

#[test]
fn a_terminated_run_saves_its_step_and_resume_finishes_it() {
    let world = World::prepared();
    let steps = format!("train.steps={STEPS}");
    // No checkpoint is due before the end, so the one that is found is the one of the stop.
    let arguments = ["--workers", "2", "--set", &steps, "--set", "checkpoint.every_steps=100000"];
    let whole = world.train("whole", &arguments);
    let process = world.start_training("stopped", &arguments);
    let stopped = world.run("stopped");
    wait_until("the run trains", Duration::from_secs(90), || stopped.last_step() >= 10);
    process.terminate();
    let outcome = process.wait().expect_code(130);
    let step = stopped.last_step();
    assert!(step < STEPS, "the signal came too late");
    assert_eq!(stopped.events_named("run_stopped")[0]["step"], step);
    assert_eq!(stopped.live_workers(), 0);
    assert!(stopped.checkpoint_path(step, "manifest.json").is_file());
    outcome.expect_words(&[&format!("error: stopped; step {step} is saved"), "hint: go on with: cloze resume ", " --workers 2"]);

    world.done(&["resume", "stopped", "--workers", "2"]);
    assert_eq!(stopped.restored_steps(), [0, step]);
    assert_eq!(stopped.events_named("step").len() as u64, STEPS, "no step is done twice");
    assert_eq!(stopped.loss_bits(), whole.loss_bits());
}
