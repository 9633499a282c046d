//! The loop that keeps a run alive: it starts and replaces worker processes, listens to signals, and hands every event to the
//! reporters.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cloze_cluster::{Control, Event, RunEnd};
use cloze_recipes::failure::{Failure, FailureKind};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tracing::Instrument as _;

use super::launch::PlannedFault;
use super::process::{Exit, WorkerCommand, WorkerProcess};
use super::restart::{ExitDecision, ExitFacts, ExitReason, RestartLimits, decide_exit};
use super::signals::Signals;
use crate::reporter::Reporters;
use crate::run_folder::storage;

/// Interval at which signals and due times are looked at.
const TICK_MS: u64 = 100;

/// After a request to stop, longest time for the step, the save and the way out.
const STOP_TIMEOUT_MINUTES: u64 = 2;

/// Time for a worker that lost its seat to leave by itself, and so to say why, before it is killed.
const LOST_WORKER_GRACE_S: u64 = 1;

/// After the run has ended, longest time for the workers to leave before they are killed.
const LEAVE_TIMEOUT_S: u64 = 10;

/// Longest wait for a killed process to be gone.
const KILL_TIMEOUT_S: u64 = 5;

/// The coordinator as the loop sees it.
pub(super) struct CoordinatorTask {
    /// Resolves to the end of the run.
    pub end: JoinHandle<anyhow::Result<RunEnd>>,
    /// What it tells.
    pub events: mpsc::Receiver<Event>,
    /// Where its orders go.
    pub control: mpsc::Sender<Control>,
}

/// One worker slot.
#[derive(Default)]
struct Slot {
    /// Ends the live process; `None` while there is none.
    kill: Option<Arc<Notify>>,
    /// The live process has joined the coordinator.
    joined: bool,
    /// The worker has said that it is done.
    finished: bool,
    /// When the live process is killed, having lost its seat.
    kill_at: Option<Instant>,
    /// When a replacement is started, and what the budget is then.
    restart_at: Option<(Instant, u32)>,
    restarts: u32,
}

impl Slot {
    fn kill_process(&self) {
        if let Some(kill) = &self.kill {
            kill.notify_one();
        }
    }
}

/// How far a stop has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// Nobody asked.
    No,
    /// The workers were asked, and are killed at this time.
    Asked(Instant),
    /// The workers were killed.
    Killed,
}

/// The state of the loop.
pub(super) struct Supervisor<'a> {
    command: WorkerCommand<'a>,
    limits: RestartLimits,
    fault: Option<PlannedFault>,
    reporters: &'a mut Reporters,
    slots: Vec<Slot>,
    processes: JoinSet<Exit>,
    restarts: u32,
    stop: Stop,
}

impl<'a> Supervisor<'a> {
    /// A loop without processes yet, with one slot per worker.
    pub(super) fn new(command: WorkerCommand<'a>, max_restarts: u32, fault: Option<PlannedFault>, reporters: &'a mut Reporters) -> Self {
        Self {
            command,
            limits: RestartLimits { max_restarts },
            fault,
            reporters,
            slots: (0..command.local_workers).map(|_| Slot::default()).collect(),
            processes: JoinSet::new(),
            restarts: 0,
            stop: Stop::No,
        }
    }

    /// Starts the workers and runs until the coordinator ends; no worker is left when it returns.
    pub(super) async fn run(&mut self, mut coordinator: CoordinatorTask, signals: &Signals) -> anyhow::Result<RunEnd> {
        let outcome = self.drive(&mut coordinator, signals).await;
        coordinator.end.abort();
        let patience = if outcome.is_ok() { Duration::from_secs(LEAVE_TIMEOUT_S) } else { Duration::ZERO };
        self.end_processes(patience).await;
        outcome
    }

