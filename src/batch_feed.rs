//! Builds the packs of coming steps on a thread of its own while the current step computes.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use anyhow::{Context, Result, bail};
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
    next_step: u64,
    receiver: Receiver<Result<StepBatch>>,
}

impl BatchFeed {
    /// Starts the thread `batch-builder`; it ends with the last step, with the first error, or when the feed is dropped.
    pub fn start(plan: FeedPlan) -> Result<Self> {
        let (sender, receiver) = sync_channel(STEPS_AHEAD_MAX);
        let (total_steps, next_step) = (plan.total_steps, plan.from_step);
        std::thread::Builder::new()
            .name("batch-builder".to_owned())
            .spawn(move || build_all(&plan, &sender))
            .context("start the batch builder")?;
        Ok(Self { total_steps, next_step, receiver })
    }

    /// The next batch, or `None` after the last step.
    pub fn next_batch(&mut self) -> Result<Option<StepBatch>> {
        match self.receiver.recv() {
            Ok(batch) => {
                self.next_step += 1;
                batch.map(Some)
            }
            Err(_) if self.next_step >= self.total_steps => Ok(None),
            Err(_) => bail!("the batch builder ended before step {}", self.next_step),
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
    Ok(StepBatch { step, packs, global_examples: slots.len() as u64, global_tokens })
}
