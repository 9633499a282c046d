//! The worker's side of the protocol, on blocking sockets.
//!
//! | thread              | on error                                         | on stop                          |
//! |---------------------|--------------------------------------------------|----------------------------------|
//! | `cluster-reader`    | marks the coordinator lost and aborts everything | ends when the socket closes      |
//! | `cluster-heartbeat` | marks the coordinator lost and closes the socket | ends when the client is dropped  |

use std::net::{Shutdown, TcpStream, ToSocketAddrs as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};

use crate::host::host_name;
use crate::protocol::{self, CoordinatorMessage, JoinRequest, PROTOCOL_VERSION, Phase, WorkerMessage};
use crate::secret::Secret;

/// Generation number that an abort callback gets when the coordinator itself is lost: every generation is over.
pub const EVERY_GENERATION: u64 = u64::MAX;

/// Longest wait for the TCP connection to one address.
const CONNECT_TIMEOUT_S: u64 = 10;

/// Longest wait for the answer to a join.
const JOIN_REPLY_TIMEOUT_S: u64 = 10;

/// Longest wait for the socket to take one message.
const WRITE_TIMEOUT_S: u64 = 5;

/// Longest wait for the coordinator to close the connection after the last message.
const LEAVE_TIMEOUT_S: u64 = 5;

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
    /// Hash of the recipe that this worker read.
    pub recipe_hash: String,
    /// Build of this binary.
    pub build: String,
    /// This worker's slot.
    pub worker: u32,
    /// `host:port` on which this worker already listens for its peers.
    pub collective_address: String,
    /// Heartbeats are sent five times within this.
    pub heartbeat_timeout: Duration,
}

/// A seat at the coordinator. All methods may be called from any thread.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    inbox: Mutex<Receiver<CoordinatorMessage>>,
    /// Dropping it ends the heartbeat thread.
    heartbeat_quit: Option<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl Client {
    /// Connects and joins. Fails with kind `Environment` when the coordinator cannot be reached, and with the coordinator's
    /// own [`Failure`] when it refuses.
    pub fn join(options: JoinOptions) -> anyhow::Result<Self> {
        let heartbeat_interval = options.heartbeat_timeout / HEARTBEATS_PER_TIMEOUT;
        let mut socket = connect(&options.coordinator)?;
        socket.set_nodelay(true).context("switch off Nagle's algorithm")?;
        socket.set_write_timeout(Some(Duration::from_secs(WRITE_TIMEOUT_S))).context("bound writes to the coordinator")?;
        ask_for_seat(&mut socket, options)?;

        let reading = socket.try_clone().context("share the coordinator's socket")?;
        let writing = socket.try_clone().context("share the coordinator's socket")?;
        let shared = Arc::new(Shared::new(writing, socket));
        let (outbox, inbox) = mpsc::sync_channel(INBOX_MESSAGES);
        let (heartbeat_quit, quit) = mpsc::channel();
        let reader = spawn("cluster-reader", {
            let shared = Arc::clone(&shared);
            move || shared.read(reading, &outbox)
        })?;
        let heartbeat = spawn("cluster-heartbeat", {
            let shared = Arc::clone(&shared);
            move || shared.beat(heartbeat_interval, &quit)
        })?;
        Ok(Self { shared, inbox: Mutex::new(inbox), heartbeat_quit: Some(heartbeat_quit), threads: vec![reader, heartbeat] })
    }

    /// Waits for the coordinator's next message; `None` when none came within `timeout`. Fails when the coordinator is lost.
    pub fn next(&self, timeout: Duration) -> anyhow::Result<Option<CoordinatorMessage>> {
        match lock(&self.inbox).recv_timeout(timeout) {
            Ok(message) => Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(self.shared.lost_failure().into()),
        }
    }

    /// Says something to the coordinator. Fails when the coordinator is lost.
    pub fn send(&self, message: &WorkerMessage) -> anyhow::Result<()> {
        self.shared.send(message)
    }

    /// Sets what the next heartbeats tell.
    pub fn progress(&self, generation: u64, step: u64, phase: Phase) {
        *lock(&self.shared.progress) = Progress { generation, step, phase };
    }

    /// Registers what is called, from the reader thread, as soon as a generation is aborted or the coordinator is lost; it
    /// replaces an earlier callback. An abort that has already happened is told at once, so none falls between a start and
    /// the registration: compare the generation. The callback must return quickly and must not register another one.
    pub fn on_abort(&self, callback: AbortCallback) {
        let mut aborts = lock(&self.shared.aborts);
        if let Some((generation, reason)) = &aborts.last {
            callback(*generation, reason);
        }
        aborts.callback = Some(callback);
    }

    /// Why the run is to stop after the current step, once that was asked for.
    pub fn stop_requested(&self) -> Option<String> {
        self.shared.stop.get().cloned()
    }

    /// Says that this worker is done and waits, bounded, until the coordinator has taken it down and closed the connection.
    pub fn finish(&self, generation: u64, step: u64, stopped: bool) -> anyhow::Result<()> {
        self.leave(&WorkerMessage::Finished { generation, step, stopped })
    }

    /// Reports a failure that no restart cures and waits, bounded, until the coordinator has closed the connection.
    pub fn fail(&self, failure: Failure) -> anyhow::Result<()> {
        self.leave(&WorkerMessage::Failed { failure })
    }

    fn leave(&self, last_words: &WorkerMessage) -> anyhow::Result<()> {
        self.shared.leaving.store(true, Ordering::SeqCst);
        self.shared.send(last_words)?;
        let deadline = Instant::now() + Duration::from_secs(LEAVE_TIMEOUT_S);
        let inbox = lock(&self.inbox);
        loop {
            match inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                // A farewell to everybody may come before the end of the connection.
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => anyhow::bail!("the coordinator did not answer within {LEAVE_TIMEOUT_S} s"),
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.leaving.store(true, Ordering::SeqCst);
        self.shared.close();
        self.heartbeat_quit = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a cluster thread panicked");
            }
        }
    }
}

