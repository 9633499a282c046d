//! One connection: a bounded time to join, then frames both ways until either side ends it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::admission::{self, Errand, Identity};
use crate::protocol::{self, CoordinatorMessage, ExitReport, Frame, FrameError, JoinRequest, WorkerMessage};

/// Longest time from accepting a connection to its join message, TLS included.
const JOIN_MESSAGE_TIMEOUT_S: u64 = 2;

/// Connections that have not shown the token yet. More wait in the listener's queue until one of these has joined or was closed.
pub(super) const MAX_UNAUTHENTICATED_CONNECTIONS: usize = 128;

/// Longest first message, in bytes; a join is a few hundred. Strangers may not make the coordinator keep much.
const MAX_JOIN_BYTES: u32 = 16 << 10;

/// First byte of a connection by TLS: the type of the record that holds a handshake. A join's frame begins with a zero.
const TLS_HANDSHAKE: u8 = 0x16;

/// Its first two bytes where a frame's length was expected: that type, and the version that all versions state there.
const TLS_BEGIN: u64 = 0x1603;

/// Longest rest of a TLS handshake's first message that is taken before it is refused; a few hundred bytes are usual.
const HELLO_BYTES: usize = 4 << 10;

/// Messages that wait for one worker's socket. The coordinator says a handful per generation and two pulses per heartbeat timeout; the
/// leader gets one for each share of a checkpoint, which ten thousand ranks may write at the same moment.
const OUTBOX_MESSAGES: usize = 16 << 10;

/// Bytes that are written at once, so that a long message has made progress or not.
const CHUNK_BYTES: usize = 64 << 10;

/// Longest wait for a worker's socket to take one chunk. Ten thousand workers that are told to start at the same moment share one wire.
const WRITE_TIMEOUT_S: u64 = 30;

/// Where the messages to a worker go; dropping it closes the connection.
pub(super) type Outbox = mpsc::Sender<Frame>;

/// What connection tasks tell the loop.
#[derive(Debug)]
pub(super) enum Input {
    /// A worker showed token, recipe and build.
    Joined {
        /// Number of the connection.
        connection: u64,
        /// What it brought.
        join: JoinRequest,
        /// When.
        at: Instant,
        /// Where its messages go; dropping it closes the connection.
        outbox: Outbox,
    },
    /// A worker said something.
    Message {
        /// Number of the connection.
        connection: u64,
        /// The worker's slot.
        worker: u32,
        /// When it was read.
        at: Instant,
        /// What it said.
        message: WorkerMessage,
    },
    /// A launcher on another host saw a process end.
    Exited(ExitReport),
    /// The connection is gone.
    Closed {
        /// Number of the connection.
        connection: u64,
        /// The worker's slot.
        worker: u32,
        /// How it ended.
        reason: String,
    },
}

/// What all connection tasks share.
pub(super) struct Door {
    /// Who may join.
    pub identity: Identity,
    /// Secures connections, and is why others are refused; `None` speaks in clear.
    pub security: Option<TlsAcceptor>,
    /// Leads to the loop.
    pub inputs: mpsc::Sender<Input>,
}

/// How whoever connected speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speech {
    Clear,
    Tls,
}

