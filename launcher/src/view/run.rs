//! A run as it stands: a pure fold of its events. Terminal, dashboard and metrics show the same one.

use std::collections::{BTreeMap, VecDeque};

use cloze_cluster::{Event, Recorded, StepReport};
use cloze_recipes::failure::Failure;
use serde::{Deserialize, Serialize};

use super::curve::{Curve, Point};
use super::ledger::{FailureRecord, Ledger, class_name};
use super::progress::{Progress, finite};
use super::worker::{WorkerState, WorkerView};

/// Failures that are shown; `failures.jsonl` has all of them.
const MAX_FAILURES: usize = 50;
/// Checkpoints that are shown.
const MAX_CHECKPOINTS: usize = 20;
/// Warnings that are shown; `events.jsonl` has all of them.
const MAX_WARNINGS: usize = 20;
/// Most slots that are shown; no run has more workers than a hundred times this.
const MAX_SLOTS: u32 = 100_000;

/// What a run does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Workers are started and build their models.
    #[default]
    Starting,
    /// Steps are done.
    Training,
    /// Something failed and the next generation has not begun to train.
    Recovering,
    /// The workers left a generation in good order, to go on as another.
    Regrouping,
    /// It was asked to stop and has saved its state.
    Stopped,
    /// All steps are done and saved.
    Finished,
    /// It failed.
    Failed,
}

impl RunState {
    /// All states.
    pub const ALL: [Self; 7] =
        [Self::Starting, Self::Training, Self::Recovering, Self::Regrouping, Self::Stopped, Self::Finished, Self::Failed];

    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Training => "training",
            Self::Recovering => "recovering",
            Self::Regrouping => "regrouping",
            Self::Stopped => "stopped",
            Self::Finished => "finished",
            Self::Failed => "failed",
        }
    }

    /// Whether nothing more happens until somebody resumes the run.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Stopped | Self::Finished | Self::Failed)
    }
}

/// A checkpoint that is complete and visible.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointView {
    /// Unix time at which it was complete, in seconds.
    pub time: f64,
    /// Steps done at the checkpoint.
    pub step: u64,
    /// Where it is.
    pub url: String,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Seconds that the save took.
    pub seconds: f64,
    /// Seconds for which it held up training.
    pub blocked_s: f64,
}

/// Something that a user should know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WarningView {
    /// Unix time, in seconds.
    pub time: f64,
    /// One sentence, lowercase.
    pub message: String,
}

/// Sums over all events, replayed steps included.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Steps that were done, also those that have no report of their own (`train.log_every_steps`).
    pub steps: u64,
    /// Tokens of these steps. Those of steps that a lost leader did not live to report are missing, as are their seconds.
    pub tokens: u64,
    /// Examples of these steps.
    pub examples: u64,
    /// Seconds that these steps took.
    pub step_seconds: f64,
    /// Failures that are dealt with, by class.
    pub failures: BTreeMap<String, u64>,
    /// Generations that trained again after a failure.
    pub recoveries: u64,
    /// Seconds that these recoveries took.
    pub recovery_seconds: f64,
    /// Steps that were lost to failures.
    pub steps_lost: u64,
    /// Checkpoints that were saved.
    pub checkpoints: u64,
    /// Seconds for which saving held up training.
    pub checkpoint_blocked_seconds: f64,
    /// Warnings.
    pub warnings: u64,
}

/// A run as it stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunView {
    /// Its name; empty before the first event.
    pub name: String,
    /// Hash of its recipe.
    pub recipe_hash: String,
    /// What it does.
    pub state: RunState,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// Unix time at which the newest controller started, in seconds.
    pub started: f64,
    /// Unix time of the newest event, in seconds.
    pub updated: f64,
    /// Address of its dashboard, while there is one.
    pub dashboard: Option<String>,
    /// Fewest workers with which it goes on; `None` where all slots must be filled.
    pub min_workers: Option<u32>,
    /// Number of the newest generation; 0 before the first.
    pub generation: u64,
    /// Why that generation began.
    pub generation_reason: String,
    /// Its slots by rank.
    pub members: Vec<u32>,
    /// Where its state came from.
    pub source: String,
    /// How far and how fast.
    pub progress: Progress,
    /// All slots.
    pub workers: Vec<WorkerView>,
    /// The newest failures, oldest first; those that are not dealt with yet are last.
    pub failures: Vec<FailureRecord>,
    /// The newest checkpoints, oldest first.
    pub checkpoints: VecDeque<CheckpointView>,
    /// The newest warnings, oldest first.
    pub warnings: VecDeque<WarningView>,
    /// Sums.
    pub totals: Totals,
    /// Loss and throughput by step.
    pub curve: Curve,
    #[serde(skip)]
    ledger: Ledger,
    /// The step up to which steps are counted; `None` before anything says from where the workers went.
    #[serde(skip)]
    counted_step: Option<u64>,
    /// Failures that are dealt with.
    #[serde(skip)]
    closed: VecDeque<FailureRecord>,
    /// Grows with every event after which a reader needs more than [`StepUpdate`].
    #[serde(skip)]
    structure: u64,
}

