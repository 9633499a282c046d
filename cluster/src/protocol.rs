//! What workers and the coordinator say to each other: JSON messages in length-prefixed frames over TCP.
//!
//! The worker speaks first, with [`WorkerMessage::Join`]. The coordinator reads and writes frames on tokio, the worker on blocking
//! sockets, so the framing exists for both.

mod frame;

use std::fmt;

use cloze_recipes::failure::Failure;
use serde::{Deserialize, Deserializer, Serialize};

pub(crate) use self::frame::read_frame_within;
pub use self::frame::{
    Frame, FrameError, MAX_FRAME_BYTES, StartFrames, StartTerms, decode, encode, read_frame, read_frame_blocking, write_message,
    write_message_blocking,
};
use crate::secret::Secret;

/// Version of the messages; both sides must speak the same one.
pub const PROTOCOL_VERSION: u32 = 4;

/// The build that the coordinator and its workers must share; all crates of the workspace have one version.
pub fn build_name() -> String {
    format!("cloze {} (protocol {PROTOCOL_VERSION})", env!("CARGO_PKG_VERSION"))
}

/// What a worker says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum WorkerMessage {
    /// Asks for a seat; the first message of a connection, and only the first.
    Join(JoinRequest),
    /// Tells of another process's end; the first message of a connection, and the last. It comes from a launcher that is not the
    /// coordinator's own.
    Exited(ExitReport),
    /// Says that the process lives, and how far it is.
    Heartbeat {
        /// Generation that the worker works in; 0 before the first.
        generation: u64,
        /// Steps done.
        step: u64,
        /// What the worker does.
        phase: Phase,
        /// Whether it waits for its peers inside a collective operation.
        waiting: bool,
        /// Grows whenever the worker gets on, also within a phase.
        progress: u64,
    },
    /// The worker has left a generation and waits for the next.
    Ready {
        /// The generation that it left; 0 for none yet.
        generation: u64,
        /// Steps done of the state in its memory; `None` where there is none that belongs to one step.
        state_step: Option<u64>,
        /// Which part of the state that is; `None` for the whole of it.
        share: Option<Share>,
    },
    /// One optimizer step is done; only the leader (rank 0) sends it.
    Step {
        /// Generation that did the step.
        generation: u64,
        /// Numbers of the step.
        report: StepReport,
    },
    /// State is in memory and training can begin; only the leader sends it.
    Restored {
        /// Generation that restored it.
        generation: u64,
        /// Steps done at the restored state; 0 from scratch.
        step: u64,
        /// `scratch`, a checkpoint's URL, `memory`, or `memory of worker N`.
        source: String,
        /// Newer checkpoints that were passed over, each with its reason.
        skipped: Vec<String>,
        /// Seconds that it took.
        seconds: f64,
    },
    /// This rank has written its share of a checkpoint; forwarded to the leader.
    ShareSaved {
        /// Generation that saves it.
        generation: u64,
        /// Steps done at the checkpoint.
        step: u64,
        /// The files of the share.
        files: Vec<SavedFile>,
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
        /// Seconds of these in which training stood still.
        blocked_s: f64,
    },
    /// A checkpoint was given up; the run goes on.
    CheckpointFailed {
        /// Generation that saved it.
        generation: u64,
        /// Steps done at the checkpoint.
        step: u64,
        /// Why.
        reason: String,
    },
    /// The collective failed under this worker, which waits for the next generation.
    Broken {
        /// Generation whose collective failed.
        generation: u64,
        /// What failed, naming operation and peer.
        reason: String,
    },
    /// Something failed that is not the collective's fault. Its class decides whether the step is tried again or the run ends.
    Failed {
        /// The failure.
        failure: Failure,
        /// What kind of failure of a worker it is.
        class: FailureClass,
        /// Generation in which it happened; 0 before the first.
        generation: u64,
        /// The step at which it happened.
        step: u64,
        /// Whether this rank itself saw it first: its own loss was not finite, its own memory ran out.
        culprit: bool,
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
    /// Asks the coordinator's loop for a sign of life; measures how long it takes to answer.
    Ping {
        /// Comes back in the answer.
        id: u64,
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
    /// What tells this executable from every other, as [`crate::host::executable_id`] reads it.
    pub executable: String,
    /// The worker's slot, from 0.
    pub worker: u32,
    /// Process id on its host.
    pub process_id: u32,
    /// Name of its host.
    pub host: String,
    /// `host:port` on which it listens for its peers.
    pub collective_address: String,
    /// The generation that still runs in the worker, when it joins again after its connection was lost.
    pub held: Option<Held>,
}

/// How the process of a worker ended, as the launcher of its host saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    /// [`PROTOCOL_VERSION`] of the launcher.
    pub protocol_version: u32,
    /// The run's token.
    pub token: Secret,
    /// The worker's slot, from 0.
    pub worker: u32,
    /// The launcher's host, which was the worker's.
    pub host: String,
    /// Process id on that host.
    pub process_id: u32,
    /// Exit code or signal, such as `SIGKILL` or `exit code 1`.
    pub status: String,
    /// The end of its log.
    pub tail: String,
    /// File with the stacks of its threads, where they were written.
    pub dump: Option<String>,
    /// Whether another process takes its place.
    pub is_replaced: bool,
}

/// A generation that runs on in a worker without a coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Its number.
    pub generation: u64,
    /// Steps done.
    pub step: u64,
}

