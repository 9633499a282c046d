//! Folder and bucket of a study agree, whatever is cut off.

use super::super::batch::{Assignment, Batch};
use super::super::fixtures::{self, site};
use super::super::record::Place;
use super::*;

fn record(name: &str, state: TrialState) -> TrialRecord {
    let text = serde_json::json!({
        "hash": format!("{name}{name}{name}{name}"), "name": name, "parameters": {}, "seed": 1, "data_hash": "d", "parent": null,
        "run": format!("runs/{name}"), "wanted": true, "state": state, "step": 0, "attempts": 1, "fruitless_attempts": 0,
        "retry_at": null, "place": null, "rungs": [], "failure": null, "metric": null, "evaluation": null, "updated": 0.0
    });
    serde_json::from_value(text).unwrap()
}

#[test]
fn only_a_failed_trial_is_tried_again() {
    let records = [record("a", TrialState::Failed), record("b", TrialState::Done), record("c", TrialState::StoppedEarly)];
    let cases = [
        ("a", None),
        ("aaaa", None),
        ("aaa", Some("aaa")),
        ("b", Some("b, which is done")),
        ("cccc", Some("c, which is stopped early")),
        ("nobody", Some("nobody")),
    ];
    for (name, found) in cases {
        let failure = check_retry(&records, name).err();
        assert_eq!(failure.and_then(|failure| failure.found).as_deref(), found, "{name}");
    }
}

#[test]
fn the_folder_of_a_run_is_no_study_and_stays_as_it_is() {
    let cases: [(&[&str], Option<&str>); 5] = [
        (&[], None),
        (&["lock", "trials/"], None),
        (&["lock", "run.json"], Some("the study folder is the folder of a run")),
        (&["lock", "run.json", "trials/"], Some("the study folder is the folder of a run")),
        (&["lock"], Some("the study folder is not empty")),
    ];
    for (names, refused) in cases {
        let root = tempfile::tempdir().unwrap();
        for name in names {
            let path = root.path().join(name);
            if name.ends_with('/') { fs::create_dir(path).unwrap() } else { fs::write(path, "").unwrap() }
        }
        let failure = check_is_ours(root.path()).err();
        assert_eq!(failure.as_ref().map(|failure| (failure.kind, failure.what.as_str())), refused.map(|what| (FailureKind::Recipe, what)));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), names.len(), "{names:?}");
    }
}

/// A study of these trials in a folder, with its records in another one.
fn study(root: &Path, journal: &Path, states: &[(&str, TrialState)]) -> StudyFolder {
    let folder = StudyFolder::new(fs::canonicalize(root).unwrap());
    folder.make().unwrap();
    let plan = SweepPlan {
        journal: Some(journal.display().to_string()),
        site: Some(site("one", "kind: slurm")),
        ..fixtures::plan(states.iter().map(|(hash, _)| fixtures::trial(hash)).collect())
    };
    StudyFolder::write_json(&folder.plan_path(), &plan).unwrap();
    let info = serde_json::json!({
        "version": 1, "name": "demo", "file": "demo.yaml", "profile": null, "overrides": [], "hash": "ab", "key": "k",
        "expected": null, "metric": plan.metric, "keys": [], "created": 1.0,
    });
    StudyFolder::write_json(&folder.info_path(), &info).unwrap();
    for (trial, (_, state)) in plan.trials.iter().zip(states) {
        fs::write(folder.recipe_path(&trial.hash), "name: demo\n").unwrap();
        write_record(&folder, &TrialRecord { state: *state, ..TrialRecord::new(trial, None) }).unwrap();
    }
    folder
}

#[test]
fn the_bucket_knows_where_a_study_has_moved() {
    let [here, there, bucket] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let states = [("a", TrialState::Done)];
    for root in [&here, &there] {
        study(root.path(), bucket.path(), &states);
    }
    let mut moved = OpenStudy::open(here.path(), None, None).unwrap();
    moved.move_to(site("other", "kind: slurm")).unwrap();
    moved.settle_in(Some("beta")).unwrap();
    moved.journal.close().unwrap();
    // Another machine, whose folder is from before the move.
    let opened = OpenStudy::open(there.path(), None, None).unwrap();
    assert_eq!(opened.plan.site.as_ref().map(|site| site.name.as_str()), Some("other"));
    let folder = opened.journal.folder();
    assert_eq!(folder.plan().unwrap(), opened.plan);
    assert_eq!(folder.info().unwrap().cluster.as_deref(), Some("beta"));
}

