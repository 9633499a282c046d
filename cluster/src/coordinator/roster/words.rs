//! What workers and launcher say, and what becomes of it. A heartbeat costs the same whatever the number of workers.

use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};

use super::{LEADER, Roster};
use crate::coordinator::server::Control;
use crate::event::Event;
use crate::membership::{Activity, Broken, Ready, Setback, Worker};
use crate::protocol::{CoordinatorMessage, ExitReport, FailureClass, Frame, Phase, SavedFile, WorkerMessage};

/// A worker's failure, as it tells it.
struct Report {
    failure: Failure,
    class: FailureClass,
    generation: u64,
    step: u64,
    culprit: bool,
}

impl Roster {
    /// A connected worker says something.
    pub(in crate::coordinator) fn message(&mut self, connection: u64, worker: u32, at: Duration, message: WorkerMessage) {
        if !self.sits_on(worker, connection) {
            return;
        }
        if let Some(presence) = self.state.present_mut(worker) {
            presence.heard = at.max(presence.heard);
        }
        match message {
            WorkerMessage::Heartbeat { generation, step, phase, waiting, progress } => {
                let activity = Activity { phase, waiting, progress, since: at };
                self.heartbeat(worker, activity, generation, step);
            }
            WorkerMessage::Ping { id } => self.tell(worker, &CoordinatorMessage::Pong { id }),
            other => {
                self.has_changed = true;
                self.take_word(worker, at, other);
            }
        }
    }

    /// The launcher says something.
    pub(in crate::coordinator) fn control(&mut self, order: Control) {
        self.has_changed = true;
        match order {
            Control::Stop { reason } => {
                if self.state.stop.is_none() {
                    self.tell_all(&CoordinatorMessage::Stop { reason: reason.clone() });
                    self.state.stop = Some(reason);
                }
            }
            Control::Save { reason } => {
                let members = self.members().to_vec();
                if members.is_empty() {
                    let message = format!("{reason}: nobody trains at the moment, so nothing is saved");
                    self.events.push(Event::Warning { message });
                }
                self.tell_members(&members, &CoordinatorMessage::Save { reason });
            }
            Control::WorkerExited { worker, process_id, status } => self.exited(worker, process_id, &status),
            Control::NoReplacement { worker } => self.await_no_more(worker),
            Control::GiveUp { failure } => {
                self.state.failure.get_or_insert(failure);
            }
        }
    }

    /// A launcher on another host saw a process end. The coordinator's own launcher tells of its own.
    pub(in crate::coordinator) fn exited_elsewhere(&mut self, report: ExitReport) {
        self.has_changed = true;
        let ExitReport { worker, host, process_id, status, tail, dump, is_replaced, .. } = report;
        // The same slot may be filled from another host by now, where process ids mean other processes.
        let is_of_the_slot = match self.state.workers.get(worker as usize) {
            Some(Worker::Present(presence)) => presence.host == host,
            Some(Worker::Absent(absence)) => absence.host == host || absence.host.is_empty(),
            Some(Worker::Finished { .. }) | None => false,
        };
        if !is_of_the_slot {
            tracing::info!(worker, host, process_id, status, "a process ended whose slot is not that host's");
            return;
        }
        self.exited(worker, process_id, &status);
        if let Some(path) = dump {
            self.events.push(Event::StackDumped { worker, process_id, path });
        }
        self.events.push(Event::WorkerExited { worker, process_id, status, tail });
        if !is_replaced {
            self.await_no_more(worker);
        }
    }

    fn await_no_more(&mut self, worker: u32) {
        if let Some(Worker::Absent(absence)) = self.state.workers.get_mut(worker as usize) {
            absence.is_awaited = false;
        }
    }

    fn exited(&mut self, worker: u32, process_id: u32, status: &str) {
        let cause = format!("process ended with {status}");
        let sits_there = self.is_process(worker, process_id);
        match self.state.workers.get_mut(worker as usize) {
            Some(Worker::Present(_)) if sits_there => self.lose(worker, FailureClass::ConnectionClosed, &cause),
            Some(Worker::Absent(absence)) => absence.cause = cause,
            // Its replacement sits there already.
            Some(Worker::Present(_) | Worker::Finished { .. }) | None => {}
        }
    }

    fn heartbeat(&mut self, worker: u32, activity: Activity, generation: u64, step: u64) {
        if let Some(presence) = self.state.present_mut(worker) {
            let known = presence.activity;
            let since = if activity.progress == known.progress { known.since } else { activity.since };
            presence.activity = Activity { since, ..activity };
        }
        if self.rank(worker) == Some(LEADER) && self.runs(generation) {
            // Not every step is reported, but a heartbeat tells how far the leader is.
            if step > self.step && self.is_past_restored(step) {
                self.note_step(activity.since, step);
            }
            if step > self.step {
                self.untold_since.get_or_insert(activity.since);
                self.step = step;
            }
        }
    }

