//! Whole reports, from folders to text.

use std::fs;

use cloze_recipes::failure::{Failure, FailureKind};
use serde_json::{Value, json};

use super::fixtures::{run_folder, study, write};
use super::{OrderVerdict, StudyReport, Verdict, report_folders, report_study};

fn report() -> (tempfile::TempDir, StudyReport) {
    let root = tempfile::tempdir().unwrap();
    let report = report_study(&study(root.path())).unwrap();
    (root, report)
}

#[test]
fn the_terminal_shows_the_papers_table_with_ours_beside_it() {
    let (root, report) = report();
    let expected = include_str!("snapshots/study.txt");
    let table = report.table().replace(&root.path().display().to_string(), "ROOT");
    assert_eq!(table, expected, "\n{table}");
}

#[test]
fn trials_without_an_end_are_counted_below_the_table() {
    let (_root, report) = report();
    let text = |states: &[(&str, usize)], studies: &[&str]| {
        let states: Vec<(String, usize)> = states.iter().map(|(state, count)| ((*state).to_owned(), *count)).collect();
        let num_trials = states.iter().map(|(_, count)| count).sum();
        let studies = studies.iter().map(std::path::PathBuf::from).collect();
        super::text::unfinished(&StudyReport { studies, num_trials, states, ..report.clone() })
    };
    let cases = [
        (text(&[("done", 3), ("stopped_early", 2)], &["s"]), None),
        (text(&[("done", 3), ("failed", 2)], &["s"]), Some("Of 5 trials: 2 failed; `cloze sweep status s` shows them.")),
        (
            text(&[("training", 1), ("waiting", 1), ("failed", 1)], &["s", "t"]),
            Some("Of 3 trials: 1 failed, 2 not finished; `cloze sweep status s`, `cloze sweep status t` shows them."),
        ),
        (text(&[("stopped", 1)], &[]), Some("Of 1 trial: 1 not finished; `cloze status RUN` shows them.")),
    ];
    for (found, expected) in cases {
        assert_eq!(found.as_deref(), expected);
    }
}

#[test]
fn the_markdown_is_what_a_reader_pastes() {
    let (_root, report) = report();
    let expected = include_str!("snapshots/study.md");
    assert_eq!(report.markdown(), expected, "\n{}", report.markdown());
}

#[test]
fn the_json_has_every_value_and_its_trials() {
    let (root, report) = report();
    let json: Value = serde_json::from_str(&report.json().unwrap()).unwrap();
    let row = &json["table"]["rows"][0];
    assert_eq!((row["name"].as_str(), row["trials"].as_array().map(Vec::len)), (Some("100 % ATP"), Some(3)));
    assert_eq!(row["cells"][0]["values"].as_array().map(Vec::len), Some(3));
    assert_eq!((&row["cells"][0]["verdict"], &row["cells"][0]["ours"]["count"]), (&json!("within"), &json!(3)));
    assert_eq!(json["states"], json!([["done", 8], ["failed", 1]]));
    // Two workers from second 0 to second 27 in nine runs, on GPUs.
    assert!((report.gpu_hours - 9.0 * 54.0 / 3600.0).abs() < 1e-9, "{}", report.gpu_hours);
    let folder = root.path().join("out/deep");
    report.write_all(&folder).unwrap();
    assert_eq!(fs::read_to_string(folder.join("report.json")).unwrap(), report.json().unwrap());
    assert_eq!(fs::read_to_string(folder.join("report.md")).unwrap(), report.markdown());
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 3);
}

#[test]
fn verdicts_and_orders_of_the_study() {
    let (_root, report) = report();
    let verdicts: Vec<Verdict> = report.table.rows.iter().map(|row| row.cells[0].verdict).collect();
    assert_eq!(verdicts, [Verdict::Within, Verdict::Below, Verdict::NoVerdict, Verdict::NoVerdict]);
    let last = &report.table.rows[3];
    assert_eq!((last.name.as_str(), last.in_paper, last.cells[0].values.len()), ("auxiliary=mlm, auxiliary_ratio=0.2", false, 2));
    assert_eq!((report.orders.len(), report.orders[0].verdict), (1, OrderVerdict::Holds));
}

