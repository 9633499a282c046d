//! The jobs of one run: what they have in common, and how one more is submitted without ever being submitted twice.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use cloze_cluster::Secret;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::{Site, SiteKind, SlurmSite};
use cloze_recipes::study::Resources;
use serde::{Deserialize, Serialize};

use super::client::{SUBMIT_SETTLED_S, Slurm, other_cluster};
use super::job::{JobId, JobState};
use super::journal::{self, AttemptEvent, JobEvent, JobRecord, Role};
use super::paths::JobPaths;
use super::poll::patiently;
use super::script::{Dependency, JobRequest, render};
use super::snapshot::Programs;
use super::version::Version;
use crate::run_folder::{READABLE, RunPaths, remove_if_there, storage, write_whole};

/// Version of `submission.json`.
const VERSION: u32 = 1;

/// Longest wait for another process that submits jobs of the run, in seconds: it may look for a job for 180 s and then submit two, each of
/// which has 120 s and 2 x 30 s in which it is looked for. That is 540 s, and a minute more.
const LOCK_WAIT_S: u64 = 600;

/// Interval at which its lock is tried.
const LOCK_RETRY_MS: u64 = 50;

/// Interval at which a job is looked for whose submission has no outcome, in seconds.
const LOOK_AGAIN_S: u64 = 10;

/// Characters of a run's key in the names of its jobs.
const KEY_LENGTH: usize = 8;

/// Characters of a run's name in the names of its jobs.
const NAME_LENGTH: usize = 60;

/// What all jobs of a run have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Submission {
    /// Version of this file.
    pub version: u32,
    /// Tells the jobs of this run from those of every other run, in their names.
    pub key: String,
    /// The cluster.
    pub site: Site,
    /// The machines of each job.
    pub resources: Resources,
    /// The programs.
    pub programs: Programs,
    /// Whether the run goes on without a worker that is lost (`cluster.min_workers`).
    pub survives_node_loss: bool,
    /// What SLURM calls the cluster that has the jobs; `None` in run folders that are older than it.
    #[serde(default)]
    pub cluster: Option<String>,
}

impl Submission {
    /// Of a run that has not been submitted before.
    pub fn new(site: Site, resources: Resources, programs: Programs, survives_node_loss: bool) -> anyhow::Result<Self> {
        let key = Secret::random().context("draw a key for the names of jobs")?.expose()[..KEY_LENGTH].to_owned();
        Ok(Self { version: VERSION, key, site, resources, programs, survives_node_loss, cluster: None })
    }

    /// Reads that of a run; `None` for a run without jobs.
    pub fn read(paths: &JobPaths) -> anyhow::Result<Option<Self>> {
        let path = paths.submission();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(storage("read how a run was submitted", &path, &error).into()),
        };
        let damaged =
            |cause: String| Failure::new(FailureKind::Damaged, "submission.json cannot be read").at(path.display()).because(cause);
        let submission: Self = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if submission.version != VERSION {
            return Err(damaged(format!("version {} of it is not known", submission.version)).into());
        }
        Ok(Some(submission))
    }

    /// Writes it whole.
    pub fn write(&self, paths: &JobPaths) -> anyhow::Result<()> {
        write_whole(&paths.submission(), &serde_json::to_vec_pretty(self).context("serialise submission.json")?, READABLE)
    }

    /// What the site says of its batch system.
    pub fn slurm(&self) -> Result<&SlurmSite, Failure> {
        match &self.site.kind {
            SiteKind::Slurm(slurm) => Ok(slurm),
            _ => Err(Failure::new(FailureKind::Damaged, "submission.json names no SLURM cluster").found(&self.site.name)),
        }
    }

    /// Workers of the whole run.
    pub fn workers(&self) -> u32 {
        self.resources.nodes.saturating_mul(self.resources.workers_per_node)
    }

    /// The text of one more job's script.
    pub fn script(&self, run: &RunPaths, wanted: &Wanted, version: Version) -> Result<String, Failure> {
        let paths = JobPaths::of(run);
        let program = self.programs.cloze.display().to_string();
        let request = JobRequest {
            name: wanted.name.clone(),
            command: vec![program, "allocation".to_owned(), run.root().display().to_string()],
            folder: run.root().to_owned(),
            logs: paths.logs(),
            array: None,
            dependency: match wanted.role {
                Role::Asked => None,
                Role::Successor { of } => Some(Dependency::AfterFailure(of)),
                Role::Replacement { of } => Some(Dependency::AfterEnd(of)),
            },
            exclude: wanted.exclude.clone(),
            survives_node_loss: self.survives_node_loss,
            // The controller needs `srun`, which containers lack; the workers run in the container.
            in_container: false,
        };
        render(&request, &self.resources, &self.site, version)
    }

    /// The name of a run's job with this number, from 1.
    pub fn job_name(&self, run_name: &str, number: usize) -> String {
        let plain = |letter: char| if letter.is_ascii_alphanumeric() || "-_.".contains(letter) { letter } else { '-' };
        let name: String = run_name.chars().take(NAME_LENGTH).map(plain).collect();
        format!("cloze-{name}-{}-{number}", self.key)
    }
}

