//! What to do when `cloze join` on another host ends, pure: facts and limits in; a decision and its reason out.

use std::fmt;
use std::time::Duration;

use cloze_recipes::failure::FailureKind;

/// Wait before a host is tried again, in seconds, times the attempt.
const BACKOFF_S: u64 = 1;
/// Longest wait, in seconds.
const MAX_BACKOFF_S: u64 = 10;
/// Exit codes of a shell that cannot run the command.
const NOT_RUN: [i32; 2] = [126, 127];
/// Exit code of a `cloze join` that was asked to stop.
const STOPPED: i32 = 130;

/// What is known when it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HostFacts {
    /// Exit code of the remote shell, which passes that of the command on; `None` after a signal.
    pub code: Option<i32>,
    /// `cloze join` had begun there.
    pub was_there: bool,
    /// The run ends.
    pub ending: bool,
    /// Restarts of all hosts so far.
    pub restarts: u32,
    /// Restarts of this host so far.
    pub host_restarts: u32,
    /// Bound of the restarts of all hosts.
    pub max_restarts: u32,
    /// Slots of the run that are left without this host.
    pub others: u32,
    /// Fewest workers with which the run goes on; `None` needs every slot.
    pub min_workers: Option<u32>,
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HostDecision {
    /// Nothing; it was to end.
    Expected,
    /// Start it again.
    Restart {
        /// When, from now.
        after: Duration,
    },
    /// The run goes on without the host's slots.
    LeaveEmpty,
    /// End the run.
    GiveUp {
        /// Kind of its failure.
        kind: FailureKind,
    },
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostReason {
    /// It did all it had to, or the run ends.
    Done,
    /// It was never there.
    NotReached,
    /// There is no `cloze` that can be run there.
    NotRun,
    /// What it says would be the same again.
    Incurable,
    /// It was there, and the way to it broke.
    Lost,
    /// And all restarts are used.
    BudgetSpent,
}

impl fmt::Display for HostReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Done => "it is done",
            Self::NotReached => "the host cannot be reached",
            Self::NotRun => "this program cannot be run there",
            Self::Incurable => "`cloze join` gave up there",
            Self::Lost => "the way to the host broke",
            Self::BudgetSpent => "all restarts of this run are used (`cluster.max_restarts`)",
        })
    }
}

/// Decides what to do about a host whose `cloze join` ended.
pub(super) fn decide_host_exit(facts: &HostFacts) -> (HostDecision, HostReason) {
    if facts.ending || matches!(facts.code, Some(0 | STOPPED)) {
        return (HostDecision::Expected, HostReason::Done);
    }
    if facts.code.is_some_and(|code| NOT_RUN.contains(&code)) {
        return (without_host(facts, FailureKind::Environment), HostReason::NotRun);
    }
    if let Some(kind) = facts.code.and_then(failure_kind) {
        return (without_host(facts, kind), HostReason::Incurable);
    }
    if !facts.was_there && facts.host_restarts == 0 {
        return (without_host(facts, FailureKind::Environment), HostReason::NotReached);
    }
    if facts.restarts >= facts.max_restarts {
        return (without_host(facts, FailureKind::Run), HostReason::BudgetSpent);
    }
    let after = Duration::from_secs((BACKOFF_S * u64::from(facts.host_restarts + 1)).min(MAX_BACKOFF_S));
    (HostDecision::Restart { after }, HostReason::Lost)
}

fn without_host(facts: &HostFacts, kind: FailureKind) -> HostDecision {
    match facts.min_workers {
        Some(min_workers) if facts.others >= min_workers => HostDecision::LeaveEmpty,
        _ => HostDecision::GiveUp { kind },
    }
}

/// The failure that an exit code of `cloze` stands for.
fn failure_kind(code: i32) -> Option<FailureKind> {
    use FailureKind::{Damaged, Environment, Input, Mismatch, Recipe, Run, Storage};
    [Recipe, Input, Environment, Storage, Damaged, Mismatch, Run].into_iter().find(|kind| i32::from(kind.exit_code()) == code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_tried_again_only_where_that_can_help() {
        use HostDecision::{Expected, GiveUp, LeaveEmpty, Restart};
        let usual = HostFacts {
            code: Some(255),
            was_there: true,
            ending: false,
            restarts: 0,
            host_restarts: 0,
            max_restarts: 2,
            others: 2,
            min_workers: None,
        };
        let after = |seconds| Restart { after: Duration::from_secs(seconds) };
        let give_up = |kind| GiveUp { kind };
        let cases = [
            (usual, after(1), HostReason::Lost),
            (HostFacts { code: None, host_restarts: 1, restarts: 1, ..usual }, after(2), HostReason::Lost),
            (HostFacts { host_restarts: 50, max_restarts: 100, ..usual }, after(10), HostReason::Lost),
            (HostFacts { was_there: false, host_restarts: 1, restarts: 1, ..usual }, after(2), HostReason::Lost),
            (HostFacts { restarts: 2, ..usual }, give_up(FailureKind::Run), HostReason::BudgetSpent),
            (HostFacts { restarts: 2, min_workers: Some(2), ..usual }, LeaveEmpty, HostReason::BudgetSpent),
            (HostFacts { restarts: 2, min_workers: Some(3), ..usual }, give_up(FailureKind::Run), HostReason::BudgetSpent),
            (HostFacts { was_there: false, ..usual }, give_up(FailureKind::Environment), HostReason::NotReached),
            (HostFacts { was_there: false, min_workers: Some(1), ..usual }, LeaveEmpty, HostReason::NotReached),
            (HostFacts { code: Some(127), was_there: false, ..usual }, give_up(FailureKind::Environment), HostReason::NotRun),
            (HostFacts { code: Some(8), ..usual }, give_up(FailureKind::Mismatch), HostReason::Incurable),
            (HostFacts { code: Some(9), min_workers: Some(1), ..usual }, LeaveEmpty, HostReason::Incurable),
            (HostFacts { code: Some(0), ..usual }, Expected, HostReason::Done),
            (HostFacts { code: Some(130), ..usual }, Expected, HostReason::Done),
            (HostFacts { ending: true, ..usual }, Expected, HostReason::Done),
        ];
        for (facts, decision, reason) in cases {
            assert_eq!(decide_host_exit(&facts), (decision, reason), "{facts:?}");
        }
    }
}
