//! The client against a coordinator of a few lines, and against a real one that is killed and succeeded; in clear and by TLS.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use rustls::{ServerConnection, StreamOwned};
use tokio::runtime::Runtime;
use tokio::sync::mpsc as channel;
use tokio::task::JoinHandle as Task;

use super::*;
use crate::coordinator::{Control, Coordinator, CoordinatorOptions, RunEnd};
use crate::event::Event;
use crate::journal::Past;
use crate::membership::HangLimits;
use crate::protocol::{self, Held, JoinRequest};
use crate::tls::RunKey;

const PATIENCE: Duration = Duration::from_secs(20);

/// A coordinator that sends no pulses is away after twice this.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(2);

/// How a client and its coordinator speak.
#[derive(Clone, Copy)]
enum Stage {
    Clear,
    Tls,
}

/// Runs each test on both stages.
macro_rules! on_both_stages {
    ($($name:ident),* $(,)?) => {
        mod in_clear {
            $(
                #[test]
                fn $name() {
                    super::$name(super::Stage::Clear);
                }
            )*
        }

        mod by_tls {
            $(
                #[test]
                fn $name() {
                    super::$name(super::Stage::Tls);
                }
            )*
        }
    };
}

// Behind the macro, which it uses.
mod secured;

on_both_stages!(
    a_refusal_is_the_coordinators_failure,
    heartbeats_tell_the_progress,
    requests_arrive_while_nobody_waits,
    without_grace_a_lost_coordinator_asks_for_a_stop,
    words_are_kept_and_told_again_with_the_generation_that_is_held,
    last_words_are_repeated_until_they_are_heard,
    a_failure_is_told_once,
    a_worker_that_is_let_go_or_refused_does_not_come_back,
    a_coordinator_that_vanishes_is_noticed,
    a_successor_takes_the_generation_over,
    a_generation_whose_member_is_new_is_not_taken_over,
);

impl Stage {
    /// The coordinator's key.
    fn key(self) -> Option<RunKey> {
        matches!(self, Self::Tls).then(|| run_key('1'))
    }

    fn options(self, coordinator: &str, worker: u32) -> JoinOptions {
        JoinOptions {
            coordinator: coordinator.to_owned(),
            token: Secret::new("t"),
            coordinator_key: self.key().map(|key| key.pinned().unwrap()),
            recipe_hash: "r".to_owned(),
            build: "b".to_owned(),
            executable: "e".to_owned(),
            worker,
            collective_address: format!("127.0.0.1:{}", 9000 + worker),
            heartbeat_timeout: HEARTBEAT_TIMEOUT,
            coordinator_grace: Duration::ZERO,
        }
    }

    /// Accepts one connection, takes its join, and answers.
    fn receive(self, listener: &TcpListener, answer: &CoordinatorMessage) -> (JoinRequest, End) {
        let (socket, _) = listener.accept().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut end = match self.key() {
            None => End::Clear(socket),
            Some(key) => End::Tls(Box::new(StreamOwned::new(ServerConnection::new(key.server_config().unwrap()).unwrap(), socket))),
        };
        let WorkerMessage::Join(request) = hear(&mut end) else { panic!("a join") };
        say(&mut end, answer);
        (request, end)
    }

    /// A client that waits for its coordinator for `grace`, the listener, and the coordinator's end of the connection.
    fn seat(self, grace: Duration) -> (Client, TcpListener, End) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let joining = std::thread::spawn(move || Client::join(JoinOptions { coordinator_grace: grace, ..self.options(&address, 0) }));
        let (request, socket) = self.receive(&listener, &CoordinatorMessage::Welcome { adopted: false });
        assert_eq!(request.held, None);
        (joining.join().unwrap().unwrap(), listener, socket)
    }
}

/// A key of one digit.
fn run_key(digit: char) -> RunKey {
    serde_json::from_value(serde_json::Value::from(digit.to_string().repeat(64))).unwrap()
}

/// The coordinator's end of a connection.
enum End {
    Clear(TcpStream),
    Tls(Box<StreamOwned<ServerConnection, TcpStream>>),
}

impl Read for End {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Clear(socket) => socket.read(bytes),
            Self::Tls(stream) => stream.read(bytes),
        }
    }
}