/// What changes with a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepUpdate {
    /// [`RunView::updated`].
    pub updated: f64,
    /// [`RunView::progress`].
    pub progress: Progress,
    /// [`RunView::totals`].
    pub totals: Totals,
    /// The points of the curve behind this step are the following ones.
    pub after: u64,
    /// Points of the curve.
    pub points: Vec<Point>,
}

/// How much of a view a reader has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    structure: u64,
    rewrites: u64,
    settled_step: u64,
}

impl RunView {
    /// Takes in an event.
    pub fn apply(&mut self, recorded: &Recorded) {
        let (time, event) = (recorded.time, &recorded.event);
        self.updated = time;
        let completed = self.ledger.apply(recorded);
        let is_step = match event {
            Event::Step { generation, report } => {
                self.step_done(time, *generation, report);
                true
            }
            Event::Progress { step, .. } => {
                self.progress.reached(*step);
                true
            }
            _ => false,
        };
        if is_step && completed.is_empty() {
            return;
        }
        self.structure += 1;
        self.keep_failures(completed);
        self.apply_to_run(time, event);
        self.apply_to_workers(event);
    }

    /// How much a reader has that was given the whole view just now.
    pub fn seen(&self) -> Seen {
        Seen { structure: self.structure, rewrites: self.curve.rewrites(), settled_step: self.curve.settled_step() }
    }

    /// What a reader needs to catch up; `None` where it needs the whole view.
    pub fn update_since(&self, seen: Seen) -> Option<StepUpdate> {
        (seen.structure == self.structure && seen.rewrites == self.curve.rewrites()).then(|| StepUpdate {
            updated: self.updated,
            progress: self.progress.clone(),
            totals: self.totals.clone(),
            after: seen.settled_step,
            points: self.curve.after(seen.settled_step).to_vec(),
        })
    }

    /// Catches up, as a reader.
    pub fn merge(&mut self, update: StepUpdate) {
        (self.updated, self.progress, self.totals) = (update.updated, update.progress, update.totals);
        self.curve.continue_after(update.after, update.points);
    }

    fn step_done(&mut self, time: f64, generation: u64, report: &StepReport) {
        self.progress.step_done(time, report);
        self.curve.add(Point { step: report.step, loss: finite(report.loss), tokens_per_s: finite(report.tokens_per_s) });
        // A log can say anything, and a damaged one must not end its reader.
        let num_known = report.before.steps.saturating_add(1);
        let num_steps = self.counted_step.map_or(num_known, |counted| report.step.saturating_sub(counted)).max(1);
        self.count_steps(report.step, num_steps, report.examples);
        self.totals.tokens = self.totals.tokens.saturating_add(report.tokens).saturating_add(report.before.tokens);
        self.totals.step_seconds += finite(report.seconds + report.before.seconds).unwrap_or(0.0);
        // A log that is read from its middle, or a generation that another controller started, begins with steps.
        if self.state != RunState::Training || self.generation != generation {
            (self.state, self.generation) = (RunState::Training, generation);
            self.members_train();
            self.structure += 1;
        }
    }

    /// Takes the steps up to this one as done.
    fn count_steps(&mut self, step: u64, num_steps: u64, examples_per_step: u64) {
        self.totals.steps = self.totals.steps.saturating_add(num_steps);
        self.totals.examples = self.totals.examples.saturating_add(num_steps.saturating_mul(examples_per_step));
        self.counted_step = Some(step);
    }

    /// The workers are known to have come so far, whether or not the last steps were reported.
    fn reached(&mut self, step: u64) {
        self.progress.reached(step);
        if let Some(num_steps) = self.counted_step.and_then(|counted| step.checked_sub(counted)) {
            self.count_steps(step, num_steps, self.progress.examples_per_step());
        }
    }

