//! Whether the machines of a sweep are there, and have what a trial wants: asked before anything is written.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cloze_launcher::slurm::Slurm;
use cloze_launcher::sweep::folder::{StudyFolder, SweepPlan};
use cloze_launcher::sweep::hosts::{HostsOptions, greet_hosts};
use cloze_launcher::sweep::queue::site_of_jobs;
use cloze_recipes::site::{Site, SiteKind};
use cloze_recipes::study::Resources;

use crate::cli::partition;
use crate::cli::submit::check_partition;
use crate::cli::worker_process::worker_binary;

/// What SLURM calls its cluster, where there is one and it says so. Fails as `cloze submit` does: with kind `Recipe` where the site cannot
/// give what a trial wants, its partition among it, and with `Environment` where there is no batch system here,
/// or where no host of a list can be used.
///
/// `file` is the cluster file, where it is known; nodes that are out of use and are wanted are a warning.
pub(super) fn check_machines(resources: &Resources, pack: u32, (site, file): (Option<&Site>, Option<&Path>)) -> Result<Option<String>> {
    worker_binary()?;
    if let Some(site) = of_hosts(site) {
        return greet(resources, site).map(|()| None);
    }
    let Some(site) = of_queue(site) else { return Ok(None) };
    let slurm_site = site_of_jobs(resources, pack, site)?;
    let slurm = Slurm::find(slurm_site)?;
    check_partition(&slurm, partition::Request { resources, site: slurm_site, file })?;
    Ok(slurm.cluster_name())
}

/// Finds out whether any host can be reached and has the program. Those that cannot are named by the controller, which tries them again.
fn greet(resources: &Resources, site: &Site) -> Result<()> {
    greet_hosts(
        &HostsOptions {
            // It is not there yet, and nobody looks at it.
            folder: StudyFolder::new(PathBuf::new()),
            program: std::env::current_exe().context("find this program")?,
            resources: resources.clone(),
            concurrency: 1,
        },
        site,
    )
}

/// What SLURM calls its cluster, for whoever only takes off its machines what is out.
pub(super) fn cluster_name(plan: &SweepPlan) -> Result<Option<String>> {
    let Some(site) = of_queue(plan.site.as_ref()) else { return Ok(None) };
    Ok(Slurm::find(site_of_jobs(&plan.resources, plan.pack, site)?)?.cluster_name())
}

/// The site, where it has a batch system.
pub(super) fn of_queue(site: Option<&Site>) -> Option<&Site> {
    site.filter(|site| matches!(site.kind, SiteKind::Slurm(_)))
}

/// The site, where it has a list of hosts.
pub(super) fn of_hosts(site: Option<&Site>) -> Option<&Site> {
    site.filter(|site| matches!(site.kind, SiteKind::Ssh(_)))
}
