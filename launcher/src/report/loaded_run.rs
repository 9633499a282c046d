//! One run folder, read as far as it can be.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::Value;

use super::bounded;
use super::evaluation::{self, Evaluation};
use super::event_sample::{self, EventSample, Sampling};
use crate::run_folder::RunInfo;
use crate::view::{Point, RunState, RunView};

/// Largest `run.json`, in bytes.
const MAX_INFO_BYTES: u64 = 4 << 20;
/// Most threads that read run folders; disks and network mounts gain nothing from more.
const MAX_READERS: usize = 16;
/// Points of a curve that are kept. A plot is some 350 points wide, and a thousand runs are held at once.
const MAX_CURVE_POINTS: usize = 160;
/// Seconds of an hour.
const HOUR_S: f64 = 3600.0;

/// A run folder. What could not be read is absent, and a note says so.
#[derive(Clone, Debug, Default)]
pub struct LoadedRun {
    /// The folder.
    pub folder: PathBuf,
    /// The run's name, or its folder's.
    pub name: String,
    /// `run.json`
    pub info: Option<RunInfo>,
    /// `recipe.yaml` as JSON
    pub recipe: Option<Value>,
    /// `events.jsonl`
    pub events: EventSample,
    /// `eval/eval.json`
    pub evaluation: Option<Evaluation>,
    /// What could not be read, one sentence each.
    pub notes: Vec<String>,
}

impl LoadedRun {
    /// Reads a run folder; never fails.
    pub fn read(folder: &Path, sampling: Sampling) -> Self {
        let name = folder.file_name().map_or_else(|| folder.display().to_string(), |name| name.to_string_lossy().into_owned());
        let mut run = Self { folder: folder.to_path_buf(), name, ..Self::default() };
        match bounded::read_json::<RunInfo>(&folder.join("run.json"), MAX_INFO_BYTES) {
            Ok(Some(info)) => {
                run.name.clone_from(&info.name);
                run.info = Some(info);
            }
            Ok(None) => run.notes.push(format!("{}: no run.json here; the run has not started", folder.display())),
            Err(failure) => run.notes.push(bounded::note(&failure)),
        }
        let recipe = folder.join("recipe.yaml");
        if recipe.exists() {
            match cloze_recipes::read_rendered(&recipe) {
                Ok(recipe) => run.recipe = Some(recipe),
                Err(failure) => run.notes.push(bounded::note(&failure)),
            }
        }
        run.read_events(sampling);
        match evaluation::read(folder) {
            Ok(evaluation) => run.evaluation = evaluation,
            Err(failure) => run.notes.push(bounded::note(&failure)),
        }
        run.check_scores();
        run
    }

    /// Takes the scores that a study has recorded of the run, where its folder has none: it may be on another machine.
    pub fn take_recorded(&mut self, recorded: Option<Value>) {
        if evaluation::is_there(&self.folder) {
            return;
        }
        let Some(recorded) = recorded else { return };
        match serde_json::from_value(recorded) {
            Ok(evaluation) => self.evaluation = Some(evaluation),
            Err(error) => self.notes.push(format!("{}: the recorded scores cannot be read: {error}; passed over", self.name)),
        }
        self.check_scores();
    }

    /// The run after its newest event.
    pub fn view(&self) -> &RunView {
        &self.events.view
    }

    /// Hash of its recipe; empty where no file says it.
    pub fn recipe_hash(&self) -> &str {
        self.info.as_ref().map_or(self.view().recipe_hash.as_str(), |info| info.recipe_hash.as_str())
    }

    /// Training loss of the last step, of a run that did all its steps.
    pub fn final_loss(&self) -> Option<f64> {
        let view = self.view();
        let is_done = view.state == RunState::Finished || (view.progress.steps > 0 && view.progress.step >= view.progress.steps);
        if is_done { view.progress.loss } else { None }
    }

    /// Hours of all its workers together.
    pub fn worker_hours(&self) -> f64 {
        self.events.worker_seconds / HOUR_S
    }

    /// The same for its GPUs; 0 on processors.
    pub fn gpu_hours(&self) -> f64 {
        let uses_gpus = self.recipe.as_ref().is_some_and(|recipe| recipe.pointer("/train/device").is_some_and(|device| device == "cuda"));
        if uses_gpus { self.worker_hours() } else { 0.0 }
    }

    /// A value of its recipe by a key such as `train.steps`.
    pub fn recipe_value(&self, key: &str) -> Option<&Value> {
        self.recipe.as_ref()?.pointer(&format!("/{}", key.replace('.', "/")))
    }

