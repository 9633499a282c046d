//! Where trials run: on this machine, on hosts that a remote shell reaches, or as jobs of a batch system, which may be out of reach.

use std::time::Duration;

use super::batch::Batch;
use super::hosts::Hosts;
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
    /// Whether anybody has worked on it; else it is as it was before it was handed out.
    pub is_begun: bool,
}

impl Gone {
    /// One whose process or job has ended.
    pub fn ended(trial: usize, how: String) -> Self {
        Self { trial, how, is_begun: true }
    }

    /// One with which nobody has begun, and nobody will.
    pub fn not_begun(trial: usize) -> Self {
        Self { trial, how: "nobody had begun with it".to_owned(), is_begun: false }
    }
}

/// Where trials run.
#[derive(Debug)]
pub enum Executor {
    /// Child processes of this machine.
    Local(Local),
    /// Processes of hosts that a remote shell reaches.
    Hosts(Box<Hosts>),
    /// Jobs of a batch system.
    Queue(Box<Queue>),
    /// Jobs of a batch system that cannot be asked from here; nothing is started.
    Unreached(Box<Unreached>),
}

impl Executor {
    /// Looks after what trials need besides themselves, also while none is out. An error ends the controller.
    pub fn tend(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Hosts(hosts) => hosts.tend(),
            Self::Local(_) | Self::Queue(_) | Self::Unreached(_) => Ok(()),
        }
    }

    /// What is to be told of the machines, each once.
    pub fn news(&mut self) -> Vec<String> {
        match self {
            Self::Hosts(hosts) => hosts.news(),
            Self::Local(local) => local.news(),
            Self::Queue(_) | Self::Unreached(_) => Vec::new(),
        }
    }

    /// Hands a batch out, the first of batches with so many elements in all. That it is meant to be handed out is on the disk by then. An
    /// error says that nobody works on it.
    pub fn submit(&mut self, batch: &Batch, open_elements: usize) -> anyhow::Result<()> {
        match self {
            Self::Local(local) => local.submit(batch),
            Self::Hosts(hosts) => hosts.submit(batch),
            Self::Queue(queue) => queue.submit(batch, open_elements),
            Self::Unreached(unreached) => unreached.submit(batch),
        }
    }

    /// Trials on which nobody works any more.
    pub fn gone(&mut self, outs: &[Out<'_>]) -> anyhow::Result<Vec<Gone>> {
        match self {
            Self::Local(local) => local.gone(outs),
            Self::Hosts(hosts) => hosts.gone(outs),
            Self::Queue(queue) => queue.gone(outs),
            Self::Unreached(unreached) => unreached.gone(outs),
        }
    }

    /// A trial of this batch has its outcome; `is_good` says that it came to its end.
    pub fn forget(&mut self, batch: u32, is_good: bool) {
        match self {
            Self::Local(local) => local.forget(batch),
            Self::Hosts(hosts) => hosts.forget(batch, is_good),
            Self::Queue(_) | Self::Unreached(_) => {}
        }
    }

    /// Asks what is out to save and leave. Of a queue and of hosts that is done in the next look at them.
    pub fn stop(&mut self, outs: &[Out<'_>]) {
        match self {
            Self::Local(local) => local.stop(outs),
            Self::Hosts(hosts) => hosts.stop(outs),
            Self::Queue(queue) => queue.cancel(outs),
            Self::Unreached(unreached) => unreached.stop(),
        }
    }

    /// What to say of what was to leave and could not be told.
    pub fn left_behind(&self) -> Vec<String> {
        match self {
            Self::Local(_) => Vec::new(),
            Self::Hosts(hosts) => hosts.left_behind(),
            Self::Queue(queue) => queue.left_behind().iter().map(ToString::to_string).collect(),
            Self::Unreached(unreached) => unreached.left_behind(),
        }
    }

    /// Starts nothing more on these nodes, which have failed a trial of this batch, as far as enough others are left.
    pub fn avoid(&mut self, batch: Option<u32>, nodes: &[String]) -> Avoided {
        match (self, batch) {
            (Self::Queue(queue), _) => queue.avoid(nodes),
            // What the node calls itself need not be what the list of hosts calls it.
            (Self::Hosts(hosts), Some(batch)) if !nodes.is_empty() => hosts.avoid(batch),
            _ => Avoided::default(),
        }
    }

    /// Ends what is out on this machine and on hosts.
    pub fn kill(&self, outs: &[Out<'_>]) {
        match self {
            Self::Local(local) => local.kill(outs),
            Self::Hosts(hosts) => hosts.kill(outs),
            Self::Queue(_) | Self::Unreached(_) => {}
        }
    }

    /// What becomes of the trials of a batch that was handed out, in words.
    pub fn start_text(&self, batch: u32) -> String {
        match self {
            Self::Queue(_) => "queued".to_owned(),
            Self::Hosts(hosts) => hosts.host_of(batch).map_or_else(|| "starts".to_owned(), |host| format!("starts on {host}")),
            Self::Local(_) | Self::Unreached(_) => "starts".to_owned(),
        }
    }

    /// Whether trials wait in a queue of their own, so that all of them can be handed out at once and the controller may leave.
    pub fn is_queue(&self) -> bool {
        matches!(self, Self::Queue(_))
    }

    /// Most trials that may be out now, where the sweep allows so many at the same time.
    pub fn most_out(&mut self, outs: &[Out<'_>], concurrency: usize, is_early_stopping: bool) -> usize {
        match self {
            Self::Local(_) => concurrency,
            Self::Hosts(hosts) => outs.len() + hosts.room(),
            // A queue takes all that can start, since it runs no more of them at a time than the sweep allows. Early stopping needs the
            // results of some to choose the next.
            Self::Queue(queue) => match queue.room(outs) {
                0 => outs.len(),
                _ if is_early_stopping => concurrency,
                _ => usize::MAX,
            },
            Self::Unreached(_) => outs.len(),
        }
    }

    /// Whether nothing more may be handed out in this round.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Local(_) | Self::Hosts(_) => false,
            Self::Queue(queue) => queue.is_full(),
            Self::Unreached(_) => true,
        }
    }

    /// How many trials share an element of a batch.
    pub fn pack(&self) -> usize {
        match self {
            Self::Local(_) | Self::Hosts(_) | Self::Unreached(_) => 1,
            Self::Queue(queue) => queue.pack(),
        }
    }

    /// Most elements of a batch.
    pub fn max_elements(&self) -> usize {
        match self {
            Self::Local(_) | Self::Hosts(_) | Self::Unreached(_) => 1,
            Self::Queue(_) => super::queue::MAX_ELEMENTS,
        }
    }

    /// How long to wait before the next look.
    pub fn poll_interval(&self) -> Duration {
        match self {
            Self::Local(_) | Self::Unreached(_) => Local::poll_interval(),
            Self::Hosts(_) => Hosts::poll_interval(),
            Self::Queue(queue) => queue.poll_interval(),
        }
    }
}
