//! A run that is killed and resumed computes what it would have computed without that, bit for bit.

use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{World, wait_until};

/// About 45 epochs, and two seconds.
const STEPS: u64 = 300;
/// The kill comes after this step, in the fourteenth epoch.
const KILLED_AFTER_STEP: u64 = 90;

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let world = World::prepared();
    let steps = format!("train.steps={STEPS}");
    let arguments = ["--workers", "2", "--quiet", "--set", &steps, "--set", "checkpoint.every_steps=20"];
    let whole = world.train("whole", &arguments);
    let process = world.start_training("killed", &arguments);
    let killed = world.run("killed");
    wait_until("the run trains", Duration::from_secs(90), || killed.last_step() >= KILLED_AFTER_STEP);
    assert_eq!(killed.live_workers(), 2);
    // As when the machine goes down: nobody is left who holds the state in memory.
    process.kill();
    killed.kill_workers();
    assert!(killed.last_step() < STEPS, "the kill came too late");

    world.done(&["resume", "killed", "--workers", "2", "--quiet"]);
    let restored = killed.restored_steps();
    assert_eq!((restored.len(), restored[0]), (2, 0));
    assert!(restored[1] > 0 && restored[1].is_multiple_of(20), "{restored:?}");
    assert_eq!(whole.loss_bits().len() as u64, STEPS);
    assert_eq!(killed.loss_bits(), whole.loss_bits());
    assert!(killed.checkpoint_tensors(STEPS) == whole.checkpoint_tensors(STEPS), "the state at the end differs");

    // The claim is worth something only over several epochs, and where every worker adds up several packs in a step.
    let manifest: Value = serde_json::from_slice(&world.read("prepared/manifest.json")).expect("the manifest is JSON");
    let samples = manifest["samples"].as_u64().expect("the manifest counts samples");
    assert!(STEPS * 48 > 2 * samples, "{samples} samples");
    let tokens = whole.events_named("step").iter().map(|event| event["tokens"].as_u64()).min().flatten();
    assert!(tokens > Some(3 * 256), "a step of {tokens:?} tokens may fit into fewer than four packs");
}

#[test]
fn what_is_missing_of_a_runs_past_is_told() {
    let world = World::prepared();
    world.done(&["train", "recipe.yaml", "--run", "run", "--workers", "2", "--quiet", "--until-step", "5"]);
    let run = world.run("run");
    // Nobody needs the journal of a run that nobody works on; that it is damaged is worth a word.
    std::fs::write(run.path.join("journal.jsonl"), "").expect("empty the journal");
    world.done(&["resume", "run", "--until-step", "7", "--quiet"]);
    let warnings = run.events_named("warning");
    let message = warnings[0]["message"].as_str().expect("a message");
    assert!(message.contains("journal.jsonl is damaged (no whole line in 0 bytes)"), "{message}");
    let generations: Vec<Value> = run.events_named("generation_started").into_iter().map(|event| event["generation"].clone()).collect();
    assert_eq!(generations, [1, 2], "the events know the number of the last generation");

    std::fs::write(run.path.join("events.jsonl"), "").expect("empty the events");
    let outcome = world.cloze(&["resume", "run", "--quiet"]).expect_code(4);
    outcome.expect_words(&["the event log names no start of the run", "events.jsonl", "--workers N"]);
    world.done(&["resume", "run", "--workers", "2", "--quiet", "--until-step", "9"]);
    assert_eq!(run.events_named("generation_started")[0]["generation"], 3, "the journal knows it as well");
    world.done(&["resume", "run", "--until-step", "41"]).expect_words(&["the run has 40 steps, so it goes on to its end"]);
}

#[test]
fn a_run_goes_on_operated_otherwise_and_computes_the_same() {
    let world = World::prepared();
    let whole = world.train("whole", &["--workers", "2", "--quiet"]);
    let strict = ["--set", "cluster.max_restarts=0", "--set", "checkpoint.every_steps=1000"];
    let arguments =
        [["train", "recipe.yaml", "--run", "run", "--workers", "2", "--quiet", "--drill", "kill:1@20"].as_slice(), &strict].concat();
    world.cloze(&arguments).expect_code(9).expect_words(&["no replacement is allowed (`cluster.max_restarts` is 0)"]);
    let run = world.run("run");
    let kept = std::fs::read_to_string(run.path.join("recipe.yaml")).expect("the run keeps its recipe");

    let other = world.cloze(&["resume", "run", "--set", "cluster.max_restarts=1", "--set", "train.learning_rate=1", "--set", "seed=7"]);
    other.expect_code(8).expect_words(&["a resumed run computes what it was started with", "found: train.learning_rate=1, seed=7"]);
    // Sections around a run are no part of it.
    world.cloze(&["resume", "run", "--set", "resources.nodes=3"]).expect_code(8).expect_words(&["found: resources.nodes=3"]);
    assert_eq!(std::fs::read_to_string(run.path.join("recipe.yaml")).ok(), Some(kept), "nothing is written");

    let lenient = ["--set", "cluster.max_restarts=1", "--set", "checkpoint.every_steps=10", "--drill", "kill:0@25"];
    world.done(&[["resume", "run", "--quiet"].as_slice(), &lenient].concat());
    assert_eq!(run.events_named("worker_restarted").len(), 1);
    assert!(run.checkpoint_path(30, "manifest.json").is_file(), "it saves every ten steps now");
    assert_eq!(run.loss_bits(), whole.loss_bits());
    assert!(run.checkpoint_tensors(40) == whole.checkpoint_tensors(40), "the state at the end differs");
    // What was set stays.
    let text = std::fs::read_to_string(run.path.join("recipe.yaml")).expect("the run keeps its recipe");
    assert!(text.contains("max_restarts: 1\n") && text.contains("every_steps: 10\n"), "{text}");
}

#[test]
fn a_run_that_has_lost_its_checkpoints_says_so() {
    let world = World::prepared();
    world.done(&["train", "recipe.yaml", "--run", "run", "--workers", "1", "--quiet", "--until-step", "10"]);
    let run = world.run("run");
    std::fs::remove_dir_all(run.path.join("checkpoints")).expect("lose the checkpoints");
    world.done(&["resume", "run", "--quiet", "--until-step", "20"]);
    let warnings = run.events_named("warning");
    let message = warnings.first().and_then(|event| event["message"].as_str()).expect("a warning");
    assert_eq!(message, "the run saved step 10, and no checkpoint of it is left: it starts from scratch");
    world.done(&["resume", "run", "--quiet", "--until-step", "15"]).expect_words(&["the run is at step 20 already"]);
}
