//! A study folder for the tests of reports.

use std::fs;
use std::path::{Path, PathBuf};

use cloze_cluster::Event;
use serde_json::{Value, json};

use crate::view::fixtures::{recorded, start, step};

/// A study of two arms with three seeds each and one that the paper lacks, all evaluated but one that failed.
pub fn study(root: &Path) -> PathBuf {
    let folder = root.join("table1");
    write(
        &folder.join("study.json"),
        &json!({
            "version": 1, "name": "table1", "file": "/recipes/table1.yaml", "profile": "toy", "overrides": [], "hash": "5d0f",
            "metric": {"task": "mmlu", "score": "accuracy"}, "created": 100.0,
            "keys": ["objective.auxiliary", "objective.auxiliary_ratio"],
            "expected": {
                "source": "It's All in The [MASK], table 1",
                "columns": [{"name": "MMLU", "metric": {"task": "mmlu", "score": "accuracy"}, "tolerance": 1.5}],
                "rows": [
                    {"name": "100 % ATP", "ours": {"arm": [["objective.auxiliary", "none"]]}, "values": {"MMLU": 37.07}},
                    {"name": "80 % ATP / 20 % dummy", "ours": {"arm": [["objective.auxiliary", "dummy_mlm"], ["objective.auxiliary_ratio", 0.2]]},
                     "values": {"MMLU": 43.0}},
                    {"name": "Llama 3 <1B>", "ours": "quoted", "values": {"MMLU": 49.3}}
                ],
                "orders": [{"column": "MMLU", "groups": [["80 % ATP / 20 % dummy"], ["100 % ATP"]]}],
                "reference_only": false, "note": "A toy profile on a CPU."
            }
        }),
    );
    let arms = [("none", 0.0, [0.366, 0.370, 0.374]), ("dummy_mlm", 0.2, [0.395, 0.400, 0.405]), ("mlm", 0.2, [0.31, 0.32, 0.0])];
    for (auxiliary, ratio, scores) in arms {
        for (seed, accuracy) in (42_u64..).zip(scores) {
            let failed = accuracy == 0.0;
            trial(&folder, (auxiliary, ratio, seed), if failed { None } else { Some(accuracy) });
        }
    }
    folder
}

fn trial(study: &Path, (auxiliary, ratio, seed): (&str, f64, u64), accuracy: Option<f64>) {
    let hash = format!("{auxiliary}-{seed}");
    let run = format!("runs/table1-{hash}");
    let failure = json!({"kind": "run", "what": "restart budget spent", "place": null, "expected": null, "found": null, "cause": null,
        "hint": null});
    write(
        &study.join(format!("trials/{hash}.json")),
        &json!({
            "hash": hash, "name": format!("table1-{hash}"), "seed": seed, "data_hash": "d", "parent": null, "run": run,
            "parameters": {"objective.auxiliary": auxiliary, "objective.auxiliary_ratio": ratio},
            "state": if accuracy.is_some() { "done" } else { "failed" }, "step": 20, "attempts": 1,
            "failure": if accuracy.is_some() { Value::Null } else { failure }, "metric": accuracy
        }),
    );
    run_folder(&study.join(run), seed, accuracy);
}

/// A run of 20 steps, evaluated where it has an accuracy.
pub fn run_folder(folder: &Path, seed: u64, accuracy: Option<f64>) {
    let name = folder.file_name().unwrap().to_string_lossy().into_owned();
    let steps = (1..=20).map(|number| step(1, number, 4.0 / (number as f64).sqrt() + seed as f64 / 100.0));
    let end = match accuracy {
        Some(_) => Event::RunFinished { step: 20, seconds: 10.0 },
        None => Event::RunFailed {
            failure: cloze_recipes::failure::Failure::new(cloze_recipes::failure::FailureKind::Run, "restart budget spent"),
        },
    };
    let events = recorded(start().into_iter().chain(steps).chain([end]));
    let log: String = events.iter().map(|event| serde_json::to_string(event).unwrap() + "\n").collect();
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("events.jsonl"), log).unwrap();
    fs::write(folder.join("recipe.yaml"), format!("version: 1\nname: {name}\nseed: {seed}\ntrain:\n  device: cuda\n  steps: 20\n"))
        .unwrap();
    write(
        &folder.join("run.json"),
        &json!({"name": name, "recipe_hash": "4f1c", "data_fingerprint": "d", "cloze_version": "0", "worker_build": "b", "git_revision": null,
            "command_line": ["cloze"], "host": "h", "process_id": 1, "started": 50.0}),
    );
    let Some(accuracy) = accuracy else { return };
    let scores =
        |accuracy: f64| json!({"num_rows": 100, "accuracy": accuracy, "macro_f1": accuracy / 2.0, "confusion": [[30, 20], [10, 40]]});
    let file = |number: u64| json!({"file": format!("subject-{number}.csv"), "scores": scores(accuracy + number as f64 / 100.0)});
    write(
        &folder.join("eval/eval.json"),
        &json!({"model": "m", "recipe": name, "recipe_hash": "4f1c", "mean_accuracy": accuracy, "mean_macro_f1": accuracy / 2.0,
            "tasks": [{"name": "mmlu", "labels": ["A", "B"], "scores": scores(accuracy), "num_cut": 0,
                "files": [file(1), file(2), file(3)]}]}),
    );
}

/// Writes JSON, and the folder that it lies in.
pub fn write(path: &Path, value: &Value) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, serde_json::to_vec_pretty(value).unwrap()).unwrap();
}
