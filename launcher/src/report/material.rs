//! What a report is made of: the trials of a study, or single runs, with everything that was read of them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::study::{Expected, Metric};
use serde_json::Value;

use super::event_sample::Sampling;
use super::loaded_run::{self, LoadedRun};
use super::score;
use super::study_folder::{self, StudyFolder, TrialFile};

/// Bytes of all event logs together that are read.
const MAX_EVENT_BYTES: u64 = 96 << 20;
/// Fewest and most bytes that are read of one event log. A step takes about 300 bytes.
const LOG_BYTES: (u64, u64) = (64 << 10, 16 << 20);
/// Parts that a longer log is sampled in; about as many points as a curve shows well.
const NUM_BLOCKS: u64 = 32;

/// One run of a study, or a run that stands alone.
#[derive(Clone, Debug, Default)]
pub struct Trial {
    /// Hash of the trial; of a run that stands alone, its recipe's.
    pub hash: String,
    /// Values of the swept keys, without the seed.
    pub parameters: Vec<(String, Value)>,
    /// Its seed, where it is known.
    pub seed: Option<u64>,
    /// How far it is, in a word.
    pub state: String,
    /// Why it failed.
    pub failure: Option<String>,
    /// It belongs to no study, and nothing else is the same arm.
    pub stands_alone: bool,
    /// It is only an earlier stage of others, and no arm: only its cost counts.
    pub is_stage: bool,
    /// What was read of its run folder.
    pub run: LoadedRun,
}

/// What a report is made of.
#[derive(Clone, Debug, Default)]
pub struct Material {
    /// Name of the study, or of the runs.
    pub name: String,
    /// The recipe file of the study.
    pub file: Option<PathBuf>,
    /// Its profile.
    pub profile: Option<String>,
    /// Hash of the study; empty for single runs.
    pub hash: String,
    /// Unix time at which the study was made, in seconds.
    pub created: Option<f64>,
    /// The study folders, as they were named.
    pub studies: Vec<PathBuf>,
    /// What a paper says comes out.
    pub expected: Option<Expected>,
    /// What trials are compared by.
    pub metric: Option<Metric>,
    /// The swept keys.
    pub keys: Vec<String>,
    /// Trials; in the order of their parameters, then seeds.
    pub trials: Vec<Trial>,
    /// Earlier stages of the trials.
    pub stages: Vec<Trial>,
    /// What could not be read, one sentence each.
    pub notes: Vec<String>,
}

impl Material {
    /// Reads run folders and study folders, in any mixture. Fails with kind `Input` on a folder that is neither.
    pub fn read(folders: &[PathBuf]) -> Result<Self, Failure> {
        let mut material = Self::default();
        let mut names = Vec::new();
        let mut waiting: Vec<Waiting> = Vec::new();
        for folder in folders {
            if study_folder::is_study(folder) {
                let study = study_folder::read(folder)?;
                names.push(study.study.name.clone());
                waiting.extend(trials_of(&study));
                material.take_study(study);
            } else {
                check_run(folder)?;
                let trial = Trial { stands_alone: true, ..Trial::default() };
                waiting.push(Waiting { trial, folder: Some(folder.clone()), recorded: None });
            }
        }
        let named = waiting.len();
        let waiting = once(waiting);
        if waiting.len() < named {
            let again = named - waiting.len();
            material.notes.push(format!("runs that were named more than once, or are trials of several studies: {again} left out"));
        }
        material.read_runs(waiting);
        if names.is_empty() {
            names = material.trials.iter().map(|trial| trial.run.name.clone()).collect();
        }
        material.name = joined(&names);
        Ok(material)
    }

    fn take_study(&mut self, folder: StudyFolder) {
        let study = folder.study;
        self.notes.extend(folder.notes);
        if self.expected.is_some() && study.expected.is_some() {
            self.notes
                .push(format!("{}: what it expects is left out, as an earlier study of this report has its own", folder.root.display()));
        }
        self.studies.push(folder.root);
        self.file = self.file.take().or(study.file);
        self.profile = self.profile.take().or(study.profile);
        self.created = self.created.or(study.created);
        self.expected = self.expected.take().or(study.expected);
        self.metric = self.metric.take().or(study.metric);
        if self.hash.is_empty() {
            self.hash = study.hash;
        }
        for key in study.keys {
            if !self.keys.contains(&key) {
                self.keys.push(key);
            }
        }
    }

