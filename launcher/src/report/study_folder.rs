//! The folder of a study, as far as a report reads it: `study.json` and one file for each trial.

use std::fs;
use std::path::{Path, PathBuf};

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::study::{Expected, Metric};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::bounded;

/// Largest `study.json`, in bytes.
const MAX_STUDY_BYTES: u64 = 16 << 20;
/// Largest file of a trial, in bytes.
const MAX_TRIAL_BYTES: u64 = 4 << 20;
/// Most trials that are read.
const MAX_TRIALS: usize = 100_000;

/// What `study.json` says. Fields that a report does not need are left out.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct StudyFile {
    /// Name of the study.
    pub name: String,
    /// The recipe file.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// The profile that was asked for.
    #[serde(default)]
    pub profile: Option<String>,
    /// Hash of the study.
    #[serde(default)]
    pub hash: String,
    /// What a paper says comes out.
    #[serde(default)]
    pub expected: Option<Expected>,
    /// What trials are compared by.
    #[serde(default)]
    pub metric: Option<Metric>,
    /// The swept keys, in the sweep's order.
    #[serde(default)]
    pub keys: Vec<String>,
    /// Unix time at which it was made, in seconds.
    #[serde(default)]
    pub created: Option<f64>,
}

/// What the file of a trial says.
#[derive(Clone, Debug, Deserialize)]
pub struct TrialFile {
    /// Hash of everything that it computes from.
    pub hash: String,
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// Values of the swept keys.
    #[serde(default)]
    pub parameters: Map<String, Value>,
    /// Its seed.
    #[serde(default)]
    pub seed: Option<u64>,
    /// Hash of the trial of the earlier stage.
    #[serde(default)]
    pub parent: Option<String>,
    /// Whether the sweep asks for it; otherwise it is only the earlier stage of others. `None` where the file does not say.
    #[serde(default)]
    pub wanted: Option<bool>,
    /// Its run folder, below the study's.
    #[serde(default)]
    pub run: Option<PathBuf>,
    /// How far it is, in a word.
    #[serde(default)]
    pub state: String,
    /// Why it failed.
    #[serde(default)]
    pub failure: Option<Failure>,
    /// What `eval.json` of its run said; it is there too where the run folder is on another machine. It is read only where it is needed,
    /// so that one that is damaged does not hide the trial.
    #[serde(default)]
    pub evaluation: Option<Value>,
}

/// A study folder.
#[derive(Clone, Debug)]
pub struct StudyFolder {
    /// The folder.
    pub root: PathBuf,
    /// `study.json`; where it cannot be read, only the folder's name.
    pub study: StudyFile,
    /// Its trials, those of earlier stages among them, by hash.
    pub trials: Vec<TrialFile>,
    /// What could not be read, one sentence each.
    pub notes: Vec<String>,
}

/// Whether a folder is one of a study.
pub fn is_study(folder: &Path) -> bool {
    folder.join("study.json").exists() || folder.join("trials").is_dir()
}

/// Reads a study folder. Fails with kind `Input` where there is none, and with kind `Storage` when it cannot be listed.
pub fn read(folder: &Path) -> Result<StudyFolder, Failure> {
    if !is_study(folder) {
        return Err(Failure::new(FailureKind::Input, "this folder holds no study").at(folder.display()).expected("study.json or trials/"));
    }
    let mut notes = Vec::new();
    let path = folder.join("study.json");
    let study = bounded::read_json::<StudyFile>(&path, MAX_STUDY_BYTES).unwrap_or_else(|failure| {
        notes.push(bounded::note(&failure));
        None
    });
    let study = study.unwrap_or_else(|| StudyFile {
        name: folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        ..StudyFile::default()
    });
    let mut trials = Vec::new();
    for path in trial_files(folder, &mut notes)? {
        match bounded::read_json::<TrialFile>(&path, MAX_TRIAL_BYTES) {
            Ok(trial) => trials.extend(trial),
            Err(failure) => notes.push(bounded::note(&failure)),
        }
    }
    Ok(StudyFolder { root: folder.to_path_buf(), study, trials, notes })
}

impl StudyFolder {
    /// Run folder of a trial; `None` before it has one.
    pub fn run_of(&self, trial: &TrialFile) -> Option<PathBuf> {
        trial.run.as_ref().map(|run| self.root.join(run))
    }
}

fn trial_files(folder: &Path, notes: &mut Vec<String>) -> Result<Vec<PathBuf>, Failure> {
    let folder = folder.join("trials");
    let failed =
        |error: std::io::Error| Failure::new(FailureKind::Storage, "the trials cannot be listed").at(folder.display()).because(error);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            paths.push(path);
        }
    }
    paths.sort();
    if paths.len() > MAX_TRIALS {
        notes.push(format!("{}: {} trials, of which only the first {MAX_TRIALS} are read", folder.display(), paths.len()));
        paths.truncate(MAX_TRIALS);
    }
    Ok(paths)
}
