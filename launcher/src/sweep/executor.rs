//! Where trials run: on this machine, or as jobs of a batch system, which may be out of reach.

use std::time::Duration;

use super::batch::Batch;
use super::local::Local;
use super::queue::Queue;
use super::record::Place;
use super::unreached::Unreached;
use crate::slurm::Avoided;

/// A trial that is out.
#[derive(Clone, Copy, Debug)]
pub struct Out<'a> {
    /// The trial.
    pub trial: usize,
    /// Its hash.
    pub hash: &'a str,
    /// Where it was handed to.
    pub place: Place,
}

/// A trial on which nobody works any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gone {
    /// The trial.
    pub trial: usize,
    /// How its process or job ended.
    pub how: String,
}

/// Where trials run.
#[derive(Debug)]
pub enum Executor {
    /// Child processes of this machine.
    Local(Local),
    /// Jobs of a batch system.
    Queue(Box<Queue>),
    /// Jobs of a batch system that cannot be asked from here; nothing is started.
    Unreached(Box<Unreached>),
}

impl Executor {
    /// Hands a batch out, the first of batches with so many elements in all. That it is meant to be handed out is on the disk by then. An
    /// error says that nobody works on it.
    pub fn submit(&mut self, batch: &Batch, open_elements: usize) -> anyhow::Result<()> {
        match self {
            Self::Local(local) => local.submit(batch),
            Self::Queue(queue) => queue.submit(batch, open_elements),
            Self::Unreached(unreached) => unreached.submit(batch),
        }
    }

    /// Trials on which nobody works any more.
    pub fn gone(&mut self, outs: &[Out<'_>]) -> anyhow::Result<Vec<Gone>> {
        match self {
            Self::Local(local) => local.gone(outs),
            Self::Queue(queue) => queue.gone(outs),
            Self::Unreached(unreached) => unreached.gone(outs),
        }
    }

    /// A trial of this batch has its outcome.
    pub fn forget(&mut self, batch: u32) {
        if let Self::Local(local) = self {
            local.forget(batch);
        }
    }

    /// Asks what is out to save and leave. Of a queue that is done in the next look at it.
    pub fn stop(&mut self, outs: &[Out<'_>]) {
        match self {
            Self::Local(local) => local.stop(outs),
            Self::Queue(queue) => queue.cancel(outs),
            Self::Unreached(unreached) => unreached.stop(),
        }
    }

    /// What to say of jobs that were to leave the queue and that nobody could take off it.
    pub fn left_behind(&self) -> Vec<String> {
        match self {
            Self::Local(_) => Vec::new(),
            Self::Queue(queue) => queue.left_behind().iter().map(ToString::to_string).collect(),
            Self::Unreached(unreached) => unreached.left_behind(),
        }
    }

    /// Starts nothing more on these nodes, as far as enough others are left.
    pub fn avoid(&mut self, nodes: &[String]) -> Avoided {
        match self {
            Self::Local(_) | Self::Unreached(_) => Avoided::default(),
            Self::Queue(queue) => queue.avoid(nodes),
        }
    }

    /// Ends what is out on this machine.
    pub fn kill(&self, outs: &[Out<'_>]) {
        if let Self::Local(local) = self {
            local.kill(outs);
        }
    }

    /// Whether trials wait in a queue of their own, so that all of them can be handed out at once and the controller may leave.
    pub fn is_queue(&self) -> bool {
        matches!(self, Self::Queue(_))
    }

    /// Elements that may run beside those that are out; `None` where the sweep's concurrency says it all.
    pub fn room(&mut self, outs: &[Out<'_>]) -> Option<usize> {
        match self {
            Self::Local(_) => None,
            Self::Queue(queue) => Some(queue.room(outs)),
            Self::Unreached(_) => Some(0),
        }
    }

    /// Whether nothing more may be handed out in this round.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Local(_) => false,
            Self::Queue(queue) => queue.is_full(),
            Self::Unreached(_) => true,
        }
    }

    /// How many trials share an element of a batch.
    pub fn pack(&self) -> usize {
        match self {
            Self::Local(_) | Self::Unreached(_) => 1,
            Self::Queue(queue) => queue.pack(),
        }
    }

    /// Most elements of a batch.
    pub fn max_elements(&self) -> usize {
        match self {
            Self::Local(_) | Self::Unreached(_) => 1,
            Self::Queue(_) => super::queue::MAX_ELEMENTS,
        }
    }

    /// How long to wait before the next look.
    pub fn poll_interval(&self) -> Duration {
        match self {
            Self::Local(_) | Self::Unreached(_) => Local::poll_interval(),
            Self::Queue(queue) => queue.poll_interval(),
        }
    }
}
