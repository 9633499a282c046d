//! Which checkpoints stay and which go. A pure decision with its reasons.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A damaged newest checkpoint must have a predecessor, whatever a recipe says.
pub const MIN_KEPT_GOOD: usize = 2;

/// Whose checkpoint it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The run's for which this is decided.
    Ours,
    /// Another run's, which has the same place by mistake.
    Other,
    /// There is no manifest that could say.
    Unknown,
}

/// What is known of the objects of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Facts {
    /// Whose it is.
    pub owner: Owner,
    /// The manifest is there and its files agree with it.
    pub is_good: bool,
    /// It was saved by time, between the regular steps.
    pub is_temporary: bool,
    /// Training loss of its step.
    pub loss: Option<f64>,
}

/// What is to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Newest good checkpoints; at least two are kept in any case.
    pub last: usize,
    /// Good checkpoints with the lowest losses.
    pub best: usize,
    /// Good checkpoints of steps that are a multiple of this.
    pub every_steps: Option<u64>,
}

/// What becomes of a step, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Among the newest good ones.
    KeepNewest,
    /// Among those with the lowest loss.
    KeepBest,
    /// Its step is one that is kept for good.
    KeepStep,
    /// Another run's.
    KeepOther,
    /// Not good, and perhaps another run's, since that one has checkpoints here.
    KeepUnclear,
    /// Not good, but not older than the newest good one: it may be a save in progress.
    KeepPending,
    /// Good, and none of the reasons to keep it holds.
    DeleteSurplus,
    /// Not good, and older than the newest good one.
    DeleteIncomplete,
}

impl Verdict {
    /// Whether the step goes.
    pub fn is_deletion(self) -> bool {
        matches!(self, Self::DeleteSurplus | Self::DeleteIncomplete)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KeepNewest => "kept: among the newest",
            Self::KeepBest => "kept: among the lowest losses",
            Self::KeepStep => "kept: a step that is kept for good",
            Self::KeepOther => "kept: another run's",
            Self::KeepUnclear => "kept: incomplete, and may be another run's",
            Self::KeepPending => "kept: may be a save in progress",
            Self::DeleteSurplus => "deleted: no longer needed",
            Self::DeleteIncomplete => "deleted: incomplete or damaged, and old",
        })
    }
}

/// Decides on every step. Temporary checkpoints only count as newest ones, and another run's count for nothing.
pub fn decide(steps: &BTreeMap<u64, Facts>, limits: &Limits) -> BTreeMap<u64, Verdict> {
    let good: Vec<u64> = steps.iter().filter(|(_, facts)| is_ours(facts)).map(|(step, _)| *step).collect();
    let newest_good = good.last().copied();
    let is_shared = steps.values().any(|facts| facts.owner == Owner::Other);
    let newest: BTreeSet<u64> = good.iter().rev().take(limits.last.max(MIN_KEPT_GOOD)).copied().collect();
    let best = best(steps, limits.best);
    let verdict = |step: u64, facts: &Facts| {
        let is_for_good = !facts.is_temporary && limits.every_steps.is_some_and(|every| every > 0 && step.is_multiple_of(every));
        match facts.owner {
            Owner::Other => return Verdict::KeepOther,
            Owner::Unknown if is_shared => return Verdict::KeepUnclear,
            Owner::Ours | Owner::Unknown => {}
        }
        if !facts.is_good {
            return if newest_good.is_some_and(|newest| step < newest) { Verdict::DeleteIncomplete } else { Verdict::KeepPending };
        }
        if newest.contains(&step) {
            Verdict::KeepNewest
        } else if is_for_good {
            Verdict::KeepStep
        } else if best.contains(&step) {
            Verdict::KeepBest
        } else {
            Verdict::DeleteSurplus
        }
    };
    steps.iter().map(|(step, facts)| (*step, verdict(*step, facts))).collect()
}

fn is_ours(facts: &Facts) -> bool {
    facts.is_good && facts.owner == Owner::Ours
}

