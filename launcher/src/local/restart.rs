//! What to do about a worker process that ended, pure: facts and limits in; a decision and its reason out.

use std::fmt;
use std::time::Duration;

use cloze_cluster::FailureClass;
use cloze_recipes::failure::FailureKind;

/// Wait before a slot's first replacement.
const FIRST_BACKOFF_MS: u64 = 200;

/// Longest wait before a replacement.
const LONGEST_BACKOFF_MS: u64 = 10_100;

/// Doublings of the first wait after which it is above the longest: 200 ms · 2^6 = 12.8 s.
const MAX_BACKOFF_DOUBLINGS: u32 = 6;

/// Bounds of restarting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RestartLimits {
    /// Replacements over the whole run.
    pub max_restarts: u32,
    /// Fewest workers with which the run goes on; `None` needs every slot.
    pub min_workers: Option<u32>,
}

/// What is known when a process has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExitFacts {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// The worker had said that it is done.
    pub finished: bool,
    /// The run is being stopped.
    pub stopping: bool,
    /// Replacements of the whole run so far.
    pub restarts: u32,
    /// Replacements of this slot so far.
    pub slot_restarts: u32,
    /// How the coordinator lost the worker, where it said so before the process ended.
    pub class: Option<FailureClass>,
    /// This host is used no more.
    pub excluded: bool,
    /// Slots of the run, this one aside, that were not left empty for good.
    pub others: u32,
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ExitDecision {
    /// Nothing; the process was to end.
    Expected,
    /// Start a replacement.
    Restart {
        /// When, from now.
        after: Duration,
        /// Replacements that are left then.
        budget_left: u32,
    },
    /// The run goes on with one worker fewer.
    LeaveEmpty,
    /// End the run.
    GiveUp {
        /// Kind of the run's failure.
        kind: FailureKind,
    },
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExitReason {
    /// It had finished.
    Finished,
    /// The run stops.
    Stopping,
    /// It ended early and can be replaced.
    EndedEarly,
    /// Its exit code names a failure that a replacement would meet again.
    Incurable,
    /// Its host failed too often.
    HostExcluded,
    /// All replacements are used.
    BudgetSpent {
        /// How many that were.
        max_restarts: u32,
    },
}

/// Decides what to do about a process that ended.
pub(super) fn decide_exit(exit: &ExitFacts, limits: &RestartLimits) -> (ExitDecision, ExitReason) {
    if exit.finished {
        return (ExitDecision::Expected, ExitReason::Finished);
    }
    if exit.stopping {
        return (ExitDecision::Expected, ExitReason::Stopping);
    }
    if exit.excluded || exit.class == Some(FailureClass::Excluded) {
        return (ExitDecision::LeaveEmpty, ExitReason::HostExcluded);
    }
    if let Some(kind) = exit.code.and_then(incurable_kind).filter(|_| !is_cured_by_a_new_process(exit.class)) {
        return (without_replacement(exit, limits, kind), ExitReason::Incurable);
    }
    let Some(budget_left) = limits.max_restarts.checked_sub(exit.restarts + 1) else {
        let reason = ExitReason::BudgetSpent { max_restarts: limits.max_restarts };
        return (without_replacement(exit, limits, FailureKind::Run), reason);
    };
    (ExitDecision::Restart { after: backoff(exit.slot_restarts), budget_left }, ExitReason::EndedEarly)
}

/// A slot that nobody fills any more ends the run, unless the recipe lets it go on with fewer and enough are left.
fn without_replacement(exit: &ExitFacts, limits: &RestartLimits, kind: FailureKind) -> ExitDecision {
    match limits.min_workers {
        Some(min_workers) if exit.others >= min_workers => ExitDecision::LeaveEmpty,
        _ => ExitDecision::GiveUp { kind },
    }
}

/// Whether the worker was lost in a way that lies in its process and not in what it was given, whatever it says at its end.
fn is_cured_by_a_new_process(class: Option<FailureClass>) -> bool {
    matches!(
        class,
        Some(
            FailureClass::MissedHeartbeat
                | FailureClass::Hung
                | FailureClass::NotFinite
                | FailureClass::OutOfMemory
                | FailureClass::Device
                | FailureClass::Collective
        )
    )
}

/// Wait before a slot's next replacement: doubles with each, up to a bound.
fn backoff(slot_restarts: u32) -> Duration {
    let factor = 1 << slot_restarts.min(MAX_BACKOFF_DOUBLINGS);
    Duration::from_millis((FIRST_BACKOFF_MS * factor).min(LONGEST_BACKOFF_MS))
}

/// Exit codes with which the system itself ends a program that it cannot execute, or whose libraries it cannot load.
const EXIT_CODE_NOT_EXECUTABLE: i32 = 126;
const EXIT_CODE_NOT_LOADED: i32 = 127;

/// Kinds of failure that depend on what the worker was given, not on chance.
fn incurable_kind(code: i32) -> Option<FailureKind> {
    if [EXIT_CODE_NOT_EXECUTABLE, EXIT_CODE_NOT_LOADED].contains(&code) {
        return Some(FailureKind::Environment);
    }
    [FailureKind::Recipe, FailureKind::Input, FailureKind::Environment, FailureKind::Damaged, FailureKind::Mismatch]
        .into_iter()
        .find(|kind| i32::from(kind.exit_code()) == code)
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished => f.write_str("it had finished"),
            Self::Stopping => f.write_str("the run stops"),
            Self::EndedEarly => f.write_str("it ended early"),
            Self::Incurable => f.write_str("a replacement would fail in the same way"),
            Self::HostExcluded => f.write_str("its host failed too often and is used no more (`cluster.exclude_host_after`)"),
            Self::BudgetSpent { max_restarts: 0 } => f.write_str("no replacement is allowed (`cluster.max_restarts` is 0)"),
            Self::BudgetSpent { max_restarts } => {
                write!(f, "all {max_restarts} replacements of this run are used (`cluster.max_restarts`)")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn early(code: Option<i32>, restarts: u32, slot_restarts: u32) -> ExitFacts {
        ExitFacts { code, finished: false, stopping: false, restarts, slot_restarts, class: None, excluded: false, others: 3 }
    }

    fn restart(after_ms: u64, budget_left: u32) -> ExitDecision {
        ExitDecision::Restart { after: Duration::from_millis(after_ms), budget_left }
    }

    #[test]
    fn exits() {
        let lost = |class, code| ExitFacts { class: Some(class), ..early(code, 0, 0) };
        let give_up = |kind| ExitDecision::GiveUp { kind };
        let cases = [
            ("after its last words", ExitFacts { finished: true, ..early(Some(0), 0, 0) }, ExitDecision::Expected, ExitReason::Finished),
            ("crash after its last words", ExitFacts { finished: true, ..early(None, 0, 0) }, ExitDecision::Expected, ExitReason::Finished),
            ("while stopping", ExitFacts { stopping: true, ..early(Some(9), 0, 0) }, ExitDecision::Expected, ExitReason::Stopping),
            ("killed", early(None, 0, 0), restart(200, 1), ExitReason::EndedEarly),
            ("code 0 without last words", early(Some(0), 0, 0), restart(200, 1), ExitReason::EndedEarly),
            ("second crash of one slot", early(Some(101), 1, 1), restart(400, 0), ExitReason::EndedEarly),
            ("second crash, another slot", early(Some(101), 1, 0), restart(200, 0), ExitReason::EndedEarly),
            ("third crash", early(Some(101), 2, 0), give_up(FailureKind::Run), ExitReason::BudgetSpent { max_restarts: 2 }),
            ("no libtorch", early(Some(5), 0, 0), give_up(FailureKind::Environment), ExitReason::Incurable),
            ("another recipe", early(Some(8), 0, 0), give_up(FailureKind::Mismatch), ExitReason::Incurable),
            ("told, then ended", lost(FailureClass::Other, Some(8)), give_up(FailureKind::Mismatch), ExitReason::Incurable),
            ("a bucket that is away", early(Some(6), 0, 0), restart(200, 1), ExitReason::EndedEarly),
            ("a lost coordinator", early(Some(9), 0, 0), restart(200, 1), ExitReason::EndedEarly),
            ("no memory on its device", lost(FailureClass::OutOfMemory, Some(5)), restart(200, 1), ExitReason::EndedEarly),
            ("a GPU that failed", lost(FailureClass::Device, Some(5)), restart(200, 1), ExitReason::EndedEarly),
            ("killed because it hung", lost(FailureClass::Hung, None), restart(200, 1), ExitReason::EndedEarly),
            ("refused for its host", lost(FailureClass::Excluded, Some(5)), ExitDecision::LeaveEmpty, ExitReason::HostExcluded),
            ("a bad host", ExitFacts { excluded: true, ..early(None, 0, 0) }, ExitDecision::LeaveEmpty, ExitReason::HostExcluded),
        ];
        for (name, facts, decision, reason) in cases {
            assert_eq!(decide_exit(&facts, &RestartLimits { max_restarts: 2, min_workers: None }), (decision, reason), "{name}");
        }
    }

    #[test]
    fn an_elastic_run_goes_on_with_fewer() {
        let spent = ExitReason::BudgetSpent { max_restarts: 2 };
        let cases = [
            ("within the budget", early(None, 0, 0), restart(200, 1), ExitReason::EndedEarly),
            ("enough others", early(None, 2, 0), ExitDecision::LeaveEmpty, spent),
            ("too few others", ExitFacts { others: 1, ..early(None, 2, 0) }, ExitDecision::GiveUp { kind: FailureKind::Run }, spent),
            ("just enough others", ExitFacts { others: 2, ..early(Some(5), 0, 0) }, ExitDecision::LeaveEmpty, ExitReason::Incurable),
        ];
        for (name, facts, decision, reason) in cases {
            assert_eq!(decide_exit(&facts, &RestartLimits { max_restarts: 2, min_workers: Some(2) }), (decision, reason), "{name}");
        }
    }

    #[test]
    fn no_budget_at_all() {
        let (decision, reason) = decide_exit(&early(None, 0, 0), &RestartLimits { max_restarts: 0, min_workers: None });
        assert_eq!(decision, ExitDecision::GiveUp { kind: FailureKind::Run });
        assert_eq!(reason.to_string(), "no replacement is allowed (`cluster.max_restarts` is 0)");
    }

    #[test]
    fn waits_double_up_to_a_bound() {
        let waits: Vec<u128> = [0, 1, 2, 5, 6, 7, u32::MAX].into_iter().map(|restarts| backoff(restarts).as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 6_400, 10_100, 10_100, 10_100]);
    }
}
