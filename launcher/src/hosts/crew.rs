//! One `cloze join` on each other host of a run: started through the host's prefix, its words shown under the host's name, started again
//! when the way to it breaks.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use cloze_cluster::RunEnd;
use cloze_cluster::environment::{COORDINATOR_KEY_VARIABLE, TOKEN_VARIABLE};
use cloze_recipes::failure::{Failure, FailureKind};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::remote::RemoteHost;
use super::restart::{HostDecision, HostFacts, HostReason, decide_host_exit};
use crate::run_folder::{RunPaths, storage};

/// Lines and exits that wait for the loop.
const EVENT_MESSAGES: usize = 256;
/// Longest line of a host that is shown whole, in bytes.
const MAX_LINE_BYTES: u64 = 4096;
/// Last lines of a host that a failure tells.
const TAIL_LINES: usize = 8;

/// A host of a run, and the slots that it fills.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSlots {
    /// How a command gets there.
    pub host: RemoteHost,
    /// The first of its slots.
    pub first_slot: u32,
    /// How many it has, one after another; at least one.
    pub num_slots: u32,
}

/// The other hosts of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostsPlan {
    /// The hosts.
    pub hosts: Vec<HostSlots>,
    /// The words that start `cloze join RUN` there; `--slots` and what it names follow.
    pub join: Vec<String>,
}

/// What a host has to tell.
pub(crate) enum HostEvent {
    /// A line of its `cloze join`, or of the remote shell.
    Line {
        /// The host's place in the plan.
        place: usize,
        /// The line.
        text: String,
    },
    /// Its remote shell ended.
    Ended {
        /// The host's place in the plan.
        place: usize,
        /// Exit code; `None` after a signal.
        code: Option<i32>,
        /// `exit code 255`, `signal: 9 (SIGKILL)`
        status: String,
    },
}

/// The processes of the other hosts.
pub(crate) struct HostCrew {
    plan: HostsPlan,
    states: Vec<HostState>,
    events: mpsc::Receiver<HostEvent>,
    sender: mpsc::Sender<HostEvent>,
    restarts: u32,
    ending: bool,
    /// The failures that were to end the run, each with the place of its host.
    losses: Vec<(usize, Failure)>,
}

#[derive(Default)]
struct HostState {
    /// Watches the process, and kills it when it is dropped.
    task: Option<JoinHandle<()>>,
    log: Option<File>,
    tail: VecDeque<String>,
    was_there: bool,
    restarts: u32,
    restart_at: Option<Instant>,
    empty: bool,
}

impl HostCrew {
    /// A crew that has not been started; of no hosts it has nothing to do.
    pub(crate) fn new(plan: HostsPlan) -> Self {
        let (sender, events) = mpsc::channel(EVENT_MESSAGES);
        let states = plan.hosts.iter().map(|_| HostState::default()).collect();
        Self { plan, states, events, sender, restarts: 0, ending: false, losses: Vec::new() }
    }

    /// Starts `cloze join` on every host.
    pub(crate) fn start(&mut self, paths: &RunPaths) -> anyhow::Result<()> {
        (0..self.plan.hosts.len()).try_for_each(|place| self.start_one(place, paths))
    }