/// The good, regular steps with the lowest losses; of equal losses the newer step.
fn best(steps: &BTreeMap<u64, Facts>, keep_best: usize) -> BTreeSet<u64> {
    let candidates = steps.iter().filter(|(_, facts)| is_ours(facts) && !facts.is_temporary);
    let mut losses: Vec<(f64, u64)> =
        candidates.filter_map(|(step, facts)| Some((facts.loss.filter(|loss| loss.is_finite())?, *step))).collect();
    losses.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
    losses.into_iter().take(keep_best).map(|(_, step)| step).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: Facts = Facts { owner: Owner::Ours, is_good: true, is_temporary: false, loss: None };
    const BAD: Facts = Facts { owner: Owner::Unknown, is_good: false, ..GOOD };
    const OTHERS: Facts = Facts { owner: Owner::Other, ..GOOD };
    const TEMPORARY: Facts = Facts { is_temporary: true, ..GOOD };

    fn loss(loss: f64) -> Facts {
        Facts { loss: Some(loss), ..GOOD }
    }

    fn deleted(steps: &[(u64, Facts)], limits: Limits) -> Vec<u64> {
        let verdicts = decide(&steps.iter().copied().collect(), &limits);
        assert_eq!(verdicts.len(), steps.len());
        verdicts.into_iter().filter(|(_, verdict)| verdict.is_deletion()).map(|(step, _)| step).collect()
    }

    #[test]
    fn the_newest_good_ones_stay() {
        let cases: [(&[(u64, Facts)], usize, &[u64]); 7] = [
            (&[], 2, &[]),
            (&[(1, BAD), (2, BAD)], 2, &[]),
            (&[(1, GOOD), (2, GOOD), (3, GOOD)], 2, &[1]),
            (&[(1, GOOD), (2, GOOD), (3, GOOD)], 0, &[1]),
            (&[(1, GOOD), (2, BAD), (3, GOOD), (4, GOOD)], 3, &[2]),
            (&[(1, GOOD), (2, TEMPORARY), (3, GOOD), (4, BAD)], 2, &[1]),
            (&[(1, BAD), (2, GOOD), (3, BAD), (4, BAD), (5, GOOD)], 2, &[1, 3, 4]),
        ];
        for (steps, keep_last, expected) in cases {
            let limits = Limits { last: keep_last, best: 0, every_steps: None };
            assert_eq!(deleted(steps, limits), expected, "{steps:?} {keep_last}");
        }
    }

    #[test]
    fn another_runs_checkpoints_stay_and_count_for_nothing() {
        let ours_and_damaged = Facts { is_good: false, ..GOOD };
        let cases: [(&[(u64, Facts)], &[u64]); 4] = [
            (&[(1, GOOD), (2, GOOD), (3, OTHERS), (4, OTHERS)], &[]),
            (&[(1, OTHERS), (2, GOOD), (3, GOOD), (4, OTHERS), (5, GOOD)], &[2]),
            (&[(1, BAD), (2, GOOD), (3, OTHERS), (4, GOOD)], &[]),
            (&[(1, ours_and_damaged), (2, GOOD), (3, OTHERS), (4, GOOD)], &[1]),
        ];
        for (steps, expected) in cases {
            let limits = Limits { last: 2, best: 1, every_steps: None };
            assert_eq!(deleted(steps, limits), expected, "{steps:?}");
        }
    }

    #[test]
    fn the_best_and_the_round_steps_stay_too() {
        let facts = [loss(0.5), loss(0.1), loss(f64::NAN), loss(0.1), TEMPORARY, GOOD, BAD, GOOD, GOOD];
        let steps: Vec<(u64, Facts)> = (1..).zip(facts).collect();
        let limits = |keep_best, keep_every_steps| Limits { last: 2, best: keep_best, every_steps: keep_every_steps };
        assert_eq!(deleted(&steps, limits(0, None)), [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(deleted(&steps, limits(1, None)), [1, 2, 3, 5, 6, 7], "of equal losses the newer one stays");
        assert_eq!(deleted(&steps, limits(9, None)), [3, 5, 6, 7], "what has no loss is never the best");
        assert_eq!(deleted(&steps, limits(0, Some(3))), [1, 2, 4, 5, 7]);
        assert_eq!(deleted(&steps, limits(0, Some(5))), [1, 2, 3, 4, 5, 6, 7], "a temporary one is not kept for good");
        assert_eq!(deleted(&steps, limits(1, Some(3))), [1, 2, 5, 7]);
        assert_eq!(deleted(&steps, limits(0, Some(0))), [1, 2, 3, 4, 5, 6, 7]);
    }

    fn facts() -> impl Strategy<Value = Facts> {
        (any::<bool>(), any::<bool>(), proptest::option::of(-1.0..9.0)).prop_map(|(is_good, is_temporary, loss)| Facts {
            owner: if is_good { Owner::Ours } else { Owner::Unknown },
            is_good,
            is_temporary,
            loss,
        })
    }

    proptest! {
        #[test]
        fn what_must_stay_is_never_deleted(
            steps in proptest::collection::btree_map(0u64..60, facts(), 0..20),
            keep_last in 0usize..5,
            keep_best in 0usize..4,
            every in proptest::option::of(1u64..9),
        ) {
            let limits = Limits { last: keep_last, best: keep_best, every_steps: every };
            let verdicts = decide(&steps, &limits);
            prop_assert_eq!(verdicts.keys().collect::<Vec<_>>(), steps.keys().collect::<Vec<_>>());
            let good: Vec<u64> = steps.iter().filter(|(_, facts)| facts.is_good).map(|(step, _)| *step).collect();
            let goes = |step: &u64| verdicts[step].is_deletion();
            prop_assert!(!good.iter().rev().take(keep_last.max(MIN_KEPT_GOOD)).any(goes));
            for (step, facts) in &steps {
                let is_regular = facts.is_good && !facts.is_temporary;
                prop_assert!(!(is_regular && every.is_some_and(|every| step.is_multiple_of(every)) && goes(step)));
                prop_assert!(!(good.last().is_none_or(|newest| step >= newest) && goes(step)));
                let rivals = steps.values().filter(|other| other.is_good && !other.is_temporary);
                let num_not_worse = rivals.filter(|other| other.loss.is_some() && other.loss <= facts.loss).count();
                prop_assert!(!(is_regular && facts.loss.is_some() && num_not_worse <= keep_best && goes(step)));
            }
        }
    }
}
