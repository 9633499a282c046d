//! What workers and the coordinator say to each other: JSON messages in length-prefixed frames over TCP.
//!
//! A frame is a big-endian `u32` length and that many bytes of JSON. The worker speaks first, with [`WorkerMessage::Join`].
//! The coordinator reads and writes frames on tokio, the worker on blocking sockets, so the framing exists for both.

use std::io;

use cloze_recipes::failure::Failure;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::secret::Secret;

/// Version of the messages; both sides must speak the same one.
pub const PROTOCOL_VERSION: u32 = 1;

/// Longest frame body, in bytes. The largest real message is a start with one address per worker, far below this.
pub const MAX_FRAME_BYTES: u32 = 1 << 20;

/// Bytes of a frame's length prefix.
const LENGTH_BYTES: usize = 4;

/// What a worker says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum WorkerMessage {
    /// Asks for a seat; the first message of a connection, and only the first.
    Join(JoinRequest),
    /// Says that the process lives, and how far it is.
    Heartbeat {
        /// Generation that the worker works in; 0 before the first.
        generation: u64,
        /// Steps done.
        step: u64,
        /// What the worker does.
        phase: Phase,
    },
    /// One optimizer step is done; only the leader (rank 0) sends it.
    Step {
        /// Generation that did the step.
        generation: u64,
        /// Numbers of the step.
        report: StepReport,
    },
    /// A checkpoint is complete and visible; only the leader sends it.
    CheckpointSaved {
        /// Generation that saved it.
        generation: u64,
        /// Steps done at the checkpoint.
        step: u64,
        /// Where it is.
        url: String,
        /// Bytes of all its files.
        bytes: u64,
        /// Seconds from the start of the save to the manifest.
        seconds: f64,
    },
    /// State is in memory and training can begin; forwarded from the leader.
    Restored {
        /// Generation that restored it.
        generation: u64,
        /// Steps done at the restored state; 0 from scratch.
        step: u64,
        /// `scratch`, or the checkpoint's URL.
        source: String,
        /// Newer checkpoints that were passed over, each with its reason.
        skipped: Vec<String>,
    },
    /// The collective failed under this worker, which waits for the next generation.
    Broken {
        /// Generation whose collective failed.
        generation: u64,
        /// What failed, naming operation and peer.
        reason: String,
    },
    /// Something failed that no restart cures; the run ends with this failure.
    Failed {
        /// The failure.
        failure: Failure,
    },
    /// The worker is done. Sent only after every rank has passed the generation's last collective and the last checkpoint
    /// is saved, so that one such message proves the run's result.
    Finished {
        /// Generation that finished.
        generation: u64,
        /// Steps done.
        step: u64,
        /// Whether a stop was asked for before the last step.
        stopped: bool,
    },
}

/// What a worker brings when it joins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// [`PROTOCOL_VERSION`] of the worker.
    pub protocol_version: u32,
    /// The run's token.
    pub token: Secret,
    /// Hash of the recipe that the worker read.
    pub recipe_hash: String,
    /// Build of the worker binary.
    pub build: String,
    /// The worker's slot, from 0; its rank in every generation.
    pub worker: u32,
    /// Process id on its host.
    pub process_id: u32,
    /// Name of its host.
    pub host: String,
    /// `host:port` on which it listens for its peers.
    pub collective_address: String,
}

/// What the coordinator says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum CoordinatorMessage {
    /// The worker has its seat.
    Welcome {},
    /// The worker may not join; the connection closes.
    Refused {
        /// Why.
        failure: Failure,
    },
    /// A generation starts.
    Start {
        /// Its number, from 1.
        generation: u64,
        /// The receiver's rank.
        rank: u32,
        /// Number of ranks.
        world_size: u32,
        /// Collective addresses by rank.
        peers: Vec<String>,
        /// Fresh key that the ranks prove to each other.
        collective_key: Secret,
    },
    /// The generation is over; leave its collective at once and wait for the next start.
    Abort {
        /// The generation that is over.
        generation: u64,
        /// Names the lost worker.
        reason: String,
    },
    /// Finish the current step, save, leave; the workers agree on the step among themselves.
    Stop {
        /// Who asked.
        reason: String,
    },
}

/// What a worker does at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waits for a generation.
    Joining,
    /// Builds the model and connects to its peers.
    Building,
    /// Reads a checkpoint.
    Restoring,
    /// Trains.
    Training,
    /// Writes a checkpoint.
    Saving,
    /// Is done and leaves.
    Leaving,
}

/// Numbers of one optimizer step; examples, tokens and labels count the global batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Steps done, from 1.
    pub step: u64,
    /// Loss of the global batch. A number that is not finite travels as JSON null and is read back as NaN.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global gradient norm before clipping; like `loss` where it is not finite.
    #[serde(deserialize_with = "null_is_nan")]
    pub gradient_norm: f64,
    /// Examples.
    pub examples: u64,
    /// Tokens.
    pub tokens: u64,
    /// Scored positions.
    pub labels: u64,
    /// Seconds that the step took.
    pub seconds: f64,
    /// Examples per second.
    pub examples_per_s: f64,
    /// Tokens per second.
    pub tokens_per_s: f64,
}

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The body is longer than [`MAX_FRAME_BYTES`].
    #[error("frame of {bytes} bytes is longer than the allowed 1 MiB")]
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
    let mut length = [0; LENGTH_BYTES];
    if reader.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut length[1..]).await?;
    let mut body = vec![0; checked_length(u64::from(u32::from_be_bytes(length)))? as usize];
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

