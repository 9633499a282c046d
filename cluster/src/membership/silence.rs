//! Who is lost without having said so: workers that are silent, and workers that make no progress. And what is nobody's silence: the
//! time in which the coordinator itself did not listen.

use std::time::Duration;

use super::{Activity, Decision, Limits, Presence, Reason, Stage, State, Worker};
use crate::protocol::FailureClass;

/// Gives the workers the time back in which nobody listened: until `now`, for `gap`. Everybody who is connected counts as heard now, and
/// every wait that was under way has as long left as before. A gap that is shorter than half the heartbeat timeout is none.
///
/// After a gap that is longer than the heartbeat timeout, workers may have taken this coordinator for dead and hung up. For another such
/// timeout they count as connected all the same, in [`State::forgiving_until`], so that they can come back to the generation that they
/// still train in. One that does not is silent from then on.
pub fn excuse(now: Duration, gap: Duration, state: &mut State, limits: &Limits) {
    if gap <= limits.heartbeat_timeout / 2 {
        return;
    }
    let later = |then: Duration| now.min(then + gap);
    for worker in &mut state.workers {
        if let Worker::Present(presence) = worker {
            presence.heard = now.max(presence.heard);
            presence.activity.since = later(presence.activity.since);
        }
    }
    if let Stage::Gathering { since, .. } | Stage::Adopting { since, .. } = &mut state.stage {
        *since = later(*since);
    }
    if let Some(broken) = &mut state.broken {
        broken.at = later(broken.at);
    }
    for setback in &mut state.setbacks {
        setback.at = later(setback.at);
    }
    if gap > limits.heartbeat_timeout {
        state.forgiving_until = now + limits.heartbeat_timeout;
    }
}

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