#[test]
fn the_page_needs_nothing_else_and_names_its_pictures() {
    let (_root, report) = report();
    let page = report.html();
    for forbidden in ["<script", "http://", "https://", "url(", "@import", " src="] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
    for wanted in ["prefers-color-scheme: dark", "name=\"viewport\"", "Llama 3 &lt;1B&gt;", "does not reach it", "restart budget spent"] {
        assert!(page.contains(wanted), "{wanted}");
    }
    let sections: Vec<&str> = report.figures.iter().map(|figure| figure.section.as_str()).collect();
    assert_eq!(sections, ["Training", "Swept values", "Prompt spread", "Confusion", "Confusion", "Confusion"]);
    assert_eq!(page.matches("<svg ").count(), report.figures.len());
    assert_eq!(page.matches("<title id=").count(), report.figures.len());
    assert_eq!(page.matches("<desc id=").count(), report.figures.len());
    let mut ids: Vec<&str> =
        page.match_indices("<title id=\"").map(|(at, start)| page[at + start.len()..].split('"').next().unwrap()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), report.figures.len(), "two pictures have the same id");
    for figure in &report.figures {
        assert!(!figure.numbers.rows.is_empty() && figure.numbers.rows.iter().all(|row| row.len() == figure.numbers.header.len()));
    }
}

#[test]
fn arms_that_differ_in_more_than_a_swept_number_are_no_one_point() {
    let (_folder, report) = report();
    let page = report.html();
    // Both have a ratio of 0.2, and their mean would be the score of neither.
    for series in ["auxiliary=dummy_mlm", "auxiliary=mlm"] {
        assert!(page.contains(&format!("<td>{series}</td>")), "{series}");
    }
}

#[test]
fn a_row_can_be_the_best_of_several_arms() {
    let root = tempfile::tempdir().unwrap();
    let folder = study(root.path());
    let path = folder.join("study.json");
    let mut described: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let rows = described["expected"]["rows"].as_array_mut().unwrap();
    rows.push(json!({"name": "best", "ours": {"best_of": []}, "values": {"MMLU": 40.5}}));
    rows.push(json!({"name": "best at 20 %", "ours": {"best_of": [["objective.auxiliary", "none"]]}, "values": {"MMLU": 37.0}}));
    described["expected"]["orders"] = json!([{"column": "MMLU", "groups": [["best"], ["100 % ATP"]]}]);
    write(&path, &described);
    let report = report_study(&folder).unwrap();
    assert_eq!(report.orders[0].verdict, OrderVerdict::Undecided, "a trial that has failed could be better than the best");
    let row = |name: &str| report.table.rows.iter().find(|row| row.name == name).unwrap();
    // One trial of the third arm has failed: it could have been the best.
    let (all, one) = (row("best"), row("best at 20 %"));
    assert_eq!((all.num_points, all.cells[0].values.as_slice()), (3, [39.5, 40.0, 40.5].as_slice()));
    assert_eq!(all.cells[0].chosen.as_deref(), Some("auxiliary=dummy_mlm, auxiliary_ratio=0.2"));
    assert_eq!(all.cells[0].verdict, Verdict::NoVerdict);
    assert_eq!(all.cells[0].reason, "1 trial has no score yet, so that 40.00 may not be the best");
    assert_eq!((one.num_points, one.cells[0].verdict), (1, Verdict::Within));
    assert!(row("auxiliary=mlm, auxiliary_ratio=0.2").trials.len() == 3, "the arms stand below all the same");
    for wanted in ["best (of 3 points)", "of auxiliary=dummy_mlm, auxiliary_ratio=0.2"] {
        assert!(report.table().contains(wanted), "{}", report.table());
    }

    let failed: Vec<_> = report.table.rows.iter().flat_map(|row| &row.trials).filter(|trial| trial.state == "failed").collect();
    let trial = folder.join("trials").join(format!("{}.json", failed[0].hash));
    let mut record: Value = serde_json::from_slice(&fs::read(&trial).unwrap()).unwrap();
    record["state"] = json!("done");
    write(&trial, &record);
    run_folder(&folder.join(record["run"].as_str().unwrap()), 44, Some(0.3));
    let report = report_study(&folder).unwrap();
    assert_eq!(report.orders[0].verdict, OrderVerdict::Holds);
    let best = report.table.rows.iter().find(|row| row.name == "best").unwrap();
    assert_eq!(best.cells[0].verdict, Verdict::Within);
    assert!(best.cells[0].reason.ends_with("; best of 3, chosen by this score itself, which flatters it"), "{}", best.cells[0].reason);
}

