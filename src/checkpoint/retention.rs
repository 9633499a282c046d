//! Which checkpoints go. A pure decision.

use std::collections::BTreeSet;

/// A damaged newest checkpoint must have a predecessor, whatever a recipe says.
const MIN_KEPT_GOOD: usize = 2;

/// The steps to delete, oldest first: good checkpoints beyond the newest `keep_last`, and what is not good and older than the
/// newest good one. What is newer than that may be a save in progress and stays.
pub fn steps_to_delete(listed: &BTreeSet<u64>, good: &BTreeSet<u64>, keep_last: usize) -> Vec<u64> {
    let kept: BTreeSet<u64> = good.iter().rev().take(keep_last.max(MIN_KEPT_GOOD)).copied().collect();
    let Some(newest_good) = kept.last() else { return Vec::new() };
    listed.iter().filter(|step| *step < newest_good && !kept.contains(*step)).copied().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn decisions() {
        let cases: [(&[u64], &[u64], usize, &[u64]); 7] = [
            (&[], &[], 2, &[]),
            (&[1, 2], &[], 2, &[]),
            (&[1, 2, 3], &[1, 2, 3], 2, &[1]),
            (&[1, 2, 3], &[1, 2, 3], 0, &[1]),
            (&[1, 2, 3, 4], &[1, 3, 4], 3, &[2]),
            (&[1, 2, 3, 4], &[1, 2, 3], 2, &[1]),
            (&[1, 2, 3, 4, 5], &[2, 5], 2, &[1, 3, 4]),
        ];
        for (listed, good, keep_last, expected) in cases {
            let set = |steps: &[u64]| steps.iter().copied().collect::<BTreeSet<u64>>();
            assert_eq!(steps_to_delete(&set(listed), &set(good), keep_last), expected, "{listed:?} {good:?} {keep_last}");
        }
    }

    proptest! {
        #[test]
        fn enough_good_ones_always_stay(steps in proptest::collection::btree_map(0u64..50, any::<bool>(), 0..12), keep_last in 0usize..5) {
            let listed: BTreeSet<u64> = steps.keys().copied().collect();
            let good: BTreeSet<u64> = steps.iter().filter(|(_, good)| **good).map(|(step, _)| *step).collect();
            let deleted: BTreeSet<u64> = steps_to_delete(&listed, &good, keep_last).into_iter().collect();
            let left = good.difference(&deleted).count();
            prop_assert_eq!(left, good.len().min(keep_last.max(MIN_KEPT_GOOD)));
            prop_assert!(deleted.is_subset(&listed));
            prop_assert!(good.last().is_none_or(|newest| !deleted.contains(newest)));
        }
    }
}
