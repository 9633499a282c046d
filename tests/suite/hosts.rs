//! A run over hosts that a remote shell reaches: started, mended and ended from one command.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{Outcome, Process, World, send_signal, wait_until};

/// Longest wait for something that takes seconds on a free machine.
const TIMEOUT: Duration = Duration::from_mins(2);

/// A remote shell that runs the command line here. It writes down its process and what it was given, and copies what the controller removes
/// at its end; host `gone` does not answer.
const SHELL: &str = r#"
case $1 in gone) echo "ssh: connect to host gone: No route to host" >&2; exit 255 ;; esac
echo "$$ $1 $2" >> shell.log
if [ -f "my run/control.json" ]; then cp "my run/control.json" control.json; fi
exec sh -c "exec $2"
"#;

fn arguments<'a>(hosts: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let remote = ["--hosts", hosts, "--remote-shell", "sh shell.sh", "--listen", "127.0.0.1:0"];
    [["train", "recipe.yaml", "--run", "my run"].as_slice(), &remote, more].concat()
}

/// Fails the test where a credential of the run is on a remote command line, in a log or on the terminal. They are the token and, with TLS,
/// both halves of the coordinator's key.
#[track_caller]
fn expect_no_credentials(world: &World, outcome: &Outcome, num_credentials: usize) {
    let control: Value = serde_json::from_slice(&world.read("control.json")).expect("JSON");
    let places = ["/token", "/tls/private_key", "/tls/coordinator_key"];
    let credentials: Vec<&str> = places.iter().filter_map(|place| control.pointer(place)?.as_str()).collect();
    assert!(credentials.len() == num_credentials && credentials.iter().all(|text| text.len() == 64), "256 bits each: {control}");
    let logs = fs::read_dir(world.run("my run").path.join("logs")).expect("the logs");
    let logs = logs.map(|entry| fs::read_to_string(entry.expect("a log").path()).expect("a text"));
    let shell_log = String::from_utf8(world.read("shell.log")).expect("a text");
    assert!(shell_log.contains("join '"), "{shell_log}");
    for text in logs.chain([shell_log, outcome.stdout.clone(), outcome.stderr.clone()]) {
        assert!(credentials.iter().all(|credential| !text.contains(credential)), "{text}");
    }
}

#[test]
fn a_run_over_hosts_is_the_same_run() {
    let world = World::prepared();
    world.write("shell.sh", SHELL);
    let outcome = world.done(&arguments("localhost,b,c", &["--workers-per-host", "2"]));
    let run = world.run("my run");
    assert_eq!((run.last_step(), run.live_workers()), (40, 0));
    let outcome = outcome.expect_words(&["b: worker 2 started as process ", "c: worker 5 started as process "]);
    let log = String::from_utf8(world.read("my run/logs/host-b.log")).expect("a text");
    assert!(log.contains("worker 3 started as process ") && log.contains("the workers of this host are done"), "{log}");
    let shell_log = String::from_utf8(world.read("shell.log")).expect("a text");
    assert!(shell_log.contains("--slots 2-3"), "{shell_log}");
    expect_no_credentials(&world, &outcome, 1);
    let local = world.train("local", &["--workers", "6"]);
    assert_eq!(run.loss_bits(), local.loss_bits());
}

#[test]
fn the_key_of_tls_reaches_other_hosts() {
    let world = World::prepared();
    world.write("shell.sh", SHELL);
    let outcome = world.done(&arguments("localhost,b", &["--set", "cluster.tls=true"]));
    let run = world.run("my run");
    assert_eq!((run.last_step(), run.live_workers(), run.events_named("worker_joined").len()), (40, 0, 2));
    expect_no_credentials(&world, &outcome, 3);
}

