//! Every class of failure is told apart and cured, and the numbers do not show it.

use serde_json::Value;

use crate::sandbox::{Run, World, skipped, tool};

const STEPS: u64 = 40;
const DRILL_STEP: u64 = 20;

/// A run of two workers, of which one has a drill before step 20, besides the same without.
fn with_drill(world: &World, drill: &str, settings: &[&str]) -> (Run, Run) {
    let whole = world.train("whole", &["--workers", "2", "--quiet"]);
    let drill = format!("{drill}@{DRILL_STEP}");
    let run = world.train("run", &[["--workers", "2", "--quiet", "--drill", &drill].as_slice(), settings].concat());
    (run, whole)
}

/// The one recovery of a run; it must be of this class and from the memory of a worker.
#[track_caller]
fn only_recovery(run: &Run, class: &str) -> Value {
    let recovered = run.events_named("recovered");
    assert_eq!(recovered.len(), 1, "{recovered:?}");
    assert_eq!(recovered[0]["class"], class, "{recovered:?}");
    assert_eq!(recovered[0]["steps_lost"], 0, "{recovered:?}");
    assert!(recovered[0]["source"].as_str().is_some_and(|source| source.starts_with("memory")), "{recovered:?}");
    recovered[0].clone()
}

#[track_caller]
fn expect_same_end(run: &Run, whole: &Run) {
    run.expect_undisturbed(whole, 1);
    assert!(run.checkpoint_tensors(STEPS) == whole.checkpoint_tensors(STEPS), "the state at the end differs");
    assert_eq!(run.live_workers(), 0);
    let failures = std::fs::read_to_string(run.path.join("failures.jsonl")).expect("read the failures");
    assert!(!failures.is_empty());
    for line in failures.lines() {
        serde_json::from_str::<Value>(line).expect("every failure is a line of JSON");
    }
}

#[test]
fn a_hung_worker_is_found_shown_and_replaced() {
    let world = World::prepared();
    let (run, whole) = with_drill(&world, "hang:1", &["--set", "cluster.hang.step_s=3"]);
    let lost = run.events_named("worker_lost");
    assert_eq!(lost.len(), 1, "{lost:?}");
    assert_eq!((&lost[0]["worker"], &lost[0]["class"]), (&Value::from(1), &Value::from("hung")), "{lost:?}");
    // What it was doing is in a file.
    let dumped = run.events_named("stack_dumped");
    assert_eq!(dumped.len(), 1, "{dumped:?}");
    let path = dumped[0]["path"].as_str().expect("a path");
    let path = run.path.join(path);
    let dump = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(dump.contains("cloze-worker"), "{dump}");
    let is_refused = ["not permitted", "was ended after"].iter().any(|words| dump.contains(words));
    if is_refused {
        skipped("the stacks of a worker that hangs", "the debugger may not attach, or took too long");
    } else if tool("the stacks of a worker that hangs", "gdb").is_some() {
        // By name, down to the place where it hangs.
        let frames: Vec<&str> = dump.lines().filter(|line| line.starts_with('#')).collect();
        assert!(frames.iter().any(|frame| frame.contains("cloze_worker::drill")), "{dump}");
    }
    assert_eq!(run.events_named("worker_restarted").len(), 1);
    let recovered = only_recovery(&run, "hung");
    assert_eq!(recovered["source"], "memory of worker 0");
    expect_same_end(&run, &whole);
}

#[test]
fn a_shared_out_state_is_still_there_where_nobody_is_lost() {
    let world = World::prepared();
    let whole = world.train("whole", &["--workers", "2", "--quiet", "--set", "train.shard=parameters"]);
    let settings = ["--set", "train.shard=parameters", "--set", "checkpoint.every_steps=1000000"];
    let run = world.train("run", &[["--workers", "2", "--quiet", "--drill", "nan:1@20"].as_slice(), &settings].concat());
    let recovered = only_recovery(&run, "not_finite");
    assert_eq!(recovered["source"], "memory");
    expect_same_end(&run, &whole);
}

