//! While a generation runs, and while one is taken over from another coordinator.

use std::time::Duration;

use cloze_recipes::failure::Failure;

use super::{Decision, Limits, Reason, Setback, State, Worker};
use crate::protocol::FailureClass;

pub(super) fn decide(now: Duration, state: &State, (members, regroup): (&[u32], Option<&str>), limits: &Limits) -> (Decision, Reason) {
    if let Some((step, stopped)) = state.first_finished() {
        // A Finished message proves that the result is saved, so a worker that vanishes after it no longer matters.
        let still_there = members.iter().any(|&slot| state.present(slot).is_some());
        return if still_there { (Decision::Wait, Reason::Training) } else { (Decision::Finish { step, stopped }, Reason::AllFinished) };
    }
    if let Some(first) = state.setbacks.first() {
        return decide_setback(now, state, (members, first), limits);
    }
    if let Some(lost) = first_absent(state, members) {
        return (Decision::Abort, lost);
    }
    if let Some(broken) = &state.broken {
        // A peer that died is the usual cause; its closed connection is about to be noticed and names the culprit.
        if now < broken.at + limits.blame_grace {
            return (Decision::Wait, Reason::Training);
        }
        let reason = Reason::Broken { worker: broken.worker, rank: rank_of(members, broken.worker), cause: broken.cause.clone() };
        return (Decision::Abort, reason);
    }
    if members.iter().all(|&slot| state.present(slot).is_some_and(|presence| presence.ready.is_some())) {
        return (Decision::Disband, Reason::Left { why: regroup.unwrap_or("all workers have left it").to_owned() });
    }
    if regroup.is_none()
        && let Some(joined) = growth(state, members, limits)
    {
        return (Decision::Regroup, Reason::Joined { workers: joined });
    }
    (Decision::Wait, Reason::Training)
}

/// While the members of a generation that a coordinator left behind come back.
pub(super) fn decide_adoption(now: Duration, state: &State, (members, since): (&[u32], Duration), limits: &Limits) -> (Decision, Reason) {
    let is_late = now > since + limits.adopt_timeout;
    let missing: Vec<u32> =
        members.iter().copied().filter(|&slot| matches!(state.workers.get(slot as usize), None | Some(Worker::Absent(_)))).collect();
    if let Some((step, stopped)) = state.first_finished() {
        // The others finish as well; they come back only to say so.
        let still_there = members.iter().any(|&slot| state.present(slot).is_some());
        let is_over = !still_there && (missing.is_empty() || is_late);
        return if is_over {
            (Decision::Finish { step, stopped }, Reason::AllFinished)
        } else {
            (Decision::Wait, Reason::Waiting { missing })
        };
    }
    let is_new = |slot: u32| state.present(slot).is_some_and(|presence| presence.generation != state.generation);
    if let Some(worker) = members.iter().copied().find(|&slot| is_new(slot)) {
        return (Decision::Abort, Reason::NotTheSame { worker });
    }
    if missing.is_empty() {
        return (Decision::Adopt, Reason::AllBack { workers: members.len() as u32 });
    }
    if is_late { (Decision::Abort, Reason::NotBack { missing }) } else { (Decision::Wait, Reason::Waiting { missing }) }
}

fn first_absent(state: &State, members: &[u32]) -> Option<Reason> {
    (0_u32..).zip(members).find_map(|(rank, &worker)| match state.workers.get(worker as usize) {
        Some(Worker::Absent(absence)) => {
            Some(Reason::Lost { worker, rank, host: absence.host.clone(), class: absence.class, cause: absence.cause.clone() })
        }
        _ => None,
    })
}

/// Tries a step again, or gives the run up when that was done often enough.
fn decide_setback(now: Duration, state: &State, (members, first): (&[u32], &Setback), limits: &Limits) -> (Decision, Reason) {
    let num_present = members.iter().filter(|&&slot| state.present(slot).is_some()).count();
    // A loss that is not finite is seen by all ranks at once; the words of those who saw it first are on their way. Where memory ran
    // out, one worker knows.
    let is_complete =
        first.class == FailureClass::OutOfMemory || now >= first.at + limits.blame_grace || state.setbacks.len() >= num_present;
    if !is_complete {
        return (Decision::Wait, Reason::Training);
    }
    let tries = state.retries.of(first.step);
    let culprits = state.setbacks.iter().filter(|setback| setback.culprit && setback.class == first.class);
    let culprits: Vec<(u32, u32)> = culprits.map(|setback| (setback.worker, rank_of(members, setback.worker))).collect();
    if tries >= limits.retries_per_step {
        let told = state.setbacks.iter().find(|setback| setback.culprit).unwrap_or(first);
        let failure = final_failure(told, rank_of(members, told.worker), tries);
        return (Decision::Fail { failure }, Reason::Failed);
    }
    let num_ranks = members.len();
    (Decision::Abort, Reason::Setback { class: first.class, step: first.step, culprits, num_ranks, attempt: tries + 1 })
}

fn final_failure(setback: &Setback, rank: u32, tries: u32) -> Failure {
    let failure = setback.failure.clone();
    let failure = if failure.place.is_some() {
        failure
    } else {
        failure.at(format!("worker {} (rank {rank}), step {}", setback.worker, setback.step))
    };
    if tries == 0 {
        return failure;
    }
    let times = if tries == 1 { "once".to_owned() } else { format!("{tries} times") };
    let tried = format!("the step was tried again {times} (`cluster.retries_per_step`) and failed in the same way");
    let hint = failure.hint.as_ref().map_or_else(|| tried.clone(), |hint| format!("{tried}; {hint}"));
    failure.hint(hint)
}

/// Connected workers that wait to take part in a run that goes on with fewer than it could.
fn growth(state: &State, members: &[u32], limits: &Limits) -> Option<Vec<u32>> {
    if limits.min_workers.is_none() || state.stop.is_some() || members.len() == state.workers.len() {
        return None;
    }
    let waits = |slot: &u32| state.present(*slot).is_some_and(|presence| presence.ready.is_some());
    // Members come in the order of their slots, so one pass over both is enough.
    let mut rest = members.iter().peekable();
    let outside = (0..state.workers.len() as u32).filter(|slot| rest.next_if_eq(&slot).is_none());
    let joined: Vec<u32> = outside.filter(waits).collect();
    (!joined.is_empty()).then_some(joined)
}

/// A member's rank. Only members' words are kept, so the other case does not occur.
fn rank_of(members: &[u32], worker: u32) -> u32 {
    members.iter().position(|&slot| slot == worker).unwrap_or(worker as usize) as u32
}
