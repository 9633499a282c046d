//! What a plan says of a batch system: the script of the run's first job or of the sweep's first array, and whether the job fits.

use anyhow::{Context, Result};
use cloze_launcher::RunPaths;
use cloze_launcher::plan::Check;
use cloze_launcher::slurm::{JobPaths, Programs, Role, Slurm, Submission, Version, Wanted};
use cloze_launcher::sweep::outlook::first_script;
use cloze_recipes::site::{SiteKind, SlurmSite};

use super::Wanted as Planned;
use crate::cli::partition;
use crate::cli::run::split;

/// Stands for the characters that tell the jobs of a run, and its programs, from those of others.
const KEY_PLACE: &str = "KEY";

/// The version whose script is shown where the batch system is not asked or does not answer.
const ASSUMED_VERSION: Version = Version { year: 20, month: 11 };

/// The script, and a check that it can be written; `None` where there is none.
pub(super) fn checked_script(wanted: &Planned<'_>, checks: &mut Vec<Check>) -> Option<String> {
    let name = "batch script";
    match script(wanted) {
        Ok(script) => {
            checks.extend(script.is_some().then(|| Check::ok(name, "can be written")));
            script
        }
        Err(error) => {
            checks.push(Check::error(name, &error));
            None
        }
    }
}

/// The script, as it is for this version of the batch system.
fn script(wanted: &Planned<'_>) -> Result<Option<String>> {
    match (&wanted.trials, &wanted.site.kind) {
        (_, SiteKind::Local | SiteKind::Ssh(_)) => Ok(None),
        (Some(trials), SiteKind::Slurm(_)) => {
            first_script(wanted.study, &trials.graph, &trials.folder, (wanted.site, version(wanted))).map(Some)
        }
        (None, SiteKind::Slurm(_)) => script_of_run(wanted).map(Some),
    }
}

fn script_of_run(wanted: &Planned<'_>) -> Result<String> {
    let recipe = &wanted.study.recipe;
    let run = RunPaths::new(std::path::absolute(&wanted.folder).context("find the run folder")?);
    let kept = JobPaths::of(&run).programs().join(KEY_PLACE);
    let programs = Programs { cloze: kept.join("cloze"), worker: kept.join("cloze-worker"), hash: KEY_PLACE.to_owned() };
    let resources = wanted.study.resources.clone();
    let survives_node_loss = recipe.cluster.min_workers.is_some() && resources.nodes > 1;
    let submission =
        Submission { key: KEY_PLACE.to_owned(), ..Submission::new(wanted.site.clone(), resources, programs, survives_node_loss)? };
    let name = split(run.root())?.1;
    let job = Wanted { name: submission.job_name(&name, 1), role: Role::Asked, exclude: Vec::new() };
    Ok(submission.script(&run, &job, version(wanted))?)
}

/// The version of the batch system, if it may be asked and answers; what it cannot say is told by [`check_machines`].
fn version(wanted: &Planned<'_>) -> Version {
    match &wanted.site.kind {
        SiteKind::Slurm(slurm) if !wanted.offline => Slurm::find(slurm).map_or(ASSUMED_VERSION, |slurm| slurm.version()),
        _ => ASSUMED_VERSION,
    }
}

/// Whether the batch system is there and has what the run wants.
pub(super) fn check_machines(wanted: &Planned<'_>, site: &SlurmSite, checks: &mut Vec<Check>) {
    let name = partition::NAME;
    let shown = site.partition.as_deref().unwrap_or("the default one");
    if wanted.offline {
        checks.push(Check::warn(name, format!("{shown} was not looked at"), "leave `--offline` out"));
        return;
    }
    let request = partition::Request { resources: &wanted.study.resources, site, file: wanted.site_file };
    let found = request.checks(Slurm::find(site).as_ref());
    if found.is_empty() {
        checks.push(Check::ok(name, format!("{shown} is up and has what the run wants")));
    }
    checks.extend(found);
}