/// What the client and its threads share.
struct Shared {
    /// The lock keeps frames whole.
    writer: Mutex<TcpStream>,
    /// The same socket, to close it while a writer holds the lock.
    socket: TcpStream,
    progress: Mutex<Progress>,
    aborts: Mutex<Aborts>,
    stop: OnceLock<String>,
    lost: OnceLock<String>,
    /// Set when this side ends the connection on purpose.
    leaving: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
struct Progress {
    generation: u64,
    step: u64,
    phase: Phase,
}

struct Aborts {
    last: Option<(u64, String)>,
    callback: Option<AbortCallback>,
}

impl Shared {
    fn new(writer: TcpStream, socket: TcpStream) -> Self {
        Self {
            writer: Mutex::new(writer),
            socket,
            progress: Mutex::new(Progress { generation: 0, step: 0, phase: Phase::Joining }),
            aborts: Mutex::new(Aborts { last: None, callback: None }),
            stop: OnceLock::new(),
            lost: OnceLock::new(),
            leaving: AtomicBool::new(false),
        }
    }

    /// Body of the reader thread.
    fn read(&self, mut socket: TcpStream, inbox: &SyncSender<CoordinatorMessage>) {
        let reason = loop {
            let message = match protocol::read_frame_blocking(&mut socket)
                .map(|body| body.map(|body| protocol::decode::<CoordinatorMessage>(&body)))
            {
                Ok(Some(Ok(message))) => message,
                Ok(None) => break "it closed the connection".to_owned(),
                Ok(Some(Err(error))) | Err(error) => break format!("{:#}", anyhow::Error::new(error)),
            };
            match &message {
                CoordinatorMessage::Abort { generation, reason } => self.abort(*generation, reason),
                // The first reason stays; a repeated request changes nothing.
                CoordinatorMessage::Stop { reason } => {
                    self.stop.get_or_init(|| reason.clone());
                }
                CoordinatorMessage::Welcome {} | CoordinatorMessage::Refused { .. } | CoordinatorMessage::Start { .. } => {}
            }
            if inbox.try_send(message).is_err() {
                break "its messages are not taken".to_owned();
            }
        };
        self.lose(&reason);
    }

    /// Body of the heartbeat thread.
    fn beat(&self, interval: Duration, quit: &Receiver<()>) {
        while matches!(quit.recv_timeout(interval), Err(RecvTimeoutError::Timeout)) {
            let Progress { generation, step, phase } = *lock(&self.progress);
            if self.send(&WorkerMessage::Heartbeat { generation, step, phase }).is_err() {
                return;
            }
        }
    }

