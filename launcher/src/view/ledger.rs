//! The failures of a run, each with its cause, what was done about it and what it cost; one line each in `failures.jsonl`.
//!
//! What is known of a failure arrives in several events: the loss, the end of the process, its stack dump, the replacement, the
//! next generation, the first step of that one. A record is complete when training goes on and nothing more is expected.

use std::collections::BTreeMap;

use cloze_cluster::{Event, FailureClass, Recorded};
use cloze_recipes::failure::Failure;
use serde::{Deserialize, Serialize};

/// Most records that wait for their end. A fault that takes hundreds of workers at once opens one for each of them; beyond
/// this bound the oldest is given out as it is.
const MAX_OPEN: usize = 4_096;

/// How long a record waits for the end of a process that another host's launcher watches, in seconds: the host may be lost as well.
const ELSEWHERE_WAIT_S: f64 = 30.0;

/// What was done about a failure, the weaker deed first: of two that apply the later one in this list is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Decision {
    /// Nobody had to be replaced; the workers tried again.
    #[serde(rename = "retried the step")]
    RetriedTheStep,
    /// The worker's process came back by itself.
    #[serde(rename = "joined again")]
    JoinedAgain,
    /// Another process took its place.
    #[serde(rename = "replaced")]
    Replaced,
    /// The next generation is smaller.
    #[serde(rename = "went on with fewer")]
    WentOnWithFewer,
    /// Its host is not used any more.
    #[serde(rename = "host excluded")]
    HostExcluded,
    /// The run ended.
    #[serde(rename = "stopped")]
    Stopped,
}

impl Decision {
    /// The decision in words, as in JSON.
    pub fn text(self) -> &'static str {
        match self {
            Self::RetriedTheStep => "retried the step",
            Self::JoinedAgain => "joined again",
            Self::Replaced => "replaced",
            Self::WentOnWithFewer => "went on with fewer",
            Self::HostExcluded => "host excluded",
            Self::Stopped => "stopped",
        }
    }
}

/// One failure. What is not known, or not yet, is `None`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailureRecord {
    /// Unix time at which it was noticed, in seconds.
    pub time: f64,
    /// What kind of failure it was.
    pub class: FailureClass,
    /// Slot of the worker that failed; `None` where all of them did, or nobody knows.
    pub worker: Option<u32>,
    /// Its rank in the generation.
    pub rank: Option<u32>,
    /// Its host.
    pub host: Option<String>,
    /// How it was noticed.
    pub reason: String,
    /// How its process ended.
    pub exit: Option<String>,
    /// File with the stacks of its threads.
    pub dump: Option<String>,
    /// Generation that failed; 0 before the first.
    pub generation: u64,
    /// Last step that was known then.
    pub step: u64,
    /// What was done about it.
    pub decision: Option<Decision>,
    /// Seconds from the abort to the first step that was done again.
    pub recovered_s: Option<f64>,
    /// Steps that had to be done again.
    pub steps_lost: Option<u64>,
    /// Where the state came from.
    pub source: Option<String>,
}

/// Puts records together from events.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ledger {
    generation: u64,
    step: u64,
    /// The newest process of each slot.
    processes: BTreeMap<u32, Process>,
    /// The host of each slot.
    hosts: BTreeMap<u32, String>,
    /// The generation that the newest controller could not take over.
    not_adopted: Option<u64>,
    open: Vec<Open>,
}

#[derive(Clone, Debug, PartialEq)]
struct Process {
    id: u32,
    exit: Option<String>,
    /// The newest controller has started it.
    is_new: bool,
    /// The launcher of another host has started it.
    is_elsewhere: bool,
}

/// A record that more can be said about.
#[derive(Clone, Debug, PartialEq)]
struct Open {
    record: FailureRecord,
    /// The process whose end is not known yet.
    process_id: Option<u32>,
    /// Unix time until which its end is waited for, where somebody else watches it.
    exit_by: Option<f64>,
    waits_for: Expected,
    /// The class is a guess until the recovery tells it.
    class_is_guessed: bool,
}