/// One more job.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Its name.
    pub name: String,
    /// Why there is to be one.
    pub role: Role,
    /// Nodes that it must not use, besides those of the site.
    pub exclude: Vec<String>,
}

/// The jobs of a run, held by this process: nobody else submits or cancels any until this value is dropped.
#[derive(Debug)]
pub struct Jobs<'a> {
    slurm: &'a Slurm,
    paths: JobPaths,
    records: Vec<JobRecord>,
    _lock: File,
}

impl<'a> Jobs<'a> {
    /// Takes the lock and looks for what a submission that was cut off has left: an intent whose job exists is taken over, by its name.
    /// One whose job is not there stays open; [`Jobs::settle`] gives it up. For a job of the run, which may have begun in a cluster of
    /// another name than the one that it was submitted to.
    pub fn open(slurm: &'a Slurm, run: &RunPaths) -> anyhow::Result<Self> {
        let mut jobs = Self::take(slurm, run)?;
        jobs.look(Missing::MayCome)?;
        Ok(jobs)
    }

    /// As [`Jobs::open`], for a command on some host. Fails with kind `Mismatch` where jobs of the run that may not be over are in another
    /// cluster than that host; where all are over, the run moves here.
    pub fn open_here(slurm: &'a Slurm, run: &RunPaths) -> anyhow::Result<Self> {
        let mut jobs = Self::take(slurm, run)?;
        if let Some(submission) = Submission::read(&jobs.paths)?
            && let Some(here) = moved_to(slurm, &submission, &jobs.records, &journal::read(&jobs.paths.attempts())?)
                .map_err(|failure| failure.at(run.root().display()))?
        {
            jobs.note(&JobEvent::Moved { time: unix_time()?, cluster: here.clone() })?;
            Submission { cluster: Some(here), ..submission }.write(&jobs.paths)?;
        }
        jobs.look(Missing::MayCome)?;
        Ok(jobs)
    }

    fn take(slurm: &'a Slurm, run: &RunPaths) -> anyhow::Result<Self> {
        let paths = JobPaths::of(run);
        fs::create_dir_all(paths.root()).map_err(|error| storage("create a folder", &paths.root(), &error))?;
        let lock = take_lock(&paths.lock())?;
        let records = journal::jobs(journal::read(&paths.jobs())?);
        Ok(Self { slurm, paths, records, _lock: lock })
    }

    /// Its jobs, oldest first.
    pub fn records(&self) -> &[JobRecord] {
        &self.records
    }

    /// Numbers of all its jobs in this cluster.
    pub fn ids(&self) -> Vec<JobId> {
        self.records.iter().filter_map(JobRecord::id_here).collect()
    }

    /// Names of those of which nobody knows whether they were submitted.
    pub fn open_names(&self) -> Vec<&str> {
        self.records.iter().filter(|record| record.is_open()).map(|record| record.name.as_str()).collect()
    }

