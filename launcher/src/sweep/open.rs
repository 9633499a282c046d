//! A study folder, made from a recipe or found again, under the control of this process.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cloze_cluster::Secret;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::Site;
use cloze_recipes::study::Study;

use super::folder::{StudyFolder, StudyInfo, SweepOptions, SweepPlan, has_queue, study_hash};
use super::graph::Graph;
use super::journal::{Journal, restore, write_record};
use super::record::{TrialRecord, TrialState};
use super::site_choice::{Choice, ChoiceReason, Sites, check_move, choose, is_of_folder, outs, place};
use super::time::unix_now_s;
use crate::local::forget_earlier;
use crate::run_folder::{READABLE, RunPaths, storage, write_whole};
use crate::slurm::other_cluster;

/// Fewest characters of a hash that mean a trial.
const HASH_CHARS_MIN: usize = 4;

/// Characters of a study's key in the names of its jobs.
const KEY_LENGTH: usize = 8;

/// A study that this process controls.
pub struct OpenStudy {
    /// Its journal.
    pub journal: Journal,
    /// How its trials are run.
    pub plan: SweepPlan,
    /// The records, in the plan's order.
    pub records: Vec<TrialRecord>,
    /// What is odd and does not stop anything.
    pub odd: Vec<String>,
}

impl OpenStudy {
    /// Makes the folder of a study, or goes on with the one that is there. Fails with kind `Mismatch` where the folder is of a study with
    /// other trials, with `Recipe` where it holds something else, and with `Run` where another live controller has it.
    pub fn create(study: &Study, root: &Path, options: SweepOptions) -> anyhow::Result<Self> {
        let root = std::path::absolute(root).context("find the current folder")?;
        check_is_ours(&root)?;
        let graph = Graph::new(study.trials(&root)?)?;
        let cluster = options.cluster.clone();
        let plan = SweepPlan::new(study, &graph, options);
        let hash = study_hash(&plan)?;
        let folder = StudyFolder::new(root);
        if folder.info_path().is_file() {
            check_hash(&hash, &folder.info()?.hash, &folder.root().display().to_string())?;
        }
        folder.make()?;
        let now = unix_now_s();
        let journal = Journal::open(&folder, plan.journal.as_deref(), now)?;
        let found = journal.remote_info()?;
        if let Some(found) = &found {
            check_hash(&hash, &found.hash, plan.journal.as_deref().unwrap_or_default())?;
        }
        let recipes: BTreeMap<String, String> =
            graph.nodes.iter().map(|node| (node.trial.hash.clone(), node.trial.recipe.to_yaml())).collect();
        write_recipes(&folder, &recipes)?;
        let (mut before, mut known) = (None, found.and_then(|found| found.cluster));
        if folder.info_path().is_file() {
            (before, known) = (Some(folder.plan()?), known.or(folder.info()?.cluster));
        }
        let remote = journal.remote_plan()?;
        let opened = Self::with_records(journal, plan, now)?;
        opened.check_cluster(known.as_deref(), cluster.as_deref())?;
        opened.leave_for_plan(before, remote)?;
        StudyFolder::write_json(&folder.plan_path(), &opened.plan)?;
        // The study comes last: a folder with it is complete.
        if !folder.info_path().is_file() {
            StudyFolder::write_json(&folder.info_path(), &info(study, hash, now)?)?;
        }
        adopt_jobs(&opened.journal)?;
        opened.journal.publish(&recipes)?;
        opened.settle_in(cluster.as_deref())?;
        Ok(opened)
    }

    /// Opens a study that is there, or brings it from its journal in a bucket; `named` is the site that whoever asks goes on at, where
    /// there is a word of it. Fails with kind `Input` where there is none, and with `Run` where folder and bucket name two sites and it
    /// is not known which of them has what is out.
    pub fn open(root: &Path, journal: Option<&str>, named: Option<&Site>) -> anyhow::Result<Self> {
        if !root.join("study.json").is_file()
            && let Some(url) = journal
        {
            bring(root, url)?;
        }
        let folder = StudyFolder::find(root)?;
        folder.make()?;
        let mut plan = folder.plan()?;
        if let Some(url) = journal {
            plan.journal = Some(url.to_owned());
        }
        let now = unix_now_s();
        let journal = Journal::open(&folder, plan.journal.as_deref(), now)?;
        let remote = if adopt_jobs(&journal)? { journal.remote_plan()? } else { None };
        let mut opened = Self::with_records(journal, plan, now)?;
        if let Some(remote) = remote {
            opened.agree_on_site(remote.site, named)?;
        }
        Ok(opened)
    }

