//! Reading, masking and packing the examples of a step.

use anyhow::Context;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::LossNorm;

use super::pack::{assign, pack};
use super::plan::{BatchSpec, Slot, slots};
use super::source::SampleSource;
use crate::dataset::Sample;
use crate::mask::{ExampleKind, MaskSpec, MaskedExample, NOT_SCORED, mask_example};

/// The examples of one forward pass, one after another without padding.
#[derive(Clone, Debug, PartialEq)]
pub struct Pack {
    /// Token ids, masks in place.
    pub input_ids: Vec<i32>,
    /// Length of each example in tokens; they add up to the length of `input_ids`.
    pub lengths: Vec<i32>,
    /// The id to predict at each token, or -100.
    pub labels: Vec<i32>,
    /// Weight of each token in the loss: with `token_mean` 1 where there is a label, with `per_example` 1 / (labels of that
    /// example), 0 elsewhere. The loss of a step is the weighted sum over the sum of weights of the whole batch.
    pub label_weights: Vec<f32>,
    /// Where each example comes from.
    pub slots: Vec<Slot>,
    /// What each example predicts.
    pub kinds: Vec<ExampleKind>,
}

impl Pack {
    /// Number of examples.
    pub fn num_examples(&self) -> usize {
        self.lengths.len()
    }

    /// Number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Number of scored tokens.
    pub fn num_labels(&self) -> usize {
        self.labels.iter().filter(|&&label| label != NOT_SCORED).count()
    }