#[test]
fn damaged_files_are_notes_and_the_rest_is_reported() {
    let root = tempfile::tempdir().unwrap();
    let folder = study(root.path());
    fs::write(folder.join("trials/none-42.json"), "{").unwrap();
    fs::write(folder.join("runs/table1-none-43/eval/eval.json"), "[1]").unwrap();
    fs::write(folder.join("runs/table1-none-44/run.json"), "\0").unwrap();
    let report = report_study(&folder).unwrap();
    assert_eq!(report.notes.len(), 3, "{:?}", report.notes);
    let cell = &report.table.rows[0].cells[0];
    assert_eq!((cell.values.len(), cell.verdict), (1, Verdict::Within));
    assert!(cell.reason.ends_with("one seed, so that nothing is known of its spread"), "{}", cell.reason);
    assert_eq!(report.orders[0].verdict, OrderVerdict::Undecided);
    // Without the study's own file its trials still make a table.
    fs::write(folder.join("study.json"), "?").unwrap();
    let report = report_study(&folder).unwrap();
    assert_eq!((report.name.as_str(), report.source, report.table.rows.len()), ("table1", None, 3));
}

#[test]
fn runs_that_stand_alone_are_a_table_of_tasks() {
    let root = tempfile::tempdir().unwrap();
    let folders = ["one", "two"].map(|name| root.path().join(name));
    run_folder(&folders[0], 1, Some(0.25));
    run_folder(&folders[1], 2, None);
    let report = report_folders(&folders, None).unwrap();
    let names: Vec<&str> = report.table.columns.iter().map(|column| column.name.as_str()).collect();
    assert_eq!((report.name.as_str(), names), ("one, two", vec!["mmlu accuracy", "training loss"]));
    let values: Vec<usize> = report.table.rows.iter().flat_map(|row| row.cells.iter().map(|cell| cell.values.len())).collect();
    assert_eq!(values, [1, 1, 0, 0], "the second run failed before it was evaluated");
    assert_eq!(report.table.rows[1].cells[0].reason, "no trial has this score yet: 1 failed");
    assert!(report.table().contains("25.00 (1)"), "{}", report.table());
    let error = report_folders(&[root.path().join("none")], None).unwrap_err();
    assert_eq!(error.downcast_ref::<Failure>().unwrap().kind, FailureKind::Input);
}

#[test]
fn an_earlier_stage_is_no_arm_and_a_stopped_trial_does_not_count() {
    let root = tempfile::tempdir().unwrap();
    let folder = study(root.path());
    let path = folder.join("trials/mlm-42.json");
    let mut trial: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    (trial["state"], trial["parent"]) = (json!("stopped_early"), json!("mlm-44"));
    write(&path, &trial);
    let report = report_study(&folder).unwrap();
    let row = &report.table.rows[3];
    assert_eq!((row.trials.len(), row.cells[0].values.as_slice()), (2, [32.0].as_slice()));
    // The stage is no trial, and its hours are paid all the same: two workers for 27 seconds.
    assert_eq!((report.num_trials, report.num_stages), (8, 1));
    assert!((report.stage_worker_hours - 54.0 / 3600.0).abs() < 1e-9 && (report.worker_hours - 9.0 * 54.0 / 3600.0).abs() < 1e-9);
    let cost = " of the worker-hours are of 1 earlier stage, which is no arm\n";
    assert!(report.markdown().contains(cost), "{}", report.markdown());
}

#[test]
fn scores_count_once_a_trial_is_done_and_only_those_of_its_recipe() {
    let root = tempfile::tempdir().unwrap();
    let folder = study(root.path());
    let edit = |name: &str, key: &str, value: Value| {
        let path = folder.join(name);
        let mut file: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        file[key] = value;
        write(&path, &file);
    };
    // It waits at a rung, where it was scored.
    edit("trials/none-42.json", "state", json!("waiting"));
    edit("runs/table1-none-43/eval/eval.json", "recipe_hash", json!("ffff"));
    let report = report_study(&folder).unwrap();
    let row = &report.table.rows[0];
    assert_eq!((row.trials.len(), row.cells[0].values.len()), (3, 1));
    assert!(
        report.notes.len() == 1 && report.notes[0].ends_with("the scores are of another recipe, hash ffff; passed over"),
        "{:?}",
        report.notes
    );
}

/// Writes the scores of a run into the record of its trial, as the controller does.
fn record_scores(folder: &std::path::Path, hash: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.join(format!("trials/{hash}.json"));
    let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record["evaluation"] = serde_json::from_slice(&fs::read(folder.join(format!("runs/table1-{hash}/eval/eval.json"))).unwrap()).unwrap();
    change(&mut record);
    write(&path, &record);
}

