//! Which tasks are kept, and which samples of a task: caps, shares, and a uniform draw that does not depend on the order of the
//! samples.

use std::collections::BinaryHeap;

/// Number of samples that a cap leaves: the sum of min(count, cap) over the tasks.
pub fn capped_total(counts: &[u64], cap: u64) -> u64 {
    counts.iter().map(|count| (*count).min(cap)).sum()
}

/// The largest cap that leaves at most `wanted` samples, found by bisection; the largest count when all samples fit.
pub fn find_cap(counts: &[u64], wanted: u64) -> u64 {
    let largest = counts.iter().copied().max().unwrap_or(0);
    if capped_total(counts, largest) <= wanted {
        return largest;
    }
    // `fits` leaves at most the wanted number, `exceeds` leaves more.
    let (mut fits, mut exceeds) = (0, largest);
    while exceeds - fits > 1 {
        let middle = fits + (exceeds - fits) / 2;
        if capped_total(counts, middle) <= wanted {
            fits = middle;
        } else {
            exceeds = middle;
        }
    }
    fits
}

/// Number of samples that a share of `count` is: rounded, and at least one of a task that has any. Never less for a larger share.
pub fn share_of(count: u64, fraction: f64) -> u64 {
    ((count as f64 * fraction).round() as u64).clamp(count.min(1), count)
}

/// Which names are among the `limit` that are drawn, in the order of `names`: those with the smallest numbers for this seed. The
/// draw of a smaller limit, and of fewer names, lies within that of a larger one.
pub fn drawn_names(seed: u64, names: &[&str], limit: u64) -> Vec<bool> {
    let mut order: Vec<usize> = (0..names.len()).collect();
    order.sort_unstable_by_key(|&index| (name_key(seed, names[index]), names[index]));
    let mut drawn = vec![false; names.len()];
    order.iter().take(usize::try_from(limit).unwrap_or(usize::MAX)).for_each(|&index| drawn[index] = true);
    drawn
}

/// A number drawn for a name, such as a task or the content hash of a file.
pub fn name_key(seed: u64, name: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(name.as_bytes());
    let mut key = [0; 8];
    key.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(key)
}

/// A uniform number for one sample. The samples of a task with the smallest numbers are kept, which is a uniform draw without
/// replacement whatever the order in which samples are seen.
pub fn priority(task_key: u64, file_key: u64, row: u64) -> u64 {
    mix(mix(task_key ^ file_key.rotate_left(32)).wrapping_add(row))
}

/// The smallest numbers of a stream, at most `limit`.
#[derive(Clone, Debug)]
pub struct Smallest {
    limit: usize,
    heap: BinaryHeap<u64>,
}

impl Smallest {
    /// Keeps at most `limit` numbers.
    pub fn new(limit: usize) -> Self {
        Self { limit, heap: BinaryHeap::new() }
    }

    /// Sees one number.
    pub fn push(&mut self, number: u64) {
        if self.heap.len() < self.limit {
            self.heap.push(number);
        } else if let Some(mut largest) = self.heap.peek_mut()
            && number < *largest
        {
            *largest = number;
        }
    }

    /// The largest of the numbers that are kept; `None` when none is.
    pub fn threshold(&self) -> Option<u64> {
        self.heap.peek().copied()
    }
}

