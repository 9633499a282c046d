//! A study folder, made from a recipe or found again, under the control of this process.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cloze_cluster::Secret;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::Site;
use cloze_recipes::study::Study;

use super::folder::{StudyFolder, StudyInfo, SweepOptions, SweepPlan, has_queue, hosts, read_bounded, study_hash};
use super::graph::Graph;
use super::journal::{Journal, Restored, restore, write_record};
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
        let (here, before) = if folder.info_path().is_file() { (Some(folder.info()?), Some(folder.plan()?)) } else { (None, None) };
        if let Some(here) = &here {
            check_hash(&hash, &here.hash, &folder.root().display().to_string())?;
        }
        folder.make()?;
        let now = unix_now_s();
        let journal = Journal::open(&folder, plan.journal.as_deref(), now)?;
        let remote = Found::in_bucket(&journal, &hash)?;
        let recipes: BTreeMap<String, String> =
            graph.nodes.iter().map(|node| (node.trial.hash.clone(), node.trial.recipe.to_yaml())).collect();
        write_recipes(&folder, &recipes)?;
        let here = here.map_or_else(|| info(study, hash, now), Ok)?;
        let info = remote.as_ref().map_or_else(|| here.clone(), |remote| with_jobs_of(here.clone(), &remote.info));
        let mut opened = Self::with_records(journal, plan, now)?;
        opened.check_cluster(info.cluster.as_deref(), cluster.as_deref())?;
        opened.leave_for_plan(before, remote.map(|remote| remote.plan))?;
        // The bucket comes first: a folder alone would go on with a study that nobody else sees, or that somebody else makes once more. A
        // bucket alone is a study that any host goes on with.
        opened.journal.publish(&recipes, &opened.plan, &info)?;
        StudyFolder::write_json(&folder.plan_path(), &opened.plan)?;
        // The study comes last: a folder with it is complete.
        StudyFolder::write_json(&folder.info_path(), &info)?;
        opened.settle_in(cluster.as_deref())?;
        Ok(opened)
    }

    /// Opens a study that is there, or brings it from its journal in a bucket, which gets it where it does not have it yet; `named` is the
    /// site that whoever asks goes on at, where there is a word of it. Fails with kind `Input` where there is none, with `Mismatch` where
    /// the bucket has another study, and with `Run` where folder and bucket name two sites and it is not known which of them has what is
    /// out.
    pub fn open(root: &Path, journal: Option<&str>, named: Option<&Site>) -> anyhow::Result<Self> {
        if !root.join("study.json").is_file()
            && let Some(url) = journal
        {
            bring(root, url)?;
        }
        let folder = StudyFolder::find(root)?;
        folder.make()?;
        let mut plan = folder.plan()?;
        let is_new = journal.is_some() && plan.journal.as_deref() != journal;
        if let Some(url) = journal {
            plan.journal = Some(url.to_owned());
        }
        let now = unix_now_s();
        let journal = Journal::open(&folder, plan.journal.as_deref(), now)?;
        let here = folder.info()?;
        let remote = Found::in_bucket(&journal, &here.hash)?;
        let mut opened = Self::with_records(journal, plan, now)?;
        match remote {
            Some(Found { info, plan }) => {
                let info = with_jobs_of(here.clone(), &info);
                if info != here {
                    StudyFolder::write_json(&folder.info_path(), &info)?;
                }
                opened.agree_on_site(plan.site, named)?;
            }
            None => opened.journal.publish(&read_recipes(&folder, &opened.plan)?, &opened.plan, &here)?,
        }
        if is_new {
            // What works on trials looks at the lease that is there.
            StudyFolder::write_json(&folder.plan_path(), &opened.plan)?;
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
                self.journal.settle(&self.plan);
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

    /// Forgets the workers of a site at which all that was started there has ended: elsewhere nobody could take them over, and nobody
    /// would begin anew while they seem to live.
    fn leave(&self, before: Option<&Site>, now: Option<&Site>) -> anyhow::Result<()> {
        if !(has_queue(before) || hosts(before).is_some()) || place(before) == place(now) || outs(&self.records).next().is_some() {
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

    fn with_records(mut journal: Journal, plan: SweepPlan, now: f64) -> anyhow::Result<Self> {
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

/// Refuses a folder that holds something else. A run's folder has a lock as well, so only one that lies beside a study's folders is that
/// of a study that was not made to its end.
fn check_is_ours(root: &Path) -> Result<(), Failure> {
    fs::create_dir_all(root).map_err(|error| storage("create the study folder", root, &error))?;
    if root.join("study.json").exists() {
        return Ok(());
    }
    if root.join("run.json").exists() {
        return Err(Failure::new(FailureKind::Recipe, "the study folder is the folder of a run")
            .at(root.display())
            .expected("an empty or missing folder, or one of this study")
            .found("run.json")
            .hint("name another one with `--folder`; `cloze status` says how that run is"));
    }
    if root.join("lock").exists() && root.join("trials").is_dir() {
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

/// A study that a bucket has.
struct Found {
    info: StudyInfo,
    plan: SweepPlan,
}

impl Found {
    /// That of a journal's bucket; `None` where there is no bucket, or nothing whole in it. Fails with kind `Mismatch` where it is not the
    /// study of this hash.
    fn in_bucket(journal: &Journal, hash: &str) -> anyhow::Result<Option<Self>> {
        let Some(info) = journal.remote_info()? else { return Ok(None) };
        check_hash(hash, &info.hash, &journal.shown())?;
        let missing = || Failure::new(FailureKind::Damaged, "the study of a journal has no plan").at(journal.shown());
        Ok(Some(Self { info, plan: journal.remote_plan()?.ok_or_else(missing)? }))
    }
}

/// A study with the key and the cluster of the jobs that the bucket knows, whose records win too: the trials that are out there have those
/// jobs.
fn with_jobs_of(here: StudyInfo, bucket: &StudyInfo) -> StudyInfo {
    let cluster = bucket.cluster.clone().or(here.cluster);
    StudyInfo { key: bucket.key.clone(), cluster, ..here }
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

/// The recipes of a study's trials, as its folder has them.
fn read_recipes(folder: &StudyFolder, plan: &SweepPlan) -> anyhow::Result<BTreeMap<String, String>> {
    let mut recipes = BTreeMap::new();
    for trial in &plan.trials {
        let path = folder.recipe_path(&trial.hash);
        let missing = || Failure::new(FailureKind::Damaged, "the study lacks the recipe of a trial").at(path.display());
        let yaml = read_bounded(&path)?.ok_or_else(missing)?;
        recipes.insert(trial.hash.clone(), String::from_utf8(yaml).with_context(|| format!("read {}", path.display()))?);
    }
    Ok(recipes)
}

/// Brings a study from its bucket, with its places in this folder.
fn bring(root: &Path, url: &str) -> anyhow::Result<()> {
    check_is_ours(root)?;
    let root: PathBuf = fs::canonicalize(root).with_context(|| format!("find {}", root.display()))?;
    let folder = StudyFolder::new(root);
    let Restored { recipes, info } = restore(&folder, url)?;
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
    // The study comes last here too.
    write_whole(&folder.info_path(), &info, READABLE)
}

#[cfg(test)]
mod tests;
