//! The link thread: reads what the coordinator says, and comes back when the connection is lost.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use cloze_recipes::failure::{Failure, FailureKind};

use super::connection::{self, Answer, Sockets};
use super::stream::Reading;
use super::{EVERY_GENERATION, Shared, lock, lost};
use crate::protocol::{self, CoordinatorMessage, FrameError, Held};

/// Wait between two attempts to come back.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// Longest wait for the TCP connection in one attempt to come back.
const RETRY_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Shortest wait for an answer, also where the grace is nearly over.
const SHORTEST_REPLY_TIMEOUT: Duration = Duration::from_secs(1);

/// How an attempt to come back ended.
enum Return {
    /// The worker has its seat again.
    Back(Reading),
    /// It may not have it.
    Refused(Failure),
}

/// Body of the thread; returns when there is nothing to hear any more. The inbox closes with it.
pub(super) fn run(shared: &Shared, mut reading: Reading, inbox: &SyncSender<CoordinatorMessage>, quit: &Receiver<()>) {
    loop {
        let reason = shared.listen(&mut reading, inbox);
        let is_worth_it = {
            let mut line = lock(&shared.line);
            line.hang_up();
            shared.close();
            line.has_more_to_say() && !shared.is_released.load(Ordering::SeqCst)
        };
        if !is_worth_it || shared.is_quitting.load(Ordering::SeqCst) {
            shared.let_go(lost(&reason));
            return;
        }
        match shared.come_back(&reason, quit) {
            Some(Return::Back(again)) => reading = again,
            Some(Return::Refused(failure)) => {
                shared.take_refusal(failure, inbox);
                return;
            }
            None => return,
        }
    }
}

impl Shared {
    /// Takes messages until the connection ends; returns how it did.
    fn listen(&self, reading: &mut Reading, inbox: &SyncSender<CoordinatorMessage>) -> String {
        loop {
            let message =
                match protocol::read_frame_blocking(reading).map(|body| body.map(|body| protocol::decode::<CoordinatorMessage>(&body))) {
                    Ok(Some(Ok(message))) => message,
                    Ok(None) => return "it closed the connection".to_owned(),
                    Ok(Some(Err(error))) | Err(error) => return self.read_failure(error),
                };
            let Some(message) = self.take(message) else { continue };
            let is_refusal = matches!(message, CoordinatorMessage::Refused { .. });
            if inbox.try_send(message).is_err() {
                self.is_released.store(true, Ordering::SeqCst);
                return "its messages are not taken".to_owned();
            }
            if is_refusal {
                return "it refuses this worker".to_owned();
            }
        }
    }

    fn read_failure(&self, error: FrameError) -> String {
        use std::io::ErrorKind::{TimedOut, WouldBlock};
        match error {
            FrameError::Io(error) if matches!(error.kind(), TimedOut | WouldBlock) => {
                format!("it was silent for {:.1} s", (2 * self.options.heartbeat_timeout).as_secs_f64())
            }
            other => format!("{:#}", anyhow::Error::new(other)),
        }
    }

    /// Acts upon a message; returns it when the worker is to see it.
    fn take(&self, message: CoordinatorMessage) -> Option<CoordinatorMessage> {
        match &message {
            CoordinatorMessage::Start { generation, .. } => {
                lock(&self.line).start(*generation);
                self.shares.abort(generation.saturating_sub(1), "another generation has started");
            }
            CoordinatorMessage::Abort { generation, reason } => self.abort(*generation, reason),
            CoordinatorMessage::Regroup { generation, reason } => *lock(&self.regroup) = Some((*generation, reason.clone())),
            // The first reason stays; a repeated request changes nothing.
            CoordinatorMessage::Stop { reason } => {
                self.stop.get_or_init(|| reason.clone());
            }
            CoordinatorMessage::Refused { failure } => {
                self.is_released.store(true, Ordering::SeqCst);
                self.lost.get_or_init(|| failure.clone());
            }
            CoordinatorMessage::Save { reason } => {
                lock(&self.save).get_or_insert_with(|| reason.clone());
                return None;
            }
            CoordinatorMessage::ShareSaved { generation, step, rank, files } => {
                self.shares.add((*generation, *step), *rank, files.clone());
                return None;
            }
            CoordinatorMessage::Released {} => {
                self.is_released.store(true, Ordering::SeqCst);
                return None;
            }
            CoordinatorMessage::Welcome { .. }
            | CoordinatorMessage::Pulse {}
            | CoordinatorMessage::Pong { .. }
            // It answers launchers, never workers.
            | CoordinatorMessage::Noted {} => return None,
        }
        Some(message)
    }

