//! The worker's side of the protocol, on blocking sockets.
//!
//! | thread              | on error                                                          | on stop                          |
//! |---------------------|-------------------------------------------------------------------|----------------------------------|
//! | `cluster-link`      | tries to come back, and asks for a stop when the grace is over    | ends when the client is dropped  |
//! | `cluster-heartbeat` | leaves it to the link                                             | ends when the client is dropped  |
//!
//! While the coordinator is away the generation goes on: what is said is kept, and told when the worker has joined again.

mod aborts;
mod connection;
mod exit;
mod line;
mod link;
mod shares;
mod stream;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};

use self::aborts::Aborts;
use self::connection::{Answer, Sockets};
pub use self::exit::report_exit;
use self::line::{LastWords, Line};
use self::shares::Shares;
pub use self::shares::SharesError;
use crate::protocol::{CoordinatorMessage, FailureClass, Phase, SavedFile, Share, WorkerMessage};
use crate::secret::Secret;
use crate::tls::PinnedKey;

/// Generation number that an abort callback gets when the coordinator has let this worker go: every generation is over.
pub const EVERY_GENERATION: u64 = u64::MAX;

/// Wait for the coordinator to close the connection after the last message, where a longer heartbeat timeout does not ask for more.
const LEAVE_TIMEOUT_S: u64 = 5;

/// Time for the link thread to take note of a coordinator that has been silent for too long.
const LEAVE_MARGIN_S: u64 = 1;

/// Messages that wait for [`Client::next`]. The coordinator says a handful per generation.
const INBOX_MESSAGES: usize = 256;

/// Heartbeats within one heartbeat timeout, so that a few lost scheduling slots do not cost a worker its seat.
const HEARTBEATS_PER_TIMEOUT: u32 = 5;

/// What is called when a generation is over: its number and the reason.
pub type AbortCallback = Box<dyn Fn(u64, &str) + Send>;

/// What a worker brings to the coordinator; process id and host are added here.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// `host:port` of the coordinator.
    pub coordinator: String,
    /// The run's token.
    pub token: Secret,
    /// Key of the coordinator: the connection is secured, and nobody with another key learns the token. `None` speaks in clear.
    pub coordinator_key: Option<PinnedKey>,
    /// Hash of the recipe that this worker read.
    pub recipe_hash: String,
    /// Build of this binary.
    pub build: String,
    /// What tells this executable from every other.
    pub executable: String,
    /// This worker's slot.
    pub worker: u32,
    /// `host:port` on which this worker already listens for its peers.
    pub collective_address: String,
    /// Heartbeats are sent five times within this; a coordinator that is silent for twice as long is away.
    pub heartbeat_timeout: Duration,
    /// How long this worker goes on without a coordinator.
    pub coordinator_grace: Duration,
}

