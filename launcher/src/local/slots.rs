//! `cloze join`: the workers of some slots of a run whose controller is elsewhere, kept alive until the run ends.
//!
//! What the coordinator says of the workers is read from the run's event log, which all hosts see.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use cloze_cluster::host::host_name;
use cloze_cluster::protocol::PROTOCOL_VERSION;
use cloze_cluster::{Event, ExitReport, PinnedKey, Secret, report_exit};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::contact::{Contact, StatedContact, reach};
use super::crew::{Crew, LEAVE_TIMEOUT_S, Replacement};
use super::event_tail::EventTail;
use super::process::{Exit, WorkerCommand};
use super::record::{ProcessRecord, all, living};
use super::restart::{ExitDecision, RestartLimits};
use super::signals::{Request, Signals};
use super::supervisor::exit_failure;
use crate::run_folder::{ControlFile, RunPaths, storage};

use arrival::{Found, RETRY_MS, find_coordinator, keep_free_slots, take_slots};

mod arrival;

/// Interval at which signals, events and due times are looked at.
const TICK_MS: u64 = 250;

/// Ends of processes that the coordinator is told of at the same time.
const MAX_REPORTS: usize = 16;

/// Most characters of a log's end that the coordinator is told.
const MAX_REPORTED_CHARACTERS: usize = 2000;

/// Interval at which it is looked whether another controller has the run, which knows nothing of these workers.
const SUCCESSOR_LOOK_S: u64 = 1;

/// Exit code of a worker that was asked to stop.
const EXIT_CODE_STOPPED: i32 = 130;

/// What `cloze join` needs.
pub struct SlotsOptions {
    /// The run's folder, on a disk that the controller shares.
    pub paths: RunPaths,
    /// The slots to fill.
    pub slots: Vec<u32>,
    /// `host:port` of the coordinator; `None` reads control.json.
    pub coordinator: Option<String>,
    /// The run's token; `None` reads control.json.
    pub token: Option<Secret>,
    /// The coordinator's key, for a run with TLS; `None` reads control.json.
    pub coordinator_key: Option<PinnedKey>,
    /// Longest wait for the controller at the start.
    pub join_timeout: Duration,
    /// The worker binary.
    pub worker_binary: PathBuf,
    /// Where progress is shown.
    pub output: Box<dyn Write + Send>,
}

/// Fills slots until the run ends: starts their workers, and replaces them within `cluster.max_restarts`. Blocks.
///
/// A first signal lets the workers leave when their controller says so, and replaces none; a second one, or
/// `checkpoint.stop_timeout_s`, kills them. Where another controller has the run, to which they cannot come back, they are killed and
/// started anew. Fails with kind `Environment` when the coordinator cannot be reached, with the run's own failure when the run failed, and
/// with kind `Run` when a worker ended that may not be replaced.
pub fn serve_slots(options: SlotsOptions) -> anyhow::Result<()> {
    let signals = Signals::listen().context("listen to signals")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the launcher's runtime")?;
    runtime.block_on(Box::pin(async {
        let mut options = options;
        let Some(_locks) = take_slots(&mut options, &signals).await? else { return Ok(()) };
        loop {
            let mut outpost = Outpost::open(&mut options, &signals).await?;
            let outcome = outpost.drive().await;
            outpost.crew.end(Duration::ZERO).await;
            if outcome? == Service::Done || !keep_free_slots(&mut options)? {
                return Ok(());
            }
        }
    }))
}

/// How the service for a controller ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    /// Nothing is left to do.
    Done,
    /// Another controller has the run, to which these workers cannot come back.
    Superseded,
}

/// The state of the loop.
struct Outpost<'a> {
    crew: Crew,
    tail: EventTail,
    stated: StatedContact,
    recipe: Recipe,
    limits: RestartLimits,
    signals: &'a Signals,
    output: &'a mut (dyn Write + Send),
    /// When it was last looked who has the run.
    looked: Instant,
    /// Another controller has it.
    is_superseded: bool,
    /// Nothing is replaced any more.
    leaving: bool,
    /// When what lives then is killed.
    leave_by: Option<Instant>,
    /// Since when the coordinator cannot be reached.
    away_since: Option<Instant>,
    /// Since when the event log cannot be read.
    unread_since: Option<Instant>,
    /// Why this ends with a failure.
    failure: Option<Failure>,
    /// What the coordinator is being told of processes that have ended.
    reports: JoinSet<()>,
}