#[test]
fn clusters_are_told_apart_by_what_slurm_calls_them() {
    for (state, may_move) in [(TrialState::Training, false), (TrialState::Done, true)] {
        let [root, bucket] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        study(root.path(), bucket.path(), &[("a", state)]);
        let opened = OpenStudy::open(root.path(), None, None).unwrap();
        // A folder of before the name says nothing.
        opened.settle_in(Some("alpha")).unwrap();
        opened.settle_in(Some("alpha")).unwrap();
        // It may not say so now.
        opened.settle_in(None).unwrap();
        assert_eq!(opened.check_in(Some("beta")).is_ok(), may_move, "{state:?}");
        let result = opened.settle_in(Some("beta"));
        assert_eq!(result.is_ok(), may_move, "{state:?}");
        let cluster = opened.journal.folder().info().unwrap().cluster;
        assert_eq!(cluster.as_deref(), Some(if may_move { "beta" } else { "alpha" }));
        if let Err(error) = result {
            let failure: Failure = error.downcast().unwrap();
            assert_eq!(failure.kind, FailureKind::Mismatch);
            assert!(failure.expected.unwrap().contains("`alpha`") && failure.found.unwrap().contains("`beta`"));
            assert!(failure.hint.unwrap().contains("set `cluster` to null in study.json"), "a cluster that is gone locks nobody out");
        }
    }
}

#[test]
fn what_this_folder_has_handed_out_is_not_given_to_another_site() {
    let site_name = |opened: &OpenStudy| opened.plan.site.as_ref().map(|site| site.name.clone()).unwrap();
    for (is_ours, named, expected) in [(true, None, Some("other")), (false, None, None), (false, Some("one"), Some("one"))] {
        let [root, bucket] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let folder = study(root.path(), bucket.path(), &[("a", TrialState::Training)]);
        let mut record = TrialRecord { state: TrialState::Training, ..TrialRecord::new(&fixtures::trial("a"), None) };
        (record.attempts, record.place) = (1, Some(Place { batch: 1, element: 0 }));
        write_record(&folder, &record).unwrap();
        if is_ours {
            let batch = Batch { number: 1, elements: vec![vec![Assignment { trial: "a".to_owned(), attempt: 1, until_step: None }]] };
            StudyFolder::write_json(&folder.batch_path(1), &batch).unwrap();
        }
        OpenStudy::open(root.path(), None, None).unwrap();
        // As a build that did not tell the bucket of a move left it.
        let plan = SweepPlan { site: Some(site("other", "kind: slurm")), ..folder.plan().unwrap() };
        StudyFolder::write_json(&folder.plan_path(), &plan).unwrap();
        let named = named.map(|name| site(name, "kind: slurm"));
        let opened = OpenStudy::open(root.path(), None, named.as_ref());
        assert_eq!(opened.as_ref().ok().map(site_name).as_deref(), expected, "{is_ours} {named:?}");
        let Ok(opened) = opened else { continue };
        assert_eq!(opened.odd.len(), 1);
        let told = opened.journal.remote_plan().unwrap().unwrap();
        assert_eq!((told.site, folder.plan().unwrap().site), (opened.plan.site.clone(), opened.plan.site.clone()));
    }
}

#[test]
fn a_study_that_leaves_a_queue_leaves_its_workers_behind() {
    for (now, is_kept) in [("kind: local", false), ("kind: slurm", true)] {
        let [root, bucket] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let folder = study(root.path(), bucket.path(), &[("a", TrialState::Waiting)]);
        let run = folder.run_path("demo-a");
        fs::create_dir_all(&run).unwrap();
        for name in ["run.json", "control.json"] {
            fs::write(run.join(name), "{}").unwrap();
        }
        let mut opened = OpenStudy::open(root.path(), None, None).unwrap();
        opened.move_to(site("one", now)).unwrap();
        assert_eq!(run.join("control.json").exists(), is_kept, "{now}");
    }
}

const RECIPE: &str = "version: 1
name: demo
model: {preset: tiny, tokenizer: /nowhere/t}
data: {sources: [{url: /nowhere/corpus}], output: out, max_length: 128}
train: {steps: 10, batch_examples: 4, micro_batch_tokens: 256, learning_rate: 1e-3}
sweep: {seeds: [1, 2]}
";

/// A study of two seeds, or another one with other overrides; none of its files is there.
fn recipe_study(folder: &Path, overrides: &[&str]) -> Study {
    let path = folder.join("demo.yaml");
    fs::write(&path, RECIPE).unwrap();
    let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
    cloze_recipes::load_study(&path, &overrides, None).unwrap()
}

