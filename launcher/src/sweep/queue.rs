//! Trials as arrays of jobs in a batch system: one array for a batch, one element for each allocation.
//!
//! A batch's job has a name that no other has, made of the study's hash and the batch's number. Which batch a trial is in is on the disk
//! before the job is submitted; so whoever finds a trial in a batch asks for the name, and nothing is submitted twice.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::{Site, SiteKind, SlurmSite};
use cloze_recipes::study::Resources;

use super::batch::Batch;
use super::executor::{Gone, Out};
use super::folder::StudyFolder;
use crate::run_folder::{READABLE, write_whole};
use crate::slurm::{ArrayRange, JobId, JobRequest, JobState, Slurm, cpus_per_node, next_poll, render};

/// Most elements of one array; batch systems allow 1,001 unless told otherwise.
pub const MAX_ELEMENTS: usize = 1000;

/// Interval at which outcomes are looked for, at most; asking the batch system is rarer.
const POLL_MS: u64 = 500;

/// Answers in a row in which a job is missing before it counts as gone: a busy batch system forgets to mention some.
const MAX_MISSES: u32 = 3;

/// Characters of the study's hash in a job's name.
const HASH_CHARS: usize = 10;

/// Longest part of the study's name in a job's name.
const MAX_NAME_CHARS: usize = 60;

/// What a queue needs to know of its study.
#[derive(Clone, Debug)]
pub struct QueueOptions {
    /// The study folder.
    pub folder: StudyFolder,
    /// Name and hash of the study.
    pub study: (String, String),
    /// The `cloze` program, at a path that the nodes share.
    pub program: PathBuf,
    /// Machines of one trial.
    pub resources: Resources,
    /// The site.
    pub site: Site,
    /// Trials that run at the same time, and how many share an allocation.
    pub concurrency: (u32, u32),
}

/// The jobs of a sweep.
#[derive(Debug)]
pub struct Queue {
    options: QueueOptions,
    slurm: Slurm,
    poll_s: u32,
    jobs: BTreeMap<u32, Job>,
    /// Elements that a new array may run at the same time.
    free: u32,
    next_poll_at: Instant,
    unchanged_polls: u32,
    last_states: BTreeMap<JobId, JobState>,
}

/// The job of a batch.
#[derive(Clone, Copy, Debug)]
struct Job {
    /// `None` where nobody has found it.
    id: Option<JobId>,
    /// Elements that run at the same time, at most.
    limit: u32,
    /// Answers in a row without it.
    misses: u32,
}

impl Queue {
    /// Finds the batch system. Fails with kind `Environment` where it is not here, and with `Recipe` where a trial wants several nodes.
    pub fn new(options: QueueOptions) -> Result<Self, Failure> {
        if options.resources.nodes > 1 {
            return Err(Failure::new(FailureKind::Recipe, "a trial of a sweep has one node")
                .at("resources.nodes")
                .expected("1")
                .found(options.resources.nodes)
                .hint("start runs of several nodes one by one, or give a trial more workers on its node"));
        }
        let site = slurm_site(&options.site)?;
        let slurm = Slurm::find(site)?;
        let (poll_s, free) = (site.poll_s, elements_at_once(options.concurrency));
        Ok(Self {
            options,
            slurm,
            poll_s,
            jobs: BTreeMap::new(),
            free,
            next_poll_at: Instant::now(),
            unchanged_polls: 0,
            last_states: BTreeMap::new(),
        })
    }

    /// Submits a batch as one array. Where it is not known whether a submission came through, its name tells.
    pub fn submit(&mut self, batch: &Batch) -> anyhow::Result<()> {
        let script = self.options.folder.job_path(&format!("batch-{:06}.sh", batch.number));
        let limit = self.free.max(1);
        let text = self.script(batch, limit)?;
        write_whole(&script, text.as_bytes(), READABLE)?;
        let submitted = self.slurm.submit(&script, &[]);
        let id = match submitted {
            Ok(id) => id,
            Err(failure) => match self.slurm.find_by_name(&self.name(batch.number))?.last() {
                Some(id) => JobId::whole(id.job),
                None => return Err(failure.into()),
            },
        };
        self.jobs.insert(batch.number, Job { id: Some(id), limit, misses: 0 });
        self.next_poll_at = Instant::now() + next_poll(0, self.poll_s);
        self.unchanged_polls = 0;
        Ok(())
    }

    /// The text of the job of a batch.
    pub fn script(&self, batch: &Batch, limit: u32) -> Result<String, Failure> {
        let QueueOptions { folder, program, resources, site, .. } = &self.options;
        let mut command = vec![program.display().to_string(), "sweep".to_owned(), "work".to_owned()];
        command.push(folder.root().display().to_string());
        command.extend(["--batch".to_owned(), batch.number.to_string()]);
        // Without cgroups a process sees all cores of its node.
        command.extend(cpus_per_node(resources).iter().flat_map(|cores| ["--cores".to_owned(), cores.to_string()]));
        let last = batch.elements.len().saturating_sub(1);
        let request = JobRequest {
            name: self.name(batch.number),
            command,
            folder: folder.root().to_owned(),
            logs: folder.job_path(""),
            array: Some(ArrayRange { elements: format!("0-{last}"), limit: Some(limit) }),
            dependency: None,
            exclude: Vec::new(),
            survives_node_loss: false,
            in_container: true,
        };
        render(&request, resources, site, self.slurm.version())
    }