    fn start_one(&mut self, place: usize, paths: &RunPaths) -> anyhow::Result<()> {
        let HostSlots { host, .. } = &self.plan.hosts[place];
        let path = paths.host_log(&host.name);
        let log = OpenOptions::new().create(true).append(true).open(&path).map_err(|error| storage("write a host's log", &path, &error))?;
        let words: Vec<String> = self.plan.join.iter().cloned().chain(["--slots".to_owned(), self.slots_text(place)]).collect();
        let mut command = Command::from(host.command(&words));
        // A remote shell may pass on what this program was given for itself; the host takes both from the run folder.
        command.env_remove(TOKEN_VARIABLE).env_remove(COORDINATOR_KEY_VARIABLE);
        // Ctrl-C in the terminal must reach the controller only; what it starts elsewhere ends with the run.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| {
            Failure::new(FailureKind::Environment, "the remote shell could not be started").at(&host.name).because(error)
        })?;
        let (stdout, stderr) = (child.stdout.take().context("take a host's output")?, child.stderr.take().context("take its errors")?);
        let sender = self.sender.clone();
        let task = tokio::spawn(async move {
            tokio::join!(pass_on(place, stdout, &sender), pass_on(place, stderr, &sender));
            let (code, status) = match child.wait().await {
                Ok(status) => (status.code(), status.code().map_or_else(|| status.to_string(), |code| format!("exit code {code}"))),
                Err(error) => (None, error.to_string()),
            };
            // Where the loop is gone nobody wants to know.
            drop(sender.send(HostEvent::Ended { place, code, status }).await);
        });
        let state = &mut self.states[place];
        (state.task, state.log, state.was_there) = (Some(task), Some(log), false);
        Ok(())
    }

    /// The next thing that a host has to tell. Loses nothing when it is dropped while it waits.
    pub(crate) async fn next(&mut self) -> Option<HostEvent> {
        self.events.recv().await
    }

    /// Keeps a line, and returns how it is shown.
    pub(crate) fn take_line(&mut self, place: usize, text: &str) -> String {
        let state = &mut self.states[place];
        // `cloze join` tells of its workers, or of one before it; anything else is of the remote shell.
        state.was_there |= text.starts_with("worker ") || text.starts_with("another `cloze join`");
        state.tail.push_back(text.to_owned());
        if state.tail.len() > TAIL_LINES {
            state.tail.pop_front();
        }
        if let Some(log) = &mut state.log
            && let Err(error) = writeln!(log, "{text}")
        {
            tracing::warn!(%error, "a host's log cannot be written");
        }
        format!("{}: {text}", self.plan.hosts[place].host.name)
    }

    /// Decides what becomes of a host whose process ended, and takes note of it.
    pub(crate) fn take_end(
        &mut self,
        place: usize,
        code: Option<i32>,
        limits: (u32, Option<u32>),
        slots: u32,
    ) -> (HostDecision, HostReason) {
        let (max_restarts, min_workers) = limits;
        let empty: u32 = self.plan.hosts.iter().zip(&self.states).filter(|(_, state)| state.empty).map(|(host, _)| host.num_slots).sum();
        let others = slots.saturating_sub(empty + self.plan.hosts[place].num_slots);
        let state = &mut self.states[place];
        state.task = None;
        let facts = HostFacts {
            code,
            was_there: state.was_there,
            ending: self.ending,
            restarts: self.restarts,
            host_restarts: state.restarts,
            max_restarts,
            others,
            min_workers,
        };
        let (decision, reason) = decide_host_exit(&facts);
        match decision {
            HostDecision::Restart { after } => {
                state.restarts += 1;
                self.restarts += 1;
                state.restart_at = Some(Instant::now() + after);
            }
            HostDecision::LeaveEmpty => state.empty = true,
            HostDecision::Expected | HostDecision::GiveUp { .. } => {}
        }
        (decision, reason)
    }

    /// Starts again what is due; returns the names of those hosts.
    pub(crate) fn restart_due(&mut self, now: Instant, paths: &RunPaths) -> anyhow::Result<Vec<String>> {
        let is_due = |state: &mut HostState| state.restart_at.take_if(|at| now >= *at).is_some();
        let due: Vec<usize> = self.states.iter_mut().enumerate().filter_map(|(place, state)| is_due(state).then_some(place)).collect();
        due.iter().try_for_each(|&place| self.start_one(place, paths))?;
        Ok(due.into_iter().map(|place| self.plan.hosts[place].host.name.clone()).collect())
    }

    /// Nothing is started any more, and whatever ends was to end.
    pub(crate) fn stop_restarting(&mut self) {
        self.ending = true;
        self.states.iter_mut().for_each(|state| state.restart_at = None);
    }

    /// Name of a host.
    pub(crate) fn name(&self, place: usize) -> &str {
        &self.plan.hosts[place].host.name
    }

    /// Slots of a host.
    pub(crate) fn slots(&self, place: usize) -> std::ops::Range<u32> {
        let HostSlots { first_slot, num_slots, .. } = self.plan.hosts[place];
        first_slot..first_slot + num_slots
    }

    /// The end of a run because of a host: which, how, and its last words. It is remembered whose failure this is.
    pub(crate) fn give_up(&mut self, place: usize, kind: FailureKind, reason: HostReason, status: &str) -> Failure {
        let tail: Vec<&str> = self.states[place].tail.iter().map(String::as_str).collect();
        let words = if tail.is_empty() { "nothing was said".to_owned() } else { tail.join("\n    ") };
        let hint = match reason {
            HostReason::NotRun => "`cloze` must be there under the same path as here",
            HostReason::NotReached => "try the remote shell by hand: it must ask for no password, and know the host's key",
            _ => "the host's log is in `logs/` of the run folder; `cloze resume` goes on from the last checkpoint",
        };
        let what = format!("host {} is lost: {reason} ({status})", self.name(place));
        let failure = Failure::new(kind, what).because(words).hint(hint);
        self.losses.push((place, failure.clone()));
        failure
    }

    /// The host whose loss is how the run has ended; `None` after any other end.
    pub(crate) fn lost_host(&self, end: &RunEnd) -> Option<String> {
        let RunEnd::Failed(failure) = end else { return None };
        let (place, _) = self.losses.iter().find(|(_, loss)| loss == failure)?;
        Some(self.name(*place).to_owned())
    }

    /// Waits for the hosts to be done, showing what they say; returns the names of those that are not in time, whose remote shells are
    /// killed. What runs there ends by itself, since it reads the run's end in the event log.
    pub(crate) async fn end(&mut self, patience: Duration, mut show: impl FnMut(&str)) -> Vec<String> {
        self.stop_restarting();
        let deadline = Instant::now() + patience;
        while self.states.iter().any(|state| state.task.is_some()) {
            match timeout(deadline.saturating_duration_since(Instant::now()), self.events.recv()).await {
                Ok(Some(HostEvent::Line { place, text })) => {
                    let line = self.take_line(place, &text);
                    show(&line);
                }
                Ok(Some(HostEvent::Ended { place, .. })) => self.states[place].task = None,
                Ok(None) | Err(_) => break,
            }
        }
        let mut late = BTreeMap::new();
        for (place, state) in self.states.iter_mut().enumerate() {
            if let Some(task) = state.task.take() {
                task.abort();
                late.insert(place, self.plan.hosts[place].host.name.clone());
            }
        }
        late.into_values().collect()
    }

    fn slots_text(&self, place: usize) -> String {
        let slots = self.slots(place);
        format!("{}-{}", slots.start, slots.end - 1)
    }
}

