//! What every transport offers, and the one shape of its errors.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Called with true when an operation begins to wait for its peers and with false when it has ended, once for each operation.
pub type WaitObserver = Arc<dyn Fn(bool) + Send + Sync>;

/// Tells an observer that an operation waits, and that it has ended, whichever way it ends.
pub struct Waiting<'a>(Option<&'a WaitObserver>);

impl<'a> Waiting<'a> {
    /// Tells the observer, where there is one, that the wait begins; it ends when the result is dropped.
    pub fn begin(observer: Option<&'a WaitObserver>) -> Self {
        if let Some(observer) = observer {
            observer(true);
        }
        Self(observer)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(observer) = self.0 {
            observer(false);
        }
    }
}

/// Float32 values in the memory of a GPU, in plain numbers as a tensor gives them.
///
/// Whoever makes one promises that the memory belongs to a living tensor, and leaves it alone until [`Collective::join_device`] has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFloats {
    /// Device address of the first value.
    pub address: u64,
    /// Number of values.
    pub len: usize,
    /// Index of the device.
    pub device: usize,
}

/// Operations that every rank of a generation calls in the same order with arguments of the same size.
///
/// After the first error the group is of no further use: every later call returns that error again, and the peers are cut
/// off so that they fail too instead of waiting.
pub trait Collective: Send {
    /// Rank of this worker, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks, at least 1.
    fn world_size(&self) -> usize;

    /// States the training step that the next operations belong to; it only appears in errors.
    fn set_step(&mut self, step: u64);

    /// Replaces `data` by its sum over all ranks: the same bits on all ranks, and from run to run.
    ///
    /// Fails when a peer is gone or silent for longer than the timeout, when the ranks disagree about the operation, or after an abort.
    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// Sums `data` over all ranks and leaves this rank's share of the sum, which `share_of` places, at its place in `data`.
    ///
    /// Returns that place; what lies outside is unspecified afterwards. The sum has the same bits from run to run, but they need not be those of
    /// [`Collective::all_reduce_sum`]. Fails as that does.
    fn reduce_scatter_sum(&mut self, data: &mut [f32]) -> Result<Range<usize>, CollectiveError>;

    /// Fills `data` on every rank with the shares of all ranks, each at its place. Fails as [`Collective::all_reduce_sum`] does.
    fn all_gather(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// Brings the share of the rank `distance` places before this one, round the world, to its place in `data`; every rank gives its own.
    ///
    /// `distance` is below the world size and the same on all ranks. Returns that place; what lies outside the two shares is unspecified
    /// afterwards. Fails as [`Collective::all_reduce_sum`] does.
    fn gather_share(&mut self, data: &mut [f32], distance: usize) -> Result<Range<usize>, CollectiveError>;

    /// Replaces `data` on every rank by that of rank `root`. Fails as [`Collective::all_reduce_sum`] does.
    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<(), CollectiveError>;

    /// Returns once every rank has called it. Fails as [`Collective::all_reduce_sum`] does.
    fn barrier(&mut self) -> Result<(), CollectiveError>;

    /// A handle with which another thread ends the operation that this one is in, and all later ones.
    fn abort_handle(&self) -> AbortHandle;

    /// States who is told when an operation begins to wait for peers, and when it has ended; in a world of one the two follow each other at once.
    fn set_wait_observer(&mut self, observer: WaitObserver);

    /// An error of this group: `cause` with this worker's rank, the generation and the step.
    fn error(&self, operation: Operation, cause: CollectiveCause) -> CollectiveError;

    /// Whether the operations on device memory are there. Where they are not, each of them is an error.
    fn works_on_device(&self) -> bool {
        false
    }

    /// Queues [`Collective::all_reduce_sum`] behind all work that the compute stream of the device has been given so far.
    ///
    /// Fails when an earlier operation failed, or when this one cannot be queued within the timeout.
    fn all_reduce_sum_on_device(&mut self, data: DeviceFloats) -> Result<(), CollectiveError> {
        Err(self.error(Operation::AllReduce, CollectiveCause::HostOnly { address: data.address }))
    }

    /// Queues [`Collective::reduce_scatter_sum`] as [`Collective::all_reduce_sum_on_device`] does; returns this rank's share.
    fn reduce_scatter_on_device(&mut self, data: DeviceFloats) -> Result<Range<usize>, CollectiveError> {
        Err(self.error(Operation::ReduceScatter, CollectiveCause::HostOnly { address: data.address }))
    }

    /// Queues [`Collective::all_gather`] as [`Collective::all_reduce_sum_on_device`] does.
    fn all_gather_on_device(&mut self, data: DeviceFloats) -> Result<(), CollectiveError> {
        Err(self.error(Operation::AllGather, CollectiveCause::HostOnly { address: data.address }))
    }

    /// Queues [`Collective::gather_share`] as [`Collective::all_reduce_sum_on_device`] does.
    fn gather_share_on_device(&mut self, data: DeviceFloats, distance: usize) -> Result<Range<usize>, CollectiveError> {
        let _ = distance;
        Err(self.error(Operation::GatherShare, CollectiveCause::HostOnly { address: data.address }))
    }

    /// Waits until every queued operation is done, and lets the compute stream go on behind them.
    ///
    /// Fails when one of them failed or made no progress for the timeout; what they worked on is then garbage, and nobody has used it yet.
    fn join_device(&mut self) -> Result<(), CollectiveError> {
        Err(self.error(Operation::Barrier, CollectiveCause::HostOnly { address: 0 }))
    }
}

/// Ends the operations of one [`Collective`] from any thread.
#[derive(Clone)]
pub struct AbortHandle(Arc<dyn Fn(&str) + Send + Sync>);

impl AbortHandle {
    /// Wraps what a transport does to unblock its operations; `abort` is given the reason and must not block.
    pub fn new(abort: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Arc::new(abort))
    }

