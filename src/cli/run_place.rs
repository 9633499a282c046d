//! The run that a command names, told apart from a study.

use std::path::Path;

use cloze_launcher::RunPaths;
use cloze_recipes::failure::{Failure, FailureKind};

/// The run in a folder. `for_study` says what does for the study of a folder what was asked for of a run.
pub(super) fn find_run(folder: &Path, for_study: fn(&str) -> String) -> Result<RunPaths, Failure> {
    refuse_study(folder, for_study)?;
    RunPaths::find(folder)
}

/// Refuses the folder of a study.
pub(super) fn refuse_study(folder: &Path, for_study: fn(&str) -> String) -> Result<(), Failure> {
    if !folder.join("study.json").is_file() {
        return Ok(());
    }
    let shown = folder.display().to_string();
    Err(Failure::new(FailureKind::Input, "this folder holds a study, which has many runs").at(&shown).hint(for_study(&shown)))
}

/// Refuses a folder that is no run.
pub(super) fn check_run(folder: &Path) -> Result<(), Failure> {
    if folder.join("run.json").is_file() {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Input, "this folder holds no run")
        .at(folder.display())
        .hint("`cloze train RECIPE` starts a run and names its folder"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_study_is_no_run_and_its_own_command_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let hint = |study: &str| format!("`cloze sweep status {study}`");
        assert!(find_run(folder.path(), hint).is_ok());
        std::fs::write(folder.path().join("study.json"), "{}").unwrap();
        let failure = find_run(folder.path(), hint).unwrap_err();
        let expected = format!("`cloze sweep status {}`", folder.path().display());
        assert_eq!((failure.kind, failure.hint), (FailureKind::Input, Some(expected)));
    }
}
