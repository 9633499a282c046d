//! The loop that owns a sweep: takes in what has ended, decides, hands out, and writes every change down before it acts on it.

mod intake;

use std::collections::BTreeSet;
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};

use super::batch::{Assignment, Batch};
use super::decide::{Action, Limits, Reason, SweepState, decide};
use super::executor::{Executor, Out};
use super::folder::SweepPlan;
use super::journal::Journal;
use super::open::OpenStudy;
use super::outlook::statuses;
use super::record::{Place, TrialRecord, TrialState};
use super::talk::Talk;
use super::time::unix_now_s;
use crate::local::signals::{Request, Signals};
use crate::run_folder::{remove_if_there, storage};
use crate::words::counted;

/// Failed attempts in a row without a new step, after which a trial has failed.
const MAX_FRUITLESS_ATTEMPTS: u32 = 3;

/// Wait before the second attempt, in seconds.
const BACKOFF_S: f64 = 2.0;

/// Longest wait between two attempts, in seconds.
const BACKOFF_MAX_S: f64 = 120.0;

/// After processes were ended by force, longest wait for them to be gone, in seconds.
const KILL_WAIT_S: u64 = 10;

/// How a controller's work has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct SweepEnd {
    /// The records.
    pub records: Vec<TrialRecord>,
    /// Somebody asked for an end before everything was done.
    pub is_interrupted: bool,
}

/// The controller of one sweep.
pub struct Controller {
    journal: Journal,
    plan: SweepPlan,
    records: Vec<TrialRecord>,
    executor: Executor,
    talk: Talk,
    next_batch: u32,
    stop: Stop,
    /// Hosts whose clocks were already complained of.
    skewed_hosts: BTreeSet<String>,
}

/// How far an end has come that somebody asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stop {
    No,
    /// What is out saves and leaves.
    Asked,
    /// The controller leaves; what is in the queue stays there.
    Detached,
    /// What is out on this machine or on hosts was ended at once.
    Killed(Instant),
}

impl Controller {
    /// The controller of a study that is open.
    pub fn new(study: OpenStudy, executor: Executor, mut talk: Talk) -> anyhow::Result<Self> {
        let OpenStudy { journal, plan, records, odd } = study;
        for text in odd {
            talk.line(&format!("warning: {text}"));
        }
        talk.learn(&records);
        let next_batch = newest_batch(&journal, &records)? + 1;
        // What an earlier `cloze sweep cancel` has asked for is done.
        let path = journal.folder().cancel_path();
        remove_if_there(&path).map_err(|error| storage("remove a file", &path, &error))?;
        Ok(Self { journal, plan, records, executor, talk, next_batch, stop: Stop::No, skewed_hosts: BTreeSet::new() })
    }

    /// Runs until nothing is left to do, or until somebody asks for an end. A first signal asks what is out on this machine or on hosts to save;
    /// a second ends it. An error ends the controller; what is out goes on, and the next controller takes it in.
    pub fn run(mut self) -> anyhow::Result<SweepEnd> {
        let signals = Signals::listen().context("listen to signals")?;
        if self.stop == Stop::No {
            self.tell_found();
        }
        loop {
            self.heed(&signals);
            let now = self.look()?;
            let reason = self.act(now)?;
            if reason.is_over() || self.may_leave() {
                break;
            }
            self.talk.status(&self.records, reason);
            sleep(self.executor.poll_interval());
        }
        self.talk.clear();
        self.tell_left_behind();
        let is_interrupted = self.stop != Stop::No;
        self.journal.close()?;
        Ok(SweepEnd { records: self.records, is_interrupted })
    }

    /// Takes everything that is out off its machines, without starting anything: for a sweep whose controller is gone.
    pub fn cancel(mut self) -> anyhow::Result<SweepEnd> {
        self.look()?;
        self.stop_all();
        self.run()
    }

