//! A controller that another one has taken over leaves without a word in the bucket.

use std::path::{Path, PathBuf};

use super::super::batch::{End, Outcome};
use super::super::fixtures;
use super::super::folder::StudyFolder;
use super::super::lease::LEASE_S;
use super::super::local::Local;
use super::*;

/// The controller of a study of one trial that is out, in this folder, whose lease was renewed then.
fn controller(root: &Path, bucket: &Path, renewed: f64) -> Controller {
    let folder = StudyFolder::new(root.to_owned());
    folder.make().unwrap();
    let journal = Journal::open(&folder, Some(&bucket.display().to_string()), renewed).unwrap();
    let plan = fixtures::plan(vec![fixtures::trial("aa")]);
    let place = Some(Place { batch: 1, element: 0 });
    let record = TrialRecord { state: TrialState::Training, attempts: 1, place, ..TrialRecord::new(&plan.trials[0], None) };
    let executor = Executor::Local(Local::new(folder, PathBuf::from("/nowhere/cloze"), 1));
    let study = OpenStudy { journal, plan, records: vec![record], odd: Vec::new() };
    Controller::new(study, executor, Talk::new(Box::new(std::io::sink()), false, true)).unwrap()
}

fn failed(attempt: u32) -> Outcome {
    Outcome {
        trial: "aa".to_owned(),
        attempt,
        end: End::FailedInTraining,
        step: 0,
        metric: None,
        evaluation: None,
        failure: Some(Failure::new(FailureKind::Recipe, "no such file")),
        bad_nodes: Vec::new(),
        host: "one".to_owned(),
        finished: 1.0,
    }
}

#[test]
fn a_controller_that_stood_still_for_too_long_does_not_overwrite_what_its_successor_knows() {
    let [here, there, bucket] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let now = unix_now_s();
    // While it stands still, its trial fails, and another controller takes over and sees the trial done.
    let mut frozen = controller(here.path(), bucket.path(), now - 2.0 * LEASE_S);
    failed(1).write(frozen.journal.folder()).unwrap();
    let mut successor = controller(there.path(), bucket.path(), now);
    successor.records[0].state = TrialState::Done;
    successor.write(now, 0).unwrap();
    let path = bucket.path().join("trials/aa.json");
    let known = fs::read(&path).unwrap();

    let lost: Failure = frozen.look().unwrap_err().downcast().unwrap();
    assert_eq!((lost.kind, lost.what.as_str()), (FailureKind::Run, "another controller has taken this sweep over"));
    assert_eq!(frozen.records[0].state, TrialState::Training, "it has not taken in what it would have written");
    // Where it stands still later, between two looks, a record is not written either.
    let lost: Failure = frozen.write(now, 0).unwrap_err().downcast().unwrap();
    assert_eq!(lost.what, "another controller has taken this sweep over");
    assert_eq!(fs::read(&path).unwrap(), known);
    // One that has the lease takes the same outcome in.
    successor.records[0].state = TrialState::Training;
    failed(1).write(successor.journal.folder()).unwrap();
    successor.look().unwrap();
    assert_eq!(successor.records[0].state, TrialState::Failed);
}
