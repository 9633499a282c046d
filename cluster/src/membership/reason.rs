//! Why a decision was made, for events, logs and tests.

use std::fmt;
use std::time::Duration;

use crate::protocol::{FailureClass, Phase};

/// Why a decision was made; serves events, logs and tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Slots are still empty, or their workers have not left the last generation yet.
    Waiting {
        /// The empty slots.
        missing: Vec<u32>,
    },
    /// The generation runs.
    Training,
    /// All slots are filled.
    AllJoined {
        /// Number of workers.
        workers: u32,
    },
    /// Some slots are filled, and the others were waited for long enough.
    Fewer {
        /// Number of workers.
        workers: u32,
        /// The empty slots.
        missing: Vec<u32>,
    },
    /// A worker said nothing for too long.
    MissedHeartbeat {
        /// Its slot.
        worker: u32,
        /// How long it has been silent.
        silent: Duration,
    },
    /// A worker made no progress for too long.
    Hung {
        /// Its slot.
        worker: u32,
        /// What it was doing.
        phase: Phase,
        /// For how long it made none.
        stuck: Duration,
    },
    /// A worker of the generation is gone.
    Lost {
        /// Its slot.
        worker: u32,
        /// Its rank.
        rank: u32,
        /// Its host.
        host: String,
        /// What kind of failure it is.
        class: FailureClass,
        /// How it was noticed.
        cause: String,
    },
    /// The collective failed while all workers live.
    Broken {
        /// Who reported it first.
        worker: u32,
        /// Its rank.
        rank: u32,
        /// What it saw.
        cause: String,
    },
    /// A step failed and is tried again.
    Setback {
        /// A loss that is not finite, or a want of memory.
        class: FailureClass,
        /// The step.
        step: u64,
        /// Slot and rank of those who saw it first.
        culprits: Vec<(u32, u32)>,
        /// Ranks of the generation.
        num_ranks: usize,
        /// Which attempt follows, from 1.
        attempt: u32,
    },
    /// Workers wait to take part.
    Joined {
        /// Their slots.
        workers: Vec<u32>,
    },
    /// The generation is to end at another step than its members were told.
    OtherEnd {
        /// After which step; `None` goes on to the end.
        until_step: Option<u64>,
    },
    /// The members have left the generation together.
    Left {
        /// Why.
        why: String,
    },
    /// All members of the generation have come back to a new coordinator.
    AllBack {
        /// Their number.
        workers: u32,
    },
    /// Members of the generation did not come back to a new coordinator.
    NotBack {
        /// Their slots.
        missing: Vec<u32>,
    },
    /// A member's slot is filled by a worker that does not hold the generation any more.
    NotTheSame {
        /// Its slot.
        worker: u32,
    },
    /// Slots stayed empty for too long.
    JoinTimeout {
        /// The empty slots.
        missing: Vec<u32>,
    },
    /// Too many generations broke without a step.
    Fruitless,
    /// A stop was asked for.
    StopRequested {
        /// Who asked.
        by: String,
    },
    /// The workers are done.
    AllFinished,
    /// A worker or the launcher reported a failure that ends the run.
    Failed,
}

impl Reason {
    /// What kind of failure it is, for a reason that ends a generation.
    pub fn class(&self) -> FailureClass {
        match self {
            Self::MissedHeartbeat { .. } => FailureClass::MissedHeartbeat,
            Self::Hung { .. } => FailureClass::Hung,
            Self::Lost { class, .. } | Self::Setback { class, .. } => *class,
            Self::Broken { .. } => FailureClass::Collective,
            // They have ended while no coordinator lived, or have left.
            Self::NotBack { .. } | Self::NotTheSame { .. } => FailureClass::ConnectionClosed,
            _ => FailureClass::Other,
        }
    }

