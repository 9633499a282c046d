//! What an element does first on a host that a remote shell has reached: it claims its batch, once, and begins to give signs of life.

use anyhow::Context as _;
use rustix::process::Signal;

use super::super::beat::{Beat, BeatTimes};
use super::super::claim::{Claim, Worker, signal};
use super::super::folder::{StudyFolder, SweepPlan};
use super::WorkOptions;

/// Whether an element may work.
pub(super) enum Entry {
    /// It was given to no host by name, so whoever has started it knows of it.
    Free,
    /// It has its batch.
    Claimed(Stay),
    /// Another process has the batch, or its controller has taken it back.
    Taken,
}

/// A process that has its batch, until it is dropped.
pub(super) struct Stay {
    worker: Worker,
    _beat: Beat,
}

impl Entry {
    /// Claims the batch. This process must not have started anything yet, since all of it belongs to its session.
    pub(super) fn new(folder: &StudyFolder, plan: &SweepPlan, options: &WorkOptions) -> anyhow::Result<Self> {
        let Some(host) = &options.host else { return Ok(Self::Free) };
        // The order is an old one: the study has left its hosts since.
        let Some(site) = plan.hosts() else { return Ok(Self::Taken) };
        Worker::lead_session()?;
        let worker = Worker::this_process(host).context("look at this process")?;
        let wanted = Claim::Taken(worker.clone());
        if wanted.make(folder, options.batch)? != wanted {
            return Ok(Self::Taken);
        }
        // Beside a SIGTERM, which the next visit may send, this is no second wish.
        let leave = || {
            if let Err(error) = signal(std::process::id(), Signal::USR2) {
                tracing::warn!(%error, "the wish of the controller cannot be heeded");
            }
        };
        let beat = Beat::begin(folder, options.batch, &worker, BeatTimes::of(site.lost_after_s), leave)?;
        Ok(Self::Claimed(Stay { worker, _beat: beat }))
    }

    /// Ends what the programs of an attempt have left behind: once its outcome is written another one may begin on any host.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        match self {
            Self::Claimed(stay) => stay.worker.end_others().context("end what a trial has left behind"),
            Self::Free | Self::Taken => Ok(()),
        }
    }
}
