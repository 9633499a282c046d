//! The coordinator's state: who sits where, what the workers said, and how a decision is applied. No I/O and no clock here;
//! messages to workers go into their outboxes, events into a list that the loop sends on.

use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::server::{Control, RunEnd};
use crate::event::Event;
use crate::membership::{self, Broken, Decision, Limits, Reason, Stage, State, Worker};
use crate::protocol::{CoordinatorMessage, JoinRequest, WorkerMessage};
use crate::secret::Secret;

/// The rank that reports for all.
const LEADER: u32 = 0;

/// A connected worker.
struct Seat {
    connection: u64,
    collective_address: String,
    outbox: mpsc::Sender<CoordinatorMessage>,
}

/// Who sits where.
pub(super) struct Roster {
    state: State,
    limits: Limits,
    /// By slot, as `state.workers`; filled exactly where a worker is present.
    seats: Vec<Option<Seat>>,
    /// Number of the newest generation.
    generation: u64,
    /// Steps done, as the leader last reported.
    step: u64,
    /// Whether the newest generation has reported a step.
    stepped: bool,
    /// Step at which the generation's state was restored.
    stepped_from: Option<u64>,
    events: Vec<Event>,
    /// Outboxes of workers that are done. They close after the events are sent, so that a worker that saw its connection
    /// close can rely on its last words having been heard.
    departing: Vec<mpsc::Sender<CoordinatorMessage>>,
}

impl Roster {
    /// An empty roster with one slot per worker.
    pub(super) fn new(num_workers: u32, limits: Limits) -> Self {
        Self {
            state: State::new(num_workers),
            limits,
            seats: (0..num_workers).map(|_| None).collect(),
            generation: 0,
            step: 0,
            stepped: false,
            stepped_from: None,
            events: Vec::new(),
            departing: Vec::new(),
        }
    }

    /// Takes the events since the last call.
    pub(super) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Closes the connections of workers that are done.
    pub(super) fn close_departing(&mut self) {
        self.departing.clear();
    }

    /// A worker with valid papers asks for its seat.
    pub(super) fn join(&mut self, connection: u64, join: JoinRequest, heard: Duration, outbox: mpsc::Sender<CoordinatorMessage>) {
        if let Some(failure) = self.seat_refusal(join.worker) {
            // The queue is new and empty; dropping the outbox closes the connection once the message is written.
            if outbox.try_send(CoordinatorMessage::Refused { failure }).is_err() {
                tracing::debug!(worker = join.worker, "a refused worker is already gone");
            }
            return;
        }
        let slot = join.worker as usize;
        self.seats[slot] = Some(Seat { connection, collective_address: join.collective_address, outbox });
        self.state.workers[slot] = Worker::Present { heard };
        self.tell(join.worker, CoordinatorMessage::Welcome {});
        self.events.push(Event::WorkerJoined { worker: join.worker, host: join.host });
    }

    /// Takes every connected worker as heard now.
    pub(super) fn excuse_silence(&mut self, now: Duration) {
        for worker in &mut self.state.workers {
            if let Worker::Present { heard } = worker {
                *heard = now.max(*heard);
            }
        }
    }

