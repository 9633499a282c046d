//! One connection: a bounded time to join, then frames both ways until either side ends it.

use std::sync::Arc;
use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, timeout};

use super::admission::{self, Identity};
use crate::protocol::{self, CoordinatorMessage, Frame, FrameError, JoinRequest, WorkerMessage};

/// Longest time from accepting a connection to its join message.
const JOIN_MESSAGE_TIMEOUT_S: u64 = 2;

/// Connections that have not shown the token yet. More wait in the listener's queue until one of these has joined or was closed.
pub(super) const MAX_UNAUTHENTICATED_CONNECTIONS: usize = 128;

/// Longest first message, in bytes; a join is a few hundred. Strangers may not make the coordinator keep much.
const MAX_JOIN_BYTES: u32 = 16 << 10;

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
    /// Leads to the loop.
    pub inputs: mpsc::Sender<Input>,
}

/// Serves one accepted connection until it ends; `permit` bounds the connections that have not joined yet.
pub(super) async fn serve(stream: TcpStream, connection: u64, permit: OwnedSemaphorePermit, door: Arc<Door>) {
    // Small messages must not wait for each other; without the option they are late, not lost.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot switch off Nagle's algorithm");
    }
    let (mut reader, mut writer) = stream.into_split();
    let join = match timeout(Duration::from_secs(JOIN_MESSAGE_TIMEOUT_S), read_join(&mut reader, &door.identity)).await {
        Ok(Ok(join)) => join,
        Ok(Err(error)) => {
            refuse(&mut writer, error).await;
            return;
        }
        Err(_elapsed) => {
            tracing::warn!(timeout_s = JOIN_MESSAGE_TIMEOUT_S, "a connection did not join in time");
            return;
        }
    };
    drop(permit);
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

async fn read_join(reader: &mut OwnedReadHalf, identity: &Identity) -> anyhow::Result<JoinRequest> {
    let Some(body) = protocol::read_frame_within(reader, MAX_JOIN_BYTES).await? else {
        anyhow::bail!("the connection closed before it joined")
    };
    admission::admit(identity, &body)
}

async fn refuse(writer: &mut OwnedWriteHalf, error: anyhow::Error) {
    tracing::warn!(error = format!("{error:#}"), "a connection was refused");
    let failure = match error.downcast::<Failure>() {
        Ok(failure) => failure,
        Err(other) => Failure::new(FailureKind::Mismatch, "the join message is not understood").because(format!("{other:#}")),
    };
    let told = async {
        protocol::write_message(writer, &CoordinatorMessage::Refused { failure }).await?;
        writer.shutdown().await.map_err(FrameError::from)
    };
    match timeout(Duration::from_secs(WRITE_TIMEOUT_S), told).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a refused connection did not wait for the reason"),
        Err(_elapsed) => tracing::debug!("a refused connection does not read"),
    }
}

/// Forwards messages to the loop; returns how the connection ended.
async fn read_messages(reader: &mut OwnedReadHalf, connection: u64, worker: u32, inputs: &mpsc::Sender<Input>) -> String {
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
async fn write_messages(writer: &mut OwnedWriteHalf, mut frames: mpsc::Receiver<Frame>) -> String {
    while let Some(frame) = frames.recv().await {
        for chunk in frame.parts().into_iter().flat_map(|part| part.chunks(CHUNK_BYTES)) {
            match timeout(Duration::from_secs(WRITE_TIMEOUT_S), writer.write_all(chunk)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return failed(error.into()),
                Err(_elapsed) => return format!("connection does not take messages for {WRITE_TIMEOUT_S} s"),
            }
        }
    }
    // The worker sees the end of the stream either way; a failed shutdown means that it is already gone.
    if let Err(error) = writer.shutdown().await {
        tracing::debug!(%error, "a connection was already closed");
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
