//! The study folder: where everything lies, what was asked for, and what one trial needs to know.
//!
//! ```text
//! NAME/
//!   study.json     what was asked for; written last, so a folder with it is complete
//!   sweep.json     how the trials are run, and which stage starts from which
//!   trials/        HASH.json, the record of a trial; HASH.yaml, its recipe
//!   runs/          run folders
//!   data/HASH/     prepared shards, one for each data hash
//!   models/HASH/   exports of earlier stages
//!   jobs/          batches, outcomes, logs, locks of the trials, nodes to avoid, marks of batches that were given up
//!   report/        what `cloze report` wrote
//!   bin/           the programs that jobs run, as they were when the controller started
//!   lock           held by the live controller
//! ```

use std::fs;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use cloze_recipes::site::{Site, SiteKind, SshSite};
use cloze_recipes::study::{Expected, Metric, Resources, Study};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::graph::Graph;
use super::ladder::Ladder;
use crate::run_folder::{READABLE, storage, write_whole};

/// Version of the files of a study.
const VERSION: u32 = 1;

/// Largest file of a study that is read, in bytes; a plan of ten thousand trials has some two million.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// What `study.json` says: what was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudyInfo {
    /// Version of the file, 1.
    pub version: u32,
    /// Name of the recipe.
    pub name: String,
    /// Its file.
    pub file: PathBuf,
    /// The profile that was asked for.
    pub profile: Option<String>,
    /// The overrides that were asked for.
    pub overrides: Vec<String>,
    /// Hash of all trials and of what they are compared by.
    pub hash: String,
    /// Tells the jobs of this folder from those of every other one, in their names; empty in folders that are older than it.
    #[serde(default)]
    pub key: String,
    /// What SLURM calls the cluster that has these jobs; `None` where no job was submitted, and in folders that are older than it.
    #[serde(default)]
    pub cluster: Option<String>,
    /// What a paper says comes out.
    pub expected: Option<Expected>,
    /// What trials are compared by.
    pub metric: Metric,
    /// The swept keys.
    pub keys: Vec<String>,
    /// Unix time at which the folder was made, in seconds.
    pub created: f64,
}

impl StudyInfo {
    /// What was asked for with a study, made at this Unix time; `key` is the folder's own.
    pub fn new(study: &Study, hash: String, key: String, created: f64) -> Self {
        Self {
            version: VERSION,
            name: study.recipe.name.clone(),
            file: study.file.clone(),
            profile: study.profile.clone(),
            overrides: study.overrides.clone(),
            hash,
            key,
            cluster: None,
            expected: study.expected.clone(),
            metric: metric_of(study),
            keys: study.sweep.iter().flat_map(|sweep| sweep.keys()).map(str::to_owned).collect(),
            created,
        }
    }
}

/// What `sweep.json` says: how the trials are run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SweepPlan {
    /// Version of the file, 1.
    pub version: u32,
    /// Trials that run at the same time, at most.
    pub concurrency: u32,
    /// Trials that share one allocation.
    pub pack: u32,
    /// First rung and factor of early stopping.
    pub early_stopping: Option<(u64, u32)>,
    /// What trials are compared by.
    pub metric: Metric,
    /// Machines of one trial.
    pub resources: Resources,
    /// Where jobs are started; `None` is this machine.
    pub site: Option<Site>,
    /// Where the records lie besides this folder.
    pub journal: Option<String>,
    /// The trials, earlier stages before those that start from them.
    pub trials: Vec<PlannedTrial>,
}

/// A trial in its plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedTrial {
    /// Its hash.
    pub hash: String,
    /// Name of its run.
    pub name: String,
    /// Values of the swept keys, without the seed.
    pub parameters: serde_json::Map<String, serde_json::Value>,
    /// Its seed.
    pub seed: u64,
    /// Hash of what its data is prepared from.
    pub data_hash: String,
    /// Seed with which it is prepared.
    pub data_seed: u64,
    /// Place of its earlier stage in the plan.
    pub parent: Option<usize>,
    /// Whether the sweep asks for it.
    pub wanted: bool,
    /// Whether something starts from it.
    pub is_stage: bool,
}

/// How a sweep is to be run.
#[derive(Clone, Debug, Default)]
pub struct SweepOptions {
    /// Where jobs are started; `None` is this machine.
    pub site: Option<Site>,
    /// Where the records lie besides the study folder.
    pub journal: Option<String>,
    /// What SLURM calls the cluster of this host, where it says so.
    pub cluster: Option<String>,
}

