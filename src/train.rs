//! START HERE: [`train`] is the loop, [`train_step`] in `step.rs` is one step of it.
//!
//! A step: every worker takes its packs of the global batch, adds up loss and gradients, sums both over the workers, and moves
//! the parameters by the same amount. Loss and gradients stay sums until the end, where one number that was summed with them (the
//! number of labels or of examples) divides both, so the world size does not change what is computed.

use std::time::Instant;

use anyhow::Result;
use cloze_cluster::protocol::StepReport;
use cloze_recipes::failure::{Failure, FailureKind};
use tch::{Device, Tensor};

use crate::batch_feed::{BatchFeed, StepBatch};
use crate::drill::Drills;
use crate::step::{Asks, StepOutcome, Trainer, train_step};
use crate::torch::memory::Readback;

/// What the loop tells the world, and what it asks; `watcher.rs` answers.
pub trait Watcher {
    /// The next batch is waited for; fails when the generation is over.
    fn batch_awaited(&mut self, steps_done: u64) -> Result<()>;
    /// The batch is there and a step begins: what this worker wants at its end.
    fn asks(&mut self, steps_done: u64) -> Asks;
    /// Parameters and moments are about to change; returns when nobody reads them any more.
    fn before_update(&mut self) -> Result<()>;
    /// A step's numbers have arrived, and they are finite: the batch counts.
    fn step_done(&mut self, batch: &StepBatch, report: &StepReport) -> Result<()>;
    /// Whether a new generation can only go on from a checkpoint, because no worker holds the whole state.
    fn must_save_to_regroup(&self) -> bool;
    /// Whether a checkpoint is due after `steps_done` steps; the same on all workers.
    fn save_due(&self, steps_done: u64) -> bool;
    /// Starts to save the state, whose loss is known to be finite. Called by all workers at the same step.
    fn save(&mut self, trainer: &mut Trainer, point: SavePoint) -> Result<()>;
}

/// Why a state is saved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SavePoint {
    /// Steps done.
    pub steps_done: u64,
    /// Nothing comes after it, so it must not be left out.
    pub is_last: bool,
    /// It was asked for between the regular points.
    pub is_temporary: bool,
    /// Loss of the last step.
    pub loss: f64,
}

/// How the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainEnd {
    /// Steps done in all.
    pub steps_done: u64,
    /// Why it ended.
    pub reason: EndReason,
}

/// Why the loop ended; all workers end for the same reason at the same step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// All steps are done.
    Complete,
    /// A stop was asked for.
    Stopped,
    /// Another generation is to go on from here.
    Regrouped,
}

/// A step whose loss or gradient is not finite. The parameters are those of the step before.
#[derive(Debug, thiserror::Error)]
#[error("{failure}")]
pub struct NotFinite {
    /// What a user is told.
    pub failure: Failure,
    /// The step, counted from 1.
    pub step: u64,
    /// This worker's own share of the loss was already not finite.
    pub is_culprit: bool,
    /// No later step has changed the state.
    pub state_is_whole: bool,
}

/// A step whose numbers are still on their way from the device.
struct PendingReport {
    numbers: Readback,
    local_loss: Tensor,
    partial: StepReport,
    batch: StepBatch,
}

