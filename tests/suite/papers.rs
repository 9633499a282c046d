//! The recipes of the papers at toy size: their data comes out of the generated corpus, and they run on it without a download.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::sandbox::{CLOZE, World, repository, run_command, skipped};

const PAPERS: [&str; 3] = ["flan", "its-all-in-the-mask", "related"];
const SCRIPTS: [&str; 2] = ["toy-data.sh", "toy_data.py"];

/// A copy of the recipes and scripts with the toy data in its place, and the recipes' paths in it; `None` without Python.
fn clone_with_toy_data(test: &str) -> Option<(World, Vec<String>)> {
    if !Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success()) {
        skipped(test, "python3 is not there");
        return None;
    }
    let world = World::with_corpus(100);
    fs::create_dir(world.path("scripts")).expect("make a folder");
    for script in SCRIPTS {
        fs::copy(repository().join("scripts").join(script), world.path("scripts").join(script)).expect("copy a script");
    }
    let mut recipes = Vec::new();
    for paper in PAPERS {
        let folder = Path::new("recipes").join(paper);
        fs::create_dir_all(world.path("recipes").join(paper)).expect("make a folder");
        for entry in fs::read_dir(repository().join(&folder)).expect("list the recipes") {
            let name = folder.join(entry.expect("read an entry").file_name());
            fs::copy(repository().join(&name), world.path(&name.to_string_lossy())).expect("copy a recipe");
            recipes.push(name.to_string_lossy().into_owned());
        }
    }
    recipes.sort();
    run_command(Command::new("bash").arg(world.path("scripts/toy-data.sh")).env("CLOZE", CLOZE)).expect_code(0);
    Some((world, recipes))
}

/// The paths below `data/toy` that a recipe names.
fn toy_paths(world: &World, recipe: &str) -> Vec<PathBuf> {
    let resolved = world.done(&["check", recipe, "--profile", "toy", "--resolved"]).stdout;
    let start = world.path("data/toy").display().to_string();
    let found = resolved.lines().filter_map(|line| line.find(&start).map(|at| line[at..].trim_end_matches(['"', '\''])));
    found.map(PathBuf::from).collect()
}

#[test]
fn every_toy_recipe_finds_its_data() {
    let Some((world, recipes)) = clone_with_toy_data("every_toy_recipe_finds_its_data") else { return };
    assert!(recipes.len() >= 26, "{recipes:?}");
    for recipe in &recipes {
        let paths = toy_paths(&world, recipe);
        assert!(paths.len() >= 3, "{recipe}: tokenizer, records and an evaluation at least: {paths:?}");
        for path in paths {
            assert!(path.exists(), "{recipe}: {}", path.display());
        }
    }
}

#[test]
fn the_toy_arms_of_the_first_table_run_on_generated_data() {
    let Some((world, _)) = clone_with_toy_data("the_toy_arms_of_the_first_table_run_on_generated_data") else { return };
    for arm in ["atp100", "atp80_mlm20", "atp80_dummy20"] {
        let recipe = format!("recipes/its-all-in-the-mask/{arm}.yaml");
        world.done(&["data", "prepare", &recipe, "--profile", "toy"]);
        let run = format!("runs/{arm}");
        world.done(&["train", &recipe, "--profile", "toy", "--set", "train.steps=30", "--run", &run]);
        world.done(&["eval", &run]);
        let report: Value = serde_json::from_slice(&world.read(&format!("{run}/eval/eval.json"))).expect("the report is JSON");
        let tasks: Vec<&str> = report["tasks"].as_array().expect("tasks").iter().filter_map(|task| task["name"].as_str()).collect();
        assert_eq!(tasks, ["mmlu", "csqa", "sst2", "trec"]);
    }
}