    /// Takes over the site that the bucket names, or tells it that of this folder.
    fn agree_on_site(&mut self, bucket: Option<Site>, named: Option<&Site>) -> anyhow::Result<()> {
        if self.plan.site == bucket {
            return Ok(());
        }
        let (choice, reason) = self.choose(Sites { folder: self.plan.site.as_ref(), bucket: bucket.as_ref() }, named)?;
        let (of_folder, of_bucket) = (place(self.plan.site.as_ref()), place(bucket.as_ref()));
        tracing::info!(?choice, ?reason, folder = of_folder, bucket = of_bucket, "folder and bucket name two sites");
        match choice {
            Choice::Folder => {
                self.odd.push(format!("the bucket named {of_bucket}; what is out was handed to {of_folder}, and it names that now"));
                self.journal.write_plan(&self.plan)
            }
            Choice::Bucket => {
                let line = if of_folder == of_bucket { "another cluster file of the same name" } else { of_folder.as_str() };
                self.odd.push(format!("the folder named {line}; the study goes on at {of_bucket}, as the bucket says"));
                self.leave(self.plan.site.as_ref(), bucket.as_ref())?;
                self.plan.site = bucket;
                StudyFolder::write_json(&self.journal.folder().plan_path(), &self.plan)
            }
        }
    }

    fn choose(&self, sites: Sites<'_>, named: Option<&Site>) -> Result<(Choice, ChoiceReason), Failure> {
        let is_ours = |record: &TrialRecord| is_of_folder(self.journal.folder(), record);
        choose(&self.records, sites, is_ours, named).map_err(|failure| self.at_root(failure))
    }

    /// Leaves the site that folder or bucket have named for that of the plan. Fails with kind `Run` where trials are out there.
    fn leave_for_plan(&self, folder: Option<SweepPlan>, bucket: Option<SweepPlan>) -> anyhow::Result<()> {
        let before = match (folder, bucket) {
            (None, None) => return Ok(()),
            (Some(plan), None) | (None, Some(plan)) => plan.site,
            (Some(folder), Some(bucket)) => {
                match self.choose(Sites { folder: folder.site.as_ref(), bucket: bucket.site.as_ref() }, None)?.0 {
                    Choice::Folder => folder.site,
                    Choice::Bucket => bucket.site,
                }
            }
        };
        check_move(&self.records, before.as_ref(), self.plan.site.as_ref()).map_err(|failure| self.at_root(failure))?;
        self.leave(before.as_ref(), self.plan.site.as_ref())
    }

    /// Lets the trials run at another site from now on. Fails with kind `Run` where some are out at the one before: nobody would hear of
    /// their end.
    pub fn move_to(&mut self, site: Site) -> anyhow::Result<()> {
        check_move(&self.records, self.plan.site.as_ref(), Some(&site)).map_err(|failure| self.at_root(failure))?;
        self.leave(self.plan.site.as_ref(), Some(&site))?;
        self.plan.site = Some(site);
        self.journal.write_plan(&self.plan)
    }

    /// Forgets the workers of a site whose batch system has ended all that it started: elsewhere nobody could take them over, and nobody
    /// would begin anew while they seem to live.
    fn leave(&self, before: Option<&Site>, now: Option<&Site>) -> anyhow::Result<()> {
        if !has_queue(before) || place(before) == place(now) || outs(&self.records).next().is_some() {
            return Ok(());
        }
        for record in &self.records {
            let run = self.journal.folder().run_path(&record.name);
            if run.join("run.json").is_file() {
                forget_earlier(&RunPaths::find(&run)?)?;
            }
        }
        Ok(())
    }

