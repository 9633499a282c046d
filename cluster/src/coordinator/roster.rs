//! The coordinator's state: who sits where, what the workers said, and how a decision is applied. No clock here, and no I/O but the
//! journal, which must be on the disk before anybody acts on it. Messages to workers go into their outboxes, events into a list that
//! the loop sends on.

mod arrivals;
mod recovery;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};
use tokio::sync::mpsc::error::TrySendError;

use self::recovery::{FailedGeneration, RestoredState};
use super::connection::Outbox;
use super::server::RunEnd;
use crate::event::Event;
use crate::journal::{Entry, Journal, Membership, Memory};
use crate::membership::{self, Decision, Limits, Reason, Retries, Stage, State, Worker};
use crate::protocol::{CoordinatorMessage, FailureClass, Frame, Held, StartFrames, StartTerms, StateSource};
use crate::secret::Secret;

/// The rank that reports for all.
const LEADER: u32 = 0;

/// Longest time for which the journal lags behind the steps. It serves a report after a restart, so a second is good enough.
const NOTE_INTERVAL: Duration = Duration::from_secs(1);

/// Longest time for which the events lag behind the steps, where not every step is reported; a line a few times a minute.
const TELL_INTERVAL: Duration = Duration::from_secs(5);

/// A connected worker.
struct Seat {
    connection: u64,
    process_id: u32,
    collective_address: String,
    outbox: Outbox,
}

/// Who sits where.
pub(super) struct Roster {
    state: State,
    limits: Limits,
    /// By slot, as `state.workers`; filled exactly where a worker is present.
    seats: Vec<Option<Seat>>,
    /// Step after which the newest generation saves and leaves, as its members were told.
    told_until: Option<u64>,
    /// The executable that all workers must be, and who brought it: whoever was let in first.
    executable: Option<(String, String)>,
    /// Process ids, by slot, of workers that lost their seat because they were stuck; they may not come back.
    stuck: BTreeMap<u32, u32>,
    /// Process ids and collective addresses, by slot, of the workers that last joined.
    last_joined: BTreeMap<u32, (u32, String)>,
    /// Slots whose worker was lost with its GPU, until a process there is ready.
    failing_devices: BTreeSet<u32>,
    /// Rank by slot in the newest generation.
    ranks: Vec<Option<u32>>,
    /// Collective addresses by rank in the newest generation.
    addresses: Vec<String>,
    /// What the leader is told as soon as it comes back to this coordinator.
    kept_for_leader: Vec<Frame>,
    /// Steps done, as the leader last reported.
    step: u64,
    /// The newest generation's last step of which an event tells, or that of the state it began with.
    told: Option<u64>,
    /// Since when steps are done that no event tells of.
    untold_since: Option<Duration>,
    /// Whether the newest generation has reported a step.
    stepped: bool,
    /// The state from which the newest generation trains.
    restored: Option<RestoredState>,
    /// The generation whose failure has not been overcome yet.
    failed: Option<FailedGeneration>,
    journal: Option<Journal>,
    /// Steps done and saved as the journal has them, and when it was told.
    noted: ((u64, u64), Duration),
    /// What the journal is still to be told of hosts.
    host_entries: Vec<Entry>,
    events: Vec<Event>,
    /// Workers that are done. They are let go after the events are sent, so that a worker that is let go can rely on its last words
    /// having been heard.
    departing: Vec<Outbox>,
    /// Whether anything happened that a decision depends on, beside the clock.
    has_changed: bool,
    pulse: Frame,
    release: Frame,
}

impl Roster {
    /// A roster with one empty slot per worker. A generation that runs according to the journal is taken over.
    pub(super) fn new(num_workers: u32, limits: Limits, journal: Option<Journal>) -> anyhow::Result<Self> {
        let memory = journal.as_ref().map(|journal| journal.memory().clone()).unwrap_or_default();
        let mut roster = Self {
            state: State::new(num_workers),
            limits,
            seats: (0..num_workers).map(|_| None).collect(),
            told_until: None,
            executable: None,
            stuck: BTreeMap::new(),
            last_joined: BTreeMap::new(),
            failing_devices: BTreeSet::new(),
            ranks: vec![None; num_workers as usize],
            addresses: Vec::new(),
            kept_for_leader: Vec::new(),
            step: 0,
            told: None,
            untold_since: None,
            stepped: false,
            restored: None,
            failed: None,
            journal,
            noted: ((memory.step, memory.saved_step), Duration::ZERO),
            host_entries: Vec::new(),
            events: Vec::new(),
            departing: Vec::new(),
            has_changed: true,
            pulse: Frame::new(&CoordinatorMessage::Pulse {})?,
            release: Frame::new(&CoordinatorMessage::Released {})?,
        };
        let continues = roster.journal.as_ref().is_some_and(Journal::continues);
        roster.remember(memory, continues);
        Ok(roster)
    }

