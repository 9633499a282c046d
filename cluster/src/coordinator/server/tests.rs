//! The coordinator on loopback, with real clients.

use std::net::Ipv4Addr;
use std::sync::Arc;

use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::client::{Client, JoinOptions, report_exit};
use crate::coordinator::connection::MAX_UNAUTHENTICATED_CONNECTIONS;
use crate::protocol::{
    self, CoordinatorMessage, ExitReport, FailureClass, JoinRequest, PROTOCOL_VERSION, StepReport, Unreported, WorkerMessage,
};
use crate::tls::PinnedKey;

mod secured;

/// Runs each test in clear and by TLS.
macro_rules! in_clear_and_by_tls {
    ($($name:ident),* $(,)?) => {
        mod in_clear {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$name(None).await;
                }
            )*
        }

        mod by_tls {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$name(Some(crate::tls::RunKey::random().unwrap())).await;
                }
            )*
        }
    };
}

in_clear_and_by_tls!(
    two_workers_train_and_finish,
    strangers_are_refused,
    a_lost_worker_is_replaced,
    the_end_of_a_process_on_another_host_is_told,
    a_stop_lets_the_workers_leave,
    giving_up_ends_the_run_and_the_workers,
    silent_connections_are_bounded,
    many_workers_join_at_once,
);

const PATIENCE: Duration = Duration::from_secs(20);

/// A coordinator on loopback, and the launcher's ends of its channels.
struct Sandbox {
    address: SocketAddr,
    pinned: Option<PinnedKey>,
    events: mpsc::Receiver<Event>,
    control: mpsc::Sender<Control>,
    run: JoinHandle<anyhow::Result<RunEnd>>,
}

impl Sandbox {
    async fn start(workers: u32, key: Option<RunKey>) -> Self {
        let pinned = key.as_ref().map(|key| key.pinned().unwrap());
        let options = CoordinatorOptions {
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            token: Secret::new("token"),
            key,
            recipe_hash: "recipe".to_owned(),
            build: "build".to_owned(),
            workers,
            heartbeat_timeout: Duration::from_secs(2),
            join_timeout: Duration::from_secs(20),
            min_workers: None,
            replacement_wait: Duration::ZERO,
            hang: HangLimits { init: PATIENCE, data: PATIENCE, step: PATIENCE, checkpoint: PATIENCE },
            exclude_host_after: 0,
            retries_per_step: 1,
            state_is_replicated: true,
            journal: None,
            past: Past::Over { generation: 0, saved_step: 0 },
            told: None,
            until_step: None,
        };
        let coordinator = Coordinator::bind(options).await.unwrap();
        let address = coordinator.address();
        let (sender, events) = mpsc::channel(1024);
        let (control, orders) = mpsc::channel(16);
        Self { address, pinned, events, control, run: tokio::spawn(coordinator.run(sender, orders)) }
    }

    fn options(&self, worker: u32) -> JoinOptions {
        JoinOptions {
            coordinator: self.address.to_string(),
            token: Secret::new("token"),
            coordinator_key: self.pinned,
            recipe_hash: "recipe".to_owned(),
            build: "build".to_owned(),
            executable: "executable".to_owned(),
            worker,
            collective_address: format!("127.0.0.1:{}", 9000 + worker),
            heartbeat_timeout: Duration::from_secs(2),
            coordinator_grace: Duration::ZERO,
        }
    }

    /// A worker that waits for its first generation.
    async fn join(&self, worker: u32) -> Arc<Client> {
        let client = Arc::new(try_join(self.options(worker)).await.unwrap());
        client.ready(0, None).unwrap();
        client
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
        before: Unreported::default(),
    }
}

