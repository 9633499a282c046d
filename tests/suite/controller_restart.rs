//! Workers train on without their controller, and a new one takes them over.

use std::time::Duration;

use crate::sandbox::{Process, World, wait_until};

/// About four seconds, of which a new controller needs a fraction of one.
const STEPS: u64 = 600;

#[test]
fn a_new_controller_takes_over_the_running_generation() {
    let world = World::prepared();
    let steps = format!("train.steps={STEPS}");
    let arguments = ["--workers", "2", "--quiet", "--set", &steps, "--set", "checkpoint.every_steps=100"];
    let whole = world.train("whole", &arguments);
    let process = world.start_training("run", &arguments);
    let run = world.run("run");
    wait_until("the run trains", Duration::from_secs(90), || run.last_step() >= 50);
    let workers = run.worker_processes();
    assert_eq!(workers.len(), 2);
    process.kill();
    assert_eq!(run.worker_processes(), workers, "the workers do not go with their controller");
    assert!(run.last_step() < STEPS, "the kill came too late");

    world.done(&["resume", "run", "--workers", "2", "--quiet"]);
    let restarted = run.events_named("coordinator_restarted");
    assert_eq!(restarted.len(), 1, "{restarted:?}");
    assert_eq!(restarted[0]["adopted"], true, "{restarted:?}");
    for (event, expected) in [("generation_started", 1), ("worker_started", 2), ("restored", 1), ("generation_aborted", 0)] {
        assert_eq!(run.events_named(event).len(), expected, "{event}");
    }
    // What the killed controller had taken and not written, its successor was told again.
    run.expect_undisturbed(&whole, 0);
    assert!(run.checkpoint_tensors(STEPS) == whole.checkpoint_tensors(STEPS), "the state at the end differs");
    assert_eq!(run.live_workers(), 0);
    assert!(run.control().is_none(), "control.json is still there");
}

#[test]
fn workers_whose_controller_stays_away_save_and_leave() {
    let world = World::prepared();
    let steps = format!("train.steps={STEPS}");
    // No checkpoint is due before the end, so the one that is found is the one with which the workers left.
    let arguments = ["--workers", "2", "--quiet", "--set", &steps, "--set", "checkpoint.every_steps=100000"];
    let whole = world.train("whole", &arguments);
    let impatient = [arguments.as_slice(), ["--set", "cluster.coordinator_grace_s=0"].as_slice()].concat();
    let process = world.start_training("run", &impatient);
    let run = world.run("run");
    wait_until("the run trains", Duration::from_secs(90), || run.last_step() >= 20);
    process.kill();
    let last_reported = run.last_step();
    wait_until("the workers leave by themselves", Duration::from_secs(30), || run.live_workers() == 0);

    world.done(&["resume", "run", "--workers", "2", "--quiet"]);
    let restored = run.events_named("restored");
    assert_eq!(restored.len(), 2, "{restored:?}");
    assert!(restored[1]["step"].as_u64() >= Some(last_reported), "{restored:?}");
    assert!(restored[1]["source"].as_str().is_some_and(|source| source.contains("/checkpoints/step-")), "{restored:?}");
    // The steps between the controller's end and the workers' were reported to nobody.
    run.expect_undisturbed(&whole, STEPS as usize);
    assert!(run.checkpoint_tensors(STEPS) == whole.checkpoint_tensors(STEPS), "the state at the end differs");
}

#[test]
fn a_controller_that_stood_still_finds_its_generation_again() {
    let world = World::prepared();
    let settings =
        ["--set", "train.steps=1000000", "--set", "checkpoint.every_steps=1000000", "--set", "cluster.heartbeat_timeout_ms=2000"];
    let process = world.start_training("run", &[["--workers", "2", "--quiet"].as_slice(), settings.as_slice()].concat());
    let run = world.run("run");
    wait_until("the run trains", Duration::from_secs(90), || run.last_step() >= 10);
    process.signal("STOP");
    // After four seconds of silence the workers hang up.
    std::thread::sleep(Duration::from_secs(7));
    let told = run.last_step();
    process.signal("CONT");
    let joined_again = || run.events_named("worker_joined").iter().filter(|event| event["rejoined"] == true).count();
    wait_until("the workers are back", Duration::from_secs(30), || joined_again() == 2);
    wait_until("steps are told again", Duration::from_secs(30), || run.last_step() > told + 10);
    process.terminate();
    process.wait().expect_code(130);
    for (event, expected) in [("generation_started", 1), ("worker_started", 2), ("generation_aborted", 0), ("worker_lost", 0)] {
        assert_eq!(run.events_named(event).len(), expected, "{event}");
    }
    // Each step is told once, also those that were on their way when the workers hung up.
    let steps: Vec<u64> = run.events_named("step").iter().filter_map(|event| event["step"].as_u64()).collect();
    assert!(steps.iter().copied().eq(1..=run.last_step()), "{steps:?}");
}

