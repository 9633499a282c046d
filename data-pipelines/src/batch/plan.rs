//! Which samples belong to a step.

use std::sync::Arc;

use cloze_recipes::recipe::{Recipe, TrainRecipe};

use super::mixture::Mixture;
use super::source::SampleSource;
use crate::draw::{Stream, draw_u64};
use crate::mask::{MaskSpec, TokenFacts};
use crate::permutation::permute;

/// Order and size of the batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchPlan {
    /// Examples of one optimizer step, over all workers.
    pub samples_per_step: u32,
    /// Token budget of one pack.
    pub micro_batch_tokens: u32,
    /// Seed of the recipe.
    pub seed: u64,
    /// Samples of the dataset.
    pub num_samples: u64,
    /// What an epoch takes of each task; `None` takes every sample once.
    pub mixture: Option<Arc<Mixture>>,
}

impl BatchPlan {
    /// Samples of one epoch.
    fn epoch_samples(&self) -> u64 {
        self.mixture.as_ref().map_or(self.num_samples, |mixture| mixture.epoch_samples())
    }
}

/// Everything that the batches of a run depend on, besides the samples themselves.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchSpec {
    /// Order and size.
    pub plan: BatchPlan,
    /// Objective and masks.
    pub mask: MaskSpec,
}

impl BatchSpec {
    /// The batches of a recipe over prepared samples.
    pub fn new<S: SampleSource>(recipe: &Recipe, tokens: TokenFacts, source: &S) -> Self {
        let mixture = recipe.data.mixing_cap.map(|cap| Arc::new(Mixture::new(source, cap)));
        Self {
            plan: BatchPlan {
                samples_per_step: recipe.train.batch_examples,
                micro_batch_tokens: recipe.train.micro_batch_tokens,
                seed: recipe.seed,
                num_samples: source.num_samples(),
                mixture,
            },
            mask: MaskSpec { seed: recipe.seed, objective: recipe.objective.clone(), tokens },
        }
    }
}

/// One place in the endless stream of examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Place in the stream: `step * samples_per_step + j`.
    pub index: u64,
    /// Pass over the data, from 0.
    pub epoch: u64,
    /// Number of the sample in the dataset.
    pub sample: u64,
}

/// The slots of a step, steps counted from 0. Each epoch is a permutation of all samples, or of those that the mixture takes; a
/// step may span two epochs.
///
/// # Panics
/// If the plan has no samples.
pub fn slots(plan: &BatchPlan, step: u64) -> Vec<Slot> {
    assert!(plan.num_samples > 0, "a plan without samples has no slots");
    let first = step * u64::from(plan.samples_per_step);
    let epoch_samples = plan.epoch_samples();
    let mut epoch = first / epoch_samples;
    let mut key = epoch_key(plan, epoch);
    let slot_at = |index: u64| {
        if index / epoch_samples != epoch {
            epoch = index / epoch_samples;
            key = epoch_key(plan, epoch);
        }
        let place = permute(key, epoch_samples, index % epoch_samples);
        Slot { index, epoch, sample: plan.mixture.as_ref().map_or(place, |mixture| mixture.sample(plan.seed, epoch, place)) }
    };
    (first..first + u64::from(plan.samples_per_step)).map(slot_at).collect()
}

fn epoch_key(plan: &BatchPlan, epoch: u64) -> u64 {
    draw_u64(plan.seed, Stream::Order, epoch, 0, 0)
}

/// Optimizer steps of a run: the recipe's own, or as many as its epochs of `epoch_samples` need, the last one rounded up; at least 1.
pub fn total_steps(train: &TrainRecipe, epoch_samples: u64) -> u64 {
    if let Some(steps) = train.steps {
        return steps;
    }
    let exact = train.epochs.unwrap_or(1.0) * epoch_samples as f64 / f64::from(train.batch_examples);
    // 0.1 epochs are not exactly a tenth in binary; a rounding error of 1e-16 upwards must not make one more step.
    ((exact * (1.0 - 1e-12)).ceil() as u64).max(1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::batch::fixture::train_recipe;

    fn plan(samples_per_step: u32, seed: u64, num_samples: u64) -> BatchPlan {
        BatchPlan { samples_per_step, micro_batch_tokens: 1, seed, num_samples, mixture: None }
    }

    proptest! {
        #[test]
        fn every_sample_comes_once_per_epoch(n in 1u64..500, per_step in 1u32..70, seed in any::<u64>()) {
            let plan = plan(per_step, seed, n);
            let steps = (3 * n).div_ceil(u64::from(per_step));
            let mut seen: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
            for (number, slot) in (0..steps).flat_map(|step| slots(&plan, step)).enumerate() {
                prop_assert_eq!(slot.index, number as u64);
                prop_assert_eq!(slot.epoch, number as u64 / n);
                seen.entry(slot.epoch).or_default().push(slot.sample);
            }
            for epoch in 0..3 {
                let samples = seen.get_mut(&epoch).unwrap();
                samples.sort_unstable();
                prop_assert_eq!(&*samples, &(0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn epochs_and_seeds_have_orders_of_their_own() {
        let order = |seed, epoch| slots(&plan(100, seed, 100), epoch).iter().map(|slot| slot.sample).collect::<Vec<_>>();
        assert_eq!(order(1, 0), order(1, 0));
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        assert_ne!(order(1, 0), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn steps_come_from_the_recipe_or_its_epochs() {
        let cases = [
            (Some(7), None, 1000, 64, 7),
            (None, Some(1.0), 1000, 64, 16),
            (None, Some(2.0), 1024, 64, 32),
            (None, Some(0.1), 1000, 10, 10),
            (None, Some(0.3), 1000, 10, 30),
            (None, Some(0.001), 1, 64, 1),
        ];
        for (steps, epochs, num_samples, batch_examples, expected) in cases {
            let mut train = train_recipe();
            (train.steps, train.epochs, train.batch_examples) = (steps, epochs, batch_examples);
            assert_eq!(total_steps(&train, num_samples), expected, "steps {steps:?} epochs {epochs:?}");
        }
    }
}
