//! Who is lost without having said so: workers that are silent, and workers that make no progress.

use std::time::Duration;

use super::{Activity, Decision, Limits, Presence, Reason, Stage, State, Worker};
use crate::protocol::FailureClass;

/// The first worker that is silent or stuck.
pub(super) fn first_lost(now: Duration, state: &State, limits: &Limits) -> Option<(Decision, Reason)> {
    state.slots().find_map(|(worker, slot)| {
        let Worker::Present(presence) = slot else { return None };
        let silent = now.saturating_sub(presence.heard);
        if silent > limits.heartbeat_timeout {
            let decision = Decision::Lose { worker, class: FailureClass::MissedHeartbeat };
            return Some((decision, Reason::MissedHeartbeat { worker, silent }));
        }
        let stuck = stuck_for(now, state, presence, limits)?;
        let reason = Reason::Hung { worker, phase: presence.activity.phase, stuck };
        Some((Decision::Lose { worker, class: FailureClass::Hung }, reason))
    })
}

/// How long a worker has made no progress, when that is longer than it may be.
fn stuck_for(now: Duration, state: &State, presence: &Presence, limits: &Limits) -> Option<Duration> {
    // Who waits for the next generation, waits for others.
    if presence.ready.is_some() {
        return None;
    }
    let Activity { phase, waiting, since, .. } = presence.activity;
    let since = match &state.stage {
        // Who waits in a collective waits for a peer: that one is stuck, or the collective's own timeout decides.
        Stage::Running { .. } | Stage::Adopting { .. } if waiting => return None,
        Stage::Running { .. } | Stage::Adopting { .. } => since,
        // The end of the generation frees whoever waited in its collective, from then on.
        Stage::Gathering { since: ended, .. } => since.max(*ended),
    };
    let stuck = now.saturating_sub(since);
    (stuck > limits.hang.of(phase)).then_some(stuck)
}