impl SweepPlan {
    /// The plan of a study.
    pub fn new(study: &Study, graph: &Graph, options: SweepOptions) -> Self {
        let sweep = study.sweep.as_ref();
        let trials = graph.nodes.iter().map(|node| PlannedTrial {
            hash: node.trial.hash.clone(),
            name: node.trial.recipe.name.clone(),
            parameters: node.trial.parameters.iter().cloned().collect(),
            seed: node.trial.recipe.seed,
            data_hash: node.trial.data_hash.clone(),
            data_seed: node.trial.data_seed,
            parent: node.parent,
            wanted: node.wanted,
            is_stage: node.is_stage,
        });
        Self {
            version: VERSION,
            concurrency: sweep.map_or(1, |sweep| sweep.concurrency),
            pack: sweep.map_or(1, |sweep| sweep.pack),
            early_stopping: sweep.and_then(|sweep| sweep.early_stopping).map(|stopping| (stopping.first_step, stopping.factor)),
            metric: metric_of(study),
            resources: study.resources.clone(),
            site: options.site,
            journal: options.journal,
            trials: trials.collect(),
        }
    }

    /// The rungs of early stopping.
    pub fn ladder(&self) -> Option<Ladder> {
        let more_is_better = more_is_better(&self.metric);
        self.early_stopping.map(|(first_step, factor)| Ladder { first_step, factor, more_is_better })
    }

    /// Hash of the earlier stage of a trial.
    pub fn parent_hash(&self, trial: &PlannedTrial) -> Option<&str> {
        trial.parent.map(|parent| self.trials[parent].hash.as_str())
    }

    /// Whether trials are jobs of a batch system, which ends all that a job has started before another one takes its place.
    pub fn has_queue(&self) -> bool {
        has_queue(self.site.as_ref())
    }

    /// The hosts on which trials are processes that a remote shell starts.
    pub fn hosts(&self) -> Option<&SshSite> {
        hosts(self.site.as_ref())
    }

    /// Whether all that an attempt has started, on whatever machine, has ended before another one begins.
    pub fn ends_whole(&self) -> bool {
        self.has_queue() || self.hosts().is_some()
    }

    /// Whether a trial trains on several nodes, each with workers of its own.
    pub fn spans_nodes(&self) -> bool {
        self.resources.nodes > 1 && self.has_queue()
    }

    /// Whether early stopping may pause a trial.
    pub fn climbs(&self, trial: usize) -> bool {
        let planned = &self.trials[trial];
        planned.wanted && !planned.is_stage
    }
}

/// Whether trials are jobs of a batch system at a site.
pub(super) fn has_queue(site: Option<&Site>) -> bool {
    site.is_some_and(|site| matches!(site.kind, SiteKind::Slurm(_)))
}

/// The hosts of a site that a remote shell reaches.
pub(super) fn hosts(site: Option<&Site>) -> Option<&SshSite> {
    match site.map(|site| &site.kind) {
        Some(SiteKind::Ssh(ssh)) => Some(ssh),
        _ => None,
    }
}

/// Whether more of a metric is better.
pub fn more_is_better(metric: &Metric) -> bool {
    metric.score != cloze_recipes::study::Score::Loss
}

/// What the trials of a study are compared by.
pub fn metric_of(study: &Study) -> Metric {
    match &study.sweep {
        Some(sweep) => sweep.metric.clone(),
        None => Metric { task: None, score: cloze_recipes::study::Score::Accuracy },
    }
}

/// Hash of all trials of a study and of what decides which of them end.
pub fn study_hash(plan: &SweepPlan) -> anyhow::Result<String> {
    let mut hashes: Vec<&str> = plan.trials.iter().filter(|trial| trial.wanted).map(|trial| trial.hash.as_str()).collect();
    hashes.sort_unstable();
    let text = serde_json::to_vec(&(hashes, &plan.metric, plan.early_stopping)).context("serialise a study")?;
    Ok(blake3::hash(&text).to_hex().to_string())
}

/// Where the files of a study lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StudyFolder {
    root: PathBuf,
}

impl StudyFolder {
    /// The files below this folder, which must be absolute.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The files of a study that is there. Fails with kind `Input` where there is none.
    pub fn find(folder: &Path) -> Result<Self, Failure> {
        let root = fs::canonicalize(folder).map_err(|error| no_study(folder).because(error))?;
        if root.join("study.json").is_file() { Ok(Self { root }) } else { Err(no_study(folder)) }
    }