impl Write for End {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Clear(socket) => socket.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Clear(socket) => socket.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

fn hear(socket: &mut End) -> WorkerMessage {
    let body = protocol::read_frame_blocking(socket).unwrap().unwrap();
    protocol::decode(&body).unwrap()
}

/// The next message that is no heartbeat.
fn hear_word(socket: &mut End) -> WorkerMessage {
    loop {
        match hear(socket) {
            WorkerMessage::Heartbeat { .. } => {}
            other => return other,
        }
    }
}

fn say(socket: &mut End, message: &CoordinatorMessage) {
    protocol::write_message_blocking(socket, message).unwrap();
}

fn start(generation: u64) -> CoordinatorMessage {
    CoordinatorMessage::Start {
        generation,
        rank: 0,
        members: vec![0],
        peers: vec!["127.0.0.1:9000".to_owned()],
        collective_key: Secret::new("k"),
        source: protocol::StateSource::Checkpoint,
        until_step: None,
        saves_only: false,
    }
}

/// A callback and what it was called with.
fn recorder() -> (AbortCallback, Receiver<(u64, String)>) {
    let (calls, seen) = mpsc::channel();
    let callback = move |generation, reason: &str| {
        // A test that has seen enough does not listen any more.
        let _ = calls.send((generation, reason.to_owned()));
    };
    (Box::new(callback), seen)
}

fn next(client: &Client) -> CoordinatorMessage {
    client.next(PATIENCE).unwrap().unwrap()
}

fn a_refusal_is_the_coordinators_failure(stage: Stage) {
    let failure = Failure::new(FailureKind::Mismatch, "another recipe").expected("a").found("b");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let joining = std::thread::spawn(move || Client::join(stage.options(&address, 0)));
    let (_, _socket) = stage.receive(&listener, &CoordinatorMessage::Refused { failure: failure.clone() });
    assert_eq!(joining.join().unwrap().unwrap_err().downcast::<Failure>().unwrap(), failure);
}

#[test]
fn an_unreachable_coordinator_is_no_fault_of_the_machine() {
    // Nobody listens on the first port; a replacement may find the coordinator back.
    let failure = Client::join(Stage::Clear.options("127.0.0.1:1", 0)).unwrap_err().downcast::<Failure>().unwrap();
    assert_eq!((failure.kind, failure.place.as_deref()), (FailureKind::Run, Some("127.0.0.1:1")));
}

#[test]
fn the_wait_after_the_last_words_outlasts_a_silence() {
    for (heartbeat_ms, wait_ms) in [(1, 5_000), (2_000, 5_000), (2_500, 6_000), (60_000, 121_000)] {
        assert_eq!(leave_timeout(Duration::from_millis(heartbeat_ms)), Duration::from_millis(wait_ms), "{heartbeat_ms}");
    }
}

fn heartbeats_tell_the_progress(stage: Stage) {
    let (client, _listener, mut socket) = stage.seat(PATIENCE);
    client.progress(3, 41, Phase::Training);
    client.set_waiting(true);
    client.set_waiting(true);
    let wanted = WorkerMessage::Heartbeat { generation: 3, step: 41, phase: Phase::Training, waiting: true, progress: 2 };
    assert!((0..10).any(|_| hear(&mut socket) == wanted));
    client.ready(3, Some(40)).unwrap();
    assert_eq!(hear_word(&mut socket), WorkerMessage::Ready { generation: 3, state_step: Some(40), share: None });
    let wanted = WorkerMessage::Heartbeat { generation: 3, step: 40, phase: Phase::Joining, waiting: false, progress: 3 };
    assert_eq!(hear(&mut socket), wanted);
}

fn requests_arrive_while_nobody_waits(stage: Stage) {
    let (client, _listener, mut socket) = stage.seat(PATIENCE);
    let (callback, calls) = recorder();
    client.on_abort(callback);
    assert_eq!((client.stop_requested(), client.regroup_requested(4), client.take_save_request()), (None, None, None));
    say(&mut socket, &CoordinatorMessage::Pulse {});
    say(&mut socket, &CoordinatorMessage::Save { reason: "SIGUSR1".to_owned() });
    say(&mut socket, &CoordinatorMessage::Regroup { generation: 4, reason: "worker 1 joined".to_owned() });
    say(&mut socket, &CoordinatorMessage::Stop { reason: "SIGTERM".to_owned() });
    let abort = CoordinatorMessage::Abort { generation: 4, reason: "worker 1 (rank 1) lost".to_owned() };
    say(&mut socket, &abort);
    assert_eq!(calls.recv_timeout(PATIENCE).unwrap(), (4, "worker 1 (rank 1) lost".to_owned()));
    assert_eq!(client.stop_requested().as_deref(), Some("SIGTERM"));
    assert_eq!(client.regroup_requested(4).as_deref(), Some("worker 1 joined"));
    assert_eq!(client.regroup_requested(5), None, "another generation");
    assert_eq!(client.take_save_request().as_deref(), Some("SIGUSR1"));
    assert_eq!(client.take_save_request(), None, "each request once");
    assert!(matches!(next(&client), CoordinatorMessage::Regroup { .. }));
    assert!(matches!(next(&client), CoordinatorMessage::Stop { .. }));
    assert_eq!(next(&client), abort);
    assert_eq!(client.next(Duration::ZERO).unwrap(), None);

    let (late_callback, late_calls) = recorder();
    client.on_abort(late_callback);
    assert_eq!(late_calls.try_recv().unwrap().0, 4, "an abort before the registration is told at once");
}

fn without_grace_a_lost_coordinator_asks_for_a_stop(stage: Stage) {
    let (client, listener, mut socket) = stage.seat(Duration::ZERO);
    let (callback, calls) = recorder();
    client.on_abort(callback);
    say(&mut socket, &start(1));
    assert_eq!(next(&client), start(1));
    drop((socket, listener));
    let failure = client.next(PATIENCE).unwrap_err().downcast::<Failure>().unwrap();
    assert_eq!(failure.what, "the coordinator is lost");
    assert_eq!(client.stop_requested().as_deref(), Some("the coordinator is gone for 0 s"));
    assert!(calls.try_recv().is_err(), "the generation goes on");
    client.send(&WorkerMessage::Broken { generation: 1, reason: "x".to_owned() }).unwrap();
    assert!(client.wait_shares(1, 10, 2, Instant::now() + PATIENCE).is_err(), "nobody can say that the others have saved");
    client.finish(1, 9, true).unwrap();
}

fn words_are_kept_and_told_again_with_the_generation_that_is_held(stage: Stage) {
    let (client, listener, mut socket) = stage.seat(PATIENCE);
    let (callback, calls) = recorder();
    client.on_abort(callback);
    say(&mut socket, &start(1));
    assert_eq!(next(&client), start(1));
    client.progress(1, 17, Phase::Training);
    drop(socket);

    let (request, mut socket) = stage.receive(&listener, &CoordinatorMessage::Welcome { adopted: true });
    assert_eq!(request.held, Some(Held { generation: 1, step: 17 }));
    assert!(calls.try_recv().is_err(), "a generation that is adopted goes on");
    let share = WorkerMessage::ShareSaved { generation: 1, step: 17, files: Vec::new() };
    client.send(&share).unwrap();
    assert_eq!(hear_word(&mut socket), share);
    drop(socket);

    let (_, mut socket) = stage.receive(&listener, &CoordinatorMessage::Welcome { adopted: false });
    assert_eq!(calls.recv_timeout(PATIENCE).unwrap().0, 1, "a generation that was ended meanwhile is left");
    let broken = WorkerMessage::Broken { generation: 1, reason: "cut".to_owned() };
    client.send(&broken).unwrap();
    assert_eq!(hear_word(&mut socket), broken);
    client.ready(1, Some(17)).unwrap();
    let ready = WorkerMessage::Ready { generation: 1, state_step: Some(17), share: None };
    assert_eq!(hear_word(&mut socket), ready);
    drop(socket);

    let (request, mut socket) = stage.receive(&listener, &CoordinatorMessage::Welcome { adopted: false });
    assert_eq!(request.held, None);
    assert_eq!(hear_word(&mut socket), ready, "the new coordinator is told that this worker waits");
}

fn last_words_are_repeated_until_they_are_heard(stage: Stage) {
    let (client, listener, mut socket) = stage.seat(PATIENCE);
    let finished = WorkerMessage::Finished { generation: 1, step: 9, stopped: true };
    let words = finished.clone();
    let server = std::thread::spawn(move || {
        assert_eq!(hear_word(&mut socket), words);
        drop(socket);
        let (_, mut socket) = stage.receive(&listener, &CoordinatorMessage::Welcome { adopted: false });
        assert_eq!(hear_word(&mut socket), words, "a connection that closes may have lost them");
        say(&mut socket, &CoordinatorMessage::Released {});
    });
    client.finish(1, 9, true).unwrap();
    server.join().unwrap();
}

fn a_failure_is_told_once(stage: Stage) {
    let (client, _listener, mut socket) = stage.seat(PATIENCE);
    client.progress(2, 7, Phase::Training);
    let server = std::thread::spawn(move || hear_word(&mut socket));
    client.fail(Failure::new(FailureKind::Run, "out of memory"), FailureClass::OutOfMemory).unwrap();
    let told = server.join().unwrap();
    assert!(
        matches!(told, WorkerMessage::Failed { class: FailureClass::OutOfMemory, generation: 2, step: 7, culprit: true, .. }),
        "{told:?}"
    );
}

fn a_worker_that_is_let_go_or_refused_does_not_come_back(stage: Stage) {
    let (client, listener, mut socket) = stage.seat(PATIENCE);
    let (callback, calls) = recorder();
    client.on_abort(callback);
    say(&mut socket, &CoordinatorMessage::Released {});
    drop((socket, listener));
    assert_eq!(calls.recv_timeout(PATIENCE).unwrap().0, EVERY_GENERATION);
    assert_eq!(client.next(PATIENCE).unwrap_err().downcast::<Failure>().unwrap().what, "the coordinator is lost");
    assert!(client.send(&WorkerMessage::Ping { id: 1 }).is_err());

    let (client, listener, socket) = stage.seat(PATIENCE);
    let (callback, calls) = recorder();
    client.on_abort(callback);
    drop(socket);
    let failure = Failure::new(FailureKind::Run, "this worker made no progress and has lost its seat");
    stage.receive(&listener, &CoordinatorMessage::Refused { failure: failure.clone() });
    assert_eq!(calls.recv_timeout(PATIENCE).unwrap().0, EVERY_GENERATION);
    assert_eq!(next(&client), CoordinatorMessage::Refused { failure: failure.clone() });
    assert_eq!(client.next(PATIENCE).unwrap_err().downcast::<Failure>().unwrap(), failure);
    assert!(client.stop_requested().unwrap().contains("lost its seat"));
}

fn a_coordinator_that_vanishes_is_noticed(stage: Stage) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let heartbeat_timeout = Duration::from_millis(100);
    let joining = std::thread::spawn(move || {
        Client::join(JoinOptions { heartbeat_timeout, coordinator_grace: PATIENCE, ..stage.options(&address, 0) })
    });
    let (_, _silent) = stage.receive(&listener, &CoordinatorMessage::Welcome { adopted: false });
    let _client = joining.join().unwrap().unwrap();
    // The first connection stays open and says nothing; the worker joins again by itself.
    let (request, _socket) = stage.receive(&listener, &CoordinatorMessage::Welcome { adopted: false });
    assert_eq!(request.worker, 0);
}

