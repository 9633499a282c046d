//! Everything that a decision depends on.

use std::collections::BTreeMap;
use std::time::Duration;

use cloze_recipes::failure::Failure;
use serde::{Deserialize, Serialize};

use crate::protocol::{FailureClass, Phase, Share};

/// Bounds of membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A worker that has not been heard of for longer than this is lost.
    pub heartbeat_timeout: Duration,
    /// Longest time in which all slots must be filled, at the start and after a loss.
    pub join_timeout: Duration,
    /// After a broken collective, how long the coordinator waits for a lost connection that explains it.
    pub blame_grace: Duration,
    /// Generations in a row that may break without a lost worker and without one step before the run is given up.
    pub max_fruitless_generations: u32,
    /// Fewest workers with which the run goes on; `None` waits until all slots are filled.
    pub min_workers: Option<u32>,
    /// With `min_workers`, how long absent workers are waited for before the run goes on without them.
    pub replacement_wait: Duration,
    /// A worker that makes no progress for longer than this is stuck.
    pub hang: HangLimits,
    /// How often one step may be tried again after a loss that is not finite or a want of memory.
    pub retries_per_step: u32,
    /// Failures of workers on one host after which the host is used no more; 0 never excludes one.
    pub exclude_host_after: u32,
    /// Whether every worker holds the whole state, so that one worker's memory is enough to go on.
    pub state_is_replicated: bool,
    /// Step after which the members of a generation save and leave.
    pub until_step: Option<u64>,
    /// How long the members of a generation that a coordinator left behind may take to come back.
    pub adopt_timeout: Duration,
}

/// Longest time without progress, by what a worker does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HangLimits {
    /// Building the model, connecting to the peers, restoring.
    pub init: Duration,
    /// Waiting for the next batch.
    pub data: Duration,
    /// One step.
    pub step: Duration,
    /// Taking a snapshot, or saving the last checkpoint.
    pub checkpoint: Duration,
}

impl HangLimits {
    /// The limit of a phase.
    pub fn of(&self, phase: Phase) -> Duration {
        match phase {
            Phase::Joining | Phase::Building | Phase::Restoring => self.init,
            Phase::Waiting => self.data,
            Phase::Training => self.step,
            Phase::Saving | Phase::Leaving => self.checkpoint,
        }
    }
}

/// Everything that the decision depends on. Times count from the coordinator's start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// What the workers do together.
    pub stage: Stage,
    /// Number of the newest generation: the one that runs, or the last one that did; 0 before the first.
    pub generation: u64,
    /// The workers by slot.
    pub workers: Vec<Worker>,
    /// The first report that the running generation's collective failed.
    pub broken: Option<Broken>,
    /// Reports of the running generation about a step that can be tried again, in the order in which they came.
    pub setbacks: Vec<Setback>,
    /// How often the step of the last setback was tried again.
    pub retries: Retries,
    /// Generations in a row that broke without a lost worker and without a step.
    pub fruitless_generations: u32,
    /// Who asked for a stop.
    pub stop: Option<String>,
    /// A failure that ends the run.
    pub failure: Option<Failure>,
    /// Steps done at the newest saved state.
    pub saved_step: u64,
    /// The hosts from which workers have joined.
    pub hosts: BTreeMap<String, HostRecord>,
    /// Until when a worker whose connection has closed counts as connected: the coordinator has not listened for a while, and was taken
    /// for dead.
    pub forgiving_until: Duration,
}

impl State {
    /// The state before anybody has joined.
    pub fn new(num_workers: u32) -> Self {
        let absent = Worker::Absent(Absence {
            cause: "has not joined yet".to_owned(),
            class: FailureClass::Other,
            host: String::new(),
            is_awaited: true,
        });
        Self {
            stage: Stage::Gathering { since: Duration::ZERO, patient: true },
            generation: 0,
            workers: vec![absent; num_workers as usize],
            broken: None,
            setbacks: Vec::new(),
            retries: Retries::default(),
            fruitless_generations: 0,
            stop: None,
            failure: None,
            saved_step: 0,
            hosts: BTreeMap::new(),
            forgiving_until: Duration::ZERO,
        }
    }

