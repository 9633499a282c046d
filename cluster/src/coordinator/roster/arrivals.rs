//! Workers come, come back, and go.

use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};

use super::{LEADER, Roster, Seat};
use crate::coordinator::connection::Outbox;
use crate::event::Event;
use crate::journal::Entry;
use crate::membership::{self, Absence, Activity, Presence, Stage, Worker};
use crate::protocol::{CoordinatorMessage, FailureClass, Frame, JoinRequest, Phase};

impl Roster {
    /// A worker with valid papers asks for its seat.
    pub(in crate::coordinator) fn join(&mut self, connection: u64, join: JoinRequest, now: Duration, outbox: Outbox) {
        self.has_changed = true;
        if let Some(failure) = self.seat_refusal(&join) {
            let message = format!("worker {} on {} was refused: {}", join.worker, join.host, failure.what);
            self.events.push(Event::Warning { message });
            refuse(&outbox, failure, join.worker);
            return;
        }
        let (worker, slot) = (join.worker, join.worker as usize);
        self.executable.get_or_insert_with(|| (join.executable.clone(), format!("worker {worker} on {}", join.host)));
        let adopted = self.adopts(&join);
        // Who has hung up while nobody listened, and takes part in no generation, has lost nothing.
        let is_forgiven = now < self.state.forgiving_until && !self.members().contains(&worker);
        if self.seats[slot].is_some() && !adopted && !is_forgiven {
            self.lose(worker, FailureClass::ConnectionClosed, "joined again on another connection");
        }
        if matches!(self.state.stage, Stage::Gathering { .. }) {
            // A number is used once, also when a journal was lost.
            self.state.generation = self.state.generation.max(join.held.map_or(0, |held| held.generation));
        }
        let JoinRequest { process_id, host, collective_address, held, .. } = join;
        let process = (process_id, collective_address.clone());
        let rejoined = held.is_some() || self.last_joined.get(&worker) == Some(&process);
        self.last_joined.insert(worker, process);
        self.seats[slot] = Some(Seat { connection, process_id, collective_address, outbox });
        self.stuck.remove(&worker);
        self.state.workers[slot] = Worker::Present(Presence {
            host: host.clone(),
            heard: now,
            generation: if adopted { self.state.generation } else { 0 },
            ready: None,
            activity: Activity { phase: Phase::Joining, waiting: false, progress: 0, since: now },
        });
        self.state.hosts.entry(host.clone()).or_default();
        self.events.push(Event::WorkerJoined { worker, host, process_id, rejoined });
        self.tell(worker, &CoordinatorMessage::Welcome { adopted });
        if adopted {
            self.tell_again(worker);
        }
    }

    /// A connection ended. A worker that hung up because nobody listened keeps its seat for a while.
    pub(in crate::coordinator) fn closed(&mut self, connection: u64, worker: u32, now: Duration, reason: &str) {
        if self.sits_on(worker, connection) {
            if now < self.state.forgiving_until {
                tracing::info!(worker, reason, "a worker has hung up while the coordinator did not listen; it may come back");
                return;
            }
            self.lose(worker, FailureClass::ConnectionClosed, reason);
        }
    }

    pub(super) fn lose(&mut self, worker: u32, class: FailureClass, reason: &str) {
        let slot = worker as usize;
        self.has_changed = true;
        let seat = self.seats[slot].take();
        if class == FailureClass::Hung
            && let Some(seat) = &seat
        {
            self.stuck.insert(worker, seat.process_id);
        }
        let host = self.state.present(worker).map(|presence| presence.host.clone()).unwrap_or_default();
        let rank = if self.members().is_empty() { None } else { self.rank(worker) };
        self.state.workers[slot] = Worker::Absent(Absence { cause: reason.to_owned(), class, host: host.clone(), is_awaited: true });
        self.events.push(Event::WorkerLost { worker, rank, host: host.clone(), class, reason: reason.to_owned() });
        self.blame(&host, class);
    }

    pub(super) fn finish(&mut self, worker: u32, step: u64, stopped: bool) {
        let slot = worker as usize;
        self.state.workers[slot] = Worker::Finished { step, stopped };
        self.departing.extend(self.seats[slot].take().map(|seat| seat.outbox));
        self.events.push(Event::WorkerFinished { worker, step });
    }

    pub(super) fn sits_on(&self, worker: u32, connection: u64) -> bool {
        matches!(self.seats.get(worker as usize), Some(Some(seat)) if seat.connection == connection)
    }