/// A coordinator that can be killed and succeeded.
struct Controller {
    runtime: Runtime,
    run: Task<anyhow::Result<RunEnd>>,
    events: channel::Receiver<Event>,
    seen: Vec<Event>,
    _control: channel::Sender<Control>,
    address: SocketAddr,
}

impl Controller {
    fn start(stage: Stage, bind: SocketAddr, journal: &Path, past: Past) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let options = CoordinatorOptions {
            bind,
            token: Secret::new("t"),
            key: stage.key(),
            recipe_hash: "r".to_owned(),
            build: "b".to_owned(),
            workers: 2,
            heartbeat_timeout: HEARTBEAT_TIMEOUT,
            join_timeout: PATIENCE,
            min_workers: None,
            replacement_wait: Duration::ZERO,
            hang: HangLimits { init: PATIENCE, data: PATIENCE, step: PATIENCE, checkpoint: PATIENCE },
            exclude_host_after: 0,
            retries_per_step: 1,
            state_is_replicated: true,
            journal: Some(journal.to_owned()),
            past,
            told: None,
            until_step: None,
        };
        let coordinator = runtime.block_on(Coordinator::bind(options)).unwrap();
        let address = coordinator.address();
        let (sender, events) = channel::channel(1024);
        let (control, orders) = channel::channel(16);
        let run = runtime.spawn(coordinator.run(sender, orders));
        Self { runtime, run, events, seen: Vec::new(), _control: control, address }
    }

    /// Ends without a word, as SIGKILL does: every socket is closed when this returns.
    fn kill(self) {
        drop(self.runtime);
    }

    /// The first event that `wanted` takes, from the start on.
    fn event(&mut self, wanted: impl Fn(&Event) -> bool) -> Event {
        let mut index = 0;
        loop {
            while let Some(event) = self.seen.get(index) {
                if wanted(event) {
                    return event.clone();
                }
                index += 1;
            }
            let event = self.events.recv();
            let event = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, event).await });
            self.seen.push(event.unwrap().unwrap());
        }
    }

    fn end(self) -> RunEnd {
        let Self { runtime, run, .. } = self;
        runtime.block_on(async { tokio::time::timeout(PATIENCE, run).await.unwrap().unwrap().unwrap() })
    }
}

