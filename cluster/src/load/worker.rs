//! One pretended worker: everything that the coordinator sees of a real one, and nothing else.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use cloze_recipes::failure::{Failure, FailureKind};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_rustls::TlsConnector;

use crate::protocol::{
    self, CoordinatorMessage, JoinRequest, MAX_FRAME_BYTES, PROTOCOL_VERSION, Phase, StepReport, Unreported, WorkerMessage,
};
use crate::secret::Secret;
use crate::tls::coordinator_name;

/// Recipe and build that both sides of a load test state.
pub(super) const RECIPE_HASH: &str = "load";
pub(super) const BUILD: &str = "load";

/// Time from one heartbeat to the next.
const HEARTBEAT_S: u64 = 1;

/// Connections from one loopback address. The kernel has some 28,000 ports for each.
const CONNECTIONS_PER_ADDRESS: u32 = 20_000;

/// Bytes of a frame's begin that say enough about a start; its lists grow with the number of workers and are not kept.
const HEAD_BYTES: usize = 128;

/// Bytes that are read from a socket at a time. Small, for there are thousands.
const READ_BYTES: usize = 1024;

/// Longest message but a start, in bytes.
const MAX_WORD_BYTES: usize = 64 << 10;

/// What all pretended workers share.
pub(super) struct Crowd {
    /// The coordinator.
    pub address: SocketAddr,
    /// The token.
    pub token: Secret,
    /// Secures their connections; `None` speaks in clear.
    pub security: Option<TlsConnector>,
    /// How many they are.
    pub num_workers: u32,
    /// Bounds the connections that are not welcome yet.
    pub connecting: Semaphore,
    /// Leads to the measuring loop.
    pub progress: mpsc::Sender<Progress>,
    /// What is going on.
    pub stage: watch::Receiver<Stage>,
    /// What was measured.
    pub answers: Answers,
}

/// What is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Workers join and start.
    Gathering,
    /// Answers count.
    Measuring,
    /// Workers leave.
    Over,
}

/// What a worker tells the measuring loop.
#[derive(Debug)]
pub(super) enum Progress {
    /// It is welcome.
    Joined,
    /// It was told to start.
    Started,
    /// It cannot go on.
    Failed(anyhow::Error),
}

/// Times from questions to answers, of all workers.
#[derive(Default)]
pub(super) struct Answers {
    latencies_us: Mutex<Vec<u32>>,
    late: AtomicU64,
}

impl Answers {
    /// The times in microseconds, sorted, and how many questions were left out because the one before had no answer yet.
    pub(super) fn take(&self) -> (Vec<u32>, u64) {
        let mut latencies_us = std::mem::take(&mut *held(&self.latencies_us));
        latencies_us.sort_unstable();
        (latencies_us, self.late.load(Ordering::Relaxed))
    }

    fn add(&self, latency: Duration) {
        held(&self.latencies_us).push(u32::try_from(latency.as_micros()).unwrap_or(u32::MAX));
    }
}

/// What the two halves of a worker share.
#[derive(Default)]
struct Seat {
    /// Newest generation; 0 before the first.
    generation: AtomicU64,
    /// Rank in it.
    rank: AtomicU64,
    /// The question that has no answer yet, and when it was asked.
    asked: Mutex<Option<(u64, Instant)>>,
}

/// Is a worker until the measurement is over; tells the measuring loop where it fails.
pub(super) async fn pretend(worker: u32, crowd: Arc<Crowd>) {
    let mut stage = crowd.stage.clone();
    let result = tokio::select! {
        result = live(worker, &crowd) => result,
        () = over(&mut stage) => Ok(()),
    };
    if let Err(error) = result {
        // The measuring loop may have heard of another failure first.
        let _ = crowd.progress.send(Progress::Failed(error)).await;
    }
}

/// Waits until the measurement is over. The measuring loop that is gone has ended it, too.
async fn over(stage: &mut watch::Receiver<Stage>) {
    let _ = stage.wait_for(|stage| *stage == Stage::Over).await;
}

async fn live(worker: u32, crowd: &Crowd) -> anyhow::Result<()> {
    let permit = crowd.connecting.acquire().await.context("wait to connect")?;
    let stream = connect(worker, crowd.address).await.with_context(|| format!("connect worker {worker} to {}", crowd.address))?;
    stream.set_nodelay(true).context("switch off Nagle's algorithm")?;
    match &crowd.security {
        None => {
            let (reader, writer) = stream.into_split();
            work(worker, crowd, permit, (reader, writer)).await
        }
        Some(connector) => {
            let secured =
                connector.connect(coordinator_name()?, stream).await.with_context(|| format!("agree on TLS as worker {worker}"))?;
            let (reader, writer) = tokio::io::split(secured);
            work(worker, crowd, permit, (reader, writer)).await
        }
    }
}

