//! With `cluster.min_workers` a run goes on with fewer workers, and grows again, without losing a step.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{Process, WORKER, World, expect_close, number, send_signal, wait_until};

/// Workers add the same numbers in another order, which 32-bit floats round differently.
const RELATIVE_TOLERANCE: f64 = 1e-5;
/// Longest wait for something that takes about a second on a free machine.
const TIMEOUT: Duration = Duration::from_secs(90);
/// Steps after the growth that are compared; more would let the differences in rounding grow.
const STEPS_COMPARED: u64 = 20;

/// World size of every generation.
fn world_sizes(events: &[Value]) -> Vec<u64> {
    events.iter().map(|event| number(&event["world_size"])).collect()
}

#[test]
fn a_run_goes_on_without_a_worker_that_cannot_be_replaced() {
    let world = World::prepared();
    let whole = world.train("whole", &["--workers", "2", "--quiet"]);
    let settings =
        ["cluster.min_workers=1", "cluster.max_restarts=0", "cluster.replacement_wait_s=30", "cluster.heartbeat_timeout_ms=2000"];
    let mut arguments = vec!["--workers", "2", "--quiet", "--drill", "freeze:1@20"];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    let run = world.train("run", &arguments);
    let generations = run.events_named("generation_started");
    assert_eq!(world_sizes(&generations), [2, 1], "{generations:?}");
    assert_eq!(generations[1]["workers"], Value::from(vec![0]));
    let lost = run.events_named("worker_lost");
    assert_eq!((&lost[0]["worker"], &lost[0]["class"]), (&Value::from(1), &Value::from("missed_heartbeat")), "{lost:?}");
    let recovered = run.events_named("recovered");
    assert_eq!(recovered.len(), 1, "{recovered:?}");
    assert_eq!(recovered[0]["steps_lost"], 0, "{recovered:?}");
    assert_eq!(run.last_step(), 40);
    expect_close(&run.losses(), &whole.losses(), RELATIVE_TOLERANCE);
    assert_eq!(run.live_workers(), 0);
}

#[test]
fn a_run_grows_when_a_worker_joins() {
    let world = World::prepared();
    // So many steps that the run does not end by itself; the learning rate does not depend on their number.
    let schedule = ["train.schedule.kind=constant", "train.schedule.warmup_steps=5"];
    let schedule: Vec<&str> = schedule.iter().flat_map(|setting| ["--set", setting]).collect();
    let settings = ["train.steps=1000000", "cluster.min_workers=1", "cluster.replacement_wait_s=0", "checkpoint.every_steps=1000000"];
    let mut arguments = vec!["--workers", "2", "--local", "1", "--quiet"];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]).chain(schedule.iter().copied()));
    let process = world.start_training("run", &arguments);
    let run = world.run("run");
    wait_until("the run trains alone", TIMEOUT, || run.last_step() >= 5);
    let path = run.path.display().to_string();
    let joined = Process::start(&mut world.command(&["join", &path, "--slots", "1"]), "");
    let size = || world_sizes(&run.events_named("generation_started"));
    wait_until("the run has grown", TIMEOUT, || size().len() == 2 && run.last_step() >= grown_at(&run.events_named("restored")) + 20);
    process.terminate();
    process.wait().expect_code(130);
    assert!([Some(0), Some(130)].contains(&joined.wait().code), "`cloze join` ends with the run");
    assert_eq!(size(), [1, 2]);

    // It was no failure: one regroup, no abort, and every step is there once.
    assert_eq!(run.events_named("generation_regrouped").len(), 1);
    assert_eq!(run.events_named("generation_aborted").len(), 0);
    let restored = run.events_named("restored");
    assert_eq!(restored[1]["source"], "memory of worker 0", "{restored:?}");
    let steps: Vec<u64> = run.events_named("step").iter().map(|event| number(&event["step"])).collect();
    assert_eq!(steps, (1..=run.last_step()).collect::<Vec<u64>>());
    let last_compared = grown_at(&restored) + STEPS_COMPARED;
    let steps = format!("train.steps={last_compared}");
    let alone = world.train("alone", &[["--quiet", "--set", &steps].as_slice(), schedule.as_slice()].concat());
    let losses: BTreeMap<u64, f64> = run.losses().into_iter().filter(|(step, _)| *step <= last_compared).collect();
    assert_eq!(losses.len() as u64, last_compared);
    expect_close(&losses, &alone.losses(), RELATIVE_TOLERANCE);
}

#[test]
fn a_run_whose_state_is_shared_out_saves_it_and_grows_from_memory() {
    let world = World::prepared();
    let settings = [
        "train.steps=1000000",
        "train.shard=optimizer",
        "cluster.min_workers=1",
        "cluster.replacement_wait_s=0",
        "checkpoint.every_steps=1000000",
    ];
    let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    let process = world.start_training("run", &[["--workers", "2", "--local", "1", "--quiet"].as_slice(), &settings].concat());
    let run = world.run("run");
    wait_until("the run trains alone", TIMEOUT, || run.last_step() >= 5);
    let path = run.path.display().to_string();
    let joined = Process::start(&mut world.command(&["join", &path, "--slots", "1"]), "");
    wait_until("the run has grown", TIMEOUT, || run.last_step() >= grown_at(&run.events_named("restored")) + 5);
    process.terminate();
    process.wait().expect_code(130);
    joined.wait();
    let (left, restored) = (run.events_named("generation_regrouped"), run.events_named("restored"));
    assert_eq!((left.len(), restored.len(), run.events_named("generation_aborted").len()), (1, 2, 0), "{left:?} {restored:?}");
    assert_eq!(restored[1]["step"], left[0]["step"], "{left:?} {restored:?}");
    assert_eq!(restored[1]["source"], "memory", "{restored:?}");
    // One of the two might have been lost with its share.
    let saved: Vec<u64> = run.events_named("checkpoint_saved").iter().map(|event| number(&event["step"])).collect();
    assert!(saved.contains(&number(&left[0]["step"])), "{saved:?}");
    let steps: Vec<u64> = run.events_named("step").iter().map(|event| number(&event["step"])).collect();
    assert_eq!(steps, (1..=run.last_step()).collect::<Vec<u64>>(), "every step once");
}

