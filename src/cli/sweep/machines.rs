//! Whether the machines of a sweep are there, and have what a trial wants: asked before anything is written.

use anyhow::Result;
use cloze_launcher::slurm::Slurm;
use cloze_launcher::sweep::queue::site_of_jobs;
use cloze_recipes::site::{Site, SiteKind};
use cloze_recipes::study::Resources;

use crate::cli::submit::refuse_misfits;
use crate::cli::worker_process::worker_binary;

/// Fails as `cloze submit` does: with kind `Recipe` where the site cannot give what a trial wants, its partition among it, and with
/// `Environment` where there is no batch system here.
pub(super) fn check_machines(resources: &Resources, pack: u32, site: Option<&Site>) -> Result<()> {
    worker_binary()?;
    if let Some(site) = site.filter(|site| !matches!(site.kind, SiteKind::Local)) {
        let slurm_site = site_of_jobs(resources, pack, site)?;
        refuse_misfits(&Slurm::find(slurm_site)?, resources, slurm_site)?;
    }
    Ok(())
}
