//! What is done with a trained model: evaluate, export, predict.

use std::fs;

use serde_json::Value;

use crate::sandbox::{Process, Run, World};

fn trained(world: &World) -> Run {
    world.train("run", &["--quiet", "--set", "train.steps=10"])
}

#[test]
fn eval_prints_a_table_and_writes_the_same_scores() {
    let world = World::prepared();
    trained(&world);
    let table = world.done(&["eval", "run"]).stdout;
    let report: Value = serde_json::from_slice(&world.read("run/eval/eval.json")).expect("the report is JSON");
    let task = &report["tasks"][0];
    assert_eq!((task["name"].as_str(), task["scores"]["num_rows"].as_u64()), (Some("sentiment"), Some(50)));
    let cells: Vec<u64> = task["scores"]["confusion"].as_array().into_iter().flatten().flat_map(numbers).collect();
    assert_eq!((cells.len(), cells.iter().sum::<u64>()), (4, 50));
    let accuracy = (cells[0] + cells[3]) as f64 / 50.0;
    let stated = task["scores"]["accuracy"].as_f64().expect("the accuracy is a number");
    assert!((stated - accuracy).abs() < 1e-12, "{stated}, by the confusion matrix {accuracy}");
    let shown = format!("{:.2}", accuracy * 100.0);
    let markdown = String::from_utf8(world.read("run/eval/eval.md")).expect("the report is UTF-8");
    for text in [&table, &markdown] {
        for part in ["sentiment", "macro-F1", "mean", shown.as_str()] {
            assert!(text.contains(part), "`{part}` is missing in:\n{text}");
        }
    }
    assert_eq!(report["recipe_hash"], world.run("run").events_named("run_started")[0]["recipe_hash"]);

    // The exported folder is the same model.
    world.done(&["export", "run", "--output", "model"]);
    world.done(&["eval", "run", "--model", "model", "--output", "again"]);
    let again: Value = serde_json::from_slice(&world.read("again/eval.json")).expect("the report is JSON");
    assert_eq!(again["tasks"], report["tasks"]);
}

fn numbers(row: &Value) -> Vec<u64> {
    row.as_array().into_iter().flatten().filter_map(Value::as_u64).collect()
}

#[test]
fn export_writes_the_checkpoint_and_nothing_over_what_is_there() {
    let world = World::prepared();
    let run = trained(&world);
    world.done(&["export", "run", "--output", "model"]);
    assert!(world.read("model/model.safetensors") == run.checkpoint_file(10, "model.safetensors"));
    assert!(world.read("model/tokenizer.json") == world.read("corpus/tokenizer.json"));
    world.cloze(&["export", "run", "--output", "model"]).expect_code(6).expect_words(&["exists already"]);
    let names = fs::read_dir(world.path("")).expect("list the world").map(|entry| entry.expect("list the world").file_name());
    let leftovers: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with('.')).collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
}

#[test]
fn predict_answers_every_line_with_one_of_the_labels() {
    let world = World::prepared();
    trained(&world);
    world.done(&["export", "run", "--output", "model"]);
    // An empty line is a text too, so that answers stay beside their lines.
    let texts = ["Is it good?", "Is it \"bad\"?", "", "I found the acting brilliant."];
    let mut command = world.command(&["predict", "--model", "model", "--labels", "positive,negative"]);
    let outcome = Process::start(&mut command, &format!("{}\n", texts.join("\n"))).wait().expect_code(0);
    let answers: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).expect("an answer is JSON")).collect();
    assert_eq!(answers.len(), texts.len(), "{}", outcome.stdout);
    for (answer, text) in answers.iter().zip(texts) {
        assert_eq!(answer["text"], text);
        let score = |label: &str| answer["scores"][label].as_f64().expect("every label has a score");
        let (positive, negative) = (score("positive"), score("negative"));
        assert!(positive > 0.0 && negative > 0.0 && positive + negative <= 1.0, "{answer}");
        assert_eq!(answer["label"], if positive > negative { "positive" } else { "negative" });
    }
    // The same text as an argument has the same answer.
    let alone = world.done(&["predict", "--model", "model", "--labels", "positive,negative", texts[3]]).stdout;
    let alone: Value = serde_json::from_str(&alone).expect("an answer is JSON");
    assert_eq!(alone["label"], answers[3]["label"]);

    world.cloze(&["predict", "--model", "none", "text"]).expect_code(4);
}