/// A connection of which it is known how its side speaks, before its first frame.
enum OpenedStream {
    Clear(TcpStream),
    // Boxed because it is some kilobytes long.
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection closed before its side said anything.
#[derive(Debug, thiserror::Error)]
#[error("the connection closed before it joined")]
struct SaidNothing;

/// What is known of a connection that has not joined yet.
struct Visit {
    connection: u64,
    /// Bounds the connections that have not joined yet.
    permit: OwnedSemaphorePermit,
    door: Arc<Door>,
    /// When it must have joined.
    join_by: Instant,
}

/// Serves one accepted connection until it ends; `permit` bounds the connections that have not joined yet.
pub(super) async fn serve_connection(stream: TcpStream, connection: u64, permit: OwnedSemaphorePermit, door: Arc<Door>) {
    // Small messages must not wait for each other; without the option they are late, not lost.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot switch off Nagle's algorithm");
    }
    let join_by = Instant::now() + Duration::from_secs(JOIN_MESSAGE_TIMEOUT_S);
    let opened = timeout_at(join_by, open(stream, door.security.as_ref())).await;
    let visit = Visit { connection, permit, door, join_by };
    match opened {
        Ok(Ok(OpenedStream::Clear(stream))) => {
            let (reader, writer) = stream.into_split();
            visit.join_and_forward(reader, writer, Speech::Clear).await;
        }
        Ok(Ok(OpenedStream::Tls(stream))) => {
            let (reader, writer) = tokio::io::split(*stream);
            visit.join_and_forward(reader, writer, Speech::Tls).await;
        }
        Ok(Err(error)) => tell_of_stranger(&error),
        Err(_elapsed) => warn_of_late_join(),
    }
}

/// Whoever connects and says nothing only wants to know whether somebody listens, as `cloze join` does.
fn tell_of_stranger(error: &anyhow::Error) {
    if error.is::<SaidNothing>() {
        tracing::debug!("{error}");
    } else if let Some(Failure { what, expected, found, cause, .. }) = error.downcast_ref::<Failure>() {
        // A log line is one line, and a failure may have several.
        let (expected, found, cause) = (expected.as_deref(), found.as_deref(), cause.as_deref());
        tracing::warn!(reason = what, expected, found, cause, "a connection was refused");
    } else {
        tracing::warn!(error = format!("{error:#}"), "a connection was refused");
    }
}

/// Secures a connection that begins as TLS does. One that begins otherwise stays as it is, to be refused in words that its side understands.
async fn open(stream: TcpStream, security: Option<&TlsAcceptor>) -> anyhow::Result<OpenedStream> {
    let Some(acceptor) = security else { return Ok(OpenedStream::Clear(stream)) };
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 {
        return Err(SaidNothing.into());
    }
    if first[0] != TLS_HANDSHAKE {
        return Ok(OpenedStream::Clear(stream));
    }
    Ok(OpenedStream::Tls(Box::new(acceptor.accept(stream).await.context("agree on TLS")?)))
}

impl Visit {
    /// Lets a worker in or refuses it, then forwards both ways until either side ends the connection.
    async fn join_and_forward<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(self, mut reader: R, mut writer: W, speech: Speech) {
        let Self { connection, permit, door, join_by } = self;
        let errand = match timeout_at(join_by, read_errand(&mut reader, &door, speech)).await {
            Ok(Ok(errand)) => errand,
            Ok(Err(error)) => return refuse(&mut writer, error).await,
            Err(_elapsed) => return warn_of_late_join(),
        };
        drop(permit);
        let join = match errand {
            Errand::Join(join) => join,
            Errand::Exit(report) => {
                if door.inputs.send(Input::Exited(report)).await.is_ok() {
                    answer(&mut writer, &CoordinatorMessage::Noted {}).await;
                }
                return;
            }
        };
        let worker = join.worker;
        let (outbox, messages) = mpsc::channel(OUTBOX_MESSAGES);
        if door.inputs.send(Input::Joined { connection, join, at: Instant::now(), outbox }).await.is_err() {
            return;
        }
        let reason = tokio::select! {
            reason = read_messages(&mut reader, connection, worker, &door.inputs) => reason,
            reason = write_messages(&mut writer, messages) => reason,
        };
        // Nobody listens any more once the loop has ended, and then nobody needs to know.
        let _ = door.inputs.send(Input::Closed { connection, worker, reason }).await;
    }
}

fn warn_of_late_join() {
    tracing::warn!(timeout_s = JOIN_MESSAGE_TIMEOUT_S, "a connection did not join in time");
}

