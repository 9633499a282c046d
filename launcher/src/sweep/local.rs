//! Trials on this machine: each a child process of its own, which outlives a controller that is killed.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloze_cluster::host::host_name;
use cloze_recipes::failure::{Failure, FailureKind};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::batch::Batch;
use super::executor::{Gone, Out};
use super::folder::StudyFolder;
use super::lock::{FileLock, holder_process};
use super::steps::shown;
use crate::run_folder::storage;
use crate::view::controller_lives;

/// Interval at which the processes are looked at.
const POLL_MS: u64 = 100;

/// Longest wait for the run of a trial whose process was killed, in seconds: it saves and leaves, and has its place meanwhile. After that
/// the trial is given back, and its next attempt waits for the run.
const LEAVE_WAIT_S: u64 = 180;

/// The processes of this machine.
#[derive(Debug)]
pub struct Local {
    folder: StudyFolder,
    program: PathBuf,
    /// Processes at the same time, at most; each gets its part of the machine.
    concurrency: u32,
    /// The children, by batch.
    children: BTreeMap<u32, (Child, u32)>,
    /// Children whose outcome is there and that have not ended yet; they hold no place any more.
    leaving: Vec<Child>,
    /// How a batch without an outcome has ended, and since when that is known; what its process has started may still leave.
    ended: BTreeMap<u32, (String, Instant)>,
}

impl Local {
    /// Nothing runs yet; `program` is the `cloze` program.
    pub fn new(folder: StudyFolder, program: PathBuf, concurrency: u32) -> Self {
        Self { folder, program, concurrency: concurrency.max(1), children: BTreeMap::new(), leaving: Vec::new(), ended: BTreeMap::new() }
    }

    /// Starts a batch, which has one element here.
    pub fn submit(&mut self, batch: &Batch) -> anyhow::Result<()> {
        self.reap();
        let log_path = self.folder.log_path(&format!("batch-{:06}", batch.number));
        let opened = OpenOptions::new().create(true).append(true).open(&log_path);
        let log = opened.map_err(|error| storage("open a log", &log_path, &error))?;
        let errors = log.try_clone().map_err(|error| storage("open a log", &log_path, &error))?;
        let place = least_used(self.concurrency, &self.children.values().map(|(_, place)| *place));
        let child = Command::new(&self.program)
            .args(["sweep", "work"])
            .arg(self.folder.root())
            .args(["--batch", &batch.number.to_string(), "--element", "0"])
            .args(["--place", &place.to_string(), "--of", &self.concurrency.to_string()])
            // Ctrl-C in the terminal must reach the controller only, and the work must outlive a controller that is killed.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn();
        let child = child.map_err(|error| {
            Failure::new(FailureKind::Environment, "a trial cannot be started").at(self.program.display()).because(error)
        })?;
        self.children.insert(batch.number, (child, place));
        Ok(())
    }

    /// Trials whose process has ended, and of which nothing trains any more. One that an earlier controller has started is known by the
    /// lock that it holds.
    pub fn gone(&mut self, outs: &[Out<'_>]) -> anyhow::Result<Vec<Gone>> {
        self.reap();
        let mut gone = Vec::new();
        for out in outs {
            let batch = out.place.batch;
            let Some(how) = self.end_of(out)? else { continue };
            let since = self.ended.entry(batch).or_insert_with(|| (how.clone(), Instant::now())).1;
            if since.elapsed() < Duration::from_secs(LEAVE_WAIT_S) && self.trains_on(out.hash)? {
                continue;
            }
            // Without an outcome nobody forgets its batch, and its place is free all the same.
            self.forget(batch);
            gone.push(Gone::ended(out.trial, how));
        }
        Ok(gone)
    }

    /// How the process of a trial has ended; `None` where it lives.
    fn end_of(&mut self, out: &Out<'_>) -> anyhow::Result<Option<String>> {
        if let Some((how, _)) = self.ended.get(&out.place.batch) {
            return Ok(Some(how.clone()));
        }
        if let Some((child, _)) = self.children.get_mut(&out.place.batch) {
            return Ok(child.try_wait().map_err(|error| storage("wait for a process", self.folder.root(), &error))?.map(shown));
        }
        let holder = FileLock::holder(&self.folder.trial_lock_path(out.hash))?;
        Ok(if holder.is_none() { Some("nobody knows how: its controller was killed".to_owned()) } else { None })
    }

    /// Whether the run of a trial still has a controller, which was told to leave when the process that worked on the trial was gone.
    fn trains_on(&self, hash: &str) -> anyhow::Result<bool> {
        let plan = self.folder.plan()?;
        let Some(trial) = plan.trials.iter().find(|trial| trial.hash == hash) else { return Ok(false) };
        let run = self.folder.run_path(&trial.name);
        controller_lives(&run).with_context(|| format!("look at the lock of {}", run.display()))
    }

    /// Forgets a batch, whose outcome is there; its process ends by itself, and its place is free at once.
    pub fn forget(&mut self, batch: u32) {
        self.ended.remove(&batch);
        if let Some((child, _)) = self.children.remove(&batch) {
            self.leaving.push(child);
            self.reap();
        }
    }

    /// Lets go of the children that have left, so that none stays behind as a zombie.
    fn reap(&mut self) {
        self.leaving.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
    }

    /// Asks the processes to save and leave; asked again they end their programs at once.
    pub fn stop(&self, outs: &[Out<'_>]) {
        self.each(outs, |pid| kill_process(pid, Signal::TERM));
    }

    /// Ends the processes.
    pub fn kill(&self, outs: &[Out<'_>]) {
        self.each(outs, |pid| kill_process_group(pid, Signal::KILL));
    }

    /// How long to wait before the next look.
    pub fn poll_interval() -> Duration {
        Duration::from_millis(POLL_MS)
    }

    fn each(&self, outs: &[Out<'_>], send: impl Fn(Pid) -> rustix::io::Result<()>) {
        // The id of a process that has ended may be another one's by now.
        for out in outs.iter().filter(|out| !self.ended.contains_key(&out.place.batch)) {
            let found = match self.children.get(&out.place.batch) {
                Some((child, _)) => Some(child.id()),
                // A process of an earlier controller: while it holds its lock the id is its own.
                None => holder_process(&self.folder.trial_lock_path(out.hash))
                    .ok()
                    .flatten()
                    .and_then(|(process_id, host)| (host == host_name()).then_some(process_id)),
            };
            let pid = found.and_then(|process_id| Pid::from_raw(i32::try_from(process_id).ok()?));
            if let Some(Err(error)) = pid.map(&send) {
                tracing::debug!(%error, trial = out.hash, "a process had ended before it was told");
            }
        }
    }
}

/// The place that the fewest of these have, the first of several.
pub(super) fn least_used(concurrency: u32, taken: &(impl Iterator<Item = u32> + Clone)) -> u32 {
    (0..concurrency).min_by_key(|&place| taken.clone().filter(|&other| other == place).count()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_place_comes_first() {
        let cases: [(&[u32], u32); 4] = [(&[], 0), (&[0, 2], 1), (&[0, 1, 2], 0), (&[0, 0, 1, 2, 2], 1)];
        for (taken, expected) in cases {
            assert_eq!(least_used(3, &taken.iter().copied()), expected, "{taken:?}");
        }
    }
}