/// Trains to the end of the feed, or until the workers agree to stop or to regroup. `steps_done` follows the state.
pub fn train(
    trainer: &mut Trainer,
    feed: &mut BatchFeed,
    watcher: &mut dyn Watcher,
    drills: &mut Drills,
    steps_done: &mut u64,
) -> Result<TrainEnd> {
    let mut pending = None;
    let mut clock = Instant::now();
    loop {
        watcher.batch_awaited(*steps_done)?;
        let Some(mut batch) = feed.next_batch()? else { break };
        let asks = watcher.asks(*steps_done);
        drills.perform(&mut batch)?;
        trainer.collective.set_step(batch.step + 1);
        let outcome = train_step(trainer, &batch, asks, &mut || watcher.before_update())?;
        *steps_done = batch.step + 1;
        let StepOutcome { numbers, agreed, local_loss } = outcome;
        // On a GPU the numbers of a step are read when the next one is queued, so that the device never waits for the host.
        report(pending.take(), watcher, steps_done)?;
        let partial = partial_report(trainer, &batch, std::mem::replace(&mut clock, Instant::now()).elapsed().as_secs_f64());
        pending = Some(PendingReport { numbers, local_loss, partial, batch });
        let is_last = *steps_done == feed.total_steps();
        let is_left = is_last || agreed.stop || (agreed.regroup && watcher.must_save_to_regroup());
        let save_due = watcher.save_due(*steps_done);
        if trainer.model.device() == Device::Cpu || save_due || is_left || agreed.save || agreed.regroup {
            let loss = report(pending.take(), watcher, steps_done)?;
            if save_due || is_left || agreed.save {
                let point = SavePoint { steps_done: *steps_done, is_last: is_left, is_temporary: !save_due && !is_left, loss };
                watcher.save(trainer, point)?;
            }
        }
        if agreed.stop && !is_last {
            return Ok(TrainEnd { steps_done: *steps_done, reason: EndReason::Stopped });
        }
        if agreed.regroup && !is_last {
            return Ok(TrainEnd { steps_done: *steps_done, reason: EndReason::Regrouped });
        }
    }
    report(pending, watcher, steps_done)?;
    Ok(TrainEnd { steps_done: *steps_done, reason: EndReason::Complete })
}

/// What is known of a step before its numbers arrive. `seconds` is the time since the step before, everything included.
fn partial_report(trainer: &Trainer, batch: &StepBatch, seconds: f64) -> StepReport {
    StepReport {
        step: batch.step + 1,
        loss: f64::NAN,
        learning_rate: trainer.schedule.learning_rate(batch.step),
        gradient_norm: f64::NAN,
        examples: batch.global_examples,
        tokens: batch.global_tokens,
        labels: 0,
        seconds,
        examples_per_s: batch.global_examples as f64 / seconds,
        tokens_per_s: batch.global_tokens as f64 / seconds,
    }
}

/// Waits for a step's numbers, hands the report on and returns the loss; NaN where nothing was pending.
///
/// # Errors
/// [`NotFinite`] when the loss or its gradient is not finite; `steps_done` is set back to the step before.
fn report(pending: Option<PendingReport>, watcher: &mut dyn Watcher, steps_done: &mut u64) -> Result<f64> {
    let Some(PendingReport { numbers, local_loss, mut partial, batch }) = pending else { return Ok(f64::NAN) };
    let numbers: Vec<f64> = numbers.finish()?.into_iter().map(f64::from).collect();
    let [loss_sum, denominator, labels, norm] = numbers[..] else { unreachable!("four numbers were sent") };
    partial.loss = loss_sum / denominator;
    partial.labels = labels as u64;
    partial.gradient_norm = norm;
    if !partial.loss.is_finite() || !norm.is_finite() {
        let state_is_whole = *steps_done == partial.step;
        *steps_done = partial.step - 1;
        return Err(NotFinite {
            failure: not_finite_failure(&partial),
            step: partial.step,
            is_culprit: !local_loss.double_value(&[]).is_finite(),
            state_is_whole,
        }
        .into());
    }
    watcher.step_done(&batch, &partial)?;
    Ok(partial.loss)
}

fn not_finite_failure(report: &StepReport) -> Failure {
    Failure::new(FailureKind::Run, "the loss or its gradient is not finite")
        .at(format!("step {}", report.step))
        .found(format!("loss {}, gradient norm {}", report.loss, report.gradient_norm))
        .hint(format!(
            "lower `train.learning_rate`, lengthen the warm-up, or look at the batch: cloze data inspect RECIPE --step {}",
            report.step - 1
        ))
}