#[test]
fn a_host_that_cannot_be_reached_is_named_at_once() {
    let world = World::prepared();
    world.write("shell.sh", SHELL);
    let outcome = world.cloze(&arguments("localhost,gone", &[])).expect_code(5);
    outcome.expect_words(&[
        "error: host gone is lost: the host cannot be reached (exit code 255)",
        "No route to host",
        "hint: try the remote shell",
    ]);
    assert_eq!(world.run("my run").live_workers(), 0);
    world.cloze(&["train", "recipe.yaml", "--run", "x", "--hosts", "b,b"]).expect_code(3).expect_words(&["a host is named twice"]);
}

#[test]
fn a_broken_connection_is_made_again_and_a_stop_reaches_all_hosts() {
    let world = World::prepared();
    world.write("shell.sh", SHELL);
    let endless = ["--set", "train.steps=1000000", "--set", "train.schedule.kind=constant", "--quiet"];
    let controller = Process::start(&mut world.command(&arguments("localhost,b", &endless)), "");
    let run = world.run("my run");
    wait_until("the run trains", TIMEOUT, || run.last_step() >= 5);
    // `exec` has put `cloze join` in the shell's place; its workers live on and are taken over.
    let shell_log = String::from_utf8(world.read("shell.log")).expect("a text");
    let join: u32 = shell_log.split(' ').next().and_then(|word| word.parse().ok()).expect("a process id");
    let worker = run.process_of(1).expect("a worker on host b");
    assert!(send_signal(join, "KILL"));
    let is_told =
        || run.events_named("warning").iter().any(|event| event["message"].as_str().is_some_and(|text| text.contains("is started again")));
    wait_until("the host is reached again", TIMEOUT, is_told);
    let before = run.last_step();
    wait_until("the run goes on", TIMEOUT, || run.last_step() > before + 5);
    assert!(run.process_of(1).is_some());
    // A worker that ends there is replaced from there.
    send_signal(run.process_of(1).unwrap_or(worker), "KILL");
    wait_until("the worker is replaced", TIMEOUT, || !run.events_named("recovered").is_empty());
    controller.terminate();
    controller.wait().expect_code(130);
    wait_until("nothing of the run is left", TIMEOUT, || run.live_workers() == 0);
}

#[test]
fn a_cluster_file_names_the_hosts_and_has_them_checked() {
    let world = World::prepared();
    world.write("shell.sh", SHELL);
    // One machine computes for all of them, and for other tests: a slow moment of one host is no fault here.
    let site = "version: 1\nname: lab\nkind: ssh\nfolder: shared\nssh: {hosts: [localhost, b, gone], command: [sh, shell.sh]}\n\
                environment: {FROM_SITE: it's set}\npreflight: {max_slowdown: 1000, min_bandwidth_share: 0.001, timeout_s: 60}\n";
    world.write("lab.yaml", site);
    let text = |nodes: u32| format!("version: 1\nextends: recipe.yaml\nresources: {{nodes: {nodes}, workers_per_node: 2}}\n");
    world.write("two.yaml", text(2));
    world.write("three.yaml", text(3));
    world.write("four.yaml", text(4));
    let train = |recipe| world.cloze(&["train", recipe, "--cluster", "lab.yaml", "--listen", "127.0.0.1:0"]);
    let outcome = train("two.yaml").expect_code(0);
    outcome.expect_words(&["| b ", "good", "b: worker 2 started as process "]);
    assert_eq!(world.run("shared/runs/small").last_step(), 40);
    let shell_log = String::from_utf8(world.read("shell.log")).expect("a text");
    assert!(shell_log.contains(r"'FROM_SITE=it'\''s set'") && shell_log.contains("preflight-agent"), "{shell_log}");
    // A host that is not there is found before anything is made.
    let outcome = train("three.yaml").expect_code(5);
    outcome.expect_words(&["error: 1 of 3 nodes must not be used", "gone: nothing can be started there", "No route to host"]);
    train("four.yaml").expect_code(3).expect_words(&["the cluster file names too few hosts", "at least 4"]);
}
