//! Frames: a big-endian `u32` length and that many bytes of JSON, on tokio and on blocking sockets.

use std::fmt;
use std::io;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::{CoordinatorMessage, StateSource};
use crate::secret::Secret;

/// Longest frame body, in bytes. The largest real message is a start with one address per worker: 10,000 workers at up to 64 bytes
/// each are 640 kB, so this is enough for 50,000.
pub const MAX_FRAME_BYTES: u32 = 4 << 20;

/// Bytes of a frame's length prefix.
const LENGTH_BYTES: usize = 4;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The body is longer than [`MAX_FRAME_BYTES`], or than a first message may be.
    #[error("frame of {bytes} bytes is longer than allowed")]
    TooLong {
        /// Stated or actual length, in bytes.
        bytes: u64,
    },
    /// The socket failed, or closed in the middle of a frame.
    #[error("socket failed")]
    Io(#[from] io::Error),
    /// The body is not the expected JSON.
    #[error("message is not understood")]
    Json(#[from] serde_json::Error),
}

/// Turns a message into a frame: length and JSON. Fails when the JSON is longer than [`MAX_FRAME_BYTES`].
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; LENGTH_BYTES];
    serde_json::to_writer(&mut frame, message)?;
    let bytes = (frame.len() - LENGTH_BYTES) as u64;
    let length = checked_length(bytes)?;
    frame[..LENGTH_BYTES].copy_from_slice(&length.to_be_bytes());
    Ok(frame)
}

/// Reads a frame's body as a message.
pub fn decode<M: DeserializeOwned>(body: &[u8]) -> Result<M, FrameError> {
    Ok(serde_json::from_slice(body)?)
}

/// Reads one frame's body; `None` when the peer closed the connection between two frames.
pub async fn read_frame<R: AsyncRead + Unpin>(reader: &mut R) -> Result<Option<Vec<u8>>, FrameError> {
    read_frame_within(reader, MAX_FRAME_BYTES).await
}

/// As [`read_frame`], with a lower bound on the body's length: a stranger may not make the reader allocate much.
pub(crate) async fn read_frame_within<R: AsyncRead + Unpin>(reader: &mut R, max_bytes: u32) -> Result<Option<Vec<u8>>, FrameError> {
    let mut length = [0; LENGTH_BYTES];
    if reader.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut length[1..]).await?;
    let bytes = u32::from_be_bytes(length);
    if bytes > max_bytes.min(MAX_FRAME_BYTES) {
        return Err(FrameError::TooLong { bytes: u64::from(bytes) });
    }
    let mut body = vec![0; bytes as usize];
    reader.read_exact(&mut body).await?;
    Ok(Some(body))
}

/// Writes one message as a frame.
pub async fn write_message<W: AsyncWrite + Unpin, M: Serialize>(writer: &mut W, message: &M) -> Result<(), FrameError> {
    writer.write_all(&encode(message)?).await?;
    writer.flush().await?;
    Ok(())
}

/// Reads one frame's body from a blocking socket; `None` when the peer closed the connection between two frames.
pub fn read_frame_blocking<R: io::Read>(reader: &mut R) -> Result<Option<Vec<u8>>, FrameError> {
    let mut length = [0; LENGTH_BYTES];
    let first = loop {
        match reader.read(&mut length[..1]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    if first == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut length[1..])?;
    let mut body = vec![0; checked_length(u64::from(u32::from_be_bytes(length)))? as usize];
    reader.read_exact(&mut body)?;
    Ok(Some(body))
}

/// Writes one message as a frame to a blocking socket.
pub fn write_message_blocking<W: io::Write, M: Serialize>(writer: &mut W, message: &M) -> Result<(), FrameError> {
    writer.write_all(&encode(message)?)?;
    writer.flush()?;
    Ok(())
}

/// The length as it stands in a frame, if it is allowed.
fn checked_length(bytes: u64) -> Result<u32, FrameError> {
    if bytes > u64::from(MAX_FRAME_BYTES) { Err(FrameError::TooLong { bytes }) } else { Ok(bytes as u32) }
}

/// A frame that is ready to be written. Clones share its bytes, so that one message to many workers is encoded once.
#[derive(Clone)]
pub struct Frame {
    head: Arc<[u8]>,
    /// What many frames share behind their own heads; empty for most.
    tail: Arc<[u8]>,
}

impl Frame {
    /// Encodes a message. Fails when its JSON is longer than [`MAX_FRAME_BYTES`].
    pub fn new(message: &CoordinatorMessage) -> Result<Self, FrameError> {
        Ok(Self { head: encode(message)?.into(), tail: Arc::default() })
    }

    /// The bytes in their order.
    pub fn parts(&self) -> [&[u8]; 2] {
        [&self.head, &self.tail]
    }
}

impl fmt::Debug for Frame {
    /// The bytes of a start hold a key, so only their number is shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({} bytes)", self.head.len() + self.tail.len())
    }
}

/// The start of one generation. What all ranks are told, which grows with their number, is encoded once.
pub struct StartFrames {
    shared: Arc<[u8]>,
}

/// The fields of a start that are the same for all ranks.
#[derive(Serialize)]
struct SharedStart<'a> {
    generation: u64,
    members: &'a [u32],
    peers: &'a [String],
    collective_key: &'a Secret,
    source: &'a StateSource,
    until_step: Option<u64>,
    saves_only: bool,
}

/// How far the workers of a generation go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StartTerms {
    /// Step after which they save and leave.
    pub until_step: Option<u64>,
    /// They save the state in their memory and leave.
    pub saves_only: bool,
}

impl StartFrames {
    /// Encodes what all ranks are told. Fails when that is longer than a frame may be.
    pub fn new(
        generation: u64,
        (members, peers): (&[u32], &[String]),
        collective_key: &Secret,
        source: &StateSource,
        terms: StartTerms,
    ) -> Result<Self, FrameError> {
        let StartTerms { until_step, saves_only } = terms;
        let body = serde_json::to_vec(&SharedStart { generation, members, peers, collective_key, source, until_step, saves_only })?;
        checked_length(body.len() as u64)?;
        // The brace that opens the object belongs to the head.
        Ok(Self { shared: body[1..].into() })
    }

    /// The frame for one rank. Fails when it is longer than [`MAX_FRAME_BYTES`].
    pub fn for_rank(&self, rank: u32) -> Result<Frame, FrameError> {
        let opening = format!("{{\"message\":\"start\",\"rank\":{rank},");
        let length = checked_length((opening.len() + self.shared.len()) as u64)?;
        let head = [length.to_be_bytes().as_slice(), opening.as_bytes()].concat();
        Ok(Frame { head: head.into(), tail: Arc::clone(&self.shared) })
    }
}