    fn read_runs(&mut self, waiting: Vec<Waiting>) {
        let folders: Vec<PathBuf> = waiting.iter().filter_map(|waiting| waiting.folder.clone()).collect();
        let max_bytes = (MAX_EVENT_BYTES / folders.len().max(1) as u64).clamp(LOG_BYTES.0, LOG_BYTES.1);
        let mut runs = loaded_run::read_all(&folders, Sampling { max_bytes, num_blocks: NUM_BLOCKS }).into_iter();
        for Waiting { mut trial, folder, recorded } in waiting {
            if folder.is_some() {
                trial.run = runs.next().unwrap_or_default();
            }
            if trial.stands_alone {
                trial.run.recipe_hash().clone_into(&mut trial.hash);
                trial.seed = trial.run.recipe_value("seed").and_then(Value::as_u64);
                trial.run.view().state.name().clone_into(&mut trial.state);
                trial.failure = trial.run.view().failure.as_ref().map(|failure| failure.what.clone());
            }
            // A trial that has not begun has no run folder, and that is no damage.
            if trial.stands_alone || trial.run.folder.exists() {
                self.notes.append(&mut trial.run.notes);
            }
            trial.run.notes.clear();
            trial.run.take_recorded(recorded);
            self.notes.append(&mut trial.run.notes);
            if !score::counts(&trial) {
                // Scores at a rung are of a model that is trained in part; no table and no plot may take them for the trial's.
                trial.run.evaluation = None;
            }
            if trial.is_stage {
                self.stages.push(trial);
            } else {
                self.trials.push(trial);
            }
        }
    }
}

/// A trial whose run folder is still to be read.
struct Waiting {
    trial: Trial,
    folder: Option<PathBuf>,
    /// The scores that the study has recorded of it.
    recorded: Option<Value>,
}

/// Each run once: one that is named again, and a trial that several studies have, would count as another seed. Of several the first that is
/// done is taken.
fn once(waiting: Vec<Waiting>) -> Vec<Waiting> {
    let mut kept: Vec<Waiting> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    for run in waiting {
        let folder = run.folder.as_ref().and_then(|folder| folder.canonicalize().ok()).map(|folder| folder.display().to_string());
        let hash = Some(&run.trial.hash).filter(|hash| !hash.is_empty()).map(|hash| format!("trial {hash}"));
        let names: Vec<String> = folder.into_iter().chain(hash).collect();
        let known = names.iter().find_map(|name| places.get(name).copied());
        let place = known.unwrap_or(kept.len());
        places.extend(names.into_iter().map(|name| (name, place)));
        match known.map(|place| &mut kept[place]) {
            None => kept.push(run),
            Some(other) if !other.trial.stands_alone && other.trial.state != score::DONE && run.trial.state == score::DONE => *other = run,
            Some(_) => {}
        }
    }
    kept
}

/// The trials of a study with their run folders. Those that are only an earlier stage of others are marked, and stand last. One that the
/// sweep asks for is an arm, whatever starts from it.
fn trials_of(folder: &StudyFolder) -> Vec<Waiting> {
    let parents: std::collections::BTreeSet<&str> = folder.trials.iter().filter_map(|trial| trial.parent.as_deref()).collect();
    let is_stage = |trial: &TrialFile| !trial.wanted.unwrap_or_else(|| !parents.contains(trial.hash.as_str()));
    let mut trials: Vec<&TrialFile> = folder.trials.iter().collect();
    trials.sort_by(|one, other| {
        let by_value = folder.study.keys.iter().map(|key| compare(one.parameters.get(key), other.parameters.get(key)));
        by_value
            .fold(is_stage(one).cmp(&is_stage(other)), std::cmp::Ordering::then)
            .then(one.seed.cmp(&other.seed))
            .then_with(|| one.hash.cmp(&other.hash))
    });
    let trial = |file: &TrialFile| Trial {
        hash: file.hash.clone(),
        parameters: file.parameters.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
        seed: file.seed,
        state: file.state.clone(),
        failure: file.failure.as_ref().map(|failure| failure.what.clone()),
        stands_alone: false,
        is_stage: is_stage(file),
        run: LoadedRun { name: file.name.clone(), ..LoadedRun::default() },
    };
    let waiting = |file: &TrialFile| Waiting { trial: trial(file), folder: folder.run_of(file), recorded: file.evaluation.clone() };
    trials.into_iter().map(waiting).collect()
}

/// Numbers by size, everything else by its text.
pub fn compare(one: Option<&Value>, other: Option<&Value>) -> std::cmp::Ordering {
    match (one.and_then(Value::as_f64), other.and_then(Value::as_f64)) {
        (Some(one), Some(other)) => one.total_cmp(&other),
        _ => one.map(Value::to_string).cmp(&other.map(Value::to_string)),
    }
}

fn check_run(folder: &Path) -> Result<(), Failure> {
    let is_run = ["run.json", "events.jsonl", "eval/eval.json"].iter().any(|name| folder.join(name).exists());
    if is_run {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Input, "this folder holds neither a run nor a study")
        .at(folder.display())
        .expected("run.json of a run, or study.json of a study")
        .hint("`cloze runs` lists runs"))
}

/// Names as one, of which at most three are spelled out.
fn joined(names: &[String]) -> String {
    match names {
        [first, second, third, rest @ ..] if !rest.is_empty() => format!("{first}, {second}, {third} and {} more", rest.len()),
        names => names.join(", "),
    }
}