/// What shows that training goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// Any new generation: the worker was lost while none ran.
    Generation,
    /// The first step of a later generation.
    Recovery,
    /// It goes on.
    Nothing,
}

impl Ledger {
    /// An empty ledger.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in an event; returns the records that are complete now, oldest first.
    pub fn apply(&mut self, recorded: &Recorded) -> Vec<FailureRecord> {
        match &recorded.event {
            Event::RunStarted { .. } => self.run_started(),
            Event::Step { report, .. } => self.step = report.step,
            Event::Progress { step, .. } => self.step = *step,
            Event::Restored { generation, step, source, .. } => self.restored(*generation, *step, source),
            Event::CoordinatorRestarted { generation, adopted } => self.not_adopted = (!adopted).then_some(*generation),
            Event::WorkerStarted { worker, process_id } => {
                self.processes.insert(*worker, Process { id: *process_id, exit: None, is_new: true, is_elsewhere: false });
            }
            Event::WorkerLost { worker, rank, host, class, reason } => {
                let record = FailureRecord { rank: *rank, host: Some(host.clone()), ..self.record(recorded.time, *class, reason) };
                self.lost(FailureRecord { worker: Some(*worker), ..record });
            }
            Event::GenerationAborted { generation, reason, step, worker, rank } => {
                let record = FailureRecord { worker: *worker, rank: *rank, ..self.record(recorded.time, FailureClass::Collective, reason) };
                self.aborted(FailureRecord { generation: *generation, step: *step, ..record });
            }
            Event::WorkerExited { worker, process_id, status, .. } => self.exited(*worker, *process_id, status),
            Event::StackDumped { worker, process_id, path } => self.dumped(recorded.time, *worker, *process_id, path),
            Event::WorkerRestarted { worker, .. } => self.decide(Decision::Replaced, |record| record.worker == Some(*worker)),
            Event::WorkerJoined { worker, host, process_id, rejoined } => {
                self.hosts.insert(*worker, host.clone());
                self.processes
                    .entry(*worker)
                    .and_modify(|known| known.come(*process_id))
                    .or_insert_with(|| Process::elsewhere(*process_id));
                // Of processes that `cloze join` starts, no other event tells.
                let decision = if *rejoined { Decision::JoinedAgain } else { Decision::Replaced };
                self.decide(decision, |record| record.worker == Some(*worker));
            }
            Event::HostExcluded { host, .. } => self.decide(Decision::HostExcluded, |record| record.host.as_ref() == Some(host)),
            Event::GenerationStarted { generation, workers, .. } => self.generation_started(*generation, workers),
            Event::Recovered { generation, class, seconds, steps_lost, source, .. } => {
                let cost = Cost { recovered_s: *seconds, steps_lost: *steps_lost, source };
                self.recovered(*generation, *class, &cost);
            }
            Event::RunFailed { failure } => self.run_failed(recorded.time, failure),
            Event::RunStopped { .. } | Event::RunFinished { .. } => self.close_all(),
            _ => {}
        }
        self.take_complete(recorded.time)
    }

    /// Gives out what is still open when no more events come.
    pub fn finish(&mut self) -> Vec<FailureRecord> {
        self.open.drain(..).map(|open| open.record).collect()
    }

    /// The records that wait for their end, oldest first.
    pub fn open_records(&self) -> impl Iterator<Item = &FailureRecord> {
        self.open.iter().map(|open| &open.record)
    }

    fn record(&self, time: f64, class: FailureClass, reason: &str) -> FailureRecord {
        FailureRecord {
            time,
            class,
            worker: None,
            rank: None,
            host: None,
            reason: reason.to_owned(),
            exit: None,
            dump: None,
            generation: self.generation,
            step: self.step,
            decision: None,
            recovered_s: None,
            steps_lost: None,
            source: None,
        }
    }