    fn keep_failures(&mut self, completed: Vec<FailureRecord>) {
        for record in completed {
            *self.totals.failures.entry(class_name(record.class).to_owned()).or_default() += 1;
            keep(&mut self.closed, MAX_FAILURES, record);
        }
        let known = self.closed.len() + self.ledger.open_records().count();
        let shown = self.closed.iter().chain(self.ledger.open_records()).skip(known.saturating_sub(MAX_FAILURES));
        self.failures = shown.cloned().collect();
    }

    /// The parts that are about the run as a whole.
    fn apply_to_run(&mut self, time: f64, event: &Event) {
        match event {
            Event::RunStarted { name, recipe_hash, workers, min_workers, steps } => {
                (self.name, self.recipe_hash) = (name.clone(), recipe_hash.clone());
                (self.state, self.failure, self.started, self.dashboard) = (RunState::Starting, None, time, None);
                (self.min_workers, self.progress.steps) = (*min_workers, *steps);
                self.progress.pause();
                self.reset_slots(*workers);
            }
            Event::DashboardListening { url } => self.dashboard = Some(url.clone()),
            Event::GenerationStarted { generation, workers, reason, .. } => {
                (self.generation, self.generation_reason, self.members) = (*generation, reason.clone(), workers.clone());
                self.progress.pause();
            }
            Event::Restored { step, source, .. } => {
                self.source.clone_from(source);
                // Steps that are done again count again, and those between the last report and the state in memory count with the next.
                self.counted_step = Some(self.counted_step.map_or(*step, |counted| counted.min(*step)));
                self.progress.restored(*step);
            }
            Event::CheckpointSaved { step, url, bytes, seconds, blocked_s } => {
                let (url, bytes, seconds, blocked_s) = (url.clone(), *bytes, *seconds, *blocked_s);
                keep(&mut self.checkpoints, MAX_CHECKPOINTS, CheckpointView { time, step: *step, url, bytes, seconds, blocked_s });
                self.totals.checkpoints += 1;
                self.totals.checkpoint_blocked_seconds += blocked_s;
            }
            Event::GenerationAborted { step, .. } => self.pauses(*step, RunState::Recovering),
            Event::GenerationRegrouped { step, .. } => self.pauses(*step, RunState::Regrouping),
            Event::CoordinatorRestarted { generation, .. } => self.generation = *generation,
            Event::Recovered { seconds, steps_lost, .. } => {
                self.totals.recoveries += 1;
                self.totals.recovery_seconds += finite(*seconds).unwrap_or(0.0);
                self.totals.steps_lost += steps_lost;
            }
            Event::Warning { message } => {
                keep(&mut self.warnings, MAX_WARNINGS, WarningView { time, message: message.clone() });
                self.totals.warnings += 1;
            }
            Event::RunFinished { step, .. } => self.ends(*step, RunState::Finished),
            Event::RunStopped { step } => self.ends(*step, RunState::Stopped),
            Event::RunFailed { failure } => {
                self.failure = Some(failure.clone());
                self.ends(self.progress.step, RunState::Failed);
            }
            _ => {}
        }
    }