/// Stirs 64 bits so that every input bit reaches every output bit (the finisher of `SplitMix64` after one step of it).
fn mix(value: u64) -> u64 {
    let mut x = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_cap_is_the_largest_that_does_not_exceed_the_wanted_total() {
        let cases: [(&[u64], u64, u64, u64); 9] = [
            (&[], 10, 0, 0),
            (&[5, 5, 5], 15, 5, 15),
            (&[5, 5, 5], 100, 5, 15),
            (&[5, 5, 5], 14, 4, 12),
            (&[1, 10, 100], 30, 19, 30),
            (&[1, 10, 100], 111, 100, 111),
            (&[1, 10, 100], 110, 99, 110),
            (&[3, 3, 3], 2, 0, 0),
            (&[1 << 40, 1], 1000, 999, 1000),
        ];
        for (counts, wanted, cap, total) in cases {
            let found = find_cap(counts, wanted);
            assert_eq!((found, capped_total(counts, found)), (cap, total), "{counts:?} {wanted}");
        }
    }

    #[test]
    fn the_draw_is_uniform_over_rows_and_differs_by_seed_and_task() {
        let (num_rows, limit) = (20_000_u64, 5_000);
        let drawn = |seed: u64, task: &str| {
            let key = name_key(seed, task);
            let mut smallest = Smallest::new(limit);
            (0..num_rows).for_each(|row| smallest.push(priority(key, 9, row)));
            let threshold = smallest.threshold().unwrap();
            (0..num_rows).filter(|row| priority(key, 9, *row) <= threshold).collect::<Vec<_>>()
        };
        let rows = drawn(1, "task");
        assert_eq!(rows.len(), limit);
        // A quarter of each half: 2,500 with a standard deviation of about 31.
        let first_half = rows.iter().filter(|row| **row < num_rows / 2).count();
        assert!((2_300..2_700).contains(&first_half), "{first_half}");
        assert_ne!(rows, drawn(2, "task"));
        assert_ne!(rows, drawn(1, "other"));
        assert_eq!(rows, drawn(1, "task"));
    }

    #[test]
    fn a_share_is_rounded_and_leaves_no_task_empty() {
        let cases =
            [(0, 0.5, 0), (1, 0.01, 1), (10, 0.06, 1), (100, 0.07, 7), (100, 0.25, 25), (3, 0.5, 2), (7, 1.0, 7), (1 << 60, 1.0, 1 << 60)];
        for (count, fraction, share) in cases {
            assert_eq!(share_of(count, fraction), share, "{fraction} of {count}");
        }
    }

    #[test]
    fn more_names_hold_the_fewer_and_every_name_is_as_likely() {
        let names: Vec<String> = (0..40).map(|number| format!("task{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut times = vec![0; names.len()];
        for seed in 0..1000 {
            let mut before = vec![false; names.len()];
            for limit in [0, 1, 10, 39, 40, 100] {
                let drawn = drawn_names(seed, &names, limit);
                assert_eq!(drawn.iter().filter(|is_drawn| **is_drawn).count() as u64, limit.min(40));
                assert!(before.iter().zip(&drawn).all(|(before, now)| *now || !before), "seed {seed}, limit {limit}");
                before.clone_from(&drawn);
                if limit == 10 {
                    times.iter_mut().zip(drawn).for_each(|(times, is_drawn)| *times += u32::from(is_drawn));
                }
            }
        }
        // A quarter of 1,000 draws: 250 with a standard deviation of 14.
        assert!(times.iter().all(|times| (180..320).contains(times)), "{times:?}");
    }

    proptest! {
        #[test]
        fn a_larger_share_is_never_smaller(count in 0_u64..1_000_000, first in 0.0_f64..1.0, second in 0.0_f64..1.0) {
            let (low, high) = (first.min(second), first.max(second));
            prop_assert!(share_of(count, low) <= share_of(count, high) && share_of(count, high) <= count);
        }

        #[test]
        fn one_more_would_exceed(counts in prop::collection::vec(0_u64..1000, 0..30), wanted in 0_u64..20_000) {
            let cap = find_cap(&counts, wanted);
            prop_assert!(capped_total(&counts, cap) <= wanted);
            let all: u64 = counts.iter().sum();
            prop_assert!(all <= wanted || capped_total(&counts, cap + 1) > wanted);
        }

        #[test]
        fn the_smallest_are_those_of_a_sort(mut numbers in prop::collection::vec(any::<u64>(), 0..50), limit in 0_usize..60) {
            let mut smallest = Smallest::new(limit);
            numbers.iter().for_each(|number| smallest.push(*number));
            numbers.sort_unstable();
            prop_assert_eq!(smallest.threshold(), numbers.iter().take(limit).next_back().copied());
        }
    }
}
