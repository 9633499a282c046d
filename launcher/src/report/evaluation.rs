//! The scores of a run, as `cloze eval` writes them into `eval/eval.json`.

use std::path::{Path, PathBuf};

use cloze_recipes::failure::Failure;
use serde::Deserialize;

use super::bounded;

/// Largest file of scores, in bytes; one file of a task with four labels takes about 300.
const MAX_EVALUATION_BYTES: u64 = 64 << 20;

/// What an evaluation found. Fields that a report does not need are left out.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Evaluation {
    /// Hash of the recipe that was evaluated.
    #[serde(default)]
    pub recipe_hash: String,
    /// By task, in the recipe's order.
    pub tasks: Vec<TaskScores>,
    /// Mean of the tasks' accuracies.
    pub mean_accuracy: f64,
    /// Mean of the tasks' macro-F1.
    pub mean_macro_f1: f64,
}

/// Scores of a task.
#[derive(Clone, Debug, Deserialize)]
pub struct TaskScores {
    /// Its name.
    pub name: String,
    /// Labels, in the order of the confusion matrix.
    #[serde(default)]
    pub labels: Vec<String>,
    /// All files together.
    pub scores: Scores,
    /// Each file alone.
    #[serde(default)]
    pub files: Vec<FileScores>,
}

/// Scores of a file of a task: a subtask, or a prompt.
#[derive(Clone, Debug, Deserialize)]
pub struct FileScores {
    /// Its name.
    pub file: String,
    /// Its scores.
    pub scores: Scores,
}

/// Scores of a set of predictions.
#[derive(Clone, Debug, Deserialize)]
pub struct Scores {
    /// Share of right answers.
    pub accuracy: f64,
    /// Mean F1 over the labels.
    pub macro_f1: f64,
    /// Rows by right label, columns by predicted label.
    #[serde(default)]
    pub confusion: Vec<Vec<u64>>,
}

/// Reads the scores of a run folder; `None` where it was not evaluated. Fails as [`bounded::read_json`].
pub fn read(run: &Path) -> Result<Option<Evaluation>, Failure> {
    bounded::read_json(&path_of(run), MAX_EVALUATION_BYTES)
}

/// Whether a run folder has scores, whatever they are worth.
pub fn is_there(run: &Path) -> bool {
    path_of(run).exists()
}

fn path_of(run: &Path) -> PathBuf {
    run.join("eval").join("eval.json")
}