    /// Trials on whose element nobody works any more. The batch system is asked at intervals that grow while nothing changes.
    pub fn gone(&mut self, outs: &[Out<'_>]) -> anyhow::Result<Vec<Gone>> {
        if outs.is_empty() || Instant::now() < self.next_poll_at {
            return Ok(Vec::new());
        }
        let batches: BTreeSet<u32> = outs.iter().map(|out| out.place.batch).collect();
        for &batch in &batches {
            self.find(batch)?;
        }
        self.jobs.retain(|batch, _| batches.contains(batch));
        let ids: Vec<JobId> = self.jobs.values().filter_map(|job| job.id).collect();
        let states = if ids.is_empty() { BTreeMap::new() } else { self.slurm.states(&ids)? };
        self.unchanged_polls = if states == self.last_states { self.unchanged_polls.saturating_add(1) } else { 0 };
        self.next_poll_at = Instant::now() + next_poll(self.unchanged_polls, self.poll_s);
        for job in self.jobs.values_mut() {
            let is_known = job.id.is_some_and(|id| states.keys().any(|found| found.job == id.job));
            job.misses = if is_known { 0 } else { job.misses + 1 };
        }
        let gone = outs.iter().filter_map(|out| Some(Gone { trial: out.trial, how: self.end_of(out, &states)? })).collect();
        self.last_states = states;
        Ok(gone)
    }

    /// How the element of a trial has ended; `None` while it has not.
    fn end_of(&self, out: &Out<'_>, states: &BTreeMap<JobId, JobState>) -> Option<String> {
        let job = self.jobs.get(&out.place.batch)?;
        let Some(id) = job.id else {
            return (job.misses >= MAX_MISSES).then(|| "its job was never submitted".to_owned());
        };
        match states.get(&id.element(out.place.element)) {
            Some(state) if state.state.is_end() => Some(match &state.exit {
                Some(exit) => format!("job {}: {}, {exit}", id.element(out.place.element), state.state),
                None => format!("job {}: {}", id.element(out.place.element), state.state),
            }),
            Some(_) => None,
            // Elements that still wait are told of as a whole by some versions.
            None if states.get(&id).is_some_and(|state| !state.state.is_end()) => None,
            None => (job.misses >= MAX_MISSES).then(|| format!("the batch system does not know job {id} any more")),
        }
    }

    /// Finds the job of a batch that an earlier controller has submitted.
    fn find(&mut self, batch: u32) -> anyhow::Result<()> {
        if self.jobs.get(&batch).is_some_and(|job| job.id.is_some()) {
            return Ok(());
        }
        let id = self.slurm.find_by_name(&self.name(batch))?.last().map(|id| JobId::whole(id.job));
        let limit = elements_at_once(self.options.concurrency);
        self.jobs.entry(batch).and_modify(|job| job.id = id).or_insert(Job { id, limit, misses: 0 });
        Ok(())
    }

    /// Takes the jobs of these trials off the queue.
    pub fn cancel(&mut self, outs: &[Out<'_>]) -> anyhow::Result<()> {
        let batches: BTreeSet<u32> = outs.iter().map(|out| out.place.batch).collect();
        for &batch in &batches {
            self.find(batch)?;
        }
        let ids: Vec<JobId> = batches.iter().filter_map(|batch| self.jobs.get(batch)?.id).collect();
        if !ids.is_empty() {
            self.slurm.cancel(&ids)?;
        }
        self.next_poll_at = Instant::now();
        Ok(())
    }

    /// Elements that may run beside those of the arrays that are out. Each array keeps its own limit, so what is left is the next one's.
    pub fn room(&mut self, outs: &[Out<'_>]) -> usize {
        let mut open: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for out in outs {
            open.entry(out.place.batch).or_default().insert(out.place.element);
        }
        let all = elements_at_once(self.options.concurrency);
        let limit = |batch| self.jobs.get(batch).map_or(all, |job| job.limit);
        let used: u32 = open.iter().map(|(batch, elements)| (elements.len() as u32).min(limit(batch))).sum();
        self.free = all.saturating_sub(used);
        self.free as usize
    }

    /// How many trials share an element.
    pub fn pack(&self) -> usize {
        self.options.concurrency.1.max(1) as usize
    }

    /// How long to wait before the next look at outcomes.
    pub fn poll_interval(&self) -> Duration {
        Duration::from_millis(POLL_MS)
    }

    fn name(&self, batch: u32) -> String {
        let (name, hash) = &self.options.study;
        let name: String = name.chars().take(MAX_NAME_CHARS).collect();
        let hash: String = hash.chars().take(HASH_CHARS).collect();
        format!("cloze-{name}-{hash}-{batch:06}")
    }
}

fn slurm_site(site: &Site) -> Result<&SlurmSite, Failure> {
    match &site.kind {
        SiteKind::Slurm(slurm) => Ok(slurm),
        SiteKind::Local | SiteKind::Ssh(_) => Err(Failure::new(FailureKind::Recipe, "the site has no batch system")
            .at(&site.name)
            .expected("`kind: slurm` in the cluster file")),
    }
}

/// Elements that run at the same time.
fn elements_at_once((concurrency, pack): (u32, u32)) -> u32 {
    concurrency.div_ceil(pack.max(1)).max(1)
}