    /// Counts a failure against a host, and closes the host's seats when there were too many.
    fn blame(&mut self, host: &str, class: FailureClass) {
        use FailureClass::{ConnectionClosed, Device, Hung, MissedHeartbeat, OutOfMemory};
        if self.limits.exclude_host_after == 0 || !matches!(class, ConnectionClosed | MissedHeartbeat | Hung | OutOfMemory | Device) {
            return;
        }
        let Some(record) = self.state.hosts.get_mut(host) else { return };
        record.failures += 1;
        let failures = record.failures;
        let is_excluded = membership::is_host_to_be_excluded(&self.state, host, &self.limits);
        if let Some(record) = self.state.hosts.get_mut(host) {
            record.excluded |= is_excluded;
            self.host_entries.push(Entry::Host { host: host.to_owned(), failures: record.failures, excluded: record.excluded });
        }
        if is_excluded {
            self.events.push(Event::HostExcluded { host: host.to_owned(), failures });
            self.close_seats_on(host, failures);
        }
    }

    fn close_seats_on(&mut self, host: &str, failures: u32) {
        for worker in 0..self.seats.len() as u32 {
            if self.state.present(worker).is_none_or(|presence| presence.host != host) {
                continue;
            }
            if let Some(Some(seat)) = self.seats.get(worker as usize) {
                refuse(&seat.outbox, excluded_failure(host, failures), worker);
            }
            self.lose(worker, FailureClass::Excluded, "its host is used no more");
        }
    }

    /// Whether the worker still takes part in the generation that runs.
    fn adopts(&self, join: &JoinRequest) -> bool {
        let Some(held) = join.held else { return false };
        let address = self.rank(join.worker).and_then(|rank| self.addresses.get(rank as usize));
        self.runs(held.generation) && address == Some(&join.collective_address)
    }

    /// What was said to all while this worker was away.
    fn tell_again(&mut self, worker: u32) {
        if let Some(reason) = self.state.stop.clone() {
            self.tell(worker, &CoordinatorMessage::Stop { reason });
        }
        if let Stage::Running { regroup: Some(reason), .. } = &self.state.stage {
            let message = CoordinatorMessage::Regroup { generation: self.state.generation, reason: reason.clone() };
            self.tell(worker, &message);
        }
        if self.rank(worker) == Some(LEADER) {
            for frame in std::mem::take(&mut self.kept_for_leader) {
                self.push(worker, frame);
            }
        }
    }

    fn seat_refusal(&self, join: &JoinRequest) -> Option<Failure> {
        let worker = join.worker;
        let failure = |what: &str| Some(Failure::new(FailureKind::Run, what).at(format!("worker {worker}")));
        if let Some(record) = self.state.hosts.get(&join.host)
            && record.excluded
        {
            return Some(excluded_failure(&join.host, record.failures));
        }
        if let Some((executable, owner)) = self.executable.as_ref().filter(|(executable, _)| *executable != join.executable) {
            return Some(
                Failure::new(FailureKind::Mismatch, "the worker's executable is not that of the others")
                    .at(format!("worker {worker} on {}", join.host))
                    .expected(format!("executable {executable}, as {owner} has it"))
                    .found(format!("executable {}", join.executable))
                    .hint("copy one `cloze-worker` to all hosts; after it was replaced, stop the run and `cloze resume` it"),
            );
        }
        match self.state.workers.get(worker as usize) {
            None => failure("there is no such worker slot").map(|failure| failure.expected(format!("a slot below {}", self.seats.len()))),
            Some(Worker::Present(_)) if !self.is_same_process(join) => failure("another process already holds this worker's slot"),
            Some(Worker::Finished { .. }) => failure("this worker's part of the run is already finished"),
            Some(Worker::Absent(_)) if join.held.is_some() && self.stuck.get(&worker) == Some(&join.process_id) => {
                failure("this worker made no progress and has lost its seat")
            }
            Some(Worker::Present(_) | Worker::Absent(_)) => None,
        }
    }

    /// Whether it is the worker that already sits there, which noticed the loss of its connection first.
    fn is_same_process(&self, join: &JoinRequest) -> bool {
        let seat = self.seats.get(join.worker as usize).and_then(Option::as_ref);
        let is_same = |seat: &Seat| seat.process_id == join.process_id && seat.collective_address == join.collective_address;
        seat.is_some_and(is_same) && self.state.present(join.worker).is_some_and(|presence| presence.host == join.host)
    }
}

fn excluded_failure(host: &str, failures: u32) -> Failure {
    Failure::new(FailureKind::Environment, "this host is excluded from the run")
        .at(host)
        .found(format!("{failures} failures of its workers"))
        .hint("look into the host; `cluster.exclude_host_after` is the bound")
}

/// The connection closes once the message is written, since the outbox goes with its seat.
fn refuse(outbox: &Outbox, failure: Failure, worker: u32) {
    let told = Frame::new(&CoordinatorMessage::Refused { failure }).map(|frame| outbox.try_send(frame).is_ok());
    if !matches!(told, Ok(true)) {
        tracing::debug!(worker, "a refused worker is already gone");
    }
}