    /// Looks for the jobs whose submission has no outcome until each is there, or surely was not submitted: for [`SUBMIT_SETTLED_S`] by the
    /// clock of this process. Whoever wrote the intents no longer submits, since this process has the lock; when that was does not matter,
    /// and its clock may have been any other. Without an open intent it returns at once.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        self.settle_within(Duration::from_secs(SUBMIT_SETTLED_S), Duration::from_secs(LOOK_AGAIN_S))
    }

    fn settle_within(&mut self, patience: Duration, interval: Duration) -> anyhow::Result<()> {
        let since = Instant::now();
        while !self.open_names().is_empty() {
            // Only a look that begins after all that time says that there is no job.
            let left = patience.saturating_sub(since.elapsed());
            let missing = if left.is_zero() { Missing::WillNotCome } else { Missing::MayCome };
            patiently(|| self.look(missing))?;
            if !self.open_names().is_empty() {
                sleep(interval.min(left));
            }
        }
        Ok(())
    }

    /// Its jobs that are not over, with what is known of them.
    pub fn living(&self) -> Result<Vec<(JobId, JobState)>, Failure> {
        let states = self.slurm.states(&self.ids())?;
        Ok(states.into_iter().filter(|(_, job)| !job.state.is_end()).collect())
    }

    /// The job that waits for this one to fail, or takes its place.
    pub fn successor_of(&self, job: JobId) -> Option<JobId> {
        let follows = |record: &&JobRecord| match record.role {
            Role::Successor { of } | Role::Replacement { of } => of == job && !record.is_cancelled,
            Role::Asked => false,
        };
        self.records.iter().rev().filter(follows).find_map(JobRecord::id_here)
    }

    /// Submits one more job. Its script and its intent are on the disk before; a refusal is noted, so that it is not looked for.
    pub fn submit(&mut self, submission: &Submission, run_name: &str, role: Role, exclude: &[String]) -> anyhow::Result<JobId> {
        let wanted = Wanted { name: submission.job_name(run_name, self.records.len() + 1), role, exclude: exclude.to_vec() };
        let script = submission.script(self.paths.run(), &wanted, self.slurm.version())?;
        let path = self.paths.script(&wanted.name);
        write_whole(&path, script.as_bytes(), READABLE)?;
        self.note(&JobEvent::Intent { time: unix_time()?, name: wanted.name.clone(), role, exclude: wanted.exclude.clone() })?;
        match self.slurm.submit(&path, &[]) {
            Ok(job) => {
                self.note(&JobEvent::Submitted { time: unix_time()?, name: wanted.name, job })?;
                Ok(job)
            }
            Err(failure) => {
                // By its deadline a submission may have gone through all the same. Where that stays unknown the intent stays open, and
                // whoever submits next settles it first.
                match self.slurm.find_by_name(&wanted.name).map(|jobs| jobs.last().copied()) {
                    Ok(Some(job)) => {
                        self.note(&JobEvent::Submitted { time: unix_time()?, name: wanted.name, job })?;
                        return Ok(job);
                    }
                    Ok(None) if Slurm::is_refusal(&failure) => {
                        self.note(&JobEvent::Dropped { time: unix_time()?, name: wanted.name, reason: failure.to_string() })?;
                    }
                    Ok(None) => {}
                    Err(error) => tracing::warn!(%error, name = wanted.name, "it is not known whether a job was submitted"),
                }
                Err(failure.into())
            }
        }
    }

    /// Cancels jobs of this run.
    pub fn cancel(&mut self, jobs: &[JobId]) -> anyhow::Result<()> {
        if jobs.is_empty() {
            return Ok(());
        }
        self.slurm.cancel(jobs)?;
        jobs.iter().try_for_each(|&job| self.note(&JobEvent::Cancelled { time: unix_time()?, job }))
    }

    /// Keeps a job of this run that waits away from these nodes, and from those of the site; its own successors learn of them from it.
    pub fn exclude(&mut self, job: JobId, of_site: &[String], nodes: &[String]) -> anyhow::Result<()> {
        // The batch system forgets the list that the job has brought.
        let mut all: Vec<String> = of_site.iter().chain(nodes).cloned().collect();
        all.sort_unstable();
        all.dedup();
        self.slurm.exclude_nodes(job, &all)?;
        self.note(&JobEvent::Excluded { time: unix_time()?, job, exclude: nodes.to_vec() })
    }

    /// Asks for the jobs whose submission has no outcome. The attempts know the names of jobs that the batch system has forgotten.
    fn look(&mut self, missing: Missing) -> anyhow::Result<()> {
        let open: Vec<String> = self.open_names().into_iter().map(str::to_owned).collect();
        if open.is_empty() {
            return Ok(());
        }
        let attempts: Vec<AttemptEvent> = journal::read(&self.paths.attempts())?;
        for open in open {
            let begun = attempts.iter().find_map(|event| match event {
                AttemptEvent::Started { name, job, .. } if *name == open => Some(*job),
                _ => None,
            });
            let found = match begun {
                Some(job) => Some(job),
                None => self.slurm.find_by_name(&open)?.last().copied(),
            };
            let time = unix_time()?;
            match (found, missing) {
                (Some(job), _) => self.note(&JobEvent::Submitted { time, name: open, job })?,
                (None, Missing::MayCome) => {}
                (None, Missing::WillNotCome) => {
                    self.note(&JobEvent::Dropped { time, name: open, reason: "nobody knows a job of this name".to_owned() })?;
                }
            }
        }
        Ok(())
    }

    /// Writes a line and remembers it.
    fn note(&mut self, event: &JobEvent) -> anyhow::Result<()> {
        journal::append(&self.paths.jobs(), event)?;
        self.records = journal::jobs(journal::read(&self.paths.jobs())?);
        Ok(())
    }
}

