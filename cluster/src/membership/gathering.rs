//! Between generations: who is there, who is waited for, and when the next generation starts.

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
            Unsaved::Shared { members, step } => Decision::Start { members, source: StateSource::Shares { step } },
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
    Shared { members: Vec<u32>, step: u64 },
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
    let members = count(state).present;
    match shared_step(state, &members).filter(|&step| step > state.saved_step) {
        Some(step) => Unsaved::Shared { members, step },
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

/// The newest state in any member's memory, unless a checkpoint is newer. Where it is shared out, all shares of one step are needed.
fn source(state: &State, members: &[u32], limits: &Limits) -> StateSource {
    if !limits.state_is_replicated {
        let step = shared_step(state, members).filter(|&step| step >= state.saved_step);
        return step.map_or(StateSource::Checkpoint, |step| StateSource::Shares { step });
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

/// The step of which each member holds the share of its rank to be.
fn shared_step(state: &State, members: &[u32]) -> Option<u64> {
    let world_size = members.len() as u32;
    let mut common = None;
    for (rank, &slot) in (0_u32..).zip(members) {
        let ready = state.present(slot)?.ready?;
        if ready.share != Some(Share { rank, world_size }) || *common.get_or_insert(ready.state_step?) != ready.state_step? {
            return None;
        }
    }
    common
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