    /// Checks what SLURM calls the cluster of this host, where it says so. Fails with kind `Mismatch` where trials are out in another one:
    /// their jobs have names and numbers that mean nothing here.
    pub fn check_in(&self, cluster: Option<&str>) -> anyhow::Result<()> {
        self.check_cluster(self.journal.folder().info()?.cluster.as_deref(), cluster)
    }

    /// As [`OpenStudy::check_in`], and writes down that trials go there from now on.
    pub fn settle_in(&self, cluster: Option<&str>) -> anyhow::Result<()> {
        self.check_in(cluster)?;
        let info = self.journal.folder().info()?;
        if cluster.is_none() || info.cluster.as_deref() == cluster {
            return Ok(());
        }
        self.journal.write_info(&StudyInfo { cluster: cluster.map(str::to_owned), ..info })
    }

    fn check_cluster(&self, known: Option<&str>, here: Option<&str>) -> anyhow::Result<()> {
        let (Some(known), Some(here)) = (known, here) else { return Ok(()) };
        if known == here || outs(&self.records).next().is_none() {
            return Ok(());
        }
        let file = if self.plan.journal.is_some() { "study.json, in the study folder and in the bucket" } else { "study.json" };
        Err(self.at_root(other_cluster(known, here, file)).into())
    }

    /// How many trials are out.
    pub fn num_out(&self) -> usize {
        outs(&self.records).count()
    }

    /// Where its trials are out, in words.
    pub fn place(&self) -> String {
        place(self.plan.site.as_ref())
    }

    /// Puts failed trials back: those of these names or hashes, or all. Fails with kind `Recipe` on a name of none, and on one that has
    /// not failed.
    pub fn retry(&mut self, wanted: &[String]) -> anyhow::Result<usize> {
        for name in wanted {
            check_retry(&self.records, name).map_err(|failure| self.at_root(failure))?;
        }
        let mut num_reset = 0;
        for record in &mut self.records {
            let is_wanted = wanted.is_empty() || wanted.iter().any(|name| is_meant(record, name));
            if is_wanted && record.state == TrialState::Failed {
                record.reset();
                self.journal.write(record)?;
                num_reset += 1;
            }
        }
        Ok(num_reset)
    }

    fn at_root(&self, failure: Failure) -> Failure {
        failure.at(self.journal.folder().root().display())
    }

    fn with_records(journal: Journal, plan: SweepPlan, now: f64) -> anyhow::Result<Self> {
        let (mut known, odd) = journal.records(&plan, now)?;
        let mut records = Vec::with_capacity(plan.trials.len());
        for trial in &plan.trials {
            match known.remove(&trial.hash) {
                Some(record) => records.push(record),
                None => {
                    let record = TrialRecord::new(trial, plan.parent_hash(trial));
                    write_record(journal.folder(), &record)?;
                    records.push(record);
                }
            }
        }
        let mut opened = Self { journal, plan, records, odd };
        opened.reopen_lost_stages()?;
        Ok(opened)
    }

    /// A stage whose export is not here, as on another machine, is done again where something still starts from it.
    fn reopen_lost_stages(&mut self) -> anyhow::Result<()> {
        for stage in (0..self.plan.trials.len()).rev() {
            let is_needed = self
                .plan
                .trials
                .iter()
                .zip(&self.records)
                .any(|(trial, record)| trial.parent == Some(stage) && !matches!(record.state, TrialState::Done | TrialState::Failed));
            let record = &mut self.records[stage];
            let is_lost = record.state == TrialState::Done && !self.journal.folder().model_path(&record.hash).exists();
            if is_needed && is_lost {
                self.odd.push(format!("the export of {} is not here, so that stage is done again", record.name));
                record.reset();
                self.journal.write(&self.records[stage])?;
            }
        }
        Ok(())
    }
}

/// Whether a user means a trial by its name, or by the first characters of its hash.
fn is_meant(record: &TrialRecord, name: &str) -> bool {
    record.name == name || (name.len() >= HASH_CHARS_MIN && record.hash.starts_with(name))
}