/// Joins over a connection, then says and hears what a worker does.
async fn work<R, W>(worker: u32, crowd: &Crowd, permit: SemaphorePermit<'_>, (reader, mut writer): (R, W)) -> anyhow::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut reader = BufReader::with_capacity(READ_BYTES, reader);
    join(worker, crowd, &mut reader, &mut writer).await?;
    drop(permit);
    crowd.progress.send(Progress::Joined).await.context("report a worker that has joined")?;
    protocol::write_message(&mut writer, &WorkerMessage::Ready { generation: 0, state_step: None, share: None })
        .await
        .context("say ready")?;
    let seat = Seat::default();
    tokio::try_join!(listen(&mut reader, worker, crowd, &seat), speak(&mut writer, worker, crowd, &seat))?;
    Ok(())
}

/// Asks for a seat and waits for it.
async fn join<R, W>(worker: u32, crowd: &Crowd, reader: &mut R, writer: &mut W) -> anyhow::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let request = JoinRequest {
        protocol_version: PROTOCOL_VERSION,
        token: crowd.token.clone(),
        recipe_hash: RECIPE_HASH.to_owned(),
        build: BUILD.to_owned(),
        executable: BUILD.to_owned(),
        worker,
        process_id: std::process::id(),
        host: "load".to_owned(),
        // As long as a real one; nobody connects to it.
        collective_address: format!("10.{}.{}.{}:29500", worker >> 16, (worker >> 8) & 255, worker & 255),
        held: None,
    };
    protocol::write_message(writer, &WorkerMessage::Join(request)).await.with_context(|| format!("join as worker {worker}"))?;
    match next_word(reader).await? {
        Word::Said(CoordinatorMessage::Welcome { .. }) => Ok(()),
        other => Err(other.unexpected(worker)),
    }
}

async fn connect(worker: u32, address: SocketAddr) -> std::io::Result<TcpStream> {
    let spread = worker / CONNECTIONS_PER_ADDRESS;
    if spread == 0 || !address.ip().is_loopback() || !address.is_ipv4() {
        return TcpStream::connect(address).await;
    }
    // 127.0.0.2 and on: every address of 127.0.0.0/8 is this machine.
    let source = Ipv4Addr::new(127, 0, 0, u8::try_from(1 + spread).unwrap_or(u8::MAX));
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(IpAddr::V4(source), 0))?;
    socket.connect(address).await
}

/// Hears what the coordinator says until the connection ends.
async fn listen<R: AsyncRead + Unpin>(reader: &mut R, worker: u32, crowd: &Crowd, seat: &Seat) -> anyhow::Result<()> {
    loop {
        match next_word(reader).await? {
            Word::Start { generation, rank } => {
                seat.rank.store(rank, Ordering::Relaxed);
                seat.generation.store(generation, Ordering::Relaxed);
                crowd.progress.send(Progress::Started).await.context("report a worker that has started")?;
            }
            Word::Said(CoordinatorMessage::Pong { id }) => {
                let asked = held(&seat.asked).take_if(|(asked, _)| *asked == id);
                if let Some((_, at)) = asked.filter(|_| *crowd.stage.borrow() == Stage::Measuring) {
                    crowd.answers.add(at.elapsed());
                }
            }
            Word::Said(CoordinatorMessage::Pulse {}) => {}
            other => return Err(other.unexpected(worker)),
        }
    }
}