async fn two_workers_train_and_finish(key: Option<RunKey>) {
    let sandbox = Sandbox::start(2, key).await;
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

async fn strangers_are_refused(key: Option<RunKey>) {
    let sandbox = Sandbox::start(1, key).await;
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
    let elsewhere = JoinOptions { collective_address: "127.0.0.1:1".to_owned(), ..sandbox.options(0) };
    let failure = try_join(elsewhere).await.unwrap_err().downcast::<Failure>().unwrap();
    assert_eq!(failure.what, "another process already holds this worker's slot");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_protocol_version_is_refused() {
    let sandbox = Sandbox::start(1, None).await;
    let mut socket = TcpStream::connect(sandbox.address).await.unwrap();
    let request = JoinRequest {
        protocol_version: PROTOCOL_VERSION + 1,
        token: Secret::new("token"),
        recipe_hash: "recipe".to_owned(),
        build: "build".to_owned(),
        executable: "executable".to_owned(),
        worker: 0,
        process_id: 1,
        host: "h".to_owned(),
        collective_address: String::new(),
        held: None,
    };
    protocol::write_message(&mut socket, &WorkerMessage::Join(request)).await.unwrap();
    let body = timeout(PATIENCE, protocol::read_frame(&mut socket)).await.unwrap().unwrap().unwrap();
    let CoordinatorMessage::Refused { failure } = protocol::decode(&body).unwrap() else { panic!("refused") };
    assert_eq!(failure.found, Some((PROTOCOL_VERSION + 1).to_string()));
}

async fn a_lost_worker_is_replaced(key: Option<RunKey>) {
    let mut sandbox = Sandbox::start(2, key).await;
    let (survivor, victim) = (sandbox.join(0).await, sandbox.join(1).await);
    let key = started(&survivor).await.3;
    started(&victim).await;
    let (aborted, abort) = std::sync::mpsc::channel();
    survivor.on_abort(Box::new(move |generation, reason: &str| {
        let _ = aborted.send((generation, reason.to_owned()));
    }));

    drop(victim);
    let abort = spawn_blocking(move || abort.recv_timeout(PATIENCE)).await.unwrap().unwrap();
    let host = crate::host::host_name();
    // A closed connection is noticed as such, before a heartbeat is missed.
    assert_eq!(abort, (1, format!("worker 1 (rank 1) on {host} lost: connection closed")));
    survivor.ready(1, Some(8)).unwrap();

    // The exit of a process that the replacement is not: this program pretends to be all workers. It may be heard of after the replacement.
    let process_id = std::process::id() + 1;
    sandbox.control.send(Control::WorkerExited { worker: 1, process_id, status: "SIGKILL".to_owned() }).await.unwrap();
    let replacement = sandbox.join(1).await;
    let (first, second) = (started(&survivor).await, started(&replacement).await);
    assert_eq!((first.0, second.0), (2, 2));
    assert_ne!(first.3, key, "each generation has its own key");
    tokio::join!(finish(survivor, 2, 9, false), finish(replacement, 2, 9, false));
    let mut seen = Vec::new();
    while let Ok(Some(event)) = timeout(PATIENCE, sandbox.events.recv()).await {
        seen.push(event);
    }
    let (class, reason) = (FailureClass::ConnectionClosed, "connection closed".to_owned());
    let lost = Event::WorkerLost { worker: 1, rank: Some(1), host, class, reason };
    assert_eq!(seen.iter().filter(|event| matches!(event, Event::WorkerLost { .. })).collect::<Vec<_>>(), [&lost]);
    assert_eq!(sandbox.end().await.0, RunEnd::Finished { step: 9 });
}

/// Tells as a launcher on another host does.
async fn tell_exit(sandbox: &Sandbox, report: ExitReport) -> anyhow::Result<()> {
    let (address, key) = (sandbox.address.to_string(), sandbox.pinned);
    spawn_blocking(move || report_exit(&address, key.as_ref(), report)).await.unwrap()
}

async fn the_end_of_a_process_on_another_host_is_told(key: Option<RunKey>) {
    let mut sandbox = Sandbox::start(2, key).await;
    let (survivor, victim) = (sandbox.join(0).await, sandbox.join(1).await);
    tokio::join!(started(&survivor), started(&victim));
    let report = ExitReport {
        protocol_version: PROTOCOL_VERSION,
        token: Secret::new("token"),
        worker: 1,
        host: crate::host::host_name(),
        process_id: std::process::id(),
        status: "SIGSEGV".to_owned(),
        tail: "last words".to_owned(),
        dump: Some("/dumps/1".to_owned()),
        is_replaced: true,
    };
    let stranger = ExitReport { token: Secret::new("guess"), ..report.clone() };
    let failure = tell_exit(&sandbox, stranger).await.unwrap_err().downcast::<Failure>().unwrap();
    assert_eq!(failure.what, "the coordinator does not know this token");
    tell_exit(&sandbox, ExitReport { worker: 7, ..report.clone() }).await.unwrap();
    // On another host the same number is another process.
    tell_exit(&sandbox, ExitReport { host: "elsewhere".to_owned(), ..report.clone() }).await.unwrap();
    // The connection of the worker is still open: it is lost by the word alone.
    tell_exit(&sandbox, report).await.unwrap();
    let mut seen = Vec::new();
    while !matches!(seen.last(), Some(Event::GenerationAborted { .. })) {
        seen.push(timeout(PATIENCE, sandbox.events.recv()).await.unwrap().unwrap());
    }
    let lost =
        seen.iter().find_map(|event| if let Event::WorkerLost { worker, reason, .. } = event { Some((*worker, reason)) } else { None });
    assert_eq!(lost, Some((1, &"process ended with SIGSEGV".to_owned())));
    let (path, tail) = ("/dumps/1".to_owned(), "last words".to_owned());
    let exited = Event::WorkerExited { worker: 1, process_id: std::process::id(), status: "SIGSEGV".to_owned(), tail };
    assert!(seen.contains(&Event::StackDumped { worker: 1, process_id: std::process::id(), path }) && seen.contains(&exited), "{seen:?}");
    assert_eq!(seen.iter().filter(|event| matches!(event, Event::WorkerExited { .. })).count(), 1);
    drop(victim);
    let replacement = sandbox.join(1).await;
    survivor.ready(1, Some(0)).unwrap();
    tokio::join!(started(&survivor), started(&replacement));
    tokio::join!(finish(survivor, 2, 9, false), finish(replacement, 2, 9, false));
    assert_eq!(sandbox.end().await.0, RunEnd::Finished { step: 9 });
}

async fn a_stop_lets_the_workers_leave(key: Option<RunKey>) {
    let sandbox = Sandbox::start(1, key).await;
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

async fn giving_up_ends_the_run_and_the_workers(key: Option<RunKey>) {
    let sandbox = Sandbox::start(2, key).await;
    let client = sandbox.join(0).await;
    let failure = Failure::new(FailureKind::Run, "restart budget spent");
    sandbox.control.send(Control::GiveUp { failure: failure.clone() }).await.unwrap();
    assert_eq!(sandbox.end().await.0, RunEnd::Failed(failure));
    let ended = spawn_blocking(move || while client.next(PATIENCE).is_ok_and(|message| message.is_some()) {});
    timeout(PATIENCE, ended).await.unwrap().unwrap();
}

async fn silent_connections_are_bounded(key: Option<RunKey>) {
    let sandbox = Sandbox::start(1, key).await;
    let mut silent = Vec::new();
    for _ in 0..=MAX_UNAUTHENTICATED_CONNECTIONS {
        silent.push(TcpStream::connect(sandbox.address).await.unwrap());
    }
    // Those at the door keep the others waiting until they are closed, and no longer.
    sandbox.join(0).await;
    let mut first = silent.swap_remove(0);
    assert_eq!(timeout(PATIENCE, first.read(&mut [0; 1])).await.unwrap().unwrap(), 0);
}

async fn many_workers_join_at_once(key: Option<RunKey>) {
    let sandbox = Sandbox::start(64, key).await;
    let mut joining = JoinSet::new();
    for worker in 0..64 {
        let options = sandbox.options(worker);
        joining.spawn(async move {
            let client = Arc::new(try_join(options).await.unwrap());
            client.ready(0, None).unwrap();
            let (generation, rank, peers, _) = started(&client).await;
            assert_eq!((generation, rank, peers.len()), (1, worker, 64));
            assert_eq!(peers[worker as usize], format!("127.0.0.1:{}", 9000 + worker));
            client
        });
    }
    let clients = timeout(PATIENCE, joining.join_all()).await.unwrap();
    assert_eq!(clients.len(), 64);
    sandbox.control.send(Control::GiveUp { failure: Failure::new(FailureKind::Run, "enough") }).await.unwrap();
    assert!(matches!(sandbox.end().await.0, RunEnd::Failed(_)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_taken_is_a_failure() {
    let taken = Sandbox::start(1, None).await;
    let error = listen(taken.address).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
}