impl<'a> Outpost<'a> {
    /// Waits for the coordinator and starts the workers.
    async fn open(options: &'a mut SlotsOptions, signals: &'a Signals) -> anyhow::Result<Self> {
        let Found { recipe, stated, contact } = find_coordinator(options, signals).await?;
        let (paths, slots) = (options.paths.clone(), options.slots.clone());
        let mut tail = EventTail::new(paths.events());
        let workers = slots_of_run(&mut tail, &paths)?;
        if let Some(slot) = slots.iter().find(|&&slot| slot >= workers) {
            let expected = format!("slots below {workers}");
            return Err(Failure::new(FailureKind::Recipe, "the run has no such slot").expected(expected).found(slot).into());
        }
        let local_workers = slots.len() as u32;
        let binary = options.worker_binary.clone();
        let join_within = Duration::from_secs(recipe.cluster.hang.init_s);
        let command = WorkerCommand {
            binary,
            paths,
            contact,
            slots: workers,
            local_workers,
            recipe_hash: recipe.full_hash(),
            by_join: true,
            join_within,
        };
        let limits = RestartLimits { max_restarts: recipe.cluster.max_restarts, min_workers: recipe.cluster.min_workers };
        let crew = Crew::new(command, slots.iter().copied());
        let mut outpost = Self {
            crew,
            tail,
            stated,
            recipe,
            limits,
            signals,
            output: &mut *options.output,
            looked: Instant::now(),
            is_superseded: false,
            leaving: false,
            leave_by: None,
            away_since: None,
            unread_since: None,
            failure: None,
            reports: JoinSet::new(),
        };
        outpost.fill(&slots)?;
        Ok(outpost)
    }

    /// Takes over what an earlier `cloze join` left, and starts the rest. A slot that the controller fills on this host is refused.
    fn fill(&mut self, slots: &[u32]) -> anyhow::Result<()> {
        for record in living(&self.crew.command().paths)? {
            if !slots.contains(&record.worker) {
                continue;
            }
            if !record.by_join {
                return Err(taken(&record).into());
            }
            self.say(&format!("worker {} lives already, as process {}", record.worker, record.process_id))?;
            self.crew.find(record, None);
        }
        for worker in self.crew.vacant() {
            self.start(worker)?;
        }
        Ok(())
    }

    async fn drive(&mut self) -> anyhow::Result<Service> {
        let mut tick = interval(Duration::from_millis(TICK_MS));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !self.crew.is_done() {
            tokio::select! {
                biased;
                _ = tick.tick() => {
                    if self.looked.elapsed() >= Duration::from_secs(SUCCESSOR_LOOK_S) {
                        self.look_for_successor()?;
                    }
                    if !self.is_superseded {
                        self.look_around().await?;
                    }
                }
                Some(exit) = self.crew.next_exit() => {
                    // A worker may have ended because its controller's successor does not know it.
                    self.look_for_successor()?;
                    if !self.is_superseded {
                        self.take_exit(&exit?)?;
                    }
                }
            }
            if self.is_superseded {
                return Ok(Service::Superseded);
            }
        }
        match self.failure.take() {
            None => Ok(Service::Done),
            Some(failure) => Err(failure.into()),
        }
    }

    /// Looks whether another controller than that of these workers has the run: one that takes them over keeps their token. Whoever was
    /// told a token or a key cannot follow.
    fn look_for_successor(&mut self) -> anyhow::Result<()> {
        self.looked = Instant::now();
        if !self.can_follow() {
            return Ok(());
        }
        let control = ControlFile::read(&self.crew.command().paths).unwrap_or_else(|error| {
            tracing::debug!(error = format!("{error:#}"), "control.json cannot be read; it is looked at again");
            None
        });
        if let Some(control) = control.filter(|control| control.token != self.crew.command().contact.token) {
            self.is_superseded = true;
            self.say(&format!(
                "another controller has the run, process {}: it does not know the workers of the last one, which are killed and started anew",
                control.process_id
            ))?;
        }
        Ok(())
    }

    fn can_follow(&self) -> bool {
        !self.leaving && self.stated.token.is_none() && self.stated.key.is_none()
    }

    /// What the clock brings: signals, the controller's events, deadlines, replacements.
    async fn look_around(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        for request in [Request::EarlyStop, Request::Stop] {
            if let Some(signal) = self.signals.take(request) {
                self.take_signal(signal, now)?;
            }
        }
        if let Some(signal) = self.signals.take(Request::Save) {
            self.say(&format!("{signal}: the controller saves, not `cloze join`"))?;
        }
        self.hear_events(now)?;
        if self.leave_by.is_some_and(|at| now >= at) {
            self.leave_by = None;
            self.say("the workers did not leave in time and are killed")?;
            self.crew.kill_all();
        }
        self.end_hanging(now).await?;
        for replacement in self.crew.due(now) {
            self.replace(replacement, now).await?;
        }
        Ok(())
    }