    /// A connected worker says something.
    pub(super) fn message(&mut self, connection: u64, worker: u32, at: Duration, message: WorkerMessage) {
        if !self.sits_on(worker, connection) {
            return;
        }
        if let Some(Worker::Present { heard }) = self.state.workers.get_mut(worker as usize) {
            *heard = at.max(*heard);
        }
        let leads = worker == LEADER;
        match message {
            WorkerMessage::Join(_) => self.lose(worker, "joined twice on one connection"),
            WorkerMessage::Heartbeat { generation, step, .. } if leads && self.runs(generation) => {
                // Not every step is reported, but a heartbeat tells how far the leader is.
                if step > self.step && self.stepped_from.is_some_and(|restored| step > restored) {
                    self.stepped = true;
                    self.state.fruitless_generations = 0;
                }
                self.step = self.step.max(step);
            }
            WorkerMessage::Step { generation, report } if leads && self.runs(generation) => {
                self.step = report.step;
                self.stepped = true;
                self.state.fruitless_generations = 0;
                self.events.push(Event::Step { generation, report });
            }
            // A save that ends after its generation was aborted is still a good checkpoint.
            WorkerMessage::CheckpointSaved { step, url, bytes, seconds, .. } if leads => {
                self.state.saved_step = step;
                self.events.push(Event::CheckpointSaved { step, url, bytes, seconds });
            }
            WorkerMessage::Restored { generation, step, source, skipped } if leads && self.runs(generation) => {
                self.step = step;
                self.stepped_from = Some(step);
                self.state.saved_step = step;
                self.events.push(Event::Restored { generation, step, source, skipped });
            }
            WorkerMessage::Broken { generation, reason } if self.runs(generation) => {
                self.state.broken.get_or_insert(Broken { worker, cause: reason, at });
            }
            WorkerMessage::Failed { failure } => self.fail(worker, failure),
            WorkerMessage::Finished { generation, step, stopped } if generation == self.generation => self.finish(worker, step, stopped),
            // What remains is late word of an old generation, and reports that only the leader's copy counts of.
            other => tracing::debug!(worker, message = ?other, "ignored a message"),
        }
    }

    /// A connection ended.
    pub(super) fn closed(&mut self, connection: u64, worker: u32, reason: &str) {
        if self.sits_on(worker, connection) {
            self.lose(worker, reason);
        }
    }

    /// The launcher says something.
    pub(super) fn control(&mut self, order: Control) {
        match order {
            Control::Stop { reason } => {
                if self.state.stop.is_none() {
                    self.tell_all(&CoordinatorMessage::Stop { reason: reason.clone() });
                    self.state.stop = Some(reason);
                }
            }
            Control::WorkerExited { worker, status } => {
                let cause = format!("process ended with {status}");
                match self.state.workers.get_mut(worker as usize) {
                    Some(Worker::Present { .. }) => self.lose(worker, &cause),
                    Some(absent @ Worker::Absent { .. }) => *absent = Worker::Absent { cause },
                    Some(Worker::Finished { .. }) | None => {}
                }
            }
            Control::GiveUp { failure } => {
                self.state.failure.get_or_insert(failure);
            }
        }
    }

    /// Decides and applies until there is nothing to do but wait; returns the end of the run when there is one.
    pub(super) fn settle(&mut self, now: Duration) -> anyhow::Result<Option<RunEnd>> {
        // A worker can be lost before and after a start; beside that there is one abort, one start and one wait.
        for _ in 0..2 * self.seats.len() + 4 {
            let (decision, reason) = membership::decide(now, &self.state, &self.limits);
            match decision {
                Decision::Wait => return Ok(None),
                Decision::Start => self.start(&reason)?,
                Decision::Lose { worker } => self.lose(worker, &reason.to_string()),
                Decision::Abort => self.abort(now, &reason),
                Decision::Finish { step, stopped: true } => return Ok(Some(RunEnd::Stopped { step })),
                Decision::Finish { step, stopped: false } => return Ok(Some(RunEnd::Finished { step })),
                Decision::Fail { failure } => return Ok(Some(RunEnd::Failed(failure))),
            }
        }
        anyhow::bail!("membership does not settle: {:?}", self.state)
    }

    /// Tells whoever is left that the run is over.
    pub(super) fn farewell(&mut self, end: &RunEnd) {
        let reason = match end {
            RunEnd::Finished { .. } => "the run is finished".to_owned(),
            RunEnd::Stopped { .. } => "the run is stopped".to_owned(),
            RunEnd::Failed(failure) => format!("the run failed: {}", failure.what),
        };
        if let Stage::Running { generation } = self.state.stage {
            self.tell_all(&CoordinatorMessage::Abort { generation, reason: reason.clone() });
        }
        self.tell_all(&CoordinatorMessage::Stop { reason });
    }