    /// Takes in what has ended, and returns the time. A controller that stood still until its lease was over must not write into the
    /// records of whoever has come after it, so the lease comes first.
    fn look(&mut self) -> anyhow::Result<f64> {
        let now = unix_now_s();
        self.journal.renew(now)?;
        self.executor.tend()?;
        self.take_in(now)?;
        for line in self.executor.news() {
            self.talk.line(&line);
        }
        Ok(now)
    }

    fn tell_found(&mut self) {
        let num_out = self.outs().len();
        if num_out > 0 {
            let (verb, go_on) = if num_out == 1 { ("is", "it goes on") } else { ("are", "they go on") };
            self.talk.line(&format!("{} of an earlier controller {verb} out; {go_on}", counted(num_out, "trial")));
        }
    }

    /// Signals and the wishes of `cloze sweep cancel`.
    fn heed(&mut self, signals: &Signals) {
        if let Some(signal) = signals.take(Request::Stop).or_else(|| signals.take(Request::EarlyStop)) {
            match self.stop {
                Stop::No if self.executor.is_queue() => {
                    let num_out = self.outs().len();
                    self.talk.line(&format!(
                        "{signal}: the controller leaves; what is in the queue stays there ({}), and `cloze sweep cancel` ends it",
                        counted(num_out, "trial")
                    ));
                    self.stop = Stop::Detached;
                }
                Stop::No => {
                    self.talk.line(&format!(
                        "{signal}: nothing is started any more; what is out saves and leaves; another signal ends it at once"
                    ));
                    self.stop_all();
                }
                Stop::Asked => {
                    self.talk.line(&format!("{signal} again: what is out is ended at once"));
                    self.stop_all();
                    self.stop = Stop::Killed(Instant::now());
                }
                Stop::Detached | Stop::Killed(_) => {}
            }
        }
        if self.stop == Stop::No && self.journal.folder().cancel_path().exists() {
            self.talk.line("`cloze sweep cancel`: nothing is started any more; what is out saves and leaves");
            self.stop_all();
        }
    }

    fn stop_all(&mut self) {
        self.stop = Stop::Asked;
        let outs = outs_of(&self.records);
        self.executor.stop(&outs);
    }

    /// Says what may still be out although it was to leave.
    fn tell_left_behind(&mut self) {
        for left in self.executor.left_behind() {
            self.talk.line(&format!("warning: {left}"));
        }
    }

    /// Whether the controller leaves although trials are out.
    fn may_leave(&self) -> bool {
        match self.stop {
            Stop::Detached => true,
            Stop::Killed(since) if since.elapsed() > Duration::from_secs(KILL_WAIT_S) => {
                self.executor.kill(&self.outs());
                true
            }
            Stop::No | Stop::Asked | Stop::Killed(_) => false,
        }
    }

    /// Decides and acts until nothing more is to be done now.
    fn act(&mut self, now: f64) -> anyhow::Result<Reason> {
        loop {
            let outs = outs_of(&self.records);
            let is_early_stopping = self.plan.early_stopping.is_some();
            let most_out = self.executor.most_out(&outs, self.plan.concurrency as usize, is_early_stopping);
            let limits = limits_of(&self.plan, most_out);
            let state = SweepState { trials: statuses(&self.plan, &self.records), is_draining: self.stop != Stop::No };
            let (actions, reason) = decide(now, &state, &limits);
            let mut starts = Vec::new();
            for action in &actions {
                match *action {
                    Action::Start { trial, until_step } => starts.push((trial, until_step)),
                    Action::FailWithParent { trial, parent } => self.fail_with_parent(now, trial, parent)?,
                }
            }
            let num_starts = starts.len();
            if num_starts > 0 {
                self.hand_out(now, &starts)?;
            }
            if actions.is_empty() || num_starts == actions.len() {
                return Ok(reason);
            }
        }
    }

    fn fail_with_parent(&mut self, now: f64, trial: usize, parent: usize) -> anyhow::Result<()> {
        let stage = &self.records[parent];
        let kind = stage.failure.as_ref().map_or(FailureKind::Run, |failure| failure.kind);
        let failure = Failure::new(kind, format!("its earlier stage {} has failed", stage.name))
            .hint(format!("`cloze sweep retry {}` tries both again", self.journal.folder().root().display()));
        let record = &mut self.records[trial];
        (record.state, record.failure) = (TrialState::Failed, Some(failure));
        self.write(now, trial)?;
        self.talk.failed(&self.records[trial], None);
        Ok(())
    }