    /// The worker in a slot, if one is connected.
    pub fn present(&self, worker: u32) -> Option<&Presence> {
        match self.workers.get(worker as usize) {
            Some(Worker::Present(presence)) => Some(presence),
            _ => None,
        }
    }

    /// As [`State::present`], to change what is known of it.
    pub fn present_mut(&mut self, worker: u32) -> Option<&mut Presence> {
        match self.workers.get_mut(worker as usize) {
            Some(Worker::Present(presence)) => Some(presence),
            _ => None,
        }
    }

    /// The workers with their slots.
    pub(super) fn slots(&self) -> impl Iterator<Item = (u32, &Worker)> {
        (0_u32..).zip(&self.workers)
    }

    /// The furthest finished worker's step, and whether any of them was stopped.
    pub(super) fn first_finished(&self) -> Option<(u64, bool)> {
        let finished = self.workers.iter().filter_map(|worker| match worker {
            Worker::Finished { step, stopped } => Some((*step, *stopped)),
            Worker::Absent(_) | Worker::Present(_) => None,
        });
        finished.reduce(|left, right| (left.0.max(right.0), left.1 || right.1))
    }
}

/// What the workers do together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The slots are being filled.
    Gathering {
        /// When that began.
        since: Duration,
        /// Whether absent workers are worth a wait. They are not after a regroup, which is made for those who are there.
        patient: bool,
    },
    /// A generation runs.
    Running {
        /// Slots of its members, by rank.
        members: Vec<u32>,
        /// Why its members were asked to leave it, once they were.
        regroup: Option<String>,
    },
    /// A generation runs that a coordinator before this one has started; its members are expected to come back.
    Adopting {
        /// Slots of its members, by rank.
        members: Vec<u32>,
        /// When this coordinator began to wait.
        since: Duration,
    },
}

/// One slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Worker {
    /// Nobody is connected.
    Absent(Absence),
    /// A worker is connected.
    Present(Presence),
    /// The worker finished the run and left.
    Finished {
        /// Steps done.
        step: u64,
        /// Whether a stop was asked for before the last step.
        stopped: bool,
    },
}

/// An empty slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absence {
    /// Why it is empty.
    pub cause: String,
    /// What kind of failure emptied it.
    pub class: FailureClass,
    /// Where its last worker was; empty where there was none.
    pub host: String,
    /// Whether somebody may still come to fill it.
    pub is_awaited: bool,
}

/// A connected worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presence {
    /// Its host.
    pub host: String,
    /// When it was last heard of.
    pub heard: Duration,
    /// The generation that it takes part in, or took part in last on this connection; 0 for none.
    pub generation: u64,
    /// Its word that it has left that generation and waits for the next. Heartbeats are no such word: a worker that hangs in an old
    /// collective sends them too.
    pub ready: Option<Ready>,
    /// What it does.
    pub activity: Activity,
}

/// A worker that waits for the next generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Steps done of the state in its memory.
    pub state_step: Option<u64>,
    /// Which part of the state that is; `None` for the whole of it.
    pub share: Option<Share>,
}

/// What a worker does, as it last said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activity {
    /// In which phase it is.
    pub phase: Phase,
    /// Whether it waits for its peers.
    pub waiting: bool,
    /// Its own count of how often it got on.
    pub progress: u64,
    /// Since when that count is the same.
    pub since: Duration,
}

/// A report that the collective failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Who reported it first.
    pub worker: u32,
    /// What it saw.
    pub cause: String,
    /// When.
    pub at: Duration,
}

/// A report about a step that can be tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setback {
    /// Who reports it.
    pub worker: u32,
    /// The step.
    pub step: u64,
    /// A loss that is not finite, or a want of memory.
    pub class: FailureClass,
    /// Whether that worker saw it first.
    pub culprit: bool,
    /// What the user is told if it is final.
    pub failure: Failure,
    /// When.
    pub at: Duration,
}

/// How often a step was tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retries {
    /// The step.
    pub step: u64,
    /// How often.
    pub attempts: u32,
}

impl Retries {
    /// How often `step` was tried again.
    pub fn of(self, step: u64) -> u32 {
        if self.step == step { self.attempts } else { 0 }
    }
}

/// What is known of a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// How often one of its workers was lost.
    pub failures: u32,
    /// Whether it is used no more.
    pub excluded: bool,
}
