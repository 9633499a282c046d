//! A run that is asked to stop saves what it has.

use std::time::Duration;

use crate::sandbox::{Process, World, number, send_signal, wait_until};

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
    let outcome =
        outcome.expect_words(&[&format!("error: stopped; step {step} is saved"), "hint: go on with: cloze resume ", " --workers 2"]);
    let told = outcome.stderr.lines().filter(|line| line.contains("is saved")).count();
    assert_eq!(told, 1, "how it ended is said once: {}", outcome.stderr);

    world.done(&["resume", "stopped", "--workers", "2"]);
    assert_eq!(stopped.restored_steps(), [0, step]);
    assert_eq!(stopped.events_named("step").len() as u64, STEPS, "no step is done twice");
    assert_eq!(stopped.loss_bits(), whole.loss_bits());
    // What is finished is said before anything is started.
    let again = world.done(&["resume", "stopped"]).stderr;
    assert!(again.starts_with(&format!("the run is finished at step {STEPS}; its newest checkpoint is looked at\n")), "{again}");
}

#[test]
fn one_signal_saves_and_goes_on_and_another_saves_and_leaves() {
    let world = World::prepared();
    let arguments = ["--workers", "2", "--quiet", "--set", "train.steps=1000000", "--set", "checkpoint.every_steps=1000000"];
    let process = world.start_training("signalled", &arguments);
    let run = world.run("signalled");
    wait_until("the run trains", Duration::from_secs(90), || run.last_step() >= 10);
    process.signal("USR1");
    wait_until("it has saved", Duration::from_secs(90), || run.events_named("checkpoint_saved").len() == 1);
    let saved = number(&run.events_named("checkpoint_saved")[0]["step"]);
    wait_until("it goes on", Duration::from_secs(90), || run.last_step() >= saved + 10);
    process.signal("USR2");
    process.wait().expect_code(130);
    let step = run.last_step();
    assert_eq!(run.events_named("run_stopped")[0]["step"], step);
    // Each is the state of one step of all workers.
    for step in [saved, step] {
        let manifest = std::fs::read(run.checkpoint_path(step, "manifest.json")).expect("read a manifest");
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).expect("a manifest is JSON");
        assert_eq!((&manifest["step"], &manifest["state"]["world_size"]), (&step.into(), &2.into()), "{manifest}");
    }
    assert_eq!(run.live_workers(), 0);
    world.done(&["checkpoints", "verify", &run.path.display().to_string()]);
}

#[test]
fn a_stop_while_a_worker_is_waited_for_saves_what_is_in_memory() {
    let world = World::prepared();
    // No checkpoint is due, nobody replaces worker 1, and the run may not go on without it.
    let settings = ["train.steps=1000000", "checkpoint.every_steps=1000000", "cluster.max_restarts=0"];
    let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    let arguments = [["--workers", "2", "--local", "1", "--quiet"].as_slice(), &settings].concat();
    let process = world.start_training("stopped", &arguments);
    let run = world.run("stopped");
    wait_until("the run has a controller", Duration::from_secs(90), || run.control().is_some() && !run.events().is_empty());
    let path = run.path.display().to_string();
    let joined = Process::start(&mut world.command(&["join", &path, "--slots", "1"]), "");
    wait_until("the run trains", Duration::from_secs(90), || run.last_step() >= 10);
    send_signal(run.process_of(1).expect("worker 1 lives"), "KILL");
    wait_until("the generation has ended", Duration::from_secs(90), || !run.events_named("generation_aborted").is_empty());
    joined.wait();
    let last_reported = run.last_step();
    process.terminate();
    process.wait().expect_code(130);
    let stopped = run.events_named("run_stopped");
    let step = number(&stopped[0]["step"]);
    assert!(step >= last_reported && step > 0, "{step}, {last_reported} was reported: {stopped:?}");
    assert!(run.checkpoint_path(step, "manifest.json").is_file());
    assert_eq!(run.live_workers(), 0);
    world.done(&["checkpoints", "verify", &path]);
}