    fn take_word(&mut self, worker: u32, at: Duration, message: WorkerMessage) {
        match message {
            WorkerMessage::Join(_) => self.lose(worker, FailureClass::Other, "joined twice on one connection"),
            WorkerMessage::Ready { generation, state_step, share } => self.ready(worker, at, generation, Ready { state_step, share }),
            WorkerMessage::ShareSaved { generation, step, files } if self.runs(generation) => {
                self.forward_share(worker, generation, step, files);
            }
            // A save that ends after its generation was aborted is still a good checkpoint.
            WorkerMessage::CheckpointSaved { step, url, bytes, seconds, blocked_s, .. } => {
                self.state.saved_step = step;
                self.events.push(Event::CheckpointSaved { step, url, bytes, seconds, blocked_s });
            }
            WorkerMessage::CheckpointFailed { step, reason, .. } => {
                let message = format!("worker {worker} gave up the checkpoint of step {step}: {reason}");
                self.events.push(Event::Warning { message });
            }
            WorkerMessage::Broken { generation, reason } if self.runs(generation) && self.rank(worker).is_some() => {
                self.state.broken.get_or_insert(Broken { worker, cause: reason, at });
            }
            WorkerMessage::Failed { failure, class, generation, step, culprit } => {
                self.fail(worker, at, Report { failure, class, generation, step, culprit });
            }
            WorkerMessage::Finished { generation, step, stopped } if generation == self.state.generation => {
                self.finish(worker, step, stopped);
            }
            // A worker that comes back repeats what its lost connection may have taken.
            WorkerMessage::Step { generation, report } if self.leads(worker, generation) && self.told < Some(report.step) => {
                self.note_step(at, report.step);
                (self.step, self.told) = (report.step, Some(report.step));
                self.untold_since = None;
                self.events.push(Event::Step { generation, report });
            }
            WorkerMessage::Restored { generation, step, source, skipped, seconds } if self.leads(worker, generation) => {
                self.note_restored(step, &source);
                self.events.push(Event::Restored { generation, step, source, skipped, seconds });
            }
            // What remains is late word of an old generation, and reports that only the leader's copy counts of.
            other => tracing::debug!(worker, message = ?other, "ignored a message"),
        }
    }

    /// Word of an earlier generation than the worker's last says nothing about the last.
    fn ready(&mut self, worker: u32, at: Duration, generation: u64, ready: Ready) {
        if let Some(presence) = self.state.present_mut(worker)
            && generation >= presence.generation
        {
            presence.ready = Some(ready);
            (presence.activity.phase, presence.activity.waiting, presence.activity.since) = (Phase::Joining, false, at);
            self.failing_devices.remove(&worker);
        }
    }

    fn forward_share(&mut self, worker: u32, generation: u64, step: u64, files: Vec<SavedFile>) {
        let (Some(rank), Some(&leader)) = (self.rank(worker), self.members().first()) else { return };
        let Some(frame) = self.encode(&CoordinatorMessage::ShareSaved { generation, step, rank, files }) else { return };
        // A leader that has hung up while nobody listened is about to come back on another connection.
        if self.is_reachable(leader) {
            self.push(leader, frame);
        } else {
            self.keep_for_leader(frame);
        }
    }

    /// Every rank has at most one share on its way, and one that it repeats because it came back.
    fn keep_for_leader(&mut self, frame: Frame) {
        if self.kept_for_leader.len() < 2 * self.members().len() {
            self.kept_for_leader.push(frame);
        }
    }

    /// A failure that a repetition may cure is counted against its step; any other ends the run.
    fn fail(&mut self, worker: u32, at: Duration, report: Report) {
        let Report { failure, class, generation, step, culprit } = report;
        let counts = self.runs(generation) && self.rank(worker).is_some();
        let setback = Setback { worker, step, class, culprit, failure, at };
        match class {
            FailureClass::OutOfMemory => {
                let what = setback.failure.what.clone();
                if counts {
                    self.state.setbacks.push(setback);
                }
                // The process ends by itself; its successor begins with all memory free.
                self.lose(worker, FailureClass::OutOfMemory, &what);
            }
            FailureClass::Device => self.lose_device(worker, &setback.failure),
            // The successor of a worker whose GPU failed does not find it: that GPU is no better yet.
            FailureClass::Other if setback.failure.kind == FailureKind::Environment && self.failing_devices.contains(&worker) => {
                self.lose_device(worker, &setback.failure);
            }
            FailureClass::NotFinite if counts => self.state.setbacks.push(setback),
            FailureClass::NotFinite => tracing::debug!(worker, generation, step, "late word of a loss that is not finite"),
            FailureClass::ConnectionClosed
            | FailureClass::MissedHeartbeat
            | FailureClass::Hung
            | FailureClass::Collective
            | FailureClass::Excluded
            | FailureClass::Other => self.end_run(worker, setback.failure),
        }
    }

    /// The process ends by itself. Another may find the device in order; else its restarts are used up, or its host is excluded.
    fn lose_device(&mut self, worker: u32, failure: &Failure) {
        self.failing_devices.insert(worker);
        let reason = match &failure.cause {
            Some(cause) => format!("{}: {cause}", failure.what),
            None => failure.what.clone(),
        };
        self.lose(worker, FailureClass::Device, &reason);
    }

    fn end_run(&mut self, worker: u32, failure: Failure) {
        let name = match self.rank(worker) {
            Some(rank) => format!("worker {worker} (rank {rank})"),
            None => format!("worker {worker}"),
        };
        let failure = if failure.place.is_some() { failure } else { failure.at(name) };
        self.state.failure.get_or_insert(failure);
    }

    fn leads(&self, worker: u32, generation: u64) -> bool {
        self.rank(worker) == Some(LEADER) && self.runs(generation)
    }
}