async fn read_errand<R: AsyncRead + Unpin>(reader: &mut R, door: &Door, speech: Speech) -> anyhow::Result<Errand> {
    let body = match protocol::read_frame_within(reader, MAX_JOIN_BYTES).await {
        Ok(Some(body)) => body,
        Ok(None) => return Err(SaidNothing.into()),
        Err(FrameError::TooLong { bytes }) if bytes >> 16 == TLS_BEGIN => {
            // What is not read would take the refusal with it: the system resets such a connection.
            let _ = reader.read(&mut [0; HELLO_BYTES]).await?;
            return Err(speaks_otherwise("this coordinator does not speak TLS").into());
        }
        Err(error) => return Err(error.into()),
    };
    // The token is not looked at: it was sent in clear.
    if door.security.is_some() && speech == Speech::Clear {
        return Err(speaks_otherwise("this coordinator speaks TLS only").into());
    }
    admission::admit(&door.identity, &body)
}

fn speaks_otherwise(what: &str) -> Failure {
    Failure::new(FailureKind::Mismatch, what)
        .hint("workers are started by `cloze train` or `cloze join`, which give them the coordinator's key where `cluster.tls` is on")
}

async fn refuse<W: AsyncWrite + Unpin>(writer: &mut W, error: anyhow::Error) {
    tell_of_stranger(&error);
    let failure = match error.downcast::<Failure>() {
        Ok(failure) => failure,
        Err(other) => Failure::new(FailureKind::Mismatch, "the join message is not understood").because(format!("{other:#}")),
    };
    answer(writer, &CoordinatorMessage::Refused { failure }).await;
}

/// The last word on a connection that gets no seat.
async fn answer<W: AsyncWrite + Unpin>(writer: &mut W, message: &CoordinatorMessage) {
    let told = async {
        protocol::write_message(writer, message).await?;
        writer.shutdown().await.map_err(FrameError::from)
    };
    match timeout(Duration::from_secs(WRITE_TIMEOUT_S), told).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection without a seat did not wait for the answer"),
        Err(_elapsed) => tracing::debug!("a connection without a seat does not read"),
    }
}

/// Forwards messages to the loop; returns how the connection ended.
async fn read_messages<R: AsyncRead + Unpin>(reader: &mut R, connection: u64, worker: u32, inputs: &mpsc::Sender<Input>) -> String {
    loop {
        let body = match protocol::read_frame(reader).await {
            Ok(Some(body)) => body,
            Ok(None) => return "connection closed".to_owned(),
            Err(error) => return failed(error),
        };
        let message = match protocol::decode(&body) {
            Ok(message) => message,
            Err(error) => return format!("{:#}", anyhow::Error::new(error)),
        };
        if inputs.send(Input::Message { connection, worker, at: Instant::now(), message }).await.is_err() {
            return "the coordinator ended".to_owned();
        }
    }
}

/// Writes what the loop says until the loop drops the outbox; returns how the connection ended.
async fn write_messages<W: AsyncWrite + Unpin>(writer: &mut W, mut frames: mpsc::Receiver<Frame>) -> String {
    while let Some(frame) = frames.recv().await {
        for chunk in frame.parts().into_iter().flat_map(|part| part.chunks(CHUNK_BYTES)) {
            // TLS holds back what the socket does not take at once, until it is flushed.
            let written = async {
                writer.write_all(chunk).await?;
                writer.flush().await
            };
            match timeout(Duration::from_secs(WRITE_TIMEOUT_S), written).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return failed(error.into()),
                Err(_elapsed) => return format!("connection does not take messages for {WRITE_TIMEOUT_S} s"),
            }
        }
    }
    // The worker sees the end of the stream either way; a failed shutdown means that it is already gone, or that it stands still and does
    // not take the farewell of TLS.
    match timeout(Duration::from_secs(WRITE_TIMEOUT_S), writer.shutdown()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection was already closed"),
        Err(_elapsed) => tracing::debug!("a connection was closed without a farewell"),
    }
    "closed by the coordinator".to_owned()
}

/// A process that is killed closes its sockets; whether the peer sees an end or a reset depends on what was in flight.
fn failed(error: FrameError) -> String {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error {
        FrameError::Io(error) if matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof) => "connection closed".to_owned(),
        other => format!("connection failed: {:#}", anyhow::Error::new(other)),
    }
}