    fn lost(&mut self, record: FailureRecord) {
        let Some(worker) = record.worker else { return };
        let process = self.processes.get(&worker);
        let (exit, process_id) = match process {
            Some(Process { exit: None, id, .. }) => (None, Some(*id)),
            Some(Process { exit, .. }) => (exit.clone(), None),
            None => (None, None),
        };
        let exit_by = process.is_some_and(|process| process.is_elsewhere).then_some(record.time + ELSEWHERE_WAIT_S);
        // A worker that reports its own failure ends the generation first and its connection afterwards: that is one failure.
        let explained = self.open.iter_mut().find(|open| open.class_is_guessed && open.record.worker == Some(worker));
        if let Some(open) = explained {
            let known = &mut open.record;
            (known.worker, known.rank, known.host, known.exit) = (record.worker, record.rank, record.host, exit);
            (open.process_id, open.exit_by) = (process_id, exit_by);
            known.decision = None;
            return;
        }
        let waits_for = if record.rank.is_some() { Expected::Recovery } else { Expected::Generation };
        self.open.push(Open { record: FailureRecord { exit, ..record }, process_id, exit_by, waits_for, class_is_guessed: false });
    }

    /// The end of a process that an earlier controller watched is not told any more.
    fn run_started(&mut self) {
        self.open.iter_mut().for_each(|open| open.process_id = None);
        self.processes.values_mut().for_each(|process| process.is_new = false);
        self.not_adopted = None;
    }

    /// What is in memory tells how far the workers were, also where not every step is reported.
    fn restored(&mut self, generation: u64, step: u64, source: &str) {
        self.step = step;
        if !source.starts_with("memory") {
            return;
        }
        let failed = |open: &&mut Open| open.waits_for == Expected::Recovery && open.record.generation < generation;
        for open in self.open.iter_mut().filter(failed) {
            open.record.step = open.record.step.max(step);
        }
    }

    /// What nobody's loss explains is a failure of its own.
    fn aborted(&mut self, record: FailureRecord) {
        let mut is_explained = false;
        for open in &mut self.open {
            if open.waits_for == Expected::Recovery && open.record.generation == record.generation {
                open.record.step = record.step;
                is_explained = true;
            }
        }
        if is_explained {
            return;
        }
        let is_replaced = record.worker.and_then(|worker| self.processes.get(&worker)).is_some_and(|process| process.is_new);
        let decision = match self.not_adopted {
            Some(generation) if generation == record.generation => is_replaced.then_some(Decision::Replaced),
            _ => Some(Decision::RetriedTheStep),
        };
        let host = record.worker.and_then(|worker| self.hosts.get(&worker).cloned());
        let record = FailureRecord { host, decision, ..record };
        self.open.push(Open { record, process_id: None, exit_by: None, waits_for: Expected::Recovery, class_is_guessed: true });
    }

    fn exited(&mut self, worker: u32, process_id: u32, status: &str) {
        if let Some(process) = self.processes.get_mut(&worker).filter(|process| process.id == process_id) {
            process.exit = Some(status.to_owned());
        }
        for open in self.open.iter_mut().filter(|open| open.record.worker == Some(worker) && open.process_id == Some(process_id)) {
            open.record.exit = Some(status.to_owned());
            open.process_id = None;
        }
    }

    fn generation_started(&mut self, generation: u64, workers: &[u32]) {
        self.generation = generation;
        self.decide(Decision::WentOnWithFewer, |record| record.worker.is_some_and(|worker| !workers.contains(&worker)));
        for open in self.open.iter_mut().filter(|open| open.waits_for == Expected::Generation) {
            open.waits_for = Expected::Nothing;
        }
    }

    fn recovered(&mut self, generation: u64, class: FailureClass, cost: &Cost<'_>) {
        let is_over = |open: &&mut Open| open.waits_for == Expected::Recovery && open.record.generation < generation;
        for open in self.open.iter_mut().filter(is_over) {
            open.record.recovered_s = Some(cost.recovered_s);
            open.record.steps_lost = Some(cost.steps_lost);
            open.record.source = Some(cost.source.to_owned());
            if open.class_is_guessed {
                open.record.class = class;
            }
            open.waits_for = Expected::Nothing;
        }
    }