    fn start(&mut self, reason: &Reason) -> anyhow::Result<()> {
        self.generation += 1;
        let peers: Vec<String> = self.seats.iter().flatten().map(|seat| seat.collective_address.clone()).collect();
        let world_size = peers.len() as u32;
        let key = Secret::random()?;
        self.state.stage = Stage::Running { generation: self.generation };
        self.state.broken = None;
        self.stepped = false;
        self.stepped_from = None;
        self.events.push(Event::GenerationStarted { generation: self.generation, world_size, reason: reason.to_string() });
        for rank in 0..world_size {
            let (generation, peers, collective_key) = (self.generation, peers.clone(), key.clone());
            self.tell(rank, CoordinatorMessage::Start { generation, rank, world_size, peers, collective_key });
        }
        Ok(())
    }

    fn abort(&mut self, now: Duration, reason: &Reason) {
        let generation = self.generation;
        let blameless = matches!(reason, Reason::Broken { .. });
        self.state.fruitless_generations = if blameless && !self.stepped { self.state.fruitless_generations + 1 } else { 0 };
        self.state.stage = Stage::Gathering { since: now };
        self.state.broken = None;
        self.events.push(Event::GenerationAborted { generation, reason: reason.to_string(), step: self.step });
        self.tell_all(&CoordinatorMessage::Abort { generation, reason: reason.to_string() });
    }

    fn lose(&mut self, worker: u32, reason: &str) {
        let slot = worker as usize;
        self.seats[slot] = None;
        self.state.workers[slot] = Worker::Absent { cause: reason.to_owned() };
        let rank = matches!(self.state.stage, Stage::Running { .. }).then_some(worker);
        self.events.push(Event::WorkerLost { worker, rank, reason: reason.to_owned() });
    }

    fn finish(&mut self, worker: u32, step: u64, stopped: bool) {
        let slot = worker as usize;
        self.state.workers[slot] = Worker::Finished { step, stopped };
        self.departing.extend(self.seats[slot].take().map(|seat| seat.outbox));
        self.events.push(Event::WorkerFinished { worker, step });
    }

    fn fail(&mut self, worker: u32, failure: Failure) {
        let failure = if failure.place.is_some() { failure } else { failure.at(format!("worker {worker} (rank {worker})")) };
        self.state.failure.get_or_insert(failure);
    }

    fn tell_all(&mut self, message: &CoordinatorMessage) {
        for worker in 0..self.seats.len() as u32 {
            self.tell(worker, message.clone());
        }
    }

