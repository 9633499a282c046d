//! The decision about membership, pure: a clock reading, a state and limits in; a decision and its reason out.
//!
//! A worker fills a slot; a generation is an ordered list of slots, and a worker's rank is its place in that list. While all slots
//! are filled the two numbers are the same.

mod gathering;
mod reason;
mod running;
mod silence;
mod state;

use std::time::Duration;

use cloze_recipes::failure::Failure;

pub use self::reason::Reason;
pub use self::silence::excuse;
pub use self::state::{Absence, Activity, Broken, HangLimits, HostRecord, Limits, Presence, Ready, Retries, Setback, Stage, State, Worker};
use crate::protocol::{FailureClass, StateSource};

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Wait,
    /// Start the next generation.
    Start {
        /// Slots of its members, by rank.
        members: Vec<u32>,
        /// Where its state comes from.
        source: StateSource,
    },
    /// Declare a silent or stuck worker lost and close its connection.
    Lose {
        /// Its slot.
        worker: u32,
        /// Whether it is silent or stuck.
        class: FailureClass,
    },
    /// Take the generation over from the coordinator before.
    Adopt,
    /// End the running generation and gather the workers again.
    Abort,
    /// Ask the members to leave the generation without loss, so that the next one can have more.
    Regroup,
    /// The members have left the generation as asked; gather them again.
    Disband,
    /// The run is over as wanted.
    Finish {
        /// Steps done at the final, saved state.
        step: u64,
        /// Whether a stop ended it before the last step.
        stopped: bool,
    },
    /// The run is over with a failure.
    Fail {
        /// Why.
        failure: Failure,
    },
}

/// Decides what to do at `now`, counted from the coordinator's start.
pub fn decide(now: Duration, state: &State, limits: &Limits) -> (Decision, Reason) {
    if let Some(failure) = &state.failure {
        return (Decision::Fail { failure: failure.clone() }, Reason::Failed);
    }
    if let Some(lost) = silence::first_lost(now, state, limits) {
        return lost;
    }
    match &state.stage {
        Stage::Running { members, regroup } => running::decide(now, state, (members, regroup.as_deref()), limits),
        Stage::Gathering { since, patient } => gathering::decide(now, state, (*since, *patient), limits),
        Stage::Adopting { members, since } => running::decide_adoption(now, state, (members, *since), limits),
    }
}

/// Whether a host is to be used no more, now that its workers have failed this often. A run that could not go on without it keeps it:
/// as many workers as it needs, and at least one, must be connected from other hosts.
pub fn is_host_to_be_excluded(state: &State, host: &str, limits: &Limits) -> bool {
    let Some(record) = state.hosts.get(host) else { return false };
    let is_bound_reached = limits.exclude_host_after > 0 && record.failures >= limits.exclude_host_after;
    let num_elsewhere = state.workers.iter().filter(|worker| matches!(worker, Worker::Present(presence) if presence.host != host)).count();
    let num_needed = limits.min_workers.unwrap_or(1).max(1) as usize;
    is_bound_reached && !record.excluded && num_elsewhere >= num_needed
}

#[cfg(test)]
mod tests;
