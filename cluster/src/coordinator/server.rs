//! The loop: waits for a connection, a worker's word, an order of the launcher or the clock, and lets the roster decide.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, timeout};
use tracing::Instrument as _;

use super::admission::Identity;
use super::connection::{Door, Input, MAX_UNAUTHENTICATED_CONNECTIONS, serve};
use super::roster::Roster;
use crate::event::Event;
use crate::membership::Limits;
use crate::secret::Secret;

/// Words of workers that wait for the loop.
const INPUT_MESSAGES: usize = 1024;

/// The clock is looked at every twentieth of the heartbeat timeout, within these bounds in milliseconds.
const TICK_MS: (u64, u64) = (10, 250);

/// Wait before accepting again after the operating system refused, for instance for want of file descriptors.
const ACCEPT_RETRY_MS: u64 = 100;

/// Longest wait for the last messages to reach the workers.
const FAREWELL_MS: u64 = 500;

/// Time in which a closed connection can explain a broken collective; connections of a dead process close within milliseconds.
const BLAME_GRACE_MS: u64 = 300;

/// Generations in a row that may break without a lost worker and without a step.
const MAX_FRUITLESS_GENERATIONS: u32 = 3;

/// What a coordinator needs to know.
#[derive(Clone, Debug)]
pub struct CoordinatorOptions {
    /// Address to listen on; loopback and port 0 for workers of this machine.
    pub bind: SocketAddr,
    /// The run's token.
    pub token: Secret,
    /// Hash of the run's recipe.
    pub recipe_hash: String,
    /// Build of the worker binary.
    pub build: String,
    /// Number of worker slots.
    pub workers: u32,
    /// A worker that has not been heard of for longer than this is lost.
    pub heartbeat_timeout: Duration,
    /// Longest time in which all slots must be filled, at the start and after a loss.
    pub join_timeout: Duration,
}

/// An order of the launcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Ask the workers to save and leave.
    Stop {
        /// Who asked.
        reason: String,
    },
    /// A worker process is gone.
    WorkerExited {
        /// Its slot.
        worker: u32,
        /// Exit code or signal, such as `SIGKILL` or `exit code 1`.
        status: String,
    },
    /// End the run with a failure.
    GiveUp {
        /// Why.
        failure: Failure,
    },
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// All steps are done and saved.
    Finished {
        /// Steps done.
        step: u64,
    },
    /// The run was asked to stop.
    Stopped {
        /// Steps done at the saved state.
        step: u64,
    },
    /// The run failed.
    Failed(Failure),
}

/// A coordinator that listens and has not started yet.
#[derive(Debug)]
pub struct Coordinator {
    options: CoordinatorOptions,
    listener: TcpListener,
    address: SocketAddr,
}

impl Coordinator {
    /// Starts to listen; fails with kind `Environment` when the address is taken or not this machine's.
    pub async fn bind(options: CoordinatorOptions) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(options.bind).await.map_err(|error| {
            Failure::new(FailureKind::Environment, "the coordinator cannot listen")
                .at(options.bind)
                .because(error)
                .hint("choose another address, or port 0 for any free port")
        })?;
        let address = listener.local_addr().context("read the coordinator's address")?;
        Ok(Self { options, listener, address })
    }

    /// The address that workers connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Runs until the run ends. Fails when nobody reads the events any more.
    pub async fn run(self, events: mpsc::Sender<Event>, mut control: mpsc::Receiver<Control>) -> anyhow::Result<RunEnd> {
        let started = Instant::now();
        let (sender, mut inputs) = mpsc::channel(INPUT_MESSAGES);
        let mut reception = Reception::new(self.listener, &self.options, sender);
        let mut roster = Roster::new(self.options.workers, limits(&self.options));
        let mut tick = clock(self.options.heartbeat_timeout);
        let mut last_pass = started.elapsed();
        let end = loop {
            tokio::select! {
                Some(order) = control.recv() => roster.control(order),
                Some(input) = inputs.recv() => apply(&mut roster, input, started),
                () = reception.attend() => {}
                _ = tick.tick() => {}
            }
            // A process that was stopped itself, or whose reporters were slow, has heard nothing meanwhile: that is nobody's silence.
            let now = started.elapsed();
            if now.saturating_sub(last_pass) > self.options.heartbeat_timeout / 2 {
                roster.excuse_silence(now);
            }
            last_pass = now;
            // What was said before now must be heard before silence is judged.
            for _ in 0..INPUT_MESSAGES {
                let Ok(input) = inputs.try_recv() else { break };
                apply(&mut roster, input, started);
            }
            let end = roster.settle(started.elapsed())?;
            if let Some(end) = &end {
                roster.farewell(end);
            }
            for event in roster.take_events() {
                events.send(event).await.context("send an event to the reporters")?;
            }
            roster.close_departing();
            if let Some(end) = end {
                break end;
            }
        };
        // Dropping the roster drops every outbox; the connections write what is queued and close.
        drop((roster, inputs));
        reception.close().await;
        Ok(end)
    }
}

