//! A run over several hosts lives through a host that is cut off and one whose link is slow.

use std::time::Duration;

use crate::sandbox::{Network, Process, Run, World, number, wait_until};

const NUM_HOSTS: usize = 4;
/// The host that is cut off and comes back, and the one whose link becomes slow.
const CUT_HOST: usize = 2;
const SLOW_HOST: usize = 3;
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

/// A worker on every host: the first has the controller, the others join.
fn start(world: &World, network: &Network) -> (Process, Vec<Process>) {
    let listen = format!("{}:0", network.address(0));
    let workers = NUM_HOSTS.to_string();
    let mut arguments = vec!["train", "recipe.yaml", "--run", "run", "--workers", &workers, "--local", "1", "--listen", &listen, "--quiet"];
    arguments.extend(SETTINGS);
    arguments.extend(["--set", "train.steps=1000000"]);
    let controller = Process::start(&mut world.command_on(network, 0, &arguments), "");
    let run = world.run("run");
    wait_until("the controller says where it listens", TIMEOUT, || run.control().is_some());
    let path = run.path.display().to_string();
    let join = |host: usize| {
        let slot = host.to_string();
        Process::start(&mut world.command_on(network, host, &["join", &path, "--slots", &slot]), "")
    };
    let joined = (1..NUM_HOSTS).map(join).collect();
    (controller, joined)
}

/// Waits until so many more steps were reported than now.
fn wait_steps(run: &Run, count: u64) {
    let before = run.last_step();
    wait_until("the run goes on", TIMEOUT, || run.last_step() >= before + count);
}

#[test]
fn a_run_over_four_hosts_survives_its_network() {
    let Some(network) = Network::new("a run over four hosts", NUM_HOSTS) else { return };
    let world = World::prepared();
    let (controller, joined) = start(&world, &network);
    let run = world.run("run");
    wait_until("the run trains", TIMEOUT, || run.last_step() >= 10);
    let hosts = run.events_named("worker_joined");
    assert_eq!(hosts.len(), NUM_HOSTS, "{hosts:?}");

    network.cut(CUT_HOST);
    wait_until("the host is missed", TIMEOUT, || run.events_named("worker_lost").iter().any(|event| event["worker"] == CUT_HOST));
    network.heal(CUT_HOST);
    wait_until("the run recovers", TIMEOUT, || !run.events_named("recovered").is_empty());
    let recovered = run.events_named("recovered");
    assert_eq!(recovered[0]["steps_lost"], 0, "{recovered:?}");
    wait_steps(&run, STEPS_COMPARED);

    network.slow(SLOW_HOST);
    wait_steps(&run, 3);
    network.restore_speed(SLOW_HOST);
    wait_steps(&run, 3);

    controller.terminate();
    controller.wait().expect_code(130);
    for process in joined {
        let outcome = process.wait();
        assert!([Some(0), Some(130)].contains(&outcome.code), "`cloze join` ended with {:?}:\n{}", outcome.code, outcome.stderr);
    }
    assert_eq!(run.live_workers(), 0);
    let generations = run.events_named("generation_started");
    assert!(generations.iter().all(|event| number(&event["world_size"]) == NUM_HOSTS as u64), "{generations:?}");

    // The same on one host, without a network that fails.
    let (workers, steps) = (NUM_HOSTS.to_string(), format!("train.steps={STEPS_COMPARED}"));
    let arguments = [["--workers", &workers, "--quiet", "--set", &steps].as_slice(), SETTINGS.as_slice()].concat();
    let local = world.train("local", &arguments);
    let (losses, expected) = (run.losses(), local.losses());
    for (step, loss) in losses.range(..=STEPS_COMPARED) {
        assert_eq!(loss.to_bits(), expected[step].to_bits(), "step {step}: loss {loss}, on one host {}", expected[step]);
    }
}
