//! The loop that keeps a run alive: it starts and replaces worker processes, listens to signals and to the dashboard, and hands
//! every event to the reporters.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use cloze_cluster::{Control, Event, RunEnd};
use cloze_recipes::failure::{Failure, FailureKind};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::crew::{Crew, Verdict};
use super::drill::{Drill, DrillKind};
use super::process::{Exit, ProcessOrder};
use super::restart::{ExitDecision, ExitReason, RestartLimits};
use super::signals::{Request, Signals};
use crate::dashboard::DashboardOrder;
use crate::reporter::Reporters;

/// Interval at which signals and due times are looked at.
const TICK_MS: u64 = 100;

/// After the run has ended, longest time for the workers to leave before they are killed.
const LEAVE_TIMEOUT_S: u64 = 10;

/// The coordinator as the loop sees it.
pub(super) struct CoordinatorTask {
    /// Resolves to the end of the run.
    pub end: JoinHandle<anyhow::Result<RunEnd>>,
    /// What it tells.
    pub events: mpsc::Receiver<Event>,
    /// Where its orders go.
    pub control: mpsc::Sender<Control>,
}

/// Bounds of the loop.
pub(super) struct SupervisorLimits {
    /// Bounds of restarting.
    pub restart: RestartLimits,
    /// After a request to stop, longest time for the step, the save and the way out.
    pub stop_timeout: Duration,
}

/// How far a stop has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// Nobody asked.
    No,
    /// The workers were asked.
    Asked {
        /// When they are killed.
        deadline: Instant,
        /// Whether another signal kills them before.
        firm: bool,
    },
    /// The workers were killed.
    Killed,
}

/// The state of the loop.
pub(super) struct Supervisor<'a> {
    crew: Crew,
    limits: SupervisorLimits,
    /// Processes that are still to be killed or frozen on purpose.
    drills: Vec<Drill>,
    reporters: &'a mut Reporters,
    signals: &'a Signals,
    stop: Stop,
}

impl<'a> Supervisor<'a> {
    /// A loop for a crew; processes that were found are in it already.
    pub(super) fn new(crew: Crew, limits: SupervisorLimits, reporters: &'a mut Reporters, signals: &'a Signals) -> Self {
        Self { crew, limits, drills: Vec::new(), reporters, signals, stop: Stop::No }
    }

    /// Kills or freezes processes on purpose.
    pub(super) fn practise(&mut self, drills: &[Drill]) {
        self.drills.extend(drills.iter().filter(|drill| !drill.kind.is_in_worker()));
    }

    /// Starts the missing workers and runs until the coordinator ends; no worker is left when it returns.
    pub(super) async fn run(
        &mut self,
        mut coordinator: CoordinatorTask,
        mut orders: mpsc::Receiver<DashboardOrder>,
    ) -> anyhow::Result<RunEnd> {
        let outcome = self.drive(&mut coordinator, &mut orders).await;
        coordinator.end.abort();
        let patience = if outcome.is_ok() { Duration::from_secs(LEAVE_TIMEOUT_S) } else { Duration::ZERO };
        self.crew.end(patience).await;
        outcome
    }