/// JSON has no NaN: `serde_json` writes null for it, which is read back here.
fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cloze_recipes::failure::FailureKind;

    fn report() -> StepReport {
        StepReport {
            step: 7,
            loss: 0.1 + 0.2,
            learning_rate: 1e-5,
            gradient_norm: 1.0 / 3.0,
            examples: 32,
            tokens: 4096,
            labels: 32,
            seconds: 0.25,
            examples_per_s: 128.0,
            tokens_per_s: 16_384.0,
        }
    }

    fn worker_messages() -> Vec<WorkerMessage> {
        vec![
            WorkerMessage::Join(JoinRequest {
                protocol_version: PROTOCOL_VERSION,
                token: Secret::new("t"),
                recipe_hash: "aa".to_owned(),
                build: "b".to_owned(),
                worker: 3,
                process_id: 77,
                host: "node".to_owned(),
                collective_address: "127.0.0.1:9".to_owned(),
            }),
            WorkerMessage::Heartbeat { generation: 1, step: 2, phase: Phase::Saving },
            WorkerMessage::Step { generation: 1, report: report() },
            WorkerMessage::Restored { generation: 2, step: 50, source: "file:///x".to_owned(), skipped: vec!["y: cut".to_owned()] },
            WorkerMessage::Failed { failure: Failure::new(FailureKind::Run, "loss is not finite").at("step 3") },
            WorkerMessage::Finished { generation: 2, step: 300, stopped: false },
        ]
    }

    #[test]
    fn messages_survive_a_blocking_round_trip() {
        let mut wire = Vec::new();
        for message in worker_messages() {
            write_message_blocking(&mut wire, &message).unwrap();
        }
        let mut reader = wire.as_slice();
        for message in worker_messages() {
            let body = read_frame_blocking(&mut reader).unwrap().unwrap();
            assert_eq!(decode::<WorkerMessage>(&body).unwrap(), message);
        }
        assert!(read_frame_blocking(&mut reader).unwrap().is_none());
    }

    #[tokio::test]
    async fn both_framings_are_the_same() {
        let message = CoordinatorMessage::Start {
            generation: 1,
            rank: 0,
            world_size: 1,
            peers: vec!["127.0.0.1:1".to_owned()],
            collective_key: Secret::new("k"),
        };
        let mut asynchronous = Vec::new();
        write_message(&mut asynchronous, &message).await.unwrap();
        let mut blocking = Vec::new();
        write_message_blocking(&mut blocking, &message).unwrap();
        assert_eq!(asynchronous, blocking);
        let mut reader = asynchronous.as_slice();
        let body = read_frame(&mut reader).await.unwrap().unwrap();
        assert_eq!(decode::<CoordinatorMessage>(&body).unwrap(), message);
        assert!(read_frame(&mut reader).await.unwrap().is_none());
    }

    #[test]
    fn a_frame_is_a_big_endian_length_and_json() {
        let frame = encode(&CoordinatorMessage::Welcome {}).unwrap();
        assert_eq!(frame, b"\x00\x00\x00\x15{\"message\":\"welcome\"}");
    }

    #[test]
    fn bad_frames_are_refused() {
        let too_long = (MAX_FRAME_BYTES + 1).to_be_bytes();
        assert!(matches!(read_frame_blocking(&mut too_long.as_slice()), Err(FrameError::TooLong { bytes: 1_048_577 })));
        let cut_length = [0_u8, 0];
        assert!(matches!(read_frame_blocking(&mut cut_length.as_slice()), Err(FrameError::Io(_))));
        let cut_body = [0_u8, 0, 0, 5, b'{'];
        assert!(matches!(read_frame_blocking(&mut cut_body.as_slice()), Err(FrameError::Io(_))));
        assert!(matches!(decode::<WorkerMessage>(b"{\"message\":\"dance\"}"), Err(FrameError::Json(_))));
        let long = CoordinatorMessage::Stop { reason: "x".repeat(MAX_FRAME_BYTES as usize) };
        assert!(matches!(encode(&long), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn a_loss_that_is_not_finite_survives() {
        let message =
            WorkerMessage::Step { generation: 1, report: StepReport { loss: f64::NAN, gradient_norm: f64::INFINITY, ..report() } };
        let frame = encode(&message).unwrap();
        let Ok(WorkerMessage::Step { report, .. }) = decode(&frame[LENGTH_BYTES..]) else { panic!("a step") };
        assert!(report.loss.is_nan() && report.gradient_norm.is_nan());
        assert_eq!(report.step, 7);
    }

    #[test]
    fn a_token_is_not_printed() {
        let printed = format!("{:?}", worker_messages()[0]);
        assert!(printed.contains("Secret(…)"), "{printed}");
    }
}
