//! What stands around a run is checked with it: profiles, trials, cluster files, and the examples of the documents.

use std::fs;

use serde_json::Value;

use crate::sandbox::{RECIPE, RECIPE_TEXT, World, repository};

const SECTIONS: &str = "
profiles:
  toy: { train: { steps: 4 }, sweep: { seeds: [1] } }
sweep:
  grid: { objective.auxiliary_ratio: [0.1, 0.2] }
  seeds: [1, 2, 3]
";

/// The YAML examples of a document, in order.
fn examples(document: &str) -> Vec<String> {
    let text = fs::read_to_string(repository().join("docs").join(document)).expect("read a document");
    let blocks = text.split("```yaml\n").skip(1);
    blocks.map(|block| block.split("```").next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn check_counts_trials_and_profiles() {
    let world = World::with_corpus(100);
    world.write("study.yaml", format!("{RECIPE_TEXT}{SECTIONS}"));
    let text = world.done(&["check", "study.yaml"]).stdout;
    assert!(
        text.starts_with("study.yaml: 6 trials are right\nstudy.yaml: profile `toy` is right, 2 trials\nstudy.yaml: recipe `"),
        "{text}"
    );
    let hash = |text: &str| text.trim().rsplit(' ').next().unwrap_or_default().to_owned();
    assert_eq!(hash(&text), hash(&world.done(&["check", RECIPE]).stdout), "the sections are no part of the run");
    let toy = world.done(&["check", "study.yaml", "--profile", "toy"]).stdout;
    assert!(toy.starts_with("study.yaml: 2 trials are right\nstudy.yaml: recipe `"), "{toy}");
    let resolved = world.done(&["check", "study.yaml", "--profile", "toy", "--resolved"]).stdout;
    assert!(resolved.contains("  steps: 4\n") && !resolved.contains("sweep"), "{resolved}");
}

#[test]
fn a_profile_is_one_of_the_recipe_for_every_command() {
    let world = World::with_corpus(100);
    world.write("study.yaml", format!("{RECIPE_TEXT}{SECTIONS}"));
    let commands: [&[&str]; 6] = [&["check"], &["data", "prepare"], &["data", "inspect"], &["data", "verify"], &["plan"], &["train"]];
    for command in commands.into_iter().chain([&["eval"][..]]) {
        let outcome = world.cloze(&[command, &["study.yaml", "--profile", "tou"]].concat()).expect_code(3);
        outcome.expect_words(&["error: the recipe has no profile `tou`", "where: study.yaml", "hint: did you mean `toy`?"]);
    }
}

#[test]
fn a_wrong_trial_is_told_by_check_with_its_values() {
    let world = World::with_corpus(100);
    world.write("study.yaml", format!("{RECIPE_TEXT}sweep: {{grid: {{train.steps: [1, 0]}}, seeds: [5, 6]}}\n"));
    let outcome = world.cloze(&["check", "study.yaml"]).expect_code(3);
    outcome.expect_words(&["error: 1 problem in study.yaml\n", ": train.steps: found 0, expected", "(in the trial train.steps=0, seed 5)"]);
}

#[test]
fn a_cluster_file_is_checked_alone_and_beside_a_recipe() {
    let world = World::with_corpus(100);
    world.write("c.yaml", "version: 1\nname: c\nkind: slurm\nslurm: {partition: main}\n");
    let expected = "c.yaml: cluster `c` is right, SLURM, partition main\n";
    assert_eq!(world.done(&["check", "--cluster", "c.yaml"]).stdout, expected);
    assert!(world.done(&["check", RECIPE, "--cluster", "c.yaml"]).stdout.starts_with(expected));
    world.write("wrong.yaml", "version: 1\nname: c\nkind: slurm\nslurm: {partitoin: main}\n");
    let outcome = world.cloze(&["check", "--cluster", "wrong.yaml"]).expect_code(3);
    outcome.expect_words(&["wrong.yaml:4:9: slurm.partitoin: unknown key; did you mean `partition`?"]);
    world.cloze(&["check"]).expect_code(2);
    let schema: Value = serde_json::from_str(&world.done(&["schema", "--cluster"]).stdout).expect("the schema is JSON");
    assert!(schema["properties"]["preflight"].is_object(), "{schema}");
}

#[test]
fn the_cluster_files_of_the_documents_are_right() {
    let world = World::with_corpus(100);
    let examples = examples("CLUSTERS.md");
    assert_eq!(examples.len(), 3);
    for (example, expected) in examples.iter().zip(["this machine", "3 hosts", "SLURM, partition gpu"]) {
        world.write("c.yaml", example);
        let text = world.done(&["check", "--cluster", "c.yaml"]).stdout;
        assert!(text.trim_end().ends_with(&format!("is right, {expected}")), "{text}");
    }
}

#[test]
fn the_sections_of_the_documents_are_right() {
    let world = World::with_corpus(100);
    let sections = ["profiles:", "after:", "sweep:", "expected:"];
    let examples: Vec<String> =
        examples("RECIPES.md").into_iter().filter(|example| sections.iter().any(|section| example.starts_with(section))).collect();
    assert_eq!(examples.len(), sections.len());
    let tasks = "evaluation: [{name: mmlu, files: [f], labels: [{value: a}, {value: b}]}]\n";
    let stem = RECIPE_TEXT.split("evaluation:").next().unwrap_or_default();
    for example in examples {
        let swept = if example.starts_with("expected:") { "sweep: {grid: {objective.auxiliary: [none, dummy_mlm]}}\n" } else { "" };
        world.write("pretrain.yaml", RECIPE_TEXT);
        world.write("example.yaml", format!("{stem}{tasks}{swept}{example}"));
        world.done(&["check", "example.yaml"]);
    }
}