    async fn drive(&mut self, coordinator: &mut CoordinatorTask, orders: &mut mpsc::Receiver<DashboardOrder>) -> anyhow::Result<RunEnd> {
        for worker in self.crew.vacant() {
            self.start(worker)?;
        }
        let mut tick = interval(Duration::from_millis(TICK_MS));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            // The order matters: a worker's last words reach the events before its process can end, so events come first.
            tokio::select! {
                biased;
                end = &mut coordinator.end => break end,
                _ = tick.tick() => self.look_around(&coordinator.control)?,
                Some(event) = coordinator.events.recv() => self.take_event(event)?,
                Some(exit) = self.crew.next_exit() => self.take_exit(&coordinator.control, &exit?)?,
                Some(order) = orders.recv() => self.take_order(&coordinator.control, order)?,
            }
        };
        let end = end.context("run the coordinator")?;
        while let Ok(event) = coordinator.events.try_recv() {
            self.take_event(event)?;
        }
        end
    }

    /// What the clock brings: signals, deadlines, replacements.
    fn look_around(&mut self, control: &mpsc::Sender<Control>) -> anyhow::Result<()> {
        let now = Instant::now();
        if let Some(signal) = self.signals.take(Request::EarlyStop) {
            self.ask_to_stop(control, signal, false, now)?;
        }
        if let Some(signal) = self.signals.take(Request::Stop) {
            self.ask_to_stop(control, signal, true, now)?;
        }
        if let Some(signal) = self.signals.take(Request::Save) {
            self.ask_to_save(control, signal)?;
        }
        if let Stop::Asked { deadline, .. } = self.stop
            && now >= deadline
        {
            let seconds = self.limits.stop_timeout.as_secs();
            self.warn(format!("the workers did not leave within {seconds} s (`checkpoint.stop_timeout_s`) and are killed"))?;
            self.kill_all();
        }
        for replacement in self.crew.due(now) {
            let (worker, attempt, budget_left) = (replacement.worker, replacement.attempt, replacement.budget_left);
            self.reporters.write(Event::WorkerRestarted { worker, attempt, budget_left })?;
            self.start(worker)?;
        }
        Ok(())
    }

    fn take_order(&mut self, control: &mpsc::Sender<Control>, order: DashboardOrder) -> anyhow::Result<()> {
        match order {
            DashboardOrder::Stop { reason } => self.ask_to_stop(control, &reason, false, Instant::now()),
            DashboardOrder::Save { reason } => self.ask_to_save(control, &reason),
        }
    }

    /// Asks the workers to stop, or, when they were asked firmly before, kills them.
    fn ask_to_stop(&mut self, control: &mpsc::Sender<Control>, who: &str, firm: bool, now: Instant) -> anyhow::Result<()> {
        match self.stop {
            Stop::No => {
                let second = if firm { "; a second signal ends them at once" } else { "" };
                self.warn(format!("{who}: the workers finish their step, save and leave{second}"))?;
                self.stop = Stop::Asked { deadline: now + self.limits.stop_timeout, firm };
                self.crew.stop_replacing();
                tell(control, Control::Stop { reason: who.to_owned() })
            }
            Stop::Asked { deadline, firm: false } if firm => {
                self.warn(format!("{who}: the workers save and leave already; another signal ends them at once"))?;
                self.stop = Stop::Asked { deadline, firm };
                Ok(())
            }
            Stop::Asked { .. } | Stop::Killed if firm => {
                self.warn(format!("{who} again: the workers are killed; the last checkpoint stands"))?;
                self.kill_all();
                Ok(())
            }
            Stop::Asked { .. } | Stop::Killed => Ok(()),
        }
    }

    fn ask_to_save(&mut self, control: &mpsc::Sender<Control>, who: &str) -> anyhow::Result<()> {
        if self.stop == Stop::No {
            tell(control, Control::Save { reason: who.to_owned() })
        } else {
            self.warn(format!("{who}: the workers save and leave already"))
        }
    }

    fn take_event(&mut self, event: Event) -> anyhow::Result<()> {
        self.crew.hear(&event, Instant::now());
        let due: Vec<Drill> = match &event {
            Event::Step { report, .. } => self.drills.extract_if(.., |drill| report.step >= drill.step).collect(),
            _ => Vec::new(),
        };
        self.reporters.write(event)?;
        for Drill { kind, worker, step } in due {
            let (order, done) = match kind {
                DrillKind::Freeze => (ProcessOrder::Freeze, "frozen"),
                _ => (ProcessOrder::Kill, "killed"),
            };
            self.warn(format!("drill: worker {worker} is {done} at step {step}, as asked"))?;
            self.crew.order(worker, order);
        }
        Ok(())
    }

    fn take_exit(&mut self, control: &mpsc::Sender<Control>, exit: &Exit) -> anyhow::Result<()> {
        let worker = exit.worker;
        match &exit.dump {
            None => {}
            Some(Ok(path)) => self.reporters.write(Event::StackDumped { worker, path: path.display().to_string() })?,
            Some(Err(error)) => self.warn(format!("the stacks of worker {worker} could not be written: {error}"))?,
        }
        let Verdict { decision, reason, finished } = self.crew.take_exit(exit, self.stop != Stop::No, &self.limits.restart);
        if !finished {
            let (process_id, status, tail) = (exit.process_id, exit.status.clone(), exit.tail.clone());
            self.reporters.write(Event::WorkerExited { worker, process_id, status: status.clone(), tail })?;
            tell(control, Control::WorkerExited { worker, status })?;
        }
        match decision {
            ExitDecision::Expected if finished && exit.code.is_some_and(|code| code != 0) => {
                self.warn(format!("worker {worker} ended with {} after it had finished", exit.status))
            }
            ExitDecision::Expected | ExitDecision::Restart { .. } => Ok(()),
            ExitDecision::LeaveEmpty => {
                self.warn(format!("worker {worker} is not replaced: {reason}"))?;
                tell(control, Control::NoReplacement { worker })
            }
            ExitDecision::GiveUp { kind } => {
                let log_path = self.crew.command().paths.log(worker);
                tell(control, Control::GiveUp { failure: exit_failure(kind, reason, exit, &log_path) })
            }
        }
    }

    fn start(&mut self, worker: u32) -> anyhow::Result<()> {
        let process_id = self.crew.start(worker)?;
        self.reporters.write(Event::WorkerStarted { worker, process_id })
    }

    fn kill_all(&mut self) {
        self.stop = Stop::Killed;
        self.crew.kill_all();
    }

    fn warn(&mut self, message: String) -> anyhow::Result<()> {
        self.reporters.write(Event::Warning { message })
    }
}