    fn send(&self, message: &WorkerMessage) -> anyhow::Result<()> {
        if self.lost.get().is_some() {
            return Err(self.lost_failure().into());
        }
        let written = protocol::write_message_blocking(&mut *lock(&self.writer), message);
        match written {
            Ok(()) => Ok(()),
            // Nothing of it was written, so the connection is still good.
            Err(error @ (protocol::FrameError::TooLong { .. } | protocol::FrameError::Json(_))) => {
                Err(anyhow::Error::new(error).context("send a message to the coordinator"))
            }
            Err(error) => {
                self.lose(&format!("{:#}", anyhow::Error::new(error)));
                Err(self.lost_failure().into())
            }
        }
    }

    fn abort(&self, generation: u64, reason: &str) {
        let mut aborts = lock(&self.aborts);
        if let Some(callback) = &aborts.callback {
            callback(generation, reason);
        }
        aborts.last = Some((generation, reason.to_owned()));
    }

    /// Ends the connection; every generation is over with it, unless this side is leaving anyway.
    fn lose(&self, reason: &str) {
        self.close();
        if !self.leaving.load(Ordering::SeqCst) && self.lost.set(reason.to_owned()).is_ok() {
            self.abort(EVERY_GENERATION, "the coordinator is lost");
        }
    }

    fn close(&self) {
        if let Err(error) = self.socket.shutdown(Shutdown::Both) {
            tracing::debug!(%error, "the coordinator's connection is already closed");
        }
    }

    fn lost_failure(&self) -> Failure {
        let reason = self.lost.get().map_or("this worker has left", String::as_str);
        Failure::new(FailureKind::Run, "the coordinator is lost")
            .because(reason)
            .hint("the controlling `cloze` process ended; `cloze resume` goes on from the last checkpoint")
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("socket", &self.socket).field("stop", &self.stop).field("lost", &self.lost).finish_non_exhaustive()
    }
}

fn connect(coordinator: &str) -> anyhow::Result<TcpStream> {
    let unreachable = |cause: &dyn std::fmt::Display| {
        Failure::new(FailureKind::Environment, "the coordinator cannot be reached")
            .at(coordinator)
            .because(cause)
            .hint("workers are started by `cloze train`; a worker on its own has nobody to join")
    };
    let mut last_error = None;
    for address in coordinator.to_socket_addrs().map_err(|error| unreachable(&error))? {
        match TcpStream::connect_timeout(&address, Duration::from_secs(CONNECT_TIMEOUT_S)) {
            Ok(socket) => return Ok(socket),
            Err(error) => last_error = Some(error),
        }
    }
    match last_error {
        Some(error) => Err(unreachable(&error).into()),
        None => Err(unreachable(&"the name has no address").into()),
    }
}

fn ask_for_seat(socket: &mut TcpStream, options: JoinOptions) -> anyhow::Result<()> {
    socket.set_read_timeout(Some(Duration::from_secs(JOIN_REPLY_TIMEOUT_S))).context("bound the wait for the coordinator")?;
    let request = JoinRequest {
        protocol_version: PROTOCOL_VERSION,
        token: options.token,
        recipe_hash: options.recipe_hash,
        build: options.build,
        worker: options.worker,
        process_id: std::process::id(),
        host: host_name(),
        collective_address: options.collective_address,
    };
    protocol::write_message_blocking(socket, &WorkerMessage::Join(request)).context("ask the coordinator for a seat")?;
    let body = protocol::read_frame_blocking(socket).context("wait for the coordinator's answer")?;
    let body = body.context("the coordinator closed the connection instead of answering")?;
    match protocol::decode::<CoordinatorMessage>(&body).context("read the coordinator's answer")? {
        CoordinatorMessage::Welcome {} => {}
        CoordinatorMessage::Refused { failure } => return Err(failure.into()),
        other => anyhow::bail!("the coordinator answered a join with {other:?}"),
    }
    socket.set_read_timeout(None).context("wait for the coordinator without bound")
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> anyhow::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).with_context(|| format!("start thread {name}"))
}

