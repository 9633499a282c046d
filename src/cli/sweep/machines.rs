//! Whether the machines of a sweep are there, and have what a trial wants: asked before anything is written.

use std::path::Path;

use anyhow::Result;
use cloze_launcher::slurm::Slurm;
use cloze_launcher::sweep::folder::SweepPlan;
use cloze_launcher::sweep::queue::site_of_jobs;
use cloze_recipes::site::{Site, SiteKind};
use cloze_recipes::study::Resources;

use crate::cli::partition;
use crate::cli::submit::check_partition;
use crate::cli::worker_process::worker_binary;

/// What SLURM calls its cluster, where there is one and it says so. Fails as `cloze submit` does: with kind `Recipe` where the site cannot
/// give what a trial wants, its partition among it, and with `Environment` where there is no batch system here.
///
/// `file` is the cluster file, where it is known; nodes that are out of use and are wanted are a warning.
pub(super) fn check_machines(resources: &Resources, pack: u32, (site, file): (Option<&Site>, Option<&Path>)) -> Result<Option<String>> {
    worker_binary()?;
    let Some(site) = of_queue(site) else { return Ok(None) };
    let slurm_site = site_of_jobs(resources, pack, site)?;
    let slurm = Slurm::find(slurm_site)?;
    check_partition(&slurm, partition::Request { resources, site: slurm_site, file })?;
    Ok(slurm.cluster_name())
}

/// What SLURM calls its cluster, for whoever only takes off its machines what is out.
pub(super) fn cluster_name(plan: &SweepPlan) -> Result<Option<String>> {
    let Some(site) = of_queue(plan.site.as_ref()) else { return Ok(None) };
    Ok(Slurm::find(site_of_jobs(&plan.resources, plan.pack, site)?)?.cluster_name())
}

/// The site, where it has a batch system.
pub(super) fn of_queue(site: Option<&Site>) -> Option<&Site> {
    site.filter(|site| !matches!(site.kind, SiteKind::Local))
}