    fn tell(&mut self, worker: u32, message: CoordinatorMessage) {
        let Some(Some(seat)) = self.seats.get(worker as usize) else { return };
        match seat.outbox.try_send(message) {
            // A closed queue belongs to a connection whose end is about to be reported.
            Ok(()) | Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(_)) => self.lose(worker, "does not read its messages"),
        }
    }

    fn seat_refusal(&self, worker: u32) -> Option<Failure> {
        let failure = |what: &str| Some(Failure::new(FailureKind::Run, what).at(format!("worker {worker}")));
        match self.state.workers.get(worker as usize) {
            None => failure("there is no such worker slot").map(|failure| failure.expected(format!("a slot below {}", self.seats.len()))),
            Some(Worker::Present { .. }) => failure("another process already holds this worker's slot"),
            Some(Worker::Finished { .. }) => failure("this worker's part of the run is already finished"),
            Some(Worker::Absent { .. }) => None,
        }
    }

    fn runs(&self, generation: u64) -> bool {
        matches!(self.state.stage, Stage::Running { generation: running } if running == generation)
    }

    fn sits_on(&self, worker: u32, connection: u64) -> bool {
        matches!(self.seats.get(worker as usize), Some(Some(seat)) if seat.connection == connection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn roster(num_workers: u32) -> (Roster, Vec<mpsc::Receiver<CoordinatorMessage>>) {
        let limits = Limits {
            heartbeat_timeout: at(5),
            join_timeout: at(50),
            blame_grace: Duration::from_millis(300),
            max_fruitless_generations: 3,
        };
        let mut roster = Roster::new(num_workers, limits);
        let inboxes = (0..num_workers).map(|worker| join(&mut roster, worker, u64::from(worker), at(0))).collect();
        (roster, inboxes)
    }

    fn join(roster: &mut Roster, worker: u32, connection: u64, now: Duration) -> mpsc::Receiver<CoordinatorMessage> {
        let request = JoinRequest {
            protocol_version: 1,
            token: Secret::new("t"),
            recipe_hash: "r".to_owned(),
            build: "b".to_owned(),
            worker,
            process_id: 1,
            host: "h".to_owned(),
            collective_address: format!("127.0.0.1:{worker}"),
        };
        let (outbox, inbox) = mpsc::channel(8);
        roster.join(connection, request, now, outbox);
        inbox
    }

    fn heartbeat(roster: &mut Roster, worker: u32, now: Duration) {
        let message = WorkerMessage::Heartbeat { generation: 1, step: 0, phase: crate::protocol::Phase::Training };
        roster.message(u64::from(worker), worker, now, message);
    }

    #[test]
    fn a_slot_has_one_owner() {
        let (mut roster, _inboxes) = roster(2);
        for worker in [1, 7] {
            let mut inbox = join(&mut roster, worker, 9, at(0));
            assert!(matches!(inbox.try_recv(), Ok(CoordinatorMessage::Refused { .. })), "worker {worker}");
        }
        // Words on the refused connection do not count as the owner's.
        roster.closed(9, 1, "connection closed");
        assert_eq!(roster.settle(at(0)).unwrap(), None);
        assert!(!roster.take_events().iter().any(|event| matches!(event, Event::WorkerLost { .. })));
    }

    #[test]
    fn late_words_of_an_old_generation_are_ignored() {
        let (mut roster, _inboxes) = roster(1);
        roster.settle(at(0)).unwrap();
        roster.take_events();
        roster.message(0, 0, at(1), WorkerMessage::Finished { generation: 0, step: 9, stopped: false });
        roster.message(0, 0, at(1), WorkerMessage::Broken { generation: 0, reason: "old".to_owned() });
        assert_eq!(roster.settle(at(2)).unwrap(), None);
        assert_eq!(roster.take_events(), Vec::new());
    }

    #[test]
    fn a_silent_worker_ends_the_generation() {
        let (mut roster, mut inboxes) = roster(2);
        roster.settle(at(0)).unwrap();
        heartbeat(&mut roster, 0, at(6));
        assert_eq!(roster.settle(at(6)).unwrap(), None);
        let reasons: Vec<String> = roster
            .take_events()
            .into_iter()
            .filter_map(|event| match event {
                Event::WorkerLost { worker: 1, rank: Some(1), reason } | Event::GenerationAborted { reason, .. } => Some(reason),
                _ => None,
            })
            .collect();
        assert_eq!(reasons, ["no heartbeat for 6.0 s", "worker 1 (rank 1) lost: no heartbeat for 6.0 s"]);
        let mut last = None;
        while let Ok(message) = inboxes[0].try_recv() {
            last = Some(message);
        }
        assert!(matches!(last, Some(CoordinatorMessage::Abort { generation: 1, .. })), "{last:?}");
    }

    #[test]
    fn a_collective_that_always_breaks_ends_the_run() {
        let (mut roster, _inboxes) = roster(1);
        let mut now = at(1);
        for generation in 1..10 {
            assert_eq!(roster.settle(now).unwrap(), None);
            roster.message(0, 0, now, WorkerMessage::Broken { generation, reason: "no route".to_owned() });
            now += at(1);
            heartbeat(&mut roster, 0, now);
            if let Some(end) = roster.settle(now).unwrap() {
                assert_eq!(generation, 4);
                assert!(matches!(end, RunEnd::Failed(_)));
                return;
            }
        }
        panic!("the run goes on for ever");
    }

    #[test]
    fn a_failure_names_its_worker() {
        let (mut roster, _inboxes) = roster(2);
        roster.settle(at(0)).unwrap();
        roster.message(1, 1, at(1), WorkerMessage::Failed { failure: Failure::new(FailureKind::Run, "loss is not finite") });
        let Some(RunEnd::Failed(failure)) = roster.settle(at(1)).unwrap() else { panic!("failed") };
        assert_eq!(failure.place.as_deref(), Some("worker 1 (rank 1)"));
    }
}