/// What it means that a job is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    /// Its submission may still be on its way.
    MayCome,
    /// It was not submitted.
    WillNotCome,
}

/// The cluster of this host, where SLURM calls it otherwise than that of the run's jobs and all of those are over. Fails with kind
/// `Mismatch` where one of them may not be.
pub(super) fn moved_to(
    slurm: &Slurm,
    submission: &Submission,
    records: &[JobRecord],
    attempts: &[AttemptEvent],
) -> Result<Option<String>, Failure> {
    let Some(known) = &submission.cluster else { return Ok(None) };
    let Some(here) = slurm.cluster_name().filter(|here| here != known) else { return Ok(None) };
    match records.iter().find(|record| !record.is_over(attempts)) {
        None => Ok(Some(here)),
        Some(_) => Err(other_cluster(known, &here, "slurm/submission.json")),
    }
}

/// The jobs of a run that may not be over, by all that its folder knows; nobody is asked.
pub fn unfinished_jobs(paths: &JobPaths) -> anyhow::Result<Vec<JobRecord>> {
    let attempts: Vec<AttemptEvent> = journal::read(&paths.attempts())?;
    let mut records = journal::jobs(journal::read(&paths.jobs())?);
    records.retain(|record| !record.is_over(&attempts));
    Ok(records)
}

/// Leaves the mark of `cloze cancel`, so that no job of the run goes on.
pub fn mark_cancelled(paths: &JobPaths) -> anyhow::Result<()> {
    let text = serde_json::to_vec(&serde_json::json!({ "time": unix_time()? })).context("serialise a mark")?;
    write_whole(&paths.cancelled(), &text, READABLE)
}

/// Takes the mark away.
pub fn unmark_cancelled(paths: &JobPaths) -> anyhow::Result<()> {
    remove_if_there(&paths.cancelled()).map_err(|error| storage("remove a mark", &paths.cancelled(), &error).into())
}

/// Now, as Unix time in seconds.
pub(super) fn unix_time() -> anyhow::Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH).context("read the time of day")?.as_secs_f64())
}

fn take_lock(path: &Path) -> anyhow::Result<File> {
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let file = opened.map_err(|error| storage("open the lock of a run's jobs", path, &error))?;
    let deadline = Instant::now() + Duration::from_secs(LOCK_WAIT_S);
    while let Err(error) = file.try_lock() {
        match error {
            TryLockError::WouldBlock if Instant::now() < deadline => sleep(Duration::from_millis(LOCK_RETRY_MS)),
            TryLockError::WouldBlock => {
                return Err(Failure::new(FailureKind::Run, "another process submits jobs of this run")
                    .at(path.display())
                    .found(format!("its lock held for {LOCK_WAIT_S} s"))
                    .hint("wait for it; where it hangs, end it")
                    .into());
            }
            TryLockError::Error(error) => return Err(storage("lock a run's jobs", path, &error).into()),
        }
    }
    Ok(file)
}

#[cfg(test)]
mod tests;
