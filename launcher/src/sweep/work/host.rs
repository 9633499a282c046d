//! What an element does first that no batch system looks after: it claims its batch, once, and begins to give signs of life.

use std::collections::BTreeMap;

use anyhow::Context as _;
use cloze_data::store;
use rustix::process::Signal;

use super::super::beat::{Beat, BeatTimes, LOST_AFTER_S};
use super::super::claim::{Claim, Worker, signal};
use super::super::folder::{StudyFolder, SweepPlan};
use super::super::lease::Home;
use super::super::tether::Tether;
use super::WorkOptions;

/// Whether an element may work.
pub(super) enum Entry {
    /// It is a batch system's, which starts it once.
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
    _tether: Option<Tether>,
}

impl Entry {
    /// Claims the batch. This process must not have started anything yet, since all of it belongs to its session.
    pub(super) fn new(folder: &StudyFolder, plan: &SweepPlan, options: &WorkOptions) -> anyhow::Result<Self> {
        let Some(host) = &options.host else { return Ok(Self::Free) };
        // An order for a study that has moved to a batch system since is an old one.
        let lost_after_s = match plan.hosts() {
            Some(site) => site.lost_after_s,
            None if plan.has_queue() => return Ok(Self::Taken),
            None => LOST_AFTER_S,
        };
        Worker::lead_session()?;
        let worker = Worker { part: Some(options.part), ..Worker::this_process(host).context("look at this process")? };
        let tether = match tether(folder, plan, &worker)? {
            Watch::Free => None,
            Watch::Tied(tether) => Some(tether),
            Watch::Late => return Ok(Self::Taken),
        };
        let wanted = Claim::Taken(worker.clone());
        if wanted.make(folder, options.batch)? != wanted {
            return Ok(Self::Taken);
        }
        let beat = Beat::begin(folder, options.batch, &worker, BeatTimes::of(lost_after_s), ask_to_leave)?;
        Ok(Self::Claimed(Stay { worker, _beat: beat, _tether: tether }))
    }

    /// Ends what the programs of an attempt have left behind: once its outcome is written another one may begin on any host.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        match self {
            Self::Claimed(stay) => stay.worker.end_others().context("end what a trial has left behind"),
            Self::Free | Self::Taken => Ok(()),
        }
    }
}

/// Whether a lease has a say in how long an element works.
enum Watch {
    /// There is none, or hosts are asked before another one has their trials.
    Free,
    Tied(Tether),
    /// The controller that has started it may have lost the study meanwhile.
    Late,
}

/// On its own machine a controller leaves nobody whom one elsewhere could ask.
fn tether(folder: &StudyFolder, plan: &SweepPlan, worker: &Worker) -> anyhow::Result<Watch> {
    let Some(url) = plan.journal.as_ref().filter(|_| !plan.ends_whole()) else { return Ok(Watch::Free) };
    let (store, home) = (store::open(url, &BTreeMap::new())?, Home::of(&folder.lock_path())?);
    Ok(Tether::begin(store, home, worker, ask_to_leave)?.map_or(Watch::Late, Watch::Tied))
}

/// Beside a SIGTERM, which a visit or the controller may send, this is no second wish.
fn ask_to_leave() {
    if let Err(error) = signal(std::process::id(), Signal::USR2) {
        tracing::warn!(%error, "the wish to leave cannot be heeded");
    }
}
