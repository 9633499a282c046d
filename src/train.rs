//! START HERE: [`train`] is the loop, [`train_step`] in `step.rs` is one step of it.
//!
//! A step: every worker takes its packs of the global batch, adds up loss and gradients, sums both over the workers, and moves
//! the parameters by the same amount. Loss and gradients stay sums until the end, where one number that was summed with them (the
//! number of labels or of examples) divides both, so the world size does not change what is computed.

use std::time::Instant;

use anyhow::Result;
use cloze_cluster::protocol::{StepReport, Unreported};
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
    /// Whether a state with so many steps is where the run is to be left, before its end; the same on all workers.
    fn is_far_enough(&self, steps_done: u64) -> bool;
    /// The batch is there and a step begins: what this worker wants at its end.
    fn asks(&mut self, steps_done: u64) -> Asks;
    /// Parameters and moments are about to change; returns when nobody reads them any more.
    fn before_update(&mut self) -> Result<()>;
    /// A step's numbers have arrived, and they are finite: the batch counts.
    fn step_done(&mut self, batch: &StepBatch, report: &StepReport) -> Result<()>;
    /// Whether the state is saved before another generation goes on, because it would be lost with one worker.
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

/// How far the loop is.
struct Position<'a> {
    /// Steps done of the state in memory.
    steps_done: &'a mut u64,
    /// The last of them, while its numbers are on their way.
    pending: Option<PendingReport>,
}

/// Trains to the end of the feed, or until the workers agree to stop or to regroup. `steps_done` follows the state.
pub fn train(
    trainer: &mut Trainer,
    feed: &mut BatchFeed,
    watcher: &mut dyn Watcher,
    drills: &mut Drills,
    steps_done: &mut u64,
) -> Result<TrainEnd> {
    let from_step = *steps_done;
    let mut position = Position { steps_done, pending: None };
    let result = take_steps(trainer, feed, watcher, drills, &mut position);
    // Whether the last step counts does not depend on what became of the one after it.
    if trainer.state_is_whole() && result.as_ref().err().is_none_or(|error| !error.is::<NotFinite>()) {
        report(&mut position, watcher)?;
    }
    let end = result?;
    if end.steps_done == from_step {
        // The generation before this one did the last step and may not have lived to save it.
        watcher.save(trainer, SavePoint { steps_done: from_step, is_last: true, is_temporary: false, loss: f64::NAN })?;
    }
    Ok(end)
}

fn take_steps(
    trainer: &mut Trainer,
    feed: &mut BatchFeed,
    watcher: &mut dyn Watcher,
    drills: &mut Drills,
    position: &mut Position,
) -> Result<TrainEnd> {
    let mut clock = Instant::now();
    if watcher.is_far_enough(*position.steps_done) {
        return Ok(TrainEnd { steps_done: *position.steps_done, reason: EndReason::Stopped });
    }
    loop {
        watcher.batch_awaited(*position.steps_done)?;
        let Some(mut batch) = feed.next_batch()? else { break };
        let asks = watcher.asks(*position.steps_done);
        drills.perform(&mut batch)?;
        trainer.collective.set_step(batch.step + 1);
        let StepOutcome { numbers, agreed, spread, local_loss } = train_step(trainer, &batch, asks, &mut || watcher.before_update())?;
        // On a GPU the numbers of a step are read when the next one is queued, so that the device never waits for the host.
        *position.steps_done = batch.step + 1;
        report(position, watcher)?;
        let partial = partial_report(trainer, &batch, std::mem::replace(&mut clock, Instant::now()).elapsed().as_secs_f64());
        position.pending = Some(PendingReport { numbers, local_loss, partial, batch });
        spread?;
        let steps_done = *position.steps_done;
        let is_last = steps_done == feed.total_steps();
        let is_left = is_last || agreed.stop || (agreed.regroup && watcher.must_save_to_regroup());
        let save_due = watcher.save_due(steps_done);
        if trainer.model.device() == Device::Cpu || save_due || is_left || agreed.save || agreed.regroup {
            let loss = report(position, watcher)?;
            if save_due || is_left || agreed.save {
                watcher.save(trainer, SavePoint { steps_done, is_last: is_left, is_temporary: !save_due && !is_left, loss })?;
            }
        }
        if agreed.stop && !is_last {
            return Ok(TrainEnd { steps_done, reason: EndReason::Stopped });
        }
        if agreed.regroup && !is_last {
            return Ok(TrainEnd { steps_done, reason: EndReason::Regrouped });
        }
    }
    Ok(TrainEnd { steps_done: *position.steps_done, reason: EndReason::Complete })
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
        before: Unreported::default(),
    }
}

/// Waits for the numbers of the last step, hands the report on and returns the loss; NaN where nothing was pending.
///
/// # Errors
/// [`NotFinite`] when the loss or its gradient is not finite; `steps_done` is set back to the step before.
fn report(position: &mut Position, watcher: &mut dyn Watcher) -> Result<f64> {
    let Some(PendingReport { numbers, local_loss, mut partial, batch }) = position.pending.take() else { return Ok(f64::NAN) };
    let numbers: Vec<f64> = numbers.finish()?.into_iter().map(f64::from).collect();
    let [loss_sum, denominator, labels, norm] = numbers[..] else { unreachable!("four numbers were sent") };
    partial.loss = loss_sum / denominator;
    partial.labels = labels as u64;
    partial.gradient_norm = norm;
    if !partial.loss.is_finite() || !norm.is_finite() {
        let state_is_whole = *position.steps_done == partial.step;
        *position.steps_done = partial.step - 1;
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