/// One file of a checkpoint that a rank has written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFile {
    /// Its name within the checkpoint.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// BLAKE3 hash of its bytes, in hexadecimal digits.
    pub blake3: String,
}

/// What the coordinator says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum CoordinatorMessage {
    /// The worker has its seat.
    Welcome {
        /// The generation that the worker holds goes on.
        adopted: bool,
    },
    /// The worker may not join, or may not stay; the connection closes.
    Refused {
        /// Why.
        failure: Failure,
    },
    /// What was told without a seat was heard; the connection closes.
    Noted {},
    /// A generation starts.
    Start {
        /// Its number, from 1.
        generation: u64,
        /// The receiver's rank.
        rank: u32,
        /// Slots of the workers by rank; their number is the world size.
        members: Vec<u32>,
        /// Collective addresses by rank.
        peers: Vec<String>,
        /// Fresh key that the ranks prove to each other.
        collective_key: Secret,
        /// Where the state comes from.
        source: StateSource,
        /// Step after which all workers save and leave, as after a stop; `None` goes on to the end.
        until_step: Option<u64>,
        /// A stop was asked for while no generation ran: the receiver saves the state in its memory and leaves.
        saves_only: bool,
    },
    /// The generation is over; leave its collective at once and wait for the next start.
    Abort {
        /// The generation that is over.
        generation: u64,
        /// Names the lost worker.
        reason: String,
    },
    /// Leave the generation at a step that the workers agree on among themselves, keep the state, and wait for the next start.
    Regroup {
        /// The generation to be left.
        generation: u64,
        /// Names who has joined.
        reason: String,
    },
    /// Save a checkpoint at a step that the workers agree on, and go on.
    Save {
        /// Who asked.
        reason: String,
    },
    /// Finish the current step, save, leave; the workers agree on the step among themselves.
    Stop {
        /// Who asked.
        reason: String,
    },
    /// A rank has written its share of a checkpoint; sent to the leader.
    ShareSaved {
        /// Generation that saves it.
        generation: u64,
        /// Steps done at the checkpoint.
        step: u64,
        /// The rank.
        rank: u32,
        /// The files of its share.
        files: Vec<SavedFile>,
    },
    /// The coordinator lives. Sent at a fixed interval, so that a worker notices one that vanished without closing its connections.
    Pulse {},
    /// Answers [`WorkerMessage::Ping`].
    Pong {
        /// What the question carried.
        id: u64,
    },
    /// The worker's last words were heard, or the run is over: the connection closes and there is nothing to come back to.
    Released {},
}

/// Where a generation's state comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum StateSource {
    /// The newest good checkpoint, or the first values where there is none.
    Checkpoint,
    /// The memory of a member.
    Peer {
        /// Its rank.
        rank: u32,
        /// Steps done of its state.
        step: u64,
    },
    /// The memory of all members: each gives what it holds of a state that so many ranks have shared out.
    Shares {
        /// Steps done of the state. A member that is one behind takes the step with the sums that it has.
        step: u64,
        /// Number of ranks that shared the state out; not that of the members where it is to be shared out anew.
        world_size: u32,
    },
}

/// A part of the state, where the workers share it out (`train.shard`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Rank of its owner.
    pub rank: u32,
    /// Number of ranks that share the state out.
    pub world_size: u32,
    /// The rank of whose share it holds a replica too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica_of: Option<u32>,
    /// Whether the summed gradients of the next step are there, so that it can be taken without the other ranks.
    pub next_is_summed: bool,
}

/// What a worker does at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waits for a generation, or prepares for its first.
    Joining,
    /// Builds the model and connects to its peers.
    Building,
    /// Gets its state.
    Restoring,
    /// Waits for the next batch.
    Waiting,
    /// Trains.
    Training,
    /// Takes a snapshot, or writes the last checkpoint.
    Saving,
    /// Is done and leaves.
    Leaving,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Joining => "joining",
            Self::Building => "building",
            Self::Restoring => "restoring",
            Self::Waiting => "waiting for a batch",
            Self::Training => "training",
            Self::Saving => "saving",
            Self::Leaving => "leaving",
        })
    }
}

/// What kind of failure took a worker or a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// The connection closed, as it does when a process ends.
    ConnectionClosed,
    /// Nothing was heard for too long.
    MissedHeartbeat,
    /// The process lives and makes no progress.
    Hung,
    /// A loss or gradient was not finite.
    NotFinite,
    /// The memory of the host or of a GPU ran out.
    OutOfMemory,
    /// The GPU or its driver failed.
    Device,
    /// A collective operation failed while all workers lived.
    Collective,
    /// The worker's host is used no more.
    Excluded,
    /// Anything else.
    Other,
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
    /// The steps before it that have no report of their own.
    #[serde(default, skip_serializing_if = "Unreported::is_nothing")]
    pub before: Unreported,
}

/// Steps since the last report that `train.log_every_steps` leaves out; sums over all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Unreported {
    /// Their number.
    pub steps: u64,
    /// Tokens.
    pub tokens: u64,
    /// Seconds that they took.
    pub seconds: f64,
}

impl Unreported {
    /// Whether there are none.
    pub fn is_nothing(&self) -> bool {
        self.steps == 0
    }

    /// Adds a step that is not reported.
    pub fn add(&mut self, report: &StepReport) {
        self.steps += 1;
        self.tokens += report.tokens;
        self.seconds += report.seconds;
    }
}

/// JSON has no NaN: `serde_json` writes null for it, which is read back here.
fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests;