fn in_bucket(bucket: &Path) -> SweepOptions {
    SweepOptions { journal: Some(bucket.display().to_string()), ..SweepOptions::default() }
}

/// A folder of this name takes no file, whoever writes it.
fn block(folder: &Path, name: &str) {
    fs::create_dir_all(folder.join(name).join("inside")).unwrap();
}

fn kind(result: anyhow::Result<OpenStudy>) -> FailureKind {
    result.err().unwrap().downcast::<Failure>().unwrap().kind
}

#[test]
fn a_study_that_the_bucket_does_not_take_is_in_no_folder() {
    let [source, here, there, bucket] = [(); 4].map(|()| tempfile::tempdir().unwrap());
    let study = recipe_study(source.path(), &[]);
    block(bucket.path(), "sweep.json");
    assert!(OpenStudy::create(&study, here.path(), in_bucket(bucket.path())).is_err());
    assert!(!here.path().join("study.json").exists() && !here.path().join("sweep.json").exists());
    assert!(!bucket.path().join("study.json").exists());
    fs::remove_dir_all(bucket.path().join("sweep.json")).unwrap();

    // Another host makes it meanwhile, and only that one has made it.
    let made = OpenStudy::create(&study, there.path(), in_bucket(bucket.path())).unwrap();
    let key = made.journal.folder().info().unwrap().key;
    assert_eq!(kind(OpenStudy::create(&study, here.path(), in_bucket(bucket.path()))), FailureKind::Run);
    assert!(!here.path().join("study.json").exists());
    made.journal.close().unwrap();
    let again = OpenStudy::create(&study, here.path(), in_bucket(bucket.path())).unwrap();
    assert_eq!((again.journal.folder().info().unwrap().key, again.plan.trials.len()), (key, 2));
}

#[test]
fn a_study_that_is_in_the_bucket_alone_is_gone_on_with_by_any_host() {
    let [source, here, there, bucket] = [(); 4].map(|()| tempfile::tempdir().unwrap());
    let (study, url) = (recipe_study(source.path(), &[]), bucket.path().display().to_string());
    // It is killed when the bucket has the study and the folder does not: what is there of the folder is its lock, beside its folders.
    fs::write(here.path().join("lock"), "").unwrap();
    fs::create_dir(here.path().join("trials")).unwrap();
    block(here.path(), "sweep.json");
    assert!(OpenStudy::create(&study, here.path(), in_bucket(bucket.path())).is_err());
    assert!(bucket.path().join("study.json").is_file() && !here.path().join("study.json").exists());

    let taken = OpenStudy::open(there.path(), Some(&url), None).unwrap();
    let key = taken.journal.folder().info().unwrap().key;
    assert!(!key.is_empty() && taken.records.len() == 2);
    taken.journal.close().unwrap();
    fs::remove_dir_all(here.path().join("sweep.json")).unwrap();
    let again = OpenStudy::create(&study, here.path(), in_bucket(bucket.path())).unwrap();
    assert_eq!(again.journal.folder().info().unwrap().key, key, "its jobs have the same names on both hosts");
    again.journal.close().unwrap();
    // Another study does not get the place.
    let other = recipe_study(source.path(), &["train.steps=20"]);
    let elsewhere = tempfile::tempdir().unwrap();
    assert_eq!(kind(OpenStudy::create(&other, elsewhere.path(), in_bucket(bucket.path()))), FailureKind::Mismatch);
}

#[test]
fn a_folder_gives_its_study_to_a_bucket_that_lacks_it_and_not_to_one_that_has_another() {
    let [root, bucket] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    // As a build left it that wrote the folder first and was killed.
    let folder = study(root.path(), bucket.path(), &[("a", TrialState::Waiting)]);
    let opened = OpenStudy::open(root.path(), None, None).unwrap();
    assert_eq!(opened.journal.remote_info().unwrap().unwrap(), folder.info().unwrap());
    assert_eq!(opened.journal.remote_plan().unwrap().unwrap(), opened.plan);
    opened.journal.close().unwrap();
    let other = StudyInfo { hash: "cd".to_owned(), ..folder.info().unwrap() };
    StudyFolder::write_json(&folder.info_path(), &other).unwrap();
    assert_eq!(kind(OpenStudy::open(root.path(), None, None)), FailureKind::Mismatch);
}