/// Refuses a name that means no trial, or none that has failed.
fn check_retry(records: &[TrialRecord], name: &str) -> Result<(), Failure> {
    let meant: Vec<&TrialRecord> = records.iter().filter(|record| is_meant(record, name)).collect();
    let hint = "`cloze sweep status` lists the trials with their states";
    let Some(first) = meant.first() else {
        return Err(Failure::new(FailureKind::Recipe, "the study has no such trial").found(name).hint(hint));
    };
    if meant.iter().any(|record| record.state == TrialState::Failed) {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Recipe, "only a trial that has failed is tried again")
        .found(format!("{}, which is {}", first.name, first.state.name().replace('_', " ")))
        .hint(hint))
}

/// Refuses a folder that holds something else.
fn check_is_ours(root: &Path) -> Result<(), Failure> {
    fs::create_dir_all(root).map_err(|error| storage("create the study folder", root, &error))?;
    if root.join("study.json").exists() || root.join("lock").exists() {
        return Ok(());
    }
    let mut entries = fs::read_dir(root).map_err(|error| storage("list the study folder", root, &error))?;
    match entries.next() {
        None => Ok(()),
        Some(entry) => Err(Failure::new(FailureKind::Recipe, "the study folder is not empty")
            .at(root.display())
            .expected("an empty or missing folder, or one of this study")
            .found(entry.map_or_else(|error| error.to_string(), |entry| entry.file_name().display().to_string()))
            .hint("name another one with `--folder`")),
    }
}

fn check_hash(wanted: &str, found: &str, place: &str) -> Result<(), Failure> {
    if wanted == found {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Mismatch, "this place holds the study of another recipe, or of this one before it was changed")
        .at(place)
        .expected(format!("study hash {wanted}"))
        .found(format!("study hash {found}"))
        .hint("`--folder OTHER` starts a study of its own; `cloze sweep resume` goes on with the one that is there"))
}

/// Takes over key and cluster of the jobs from the bucket, whose records win too: the trials that are out there have those jobs. Says
/// whether the bucket has this study.
fn adopt_jobs(journal: &Journal) -> anyhow::Result<bool> {
    let Some(found) = journal.remote_info()? else { return Ok(false) };
    let info = journal.folder().info()?;
    if info.hash != found.hash {
        return Ok(false);
    }
    let cluster = found.cluster.or_else(|| info.cluster.clone());
    if info.key != found.key || info.cluster != cluster {
        StudyFolder::write_json(&journal.folder().info_path(), &StudyInfo { key: found.key, cluster, ..info })?;
    }
    Ok(true)
}

fn info(study: &Study, hash: String, now: f64) -> anyhow::Result<StudyInfo> {
    let key = Secret::random().context("draw a key for the names of jobs")?.expose()[..KEY_LENGTH].to_owned();
    Ok(StudyInfo::new(study, hash, key, now))
}

fn write_recipes(folder: &StudyFolder, recipes: &BTreeMap<String, String>) -> anyhow::Result<()> {
    for (hash, yaml) in recipes {
        let path = folder.recipe_path(hash);
        if !path.is_file() {
            write_whole(&path, yaml.as_bytes(), READABLE)?;
        }
    }
    Ok(())
}

/// Brings a study from its bucket, with its places in this folder.
fn bring(root: &Path, url: &str) -> anyhow::Result<()> {
    check_is_ours(root)?;
    let root: PathBuf = fs::canonicalize(root).with_context(|| format!("find {}", root.display()))?;
    let folder = StudyFolder::new(root);
    let recipes = restore(&folder, url)?;
    let plan = folder.plan()?;
    for trial in &plan.trials {
        let path = folder.recipe_path(&trial.hash);
        let missing = || Failure::new(FailureKind::Damaged, "the journal lacks the recipe of a trial").at(url).found(&trial.name);
        let yaml = recipes.get(&trial.hash).ok_or_else(missing)?;
        write_whole(&path, yaml.as_bytes(), READABLE)?;
        let mut recipe = cloze_recipes::load(&path, &[])?;
        folder.settle(&mut recipe, &trial.data_hash, plan.parent_hash(trial));
        write_whole(&path, recipe.to_yaml().as_bytes(), READABLE)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
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
        moved.journal.publish(&BTreeMap::new()).unwrap();
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
            OpenStudy::open(root.path(), None, None).unwrap().journal.publish(&BTreeMap::new()).unwrap();
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
}