/// A panic while a lock is held leaves plain data behind that is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const PATIENCE: Duration = Duration::from_secs(5);

    /// A coordinator of a few lines: takes one join, answers, and hands the socket out.
    fn seat(answer: CoordinatorMessage) -> (anyhow::Result<Client>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let body = protocol::read_frame_blocking(&mut socket).unwrap().unwrap();
            assert!(matches!(protocol::decode(&body).unwrap(), WorkerMessage::Join(_)));
            protocol::write_message_blocking(&mut socket, &answer).unwrap();
            socket
        });
        let client = Client::join(JoinOptions {
            coordinator: address.to_string(),
            token: Secret::new("t"),
            recipe_hash: "r".to_owned(),
            build: "b".to_owned(),
            worker: 0,
            collective_address: "127.0.0.1:1".to_owned(),
            heartbeat_timeout: Duration::from_millis(50),
        });
        (client, server.join().unwrap())
    }

    /// A callback and what it was called with.
    fn recorder() -> (AbortCallback, Receiver<(u64, String)>) {
        let (calls, seen) = mpsc::channel();
        (Box::new(move |generation, reason: &str| calls.send((generation, reason.to_owned())).unwrap()), seen)
    }

    #[test]
    fn a_refusal_is_the_coordinators_failure() {
        let failure = Failure::new(FailureKind::Mismatch, "another recipe").expected("a").found("b");
        let (client, _socket) = seat(CoordinatorMessage::Refused { failure: failure.clone() });
        assert_eq!(client.unwrap_err().downcast::<Failure>().unwrap(), failure);
    }

    #[test]
    fn heartbeats_tell_the_progress() {
        let (client, mut socket) = seat(CoordinatorMessage::Welcome {});
        let client = client.unwrap();
        client.progress(3, 41, Phase::Saving);
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let wanted = WorkerMessage::Heartbeat { generation: 3, step: 41, phase: Phase::Saving };
        let seen = (0..10).any(|_| {
            let body = protocol::read_frame_blocking(&mut socket).unwrap().unwrap();
            protocol::decode::<WorkerMessage>(&body).unwrap() == wanted
        });
        assert!(seen);
    }

    #[test]
    fn aborts_and_stops_arrive_while_nobody_waits() {
        let (client, mut socket) = seat(CoordinatorMessage::Welcome {});
        let client = client.unwrap();
        let (callback, calls) = recorder();
        client.on_abort(callback);
        assert_eq!(client.stop_requested(), None);
        protocol::write_message_blocking(&mut socket, &CoordinatorMessage::Stop { reason: "SIGTERM".to_owned() }).unwrap();
        let abort = CoordinatorMessage::Abort { generation: 4, reason: "worker 1 (rank 1) lost".to_owned() };
        protocol::write_message_blocking(&mut socket, &abort).unwrap();
        assert_eq!(calls.recv_timeout(PATIENCE).unwrap(), (4, "worker 1 (rank 1) lost".to_owned()));
        assert_eq!(client.stop_requested().as_deref(), Some("SIGTERM"));
        assert!(matches!(client.next(PATIENCE).unwrap(), Some(CoordinatorMessage::Stop { .. })));
        assert_eq!(client.next(PATIENCE).unwrap(), Some(abort));
        assert_eq!(client.next(Duration::ZERO).unwrap(), None);

        let (late_callback, late_calls) = recorder();
        client.on_abort(late_callback);
        assert_eq!(late_calls.try_recv().unwrap().0, 4, "an abort before the registration is told at once");
    }

    #[test]
    fn a_lost_coordinator_aborts_everything() {
        let (client, socket) = seat(CoordinatorMessage::Welcome {});
        let client = client.unwrap();
        let (callback, calls) = recorder();
        client.on_abort(callback);
        drop(socket);
        assert_eq!(calls.recv_timeout(PATIENCE).unwrap().0, EVERY_GENERATION);
        let failure = client.next(PATIENCE).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.what, "the coordinator is lost");
        let words = WorkerMessage::Heartbeat { generation: 1, step: 1, phase: Phase::Training };
        assert!(client.send(&words).is_err());
    }

    #[test]
    fn leaving_waits_for_the_coordinator() {
        let (client, mut socket) = seat(CoordinatorMessage::Welcome {});
        let client = client.unwrap();
        let server = std::thread::spawn(move || {
            loop {
                let body = protocol::read_frame_blocking(&mut socket).unwrap().unwrap();
                if let WorkerMessage::Finished { generation: 1, step: 9, stopped: true } = protocol::decode(&body).unwrap() {
                    return;
                }
            }
        });
        client.finish(1, 9, true).unwrap();
        server.join().unwrap();
    }
}