    /// The last step of which an earlier coordinator told, and its generation.
    pub(super) fn has_told(&mut self, last: Held) {
        self.told = Some(last.step).filter(|_| self.state.generation == last.generation);
    }

    /// Takes the events since the last call.
    pub(super) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Whether a decision may be due although the clock has not ticked.
    pub(super) fn take_change(&mut self) -> bool {
        std::mem::take(&mut self.has_changed)
    }

    /// Lets workers go that are done.
    pub(super) fn release_departing(&mut self) {
        for outbox in self.departing.drain(..) {
            if outbox.try_send(self.release.clone()).is_err() {
                tracing::debug!("a worker that is done did not wait to be let go");
            }
        }
    }

    /// Shows every worker that the coordinator lives.
    pub(super) fn pulse(&self) {
        for seat in self.seats.iter().flatten() {
            // A full queue has signs of life enough, and a closed one belongs to a connection whose end is about to be reported.
            let _ = seat.outbox.try_send(self.pulse.clone());
        }
    }

    /// Gives the workers the time back for which this process did not listen.
    pub(super) fn excuse_silence(&mut self, now: Duration, gap: Duration) {
        membership::excuse(now, gap, &mut self.state, &self.limits);
    }

    /// Writes down what hosts have failed and, now and then, how far the run is. Fails when the journal cannot be written.
    pub(super) fn note_progress(&mut self, now: Duration) -> anyhow::Result<()> {
        if self.untold_since.take_if(|since| now >= *since + TELL_INTERVAL).is_some() {
            self.events.push(Event::Progress { generation: self.state.generation, step: self.step });
        }
        let (step, saved_step) = (self.step, self.state.saved_step);
        let host_entries = std::mem::take(&mut self.host_entries);
        let Some(journal) = &mut self.journal else { return Ok(()) };
        for entry in host_entries {
            journal.note(entry)?;
        }
        if self.noted.0 != (step, saved_step) && now >= self.noted.1 + NOTE_INTERVAL {
            journal.note(Entry::Progress { step, saved_step })?;
            self.noted = ((step, saved_step), now);
        }
        Ok(())
    }

    /// Decides and applies until there is nothing to do but wait; returns the end of the run when there is one.
    pub(super) fn settle(&mut self, now: Duration) -> anyhow::Result<Option<RunEnd>> {
        // A worker can be lost before and after a start; beside that there is one of everything else.
        for _ in 0..2 * self.seats.len() + 8 {
            let (decision, reason) = membership::decide(now, &self.state, &self.limits);
            match decision {
                Decision::Wait => return Ok(None),
                Decision::Start { members, source } => self.start(now, &members, &source, &reason)?,
                Decision::Lose { worker, class } => self.lose(worker, class, &reason.to_string()),
                Decision::Adopt => self.adopt(),
                Decision::Abort => self.abort(now, &reason)?,
                Decision::Regroup => self.regroup(&reason),
                Decision::Disband => self.disband(now, &reason)?,
                Decision::Finish { step, stopped: true } => return Ok(Some(RunEnd::Stopped { step })),
                Decision::Finish { step, stopped: false } => return Ok(Some(RunEnd::Finished { step })),
                Decision::Fail { failure } => return Ok(Some(RunEnd::Failed(failure))),
            }
        }
        anyhow::bail!("membership does not settle: {:?}", self.state.stage)
    }

    /// Tells whoever is left that the run is over. Fails when the journal cannot be written.
    pub(super) fn farewell(&mut self, end: &RunEnd) -> anyhow::Result<()> {
        let reason = match end {
            RunEnd::Finished { .. } => "the run is finished".to_owned(),
            RunEnd::Stopped { .. } => "the run is stopped".to_owned(),
            RunEnd::Failed(failure) => format!("the run failed: {}", failure.what),
        };
        if !matches!(self.state.stage, Stage::Gathering { .. }) {
            let generation = self.state.generation;
            // A run that is resumed later has nobody to wait for, and should find what is saved.
            self.record(Entry::Progress { step: self.step, saved_step: self.state.saved_step })?;
            self.record(Entry::Over { generation })?;
            self.tell_all(&CoordinatorMessage::Abort { generation, reason: reason.clone() });
        }
        self.tell_all(&CoordinatorMessage::Stop { reason });
        self.tell_all(&CoordinatorMessage::Released {});
        Ok(())
    }