/// A seat at the coordinator. All methods may be called from any thread.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    inbox: Mutex<Receiver<CoordinatorMessage>>,
    /// Dropping them ends the threads.
    quit: Vec<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl Client {
    /// Connects and joins. Fails with kind `Run` when the coordinator cannot be reached, with kind `Mismatch` when it does not hold the key
    /// that is wanted, and with the coordinator's own [`Failure`] when it refuses.
    pub fn join(options: JoinOptions) -> anyhow::Result<Self> {
        let heartbeat_interval = options.heartbeat_timeout / HEARTBEATS_PER_TIMEOUT;
        let socket = connection::connect(&options.coordinator, connection::CONNECT_TIMEOUT)?;
        let mut sockets = connection::open(socket, options.coordinator_key.as_ref(), connection::JOIN_REPLY_TIMEOUT)?;
        match connection::ask_for_seat(&mut sockets, connection::request(&options, None))? {
            Answer::Welcome { .. } => {}
            Answer::Refused(failure) => return Err(failure.into()),
        }
        sockets.expect_pulses(options.heartbeat_timeout)?;
        let Sockets { reading, writing, closing } = sockets;
        let shared = Arc::new(Shared::new(options, Line::new(writing)));
        *lock(&shared.socket) = Some(closing);
        let (outbox, inbox) = mpsc::sync_channel(INBOX_MESSAGES);
        let (link_quit, link_quitting) = mpsc::channel();
        let (heartbeat_quit, heartbeat_quitting) = mpsc::channel();
        let link = spawn("cluster-link", {
            let shared = Arc::clone(&shared);
            move || link::run(&shared, reading, &outbox, &link_quitting)
        })?;
        let heartbeat = spawn("cluster-heartbeat", {
            let shared = Arc::clone(&shared);
            move || shared.beat(heartbeat_interval, &heartbeat_quitting)
        })?;
        Ok(Self { shared, inbox: Mutex::new(inbox), quit: vec![link_quit, heartbeat_quit], threads: vec![link, heartbeat] })
    }

    /// Waits for the coordinator's next message; `None` when none came within `wait`, also while the coordinator is away. Fails when
    /// the coordinator is lost for good.
    ///
    /// Only what a worker acts upon between generations is handed out: starts, aborts, regroups, stops, refusals.
    pub fn next(&self, wait: Duration) -> anyhow::Result<Option<CoordinatorMessage>> {
        match lock(&self.inbox).recv_timeout(wait) {
            Ok(message) => Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(self.shared.lost_failure().into()),
        }
    }

    /// Says something to the coordinator. While that is away the message is kept and told later, but for heartbeats; after the grace
    /// it is dropped. Fails when the message cannot be sent at all, and when the coordinator has let this worker go.
    pub fn send(&self, message: &WorkerMessage) -> anyhow::Result<()> {
        let mut line = lock(&self.shared.line);
        self.shared.say(&mut line, message)
    }

    /// Says that this worker has left `generation` (0 for none yet) and waits for the next. `state_step` is the number of steps of
    /// the state in its memory.
    pub fn ready(&self, generation: u64, state_step: Option<u64>) -> anyhow::Result<()> {
        self.ready_with(generation, state_step, None)
    }

    /// The same of a worker whose memory holds this share of the state only.
    pub fn ready_with(&self, generation: u64, state_step: Option<u64>, share: Option<Share>) -> anyhow::Result<()> {
        {
            let mut progress = lock(&self.shared.progress);
            let step = state_step.unwrap_or(0);
            *progress = Progress { generation, step, phase: Phase::Joining, waiting: false, count: progress.count + 1 };
        }
        self.send(&WorkerMessage::Ready { generation, state_step, share })
    }

    /// Sets what the next heartbeats tell, and that the worker has got on.
    pub fn progress(&self, generation: u64, step: u64, phase: Phase) {
        let mut progress = lock(&self.shared.progress);
        *progress = Progress { generation, step, phase, waiting: progress.waiting, count: progress.count + 1 };
    }

    /// Says whether this worker waits for its peers inside a collective operation; each change means that it has got on.
    pub fn set_waiting(&self, waiting: bool) {
        let mut progress = lock(&self.shared.progress);
        if progress.waiting != waiting {
            progress.waiting = waiting;
            progress.count += 1;
        }
    }

    /// Registers what is called, from the link thread, as soon as a generation is aborted or the coordinator has let this worker go;
    /// it replaces an earlier callback. An abort that has already happened is told at once, so none falls between a start and
    /// the registration: compare the generation. The callback must return quickly and must not register another one.
    pub fn on_abort(&self, callback: AbortCallback) {
        self.shared.aborts.register(callback);
    }

    /// Why the run is to stop after the current step: because that was asked for, or because the coordinator was away longer than the
    /// grace.
    pub fn stop_requested(&self) -> Option<String> {
        self.shared.stop.get().cloned()
    }

    /// Why `generation` is to be left after the current step, once that was asked for.
    pub fn regroup_requested(&self, generation: u64) -> Option<String> {
        let regroup = lock(&self.shared.regroup);
        regroup.as_ref().filter(|(asked, _)| *asked == generation).map(|(_, reason)| reason.clone())
    }

    /// Why a checkpoint is to be saved, once for each request.
    pub fn take_save_request(&self) -> Option<String> {
        lock(&self.shared.save).take()
    }

    /// Waits, as the leader, for the files of ranks `1..ranks`. Fails at the deadline, and when the generation is over before.
    pub fn wait_shares(&self, generation: u64, step: u64, ranks: u32, deadline: Instant) -> Result<Vec<SavedFile>, SharesError> {
        self.shared.shares.wait((generation, step), ranks, deadline)
    }

    /// Says that this worker is done and waits, bounded, until the coordinator has taken it down. Without a coordinator there is
    /// nobody to tell, and the result is saved all the same.
    pub fn finish(&self, generation: u64, step: u64, stopped: bool) -> anyhow::Result<()> {
        self.leave(WorkerMessage::Finished { generation, step, stopped }, true)
    }

    /// Reports a failure that this worker does not survive, and waits, bounded, until the coordinator has closed the connection.
    pub fn fail(&self, failure: Failure, class: FailureClass) -> anyhow::Result<()> {
        let Progress { generation, step, .. } = *lock(&self.shared.progress);
        self.leave(WorkerMessage::Failed { failure, class, generation, step, culprit: true }, false)
    }

    /// The last words are repeated after a lost connection; `needs_release` tells whether a closed one is answer enough.
    fn leave(&self, message: WorkerMessage, needs_release: bool) -> anyhow::Result<()> {
        {
            let mut line = lock(&self.shared.line);
            line.standing.last_words = Some(LastWords { message, needs_release, was_written: false });
            self.shared.say_last_words(&mut line)?;
        }
        let wait = leave_timeout(self.shared.options.heartbeat_timeout);
        let inbox = lock(&self.inbox);
        loop {
            match inbox.recv_timeout(wait) {
                // A farewell to everybody may come before the end of the connection.
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                // While the coordinator is away the grace bounds the wait.
                Err(RecvTimeoutError::Timeout) if lock(&self.shared.line).is_away() => {}
                Err(RecvTimeoutError::Timeout) => anyhow::bail!("the coordinator did not answer within {:.1} s", wait.as_secs_f64()),
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.is_quitting.store(true, Ordering::SeqCst);
        self.quit.clear();
        self.shared.close();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a cluster thread panicked");
            }
        }
    }
}