    fn read_events(&mut self, sampling: Sampling) {
        let path = self.folder.join("events.jsonl");
        match event_sample::read(&path, sampling) {
            Ok(Some(events)) => self.events = events,
            Ok(None) => return,
            Err(failure) => self.notes.push(bounded::note(&failure)),
        }
        let damaged = self.events.damaged_lines;
        if damaged > 0 {
            self.notes.push(format!("{}: lines that are no JSON: {damaged}; passed over", path.display()));
        }
        thin(&mut self.events.view.curve.points);
    }

    /// Leaves out scores that were made by another recipe than the run's.
    fn check_scores(&mut self) {
        let Some(evaluation) = &self.evaluation else { return };
        let hash = self.recipe_hash();
        if !hash.is_empty() && !evaluation.recipe_hash.is_empty() && evaluation.recipe_hash != hash {
            let found = &evaluation.recipe_hash;
            let note = format!("{}: the scores are of another recipe, hash {found}; passed over", self.folder.display());
            self.notes.push(note);
            self.evaluation = None;
        }
    }
}

/// Reads run folders side by side, in their order.
pub fn read_all(folders: &[PathBuf], sampling: Sampling) -> Vec<LoadedRun> {
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<(usize, LoadedRun)>> = Mutex::new(Vec::with_capacity(folders.len()));
    let work = || {
        while let Some((index, folder)) = Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|index| Some((index, folders.get(index)?))) {
            let run = LoadedRun::read(folder, sampling);
            // Nothing that holds the lock can panic, so that the list is whole even where the lock is poisoned.
            results.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((index, run));
        }
    };
    let readers = thread::available_parallelism().map_or(1, usize::from).min(MAX_READERS).min(folders.len());
    thread::scope(|scope| {
        for reader in 1..readers {
            // Where no thread can be started, this one reads what is left.
            drop(thread::Builder::new().name(format!("report-reader-{reader}")).spawn_scoped(scope, work));
        }
        work();
    });
    let mut runs = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    runs.sort_by_key(|(index, _)| *index);
    runs.into_iter().map(|(_, run)| run).collect()
}

/// At most [`MAX_CURVE_POINTS`] points, each the mean over as many of the old ones at the step of the last of them.
fn thin(points: &mut Vec<Point>) {
    if points.len() <= MAX_CURVE_POINTS {
        return;
    }
    let size = points.len().div_ceil(MAX_CURVE_POINTS);
    let means = points.chunks(size).filter_map(|chunk| {
        let losses: Vec<f64> = chunk.iter().filter_map(|point| point.loss).collect();
        let loss = (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64);
        chunk.last().map(|last| Point { step: last.step, loss, tokens_per_s: last.tokens_per_s })
    });
    *points = means.collect();
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const SAMPLING: Sampling = Sampling { max_bytes: 1 << 20, num_blocks: 4 };

    #[test]
    fn a_folder_of_damaged_files_is_named_file_by_file() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("broken");
        fs::create_dir_all(folder.join("eval")).unwrap();
        for (name, text) in [("run.json", "{"), ("recipe.yaml", "a: [1"), ("events.jsonl", "\0\n"), ("eval/eval.json", "[]")] {
            fs::write(folder.join(name), text).unwrap();
        }
        let run = LoadedRun::read(&folder, SAMPLING);
        assert_eq!(run.name, "broken");
        for name in ["run.json: ", "recipe.yaml", "events.jsonl: ", "eval.json: "] {
            assert!(run.notes.iter().any(|note| note.contains(name) && note.ends_with("passed over")), "{name}: {:?}", run.notes);
        }
        assert_eq!(run.final_loss(), None);
        // A folder that is not there is a run without anything.
        assert_eq!(LoadedRun::read(&root.path().join("none"), SAMPLING).notes.len(), 1);
    }

    #[test]
    fn many_folders_keep_their_order() {
        let folders: Vec<PathBuf> = (0..50).map(|number| PathBuf::from(format!("/nowhere/run-{number}"))).collect();
        let names: Vec<String> = read_all(&folders, SAMPLING).into_iter().map(|run| run.name).collect();
        assert_eq!(names, (0..50).map(|number| format!("run-{number}")).collect::<Vec<_>>());
        assert!(read_all(&[], SAMPLING).is_empty());
    }

    #[test]
    fn a_long_curve_becomes_means() {
        let mut points: Vec<Point> = (1..=400).map(|step| Point { step, loss: Some(step as f64), tokens_per_s: None }).collect();
        thin(&mut points);
        assert_eq!((points.len(), points[0].step, points[0].loss), (134, 3, Some(2.0)));
        assert_eq!(points.last().map(|point| (point.step, point.loss)), Some((400, Some(400.0))));
    }
}