#[test]
fn a_run_with_replicas_goes_on_without_a_worker_and_reads_no_checkpoint() {
    let world = World::prepared();
    let whole = world.train("whole", &["--workers", "3", "--quiet"]);
    let settings = [
        "train.shard=parameters",
        "train.replicate_shards=true",
        "cluster.min_workers=2",
        "cluster.max_restarts=0",
        "cluster.replacement_wait_s=30",
        "checkpoint.every_steps=1000000",
    ];
    let mut arguments = vec!["--workers", "3", "--quiet", "--kill-worker", "1@20"];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    let run = world.train("run", &arguments);
    assert_eq!(world_sizes(&run.events_named("generation_started")), [3, 2]);
    let recovered = run.events_named("recovered");
    assert_eq!((recovered.len(), &recovered[0]["steps_lost"], &recovered[0]["source"]), (1, &0.into(), &"memory".into()), "{recovered:?}");
    expect_close(&run.losses(), &whole.losses(), RELATIVE_TOLERANCE);
}

#[test]
fn a_worker_that_cloze_join_started_has_its_end_and_its_stacks_in_the_ledger() {
    let world = World::prepared();
    let settings = ["train.steps=1000000", "cluster.heartbeat_timeout_ms=2000", "checkpoint.every_steps=1000000"];
    let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    let process = world.start_training("run", &[["--workers", "2", "--local", "1", "--quiet"].as_slice(), &settings].concat());
    let run = world.run("run");
    wait_until("the controller can be joined", TIMEOUT, || run.control().is_some());
    let path = run.path.display().to_string();
    let joined = Process::start(&mut world.command(&["join", &path, "--slots", "1"]), "");
    wait_until("both train", TIMEOUT, || run.last_step() >= 5);
    let frozen = run.process_of(1).expect("the worker of `cloze join`");
    assert!(send_signal(frozen, "STOP"));
    wait_until("it is replaced", TIMEOUT, || run.events_named("recovered").len() == 1);
    process.terminate();
    process.wait().expect_code(130);
    joined.wait();
    let text = std::fs::read_to_string(run.path.join("failures.jsonl")).expect("the ledger");
    let records: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("a record")).collect();
    let [record] = &records[..] else { panic!("one failure: {records:?}") };
    assert_eq!((&record["worker"], &record["exit"], &record["decision"]), (&1.into(), &"SIGKILL".into(), &"replaced".into()), "{record}");
    let dump = std::fs::read_to_string(record["dump"].as_str().expect("a file with stacks")).expect("read the stacks");
    assert!(dump.contains(&format!("process {frozen}\n")), "{dump}");
    let exited = run.events_named("worker_exited");
    assert_eq!((&exited[0]["worker"], &exited[0]["process_id"]), (&1.into(), &frozen.into()), "{exited:?}");
}

/// Its first process stands still before it has said a word to anybody; whoever started it is the only one to know.
#[test]
fn a_worker_that_hangs_before_it_joins_is_ended_and_replaced() {
    let world = World::prepared();
    let marker = world.path("hung");
    let first_hangs = format!(r#"if [ ! -e {0} ]; then echo $$ > {0}; exec sleep 3600; fi; exec {WORKER} "$@""#, marker.display());
    let worker = world.write_program("hanging-worker", &first_hangs);
    // Longer than a worker takes to join here, and short enough to wait for.
    let arguments = ["--workers", "2", "--local", "1", "--quiet", "--set", "cluster.hang.init_s=15"];
    let process = world.start_training("run", &arguments);
    let run = world.run("run");
    wait_until("the controller can be joined", TIMEOUT, || run.control().is_some());
    let path = run.path.display().to_string();
    let joined = Process::start(world.command(&["join", &path, "--slots", "1"]).env("CLOZE_WORKER", worker), "");
    let told = || std::fs::read_to_string(&marker).unwrap_or_default().trim().parse::<u32>().ok();
    wait_until("its first process is there", TIMEOUT, || told().is_some());
    let hung = told().expect("a process id");
    process.wait().expect_code(0);
    joined.wait().expect_code(0).expect_words(&["worker 1 has not joined within 15 s of its start and is killed", "worker 1 restarted"]);
    assert_eq!(run.losses().len(), 40);
    let text = std::fs::read_to_string(run.path.join("failures.jsonl")).expect("the ledger");
    let record: Value = serde_json::from_str(text.lines().next().expect("a record")).expect("a record is JSON");
    assert_eq!((&record["worker"], &record["exit"], &record["decision"]), (&1.into(), &"SIGKILL".into(), &"replaced".into()), "{record}");
    let dump = std::fs::read_to_string(record["dump"].as_str().expect("a file with stacks")).expect("read the stacks");
    assert!(dump.contains(&format!("process {hung}\n")), "{dump}");
    assert!(!send_signal(hung, "0"), "the process is gone");
}

/// Step at which the second generation began; beyond all steps before it has.
fn grown_at(restored: &[Value]) -> u64 {
    restored.get(1).map_or(u64::MAX / 2, |event| number(&event["step"]))
}
