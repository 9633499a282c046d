//! A table of a paper from its recipe to the report beside the paper's numbers, without any network; and the report of its study later.

use std::fs;

use serde_json::Value;

use crate::sandbox::{RECIPE_TEXT, World};

/// What stands around the run of the table. The paper's numbers are those of nobody: one that any share of right answers is near, and one
/// that none can reach.
const AROUND: &str = "
sweep:
  grid: {train.learning_rate: [1e-4, 3e-3]}
  seeds: [1, 2, 3]
  concurrency: 2
expected:
  source: \"A Paper, table 1\"
  columns: [{name: Sentiment, task: sentiment, tolerance: 100}]
  rows:
    - {name: slow, arm: {train.learning_rate: 1e-4}, values: {Sentiment: 50}}
    - {name: fast, arm: {train.learning_rate: 3e-3}, values: {Sentiment: 999}}
    - {name: theirs, values: {Sentiment: 61.5}}
  orders: [{column: Sentiment, best_first: [[fast], [slow]]}]
profiles:
  toy: {train: {steps: 6}, sweep: {seeds: [1, 2]}}
";

/// A world with the recipe of one table.
fn world() -> World {
    let world = World::with_corpus(2000);
    std::fs::create_dir_all(world.path("recipes/paper")).expect("make a folder of recipes");
    let recipe =
        RECIPE_TEXT.replace("name: small", "name: table1").replace("corpus/", "../../corpus/").replace("output: prepared", "output: ../p");
    world.write("recipes/paper/table1.yaml", recipe + AROUND);
    world
}

/// Replaces a part of the recipe.
fn edit(world: &World, from: &str, to: &str) {
    let text = String::from_utf8(world.read("recipes/paper/table1.yaml")).expect("a recipe is text");
    assert!(text.contains(from), "{from}");
    world.write("recipes/paper/table1.yaml", text.replace(from, to));
}

#[test]
fn a_table_is_reproduced_and_reported_beside_the_paper() {
    let world = world();
    let preview = world.done(&["reproduce", "paper/table1", "--profile", "toy", "--preview"]).stdout;
    for part in
        ["4 trials, 0 earlier stages, 1 data preparation; at most 2 at the same time", "steps: 6\n", "OK    memory: ", "OK    source: "]
    {
        assert!(preview.contains(part), "`{part}` is missing in:\n{preview}");
    }
    assert!(!world.path("studies").exists(), "a preview makes nothing");
    world.write("cluster.yaml", "version: 1\nname: far\nkind: slurm\n");
    let nowhere = ["reproduce", "paper/table1", "--profile", "toy", "--preview", "--cluster", "cluster.yaml"];
    let nowhere = world.command(&nowhere).env("PATH", "/nowhere").output().expect("start cloze");
    let shown = String::from_utf8_lossy(&nowhere.stdout).into_owned();
    assert_eq!(nowhere.status.code(), Some(5), "{shown}");
    let what = shown.lines().find_map(|line| line.strip_prefix("FAIL  partition: ")).expect("the partition fails");
    let end = String::from_utf8_lossy(&nowhere.stderr).into_owned();
    assert!(end.contains("partition: see above") && !end.contains(what), "{end}");
    for part in
        ["jobs at first: 1 array of 4 jobs, at most 2 at the same time, 1 node each\n", "#SBATCH --array=0-3%2\n", "FAIL  partition: "]
    {
        assert!(shown.contains(part), "`{part}` is missing in:\n{shown}");
    }

    let folder = "studies/paper-table1-toy";
    let outcome = world.done(&["reproduce", "paper/table1", "--profile", "toy"]);
    let table = outcome.stdout.clone();
    outcome.expect_words(&[&format!("report: {}", world.path(folder).join("report/report.html").display())]);
    for part in ["A Paper, table 1", "slow", "fast", "theirs", "61.5", "999", "(2)"] {
        assert!(table.contains(part), "`{part}` is missing in:\n{table}");
    }
    check_report(&world, folder, &[("slow", 50.0, "within"), ("fast", 999.0, "below"), ("theirs", 61.5, "no_verdict")]);
    // Whoever may not write gets the table all the same.
    let kept = world.path(folder).join("report");
    fs::rename(&kept, world.path("kept")).unwrap();
    fs::write(&kept, "no folder").unwrap();
    let unsaved = world.cloze(&["sweep", "report", folder]).expect_code(6).expect_words(&["nothing was saved"]);
    assert_eq!(unsaved.stdout, table);
    fs::remove_file(&kept).unwrap();
    fs::rename(world.path("kept"), &kept).unwrap();
    // What is reported again is the same, and says nothing of the recipe.
    let again = world.done(&["sweep", "report", folder]);
    assert!(again.stdout == table && !again.stderr.contains("expect"), "{}{}", again.stdout, again.stderr);
    follow_the_recipe(&world, folder);
}

/// Rows by name, the paper's value, and the verdict.
fn check_report(world: &World, folder: &str, rows: &[(&str, f64, &str)]) {
    let report: Value = serde_json::from_slice(&world.read(&format!("{folder}/report/report.json"))).expect("the report is JSON");
    for (place, (name, paper, verdict)) in rows.iter().enumerate() {
        let row = &report["table"]["rows"][place];
        let cell = &row["cells"][0];
        assert_eq!(
            (row["name"].as_str(), cell["paper"].as_f64(), cell["verdict"].as_str()),
            (Some(*name), Some(*paper), Some(*verdict)),
            "{row}"
        );
        let mean = cell["ours"]["mean"].as_f64();
        assert_eq!(mean.is_some(), *verdict != "no_verdict", "{row}");
        assert!(mean.is_none_or(|mean| (0.0..=100.0).contains(&mean)), "{row}");
    }
    let [page, markdown] = ["report.html", "report.md"].map(|file| world.read(&format!("{folder}/report/{file}")));
    let [page, markdown] = [page, markdown].map(|bytes| String::from_utf8(bytes).expect("a report is text"));
    assert!(page.contains("</svg>") && page.contains("A Paper, table 1"), "the page lacks its plots or its source");
    assert!(rows.iter().all(|(name, ..)| markdown.contains(name) && page.contains(name)), "{markdown}");
}

/// The paper's numbers were wrong and are mended in the recipe; then the recipe becomes another study's, and then it is gone.
fn follow_the_recipe(world: &World, folder: &str) {
    edit(world, "Sentiment: 999", "Sentiment: 55.5");
    let mended =
        world.done(&["sweep", "report", folder]).expect_words(&["expects now, which is not what it expected when the study was made"]);
    assert!(mended.stdout.contains("55.5") && !mended.stdout.contains("999"), "{}", mended.stdout);
    check_report(world, folder, &[("slow", 50.0, "within"), ("fast", 55.5, "within")]);
    // The sweep goes on with the study, and ends in the same report.
    let again = world.done(&["reproduce", "paper/table1", "--profile", "toy"]).expect_words(&["which is not what it expected"]);
    assert_eq!(again.stdout, mended.stdout);
    edit(world, "learning_rate: [1e-4, 3e-3]", "learning_rate: [1e-4, 2e-3]");
    let other = world.done(&["sweep", "report", folder]).expect_words(&["expected when the study was made: it states other trials now"]);
    assert!(other.stdout.contains("999"), "{}", other.stdout);
    std::fs::remove_file(world.path("recipes/paper/table1.yaml")).expect("remove the recipe");
    let gone = world.done(&["report", folder]).expect_words(&["expected when the study was made: it is not there any more"]);
    assert!(gone.stdout.contains("999"), "{}", gone.stdout);
}
