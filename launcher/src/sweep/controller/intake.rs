//! What the controller takes in: attempts with an outcome, and those on which nobody works any more.

use std::collections::BTreeSet;
use std::fs;

use cloze_recipes::failure::{Failure, FailureKind};

use super::super::batch::{End, Outcome};
use super::super::decide::{FailedAttempt, Fate, after_failure, is_transient};
use super::super::folder::outcome_name;
use super::super::lease::MAX_CLOCK_SKEW_S;
use super::super::record::{Rung, TrialState};
use super::super::work::run_facts;
use super::{Controller, Stop, limits_of, outs_of};
use crate::run_folder::storage;
use crate::slurm::Avoided;

/// What is known of an attempt that failed.
struct Loss {
    failure: Failure,
    /// Steps done of the newest saved state.
    step: u64,
    /// All steps of the trial are done.
    is_trained: bool,
}

impl Controller {
    /// Takes in the attempts that have ended: those with an outcome, and those on which nobody works any more.
    pub(super) fn take_in(&mut self, now: f64) -> anyhow::Result<()> {
        if self.outs().is_empty() {
            return Ok(());
        }
        let written = self.written_outcomes()?;
        for trial in 0..self.records.len() {
            let record = &self.records[trial];
            let is_written = record.state == TrialState::Training && written.contains(&outcome_name(&record.hash, record.attempts));
            if is_written {
                self.take_outcome(now, trial)?;
            }
        }
        let outs = outs_of(&self.records);
        for gone in self.executor.gone(&outs)? {
            // It may have written its outcome just before it went.
            match self.take_outcome(now, gone.trial)? {
                true => {}
                false if gone.is_begun => self.take_loss(now, gone.trial, &gone.how)?,
                false => self.take_back(now, gone.trial)?,
            }
        }
        Ok(())
    }

    fn written_outcomes(&self) -> anyhow::Result<BTreeSet<String>> {
        let path = self.journal.folder().outcomes_path();
        let failed = |error: &std::io::Error| storage("list the outcomes", &path, error);
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&path).map_err(|error| failed(&error))? {
            names.insert(entry.map_err(|error| failed(&error))?.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    }

    /// Takes in the outcome of the newest attempt at a trial; false where there is none.
    fn take_outcome(&mut self, now: f64, trial: usize) -> anyhow::Result<bool> {
        let record = &self.records[trial];
        let Some(outcome) = Outcome::read(self.journal.folder(), &record.hash, record.attempts)? else { return Ok(false) };
        if outcome.finished > now + MAX_CLOCK_SKEW_S && self.skewed_hosts.insert(outcome.host.clone()) {
            let ahead_s = outcome.finished - now;
            self.talk.line(&format!("warning: the clock of {} is {ahead_s:.0} s ahead of this host's; set both by NTP", outcome.host));
        }
        let batch = record.place.map(|place| place.batch);
        let Avoided { news, spared } = self.executor.avoid(batch, &outcome.bad_nodes);
        if let Some(batch) = batch {
            self.executor.forget(batch, matches!(outcome.end, End::Done | End::Paused));
        }
        let what = if self.executor.is_queue() { "job" } else { "trial" };
        if !news.is_empty() {
            let (nodes, name) = (news.join(", "), &record.name);
            self.talk.line(&format!("no {what} that begins from now on uses {nodes}, which failed {name}"));
        }
        if !spared.is_empty() {
            let (nodes, name) = (spared.join(", "), &record.name);
            self.talk.line(&format!("warning: {what}s still use {nodes}, which failed {name}: without more nodes too few would be left"));
        }
        match outcome.end {
            End::Done | End::Paused => self.take_success(now, trial, outcome)?,
            End::FailedInTraining | End::FailedAfterTraining => {
                let failure = outcome.failure.unwrap_or_else(|| Failure::new(FailureKind::Damaged, "an attempt failed without a word"));
                let is_trained = outcome.end == End::FailedAfterTraining;
                self.take_failure(now, trial, Loss { failure, step: outcome.step, is_trained })?;
            }
        }
        Ok(true)
    }

    fn take_success(&mut self, now: f64, trial: usize, outcome: Outcome) -> anyhow::Result<()> {
        let record = &mut self.records[trial];
        record.step = outcome.step;
        (record.metric, record.evaluation) = (outcome.metric, outcome.evaluation);
        (record.fruitless_attempts, record.retry_at, record.failure) = (0, None, None);
        if outcome.end == End::Done {
            record.state = TrialState::Done;
        } else {
            record.state = TrialState::StoppedEarly;
            if record.rungs.last().is_none_or(|rung| rung.step < outcome.step) {
                record.rungs.push(Rung { step: outcome.step, metric: outcome.metric });
            }
        }
        self.write(now, trial)?;
        self.talk.ended(&self.records, trial, &self.plan.metric);
        Ok(())
    }

    /// An attempt with which nobody has begun.
    fn take_back(&mut self, now: f64, trial: usize) -> anyhow::Result<()> {
        let facts = run_facts(&self.journal.folder().run_path(&self.records[trial].name))?;
        self.records[trial].state = if facts.is_finished { TrialState::Trained } else { TrialState::Waiting };
        self.write(now, trial)?;
        if self.stop != Stop::No {
            self.talk.saved(&self.records[trial]);
        }
        Ok(())
    }

    /// An attempt that ended without a word.
    fn take_loss(&mut self, now: f64, trial: usize, how: &str) -> anyhow::Result<()> {
        let record = &self.records[trial];
        let failure = Failure::new(FailureKind::Run, "what worked on the trial ended without a word")
            .at(self.journal.folder().log_path(&record.name).display())
            .found(how);
        let facts = run_facts(&self.journal.folder().run_path(&record.name))?;
        self.take_failure(now, trial, Loss { failure, step: facts.saved_step, is_trained: facts.is_finished })
    }

    fn take_failure(&mut self, now: f64, trial: usize, loss: Loss) -> anyhow::Result<()> {
        let limits = limits_of(&self.plan, usize::MAX);
        let is_wished = self.stop != Stop::No;
        let record = &mut self.records[trial];
        let attempt =
            FailedAttempt { kind: loss.failure.kind, made_progress: loss.step > record.step, fruitless_before: record.fruitless_attempts };
        record.step = loss.step.max(record.step);
        let open = if loss.is_trained { TrialState::Trained } else { TrialState::Waiting };
        if is_wished && is_transient(loss.failure.kind) {
            // It was asked to leave, so that is no fault of its own.
            (record.state, record.retry_at, record.failure) = (open, None, None);
            self.write(now, trial)?;
            self.talk.saved(&self.records[trial]);
            return Ok(());
        }
        let retry_at = match after_failure(now, attempt, &limits) {
            Fate::Retry { at, fruitless } => {
                (record.state, record.retry_at, record.fruitless_attempts) = (open, Some(at), fruitless);
                Some(at)
            }
            Fate::Fail => {
                (record.state, record.retry_at) = (TrialState::Failed, None);
                None
            }
        };
        record.failure = Some(loss.failure);
        self.write(now, trial)?;
        self.talk.failed(&self.records[trial], retry_at.map(|at| at - now));
        Ok(())
    }
}