    /// The study that a run belongs to; `None` for a run of its own.
    pub fn of_run(run: &Path) -> Option<Self> {
        let runs = run.parent().filter(|runs| runs.ends_with("runs"))?;
        let root = runs.parent()?;
        root.join("sweep.json").is_file().then(|| Self { root: root.to_owned() })
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What was asked for.
    pub fn info_path(&self) -> PathBuf {
        self.root.join("study.json")
    }

    /// How the trials are run.
    pub fn plan_path(&self) -> PathBuf {
        self.root.join("sweep.json")
    }

    /// The controller's lock.
    pub fn lock_path(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Somebody asks the controller to end.
    pub fn cancel_path(&self) -> PathBuf {
        self.root.join("cancel")
    }

    /// Record of a trial.
    pub fn record_path(&self, hash: &str) -> PathBuf {
        self.root.join("trials").join(format!("{hash}.json"))
    }

    /// Recipe of a trial.
    pub fn recipe_path(&self, hash: &str) -> PathBuf {
        self.root.join("trials").join(format!("{hash}.yaml"))
    }

    /// Prepared data.
    pub fn data_path(&self, data_hash: &str) -> PathBuf {
        self.root.join("data").join(data_hash)
    }

    /// Export of an earlier stage.
    pub fn model_path(&self, hash: &str) -> PathBuf {
        self.root.join("models").join(hash)
    }

    /// Run folder by the name of its run.
    pub fn run_path(&self, name: &str) -> PathBuf {
        self.root.join("runs").join(name)
    }

    /// The programs that jobs run.
    pub fn programs_path(&self) -> PathBuf {
        self.root.join("bin")
    }

    /// A file of `jobs/`.
    pub fn job_path(&self, name: &str) -> PathBuf {
        self.root.join("jobs").join(name)
    }

    /// What a batch consists of.
    pub fn batch_path(&self, number: u32) -> PathBuf {
        self.job_path(&format!("batch-{number:06}.json"))
    }

    /// A batch was given up by somebody who could not ask for its job: what of it begins later ends at once.
    pub fn given_up_path(&self, number: u32) -> PathBuf {
        self.job_path(&format!("batch-{number:06}.given-up"))
    }

    /// Which process works on a batch that was given to a host.
    pub fn claim_path(&self, number: u32) -> PathBuf {
        self.job_path(&format!("batch-{number:06}.claim"))
    }

    /// That process is to save and leave; it looks for this, since its host may be out of reach.
    pub fn leave_path(&self, number: u32) -> PathBuf {
        self.job_path(&format!("batch-{number:06}.leave"))
    }

    /// The sign of life of that process.
    pub fn beat_path(&self, number: u32) -> PathBuf {
        self.job_path(&format!("batch-{number:06}.beat"))
    }

    /// The folder of the outcomes.
    pub fn outcomes_path(&self) -> PathBuf {
        self.job_path("outcomes")
    }

    /// How an attempt at a trial ended.
    pub fn outcome_path(&self, hash: &str, attempt: u32) -> PathBuf {
        self.outcomes_path().join(outcome_name(hash, attempt))
    }

    /// What the programs of a trial wrote.
    pub fn log_path(&self, name: &str) -> PathBuf {
        self.job_path(&format!("{name}.log"))
    }

    /// Held by the process that works on a trial.
    pub fn trial_lock_path(&self, hash: &str) -> PathBuf {
        self.job_path(&format!("{hash}.lock"))
    }

    /// Nodes that the training of a trial has found to be bad, until its outcome tells them.
    pub fn bad_nodes_path(&self, hash: &str) -> PathBuf {
        self.job_path(&format!("{hash}-bad-nodes.json"))
    }

    /// Makes the folders.
    pub fn make(&self) -> Result<(), Failure> {
        for name in ["trials", "runs", "data", "models", "jobs", "jobs/outcomes"] {
            let path = self.root.join(name);
            fs::create_dir_all(&path).map_err(|error| storage("make a folder of the study", &path, &error))?;
        }
        Ok(())
    }

    /// Reads `study.json`.
    pub fn info(&self) -> Result<StudyInfo, Failure> {
        let info: StudyInfo = read_json(&self.info_path())?.ok_or_else(|| no_study(&self.root))?;
        self.check_version(info.version)?;
        Ok(info)
    }

    /// Reads `sweep.json`. Fails with kind `Damaged` where it contradicts itself.
    pub fn plan(&self) -> Result<SweepPlan, Failure> {
        let path = self.plan_path();
        let plan: SweepPlan = read_json(&path)?.ok_or_else(|| no_study(&self.root).because("sweep.json is not there"))?;
        self.check_version(plan.version)?;
        let wrong = plan.trials.iter().enumerate().find(|(place, trial)| trial.parent.is_some_and(|parent| parent >= *place));
        match wrong {
            None => Ok(plan),
            Some((place, _)) => Err(Failure::new(FailureKind::Damaged, "a file of the study contradicts itself")
                .at(path.display())
                .found(format!("trial {place} comes before its stage"))),
        }
    }

    fn check_version(&self, version: u32) -> Result<(), Failure> {
        if version == VERSION {
            return Ok(());
        }
        Err(Failure::new(FailureKind::Mismatch, "the study is of another version of cloze")
            .at(self.root.display())
            .expected(format!("version {VERSION}"))
            .found(format!("version {version}")))
    }

    /// Writes a file of the study whole.
    pub fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
        write_whole(path, &serde_json::to_vec_pretty(value).context("serialise a file of the study")?, READABLE)
    }

    /// Puts what a trial shares with others where this folder has it.
    pub fn settle(&self, recipe: &mut Recipe, data_hash: &str, parent: Option<&str>) {
        recipe.data.output = self.data_path(data_hash);
        if let Some(parent) = parent {
            recipe.model.path = Some(self.model_path(parent));
        }
    }
}

/// Name of the file that says how an attempt at a trial ended.
pub(super) fn outcome_name(hash: &str, attempt: u32) -> String {
    format!("{hash}-{attempt}.json")
}

/// Reads a JSON file of bounded size; `None` where there is none.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Failure> {
    let Some(bytes) = read_bounded(path)? else { return Ok(None) };
    let damaged = |error| Failure::new(FailureKind::Damaged, "a file of the study cannot be read").at(path.display()).because(error);
    serde_json::from_slice(&bytes).map(Some).map_err(damaged)
}