    /// Takes over what an earlier coordinator wrote down.
    fn remember(&mut self, memory: Memory, continues: bool) {
        let Memory { generation, running, until_step, step, saved_step, retries, hosts } = memory;
        self.told_until = until_step;
        self.step = step;
        (self.state.generation, self.state.saved_step, self.state.retries, self.state.hosts) = (generation, saved_step, retries, hosts);
        if generation == 0 || !continues {
            return;
        }
        match running {
            Some(Membership { members, addresses }) if members.iter().all(|&slot| (slot as usize) < self.seats.len()) => {
                self.addresses = addresses;
                self.set_ranks(&members);
                self.state.stage = Stage::Adopting { members, since: Duration::ZERO };
            }
            _ => self.events.push(Event::CoordinatorRestarted { generation, adopted: false }),
        }
    }

    fn start(&mut self, now: Duration, members: &[u32], source: &StateSource, reason: &Reason) -> anyhow::Result<()> {
        let generation = self.state.generation + 1;
        let seats = members.iter().filter_map(|&slot| self.seats[slot as usize].as_ref());
        let peers: Vec<String> = seats.map(|seat| seat.collective_address.clone()).collect();
        anyhow::ensure!(peers.len() == members.len(), "a member of generation {generation} has no seat");
        // After a request to stop, a generation is made for nothing else than to save.
        let terms = StartTerms { until_step: self.limits.until_step, saves_only: self.state.stop.is_some() };
        let frames = StartFrames::new(generation, (members, &peers), &Secret::random()?, source, terms)?;
        if std::mem::replace(&mut self.told_until, self.limits.until_step) != self.limits.until_step {
            self.record(Entry::Until { step: self.limits.until_step })?;
        }
        self.record(Entry::Generation { generation, members: members.to_vec(), addresses: peers.clone() })?;
        self.state.generation = generation;
        self.forget_reports();
        self.addresses = peers;
        self.set_ranks(members);
        for &member in members {
            if let Some(presence) = self.state.present_mut(member) {
                (presence.generation, presence.ready, presence.activity.since) = (generation, None, now);
            }
        }
        let world_size = members.len() as u32;
        self.events.push(Event::GenerationStarted { generation, world_size, workers: members.to_vec(), reason: reason.to_string() });
        self.state.stage = Stage::Running { members: members.to_vec(), regroup: None };
        for (rank, &member) in (0_u32..).zip(members) {
            self.push(member, frames.for_rank(rank)?);
        }
        Ok(())
    }

    fn adopt(&mut self) {
        if let Stage::Adopting { members, .. } = &mut self.state.stage {
            self.state.stage = Stage::Running { members: std::mem::take(members), regroup: None };
        }
        self.stepped = true;
        self.events.push(Event::CoordinatorRestarted { generation: self.state.generation, adopted: true });
        // What a member was told at its start holds until it leaves.
        if self.told_until != self.limits.until_step {
            self.regroup(&Reason::OtherEnd { until_step: self.limits.until_step });
        }
    }

    fn abort(&mut self, now: Duration, reason: &Reason) -> anyhow::Result<()> {
        let generation = self.state.generation;
        if matches!(self.state.stage, Stage::Adopting { .. }) {
            self.events.push(Event::CoordinatorRestarted { generation, adopted: false });
        }
        let blameless = matches!(reason, Reason::Broken { .. });
        self.state.fruitless_generations = if blameless && !self.stepped { self.state.fruitless_generations + 1 } else { 0 };
        if let Reason::Setback { step, attempt, .. } = reason {
            // Not every step is reported, but who fails in one has done those before it.
            self.step = self.step.max(step.saturating_sub(1));
            self.state.retries = Retries { step: *step, attempts: *attempt };
            self.record(Entry::Retries(self.state.retries))?;
        }
        self.note_failure(now, reason.class());
        self.end_generation(now, true)?;
        let worker = reason.culprit();
        let rank = worker.and_then(|worker| self.rank(worker));
        self.events.push(Event::GenerationAborted { generation, reason: reason.to_string(), step: self.step, worker, rank });
        self.tell_all(&CoordinatorMessage::Abort { generation, reason: reason.to_string() });
        Ok(())
    }

