//! A wrong recipe is told with every problem, its place and what was meant; a right one is the same however it is written.

use serde_json::Value;

use crate::sandbox::{RECIPE, RECIPE_TEXT, World};

/// Commands that read a recipe, without the recipe.
const COMMANDS: [&[&str]; 4] = [&["check"], &["train"], &["data", "prepare"], &["data", "inspect"]];

fn with_recipe<'a>(command: &[&'a str], rest: &[&'a str]) -> Vec<&'a str> {
    [command, rest].concat()
}

#[test]
fn an_unknown_key_is_told_with_place_and_suggestion() {
    let world = World::with_corpus(100);
    let text = RECIPE_TEXT.replace("  every_steps:", "  evry_steps:");
    world.write("wrong.yaml", &text);
    let line = text.lines().position(|line| line.contains("evry_steps")).expect("the key is there") + 1;
    let place = format!("wrong.yaml:{line}:3: checkpoint.evry_steps: unknown key; did you mean `every_steps`?");
    for command in COMMANDS {
        let outcome = world.cloze(&with_recipe(command, &["wrong.yaml"])).expect_code(3);
        assert!(outcome.stdout.is_empty(), "{}", outcome.stdout);
        outcome.expect_words(&["error: 1 problem in wrong.yaml\n", &place]);
    }
    assert!(!world.path("runs").exists() && !world.path("prepared").exists(), "nothing is started with a wrong recipe");
}

#[test]
fn all_problems_are_told_at_once() {
    let world = World::with_corpus(100);
    world.write("wrong.yaml", "version: 1\nname: w\nmodle: 3\ntrain:\n  stepz: 4\n  batch_examples: 0\n");
    world.cloze(&["check", "wrong.yaml"]).expect_code(3).expect_words(&[
        "wrong.yaml:3:1: modle: unknown key; did you mean `model`?",
        "wrong.yaml:5:3: train.stepz: unknown key; did you mean `steps`?",
        "wrong.yaml:6:19: train.batch_examples: found 0, expected an integer from 1 to 1048576",
        "data: missing",
        "train.learning_rate: missing",
    ]);
    world.write("broken.yaml", "version: 1\nname: [w\n");
    world.cloze(&["check", "broken.yaml"]).expect_code(3).expect_words(&["cannot read the recipe as YAML", "broken.yaml:"]);
    world.cloze(&["check", "none.yaml"]).expect_code(3).expect_words(&["cannot read the recipe", "none.yaml"]);
}

#[test]
fn an_override_is_checked_like_the_file() {
    let world = World::with_corpus(100);
    let wrong = [RECIPE, "--set", "train.learning_rat=3", "--set", "train.batch_examples=no"];
    for command in COMMANDS {
        let outcome = world.cloze(&with_recipe(command, &wrong)).expect_code(3);
        outcome.expect_words(&[
            "--set train.learning_rat=3: train.learning_rat: unknown key; did you mean `learning_rate`?",
            "--set train.batch_examples=no: train.batch_examples: found ",
        ]);
    }
}

#[test]
fn a_resolved_recipe_has_the_same_hash_and_an_override_another() {
    let world = World::with_corpus(100);
    let hash = |arguments: &[&str]| {
        let text = world.done(&with_recipe(&["check"], arguments)).stdout;
        let hash = text.trim().rsplit(' ').next().unwrap_or_default().to_owned();
        assert!(hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()), "{text}");
        hash
    };
    let resolved = world.done(&["check", RECIPE, "--resolved"]).stdout;
    world.write("resolved.yaml", &resolved);
    assert_eq!(hash(&["resolved.yaml"]), hash(&[RECIPE]));
    assert_eq!(world.done(&["check", "resolved.yaml", "--resolved"]).stdout, resolved);
    let changed = hash(&[RECIPE, "--set", "train.learning_rate=2e-3"]);
    assert_ne!(changed, hash(&[RECIPE]));
    world.write("changed.yaml", RECIPE_TEXT.replace("learning_rate: 1e-3", "learning_rate: 0.002"));
    assert_eq!(changed, hash(&["changed.yaml"]));
}

#[test]
fn the_schema_is_json_and_knows_every_key_of_a_resolved_recipe() {
    let world = World::with_corpus(100);
    let schema: Value = serde_json::from_str(&world.done(&["schema"]).stdout).expect("the schema is JSON");
    let properties = schema["properties"].as_object().expect("the schema has properties");
    let resolved = world.done(&["check", RECIPE, "--resolved"]).stdout;
    let is_top = |line: &&str| line.starts_with(|first: char| first.is_ascii_lowercase());
    let keys: Vec<&str> = resolved.lines().filter(is_top).filter_map(|line| line.split(':').next()).collect();
    assert!(keys.contains(&"train") && keys.len() >= 8, "{keys:?}");
    for key in keys {
        assert!(properties.contains_key(key), "{key}");
    }
}