/// Sends a heartbeat a second with a question; the leader also reports a step.
async fn speak<W: AsyncWrite + Unpin>(writer: &mut W, worker: u32, crowd: &Crowd, seat: &Seat) -> anyhow::Result<()> {
    let period = Duration::from_secs(HEARTBEAT_S);
    // Spread over the period, as the workers of a real run are.
    let mut ticks = interval_at(Instant::now() + period * worker / crowd.num_workers, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut progress = 0;
    loop {
        ticks.tick().await;
        progress += 1;
        let generation = seat.generation.load(Ordering::Relaxed);
        let phase = if generation == 0 { Phase::Joining } else { Phase::Training };
        let heartbeat = WorkerMessage::Heartbeat { generation, step: progress, phase, waiting: false, progress };
        let mut bytes = protocol::encode(&heartbeat)?;
        if generation > 0 && seat.rank.load(Ordering::Relaxed) == 0 {
            bytes.extend(protocol::encode(&WorkerMessage::Step { generation, report: report(progress) })?);
        }
        if ask(seat, progress) {
            bytes.extend(protocol::encode(&WorkerMessage::Ping { id: progress })?);
        } else if *crowd.stage.borrow() == Stage::Measuring {
            crowd.answers.late.fetch_add(1, Ordering::Relaxed);
        }
        // TLS holds back what the socket does not take at once, until it is flushed.
        let sent = async {
            writer.write_all(&bytes).await?;
            writer.flush().await
        };
        sent.await.with_context(|| format!("send a heartbeat of worker {worker}"))?;
    }
}

/// Notes a question; false where the one before has no answer yet.
fn ask(seat: &Seat, id: u64) -> bool {
    let mut asked = held(&seat.asked);
    let free = asked.is_none();
    if free {
        *asked = Some((id, Instant::now()));
    }
    free
}

/// A step that is plausible; the coordinator passes its numbers on and looks at none but the first.
fn report(step: u64) -> StepReport {
    StepReport {
        step,
        loss: 1.0,
        learning_rate: 1e-4,
        gradient_norm: 1.0,
        examples: 4096,
        tokens: 1 << 20,
        labels: 4096,
        seconds: 1.0,
        examples_per_s: 4096.0,
        tokens_per_s: 1_048_576.0,
        before: Unreported::default(),
    }
}

/// What a worker hears.
#[derive(Debug)]
enum Word {
    /// A generation starts. Its lists are passed over.
    Start { generation: u64, rank: u64 },
    /// Anything else.
    Said(CoordinatorMessage),
    /// The connection is closed.
    Closed,
}

impl Word {
    /// The failure of a worker that should not have heard this.
    fn unexpected(self, worker: u32) -> anyhow::Error {
        let failed = |what: String| anyhow::Error::from(Failure::new(FailureKind::Run, what).at(format!("worker {worker}")));
        match self {
            Self::Said(CoordinatorMessage::Refused { failure }) => failure.into(),
            Self::Said(CoordinatorMessage::Abort { reason, .. }) => failed(format!("the generation was aborted under load: {reason}")),
            Self::Closed => failed("the coordinator closed a connection under load".to_owned()),
            other => failed(format!("the coordinator said something unexpected: {other:?}")),
        }
    }
}

/// Reads one frame. Of a long one only the begin is kept, as thousands of starts at once would not fit into memory.
async fn next_word<R: AsyncRead + Unpin>(reader: &mut R) -> anyhow::Result<Word> {
    let mut length = [0; 4];
    if reader.read(&mut length[..1]).await.context("read from the coordinator")? == 0 {
        return Ok(Word::Closed);
    }
    reader.read_exact(&mut length[1..]).await.context("read from the coordinator")?;
    let length = u32::from_be_bytes(length);
    if length > MAX_FRAME_BYTES {
        bail!("the coordinator sent a frame of {length} bytes");
    }
    let length = length as usize;
    let mut body = vec![0; length.min(HEAD_BYTES)];
    reader.read_exact(&mut body).await.context("read from the coordinator")?;
    if let Some((generation, rank)) = start_of(&body) {
        let rest = (length - body.len()) as u64;
        let skipped = tokio::io::copy(&mut reader.take(rest), &mut tokio::io::sink()).await.context("read a start")?;
        return if skipped == rest { Ok(Word::Start { generation, rank }) } else { Ok(Word::Closed) };
    }
    if length > MAX_WORD_BYTES {
        bail!("the coordinator sent a message of {length} bytes that is no start");
    }
    let head = body.len();
    body.resize(length, 0);
    reader.read_exact(&mut body[head..]).await.context("read from the coordinator")?;
    Ok(Word::Said(protocol::decode(&body)?))
}

/// Generation and rank of a start, from the begin of its JSON; `None` for any other message.
fn start_of(head: &[u8]) -> Option<(u64, u64)> {
    let head = String::from_utf8_lossy(head);
    let fields = head.strip_prefix("{\"message\":\"start\",")?;
    let number = |name: &str| {
        let (_, value) = fields.split_once(&format!("\"{name}\":"))?;
        let (digits, _) = value.split_once(|character: char| !character.is_ascii_digit())?;
        digits.parse().ok()
    };
    Some((number("generation")?, number("rank")?))
}

/// The value of a lock; what a thread that panicked left is as good as any other.
fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::StateSource;

    fn start(num_workers: u32) -> Vec<u8> {
        protocol::encode(&CoordinatorMessage::Start {
            generation: 3,
            rank: 17,
            members: (0..num_workers).collect(),
            peers: (0..num_workers).map(|worker| format!("10.0.0.1:{worker}")).collect(),
            collective_key: Secret::new("key"),
            source: StateSource::Checkpoint,
            until_step: None,
            saves_only: false,
        })
        .unwrap()
    }

    #[tokio::test]
    async fn a_long_start_is_understood_by_its_begin() {
        for num_workers in [1, 5_000] {
            let mut wire = start(num_workers);
            wire.extend(protocol::encode(&CoordinatorMessage::Pong { id: 4 }).unwrap());
            let mut reader = wire.as_slice();
            let Word::Start { generation, rank } = next_word(&mut reader).await.unwrap() else { panic!("a start") };
            assert_eq!((generation, rank), (3, 17));
            let Word::Said(CoordinatorMessage::Pong { id: 4 }) = next_word(&mut reader).await.unwrap() else { panic!("what comes next") };
            assert!(matches!(next_word(&mut reader).await.unwrap(), Word::Closed));
        }
    }

    #[test]
    fn only_a_start_is_one() {
        assert_eq!(start_of(br#"{"message":"start","rank":4,"generation":12,"members":[0,"#), Some((12, 4)));
        assert_eq!(start_of(br#"{"message":"start","rank":4}"#), None);
        assert_eq!(start_of(br#"{"message":"stop","rank":4,"generation":12,"#), None);
        assert_eq!(start_of(b""), None);
    }

    #[test]
    fn one_question_at_a_time() {
        let seat = Seat::default();
        assert!(ask(&seat, 1));
        assert!(!ask(&seat, 2));
        assert!(held(&seat.asked).take_if(|(id, _)| *id == 1).is_some());
        assert!(ask(&seat, 3));
    }
}