    /// Ends the workers that have not joined in time. Where the coordinator cannot be reached, or its events not be read, that is not their fault.
    async fn end_hanging(&mut self, now: Instant) -> anyhow::Result<()> {
        let late = self.crew.hanging(now);
        if late.is_empty() {
            return Ok(());
        }
        if self.unread_since.is_some() || reach(&self.crew.command().paths, &self.stated).await.is_err() {
            self.crew.grant(&late, now);
            return Ok(());
        }
        self.crew.end_hanging(&late);
        let seconds = self.recipe.cluster.hang.init_s;
        late.iter()
            .try_for_each(|worker| self.say(&format!("worker {worker} has not joined within {seconds} s of its start and is killed")))
    }

    fn take_signal(&mut self, signal: &str, now: Instant) -> anyhow::Result<()> {
        if self.leaving {
            self.say(&format!("{signal} again: the workers are killed"))?;
            self.crew.kill_all();
        } else {
            self.say(&format!("{signal}: the workers leave when their controller says so; a second signal ends them at once"))?;
            self.leave(now, Duration::from_secs(self.recipe.checkpoint.stop_timeout_s));
        }
        Ok(())
    }

    fn hear_events(&mut self, now: Instant) -> anyhow::Result<()> {
        let events = match self.tail.read() {
            Ok(events) => events,
            Err(error) => return self.miss_events(now, &error),
        };
        self.unread_since = None;
        for event in events {
            self.crew.hear(&event, now);
            match event {
                Event::RunFinished { .. } | Event::RunStopped { .. } => self.leave(now, Duration::from_secs(LEAVE_TIMEOUT_S)),
                Event::RunFailed { failure } => {
                    self.failure = Some(failure);
                    self.leave(now, Duration::from_secs(LEAVE_TIMEOUT_S));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The log is on a disk of another host, which may be away for a while; it has as long to come back as the coordinator.
    fn miss_events(&mut self, now: Instant, error: &io::Error) -> anyhow::Result<()> {
        let path = self.crew.command().paths.events();
        let since = *self.unread_since.get_or_insert_with(|| {
            tracing::warn!(path = %path.display(), %error, "the event log cannot be read; it is tried again");
            now
        });
        if now.duration_since(since) > Duration::from_secs(self.recipe.cluster.coordinator_grace_s) {
            return Err(storage("read the event log", &path, error).into());
        }
        Ok(())
    }

    /// Replaces nobody any more, and kills after a while.
    fn leave(&mut self, now: Instant, patience: Duration) {
        self.crew.stop_replacing();
        self.leaving = true;
        self.leave_by = Some(now + patience);
    }

    /// Starts a replacement as soon as the coordinator can be reached. One that is away has as long to come back as the workers grant it.
    async fn replace(&mut self, replacement: Replacement, now: Instant) -> anyhow::Result<()> {
        let (worker, attempt, budget_left) = (replacement.worker, replacement.attempt, replacement.budget_left);
        match reach(&self.crew.command().paths, &self.stated).await {
            // All workers are started anew then, and this one with them.
            Ok(contact) if self.can_follow() && contact.token != self.crew.command().contact.token => {
                self.crew.postpone(replacement, now + Duration::from_millis(RETRY_MS));
                self.look_for_successor()
            }
            Ok(contact) => {
                self.away_since = None;
                self.crew.redirect(contact);
                self.say(&format!("worker {worker} restarted (attempt {attempt}, {budget_left} left for these slots)"))?;
                self.start(worker)
            }
            Err(error) => {
                let since = *self.away_since.get_or_insert(now);
                if now.duration_since(since) > Duration::from_secs(self.recipe.cluster.coordinator_grace_s) {
                    return Err(error);
                }
                self.crew.postpone(replacement, now + Duration::from_millis(RETRY_MS));
                Ok(())
            }
        }
    }

    fn take_exit(&mut self, exit: &Exit) -> anyhow::Result<()> {
        let worker = exit.worker;
        let is_done = self.leaving || matches!(exit.code, Some(0 | EXIT_CODE_STOPPED));
        self.say(&format!("worker {worker} (process {}) ended with {}", exit.process_id, exit.status))?;
        match &exit.dump {
            None => {}
            Some(Ok(path)) => self.say(&format!("stacks of worker {worker} written to {}", path.display()))?,
            Some(Err(error)) => self.say(&format!("the stacks of worker {worker} could not be written: {error}"))?,
        }
        let verdict = self.crew.take_exit(exit, is_done, &self.limits);
        let log_path = self.crew.command().paths.log(worker);
        // Whoever was refused had no seat.
        if !is_done && !verdict.finished && exit.code != Some(FailureKind::Mismatch.exit_code().into()) {
            self.report(exit, matches!(verdict.decision, ExitDecision::Restart { .. }));
        }
        match verdict.decision {
            ExitDecision::Expected | ExitDecision::Restart { .. } => Ok(()),
            ExitDecision::LeaveEmpty => {
                // The other slots go on; that this one did not is told at the end.
                if self.failure.is_none() {
                    self.failure = Some(exit_failure(FailureKind::Run, verdict.reason, exit, &log_path));
                }
                self.say(&format!("worker {worker} is not replaced: {}", verdict.reason))
            }
            ExitDecision::GiveUp { kind } => {
                let failure = exit_failure(kind, verdict.reason, exit, &log_path);
                Err(failure
                    .hint("the log has the rest; the run waits for these slots, so `cloze join` them again once it is mended")
                    .into())
            }
        }
    }

    /// Tells the coordinator how a process ended, which it cannot see itself. It notices the loss also where it is not told.
    fn report(&mut self, exit: &Exit, is_replaced: bool) {
        while self.reports.try_join_next().is_some() {}
        if self.reports.len() >= MAX_REPORTS {
            tracing::info!(worker = exit.worker, "the coordinator is not told how a worker ended: it has not answered for others yet");
            return;
        }
        let Contact { coordinator, token, key } = self.crew.command().contact.clone();
        let report = ExitReport {
            protocol_version: PROTOCOL_VERSION,
            token,
            worker: exit.worker,
            host: host_name(),
            process_id: exit.process_id,
            status: exit.status.clone(),
            tail: last_characters(&exit.tail, MAX_REPORTED_CHARACTERS),
            dump: exit.dump.as_ref().and_then(|dump| dump.as_ref().ok()).map(|path| path.display().to_string()),
            is_replaced,
        };
        let worker = exit.worker;
        self.reports.spawn_blocking(move || {
            if let Err(error) = report_exit(&coordinator, key.as_ref(), report) {
                tracing::info!(worker, error = format!("{error:#}"), "the coordinator was not told how a worker ended");
            }
        });
    }

    fn start(&mut self, worker: u32) -> anyhow::Result<()> {
        let process_id = self.crew.start(worker)?;
        self.say(&format!("worker {worker} started as process {process_id}"))
    }

    fn say(&mut self, line: &str) -> anyhow::Result<()> {
        match writeln!(self.output, "{line}").and_then(|()| self.output.flush()) {
            // Somebody closed the other end; the workers matter more than their story.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result.context("write progress to standard error"),
        }
    }
}

/// The end of a text.
fn last_characters(text: &str, count: usize) -> String {
    let surplus = text.chars().count().saturating_sub(count);
    text.chars().skip(surplus).collect()
}

/// Number of slots of a run, as its newest start says; `None` before the first one.
pub fn last_workers(paths: &RunPaths) -> anyhow::Result<Option<u32>> {
    newest_start(&mut EventTail::new(paths.events()), paths)
}

/// Slots whose workers the controller of a run started itself, where it was killed and `cloze join` has filled others; else `None`.
pub fn last_local_workers(paths: &RunPaths) -> anyhow::Result<Option<u32>> {
    if !all(paths)?.iter().any(|record| record.by_join) {
        return Ok(None);
    }
    Ok(ControlFile::read(paths)?.and_then(|control| control.local_workers))
}

/// Number of slots of a run. Goes to the end of the event log.
fn slots_of_run(tail: &mut EventTail, paths: &RunPaths) -> anyhow::Result<u32> {
    newest_start(tail, paths)?.ok_or_else(|| {
        Failure::new(FailureKind::Input, "the event log names no start of the run")
            .at(paths.events().display())
            .hint("the run folder must be on a disk that this host shares with the controller")
            .into()
    })
}

fn newest_start(tail: &mut EventTail, paths: &RunPaths) -> anyhow::Result<Option<u32>> {
    let mut workers = None;
    loop {
        let events = tail.read().map_err(|error| storage("read the event log", &paths.events(), &error))?;
        if events.is_empty() {
            break;
        }
        for event in events {
            if let Event::RunStarted { workers: started, .. } = event {
                workers = Some(started);
            }
        }
    }
    Ok(workers)
}

/// A second process for the slot would take the first one's record away, and a later controller would not find it.
fn taken(record: &ProcessRecord) -> Failure {
    Failure::new(FailureKind::Recipe, "the slot is filled by the run's controller on this host")
        .expected("a slot that `cloze train --local` left free")
        .found(format!("slot {} with process {}", record.worker, record.process_id))
        .hint("name other slots with `--slots`")
}

#[cfg(test)]
mod tests;
