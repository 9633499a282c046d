//! From a recipe file to a checked study, and the check of all that one file says.

use std::path::Path;

use anyhow::Context as _;

use crate::compose::{ProfileChoice, compose, profile_names};
use crate::problem::Problems;
use crate::study::{Scope, Stages, Study, Trial, check_arms, start_as_stage, trials_of};
use crate::{check, paths, schema, validate};

/// Reads a recipe file whole: the run as [`load_with_profile`](crate::load_with_profile) reads it, and what stands around it.
///
/// Fails like that function. The trials are checked by [`Study::trials`].
pub fn load_study(path: &Path, overrides: &[String], profile: Option<&str>) -> anyhow::Result<Study> {
    let shown = path.display().to_string();
    study_of(path, overrides, profile)?.map_err(|problems| problems.into_failure(&shown).into())
}

/// What [`check_file`] found right.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckedFile {
    /// The study.
    pub study: Study,
    /// Its trials, as they are in a folder `study` of the current one.
    pub trials: Vec<Trial>,
    /// The profiles that were checked as well, each with its number of trials; none where one was asked for.
    pub profiles: Vec<(String, usize)>,
}

/// Checks everything that a recipe file says: the run, what stands around it, every trial, and, where no profile is asked for, the same
/// under each profile.
///
/// Without a profile, and the trials right, every arm that is expected must be one of theirs; a profile may sweep less.
///
/// Fails with one line for each problem.
pub fn check_file(path: &Path, overrides: &[String], profile: Option<&str>) -> anyhow::Result<CheckedFile> {
    let shown = path.display().to_string();
    let mut problems = Problems::default();
    let checked = checked_under(path, overrides, profile, &mut problems)?;
    if let (Some((study, trials)), None) = (&checked, profile)
        && let Some(expected) = &study.expected
    {
        let root = compose(path, overrides, None, &current_folder()?, &mut Problems::default())?;
        check_arms(expected, trials, &root, &mut problems);
    }
    let names = if profile.is_some() { Vec::new() } else { named_profiles(path, overrides)? };
    let mut profiles = Vec::new();
    for name in names {
        let mut found = Problems::default();
        let checked = checked_under(path, overrides, Some(&name), &mut found)?;
        problems.absorb(found, Some(&format!("under the profile {name}")));
        profiles.extend(checked.map(|(_, trials)| (name, trials.len())));
    }
    match checked {
        Some((study, trials)) if problems.is_empty() => Ok(CheckedFile { study, trials, profiles }),
        _ => Err(problems.into_failure(&shown).into()),
    }
}

/// The study and its trials under one profile; `None` where `problems` says why not.
fn checked_under(
    path: &Path,
    overrides: &[String],
    profile: Option<&str>,
    problems: &mut Problems,
) -> anyhow::Result<Option<(Study, Vec<Trial>)>> {
    let study = match study_of(path, overrides, profile)? {
        Ok(study) => study,
        Err(found) => {
            problems.absorb(found, None);
            return Ok(None);
        }
    };
    match trials_of(&study, Path::new("study"))? {
        Ok(trials) => Ok(Some((study, trials))),
        Err(found) => {
            problems.absorb(found, None);
            Ok(None)
        }
    }
}

fn named_profiles(path: &Path, overrides: &[String]) -> anyhow::Result<Vec<String>> {
    let current_folder = current_folder()?;
    let root = compose(path, overrides, None, &current_folder, &mut Problems::default())?;
    Ok(profile_names(&root).into_iter().map(str::to_owned).collect())
}

/// The study, or everything that is wrong with it and its earlier stage.
fn study_of(path: &Path, overrides: &[String], profile: Option<&str>) -> anyhow::Result<Result<Study, Problems>> {
    let current_folder = current_folder()?;
    let mut problems = Problems::default();
    let choice = profile.map(|name| ProfileChoice { name, required: true });
    let mut root = compose(path, overrides, choice, &current_folder, &mut problems)?;
    // A link to a file stays one: paths in it start at the folder of the link.
    let folder = paths::canonical_folder(path.parent().unwrap_or(Path::new("")))?;
    let file = folder.join(path.file_name().unwrap_or_default());

    let schema = schema::schema();
    let scope = Scope { profile, current_folder: &current_folder, folder: &current_folder, schema: &schema };
    let parent = Stages::new(scope).parent_of(&root);
    if !matches!(parent, Ok(None)) {
        start_as_stage(&mut root, parent.as_ref().ok().and_then(Option::as_ref), &current_folder);
    }
    validate::validate(&root, &schema, &mut problems);
    let checked = check::check_study(&root, problems, &current_folder);
    let (recipe, around) = match (checked, parent) {
        (Ok(checked), Ok(_)) => checked,
        (Ok(_), Err(problems)) | (Err(problems), Ok(_)) => return Ok(Err(problems)),
        (Err(mut problems), Err(stage)) => {
            problems.absorb(stage, None);
            return Ok(Err(problems));
        }
    };
    let study = Study {
        file,
        recipe,
        resources: around.resources,
        after: around.after,
        sweep: around.sweep,
        expected: around.expected,
        profile: profile.map(str::to_owned),
        overrides: overrides.to_vec(),
    };
    Ok(Ok(study))
}

fn current_folder() -> anyhow::Result<std::path::PathBuf> {
    let current_folder = std::env::current_dir().context("find the current folder")?;
    paths::canonical_folder(&current_folder)
}

#[cfg(test)]
mod tests;
