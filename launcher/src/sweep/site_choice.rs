//! At which site the trials of a study are, and when it may move to another one.

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::{Site, SiteKind};

use super::batch::Batch;
use super::folder::StudyFolder;
use super::record::{TrialRecord, TrialState};
use crate::words::{counted, is_or_are};

/// Which of two sites is that of a study.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// The one that the study folder names.
    Folder,
    /// The one that the bucket names.
    Bucket,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChoiceReason {
    /// Both are the same cluster, or nothing is out: whoever has moved the study has told the bucket.
    BucketKnows,
    /// All that is out was handed out by a controller of this folder.
    HandedOutHere,
    /// Whoever asks has named the cluster that has what is out.
    Named,
}

/// Two sites of one study.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sites<'a> {
    /// What the study folder says.
    pub folder: Option<&'a Site>,
    /// What the bucket says.
    pub bucket: Option<&'a Site>,
}

/// Chooses between the site of a study folder and that of its bucket. A trial that is out is asked for where it was handed out, since at
/// any other site it would be missed and started once more; so where it is not known which one that is, a name must say it.
/// `is_ours` says whether a trial was handed out by a controller of this folder, which knew where.
pub(super) fn choose(
    records: &[TrialRecord],
    sites: Sites<'_>,
    is_ours: impl Fn(&TrialRecord) -> bool,
    named: Option<&Site>,
) -> Result<(Choice, ChoiceReason), Failure> {
    let out: Vec<&TrialRecord> = outs(records).collect();
    let (of_folder, of_bucket) = (place(sites.folder), place(sites.bucket));
    if out.is_empty() || of_folder == of_bucket {
        return Ok((Choice::Bucket, ChoiceReason::BucketKnows));
    }
    if out.iter().all(|record| is_ours(record)) {
        return Ok((Choice::Folder, ChoiceReason::HandedOutHere));
    }
    match named.map(|site| place(Some(site))) {
        Some(named) if named == of_folder => Ok((Choice::Folder, ChoiceReason::Named)),
        Some(named) if named == of_bucket => Ok((Choice::Bucket, ChoiceReason::Named)),
        _ => Err(Failure::new(FailureKind::Run, "folder and bucket do not name the same site, and trials are out at one of them")
            .expected(format!("one site, for {} that {} out", counted(out.len(), "trial"), is_or_are(out.len())))
            .found(format!("{of_folder} in the folder, {of_bucket} in the bucket"))
            .hint("`cloze sweep resume FOLDER --cluster FILE` with the cluster file of the one that has them")),
    }
}

/// Whether the newest attempt at a trial is in a batch of this folder.
pub(super) fn is_of_folder(folder: &StudyFolder, record: &TrialRecord) -> bool {
    let Some(place) = record.place else { return false };
    let Ok(batch) = Batch::read(folder, place.batch) else { return false };
    let mut assignments = batch.elements.iter().flatten();
    assignments.any(|assignment| assignment.trial == record.hash && assignment.attempt == record.attempts)
}

/// Refuses another site while trials are out at the one before.
pub(super) fn check_move(records: &[TrialRecord], before: Option<&Site>, now: Option<&Site>) -> Result<(), Failure> {
    let num_out = outs(records).count();
    if num_out == 0 || place(before) == place(now) {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Run, "trials are out elsewhere")
        .expected(format!("{}, where {} {} out", place(before), counted(num_out, "trial"), is_or_are(num_out)))
        .found(place(now))
        .hint("wait for them, or end them with `cloze sweep cancel`"))
}

/// The trials that are out.
pub(super) fn outs(records: &[TrialRecord]) -> impl Iterator<Item = &TrialRecord> {
    records.iter().filter(|record| record.state == TrialState::Training)
}