    /// The parts that are about single workers.
    fn apply_to_workers(&mut self, event: &Event) {
        match event {
            Event::WorkerStarted { worker, process_id } => {
                let Some(worker) = self.slot(*worker) else { return };
                (worker.process_id, worker.is_own) = (Some(*process_id), true);
                worker.becomes(WorkerState::Starting, "its process was started");
            }
            Event::WorkerJoined { worker, host, process_id, rejoined } => {
                let Some(worker) = self.slot(*worker) else { return };
                worker.host = Some(host.clone());
                if *rejoined {
                    (worker.has_joined, worker.process_id) = (true, worker.process_id.or(Some(*process_id)));
                } else {
                    worker.is_filled(*process_id);
                }
                worker.becomes(WorkerState::Joined, if *rejoined { "joined again" } else { "joined" });
            }
            Event::GenerationStarted { workers, .. } => self.seat(workers),
            Event::Restored { .. } => self.members_train(),
            Event::CoordinatorRestarted { adopted: true, .. } => self.adopt(),
            Event::WorkerLost { worker, host, reason, .. } => {
                let Some(worker) = self.slot(*worker) else { return };
                (worker.host, worker.rank) = (Some(host.clone()), None);
                worker.becomes(WorkerState::Lost, format!("lost: {reason}"));
            }
            Event::WorkerExited { worker, process_id, status, .. } => {
                let Some(worker) = self.slot(*worker).filter(|worker| worker.process_id == Some(*process_id)) else { return };
                worker.process_id = None;
                match worker.state {
                    WorkerState::Finished | WorkerState::Lost => worker.says(format!("{}; its process ended: {status}", worker.last_word)),
                    _ => worker.becomes(WorkerState::Lost, format!("its process ended: {status}")),
                }
            }
            Event::StackDumped { worker, path, .. } => {
                let Some(worker) = self.slot(*worker) else { return };
                worker.says(format!("{}; stacks in {path}", worker.last_word));
            }
            Event::WorkerRestarted { worker, attempt, budget_left } => {
                let Some(worker) = self.slot(*worker) else { return };
                worker.restarts = *attempt;
                worker.says(format!("restarted, {budget_left} restarts left"));
            }
            Event::WorkerFinished { worker, step } => {
                let Some(worker) = self.slot(*worker) else { return };
                worker.becomes(WorkerState::Finished, format!("done at step {step}"));
            }
            Event::GenerationAborted { .. } | Event::GenerationRegrouped { .. } => self.leave_seats(),
            _ => {}
        }
    }

    fn pauses(&mut self, step: u64, state: RunState) {
        self.reached(step);
        self.state = state;
        self.progress.pause();
    }

    fn ends(&mut self, step: u64, state: RunState) {
        self.pauses(step, state);
        self.dashboard = None;
        for worker in &mut self.workers {
            worker.rank = None;
            if matches!(worker.state, WorkerState::Starting | WorkerState::Joined | WorkerState::Training) {
                worker.becomes(WorkerState::Absent, "the run has ended");
            }
        }
    }

    /// All slots of a new controller; what happened to them before it is kept.
    fn reset_slots(&mut self, workers: u32) {
        let workers = workers.min(MAX_SLOTS);
        self.workers.truncate(workers as usize);
        for slot in self.workers.len() as u32..workers {
            self.workers.push(WorkerView::absent(slot));
        }
        for worker in &mut self.workers {
            (worker.rank, worker.process_id) = (None, None);
            (worker.is_own, worker.has_joined) = (false, false);
            worker.becomes(WorkerState::Absent, "");
        }
    }

    /// The slot of a number; made where the log begins in its middle.
    fn slot(&mut self, slot: u32) -> Option<&mut WorkerView> {
        for missing in self.workers.len() as u32..=slot.min(MAX_SLOTS - 1) {
            self.workers.push(WorkerView::absent(missing));
        }
        self.workers.get_mut(slot as usize)
    }

    fn seat(&mut self, members: &[u32]) {
        self.leave_seats();
        for (rank, &slot) in (0_u32..).zip(members) {
            if let Some(worker) = self.slot(slot) {
                worker.rank = Some(rank);
                worker.becomes(WorkerState::Joined, format!("restores as rank {rank}"));
            }
        }
    }

    fn members_train(&mut self) {
        for worker in self.workers.iter_mut().filter(|worker| worker.rank.is_some() && worker.state == WorkerState::Joined) {
            worker.becomes(WorkerState::Training, "trains");
        }
    }

    /// The running generation goes on under a new coordinator. Who its members are stands in the log, or all that joined are.
    fn adopt(&mut self) {
        let joined = self.workers.iter().filter(|worker| worker.state == WorkerState::Joined).map(|worker| worker.slot);
        let members = if self.members.is_empty() { joined.collect() } else { self.members.clone() };
        self.seat(&members);
        for worker in self.workers.iter_mut().filter(|worker| worker.rank.is_some()) {
            worker.has_joined = true;
        }
        self.members = members;
        self.members_train();
        self.state = RunState::Training;
    }

    fn leave_seats(&mut self) {
        for worker in &mut self.workers {
            worker.rank = None;
            if worker.state == WorkerState::Training {
                worker.becomes(WorkerState::Joined, "waits for the next generation");
            }
        }
    }
}

/// Appends to a list of at most `most` entries.
fn keep<T>(list: &mut VecDeque<T>, most: usize, entry: T) {
    if list.len() == most {
        list.pop_front();
    }
    list.push_back(entry);
}

#[cfg(test)]
mod tests;