/// What the client and its threads share.
struct Shared {
    options: JoinOptions,
    /// The lock keeps frames whole and in their order.
    line: Mutex<Line>,
    /// The current socket, to close it while a writer holds the line.
    socket: Mutex<Option<std::net::TcpStream>>,
    progress: Mutex<Progress>,
    aborts: Aborts,
    shares: Shares,
    regroup: Mutex<Option<(u64, String)>>,
    save: Mutex<Option<String>>,
    stop: OnceLock<String>,
    /// Why there is no way back to the coordinator.
    lost: OnceLock<Failure>,
    /// The coordinator has let this worker go.
    is_released: AtomicBool,
    /// The client is being dropped.
    is_quitting: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
struct Progress {
    generation: u64,
    step: u64,
    phase: Phase,
    waiting: bool,
    /// Grows whenever the worker gets on.
    count: u64,
}

impl Shared {
    fn new(options: JoinOptions, line: Line) -> Self {
        Self {
            options,
            line: Mutex::new(line),
            socket: Mutex::new(None),
            progress: Mutex::new(Progress { generation: 0, step: 0, phase: Phase::Joining, waiting: false, count: 0 }),
            aborts: Aborts::default(),
            shares: Shares::default(),
            regroup: Mutex::new(None),
            save: Mutex::new(None),
            stop: OnceLock::new(),
            lost: OnceLock::new(),
            is_released: AtomicBool::new(false),
            is_quitting: AtomicBool::new(false),
        }
    }

    /// Body of the heartbeat thread.
    fn beat(&self, interval: Duration, quit: &Receiver<()>) {
        while matches!(quit.recv_timeout(interval), Err(RecvTimeoutError::Timeout)) {
            let mut line = lock(&self.line);
            // Read under the line's lock, so that no heartbeat is older than a word that was said before it.
            let Progress { generation, step, phase, waiting, count: progress } = *lock(&self.progress);
            let heartbeat = WorkerMessage::Heartbeat { generation, step, phase, waiting, progress };
            if let Err(error) = self.say(&mut line, &heartbeat) {
                tracing::debug!(error = format!("{error:#}"), "heartbeats end");
                return;
            }
        }
    }

    fn abort(&self, generation: u64, reason: &str) {
        self.aborts.tell(generation, reason);
        self.shares.abort(generation, reason);
    }

    fn close(&self) {
        if let Some(socket) = &*lock(&self.socket)
            && let Err(error) = socket.shutdown(std::net::Shutdown::Both)
        {
            tracing::debug!(%error, "the coordinator's connection is already closed");
        }
    }

    fn lost_failure(&self) -> Failure {
        let left = || lost("this worker has left");
        self.lost.get().cloned().unwrap_or_else(left)
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("options", &self.options).field("stop", &self.stop).field("lost", &self.lost).finish_non_exhaustive()
    }
}

/// Wait after the last words. A coordinator that has vanished without closing the connection is noticed by its silence, for two
/// heartbeat timeouts; from then on the grace bounds the wait.
fn leave_timeout(heartbeat_timeout: Duration) -> Duration {
    Duration::from_secs(LEAVE_TIMEOUT_S).max(2 * heartbeat_timeout + Duration::from_secs(LEAVE_MARGIN_S))
}

fn lost(reason: &str) -> Failure {
    Failure::new(FailureKind::Run, "the coordinator is lost")
        .because(reason)
        .hint("the controlling `cloze` process ended; `cloze resume` goes on from the last checkpoint")
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> anyhow::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).with_context(|| format!("start thread {name}"))
}

/// A panic while a lock is held leaves plain data behind that is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