/// The new controller speaks another way and listens where the killed one did, so that the workers find it before anything tells
/// `cloze join` of it.
#[test]
fn workers_of_another_host_are_started_anew_for_a_controller_that_does_not_know_them() {
    let world = World::prepared();
    let steps = format!("train.steps={STEPS}");
    // Workers that are not ended stay far longer than the test has patience.
    let settings = ["--set", &steps, "--set", "checkpoint.every_steps=50", "--set", "cluster.coordinator_grace_s=3600"];
    let whole = world.train("whole", &[["--workers", "2", "--quiet"].as_slice(), settings.as_slice()].concat());
    let address = free_address();
    let listen = ["--workers", "2", "--local", "1", "--listen", &address, "--quiet"];
    let process = world.start_training("run", &[listen.as_slice(), settings.as_slice()].concat());
    let run = world.run("run");
    wait_until("the run has a controller", Duration::from_secs(90), || run.control().is_some() && !run.events().is_empty());
    let path = run.path.display().to_string();
    let joined = Process::start(&mut world.command(&["join", &path, "--slots", "1"]), "");
    wait_until("a checkpoint is saved", Duration::from_secs(90), || run.checkpoint_path(50, "manifest.json").is_file());
    process.kill();
    assert!(run.last_step() < STEPS, "the kill came too late");

    world.done(&["resume", "run", "--listen", &address, "--quiet", "--set", "cluster.tls=true", "--set", "cluster.max_restarts=0"]);
    let outcome = joined.wait().expect_code(0).expect_words(&["another controller has the run"]);
    assert_eq!(outcome.stderr.matches("worker 1 started as process").count(), 2, "{}", outcome.stderr);
    assert_eq!(run.live_workers(), 0);
    let changed = run.events_named("recipe_changed");
    assert_eq!(changed[0]["changes"], serde_json::json!(["cluster.tls=true", "cluster.max_restarts=0"]), "{changed:?}");
    let restored = run.restored_steps();
    assert!(restored.len() == 2 && restored[1] >= 50, "{restored:?}");
    assert_eq!(whole.loss_bits().len() as u64, STEPS);
    assert_eq!(run.loss_bits(), whole.loss_bits());
}

#[test]
fn a_slot_of_cloze_join_can_be_filled_by_the_new_controller() {
    let world = World::prepared();
    let settings = ["--set", "train.steps=1000000", "--set", "checkpoint.every_steps=20", "--set", "cluster.coordinator_grace_s=3600"];
    let process = world.start_training("run", &[["--workers", "2", "--local", "1", "--quiet"].as_slice(), settings.as_slice()].concat());
    let run = world.run("run");
    wait_until("the run has a controller", Duration::from_secs(90), || run.control().is_some() && !run.events().is_empty());
    let path = run.path.display().to_string();
    let joined = Process::start(&mut world.command(&["join", &path, "--slots", "1"]), "");
    wait_until("a checkpoint is saved", Duration::from_secs(90), || run.checkpoint_path(20, "manifest.json").is_file());
    process.kill();

    let resumed = Process::start(&mut world.command(&["resume", "run", "--local", "2", "--quiet", "--set", "cluster.max_restarts=0"]), "");
    joined.wait().expect_code(0).expect_words(&["the new controller fills slots [1] itself"]);
    wait_until("the run trains again", Duration::from_secs(90), || run.restored_steps().get(1).is_some_and(|&step| run.last_step() > step));
    resumed.terminate();
    resumed.wait().expect_code(130);
    assert!(run.events_named("worker_restarted").is_empty(), "nobody fights for the slot");
}

/// An address of this machine that nobody listens on.
fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("open a socket");
    listener.local_addr().expect("an address").to_string()
}