/// Gives the coordinator an order. One that has already ended needs none; its end is taken next.
fn tell(control: &mpsc::Sender<Control>, order: Control) -> anyhow::Result<()> {
    match control.try_send(order) {
        Ok(()) | Err(TrySendError::Closed(_)) => Ok(()),
        Err(TrySendError::Full(order)) => anyhow::bail!("the coordinator does not take its orders; {order:?} is left"),
    }
}

/// The end of a run because of a worker process: who, how, and its last words.
pub(super) fn exit_failure(kind: FailureKind, reason: ExitReason, exit: &Exit, log_path: &Path) -> Failure {
    let Exit { worker, status, tail, .. } = exit;
    let last_words =
        if tail.is_empty() { "the worker wrote nothing".to_owned() } else { format!("its last lines are\n{}", indented(tail)) };
    let failure = Failure::new(kind, format!("worker {worker} ended with {status}: {reason}")).at(log_path.display()).because(last_words);
    if status == "SIGKILL" {
        failure.hint(
            "where nobody sent SIGKILL it was the kernel, for want of memory; lower `train.micro_batch_tokens` or start fewer workers",
        )
    } else {
        failure.hint("the log has the rest; `cloze resume` goes on from the last checkpoint")
    }
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_tells_who_how_and_why() {
        let (status, tail) = ("SIGKILL".to_owned(), "step 3\nloading".to_owned());
        let exit = Exit { worker: 1, process_id: 7, code: None, status, tail, dump: None };
        let reason = ExitReason::BudgetSpent { max_restarts: 2 };
        let failure = exit_failure(FailureKind::Run, reason, &exit, Path::new("/r/logs/worker-1.log"));
        let text = failure.to_string();
        for part in [
            "worker 1 ended with SIGKILL: all 2 replacements of this run are used (`cluster.max_restarts`)",
            "where: /r/logs/worker-1.log",
            "its last lines are\n    step 3\n    loading",
            "for want of memory",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