#[test]
fn the_recorded_scores_stand_in_for_a_run_folder_on_another_machine() {
    let root = tempfile::tempdir().unwrap();
    let folder = study(root.path());
    let before = report_study(&folder).unwrap();
    for hash in ["none-42", "none-43", "none-44", "dummy_mlm-42"] {
        record_scores(&folder, hash, |_| ());
        fs::remove_dir_all(folder.join(format!("runs/table1-{hash}"))).unwrap();
    }
    let report = report_study(&folder).unwrap();
    assert_eq!(report.table.rows[0].cells, before.table.rows[0].cells, "all of these were recorded");
    assert_eq!(report.table.rows[1].cells[0].values.len(), 3, "one of these was recorded, and two are here");
    assert_eq!(report.notes, before.notes);
    // What lies in the run folder counts where both are there; what is recorded of a trial that is not done does not.
    record_scores(&folder, "dummy_mlm-43", |record| record["evaluation"]["tasks"][0]["scores"]["accuracy"] = json!(0.9));
    let mut record: Value = serde_json::from_slice(&fs::read(folder.join("trials/none-42.json")).unwrap()).unwrap();
    record["state"] = json!("waiting");
    write(&folder.join("trials/none-42.json"), &record);
    let report = report_study(&folder).unwrap();
    assert_eq!(report.table.rows[1].cells, before.table.rows[1].cells);
    assert_eq!(report.table.rows[0].cells[0].values.len(), 2);
    // Recorded scores that cannot be read are named, and the trial keeps its place.
    record["state"] = json!("done");
    record["evaluation"] = json!({"tasks": 1});
    write(&folder.join("trials/none-42.json"), &record);
    let report = report_study(&folder).unwrap();
    assert_eq!((report.num_trials, report.table.rows[0].cells[0].values.len(), report.notes.len()), (9, 2, 1), "{:?}", report.notes);
    assert!(report.notes[0].starts_with("table1-none-42: the recorded scores cannot be read"), "{:?}", report.notes);
}

#[test]
fn a_stage_that_the_sweep_asks_for_is_an_arm() {
    let root = tempfile::tempdir().unwrap();
    let folder = study(root.path());
    let edit = |hash: &str, changes: &[(&str, Value)]| {
        let path = folder.join(format!("trials/{hash}.json"));
        let mut trial: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        changes.iter().for_each(|(key, value)| trial[*key] = value.clone());
        write(&path, &trial);
    };
    // Another trial starts from the first one, which has a row of its own all the same.
    edit("none-42", &[("wanted", json!(true))]);
    edit("dummy_mlm-42", &[("wanted", json!(true)), ("parent", json!("none-42"))]);
    // Nothing that can be read starts from this one, and the sweep does not ask for it.
    edit("mlm-42", &[("wanted", json!(false))]);
    let report = report_study(&folder).unwrap();
    let counts: Vec<usize> = report.table.rows.iter().map(|row| row.trials.len()).collect();
    assert_eq!((counts, report.table.rows[0].cells[0].values.len()), (vec![3, 3, 0, 2], 3));
    // Its hours are those of a trial, and are paid once.
    assert_eq!((report.num_trials, report.num_stages), (8, 1));
    assert!((report.worker_hours - 9.0 * 54.0 / 3600.0).abs() < 1e-9);
}

#[test]
fn what_is_named_twice_is_no_further_seed() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let once = report_study(&study(first.path())).unwrap();
    let run = study(first.path()).join("runs/table1-none-42");
    assert!(run.is_dir(), "{}", run.display());
    // The same folder, the same trials in another one, and the run folder of one of them.
    let several = [study(first.path()), study(first.path()), study(second.path()), run];
    let report = report_folders(&several, None).unwrap();
    let counts = |report: &StudyReport| report.table.rows.iter().map(|row| row.trials.len()).collect::<Vec<_>>();
    assert_eq!((counts(&report), report.num_trials), (counts(&once), once.num_trials));
    let note = "runs that were named more than once, or are trials of several studies: 19 left out";
    assert!(report.notes.iter().any(|told| told == note), "{:?}", report.notes);
}

#[test]
fn a_task_with_too_many_labels_for_a_matrix_is_named() {
    let root = tempfile::tempdir().unwrap();
    let folder = study(root.path());
    let path = folder.join("runs/table1-none-42/eval/eval.json");
    let mut scores: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let mut large = scores["tasks"][0].clone();
    (large["name"], large["labels"]) = (json!("20ng"), (0..20).map(|number| number.to_string()).collect());
    scores["tasks"].as_array_mut().unwrap().push(large);
    write(&path, &scores);
    let report = report_study(&folder).unwrap();
    assert_eq!(report.notes, ["no confusion matrix, since one of more than 16 labels cannot be read: 20ng (20 labels)"]);
    let (page, markdown) = (report.html(), report.markdown());
    assert!(page.contains(&report.notes[0]) && markdown.contains(&report.notes[0]), "{markdown}");
    assert_eq!(report.figures.iter().filter(|figure| figure.section == "Confusion").count(), 3, "the other task has its matrices");
}
