//! Which run came from which: the stage graph of studies, and model folders that lie in a run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::report::loaded_run::LoadedRun;
use crate::report::study_folder::{self, StudyFolder};

/// The place of a run in a study.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The study's name.
    pub study: Option<String>,
    /// Hash of the trial.
    pub trial: Option<String>,
    /// Run folders of the stages before it, the nearest first.
    pub parents: Vec<PathBuf>,
}

/// Studies by folder, each read once. `None` is a folder that is no study.
#[derive(Default)]
pub struct Studies {
    known: BTreeMap<PathBuf, Option<StudyFolder>>,
    notes: Vec<String>,
}

impl Studies {
    /// The place of a run.
    pub fn place_of(&mut self, run: &LoadedRun) -> Place {
        let mut place = run.folder.parent().and_then(Path::parent).and_then(|folder| self.in_study(folder, run)).unwrap_or_default();
        if place.parents.is_empty() {
            place.parents.extend(model_run(run));
        }
        place
    }

    /// What could not be read of the studies.
    pub fn into_notes(self) -> Vec<String> {
        self.notes
    }

    fn in_study(&mut self, folder: &Path, run: &LoadedRun) -> Option<Place> {
        if !self.known.contains_key(folder) {
            let study = if study_folder::is_study(folder) { study_folder::read(folder).ok() } else { None };
            self.notes.extend(study.iter().flat_map(|study| study.notes.iter().cloned()));
            self.known.insert(folder.to_path_buf(), study);
        }
        let study = self.known.get(folder)?.as_ref()?;
        let mut trial = study.trials.iter().find(|trial| study.run_of(trial).is_some_and(|folder| folder == run.folder))?;
        let mut place = Place { study: Some(study.study.name.clone()), trial: Some(trial.hash.clone()), parents: Vec::new() };
        while let Some(parent) = trial.parent.as_ref().and_then(|parent| study.trials.iter().find(|other| other.hash == *parent)) {
            // A circle cannot come from content hashes, and a damaged file must not hold up a listing.
            if place.parents.len() == study.trials.len() {
                break;
            }
            place.parents.extend(study.run_of(parent));
            trial = parent;
        }
        Some(place)
    }
}

/// The run in whose folder the starting model lies, such as one of its checkpoints.
fn model_run(run: &LoadedRun) -> Option<PathBuf> {
    let model = Path::new(run.recipe_value("model.path")?.as_str()?);
    model.ancestors().skip(1).find(|folder| folder.join("run.json").is_file() && *folder != run.folder).map(Path::to_path_buf)
}