/// The listener and the connections it led to.
struct Reception {
    listener: TcpListener,
    door: Arc<Door>,
    /// Bounds the connections that have not joined yet.
    unauthenticated: Arc<Semaphore>,
    connections: JoinSet<()>,
    num_accepted: u64,
}

impl Reception {
    fn new(listener: TcpListener, options: &CoordinatorOptions, inputs: mpsc::Sender<Input>) -> Self {
        let identity = Identity { token: options.token.clone(), recipe_hash: options.recipe_hash.clone(), build: options.build.clone() };
        let unauthenticated = Arc::new(Semaphore::new(MAX_UNAUTHENTICATED_CONNECTIONS));
        let door = Arc::new(Door { identity, inputs });
        Self { listener, door, unauthenticated, connections: JoinSet::new(), num_accepted: 0 }
    }

    /// Accepts one connection or sees one off. Loses nothing when it is dropped while it waits.
    async fn attend(&mut self) {
        tokio::select! {
            accepted = self.listener.accept() => match accepted {
                Ok((stream, peer)) => self.receive(stream, peer),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(Duration::from_millis(ACCEPT_RETRY_MS)).await;
                }
            },
            Some(ended) = self.connections.join_next() => if let Err(error) = ended {
                tracing::error!(%error, "a connection task failed");
            },
        }
    }

    fn receive(&mut self, stream: TcpStream, peer: SocketAddr) {
        let Ok(permit) = Arc::clone(&self.unauthenticated).try_acquire_owned() else {
            tracing::warn!(%peer, limit = MAX_UNAUTHENTICATED_CONNECTIONS, "closed a connection: too many others have not joined yet");
            return;
        };
        self.num_accepted += 1;
        let span = tracing::info_span!("coordinator connection", number = self.num_accepted, %peer);
        self.connections.spawn(serve(stream, self.num_accepted, permit, Arc::clone(&self.door)).instrument(span));
    }

    /// Lets the connections write their last messages, then ends them.
    async fn close(mut self) {
        let written = async { while self.connections.join_next().await.is_some() {} };
        if timeout(Duration::from_millis(FAREWELL_MS), written).await.is_err() {
            tracing::debug!("some workers did not take the last message");
        }
    }
}

fn apply(roster: &mut Roster, input: Input, started: Instant) {
    match input {
        Input::Joined { connection, join, at, outbox } => roster.join(connection, join, at.duration_since(started), outbox),
        Input::Message { connection, worker, at, message } => roster.message(connection, worker, at.duration_since(started), message),
        Input::Closed { connection, worker, reason } => roster.closed(connection, worker, &reason),
    }
}

fn limits(options: &CoordinatorOptions) -> Limits {
    Limits {
        heartbeat_timeout: options.heartbeat_timeout,
        join_timeout: options.join_timeout,
        blame_grace: Duration::from_millis(BLAME_GRACE_MS),
        max_fruitless_generations: MAX_FRUITLESS_GENERATIONS,
    }
}

