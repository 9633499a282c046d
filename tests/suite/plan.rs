//! A plan counts what a run needs and says everything that is wrong with it at once.

use serde_json::Value;

use crate::sandbox::World;

/// Level and name of every check.
fn checks(report: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    report["checks"].as_array().expect("a list of checks").iter().map(|check| (text(&check["level"]), text(&check["name"]))).collect()
}

#[test]
fn a_prepared_recipe_is_planned_without_starting_anything() {
    let world = World::prepared();
    let outcome = world.done(&["plan", "recipe.yaml", "--workers", "4", "--tokens-per-second", "1000", "--json"]);
    let report: Value = serde_json::from_str(&outcome.stdout).expect("the plan is JSON");
    let plan = &report["plan"];
    assert_eq!((&report["ok"], &plan["workers"], &plan["steps"]), (&true.into(), &4.into(), &40.into()), "{report}");
    let per_step = plan["tokens"]["per_step"].as_u64().expect("tokens of a step");
    assert!((900..1300).contains(&per_step), "{per_step}");
    let seconds = plan["time"]["seconds"].as_f64().expect("a time");
    assert!((seconds - 40.0 * per_step as f64 / 4000.0).abs() < 1e-6, "{seconds}");
    assert!(checks(&report).iter().all(|(level, _)| level == "ok"), "{report}");
    // A checkpoint takes what the plan says, but for the small files.
    let run = world.train("run", &["--workers", "4"]);
    let stored: usize = run.checkpoint_tensors(40).values().map(Vec::len).sum();
    let bytes = plan["checkpoints"]["bytes"].as_u64().expect("bytes") as f64;
    assert!((stored as f64 / bytes - 1.0).abs() < 0.3, "{stored} stored, {bytes} planned");
    assert!(!world.path("runs").exists(), "a plan makes no folder");
}

/// One worker's own examples of batches of 48 are timed.
#[test]
fn the_steps_of_a_recipe_are_timed_for_its_plan() {
    let world = World::prepared();
    // Whole packs go to workers, so that their parts of a batch differ.
    for (workers, examples_of_six_steps) in [(1, 288..=288), (3, 1..=287)] {
        let outcome = world.done(&["bench", "recipe.yaml", "--workers", &workers.to_string(), "--steps", "6", "--warmup-steps", "2"]);
        let figures: Value = serde_json::from_str(&outcome.stdout).expect("the figures are JSON");
        let number = |key: &str| figures[key].as_f64().expect("a number");
        assert_eq!((number("workers"), number("steps")), (f64::from(workers), 6.0), "{figures}");
        assert!(examples_of_six_steps.contains(&(number("examples") as u64)), "{figures}");
        let rate = number("examples") / number("seconds");
        assert!((rate / number("examples_per_s") - 1.0).abs() < 0.1, "{rate}: {figures}");
        let speed = figures["tokens_per_s"].as_f64().expect("a speed").to_string();
        outcome.expect_words(&[&format!("`cloze plan recipe.yaml --workers {workers} --tokens-per-second {speed}`")]);
        let plan = world.done(&["plan", "recipe.yaml", "--workers", &workers.to_string(), "--tokens-per-second", &speed, "--json"]);
        let report: Value = serde_json::from_str(&plan.stdout).expect("the plan is JSON");
        assert_eq!(report["plan"]["parameters"], figures["parameters"], "{report}");
    }
    assert!(!world.path("runs").exists(), "nothing is kept");

    world.cloze(&["bench", "recipe.yaml", "--set", "data.output=nowhere"]).expect_code(4).expect_words(&["data is not prepared"]);
    let foreign = world.cloze(&["bench", "recipe.yaml", "--device", "cuda"]).expect_code(3);
    foreign.expect_words(&["`--set train.device=cuda"]);
    world.cloze(&["bench", "--workload", "nowhere", "--set", "seed=1"]).expect_code(3).expect_words(&["`--workload` has none"]);
    world.cloze(&["bench", "--workload", "nowhere"]).expect_code(4).expect_words(&["the workload file cannot be read"]);
}

#[test]
fn everything_that_is_wrong_is_said_at_once() {
    let world = World::with_corpus(50);
    let wrong = [
        "--set",
        "data.sources=[{url: nowhere}]",
        "--set",
        "model.anchor_token=no-such-token",
        "--set",
        "checkpoint.url=/proc/nowhere",
        "--set",
        "evaluation=[]",
    ];
    let outcome = world.cloze(&[["plan", "recipe.yaml", "--json"].as_slice(), &wrong].concat());
    let report: Value = serde_json::from_str(&outcome.stdout).expect("the plan is JSON");
    let found = checks(&report);
    for name in ["source", "tokenizer", "checkpoint place"] {
        assert!(found.contains(&("fail".to_owned(), name.to_owned())), "{name}: {report}");
    }
    assert!(found.contains(&("warn".to_owned(), "prepared data".to_owned())), "{report}");
    assert_eq!(outcome.code, Some(8), "{}", outcome.stderr);
    outcome.expect_words(&["3 of ", " checks failed", "tokenizer: anchor `no-such-token` is not one token"]);
}

