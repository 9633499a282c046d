//! Between generations: who is there, who is waited for, and when the next generation starts.

use std::collections::BTreeSet;
use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};

use super::reason::workers_text;
use super::{Decision, Limits, Reason, State, Worker};
use crate::protocol::{Share, StateSource};

/// The slots, by what they lack.
struct Census {
    present: Vec<u32>,
    /// Slots that nobody fills.
    missing: Vec<u32>,
    /// Connected workers that have not left the last generation yet, or prepare for their first.
    num_unready: usize,
    /// Whether somebody may still come to fill an empty slot.
    is_somebody_awaited: bool,
}

pub(super) fn decide(now: Duration, state: &State, (since, patient): (Duration, bool), limits: &Limits) -> (Decision, Reason) {
    // The proof can arrive after the generation was aborted because of another worker.
    if let Some((step, stopped)) = state.first_finished() {
        return (Decision::Finish { step, stopped }, Reason::AllFinished);
    }
    if let Some(by) = &state.stop {
        let decision = match unsaved(state, limits) {
            Unsaved::Nothing => Decision::Finish { step: state.saved_step, stopped: true },
            Unsaved::NotKnown => Decision::Wait,
            Unsaved::Held { worker, step } => Decision::Start { members: vec![worker], source: StateSource::Peer { rank: 0, step } },
            Unsaved::Shared(shared) => Decision::Start { source: shared.source(), members: shared.holders },
        };
        return (decision, Reason::StopRequested { by: by.clone() });
    }
    if state.fruitless_generations > limits.max_fruitless_generations {
        return (Decision::Fail { failure: fruitless_failure(state) }, Reason::Fruitless);
    }
    let census = count(state);
    let workers = census.present.len() as u32;
    let is_enough = limits.min_workers.is_some_and(|min_workers| workers >= min_workers.max(1));
    if census.num_unready == 0 {
        if census.missing.is_empty() {
            return (start(state, census.present, limits), Reason::AllJoined { workers });
        }
        let is_wait_over = !patient || !census.is_somebody_awaited || now >= since + limits.replacement_wait;
        if is_enough && is_wait_over {
            return (start(state, census.present, limits), Reason::Fewer { workers, missing: census.missing });
        }
    }
    let Census { missing, .. } = census;
    // Workers that are connected and not ready are not waited for without bound either: they get stuck.
    if !missing.is_empty() && !is_enough && now > since + limits.join_timeout {
        let failure = join_timeout_failure(state, &missing, limits);
        return (Decision::Fail { failure }, Reason::JoinTimeout { missing });
    }
    (Decision::Wait, Reason::Waiting { missing })
}

/// What a stop would lose.
enum Unsaved {
    /// No worker holds more than the newest checkpoint does.
    Nothing,
    /// Some worker has not left its generation yet, and may hold more.
    NotKnown,
    /// This worker holds the newest state.
    Held { worker: u32, step: u64 },
    /// These workers hold it together.
    Shared(SharedState),
}

/// A state that several workers hold together.
struct SharedState {
    step: u64,
    /// Ranks that shared it out.
    world_size: u32,
    /// The slots of those who hold it.
    holders: Vec<u32>,
}

impl SharedState {
    fn source(&self) -> StateSource {
        StateSource::Shares { step: self.step, world_size: self.world_size }
    }
}

/// Looks for steps that are in memory only. Where the state is shared out, all shares must be there.
fn unsaved(state: &State, limits: &Limits) -> Unsaved {
    if !limits.state_is_replicated {
        return unsaved_shares(state);
    }
    let mut newest: Option<(u32, u64)> = None;
    for (slot, worker) in state.slots() {
        let Worker::Present(presence) = worker else { continue };
        match presence.ready {
            None if presence.generation > 0 => return Unsaved::NotKnown,
            None => {}
            Some(ready) => {
                let step = ready.state_step.filter(|&step| step > newest.map_or(state.saved_step, |(_, newest)| newest));
                newest = step.map(|step| (slot, step)).or(newest);
            }
        }
    }
    newest.map_or(Unsaved::Nothing, |(worker, step)| Unsaved::Held { worker, step })
}

fn unsaved_shares(state: &State) -> Unsaved {
    let is_leaving = |worker: &Worker| matches!(worker, Worker::Present(presence) if presence.ready.is_none() && presence.generation > 0);
    if state.workers.iter().any(is_leaving) {
        return Unsaved::NotKnown;
    }
    match shared_state(state, &count(state).present).filter(|shared| shared.step > state.saved_step) {
        Some(shared) => Unsaved::Shared(shared),
        None => Unsaved::Nothing,
    }
}