/// Reads a file of bounded size; `None` where there is none.
pub(super) fn read_bounded(path: &Path) -> Result<Option<Vec<u8>>, Failure> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(storage("read a file of the study", path, &error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| storage("read a file of the study", path, &error))?;
    if bytes.len() as u64 <= MAX_FILE_BYTES {
        return Ok(Some(bytes));
    }
    Err(Failure::new(FailureKind::Damaged, "a file of the study is too large")
        .at(path.display())
        .expected(format!("at most {MAX_FILE_BYTES} bytes")))
}

fn no_study(folder: &Path) -> Failure {
    if folder.join("run.json").is_file() {
        let shown = folder.display();
        let hint = format!("for runs there are `cloze status {shown}`, `cloze resume {shown}` and `cloze cancel {shown}`");
        return Failure::new(FailureKind::Input, "this folder holds a run, and no study").at(shown).hint(hint);
    }
    Failure::new(FailureKind::Input, "this folder holds no study")
        .at(folder.display())
        .hint("`cloze sweep run RECIPE` makes one and names its folder")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::recipe;

    #[test]
    fn a_trial_finds_its_data_and_stage_in_this_folder() {
        let folder = StudyFolder::new(PathBuf::from("/new"));
        let mut moved = recipe();
        moved.model.path = Some(PathBuf::from("/old/models/p"));
        folder.settle(&mut moved, "d", Some("p"));
        assert_eq!(moved.data.output, Path::new("/new/data/d"));
        assert_eq!(moved.model.path.as_deref(), Some(Path::new("/new/models/p")));
        let mut first = recipe();
        folder.settle(&mut first, "d", None);
        assert_eq!((first.model.path, first.model.tokenizer), (None, recipe().model.tokenizer));
    }

    #[test]
    fn a_folder_without_a_study_and_a_damaged_one_are_named() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(StudyFolder::find(root.path()).unwrap_err().kind, FailureKind::Input);
        fs::write(root.path().join("study.json"), "{").unwrap();
        let folder = StudyFolder::find(root.path()).unwrap();
        assert_eq!(folder.info().unwrap_err().kind, FailureKind::Damaged);
        assert_eq!(folder.plan().unwrap_err().kind, FailureKind::Input);
    }
}