    fn regroup(&mut self, reason: &Reason) {
        let (generation, why) = (self.state.generation, reason.to_string());
        if let Stage::Running { members, regroup } = &mut self.state.stage {
            *regroup = Some(why.clone());
            let members = members.clone();
            self.tell_members(&members, &CoordinatorMessage::Regroup { generation, reason: why });
        }
    }

    fn disband(&mut self, now: Duration, reason: &Reason) -> anyhow::Result<()> {
        let ready = self.state.workers.iter().filter_map(|worker| match worker {
            Worker::Present(presence) => presence.ready.and_then(|ready| ready.state_step),
            Worker::Absent(_) | Worker::Finished { .. } => None,
        });
        self.step = ready.max().unwrap_or(self.step);
        self.end_generation(now, false)?;
        let generation = self.state.generation;
        self.events.push(Event::GenerationRegrouped { generation, reason: reason.to_string(), step: self.step });
        Ok(())
    }

    fn end_generation(&mut self, now: Duration, patient: bool) -> anyhow::Result<()> {
        self.record(Entry::Over { generation: self.state.generation })?;
        self.state.stage = Stage::Gathering { since: now, patient };
        self.forget_reports();
        Ok(())
    }

    /// What was said of one generation does not count for the next.
    fn forget_reports(&mut self) {
        self.state.broken = None;
        self.state.setbacks.clear();
        self.kept_for_leader.clear();
        self.told = None;
        self.untold_since = None;
        self.stepped = false;
        self.restored = None;
    }

    fn set_ranks(&mut self, members: &[u32]) {
        self.ranks.fill(None);
        for (rank, &member) in (0_u32..).zip(members) {
            self.ranks[member as usize] = Some(rank);
        }
    }

    fn record(&mut self, entry: Entry) -> anyhow::Result<()> {
        match &mut self.journal {
            Some(journal) => Ok(journal.record(entry)?),
            None => Ok(()),
        }
    }

    fn tell(&mut self, worker: u32, message: &CoordinatorMessage) {
        if let Some(frame) = self.encode(message) {
            self.push(worker, frame);
        }
    }

    fn tell_all(&mut self, message: &CoordinatorMessage) {
        let everybody: Vec<u32> = (0..self.seats.len() as u32).collect();
        self.tell_members(&everybody, message);
    }

    fn tell_members(&mut self, members: &[u32], message: &CoordinatorMessage) {
        let Some(frame) = self.encode(message) else { return };
        for &worker in members {
            self.push(worker, frame.clone());
        }
    }

    /// The workers would wait for ever for a message that cannot be sent, so the run ends with it.
    fn encode(&mut self, message: &CoordinatorMessage) -> Option<Frame> {
        match Frame::new(message) {
            Ok(frame) => Some(frame),
            Err(error) => {
                let failure = Failure::new(FailureKind::Run, "a message to the workers cannot be sent");
                let failure = failure.because(format!("{:#}", anyhow::Error::new(error)));
                self.state.failure.get_or_insert(failure);
                None
            }
        }
    }

    fn push(&mut self, worker: u32, frame: Frame) {
        let Some(Some(seat)) = self.seats.get(worker as usize) else { return };
        match seat.outbox.try_send(frame) {
            // A closed queue belongs to a connection whose end is about to be reported.
            Ok(()) | Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(_)) => self.lose(worker, FailureClass::Hung, "does not read its messages"),
        }
    }

    /// Whether a worker sits on a connection that is still open.
    fn is_reachable(&self, worker: u32) -> bool {
        matches!(self.seats.get(worker as usize), Some(Some(seat)) if !seat.outbox.is_closed())
    }

    /// Whether this process is the one that sits in the worker's slot.
    fn is_process(&self, worker: u32, process_id: u32) -> bool {
        matches!(self.seats.get(worker as usize), Some(Some(seat)) if seat.process_id == process_id)
    }

    /// Slots of the members of the generation that runs, by rank; empty between generations.
    fn members(&self) -> &[u32] {
        match &self.state.stage {
            Stage::Running { members, .. } | Stage::Adopting { members, .. } => members,
            Stage::Gathering { .. } => &[],
        }
    }

    fn runs(&self, generation: u64) -> bool {
        generation == self.state.generation && !matches!(self.state.stage, Stage::Gathering { .. })
    }

    fn rank(&self, worker: u32) -> Option<u32> {
        self.ranks.get(worker as usize).copied().flatten()
    }
}

#[cfg(test)]
mod tests;