/// What tells a site from others, in words.
pub(super) fn place(site: Option<&Site>) -> String {
    let of_cluster = site.filter(|site| site.kind != SiteKind::Local);
    of_cluster.map_or_else(|| "this machine".to_owned(), |site| format!("the cluster `{}`", site.name))
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{self, site};
    use super::super::record::Place;
    use super::*;

    fn record(state: TrialState) -> TrialRecord {
        TrialRecord { state, attempts: 2, place: Some(Place { batch: 3, element: 0 }), ..TrialRecord::new(&fixtures::trial("a"), None) }
    }

    #[test]
    fn what_is_out_is_asked_for_where_it_was_handed_out() {
        let (one, other, third) = (site("one", "kind: slurm"), site("other", "kind: slurm"), site("third", "kind: slurm"));
        let one_changed = site("one", "kind: slurm\nslurm: {partition: big}");
        let (out, idle) = ([record(TrialState::Training)], [record(TrialState::Done)]);
        let known = (Choice::Bucket, ChoiceReason::BucketKnows);
        let cases = [
            (&idle, Some(&other), true, None, Some(known)),
            (&idle, None, false, None, Some(known)),
            // The cluster is the same, whatever else its file says now.
            (&out, Some(&one_changed), true, None, Some(known)),
            (&out, Some(&other), true, None, Some((Choice::Folder, ChoiceReason::HandedOutHere))),
            (&out, Some(&other), true, Some(&one), Some((Choice::Folder, ChoiceReason::HandedOutHere))),
            (&out, Some(&other), false, None, None),
            (&out, Some(&other), false, Some(&third), None),
            (&out, Some(&other), false, Some(&one), Some((Choice::Bucket, ChoiceReason::Named))),
            (&out, Some(&other), false, Some(&other), Some((Choice::Folder, ChoiceReason::Named))),
        ];
        for (records, folder, is_ours, named, expected) in cases {
            let sites = Sites { folder, bucket: Some(&one) };
            assert_eq!(choose(records, sites, |_| is_ours, named).ok(), expected, "{folder:?} {is_ours} {named:?}");
        }
        let sites = Sites { folder: Some(&other), bucket: Some(&one) };
        let failure = choose(&out, sites, |_| false, None).unwrap_err();
        assert_eq!(failure.found.as_deref(), Some("the cluster `other` in the folder, the cluster `one` in the bucket"));
    }

    #[test]
    fn a_folder_knows_the_attempts_that_it_has_handed_out() {
        let root = tempfile::tempdir().unwrap();
        let folder = StudyFolder::new(root.path().to_owned());
        folder.make().unwrap();
        let out = record(TrialState::Training);
        assert!(!is_of_folder(&folder, &out), "there is no such batch here");
        let assignment = serde_json::json!({ "trial": "a", "attempt": 2, "until_step": null });
        StudyFolder::write_json(&folder.batch_path(3), &serde_json::json!({ "number": 3, "elements": [[assignment]] })).unwrap();
        assert!(is_of_folder(&folder, &out));
        assert!(!is_of_folder(&folder, &TrialRecord { attempts: 3, ..out.clone() }), "another folder has handed out a later one");
        assert!(!is_of_folder(&folder, &TrialRecord { place: None, ..out }));
    }

    #[test]
    fn a_sweep_moves_when_nothing_is_out() {
        let (one, other, here) = (site("one", "kind: slurm"), site("other", "kind: slurm"), site("desk", "kind: local"));
        let (out, idle) = ([record(TrialState::Training)], [record(TrialState::Done)]);
        let cases = [
            (&out, Some(&one), Some(&one), true),
            (&out, None, Some(&here), true),
            (&out, Some(&one), Some(&other), false),
            (&out, Some(&one), None, false),
            (&idle, Some(&one), Some(&other), true),
        ];
        for (records, before, now, may) in cases {
            let result = check_move(records, before, now);
            assert_eq!(result.is_ok(), may, "{before:?} {now:?} {result:?}");
        }
        let failure = check_move(&out, Some(&one), None).unwrap_err();
        assert_eq!(failure.expected.as_deref(), Some("the cluster `one`, where 1 trial is out"));
    }
}