    /// BLAKE3 of all that the pack holds, as 64 hexadecimal digits, so that two runs can be compared step by step.
    pub fn content_hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(self.num_examples() as u64).to_le_bytes());
        for values in [&self.lengths, &self.input_ids, &self.labels] {
            for value in values {
                hasher.update(&value.to_le_bytes());
            }
        }
        for weight in &self.label_weights {
            hasher.update(&weight.to_bits().to_le_bytes());
        }
        for (slot, kind) in self.slots.iter().zip(&self.kinds) {
            for value in [slot.index, slot.epoch, slot.sample, u64::from(*kind == ExampleKind::Auxiliary)] {
                hasher.update(&value.to_le_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    fn push(&mut self, norm: LossNorm, slot: Slot, example: &MaskedExample) {
        let weight = match norm {
            LossNorm::TokenMean => 1.0,
            LossNorm::PerExample => 1.0 / example.num_labels() as f32,
        };
        self.input_ids.extend(example.input_ids.iter().map(|&id| id as i32));
        self.lengths.push(example.input_ids.len() as i32);
        self.label_weights.extend(example.labels.iter().map(|&label| if label == NOT_SCORED { 0.0 } else { weight }));
        self.labels.extend_from_slice(&example.labels);
        self.slots.push(slot);
        self.kinds.push(example.kind);
    }
}

/// The whole global batch of a step (steps counted from 0), in packs of the spec's token budget.
///
/// Fails where the source holds no samples or other ones than the spec says, and where a sample cannot be read.
pub fn batch<S: SampleSource>(source: &S, spec: &BatchSpec, step: u64) -> anyhow::Result<Vec<Pack>> {
    worker_batch(source, spec, step, 0, 1)
}

/// The packs of a step that worker `rank` of `world_size` runs, in the order of the global batch. Reads only its own samples.
///
/// Fails as [`batch`] does. With fewer packs than workers the result may be empty.
pub fn worker_batch<S: SampleSource>(source: &S, spec: &BatchSpec, step: u64, rank: usize, world_size: usize) -> anyhow::Result<Vec<Pack>> {
    check_source(source, spec)?;
    anyhow::ensure!(rank < world_size, "rank {rank} is outside a world of {world_size}");
    let slots = slots(&spec.plan, step);
    let lengths: Vec<u32> = slots.iter().map(|slot| source.length(slot.sample)).collect();
    let packs = pack(&lengths, spec.plan.micro_batch_tokens);
    let tokens: Vec<u64> = packs.iter().map(|pack| pack.iter().map(|&offset| u64::from(lengths[offset as usize])).sum()).collect();
    let build = |&index: &usize| build_pack(source, &spec.mask, packs[index].iter().map(|&offset| slots[offset as usize]));
    assign(&tokens, world_size)[rank]
        .iter()
        .map(build)
        .collect::<anyhow::Result<Vec<_>>>()
        .with_context(|| format!("build batch of step {step}"))
}

fn check_source<S: SampleSource>(source: &S, spec: &BatchSpec) -> anyhow::Result<()> {
    let found = source.num_samples();
    if found == 0 {
        return Err(Failure::new(FailureKind::Input, "the dataset holds no samples").hint("look at the counts of the preparation").into());
    }
    anyhow::ensure!(found == spec.plan.num_samples, "the plan is for {} samples, the dataset holds {found}", spec.plan.num_samples);
    Ok(())
}

fn build_pack<S: SampleSource>(source: &S, spec: &MaskSpec, slots: impl Iterator<Item = Slot>) -> anyhow::Result<Pack> {
    let mut pack = Pack { input_ids: vec![], lengths: vec![], labels: vec![], label_weights: vec![], slots: vec![], kinds: vec![] };
    for slot in slots {
        let sample = source.read(slot.sample)?;
        check_sample(&sample, slot, source.length(slot.sample))?;
        pack.push(spec.objective.loss_norm, slot, &mask_example(spec, &slot, &sample));
    }
    Ok(pack)
}

/// Packing trusted the length, and masking will trust the answer position.
fn check_sample(sample: &Sample, slot: Slot, length: u32) -> anyhow::Result<()> {
    if sample.tokens.len() == length as usize && sample.answer_position < length {
        return Ok(());
    }
    let failure = Failure::new(FailureKind::Damaged, "a prepared sample does not match its index")
        .at(format!("sample {}", slot.sample))
        .expected(format!("{length} tokens with the answer among them"))
        .found(format!("{} tokens, answer at {}", sample.tokens.len(), sample.answer_position))
        .hint("prepare the data again");
    Err(failure.into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use cloze_recipes::recipe::Auxiliary;
    use proptest::prelude::*;

    use super::*;
    use crate::batch::fixture::{VecSource, batch_spec};

    /// (slot index, sample, tokens with masks, labels) of every example, ordered by slot.
    fn examples(packs: &[Pack]) -> Vec<(u64, u64, Vec<i32>, Vec<i32>)> {
        let mut all = Vec::new();
        for pack in packs {
            let mut start = 0;
            for (slot, &length) in pack.slots.iter().zip(&pack.lengths) {
                let range = start..start + length as usize;
                all.push((slot.index, slot.sample, pack.input_ids[range.clone()].to_vec(), pack.labels[range.clone()].to_vec()));
                start = range.end;
            }
            assert_eq!(start, pack.num_tokens());
        }
        all.sort_unstable();
        all
    }

    fn of_world(source: &VecSource, spec: &BatchSpec, step: u64, world_size: usize) -> Vec<Pack> {
        (0..world_size).flat_map(|rank| worker_batch(source, spec, step, rank, world_size).unwrap()).collect()
    }

    #[test]
    fn the_examples_are_the_same_at_any_world_size_and_from_any_step() {
        let source = VecSource::generated(97, 5);
        let spec = batch_spec(&source, 32, 128);
        let from_start: Vec<_> = (0..9).map(|step| batch(&source, &spec, step).unwrap()).collect();
        for first in [0usize, 3, 8] {
            for world_size in [1, 2, 3, 5, 8] {
                for (step, whole) in from_start.iter().enumerate().skip(first) {
                    let dealt = of_world(&source, &spec, step as u64, world_size);
                    assert_eq!(examples(&dealt), examples(whole), "step {step}, {world_size} workers");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn worker_packs_partition_the_global_packs(n in 1u64..60, per_step in 1u32..50, world_size in 1usize..9, step in 0u64..1000) {
            let source = VecSource::generated(n, 3);
            let spec = batch_spec(&source, per_step, 64);
            let hashes = |packs: &[Pack]| {
                let mut hashes: Vec<String> = packs.iter().map(Pack::content_hash).collect();
                hashes.sort_unstable();
                hashes
            };
            let whole = batch(&source, &spec, step).unwrap();
            prop_assert_eq!(hashes(&of_world(&source, &spec, step, world_size)), hashes(&whole));
            prop_assert_eq!(whole.iter().map(Pack::num_examples).sum::<usize>(), per_step as usize);
            for pack in &whole {
                prop_assert!(pack.num_tokens() <= 64 || pack.num_examples() == 1);
            }
        }
    }

    #[test]
    fn a_worker_reads_only_its_own_samples() {
        let source = VecSource::generated(200, 5);
        let spec = batch_spec(&source, 64, 128);
        let mut read = BTreeSet::new();
        for rank in 0..4 {
            source.reads.borrow_mut().clear();
            let packs = worker_batch(&source, &spec, 0, rank, 4).unwrap();
            let expected: BTreeSet<u64> = packs.iter().flat_map(|pack| &pack.slots).map(|slot| slot.sample).collect();
            assert_eq!(*source.reads.borrow(), expected);
            assert!(read.is_disjoint(&expected));
            read.extend(expected);
        }
        assert_eq!(read.len(), 64);
    }

    #[test]
    fn weights_follow_the_loss_norm() {
        let source = VecSource::generated(50, 5);
        let mut spec = batch_spec(&source, 50, 256);
        spec.mask.objective.auxiliary = Auxiliary::Mlm;
        for norm in [LossNorm::TokenMean, LossNorm::PerExample] {
            spec.mask.objective.loss_norm = norm;
            let packs = batch(&source, &spec, 0).unwrap();
            let total: f32 = packs.iter().flat_map(|pack| &pack.label_weights).sum();
            let num_labels: usize = packs.iter().map(Pack::num_labels).sum();
            let expected = if norm == LossNorm::TokenMean { num_labels as f32 } else { 50.0 };
            assert!((total - expected).abs() < 1e-3, "{norm:?}: {total} instead of {expected}");
            assert!(num_labels > 50);
            for pack in &packs {
                assert!(pack.labels.iter().zip(&pack.label_weights).all(|(&label, &weight)| (label != NOT_SCORED) == (weight > 0.0)));
            }
        }
    }

    #[test]
    fn the_hash_sees_every_part() {
        let source = VecSource::generated(10, 5);
        let original = batch(&source, &batch_spec(&source, 4, 512), 0).unwrap().remove(0);
        let mut hashes = BTreeSet::from([original.content_hash()]);
        let changes: [fn(&mut Pack); 6] = [
            |pack| pack.input_ids[0] += 1,
            |pack| pack.labels[0] = 3,
            |pack| pack.label_weights[0] = 0.5,
            |pack| pack.slots[0].sample += 1,
            |pack| pack.kinds[0] = if pack.kinds[0] == ExampleKind::Answer { ExampleKind::Auxiliary } else { ExampleKind::Answer },
            |pack| {
                pack.lengths[0] += 1;
                pack.lengths[1] -= 1;
            },
        ];
        for change in changes {
            let mut pack = original.clone();
            change(&mut pack);
            assert!(hashes.insert(pack.content_hash()));
        }
    }

    #[test]
    fn a_source_that_does_not_fit_is_refused() {
        let source = VecSource::generated(10, 5);
        let spec = batch_spec(&source, 4, 64);
        let other = VecSource::generated(11, 5);
        assert!(batch(&other, &spec, 0).unwrap_err().to_string().contains("10 samples, the dataset holds 11"));
        let empty = VecSource::generated(0, 5);
        assert!(batch(&empty, &spec, 0).unwrap_err().to_string().contains("no samples"));
        let mut damaged = VecSource::generated(10, 5);
        damaged.samples[3].answer_position = 1000;
        let errors: Vec<_> = (0..3).filter_map(|step| batch(&damaged, &spec, step).err()).collect();
        assert!(format!("{:#}", errors[0]).contains("sample 3"));
    }
}