#[test]
fn a_sweep_is_planned_as_it_would_be_submitted() {
    let world = World::with_corpus(2000);
    let around = "resources: {nodes: 1, workers_per_node: 1}\nsweep: {grid: {data.max_length: [64, 128]}, seeds: [1, 2], concurrency: 2}\n";
    world.write("sweep.yaml", format!("extends: recipe.yaml\nversion: 1\nname: many\n{around}"));
    world.write("cluster.yaml", "version: 1\nname: mine\nkind: slurm\nslurm: {partition: main}\n");
    let plan = || world.done(&["plan", "sweep.yaml", "--cluster", "cluster.yaml", "--offline"]).stdout;
    let text = plan();
    let study = world.path("studies/many").display().to_string();
    for part in [
        "batch script of the first array of jobs",
        "#SBATCH --array=0-3%2\n",
        &format!("/cloze sweep work {study} --batch 1\n"),
        &format!("OK    prepared data: the sweep prepares 2 times, in {study}/data\n"),
        "OK    evaluation: 1 file there\n",
        "OK    batch script: can be written\n",
    ] {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
    assert!(!world.path("studies").exists(), "a plan makes no folder");
    let elsewhere = world.done(&["plan", "sweep.yaml", "--cluster", "cluster.yaml", "--offline", "--folder", "tried"]).stdout;
    let tried = world.path("tried").display().to_string();
    for part in [format!("/cloze sweep work {tried} --batch 1\n"), format!(", in {tried}/data\n")] {
        assert!(elsewhere.contains(&part), "`{part}` is missing in:\n{elsewhere}");
    }
    let one = world.cloze(&["plan", "recipe.yaml", "--cluster", "cluster.yaml", "--offline", "--run", "first"]).stdout;
    let run = world.path("first").display().to_string();
    for part in [format!("#SBATCH --chdir={run}\n"), "#SBATCH --job-name=cloze-first-KEY-1\n".to_owned()] {
        assert!(one.contains(&part), "`{part}` is missing in:\n{one}");
    }
    // Data of another recipe, where the sweep would look for it.
    let script = world.done(&["sweep", "run", "sweep.yaml", "--preview"]).stdout;
    assert!(script.contains("4 trials, 0 earlier stages, 2 data preparations"), "{script}");
    world.done(&["sweep", "run", "sweep.yaml", "--quiet", "--set", "train.steps=1"]);
    assert!(plan().contains(&format!("OK    prepared data: 2 preparations are there, in {study}/data\n")), "{}", plan());
}

#[test]
fn an_evaluation_file_that_is_missing_fails_the_plan() {
    let world = World::prepared();
    let set = ["--set", "evaluation=[{name: t, files: [gone.jsonl], labels: [{value: a}, {value: b}]}]"];
    let outcome = world.cloze(&[["plan", "recipe.yaml"].as_slice(), &set].concat()).expect_code(4);
    assert!(outcome.stdout.contains("FAIL  evaluation: 1 of 1 file of the task `t` not there; at "), "{}", outcome.stdout);
}

#[test]
fn a_recipe_that_does_not_fit_says_what_would_help() {
    let world = World::prepared();
    world.write("cluster.yaml", "version: 1\nname: small\nkind: local\n");
    let set = ["--set", "model.shape={hidden_size: 1024, intermediate_size: 2048, num_hidden_layers: 24, num_attention_heads: 16}"];
    let text = "extends: recipe.yaml\nversion: 1\nresources: {nodes: 1, workers_per_node: 4, memory_per_node_mib: 12000}\n";
    world.write("tight.yaml", text);
    let outcome = world.cloze(&[["plan", "tight.yaml", "--cluster", "cluster.yaml"].as_slice(), &set].concat()).expect_code(3);
    assert!(outcome.stdout.contains("FAIL  memory: the recipe does not fit: "), "{}", outcome.stdout);
    outcome.expect_words(&["memory: the recipe does not fit", "`train.shard=parameters`"]);
}

/// Nothing is made for a study of which trials cannot run where it is to run; all of them are told, with what would help.
#[test]
fn a_study_with_trials_that_do_not_fit_is_not_begun() {
    let world = World::with_corpus(2000);
    let around = "\
resources: {nodes: 1, workers_per_node: 1, memory_per_node_mib: 600}
sweep:
  list:
    - {train.learning_rate: 0.001}
    - {model.shape: {hidden_size: 512, intermediate_size: 768, num_hidden_layers: 16, num_attention_heads: 8}}
    - {model.shape: {hidden_size: 768, intermediate_size: 1152, num_hidden_layers: 16, num_attention_heads: 8}}
";
    world.write("large.yaml", format!("extends: recipe.yaml\nversion: 1\nname: large\n{around}"));
    let outcome = world.cloze(&["sweep", "run", "large.yaml"]).expect_code(3);
    let outcome = outcome.expect_words(&["2 of 3 trials and earlier stages need more memory than there is", "hint: of the first one, "]);
    for size in ["\"hidden_size\":512", "\"hidden_size\":768"] {
        let line = outcome.stderr.lines().find(|line| line.contains(size)).unwrap_or_else(|| panic!("{size} in {}", outcome.stderr));
        assert!(line.contains("the recipe does not fit: ") && line.contains(" of 600 MiB of a worker"), "{line}");
    }
    assert!(!world.path("studies").exists(), "nothing was made");
    let plan = world.cloze(&["plan", "large.yaml"]).expect_code(3).stdout;
    assert_eq!(plan.matches("FAIL  memory: large-").count(), 2, "{plan}");
    // The other trial alone fits.
    world.done(&["sweep", "run", "large.yaml", "--set", "sweep.list=[{train.learning_rate: 0.001}]", "--set", "train.steps=2"]);
}