    fn run_failed(&mut self, time: f64, failure: &Failure) {
        if self.open.is_empty() {
            let reason = match &failure.place {
                Some(place) => format!("{} ({place})", failure.what),
                None => failure.what.clone(),
            };
            let record = self.record(time, FailureClass::Other, &reason);
            self.open.push(Open { record, process_id: None, exit_by: None, waits_for: Expected::Nothing, class_is_guessed: false });
        }
        self.decide(Decision::Stopped, |_| true);
        self.close_all();
    }

    fn close_all(&mut self) {
        for open in &mut self.open {
            (open.waits_for, open.process_id) = (Expected::Nothing, None);
        }
    }

    /// Notes a deed on the open records that it is about, unless a weightier one is known.
    fn decide(&mut self, decision: Decision, is_about: impl Fn(&FailureRecord) -> bool) {
        for open in self.open.iter_mut().filter(|open| is_about(&open.record)) {
            open.record.decision = open.record.decision.max(Some(decision));
        }
    }

    /// A process that was never lost, since it never had a seat, hung before it joined: that is a failure of its own.
    fn dumped(&mut self, time: f64, worker: u32, process_id: u32, path: &str) {
        let is_of_it = |open: &&mut Open| open.record.worker == Some(worker) && open.process_id == Some(process_id);
        if let Some(open) = self.open.iter_mut().rev().find(is_of_it) {
            open.record.dump = Some(path.to_owned());
            return;
        }
        let record = self.record(time, FailureClass::Hung, "did not join after its start");
        let record = FailureRecord { worker: Some(worker), dump: Some(path.to_owned()), ..record };
        let exit_by = Some(time + ELSEWHERE_WAIT_S);
        self.open.push(Open { record, process_id: Some(process_id), exit_by, waits_for: Expected::Generation, class_is_guessed: false });
    }

    fn take_complete(&mut self, now: f64) -> Vec<FailureRecord> {
        let surplus = self.open.len().saturating_sub(MAX_OPEN);
        let mut given: Vec<FailureRecord> = self.open.drain(..surplus).map(|open| open.record).collect();
        let has_exit = |open: &Open| open.process_id.is_none() || open.exit_by.is_some_and(|by| now > by);
        let is_complete = |open: &mut Open| open.waits_for == Expected::Nothing && has_exit(open);
        given.extend(self.open.extract_if(.., is_complete).map(|open| open.record));
        given
    }
}

impl Process {
    /// One of which nothing is known but that it has joined.
    fn elsewhere(id: u32) -> Self {
        Self { id, exit: None, is_new: false, is_elsewhere: true }
    }

    /// A process joins in this one's slot: itself, perhaps as the child of what a controller has started, or one of another launcher.
    fn come(&mut self, id: u32) {
        let is_its_own = !self.is_elsewhere && self.exit.is_none();
        if self.id != id && !is_its_own {
            *self = Self::elsewhere(id);
        }
    }
}

/// What a recovery cost.
struct Cost<'a> {
    recovered_s: f64,
    steps_lost: u64,
    source: &'a str,
}

/// The class as JSON and metrics name it.
pub fn class_name(class: FailureClass) -> &'static str {
    match class {
        FailureClass::ConnectionClosed => "connection_closed",
        FailureClass::MissedHeartbeat => "missed_heartbeat",
        FailureClass::Hung => "hung",
        FailureClass::NotFinite => "not_finite",
        FailureClass::OutOfMemory => "out_of_memory",
        FailureClass::Device => "device",
        FailureClass::Collective => "collective",
        FailureClass::Excluded => "excluded",
        FailureClass::Other => "other",
    }
}

#[cfg(test)]
mod tests;
