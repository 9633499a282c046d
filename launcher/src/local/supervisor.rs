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
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::crew::{Crew, LEAVE_TIMEOUT_S, Verdict};
use super::drill::{Drill, DrillKind};
use super::process::{Exit, ProcessOrder};
use super::restart::{ExitDecision, ExitReason, RestartLimits};
use super::signals::{Request, Signals};
use crate::dashboard::DashboardOrder;
use crate::hosts::{HostCrew, HostDecision, HostEvent};
use crate::reporter::Reporters;

/// Interval at which signals and due times are looked at.
const TICK_MS: u64 = 100;

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
    /// `cloze join` on other hosts, where this program starts it.
    hosts: Option<&'a mut HostCrew>,
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
        Self { crew, hosts: None, limits, drills: Vec::new(), reporters, signals, stop: Stop::No }
    }

    /// Keeps `cloze join` alive on other hosts too.
    pub(super) fn reach_out(&mut self, hosts: &'a mut HostCrew) {
        self.hosts = Some(hosts);
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
        let told = self.dismiss(patience).await;
        outcome.and_then(|end| told.map(|()| end))
    }

    /// Waits for the workers to leave. Whoever has asked for a stop and signals once more, or signals twice now, waits no longer.
    async fn dismiss(&mut self, patience: Duration) -> anyhow::Result<()> {
        let has_asked = matches!(self.stop, Stop::Asked { firm: true, .. } | Stop::Killed);
        let signals = self.signals;
        let signal = tokio::select! {
            biased;
            () = self.crew.end(patience) => return Ok(()),
            signal = last_signal(signals, if has_asked { 1 } else { 2 }) => signal,
        };
        self.crew.end(Duration::ZERO).await;
        self.warn(format!("{signal} again: the workers that had not left yet were killed"))
    }

    async fn drive(&mut self, coordinator: &mut CoordinatorTask, orders: &mut mpsc::Receiver<DashboardOrder>) -> anyhow::Result<RunEnd> {
        for worker in self.crew.vacant() {
            self.start(worker)?;
        }
        if let Some(hosts) = &mut self.hosts {
            hosts.start(&self.crew.command().paths)?;
        }
        let mut tick = interval(Duration::from_millis(TICK_MS));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            // The order matters: a worker's last words reach the events before its process can end, so events come first.
            tokio::select! {
                biased;
                end = &mut coordinator.end => break end,
                _ = tick.tick() => {
                    // Before somebody is judged who was not heard.
                    while let Ok(event) = coordinator.events.try_recv() {
                        self.take_event(event)?;
                    }
                    self.look_around(&coordinator.control)?;
                }
                Some(event) = coordinator.events.recv() => self.take_event(event)?,
                Some(exit) = self.crew.next_exit() => self.take_exit(&coordinator.control, &exit?)?,
                Some(order) = orders.recv() => self.take_order(&coordinator.control, order)?,
                Some(event) = next_of(&mut self.hosts) => self.hear_host(&coordinator.control, event)?,
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
            self.kill_all(control)?;
        }
        let late = self.crew.hanging(now);
        self.crew.end_hanging(&late);
        for worker in late {
            let seconds = self.crew.command().join_within.as_secs();
            self.warn(format!("worker {worker} has not joined within {seconds} s of its start and is killed"))?;
        }
        for replacement in self.crew.due(now) {
            let (worker, attempt, budget_left) = (replacement.worker, replacement.attempt, replacement.budget_left);
            self.reporters.write(Event::WorkerRestarted { worker, attempt, budget_left })?;
            self.start(worker)?;
        }
        if let Some(hosts) = &mut self.hosts {
            for host in hosts.restart_due(now, &self.crew.command().paths)? {
                self.reporters.write(Event::Warning { message: format!("host {host}: `cloze join` is started again") })?;
            }
        }
        Ok(())
    }

    /// What another host says, and what follows when its process ends.
    fn hear_host(&mut self, control: &mpsc::Sender<Control>, event: HostEvent) -> anyhow::Result<()> {
        let Some(hosts) = &mut self.hosts else { return Ok(()) };
        let (place, code, status) = match event {
            HostEvent::Line { place, text } => {
                let line = hosts.take_line(place, &text);
                return self.reporters.say(&line);
            }
            HostEvent::Ended { place, code, status } => (place, code, status),
        };
        let limits = (self.limits.restart.max_restarts, self.limits.restart.min_workers);
        let (decision, reason) = hosts.take_end(place, code, limits, self.crew.command().slots);
        match decision {
            HostDecision::Expected => Ok(()),
            HostDecision::Restart { .. } => {
                let message = format!("host {}: {reason} ({status})", hosts.name(place));
                self.reporters.write(Event::Warning { message })
            }
            HostDecision::LeaveEmpty => {
                let message = format!("host {} is used no more: {reason} ({status})", hosts.name(place));
                let slots = hosts.slots(place);
                self.reporters.write(Event::Warning { message })?;
                slots.into_iter().try_for_each(|worker| tell(control, Control::NoReplacement { worker }))
            }
            HostDecision::GiveUp { kind } => tell(control, Control::GiveUp { failure: hosts.give_up(place, kind, reason, &status) }),
        }
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
                if let Some(hosts) = &mut self.hosts {
                    hosts.stop_restarting();
                }
                tell(control, Control::Stop { reason: who.to_owned() })
            }
            Stop::Asked { deadline, firm: false } if firm => {
                self.warn(format!("{who}: the workers save and leave already; another signal ends them at once"))?;
                self.stop = Stop::Asked { deadline, firm };
                Ok(())
            }
            Stop::Asked { .. } | Stop::Killed if firm => {
                self.warn(format!("{who} again: the workers are killed; the last checkpoint stands"))?;
                self.kill_all(control)
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
        let step = match &event {
            Event::Step { report, .. } => report.step,
            Event::Progress { step, .. } => *step,
            _ => 0,
        };
        let due: Vec<Drill> = self.drills.extract_if(.., |drill| step >= drill.step && step > 0).collect();
        self.reporters.write(event)?;
        for Drill { kind, worker, step: wanted } in due {
            let (order, done) = match kind {
                DrillKind::Freeze => (ProcessOrder::Freeze, "frozen"),
                _ => (ProcessOrder::Kill, "killed"),
            };
            let late = if step > wanted { format!("; step {wanted} was asked for, and not every step is told") } else { String::new() };
            self.warn(format!("drill: worker {worker} is {done} at step {step}{late}"))?;
            self.crew.order(worker, order);
        }
        Ok(())
    }

    fn take_exit(&mut self, control: &mpsc::Sender<Control>, exit: &Exit) -> anyhow::Result<()> {
        let worker = exit.worker;
        match &exit.dump {
            None => {}
            Some(Ok(path)) => {
                let (process_id, path) = (exit.process_id, path.display().to_string());
                self.reporters.write(Event::StackDumped { worker, process_id, path })?;
            }
            Some(Err(error)) => self.warn(format!("the stacks of worker {worker} could not be written: {error}"))?,
        }
        let Verdict { decision, reason, finished } = self.crew.take_exit(exit, self.stop != Stop::No, &self.limits.restart);
        if !finished {
            let (process_id, status, tail) = (exit.process_id, exit.status.clone(), exit.tail.clone());
            self.reporters.write(Event::WorkerExited { worker, process_id, status: status.clone(), tail })?;
            tell(control, Control::WorkerExited { worker, process_id, status })?;
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

    /// Kills the workers of this program. Those of other hosts are out of its reach, so the coordinator ends the run for them.
    fn kill_all(&mut self, control: &mpsc::Sender<Control>) -> anyhow::Result<()> {
        self.stop = Stop::Killed;
        self.crew.kill_all();
        let command = self.crew.command();
        if command.local_workers == command.slots {
            return Ok(());
        }
        let failure = Failure::new(FailureKind::Interrupted, "stopped at once; the last checkpoint stands");
        tell(control, Control::GiveUp { failure: failure.hint("`cloze resume` goes on from it") })
    }

    fn warn(&mut self, message: String) -> anyhow::Result<()> {
        self.reporters.write(Event::Warning { message })
    }
}

/// The next thing that another host has to tell; never, where there is none.
async fn next_of(hosts: &mut Option<&mut HostCrew>) -> Option<HostEvent> {
    match hosts {
        Some(hosts) => hosts.next().await,
        None => std::future::pending().await,
    }
}

/// Waits for so many signals that ask for a stop; returns the name of the last.
pub(super) async fn last_signal(signals: &Signals, num_signals: u32) -> &'static str {
    let mut num_seen = 0;
    loop {
        sleep(Duration::from_millis(TICK_MS)).await;
        if let Some(signal) = signals.take(Request::Stop) {
            num_seen += 1;
            if num_seen == num_signals {
                return signal;
            }
        }
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
    use cloze_cluster::{Recorded, Secret};

    use super::*;
    use crate::local::contact::Contact;
    use crate::local::process::WorkerCommand;
    use crate::local::record::living;
    use crate::reporter::TerminalStyle;
    use crate::run_folder::{NewRun, RunFolder};
    use crate::sample::{recipe, script};

    const PATIENCE: Duration = Duration::from_mins(1);

    fn folder(root: &Path) -> RunFolder {
        let recipe = recipe();
        let (data_fingerprint, worker_build) = (String::new(), String::new());
        RunFolder::create(root, &NewRun { name: "run", recipe: &recipe, data_fingerprint, command_line: Vec::new(), worker_build }).unwrap()
    }

    fn reporters(run: &RunFolder) -> Reporters {
        let terminal = crate::reporter::terminal(Box::new(std::io::sink()), TerminalStyle::default(), 1);
        Reporters::open(run, terminal).unwrap()
    }

    /// A crew of a run with two slots whose workers stand still.
    fn crew(run: &RunFolder, local_workers: u32) -> Crew {
        let (binary, paths) = (script(run.path(), "kill -STOP $$"), run.paths().clone());
        let contact = Contact { coordinator: "127.0.0.1:1".to_owned(), token: Secret::new("token"), key: None };
        let join_within = PATIENCE;
        Crew::new(
            WorkerCommand { binary, paths, contact, slots: 2, local_workers, recipe_hash: "l".to_owned(), by_join: false, join_within },
            0..local_workers,
        )
    }

    fn limits() -> SupervisorLimits {
        SupervisorLimits { restart: RestartLimits { max_restarts: 0, min_workers: None }, stop_timeout: PATIENCE }
    }

    #[test]
    fn a_second_signal_and_the_deadline_end_a_run_whose_workers_are_elsewhere() {
        let signals = Signals::listen().unwrap();
        for (local_workers, by_deadline, is_given_up) in [(0, false, true), (1, false, true), (1, true, true), (2, false, false)] {
            let root = tempfile::tempdir().unwrap();
            let run = folder(root.path());
            let mut reporters = reporters(&run);
            let mut supervisor = Supervisor::new(crew(&run, local_workers), limits(), &mut reporters, &signals);
            let (control, mut orders) = mpsc::channel(8);
            let now = Instant::now();
            supervisor.ask_to_stop(&control, "SIGINT", true, now).unwrap();
            assert_eq!(orders.try_recv().unwrap(), Control::Stop { reason: "SIGINT".to_owned() });
            if by_deadline {
                supervisor.stop = Stop::Asked { deadline: now, firm: true };
                supervisor.look_around(&control).unwrap();
            } else {
                supervisor.ask_to_stop(&control, "SIGINT", true, now).unwrap();
            }
            assert_eq!(supervisor.stop, Stop::Killed);
            match orders.try_recv() {
                Ok(Control::GiveUp { failure }) if is_given_up => assert_eq!(failure.kind.exit_code(), 130),
                Err(_) if !is_given_up => {}
                other => panic!("{local_workers} {by_deadline}: {other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_second_signal_ends_the_last_wait() {
        let root = tempfile::tempdir().unwrap();
        let run = folder(root.path());
        let mut reporters = reporters(&run);
        let signals = Signals::listen().unwrap();
        let mut supervisor = Supervisor::new(crew(&run, 1), limits(), &mut reporters, &signals);
        supervisor.start(0).unwrap();
        supervisor.stop = Stop::Asked { deadline: Instant::now() + PATIENCE, firm: true };
        signals.raise(Request::Stop);
        supervisor.dismiss(PATIENCE).await.unwrap();
        assert!(living(run.paths()).unwrap().is_empty());
        let text = std::fs::read_to_string(run.paths().events()).unwrap();
        let last = serde_json::from_str::<Recorded>(text.lines().last().unwrap()).unwrap().event;
        assert!(matches!(&last, Event::Warning { message } if message.contains(" again: ")), "{last:?}");
    }

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