/// Returns when the client has noticed that its coordinator is gone; what is said before that may be lost with the connection.
fn await_loss(client: &Client) {
    let deadline = Instant::now() + PATIENCE;
    while !lock(&client.shared.line).is_away() {
        assert!(Instant::now() < deadline, "the loss is not noticed");
        std::thread::yield_now();
    }
}

fn next_start(client: &Client) -> u64 {
    loop {
        if let CoordinatorMessage::Start { generation, .. } = next(client) {
            return generation;
        }
    }
}

fn a_successor_takes_the_generation_over(stage: Stage) {
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("journal.jsonl");
    let first = Controller::start(stage, SocketAddr::from(([127, 0, 0, 1], 0)), &journal, Past::Over { generation: 0, saved_step: 0 });
    let address = first.address;
    let clients: Vec<Client> = (0..2)
        .map(|worker| Client::join(JoinOptions { coordinator_grace: PATIENCE, ..stage.options(&address.to_string(), worker) }).unwrap())
        .collect();
    let (callback, aborts) = recorder();
    clients[0].on_abort(callback);
    for client in &clients {
        client.ready(0, None).unwrap();
    }
    for client in &clients {
        assert_eq!(next_start(client), 1);
        client.progress(1, 30, Phase::Training);
    }
    first.kill();
    await_loss(&clients[0]);
    // Said to nobody, and heard by the successor.
    clients[0].send(&WorkerMessage::CheckpointFailed { generation: 1, step: 30, reason: "disk full".to_owned() }).unwrap();

    let mut second = Controller::start(stage, address, &journal, Past::MayRun);
    let restarted = second.event(|event| matches!(event, Event::CoordinatorRestarted { .. } | Event::GenerationStarted { .. }));
    assert_eq!(restarted, Event::CoordinatorRestarted { generation: 1, adopted: true });
    second.event(|event| matches!(event, Event::Warning { message } if message.contains("disk full")));
    assert!(aborts.try_recv().is_err(), "the generation goes on");

    // The share of one member still reaches the leader.
    clients[1].send(&WorkerMessage::ShareSaved { generation: 1, step: 30, files: Vec::new() }).unwrap();
    assert_eq!(clients[0].wait_shares(1, 30, 2, Instant::now() + PATIENCE).unwrap(), Vec::new());
    for client in &clients {
        client.finish(1, 40, false).unwrap();
    }
    assert_eq!(second.end(), RunEnd::Finished { step: 40 });
}

