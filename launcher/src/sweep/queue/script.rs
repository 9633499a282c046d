//! What a batch asks of the batch system: its name, its script, and its part of the room.

use std::collections::BTreeSet;
use std::path::PathBuf;

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::{Site, SiteKind, SlurmSite};
use cloze_recipes::study::Resources;

use super::super::batch::Batch;
use super::super::folder::{StudyFolder, StudyInfo};
use crate::slurm::{ArrayRange, JobRequest, Version, cpus_per_node, render};

/// Characters of the study's hash in a job's name.
const HASH_CHARS: usize = 10;

/// Longest part of the study's name in a job's name.
const MAX_NAME_CHARS: usize = 60;

/// What a queue needs to know of its study.
#[derive(Clone, Debug)]
pub struct QueueOptions {
    /// The study folder.
    pub folder: StudyFolder,
    /// The study, whose name, hash and key name its jobs.
    pub info: StudyInfo,
    /// The `cloze` program, at a path that the nodes share.
    pub program: PathBuf,
    /// Machines of one trial.
    pub resources: Resources,
    /// The site.
    pub site: Site,
    /// Trials that run at the same time, and how many share an allocation.
    pub concurrency: (u32, u32),
}

impl QueueOptions {
    /// The batch system of the site, as [`site_of_jobs`] finds it.
    pub(in super::super) fn site_of_jobs(&self) -> Result<&SlurmSite, Failure> {
        site_of_jobs(&self.resources, self.concurrency.1, &self.site)
    }

    /// The text of the job of a batch, for a batch system of this version; the nodes of `exclude` are left out.
    pub(in super::super) fn script(
        &self,
        batch: &Batch,
        limit: u32,
        exclude: &BTreeSet<String>,
        version: Version,
    ) -> Result<String, Failure> {
        let Self { folder, info, program, resources, site, .. } = self;
        let mut command = vec![program.display().to_string(), "sweep".to_owned(), "work".to_owned()];
        command.push(folder.root().display().to_string());
        command.extend(["--batch".to_owned(), batch.number.to_string()]);
        // Without cgroups a process sees all cores of its node.
        command.extend(cpus_per_node(resources).iter().flat_map(|cores| ["--cores".to_owned(), cores.to_string()]));
        let last = batch.elements.len().saturating_sub(1);
        let request = JobRequest {
            name: job_name(info, batch.number),
            command,
            folder: folder.root().to_owned(),
            logs: folder.job_path(""),
            array: Some(ArrayRange { elements: format!("0-{last}"), limit: Some(limit) }),
            dependency: None,
            exclude: exclude.iter().cloned().collect(),
            // All elements have one script, and `cluster.min_workers` is a trial's own: one that loses a node is put back.
            survives_node_loss: false,
            // What works on a trial of several nodes needs `srun`, which containers lack; its programs run in the container.
            in_container: resources.nodes == 1,
        };
        render(&request, resources, site, version)
    }
}

/// What a site says of its batch system. Fails with kind `Recipe` where it has none, and where several trials are to share several nodes.
pub fn site_of_jobs<'a>(resources: &Resources, pack: u32, site: &'a Site) -> Result<&'a SlurmSite, Failure> {
    if resources.nodes > 1 && pack > 1 {
        return Err(Failure::new(FailureKind::Recipe, "trials of several nodes cannot share them")
            .at("sweep.pack")
            .expected(format!("1, since `resources.nodes` is {}", resources.nodes))
            .found(pack)
            .hint("give each trial one node to pack them, or leave `sweep.pack` out"));
    }
    match &site.kind {
        SiteKind::Slurm(slurm) => Ok(slurm),
        SiteKind::Local | SiteKind::Ssh(_) => Err(Failure::new(FailureKind::Recipe, "the site has no batch system")
            .at(&site.name)
            .expected("`kind: slurm` in the cluster file")),
    }
}

/// The name of a batch's job. Folders that are older than the key keep the names that they had.
pub(in super::super) fn job_name(info: &StudyInfo, batch: u32) -> String {
    let name: String = info.name.chars().take(MAX_NAME_CHARS).collect();
    let hash: String = info.hash.chars().take(HASH_CHARS).collect();
    let key = if info.key.is_empty() { String::new() } else { format!("-{}", info.key) };
    format!("cloze-{name}-{hash}{key}-{batch:06}")
}

/// The part of the free room that an array gets among arrays with so many elements in all, rounded up; at least one element runs.
pub(in super::super) fn share_of(free: u32, elements: usize, open_elements: usize) -> u32 {
    let (elements, all) = (elements as u64, open_elements.max(elements).max(1) as u64);
    let share = (u64::from(free) * elements).div_ceil(all).min(u64::from(free));
    u32::try_from(share).unwrap_or(free).max(1)
}

/// Elements that run at the same time.
pub(in super::super) fn elements_at_once((concurrency, pack): (u32, u32)) -> u32 {
    concurrency.div_ceil(pack.max(1)).max(1)
}
