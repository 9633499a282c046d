//! Samples in memory and small specs, for tests.

use std::cell::RefCell;
use std::collections::BTreeSet;

use cloze_recipes::recipe::{
    Auxiliary, Device, LossNorm, Masking, ObjectiveRecipe, Precision, ScheduleKind, ScheduleRecipe, Shard, TrainRecipe,
};

use super::plan::{BatchPlan, BatchSpec};
use super::source::SampleSource;
use crate::dataset::Sample;
use crate::draw::{Stream, below, draw_u64};
use crate::mask::{MaskSpec, TokenFacts};

/// Samples in memory; notes which ones were read.
pub(crate) struct VecSource {
    pub(crate) samples: Vec<Sample>,
    pub(crate) reads: RefCell<BTreeSet<u64>>,
}

impl VecSource {
    pub(crate) fn new(samples: Vec<Sample>) -> Self {
        Self { samples, reads: RefCell::default() }
    }

    /// `n` samples of 8 to 47 tokens: `[CLS] … [unused0] answer [SEP]` with ids 1, 5 and 2, words from 100 on.
    pub(crate) fn generated(n: u64, seed: u64) -> Self {
        let sample = |number| {
            let bits = |position| draw_u64(seed, Stream::Order, number, position, 1);
            let words = 4 + below(bits(0), 40);
            let mut tokens = vec![1];
            tokens.extend((1..=words).map(|position| 100 + below(bits(position), 500) as u32));
            tokens.extend([5, 700 + (number % 3) as u32, 2]);
            Sample { answer_position: tokens.len() as u32 - 2, tokens, task: (number % 4) as u32 }
        };
        Self::new((0..n).map(sample).collect())
    }
}

impl SampleSource for VecSource {
    fn num_samples(&self) -> u64 {
        self.samples.len() as u64
    }

    fn length(&self, sample: u64) -> u32 {
        self.samples[sample as usize].tokens.len() as u32
    }

    fn task(&self, sample: u64) -> u32 {
        self.samples[sample as usize].task
    }

    fn read(&self, sample: u64) -> anyhow::Result<Sample> {
        self.reads.borrow_mut().insert(sample);
        let sample = &self.samples[sample as usize];
        Ok(Sample { tokens: sample.tokens.clone(), answer_position: sample.answer_position, task: sample.task })
    }

    fn task_name(&self, task: u32) -> &str {
        ["first", "second", "third", "fourth"][task as usize]
    }
}

/// 80 % answers, 20 % dummy MLM at 30 %, over a source as [`VecSource::generated`] makes them.
pub(crate) fn batch_spec(source: &VecSource, samples_per_step: u32, micro_batch_tokens: u32) -> BatchSpec {
    BatchSpec {
        plan: BatchPlan { samples_per_step, micro_batch_tokens, seed: 42, num_samples: source.num_samples(), mixture: None },
        mask: MaskSpec {
            seed: 42,
            objective: ObjectiveRecipe {
                auxiliary: Auxiliary::DummyMlm,
                auxiliary_ratio: 0.2,
                mask_probability: 0.3,
                masking: Masking::AllMask,
                loss_norm: LossNorm::TokenMean,
            },
            tokens: TokenFacts { mask_id: 4, special_ids: vec![0, 1, 2, 3, 4], vocab_size: 1024, anchor_id: 5 },
        },
    }
}

/// A train section with nothing unusual in it.
pub(crate) fn train_recipe() -> TrainRecipe {
    TrainRecipe {
        steps: Some(10),
        epochs: None,
        batch_examples: 64,
        micro_batch_tokens: 1024,
        learning_rate: 1e-3,
        betas: [0.9, 0.999],
        epsilon: 1e-8,
        weight_decay: 0.01,
        clip_norm: 1.0,
        schedule: ScheduleRecipe {
            kind: ScheduleKind::Linear,
            warmup_steps: Some(0),
            warmup_ratio: None,
            end_ratio: 0.0,
            power: 1.0,
            decay_ratio: 0.1,
        },
        device: Device::Cpu,
        precision: Precision::Float32,
        threads: 0,
        log_every_steps: 1,
        shard: Shard::None,
        replicate_shards: false,
        audit_samples: false,
        deterministic: false,
    }
}
