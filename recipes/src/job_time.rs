//! Whether the time limit of a recipe leaves the jobs of a cluster the time to train at all.

use std::path::Path;

use anyhow::Context as _;

use crate::compose::{ProfileChoice, compose};
use crate::failure::{Failure, FailureKind};
use crate::paths;
use crate::problem::Problems;
use crate::site::{Site, SiteKind};
use crate::study::{Resources, Study};

/// The key of the limit.
const KEY: &str = "resources.time_limit_minutes";

/// Shortest time in which a job begins and does a first step, in seconds: processes start, load a model and meet. Jobs of less can only save
/// what they began with.
pub(crate) const JOB_START_S: u32 = 15;

/// Fails with kind `Recipe` where a job of this cluster would be warned of its end before it has begun, since `resources.time_limit_minutes`
/// is not longer than the cluster's `slurm.warning_s` and the time of a start. The recipe file is read again, for the place.
pub fn check_job_time(study: &Study, site: &Site) -> anyhow::Result<()> {
    let Some((message, hint)) = too_short(&study.resources, site) else { return Ok(()) };
    let current_folder = paths::canonical_folder(&std::env::current_dir().context("find the current folder")?)?;
    let shown = study.file.strip_prefix(&current_folder).unwrap_or(&study.file);
    let choice = study.profile.as_deref().map(|name| ProfileChoice { name, required: true });
    let root = compose(shown, &study.overrides, choice, &current_folder, &mut Problems::default())?;
    let mut problems = Problems::default();
    problems.push(root.place_of(KEY), KEY, message);
    Err(problems.into_failure(&shown.display().to_string()).hint(hint).into())
}

/// As [`check_job_time`], of machines that are written down in this file, whatever the recipe says by now.
pub fn check_kept_job_time(resources: &Resources, site: &Site, file: &Path) -> Result<(), Failure> {
    let Some((message, hint)) = too_short(resources, site) else { return Ok(()) };
    let what = format!("`{KEY}` is too short for this cluster");
    Err(Failure::new(FailureKind::Recipe, what).at(file.display()).because(message).hint(hint))
}

/// What is wrong with the time limit of these machines, and what helps; `None` where nothing is.
fn too_short(resources: &Resources, site: &Site) -> Option<(String, String)> {
    let (SiteKind::Slurm(slurm), Some(minutes)) = (&site.kind, resources.time_limit_minutes) else { return None };
    let least = least_minutes(slurm.warning_s);
    let message = format!(
        "found {minutes}, expected at least {least}: `slurm.warning_s` of the cluster `{}` is {} s, and a job starts in {JOB_START_S} s or more",
        site.name, slurm.warning_s
    );
    (minutes < least).then(|| (message, format!("raise `{KEY}`, or lower `slurm.warning_s` in the cluster file")))
}

/// Shortest time limit, in minutes, with this warning.
pub(crate) fn least_minutes(warning_s: u32) -> u32 {
    warning_s.saturating_add(JOB_START_S).div_ceil(60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{load_site, load_study};

    #[test]
    fn a_job_has_the_time_to_begin_before_it_is_warned() {
        for (warning_s, least) in [(1, 1), (45, 1), (46, 2), (105, 2), (120, 3), (65_535, 1093)] {
            assert_eq!(least_minutes(warning_s), least, "{warning_s}");
        }
    }

    #[test]
    fn a_limit_that_is_too_short_is_told_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let recipe = write(
            "r.yaml",
            "version: 1
name: r
model: {preset: base, tokenizer: t}
data: {sources: [{url: corpus}], output: out}
train: {steps: 10, batch_examples: 10, micro_batch_tokens: 8192, learning_rate: 1e-3}
resources:
  time_limit_minutes: 2
",
        );
        let site = load_site(&write("c.yaml", "version: 1\nname: mine\nkind: slurm\n")).unwrap();
        let study = |overrides: &[&str]| {
            let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
            load_study(&recipe, &overrides, None).unwrap()
        };
        let failure: Failure = check_job_time(&study(&[]), &site).unwrap_err().downcast().unwrap();
        assert_eq!(failure.kind, FailureKind::Recipe);
        let words =
            "r.yaml:7:23: resources.time_limit_minutes: found 2, expected at least 3: `slurm.warning_s` of the cluster `mine` is 120 s";
        assert!(failure.what.contains(words), "{}", failure.what);
        assert!(failure.hint.unwrap().contains("lower `slurm.warning_s`"));
        // A study that is there has the machines and perhaps no recipe any more.
        let kept = check_kept_job_time(&study(&[]).resources, &site, Path::new("sweep.json")).unwrap_err();
        assert_eq!((kept.kind, kept.place.as_deref()), (FailureKind::Recipe, Some("sweep.json")));
        assert!(kept.cause.unwrap().starts_with("found 2, expected at least 3"));
        check_job_time(&study(&["resources.time_limit_minutes=3"]), &site).unwrap();
        check_job_time(&study(&[]), &Site::local()).unwrap();
        let brief = load_site(&write("d.yaml", "version: 1\nname: mine\nkind: slurm\nslurm: {warning_s: 60}\n")).unwrap();
        check_job_time(&study(&[]), &brief).unwrap();
    }
}