#[test]
fn a_loss_that_is_not_a_number_is_tried_again() {
    let world = World::prepared();
    let (run, whole) = with_drill(&world, "nan:1", &[]);
    let aborted = run.events_named("generation_aborted");
    assert_eq!(aborted.len(), 1, "{aborted:?}");
    let reason = aborted[0]["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("worker 1 (rank 1)") && reason.contains("not finite"), "{reason}");
    assert_eq!(run.events_named("worker_started").len(), 2, "no process has to be replaced");
    let recovered = only_recovery(&run, "not_finite");
    assert_eq!(recovered["source"], "memory");
    expect_same_end(&run, &whole);
}

#[test]
fn steps_that_nobody_reports_are_counted_and_named() {
    let world = World::prepared();
    // Steps 7, 14, 21, … and the last are reported; the failure is between two of them.
    let (run, whole) = with_drill(&world, "nan:1", &["--set", "train.log_every_steps=7"]);
    let reported: Vec<u64> = run.losses().into_keys().collect();
    assert_eq!(reported, [7, 14, 21, 28, 35, STEPS]);
    let text = String::from_utf8(std::fs::read(run.path.join("failures.jsonl")).expect("read the failures")).expect("text");
    let failure: Value = serde_json::from_str(text.lines().next().expect("a failure")).expect("JSON");
    let found = ["worker", "rank", "step", "class"].map(|field| failure[field].clone());
    assert_eq!(found, [Value::from(1), Value::from(1), Value::from(DRILL_STEP - 1), Value::from("not_finite")], "{failure}");
    assert!(failure["host"].is_string(), "{failure}");
    let [found, expected] = [&run, &whole].map(|run| {
        let status = world.done(&["status", &run.path.display().to_string(), "--json"]).stdout;
        let status: Value = serde_json::from_str(&status).expect("JSON");
        ["steps", "tokens", "examples"].map(|total| status["run"]["totals"][total].clone())
    });
    assert_eq!(found, expected, "steps, tokens, examples");
}

#[test]
fn a_worker_that_dies_at_the_end_costs_no_result() {
    let world = World::prepared();
    let whole = world.train("whole", &["--workers", "2", "--quiet"]);
    for victim in ["0", "1"] {
        // It is killed when the step before is reported, and so in the last step or while that is saved.
        let (name, drill) = (format!("run-{victim}"), format!("kill:{victim}@{}", STEPS - 1));
        let run = world.train(&name, &["--workers", "2", "--quiet", "--drill", &drill]);
        assert_eq!(run.events_named("run_finished")[0]["step"], STEPS, "worker {victim}");
        assert!(run.checkpoint_tensors(STEPS) == whole.checkpoint_tensors(STEPS), "worker {victim}: the state at the end differs");
        world.done(&["checkpoints", "verify", &run.path.display().to_string()]);
        assert_eq!(run.live_workers(), 0);
    }
}

#[test]
fn a_loss_that_is_not_a_number_ends_a_run_without_retries() {
    let world = World::prepared();
    let drill = format!("nan:0@{DRILL_STEP}");
    let train = ["train", "recipe.yaml", "--run", "run", "--workers", "2", "--drill", &drill, "--set", "cluster.retries_per_step=0"];
    let outcome = world.cloze(&train).expect_code(9);
    outcome.expect_words(&["error: the loss or its gradient is not finite", &format!("step {DRILL_STEP}"), "hint: "]);
    let run = world.run("run");
    assert_eq!(run.last_step(), DRILL_STEP - 1);
    assert_eq!(run.events_named("run_failed").len(), 1);
    assert_eq!(run.live_workers(), 0);
}

#[test]
fn a_worker_without_memory_is_replaced() {
    let world = World::prepared();
    let (run, whole) = with_drill(&world, "oom:1", &[]);
    assert_eq!(run.events_named("worker_restarted").len(), 1);
    let exited = run.events_named("worker_exited");
    assert!(exited.iter().any(|event| event["worker"] == 1), "{exited:?}");
    let recovered = only_recovery(&run, "out_of_memory");
    assert_eq!(recovered["source"], "memory of worker 0");
    expect_same_end(&run, &whole);
}