    /// Hands trials out, in as many batches as it takes.
    fn hand_out(&mut self, now: f64, starts: &[(usize, Option<u64>)]) -> anyhow::Result<()> {
        let (pack, max_elements) = (self.executor.pack(), self.executor.max_elements());
        let mut open = starts;
        while !open.is_empty() && !self.executor.is_full() {
            let open_elements = open.len().div_ceil(pack);
            let (chunk, rest) = open.split_at(open.len().min(pack * max_elements));
            open = rest;
            let number = self.next_batch;
            self.next_batch += 1;
            let mut elements = Vec::new();
            for (element, trials) in (0_u32..).zip(chunk.chunks(pack)) {
                let assignments = trials.iter().map(|&(trial, until_step)| {
                    let record = &mut self.records[trial];
                    record.attempts += 1;
                    record.place = Some(Place { batch: number, element });
                    Assignment { trial: record.hash.clone(), attempt: record.attempts, until_step }
                });
                elements.push(assignments.collect());
            }
            let batch = Batch { number, elements };
            super::folder::StudyFolder::write_json(&self.journal.folder().batch_path(number), &batch)?;
            // The intent is on the disk before anything is started.
            for &(trial, _) in chunk {
                self.records[trial].state = TrialState::Training;
                self.write(now, trial)?;
            }
            // A submission may take long, and must not outlive the lease.
            self.journal.renew(unix_now_s())?;
            if let Err(error) = self.executor.submit(&batch, open_elements) {
                for &(trial, _) in chunk {
                    self.records[trial].state = TrialState::Waiting;
                    self.write(now, trial)?;
                }
                return Err(error);
            }
            for &(trial, until_step) in chunk {
                self.talk.started(&self.records[trial], until_step, &self.executor.start_text(number));
            }
        }
        Ok(())
    }

    fn write(&mut self, now: f64, trial: usize) -> anyhow::Result<()> {
        let record = &mut self.records[trial];
        record.updated = now;
        self.journal.write(record)
    }

    fn outs(&self) -> Vec<Out<'_>> {
        outs_of(&self.records)
    }
}

/// Bounds of a sweep that may have so many trials out.
pub(super) fn limits_of(plan: &SweepPlan, concurrency: usize) -> Limits {
    Limits {
        concurrency,
        max_fruitless_attempts: MAX_FRUITLESS_ATTEMPTS,
        backoff_s: BACKOFF_S,
        backoff_max_s: BACKOFF_MAX_S,
        ladder: plan.ladder(),
    }
}

/// The trials that are out.
fn outs_of(records: &[TrialRecord]) -> Vec<Out<'_>> {
    let out = |(trial, record): (usize, &'_ TrialRecord)| {
        let place = record.place.filter(|_| record.state == TrialState::Training)?;
        Some((trial, place))
    };
    let found: Vec<(usize, Place)> = records.iter().enumerate().filter_map(out).collect();
    found.into_iter().map(|(trial, place)| Out { trial, hash: &records[trial].hash, place }).collect()
}

/// Number of the newest batch; 0 where there is none.
fn newest_batch(journal: &Journal, records: &[TrialRecord]) -> anyhow::Result<u32> {
    let path = journal.folder().job_path("");
    let mut newest = records.iter().filter_map(|record| record.place).map(|place| place.batch).max().unwrap_or(0);
    for entry in fs::read_dir(&path).map_err(|error| storage("list the batches", &path, &error))? {
        let name = entry.map_err(|error| storage("list the batches", &path, &error))?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("batch-")?.strip_suffix(".json")?.parse().ok());
        newest = newest.max(number.unwrap_or(0));
    }
    Ok(newest)
}

#[cfg(test)]
mod tests;