fn clock(heartbeat_timeout: Duration) -> Interval {
    let period = (heartbeat_timeout / 20).clamp(Duration::from_millis(TICK_MS.0), Duration::from_millis(TICK_MS.1));
    let mut tick = interval(period);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use tokio::io::AsyncReadExt as _;
    use tokio::task::{JoinHandle, spawn_blocking};

    use super::*;
    use crate::client::{Client, JoinOptions};
    use crate::protocol::{self, CoordinatorMessage, JoinRequest, PROTOCOL_VERSION, StepReport, WorkerMessage};

    const PATIENCE: Duration = Duration::from_secs(10);

    /// A coordinator on loopback, and the launcher's ends of its channels.
    struct Sandbox {
        address: SocketAddr,
        events: mpsc::Receiver<Event>,
        control: mpsc::Sender<Control>,
        run: JoinHandle<anyhow::Result<RunEnd>>,
    }

    impl Sandbox {
        async fn start(workers: u32) -> Self {
            let options = CoordinatorOptions {
                bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
                token: Secret::new("token"),
                recipe_hash: "recipe".to_owned(),
                build: "build".to_owned(),
                workers,
                heartbeat_timeout: Duration::from_secs(2),
                join_timeout: Duration::from_secs(20),
            };
            let coordinator = Coordinator::bind(options).await.unwrap();
            let address = coordinator.address();
            let (sender, events) = mpsc::channel(1024);
            let (control, orders) = mpsc::channel(16);
            Self { address, events, control, run: tokio::spawn(coordinator.run(sender, orders)) }
        }

        fn options(&self, worker: u32) -> JoinOptions {
            JoinOptions {
                coordinator: self.address.to_string(),
                token: Secret::new("token"),
                recipe_hash: "recipe".to_owned(),
                build: "build".to_owned(),
                worker,
                collective_address: format!("127.0.0.1:{}", 9000 + worker),
                heartbeat_timeout: Duration::from_secs(2),
            }
        }

        async fn join(&self, worker: u32) -> Arc<Client> {
            Arc::new(try_join(self.options(worker)).await.unwrap())
        }

        async fn end(self) -> (RunEnd, Vec<Event>) {
            let end = timeout(PATIENCE, self.run).await.unwrap().unwrap().unwrap();
            let mut events = self.events;
            let mut seen = Vec::new();
            while let Ok(event) = events.try_recv() {
                seen.push(event);
            }
            (end, seen)
        }
    }

    async fn try_join(options: JoinOptions) -> anyhow::Result<Client> {
        spawn_blocking(move || Client::join(options)).await.unwrap()
    }

    /// Waits for the start of a generation; returns its number, rank, addresses and key.
    async fn started(client: &Arc<Client>) -> (u64, u32, Vec<String>, Secret) {
        let client = Arc::clone(client);
        let wait = move || loop {
            match client.next(PATIENCE).unwrap() {
                Some(CoordinatorMessage::Start { generation, rank, peers, collective_key, .. }) => {
                    return (generation, rank, peers, collective_key);
                }
                Some(_) => {}
                None => panic!("no start within {PATIENCE:?}"),
            }
        };
        spawn_blocking(wait).await.unwrap()
    }

    async fn finish(client: Arc<Client>, generation: u64, step: u64, stopped: bool) {
        spawn_blocking(move || client.finish(generation, step, stopped)).await.unwrap().unwrap();
    }

    fn report(step: u64) -> StepReport {
        StepReport {
            step,
            loss: 1.0,
            learning_rate: 1e-3,
            gradient_norm: 1.0,
            examples: 1,
            tokens: 1,
            labels: 1,
            seconds: 0.1,
            examples_per_s: 10.0,
            tokens_per_s: 10.0,
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn two_workers_train_and_finish() {
        let sandbox = Sandbox::start(2).await;
        let (leader, other) = (sandbox.join(0).await, sandbox.join(1).await);
        let (first, second) = (started(&leader).await, started(&other).await);
        assert_eq!((first.0, first.1, second.0, second.1), (1, 0, 1, 1));
        assert_eq!(first.2, ["127.0.0.1:9000", "127.0.0.1:9001"]);
        assert_eq!((&first.2, &first.3), (&second.2, &second.3));
        for client in [&leader, &other] {
            // Every worker may report; only the leader's report counts.
            client.send(&WorkerMessage::Step { generation: 1, report: report(1) }).unwrap();
        }
        tokio::join!(finish(leader, 1, 1, false), finish(other, 1, 1, false));
        let (end, events) = sandbox.end().await;
        assert_eq!(end, RunEnd::Finished { step: 1 });
        assert_eq!(events.iter().filter(|event| matches!(event, Event::Step { .. })).count(), 1);
        assert_eq!(events.iter().filter(|event| matches!(event, Event::WorkerFinished { .. })).count(), 2);
        assert!(!events.iter().any(|event| matches!(event, Event::WorkerLost { .. })), "{events:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn strangers_are_refused() {
        let sandbox = Sandbox::start(1).await;
        let cases = [
            (JoinOptions { token: Secret::new("guess"), ..sandbox.options(0) }, None, None),
            (JoinOptions { recipe_hash: "other".to_owned(), ..sandbox.options(0) }, Some("recipe hash recipe"), Some("recipe hash other")),
            (JoinOptions { build: "old".to_owned(), ..sandbox.options(0) }, Some("build build"), Some("build old")),
            (JoinOptions { worker: 4, ..sandbox.options(0) }, Some("a slot below 1"), None),
        ];
        for (options, expected, found) in cases {
            let failure = try_join(options).await.unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!((failure.expected.as_deref(), failure.found.as_deref()), (expected, found), "{failure}");
        }
        let _owner = sandbox.join(0).await;
        let failure = try_join(sandbox.options(0)).await.unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.what, "another process already holds this worker's slot");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn another_protocol_version_is_refused() {
        let sandbox = Sandbox::start(1).await;
        let mut socket = TcpStream::connect(sandbox.address).await.unwrap();
        let request = JoinRequest {
            protocol_version: PROTOCOL_VERSION + 1,
            token: Secret::new("token"),
            recipe_hash: "recipe".to_owned(),
            build: "build".to_owned(),
            worker: 0,
            process_id: 1,
            host: "h".to_owned(),
            collective_address: String::new(),
        };
        protocol::write_message(&mut socket, &WorkerMessage::Join(request)).await.unwrap();
        let body = timeout(PATIENCE, protocol::read_frame(&mut socket)).await.unwrap().unwrap().unwrap();
        let CoordinatorMessage::Refused { failure } = protocol::decode(&body).unwrap() else { panic!("refused") };
        assert_eq!(failure.found, Some((PROTOCOL_VERSION + 1).to_string()));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_lost_worker_is_replaced() {
        let mut sandbox = Sandbox::start(2).await;
        let (survivor, victim) = (sandbox.join(0).await, sandbox.join(1).await);
        let key = started(&survivor).await.3;
        started(&victim).await;
        let (aborted, abort) = std::sync::mpsc::channel();
        survivor.on_abort(Box::new(move |generation, reason: &str| {
            let _ = aborted.send((generation, reason.to_owned()));
        }));

        let cut = Instant::now();
        drop(victim);
        let abort = spawn_blocking(move || abort.recv_timeout(PATIENCE)).await.unwrap().unwrap();
        assert!(cut.elapsed() < Duration::from_secs(1), "a closed connection is noticed at once, not by a missed heartbeat");
        assert_eq!(abort, (1, "worker 1 (rank 1) lost: connection closed".to_owned()));

        sandbox.control.send(Control::WorkerExited { worker: 1, status: "SIGKILL".to_owned() }).await.unwrap();
        let replacement = sandbox.join(1).await;
        let (first, second) = (started(&survivor).await, started(&replacement).await);
        assert_eq!((first.0, second.0), (2, 2));
        assert_ne!(first.3, key, "each generation has its own key");
        tokio::join!(finish(survivor, 2, 9, false), finish(replacement, 2, 9, false));
        let mut seen = Vec::new();
        while let Ok(Some(event)) = timeout(PATIENCE, sandbox.events.recv()).await {
            seen.push(event);
        }
        let lost = Event::WorkerLost { worker: 1, rank: Some(1), reason: "connection closed".to_owned() };
        assert_eq!(seen.iter().filter(|event| matches!(event, Event::WorkerLost { .. })).collect::<Vec<_>>(), [&lost]);
        assert_eq!(sandbox.end().await.0, RunEnd::Finished { step: 9 });
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_stop_lets_the_workers_leave() {
        let sandbox = Sandbox::start(1).await;
        let client = sandbox.join(0).await;
        started(&client).await;
        sandbox.control.send(Control::Stop { reason: "SIGTERM".to_owned() }).await.unwrap();
        let waiting = Arc::clone(&client);
        let told = spawn_blocking(move || waiting.next(PATIENCE)).await.unwrap().unwrap();
        assert_eq!(told, Some(CoordinatorMessage::Stop { reason: "SIGTERM".to_owned() }));
        assert_eq!(client.stop_requested().as_deref(), Some("SIGTERM"));
        finish(client, 1, 17, true).await;
        assert_eq!(sandbox.end().await.0, RunEnd::Stopped { step: 17 });
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn giving_up_ends_the_run_and_the_workers() {
        let sandbox = Sandbox::start(2).await;
        let client = sandbox.join(0).await;
        let failure = Failure::new(FailureKind::Run, "restart budget spent");
        sandbox.control.send(Control::GiveUp { failure: failure.clone() }).await.unwrap();
        assert_eq!(sandbox.end().await.0, RunEnd::Failed(failure));
        let ended = spawn_blocking(move || while client.next(PATIENCE).is_ok_and(|message| message.is_some()) {});
        timeout(PATIENCE, ended).await.unwrap().unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn silent_connections_are_bounded() {
        let sandbox = Sandbox::start(1).await;
        let mut silent = Vec::new();
        for _ in 0..=MAX_UNAUTHENTICATED_CONNECTIONS {
            silent.push(TcpStream::connect(sandbox.address).await.unwrap());
        }
        let mut last = silent.pop().unwrap();
        let begun = Instant::now();
        assert_eq!(timeout(PATIENCE, last.read(&mut [0; 1])).await.unwrap().unwrap(), 0);
        assert!(begun.elapsed() < Duration::from_secs(1), "one too many is closed at once");
        let mut first = silent.swap_remove(0);
        assert_eq!(timeout(PATIENCE, first.read(&mut [0; 1])).await.unwrap().unwrap(), 0, "the others are closed after a while");
        drop(silent);
        sandbox.join(0).await;
    }
}