/// Gives every line of a stream to the loop; a line that is too long is cut.
async fn pass_on(place: usize, stream: impl AsyncRead + Unpin, sender: &mpsc::Sender<HostEvent>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let read = (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await;
        if !matches!(read, Ok(1..)) {
            return;
        }
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        if !text.is_empty() && sender.send(HostEvent::Line { place, text }).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::remote::CommandForm;
    use super::*;

    #[test]
    fn a_lost_host_is_known_by_its_failure_and_not_by_words() {
        let slots = |name: &str| HostSlots {
            host: RemoteHost { name: name.to_owned(), prefix: Vec::new(), form: CommandForm::Words },
            first_slot: 0,
            num_slots: 1,
        };
        let mut crew = HostCrew::new(HostsPlan { hosts: vec![slots("n1"), slots("n10")], join: Vec::new() });
        let failure = crew.give_up(1, FailureKind::Run, HostReason::NotReached, "exit code 255");
        assert_eq!(crew.lost_host(&RunEnd::Failed(failure.clone())).as_deref(), Some("n10"));
        assert_eq!(crew.lost_host(&RunEnd::Finished { step: 1 }), None);
        // The run has ended of something else before the loss of the host could end it.
        for other in [Failure::new(FailureKind::Run, "worker 1 is lost"), Failure { cause: None, ..failure }] {
            assert_eq!(crew.lost_host(&RunEnd::Failed(other)), None);
        }
    }
}