    /// Tries to join again until the grace is over; `None` when it is, or when the client is dropped.
    fn come_back(&self, reason: &str, quit: &Receiver<()>) -> Option<Return> {
        let mut reason = reason.to_owned();
        let grace = self.options.coordinator_grace;
        tracing::warn!(reason, grace_s = grace.as_secs_f64(), "the coordinator is away; training goes on");
        let deadline = Instant::now() + grace;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.give_up(&format!("the coordinator is gone for {} s", grace.as_secs()), lost(&reason));
                return None;
            }
            match self.try_to_return(left) {
                Ok(outcome) => return Some(outcome),
                // Somebody else has taken the coordinator's place. That is no word of the coordinator's, which may still come back.
                Err(error) if is_imposture(&error) => {
                    let found = format!("{error:#}");
                    if found != reason {
                        tracing::warn!(error = found, "whoever answers is not the coordinator");
                        reason = found;
                    }
                }
                Err(error) => tracing::debug!(error = format!("{error:#}"), "the coordinator is still away"),
            }
            if !matches!(quit.recv_timeout(RETRY_INTERVAL.min(left)), Err(RecvTimeoutError::Timeout)) {
                return None;
            }
        }
    }

    fn try_to_return(&self, left: Duration) -> anyhow::Result<Return> {
        let socket = connection::connect(&self.options.coordinator, RETRY_CONNECT_TIMEOUT)?;
        *lock(&self.socket) = Some(socket.try_clone()?);
        anyhow::ensure!(!self.is_quitting.load(Ordering::SeqCst), "the client is dropped");
        let wait = connection::JOIN_REPLY_TIMEOUT.min(left).max(SHORTEST_REPLY_TIMEOUT);
        let mut sockets = connection::open(socket, self.options.coordinator_key.as_ref(), wait)?;
        let held = self.held();
        let adopted = match connection::ask_for_seat(&mut sockets, connection::request(&self.options, held))? {
            Answer::Welcome { adopted } => adopted,
            Answer::Refused(failure) => return Ok(Return::Refused(failure)),
        };
        tracing::info!(adopted, "the coordinator is back");
        sockets.expect_pulses(self.options.heartbeat_timeout)?;
        let Sockets { reading, writing, closing } = sockets;
        *lock(&self.socket) = Some(closing);
        if let Some(Held { generation, .. }) = held
            && !adopted
        {
            self.abort(generation, "the coordinator has ended the generation in the meantime");
        }
        self.pick_up(&mut lock(&self.line), writing, adopted);
        Ok(Return::Back(reading))
    }

    fn held(&self) -> Option<Held> {
        let line = lock(&self.line);
        let step = lock(&self.progress).step;
        line.held(step)
    }

    /// The coordinator answers, and has no seat for this worker any more.
    fn take_refusal(&self, failure: Failure, inbox: &SyncSender<CoordinatorMessage>) {
        let has_left = lock(&self.line).standing.last_words.is_some();
        if has_left {
            self.let_go(failure);
            return;
        }
        let reason = format!("the coordinator refuses this worker: {}", failure.what);
        tracing::warn!(reason, "this worker may not come back");
        if failure.kind == FailureKind::Mismatch {
            // That is the coordinator of another run, and nobody has ended the generation of this one.
            self.give_up(&reason, failure);
            return;
        }
        self.stop.get_or_init(|| reason);
        if inbox.try_send(CoordinatorMessage::Refused { failure: failure.clone() }).is_err() {
            tracing::debug!("the refusal is not taken");
        }
        self.let_go(failure);
    }

    /// The worker is on its own: it saves and leaves, or ends where it waits for a generation.
    fn give_up(&self, reason: &str, failure: Failure) {
        tracing::warn!(reason, "this worker goes on alone");
        self.lost.get_or_init(|| failure);
        lock(&self.line).end(true);
        // The other ranks' words can reach nobody any more.
        self.shares.abort(EVERY_GENERATION, reason);
        self.stop.get_or_init(|| reason.to_owned());
    }

    /// The connection is over for good, and every generation with it, unless this side is leaving anyway.
    fn let_go(&self, failure: Failure) {
        let reason = self.lost.get_or_init(|| failure).what.clone();
        let is_leaving = {
            let mut line = lock(&self.line);
            line.end(false);
            line.standing.last_words.is_some()
        };
        if !is_leaving && !self.is_quitting.load(Ordering::SeqCst) {
            self.abort(EVERY_GENERATION, &reason);
        }
    }
}

/// Whether who answers could not show the coordinator's key.
fn is_imposture(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Failure>().is_some_and(|failure| failure.kind == FailureKind::Mismatch)
}
