//! Examples-proportional mixing with a cap: an epoch takes at most so many samples of a task.
//!
//! Each task's samples stand in an endless row, one random order of all of them after another, and every epoch takes the next
//! ones of it. So no sample comes a second time before all of its task have come, whatever the cap, and which ones an epoch takes
//! follows from its number alone.

use std::collections::BTreeMap;

use super::source::SampleSource;
use crate::draw::{Stream, draw_u64};
use crate::permutation::permute;

/// What an epoch takes of each task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mixture {
    /// Numbers of the samples, those of one task side by side.
    samples: Vec<u64>,
    /// Tasks that have samples, in the order of `samples`.
    tasks: Vec<TaskShare>,
    epoch_samples: u64,
}

/// One task's part of the samples and of an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
struct TaskShare {
    /// Number of the task.
    task: u32,
    /// First of its samples in the list, and how many there are.
    first: usize,
    count: u64,
    /// First of its places in an epoch, and how many there are.
    epoch_first: u64,
    epoch_count: u64,
}

impl Mixture {
    /// Takes at most `cap` samples of a task in one epoch. Reads twice which task every sample is of: first to count, then to place, so
    /// that it never holds more than 8 bytes for each.
    pub fn new<S: SampleSource>(source: &S, cap: u64) -> Self {
        let mut counts: BTreeMap<u32, u64> = BTreeMap::new();
        (0..source.num_samples()).for_each(|sample| *counts.entry(source.task(sample)).or_default() += 1);
        let mut mixture = Self { samples: vec![0; source.num_samples() as usize], tasks: Vec::new(), epoch_samples: 0 };
        let mut next: BTreeMap<u32, usize> = BTreeMap::new();
        let mut first = 0;
        for (task, count) in counts {
            let epoch_count = count.min(cap);
            mixture.tasks.push(TaskShare { task, first, count, epoch_first: mixture.epoch_samples, epoch_count });
            mixture.epoch_samples += epoch_count;
            next.insert(task, first);
            first += count as usize;
        }
        for sample in 0..source.num_samples() {
            if let Some(place) = next.get_mut(&source.task(sample)) {
                mixture.samples[*place] = sample;
                *place += 1;
            }
        }
        mixture
    }

    /// Samples of one epoch.
    pub fn epoch_samples(&self) -> u64 {
        self.epoch_samples
    }

    /// The sample at a place of an epoch.
    ///
    /// # Panics
    /// If the place is past the end of an epoch.
    pub fn sample(&self, seed: u64, epoch: u64, place: u64) -> u64 {
        assert!(place < self.epoch_samples, "place {place} of an epoch of {}", self.epoch_samples);
        let share = &self.tasks[self.tasks.partition_point(|share| share.epoch_first <= place) - 1];
        let in_row = epoch * share.epoch_count + (place - share.epoch_first);
        let key = draw_u64(seed, Stream::TaskOrder, u64::from(share.task), in_row / share.count, 0);
        self.samples[share.first + permute(key, share.count, in_row % share.count) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::fixture::{VecSource, batch_spec};
    use crate::batch::{BatchPlan, slots};
    use crate::dataset::Sample;

    /// Samples of the given numbers for each task, the tasks taking turns.
    fn source(counts: &[u64]) -> VecSource {
        let longest = counts.iter().copied().max().unwrap_or(0);
        let tasks = (0..longest).flat_map(|row| (0..).zip(counts).filter(move |(_, count)| row < **count).map(|(task, _)| task));
        VecSource::new(tasks.map(|task| Sample { tokens: vec![1, 5, 9, 2], answer_position: 2, task }).collect())
    }

    fn times(mixture: &Mixture, epochs: std::ops::Range<u64>) -> BTreeMap<u64, u64> {
        let mut times = BTreeMap::new();
        for epoch in epochs {
            (0..mixture.epoch_samples()).for_each(|place| *times.entry(mixture.sample(3, epoch, place)).or_default() += 1);
        }
        times
    }

    #[test]
    fn an_epoch_takes_the_smaller_of_count_and_cap() {
        let source = source(&[1, 3, 10]);
        let table: [(u64, [u64; 3]); 5] = [(1, [1, 1, 1]), (3, [1, 3, 3]), (7, [1, 3, 7]), (10, [1, 3, 10]), (99, [1, 3, 10])];
        for (cap, expected) in table {
            let mixture = Mixture::new(&source, cap);
            assert_eq!(mixture.epoch_samples(), expected.iter().sum::<u64>());
            for epoch in 0..20 {
                let mut found = [0_u64; 3];
                (0..mixture.epoch_samples()).for_each(|place| found[source.task(mixture.sample(3, epoch, place)) as usize] += 1);
                assert_eq!(found, expected, "cap {cap}, epoch {epoch}");
            }
        }
    }

    #[test]
    fn every_sample_of_a_task_comes_before_one_comes_again() {
        // 2 of 10 samples an epoch: five epochs are one round. Of the task with 2 samples each epoch takes both.
        let mixture = Mixture::new(&source(&[10, 2]), 2);
        let round = times(&mixture, 0..5);
        assert_eq!(round.len(), 12);
        assert!(round.values().all(|times| [1, 5].contains(times)), "{round:?}");
        assert_eq!(times(&mixture, 0..35).values().copied().collect::<Vec<_>>(), [7, 35, 7, 35, 7, 7, 7, 7, 7, 7, 7, 7]);
        assert_ne!(times(&mixture, 0..1), times(&mixture, 1..2), "another epoch takes others");
        assert_ne!(
            (0..5).map(|epoch| mixture.sample(3, epoch, 0)).collect::<Vec<_>>(),
            (5..10).map(|epoch| mixture.sample(3, epoch, 0)).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_cap_that_cuts_nothing_takes_every_sample_once() {
        let mixture = Mixture::new(&source(&[4, 9]), 9);
        for epoch in 0..3 {
            assert_eq!(times(&mixture, epoch..epoch + 1).values().copied().collect::<Vec<_>>(), [1; 13]);
        }
    }

    #[test]
    fn the_slots_of_a_step_follow_from_its_number() {
        let source = source(&[10, 3]);
        let plain = batch_spec(&source, 6, 64).plan;
        let plan = BatchPlan { mixture: Some(Mixture::new(&source, 4).into()), ..plain };
        let all: Vec<_> = (0..7).flat_map(|step| slots(&plan, step)).collect();
        // 7 samples an epoch: 42 slots are six epochs.
        for (number, slot) in (0..).zip(&all) {
            assert_eq!((slot.index, slot.epoch), (number, number / 7));
        }
        let of_task = |epoch: u64, task: u32| all.iter().filter(|slot| slot.epoch == epoch && source.task(slot.sample) == task).count();
        assert!((0..6).all(|epoch| (of_task(epoch, 0), of_task(epoch, 1)) == (4, 3)));
        assert_eq!(slots(&plan, 5), all[30..36]);
        let other = BatchPlan { seed: plan.seed + 1, ..plan.clone() };
        assert_ne!(slots(&other, 0), slots(&plan, 0));
    }

    #[test]
    #[should_panic(expected = "place 3 of an epoch of 3")]
    fn a_place_past_the_end_is_a_mistake_of_the_caller() {
        Mixture::new(&source(&[5, 1]), 2).sample(1, 0, 3);
    }
}