fn a_generation_whose_member_is_new_is_not_taken_over(stage: Stage) {
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("journal.jsonl");
    let first = Controller::start(stage, SocketAddr::from(([127, 0, 0, 1], 0)), &journal, Past::Over { generation: 0, saved_step: 0 });
    let address = first.address;
    let join = |worker| Client::join(JoinOptions { coordinator_grace: PATIENCE, ..stage.options(&address.to_string(), worker) }).unwrap();
    let (survivor, victim) = (join(0), join(1));
    for client in [&survivor, &victim] {
        client.ready(0, None).unwrap();
    }
    assert_eq!((next_start(&survivor), next_start(&victim)), (1, 1));
    first.kill();
    drop(victim);

    let mut second = Controller::start(stage, address, &journal, Past::MayRun);
    let (callback, aborts) = recorder();
    survivor.on_abort(callback);
    let replacement = join(1);
    assert_eq!(aborts.recv_timeout(PATIENCE).unwrap().0, 1);
    let restarted = second.event(|event| matches!(event, Event::CoordinatorRestarted { .. }));
    assert_eq!(restarted, Event::CoordinatorRestarted { generation: 1, adopted: false });
    survivor.ready(1, Some(12)).unwrap();
    replacement.ready(0, None).unwrap();
    let source = loop {
        if let CoordinatorMessage::Start { generation: 2, source, .. } = next(&replacement) {
            break source;
        }
    };
    assert_eq!(source, protocol::StateSource::Peer { rank: 0, step: 12 });
    assert_eq!(next_start(&survivor), 2);
}
