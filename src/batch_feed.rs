//! Builds the packs of coming steps on a thread of its own while the current step computes.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use anyhow::{Context, Result};
use cloze_data::batch::{BatchSpec, Pack, slots, worker_batch};
use cloze_data::dataset::Dataset;

/// Steps that are built ahead.
const STEPS_AHEAD_MAX: usize = 2;

/// What one worker runs in one step.
#[derive(Debug)]
pub struct StepBatch {
    /// Steps done before this one.
    pub step: u64,
    /// This worker's packs.
    pub packs: Vec<Pack>,
    /// Examples of all workers.
    pub global_examples: u64,
    /// Tokens of all workers.
    pub global_tokens: u64,
    /// How long the loop waited for this batch, in seconds.
    pub waited_seconds: f64,
}

/// Which batches are built.
#[derive(Clone, Debug)]
pub struct FeedPlan {
    /// The data.
    pub dataset: Arc<Dataset>,
    /// How it is batched and masked.
    pub spec: BatchSpec,
    /// First step.
    pub from_step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// This worker.
    pub rank: usize,
    /// All workers.
    pub world_size: usize,
}

/// Batches in the order of the steps.
#[derive(Debug)]
pub struct BatchFeed {
    total_steps: u64,
    receiver: Receiver<Result<StepBatch>>,
}

impl BatchFeed {
    /// Starts the thread `batch-builder`; it ends with the last step, with the first error, or when the feed is dropped.
    pub fn start(plan: FeedPlan) -> Result<Self> {
        let (sender, receiver) = sync_channel(STEPS_AHEAD_MAX);
        let total_steps = plan.total_steps;
        std::thread::Builder::new()
            .name("batch-builder".to_owned())
            .spawn(move || build_all(&plan, &sender))
            .context("start the batch builder")?;
        Ok(Self { total_steps, receiver })
    }

    /// The next batch, or `None` after the last step.
    pub fn next_batch(&self) -> Result<Option<StepBatch>> {
        let clock = Instant::now();
        match self.receiver.recv() {
            Ok(batch) => batch.map(|batch| Some(StepBatch { waited_seconds: clock.elapsed().as_secs_f64(), ..batch })),
            Err(_) => Ok(None),
        }
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }
}

fn build_all(plan: &FeedPlan, sender: &SyncSender<Result<StepBatch>>) {
    for step in plan.from_step..plan.total_steps {
        let batch = build(plan, step);
        let failed = batch.is_err();
        if sender.send(batch).is_err() || failed {
            return;
        }
    }
}

fn build(plan: &FeedPlan, step: u64) -> Result<StepBatch> {
    let packs = worker_batch(plan.dataset.as_ref(), &plan.spec, step, plan.rank, plan.world_size)?;
    let slots = slots(&plan.spec.plan, step);
    let global_tokens = slots.iter().map(|slot| u64::from(plan.dataset.length(slot.sample))).sum();
    Ok(StepBatch { step, packs, global_examples: slots.len() as u64, global_tokens, waited_seconds: 0.0 })
}