    async fn drive(&mut self, coordinator: &mut CoordinatorTask, signals: &Signals) -> anyhow::Result<RunEnd> {
        for worker in 0..self.command.local_workers {
            self.start(worker)?;
        }
        let mut tick = interval(Duration::from_millis(TICK_MS));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            // The order matters: a worker's last words reach the events before its process can end, so events come first.
            tokio::select! {
                biased;
                end = &mut coordinator.end => break end,
                _ = tick.tick() => self.look_around(&coordinator.control, signals)?,
                Some(event) = coordinator.events.recv() => self.take_event(event)?,
                Some(exit) = self.processes.join_next() => {
                    self.take_exit(&coordinator.control, &exit.context("watch a worker process")?)?;
                }
            }
        };
        let end = end.context("run the coordinator")?;
        while let Ok(event) = coordinator.events.try_recv() {
            self.take_event(event)?;
        }
        end
    }

    /// What the clock brings: signals, deadlines, replacements.
    fn look_around(&mut self, control: &mpsc::Sender<Control>, signals: &Signals) -> anyhow::Result<()> {
        let now = Instant::now();
        if let Some(signal) = signals.take() {
            self.take_signal(control, signal, now)?;
        }
        if let Stop::Asked(deadline) = self.stop
            && now >= deadline
        {
            self.warn(format!("the workers did not leave within {STOP_TIMEOUT_MINUTES} minutes and are killed"))?;
            self.kill_all();
        }
        for worker in 0..self.command.local_workers {
            let slot = &mut self.slots[worker as usize];
            if slot.kill_at.is_some_and(|at| now >= at) {
                slot.kill_at = None;
                slot.kill_process();
            }
            if let Some((at, budget_left)) = slot.restart_at
                && now >= at
            {
                slot.restart_at = None;
                let attempt = slot.restarts;
                self.reporters.write(Event::WorkerRestarted { worker, attempt, budget_left })?;
                self.start(worker)?;
            }
        }
        Ok(())
    }

    fn take_signal(&mut self, control: &mpsc::Sender<Control>, signal: &str, now: Instant) -> anyhow::Result<()> {
        if self.stop == Stop::No {
            self.warn(format!("{signal}: the workers finish their step, save and leave; a second signal ends them at once"))?;
            self.stop = Stop::Asked(now + Duration::from_mins(STOP_TIMEOUT_MINUTES));
            for slot in &mut self.slots {
                slot.restart_at = None;
            }
            tell(control, Control::Stop { reason: signal.to_owned() })
        } else {
            self.warn(format!("{signal} again: the workers are killed; the last checkpoint stands"))?;
            self.kill_all();
            Ok(())
        }
    }

    fn take_event(&mut self, event: Event) -> anyhow::Result<()> {
        let mut fault = None;
        match &event {
            Event::WorkerJoined { worker, .. } => self.slots[*worker as usize].joined = true,
            Event::WorkerFinished { worker, .. } => self.slots[*worker as usize].finished = true,
            Event::WorkerLost { worker, .. } => {
                let slot = &mut self.slots[*worker as usize];
                // A process that has not joined is the replacement of the lost one.
                if std::mem::take(&mut slot.joined) && slot.kill.is_some() {
                    slot.kill_at = Some(Instant::now() + Duration::from_secs(LOST_WORKER_GRACE_S));
                }
            }
            Event::Step { report, .. } => fault = self.fault.take_if(|fault| report.step >= fault.step),
            _ => {}
        }
        self.reporters.write(event)?;
        if let Some(PlannedFault { worker, step }) = fault {
            self.warn(format!("drill: worker {worker} is killed at step {step}, as asked"))?;
            self.slots[worker as usize].kill_process();
        }
        Ok(())
    }

    fn take_exit(&mut self, control: &mpsc::Sender<Control>, exit: &Exit) -> anyhow::Result<()> {
        let worker = exit.worker;
        if let Some(error) = &exit.log_error {
            return Err(storage("write a worker's log", &self.command.run.log_path(worker), error).into());
        }
        let slot = &mut self.slots[worker as usize];
        (slot.kill, slot.kill_at, slot.joined) = (None, None, false);
        let facts = ExitFacts {
            code: exit.code,
            finished: slot.finished,
            stopping: self.stop != Stop::No,
            restarts: self.restarts,
            slot_restarts: slot.restarts,
        };
        let (decision, reason) = decide_exit(&facts, &self.limits);
        tracing::debug!(worker, status = exit.status, %reason, ?decision, "a worker process ended");
        if !facts.finished {
            tell(control, Control::WorkerExited { worker, status: exit.status.clone() })?;
        }
        match decision {
            ExitDecision::Expected if facts.finished && exit.code != Some(0) => {
                self.warn(format!("worker {worker} ended with {} after it had finished", exit.status))
            }
            ExitDecision::Expected => Ok(()),
            ExitDecision::Restart { after, budget_left } => {
                slot.restarts += 1;
                slot.restart_at = Some((Instant::now() + after, budget_left));
                self.restarts += 1;
                Ok(())
            }
            ExitDecision::GiveUp { kind } => {
                let log_path = self.command.run.log_path(worker);
                tell(control, Control::GiveUp { failure: exit_failure(kind, reason, exit, &log_path) })
            }
        }
    }

    fn start(&mut self, worker: u32) -> anyhow::Result<()> {
        let process = WorkerProcess::start(self.command, worker)?;
        let process_id = process.process_id();
        self.slots[worker as usize].kill = Some(process.kill_switch());
        let span = tracing::info_span!("worker process", worker, process_id);
        self.processes.spawn(process.wait().instrument(span));
        self.reporters.write(Event::WorkerStarted { worker, process_id })
    }

    fn kill_all(&mut self) {
        self.stop = Stop::Killed;
        for slot in &mut self.slots {
            slot.restart_at = None;
            slot.kill_process();
        }
    }

    /// Waits for the processes to leave, then kills what is left.
    async fn end_processes(&mut self, patience: Duration) {
        let processes = &mut self.processes;
        let leave = async { while processes.join_next().await.is_some() {} };
        if timeout(patience, leave).await.is_ok() {
            return;
        }
        self.kill_all();
        let processes = &mut self.processes;
        let die = async { while processes.join_next().await.is_some() {} };
        if timeout(Duration::from_secs(KILL_TIMEOUT_S), die).await.is_err() {
            // Dropping the tasks kills once more; a process that survives that hangs in the kernel.
            tracing::error!(timeout_s = KILL_TIMEOUT_S, "some worker processes do not end");
        }
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
fn exit_failure(kind: FailureKind, reason: ExitReason, exit: &Exit, log_path: &Path) -> Failure {
    let Exit { worker, status, tail, .. } = exit;
    let last_words =
        if tail.is_empty() { "the worker wrote nothing".to_owned() } else { format!("its last lines are\n{}", indented(tail)) };
    let failure = Failure::new(kind, format!("worker {worker} (rank {worker}) ended with {status}: {reason}"))
        .at(log_path.display())
        .because(last_words);
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
        let exit = Exit { worker: 1, code: None, status: "SIGKILL".to_owned(), tail: "step 3\nloading".to_owned(), log_error: None };
        let reason = ExitReason::BudgetSpent { max_restarts: 2 };
        let failure = exit_failure(FailureKind::Run, reason, &exit, Path::new("/r/logs/worker-1.log"));
        let text = failure.to_string();
        for part in [
            "worker 1 (rank 1) ended with SIGKILL: all 2 replacements of this run are used (`cluster.max_restarts`)",
            "where: /r/logs/worker-1.log",
            "its last lines are\n    step 3\n    loading",
            "for want of memory",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
