//! What a listing says of one run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::difference::flattened;
use super::parents::{Place, Studies};
use crate::report::event_sample::Sampling;
use crate::report::loaded_run::{LoadedRun, read_all};
use crate::view::controller_lives;

/// Of an event log its first and its last bytes are read: how the run began, and how it stands.
pub(super) const SAMPLING: Sampling = Sampling { max_bytes: 96 << 10, num_blocks: 2 };
/// The state of a run that has not ended and that no controller has any more.
const INTERRUPTED: &str = "interrupted";
/// The state of a run in which nothing has happened yet.
const NOT_STARTED: &str = "not started";
/// Percent of a whole.
const PERCENT: f64 = 100.0;

/// One run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunEntry {
    /// Its name.
    pub name: String,
    /// Its folder, or the url of its checkpoints where only these are known.
    pub place: String,
    /// Hash of its recipe.
    pub recipe_hash: String,
    /// What it does; `interrupted` where it has not ended and no controller lives.
    pub state: String,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run; 0 where it is not known.
    pub steps: u64,
    /// Training loss of the newest step.
    pub loss: Option<f64>,
    /// Accuracy in percent by task, and `mean`.
    pub metrics: BTreeMap<String, f64>,
    /// The study that it belongs to.
    pub study: Option<String>,
    /// Hash of its trial in the study.
    pub trial: Option<String>,
    /// Run folders of the stages before it, the nearest first.
    pub parents: Vec<PathBuf>,
    /// Its checkpoints.
    pub checkpoints: CheckpointCount,
    /// Hours of all its workers.
    pub worker_hours: f64,
    /// The same of its GPUs; 0 on processors.
    pub gpu_hours: f64,
    /// Unix time of its start, in seconds.
    pub started: Option<f64>,
    /// Why it failed.
    pub failure: Option<String>,
    /// Unix time, in seconds, at which a bucket was told all this; `None` where the run's own folder was read.
    pub told: Option<f64>,
    /// What could not be read.
    pub notes: Vec<String>,
    /// The recipe, key by key; it is searched.
    #[serde(skip)]
    pub recipe: BTreeMap<String, Value>,
}

/// The checkpoints of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CheckpointCount {
    /// How many there are. Of a bucket, how many the end of the event log tells of.
    pub count: u64,
    /// Step of the newest.
    pub newest_step: Option<u64>,
    /// Where they are.
    pub place: String,
}

/// Reads run folders; what could not be read of their studies comes second. Never fails: what is damaged has notes.
pub fn entries(folders: &[PathBuf]) -> (Vec<RunEntry>, Vec<String>) {
    let mut studies = Studies::default();
    let runs = read_all(folders, SAMPLING);
    let entries = runs.into_iter().map(|run| RunEntry::of(&run, studies.place_of(&run))).collect();
    (entries, studies.into_notes())
}

/// What is known of one run.
pub(super) fn entry_of(run: &LoadedRun) -> RunEntry {
    RunEntry::of(run, Studies::default().place_of(run))
}

impl RunEntry {
    /// States besides those of a run that its own events tell of.
    pub const OTHER_STATES: [&'static str; 2] = [INTERRUPTED, NOT_STARTED];

    /// Whether a text occurs in what is known of the run: name, place, hash, state, study, tasks, or `key=value` of its recipe.
    pub fn contains(&self, text: &str) -> bool {
        let text = text.to_lowercase();
        let has = |part: &str| part.to_lowercase().contains(&text);
        let words = [self.name.as_str(), &self.place, &self.recipe_hash, &self.state];
        words.into_iter().any(has)
            || [&self.study, &self.trial, &self.failure].into_iter().flatten().any(|word| has(word))
            || self.metrics.keys().any(|task| has(task))
            || self.recipe.iter().any(|(key, value)| has(&format!("{key}={}", plain(value))))
    }

    fn of(run: &LoadedRun, place: Place) -> Self {
        let view = run.view();
        Self {
            name: run.name.clone(),
            place: run.folder.display().to_string(),
            recipe_hash: run.recipe_hash().to_owned(),
            state: state_of(run),
            step: view.progress.step,
            steps: view.progress.steps,
            loss: view.progress.loss,
            metrics: metrics_of(run),
            study: place.study,
            trial: place.trial,
            parents: place.parents,
            checkpoints: checkpoints_of(run),
            worker_hours: run.worker_hours(),
            gpu_hours: run.gpu_hours(),
            started: run.info.as_ref().map(|info| info.started).or(run.events.first_time),
            failure: view.failure.as_ref().map(|failure| failure.what.clone()),
            told: None,
            notes: run.notes.clone(),
            recipe: run.recipe.as_ref().map(flattened).unwrap_or_default(),
        }
    }
}

/// A value without quotes.
pub fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Accuracy by task, and their mean.
pub fn metrics_of(run: &LoadedRun) -> BTreeMap<String, f64> {
    let Some(evaluation) = &run.evaluation else { return BTreeMap::new() };
    let tasks = evaluation.tasks.iter().map(|task| (task.name.clone(), task.scores.accuracy * PERCENT));
    tasks.chain([("mean".to_owned(), evaluation.mean_accuracy * PERCENT)]).collect()
}

fn state_of(run: &LoadedRun) -> String {
    let state = run.view().state;
    if run.events.first_time.is_none() {
        return NOT_STARTED.to_owned();
    }
    // A lock that cannot be looked at is no sign of life.
    let lives = || controller_lives(&run.folder).unwrap_or(false);
    if state.is_end() || lives() { state.name().to_owned() } else { INTERRUPTED.to_owned() }
}

/// Counted in a folder; of a bucket, what the events say.
fn checkpoints_of(run: &LoadedRun) -> CheckpointCount {
    let url = run.recipe_value("checkpoint.url").and_then(Value::as_str);
    let folder = match url {
        None => run.folder.join("checkpoints"),
        Some(url) => match url.strip_prefix("file://") {
            None if url.contains("://") => return told_checkpoints(run, url),
            path => PathBuf::from(path.unwrap_or(url)),
        },
    };
    let steps = steps_in(&folder);
    CheckpointCount { count: steps.len() as u64, newest_step: steps.into_iter().max(), place: folder.display().to_string() }
}

fn told_checkpoints(run: &LoadedRun, url: &str) -> CheckpointCount {
    let view = run.view();
    CheckpointCount {
        count: view.totals.checkpoints,
        newest_step: view.checkpoints.back().map(|checkpoint| checkpoint.step),
        place: url.to_owned(),
    }
}

/// Steps of the complete checkpoints: a manifest makes them so.
fn steps_in(folder: &Path) -> Vec<u64> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let step = |entry: fs::DirEntry| -> Option<u64> {
        let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
        entry.path().join("manifest.json").exists().then_some(step)
    };
    entries.filter_map(step).collect()
}