    /// Ends the operation in progress and all later ones with `reason`. Does nothing when the group is already gone or failed.
    pub fn abort(&self, reason: &str) {
        (self.0)(reason);
    }
}

/// Which operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Forming the group.
    Connect,
    /// [`Collective::all_reduce_sum`].
    AllReduce,
    /// [`Collective::broadcast`].
    Broadcast,
    /// [`Collective::barrier`].
    Barrier,
    /// [`Collective::reduce_scatter_sum`].
    ReduceScatter,
    /// [`Collective::all_gather`].
    AllGather,
    /// [`Collective::gather_share`].
    GatherShare,
}

impl Operation {
    /// All of them, for whoever reads a number from the wire.
    pub const ALL: [Self; 7] =
        [Self::Connect, Self::AllReduce, Self::Broadcast, Self::Barrier, Self::ReduceScatter, Self::AllGather, Self::GatherShare];
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect",
            Self::AllReduce => "all-reduce",
            Self::Broadcast => "broadcast",
            Self::Barrier => "pass the barrier",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllGather => "all-gather",
            Self::GatherShare => "gather a share",
        })
    }
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveCause {
    /// Another thread called [`AbortHandle::abort`].
    #[error("aborted: {0}")]
    Aborted(String),
    /// No byte came or went for the whole timeout.
    #[error("no progress for {timeout_ms} ms{note}")]
    TimedOut {
        /// The timeout, in milliseconds.
        timeout_ms: u64,
        /// What was seen in the meantime, starting with a separator; mostly empty.
        note: String,
    },
    /// The peer's process ended, or the peer gave up the group.
    #[error("the connection was closed by the peer")]
    Closed,
    /// The peer did not accept this worker as a member of its group.
    #[error("the peer refused the connection: {0}")]
    Refused(String),
    /// The ranks are not in the same operation, or an argument makes no sense.
    #[error("the ranks disagree: {0}")]
    Mismatch(String),
    /// The transport has no operations on device memory.
    #[error("this transport works in host memory, and was given the device address {address:#x}")]
    HostOnly {
        /// Where the values are; 0 where none were given.
        address: u64,
    },
    /// This machine has no driver or no communication library that could be used in this way.
    #[error("{0}")]
    Unavailable(String),
    /// The communication library failed, as it does where a peer has gone.
    #[error("{0}")]
    Library(String),
    /// The GPU or its driver failed. What the process keeps on the device may be of no use any more.
    #[error("{0}")]
    Device(String),
    /// The operating system failed a call.
    #[error("{0}")]
    Io(String),
}

/// A collective operation that failed, with everything needed to find the culprit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectiveError {
    /// What was attempted.
    pub operation: Operation,
    /// This worker's rank.
    pub rank: usize,
    /// The rank at the other end, where one is to blame.
    pub peer: Option<usize>,
    /// The generation that the group belongs to.
    pub generation: u64,
    /// The training step, as [`Collective::set_step`] last stated it.
    pub step: u64,
    /// What happened.
    pub cause: CollectiveCause,
}

impl fmt::Display for CollectiveError {
    /// One line: operation, rank, peer, generation, step, cause.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "failed to {} on rank {}", self.operation, self.rank)?;
        if let Some(peer) = self.peer {
            write!(f, " with rank {peer}")?;
        }
        write!(f, " (generation {}, step {}): {}", self.generation, self.step, self.cause)
    }
}

impl std::error::Error for CollectiveError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_everything_on_one_line() {
        let mut error = CollectiveError {
            operation: Operation::AllReduce,
            rank: 1,
            peer: Some(2),
            generation: 7,
            step: 40,
            cause: CollectiveCause::TimedOut { timeout_ms: 500, note: String::new() },
        };
        assert_eq!(error.to_string(), "failed to all-reduce on rank 1 with rank 2 (generation 7, step 40): no progress for 500 ms");
        error.peer = None;
        error.operation = Operation::Barrier;
        error.cause = CollectiveCause::Aborted("worker 3 is lost".to_owned());
        assert_eq!(error.to_string(), "failed to pass the barrier on rank 1 (generation 7, step 40): aborted: worker 3 is lost");
    }
}