    /// The one worker that is to blame, for a reason that ends a generation.
    pub fn culprit(&self) -> Option<u32> {
        match self {
            Self::Lost { worker, .. } | Self::NotTheSame { worker } => Some(*worker),
            Self::Setback { culprits, .. } => match culprits[..] {
                [(worker, _)] => Some(worker),
                _ => None,
            },
            Self::NotBack { missing } => match missing[..] {
                [worker] => Some(worker),
                _ => None,
            },
            _ => None,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting { missing } if missing.is_empty() => f.write_str("waiting until all workers are ready"),
            Self::Waiting { missing } => write!(f, "waiting for {}", workers_text(missing)),
            Self::Training => f.write_str("training"),
            Self::AllJoined { workers: 1 } => f.write_str("the worker is there"),
            Self::AllJoined { workers } => write!(f, "all {workers} workers are there"),
            Self::Fewer { workers, missing } => {
                let slots = *workers as usize + missing.len();
                write!(f, "{workers} of {slots} workers are there; the run goes on without {}", workers_text(missing))
            }
            Self::MissedHeartbeat { silent, .. } => write!(f, "no heartbeat for {:.1} s", silent.as_secs_f64()),
            Self::Hung { phase, stuck, .. } => write!(f, "no progress for {:.1} s while {phase}", stuck.as_secs_f64()),
            Self::Lost { worker, rank, host, cause, .. } => write!(f, "worker {worker} (rank {rank}){} lost: {cause}", on_host(host)),
            Self::Broken { worker, rank, cause } => {
                write!(f, "the collective broke, as worker {worker} (rank {rank}) reports: {cause}")
            }
            Self::Setback { class, step, culprits, num_ranks, attempt } => {
                write!(f, "{}; attempt {attempt} to do step {step} again", setback_text(*class, culprits, *num_ranks))
            }
            Self::Joined { workers } => write!(f, "{} joined", workers_text(workers)),
            Self::OtherEnd { until_step: Some(step) } => write!(f, "the run is to be left after step {step} now"),
            Self::OtherEnd { until_step: None } => f.write_str("the run is to go on to its end now"),
            Self::Left { why } => f.write_str(why),
            Self::AllBack { workers: 1 } => f.write_str("the worker came back"),
            Self::AllBack { workers } => write!(f, "all {workers} workers came back"),
            Self::NotBack { missing } => write!(f, "{} did not come back to the new coordinator", workers_text(missing)),
            Self::NotTheSame { worker } => write!(f, "worker {worker} came back without the generation"),
            Self::JoinTimeout { missing } => write!(f, "{} did not join in time", workers_text(missing)),
            Self::Fruitless => f.write_str("too many generations broke without a step"),
            Self::StopRequested { by } => write!(f, "stop requested: {by}"),
            Self::AllFinished => f.write_str("all workers are done"),
            Self::Failed => f.write_str("the run failed"),
        }
    }
}

/// `worker 1`, or `workers 1, 3`.
pub(super) fn workers_text(slots: &[u32]) -> String {
    let list = slots.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    if slots.len() == 1 { format!("worker {list}") } else { format!("workers {list}") }
}

fn on_host(host: &str) -> String {
    if host.is_empty() { String::new() } else { format!(" on {host}") }
}

fn setback_text(class: FailureClass, culprits: &[(u32, u32)], num_ranks: usize) -> String {
    let what = |one: bool| match (class, one) {
        (FailureClass::OutOfMemory, _) => "out of memory",
        (_, true) => "its loss is not finite",
        (_, false) => "their loss is not finite",
    };
    match culprits {
        [(worker, rank)] => format!("worker {worker} (rank {rank}): {}", what(true)),
        _ if culprits.is_empty() || culprits.len() == num_ranks => format!("all ranks: {}", what(false)),
        _ => {
            let names: Vec<String> = culprits.iter().map(|(worker, rank)| format!("worker {worker} (rank {rank})")).collect();
            format!("{}: {}", names.join(", "), what(false))
        }
    }
}
