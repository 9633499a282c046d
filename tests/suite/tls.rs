//! Workers and coordinator speak by TLS, and nothing else about a run changes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{Outcome, Process, Run, WORKER, World, run_command, wait_until};

/// Longest wait for something that takes seconds on a free machine.
const TIMEOUT: Duration = Duration::from_secs(90);
/// Steps of a run whose controller is killed; about four seconds.
const STEPS: u64 = 600;
const TLS: [&str; 2] = ["--set", "cluster.tls=true"];

/// A text of control.json, by the way to it.
fn text(control: &Value, pointer: &str) -> String {
    control.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("no {pointer} in control.json")).to_owned()
}

/// What a coordinator says to somebody who speaks in clear.
fn answer_in_clear(run: &Run) -> String {
    let control = run.control().expect("a live controller");
    let mut socket = TcpStream::connect(text(&control, "/address")).expect("reach the coordinator");
    let body = br#"{"message":"join"}"#;
    socket.write_all(&[(body.len() as u32).to_be_bytes().as_slice(), body].concat()).expect("speak to the coordinator");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("hear the coordinator");
    answer
}

#[test]
fn a_killed_worker_is_replaced_by_tls_too() {
    let world = World::prepared();
    let whole = world.train("whole", &["--workers", "2", "--quiet"]);
    let run = world.train("run", &[["--workers", "2", "--quiet", "--kill-worker", "1@17"].as_slice(), TLS.as_slice()].concat());
    assert_eq!(run.events_named("worker_lost").len(), 1);
    let recovered = run.events_named("recovered");
    assert_eq!((recovered.len(), &recovered[0]["steps_lost"]), (1, &Value::from(0)), "{recovered:?}");
    // Bit for bit the numbers of a run in clear.
    run.expect_undisturbed(&whole, 1);
    assert_eq!(run.live_workers(), 0);
    assert!(run.control().is_none());
}

#[test]
fn a_new_controller_has_the_key_that_living_workers_know() {
    let world = World::prepared();
    let steps = format!("train.steps={STEPS}");
    let arguments = [["--workers", "2", "--quiet", "--set", &steps].as_slice(), TLS.as_slice()].concat();
    let process = world.start_training("run", &arguments);
    let run = world.run("run");
    wait_until("the run trains", TIMEOUT, || run.last_step() >= 50);
    let answer = answer_in_clear(&run);
    assert!(answer.contains("this coordinator speaks TLS only"), "{answer}");
    let workers = run.worker_processes();
    process.kill();
    assert_eq!(run.worker_processes(), workers);
    assert!(run.last_step() < STEPS, "the kill came too late");

    world.done(&["resume", "run", "--workers", "2", "--quiet"]);
    let restarted = run.events_named("coordinator_restarted");
    assert_eq!((restarted.len(), &restarted[0]["adopted"]), (1, &Value::from(true)), "{restarted:?}");
    for (event, expected) in [("generation_started", 1), ("worker_started", 2), ("generation_aborted", 0)] {
        assert_eq!(run.events_named(event).len(), expected, "{event}");
    }
    assert_eq!(run.last_step(), STEPS);
    assert!(run.control().is_none(), "control.json is still there, and the keys in it");
}

#[test]
fn who_joins_needs_the_key() {
    let world = World::prepared();
    let arguments = [["--workers", "2", "--local", "1", "--quiet"].as_slice(), TLS.as_slice()].concat();
    let controller = world.start_training("run", &arguments);
    let run = world.run("run");
    wait_until("the controller says where it listens", TIMEOUT, || run.control().is_some());
    let control = run.control().expect("a live controller");
    let (token, key) = (text(&control, "/token"), text(&control, "/tls/coordinator_key"));
    // Everything is said, as on a host that does not see control.json.
    let join = |key: &str| -> Outcome {
        let (path, address) = (run.path.display().to_string(), text(&control, "/address"));
        let mut command = world.command(&["join", &path, "--slots", "1", "--coordinator", &address]);
        Process::start(command.env("CLOZE_TOKEN", &token).env("CLOZE_COORDINATOR_KEY", key), "").wait()
    };
    // Without a key a worker speaks to nobody, since its recipe wants TLS.
    let words = ["train", "--coordinator", &text(&control, "/address"), "--run", "run", "--worker", "1", "--local-workers", "1"];
    let mut keyless = world.command_by(Command::new(WORKER), &words);
    let refused = run_command(keyless.env("CLOZE_TOKEN", &token)).expect_code(8);
    refused.expect_words(&["this run speaks TLS, and the worker was given no key of the coordinator"]);
    let other = "0123456789abcdef".repeat(4);
    let refused = join(&other).expect_code(8);
    let (wanted, found) = (format!("key {other}"), format!("key {key}"));
    refused.expect_words(&["the coordinator does not hold this run's key", &wanted, &found, "the token was not sent"]);
    join("key").expect_code(3).expect_words(&["the coordinator's key is none", "64 hexadecimal digits"]);
    join(&key).expect_code(0);
    controller.wait().expect_code(0);
    assert_eq!(run.last_step(), 40);
    let log = String::from_utf8_lossy(&world.read("run/logs/worker-1.log")).into_owned();
    assert!(!log.contains(&token) && !log.contains(&text(&control, "/tls/private_key")));
}
