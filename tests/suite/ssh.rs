//! A run on hosts that SSH reaches: it is the same run, it mends what breaks, and it says which host is not there.

use std::time::Duration;

use crate::sandbox::{CLOZE, Process, Run, SshHosts, World, number, run_command, wait_until};

/// Longest wait for something that takes seconds on a free machine.
const TIMEOUT: Duration = Duration::from_mins(2);
/// Steps that are compared with those of a run on one host.
const STEPS_COMPARED: u64 = 30;
/// Settings of a run that does not end by itself and whose learning rate does not depend on the number of steps.
const SETTINGS: [&str; 8] = [
    "--set",
    "train.schedule.kind=constant",
    "--set",
    "train.schedule.warmup_steps=5",
    "--set",
    "checkpoint.every_steps=100000",
    "--set",
    "cluster.heartbeat_timeout_ms=2000",
];

/// Trains on hosts, with one worker on each.
fn start(world: &World, ssh: &SshHosts, hosts: &str, steps: u64) -> Process {
    let (shell, steps) = (ssh.remote_shell(), format!("train.steps={steps}"));
    let arguments = ["train", "recipe.yaml", "--run", "run", "--hosts", hosts, "--remote-shell", &shell, "--quiet", "--set", &steps];
    let arguments = [arguments.as_slice(), SETTINGS.as_slice()].concat();
    Process::start(&mut world.command_by(ssh.command(CLOZE), &arguments), "")
}

fn wait_steps(run: &Run, count: u64) {
    let before = run.last_step();
    wait_until("the run goes on", TIMEOUT, || run.last_step() >= before + count);
}

#[test]
fn a_run_over_ssh_mends_what_breaks() {
    let Some(ssh) = SshHosts::start("a run over SSH", 2) else { return };
    let world = World::prepared();
    let controller = start(&world, &ssh, "login,n1,n2", 1_000_000);
    let run = world.run("run");
    wait_until("the run trains", TIMEOUT, || run.last_step() >= STEPS_COMPARED);
    let hosts: Vec<_> = run.events_named("worker_joined").iter().map(|event| event["host"].clone()).collect();
    assert!(["login", "n1", "n2"].iter().all(|name| hosts.contains(&(*name).into())), "{hosts:?}");

    ssh.break_connections("n1");
    wait_steps(&run, 20);
    // Workers and all that Cloze has there.
    ssh.fleet().kill_on("n2", |name| name.starts_with("cloze"));
    wait_until("the run recovers", TIMEOUT, || !run.events_named("recovered").is_empty());
    wait_steps(&run, 20);

    controller.terminate();
    controller.wait().expect_code(130);
    wait_until("nothing of the run is left", TIMEOUT, || run.live_workers() == 0);
    let generations = run.events_named("generation_started");
    assert!(generations.iter().all(|event| number(&event["world_size"]) == 3), "{generations:?}");

    // The same on one host.
    let steps = format!("train.steps={STEPS_COMPARED}");
    let arguments = [["--workers", "3", "--quiet", "--set", &steps].as_slice(), SETTINGS.as_slice()].concat();
    let local = world.train("local", &arguments);
    let (losses, expected) = (run.losses(), local.losses());
    for (step, loss) in losses.range(..=STEPS_COMPARED) {
        assert_eq!(loss.to_bits(), expected[step].to_bits(), "step {step}: loss {loss}, on one host {}", expected[step]);
    }
}

#[test]
fn a_host_that_is_not_there_is_named() {
    let Some(ssh) = SshHosts::start("hosts that SSH does not reach", 1) else { return };
    let world = World::prepared();
    let run = world.run("run");
    start(&world, &ssh, "login,n7", 10).wait().expect_code(5).expect_words(&["n7"]);
    assert!(!run.path.exists(), "a run folder was made for nothing");
    // A machine without power answers nothing at all.
    ssh.fleet().cut("n1");
    start(&world, &ssh, "login,n1", 10).wait().expect_code(5).expect_words(&["n1", "cannot be reached"]);
    assert_eq!(run.live_workers(), 0);

    let mut command = world.command_by(ssh.command(CLOZE), &["train", "recipe.yaml", "--run", "twice", "--hosts", "n1,n1"]);
    run_command(&mut command).expect_code(3).expect_words(&["named twice"]);
    assert!(!world.path("twice").exists());
}
