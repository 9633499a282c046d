//! Runs become a report: two trained and evaluated runs beside what a paper says, as table, Markdown, JSON and a page for a browser.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::sandbox::{World, run_command, skipped};

/// The browser that `scripts/test-tools.sh` installs.
const CHROMIUM: &str = "/usr/bin/chromium";

/// Two runs that differ in seed and learning rate, evaluated.
fn trained() -> World {
    let world = World::prepared();
    for (name, rate, seed) in [("slow", "1e-4", "1"), ("fast", "3e-3", "2")] {
        let (rate, seed) = (format!("train.learning_rate={rate}"), format!("seed={seed}"));
        world.train(name, &["--quiet", "--set", "train.steps=10", "--set", &rate, "--set", &seed]);
        world.done(&["eval", name]);
    }
    world
}

/// A study folder around the two runs, as a sweep writes it.
fn study(world: &World) {
    for (name, rate, seed) in [("slow", 1e-4, 1), ("fast", 3e-3, 2)] {
        fs::create_dir_all(world.path("studies/rates/runs")).expect("make a study");
        fs::rename(world.path(name), world.path(&format!("studies/rates/runs/{name}"))).expect("move a run into the study");
        let trial = json!({
            "hash": name, "name": name, "parameters": {"train.learning_rate": rate}, "seed": seed, "data_hash": "d", "parent": null,
            "run": format!("runs/{name}"), "state": "done", "step": 10, "attempts": 1, "failure": null, "metric": null
        });
        fs::create_dir_all(world.path("studies/rates/trials")).expect("make a folder of trials");
        world.write(&format!("studies/rates/trials/{name}.json"), trial.to_string());
    }
    let metric = json!({"task": "sentiment", "score": "accuracy"});
    let study = json!({
        "version": 1, "name": "rates", "file": "recipe.yaml", "profile": null, "overrides": [], "hash": "0f", "metric": metric,
        "keys": ["train.learning_rate"], "created": 1.0,
        "expected": {
            "source": "a table of ours", "reference_only": false, "note": null, "orders": [],
            "columns": [{"name": "Sentiment", "metric": metric, "tolerance": 100.0}],
            "rows": [{"name": "a fast rate", "ours": {"arm": [["train.learning_rate", 3e-3]]}, "values": {"Sentiment": 50.0}}]
        }
    });
    world.write("studies/rates/study.json", study.to_string());
}

#[test]
fn two_runs_become_a_report_a_list_and_a_difference() {
    let world = trained();
    let table = world.done(&["report", "slow", "fast"]).stdout;
    for part in ["slow", "fast", "sentiment accuracy", "training loss", "(1)"] {
        assert!(table.contains(part), "`{part}` is missing in:\n{table}");
    }
    let list = world.done(&["runs", "--root", "."]).stdout;
    assert!(list.contains("finished") && list.contains("10/10") && list.contains("2, newest 10"), "{list}");
    let found = world.done(&["runs", "ls", "--root", ".", "--search", "learning_rate=0.003", "--json"]).stdout;
    let found: Value = serde_json::from_str(&found).expect("the list is JSON");
    assert_eq!((found["runs"].as_array().map(Vec::len), &found["runs"][0]["name"]), (Some(1), &json!("fast")));
    let shown = world.done(&["runs", "show", "slow"]).stdout;
    assert!(shown.contains("train.learning_rate: 0.0001") && shown.contains("worker-hours"), "{shown}");
    for command in [["runs", "show", "corpus"].as_slice(), &["logs", "corpus"], &["eval", "corpus"], &["eval", "runs/nothere"]] {
        world.cloze(command).expect_code(4).expect_words(&["this folder holds no run"]);
    }
    world.cloze(&["eval", "nothere.yaml"]).expect_code(3).expect_words(&["cannot read the recipe"]);
    let odd = [b"\x08\0\0\0\0\0\0\0".as_slice(), b"{}      "].concat();
    world.write("odd.safetensors", odd);
    world.cloze(&["bench", "--workload", "odd.safetensors"]).expect_code(7).expect_words(&["the workload file is not valid", "`offsets`"]);

    let difference: Value = serde_json::from_str(&world.done(&["diff", "slow", "fast", "--json"]).stdout).expect("the difference is JSON");
    let keys: Vec<&str> = difference["recipe"].as_array().into_iter().flatten().filter_map(|pair| pair["key"].as_str()).collect();
    assert_eq!(keys, ["seed", "train.learning_rate"]);
    let loss = difference["metrics"].as_array().into_iter().flatten().find(|metric| metric["name"] == "loss").expect("both have a loss");
    assert_ne!(loss["delta"], json!(0.0));
    // A folder of checkpoints is listed as a bucket is.
    let bucket = world.done(&["runs", "--root", &format!("file://{}", world.path("").display())]).stdout;
    assert!(bucket.contains("in a bucket") && bucket.contains("newest 10"), "{bucket}");
}

#[test]
fn a_study_is_reported_beside_its_paper() {
    let world = trained();
    study(&world);
    let markdown = world.done(&["report", "studies/rates", "--format", "markdown"]).stdout;
    assert_eq!(markdown.as_bytes(), world.read("studies/rates/report/report.md"));
    assert!(markdown.contains("**within**") && markdown.contains("one seed, so that nothing is known of its spread"), "{markdown}");
    let report: Value = serde_json::from_slice(&world.read("studies/rates/report/report.json")).expect("the report is JSON");
    let accuracy = report["table"]["rows"][0]["cells"][0]["ours"]["mean"].as_f64().expect("the arm has a mean");
    let evaluation: Value = serde_json::from_slice(&world.read("studies/rates/runs/fast/eval/eval.json")).expect("the scores are JSON");
    let scored = evaluation["tasks"][0]["scores"]["accuracy"].as_f64().expect("the task has an accuracy");
    assert!((accuracy - scored * 100.0).abs() < 1e-9, "{accuracy} is not {scored}");
    let list = world.done(&["runs", "--json"]).stdout;
    assert!(list.contains("\"study\": \"rates\""), "{list}");
    // A damaged file is named, and the rest is there.
    world.write("studies/rates/runs/slow/eval/eval.json", "{");
    let table = world.done(&["report", "studies/rates"]).stdout;
    assert!(table.contains("eval.json: a file is not what it should be") && table.contains("a fast rate"), "{table}");
    open_in_browser(&world, &world.path("studies/rates/report/report.html"));
}

/// Opens the page and reads back what the browser made of it.
fn open_in_browser(world: &World, page: &Path) {
    if !Path::new(CHROMIUM).exists() {
        skipped("the report in a browser", &format!("{CHROMIUM} is not there"));
        return;
    }
    let profile = format!("--user-data-dir={}", world.path("browser").display());
    let mut command = Command::new(CHROMIUM);
    command.args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom", &profile]);
    let document = run_command(command.arg(format!("file://{}", page.display()))).expect_code(0).stdout;
    for part in ["<h2>Training</h2>", "a fast rate", "</svg>", "Training loss by step</title>"] {
        assert!(document.contains(part), "`{part}` is missing in what the browser shows");
    }
}