fn count(state: &State) -> Census {
    let mut census = Census { present: Vec::new(), missing: Vec::new(), num_unready: 0, is_somebody_awaited: false };
    for (slot, worker) in state.slots() {
        match worker {
            Worker::Present(presence) => {
                census.present.push(slot);
                census.num_unready += usize::from(presence.ready.is_none());
            }
            Worker::Absent(absence) => {
                census.missing.push(slot);
                census.is_somebody_awaited |= absence.is_awaited;
            }
            // Where one worker has finished, the run is over before anybody counts.
            Worker::Finished { .. } => census.missing.push(slot),
        }
    }
    census
}

fn start(state: &State, members: Vec<u32>, limits: &Limits) -> Decision {
    let source = source(state, &members, limits);
    Decision::Start { members, source }
}

/// The newest state in any member's memory, unless a checkpoint is newer. Where it is shared out, all shares are needed.
fn source(state: &State, members: &[u32], limits: &Limits) -> StateSource {
    if !limits.state_is_replicated {
        let shared = shared_state(state, members).filter(|shared| shared.step >= state.saved_step);
        return shared.map_or(StateSource::Checkpoint, |shared| shared.source());
    }
    let mut newest: Option<(u32, u64)> = None;
    for (rank, &slot) in (0_u32..).zip(members) {
        let state_step = state.present(slot).and_then(|presence| presence.ready).and_then(|ready| ready.state_step);
        if let Some(step) = state_step
            && newest.is_none_or(|(_, newest_step)| step > newest_step)
        {
            newest = Some((rank, step));
        }
    }
    match newest {
        Some((rank, step)) if step >= state.saved_step => StateSource::Peer { rank, step },
        _ => StateSource::Checkpoint,
    }
}

/// The newest state of which the members hold every share, as its owner or as a replica.
fn shared_state(state: &State, members: &[u32]) -> Option<SharedState> {
    let held: Vec<(u32, u64, Share)> = members
        .iter()
        .filter_map(|&slot| Some((slot, state.present(slot)?.ready?)))
        .filter_map(|(slot, ready)| Some((slot, ready.state_step?, ready.share?)))
        .filter(|(_, _, share)| share.world_size as usize <= state.workers.len())
        .collect();
    let divisions: BTreeSet<(u64, u32)> = held.iter().map(|(_, step, share)| (*step, share.world_size)).collect();
    divisions.into_iter().rev().find_map(|division| whole_of(division, &held))
}

/// The state of a step that so many ranks shared out, if all of it is there.
///
/// An update needs nothing of other ranks once the gradients are summed, and no rank makes it before all have begun to sum the norm, which comes
/// last. So the shares are of one step, or of two; who is one behind has the sums of the other and follows.
fn whole_of((step, world_size): (u64, u32), held: &[(u32, u64, Share)]) -> Option<SharedState> {
    let mut is_held = vec![false; world_size as usize];
    let mut holders = Vec::new();
    for (slot, own_step, share) in held.iter().filter(|(_, _, share)| share.world_size == world_size) {
        if *own_step == step || (own_step + 1 == step && share.next_is_summed) {
            for rank in [Some(share.rank), share.replica_of].into_iter().flatten() {
                *is_held.get_mut(rank as usize)? = true;
            }
            holders.push(*slot);
        }
    }
    is_held.into_iter().all(|is_held| is_held).then_some(SharedState { step, world_size, holders })
}

fn join_timeout_failure(state: &State, missing: &[u32], limits: &Limits) -> Failure {
    let causes: Vec<String> = missing
        .iter()
        .filter_map(|&slot| match state.workers.get(slot as usize) {
            Some(Worker::Absent(absence)) => Some(format!("worker {slot}: {}", absence.cause)),
            _ => None,
        })
        .collect();
    let num_workers = state.workers.len();
    let wanted = match limits.min_workers {
        Some(min_workers) => format!("{min_workers} of {num_workers}"),
        None => num_workers.to_string(),
    };
    Failure::new(FailureKind::Run, format!("{} did not join in time", workers_text(missing)))
        .expected(format!("within {:.1} s, {wanted} joined", limits.join_timeout.as_secs_f64()))
        .found(format!("{} joined", num_workers - missing.len()))
        .because(causes.join("; "))
        .hint("the workers' own words are in the run folder under logs/")
}

fn fruitless_failure(state: &State) -> Failure {
    Failure::new(FailureKind::Run, "the workers cannot exchange gradients")
        .expected("a generation that completes a step")
        .found(format!("{} generations in a row broke while all workers lived", state.fruitless_generations))
        .hint("look for `generation_aborted` in events.jsonl; a firewall between the workers or a collective timeout that is too short are usual")
}
