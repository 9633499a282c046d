//! START HERE: [`train`] is the loop and [`train_step`] is one step of it.
//!
//! A step: every worker takes its packs of the global batch, adds up loss and gradients, sums both over the workers, and moves
//! the parameters by the same amount. Loss and gradients stay sums until the end, where one number that was summed with them (the
//! number of labels or of examples) divides both, so the world size does not change what is computed.

use std::time::Instant;

use anyhow::Result;
use cloze_cluster::protocol::StepReport;
use cloze_data::batch::Pack;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::{LossNorm, Recipe};
use tch::{Device, Tensor};

use crate::batch_feed::{BatchFeed, StepBatch};
use crate::collective::Collective;
use crate::model::modernbert::ModernBert;
use crate::model::packed::{Labelled, PackedInput};
use crate::optim::adamw::{AdamW, LossSums};
use crate::optim::schedule::Schedule;
use crate::torch::memory::{self, Readback};
use crate::torch::overlap::{self, Buckets};

/// Places of the numbers behind the gradients.
const EXTRA_LOSS: i64 = 0;
const EXTRA_DENOMINATOR: i64 = 1;
const EXTRA_LABELS: i64 = 2;
const EXTRA_STOP: i64 = 3;

/// Everything that a step changes, and what it is computed from.
pub struct Trainer<'a> {
    /// The recipe of the run.
    pub recipe: &'a Recipe,
    /// Parameters and gradients.
    pub model: ModernBert,
    /// Optimizer state.
    pub optimizer: AdamW,
    /// Learning rate.
    pub schedule: Schedule,
    /// The other workers.
    pub collective: Box<dyn Collective>,
    /// How gradients are summed over the workers while the backward pass runs.
    pub buckets: Buckets,
}

/// What the loop tells the world, and what it asks; `worker.rs` answers.
pub trait Watcher {
    /// Whether this worker was asked to stop after the step in progress.
    fn stop_requested(&self) -> bool;
    /// A step is done.
    fn step_done(&mut self, report: &StepReport) -> Result<()>;
    /// Whether the state after `steps_done` steps is to be saved.
    fn save_due(&self, steps_done: u64, is_last: bool) -> bool;
    /// Saves the state, which all workers hold alike and whose loss is known to be finite.
    fn save(&mut self, trainer: &Trainer, steps_done: u64, is_last: bool) -> Result<()>;
}

/// How the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainEnd {
    /// Steps done in all.
    pub steps_done: u64,
    /// Whether it was asked to stop before the last step.
    pub stopped: bool,
}

/// A step whose numbers are still on their way from the device.
struct PendingReport {
    numbers: Readback,
    partial: StepReport,
}

/// Trains from `steps_done` to the end of the feed or until the workers agree to stop.
pub fn train(trainer: &mut Trainer, feed: &mut BatchFeed, steps_done: u64, watcher: &mut dyn Watcher) -> Result<TrainEnd> {
    let mut end = TrainEnd { steps_done, stopped: false };
    let mut pending = None;
    let mut clock = Instant::now();
    while let Some(batch) = feed.next_batch()? {
        trainer.collective.set_step(batch.step + 1);
        let (numbers, stop_agreed) = train_step(trainer, &batch, watcher.stop_requested())?;
        end.steps_done = batch.step + 1;
        let is_last = end.steps_done == feed.total_steps();
        end.stopped = stop_agreed && !is_last;
        // On a GPU the numbers of a step are read when the next one is queued, so that the device never waits for the host.
        report(pending.take(), watcher)?;
        let partial = partial_report(trainer, &batch, std::mem::replace(&mut clock, Instant::now()).elapsed().as_secs_f64());
        pending = Some(PendingReport { numbers, partial });
        let save_due = watcher.save_due(end.steps_done, end.stopped || is_last);
        if trainer.model.device() == Device::Cpu || save_due {
            report(pending.take(), watcher)?;
        }
        if save_due {
            watcher.save(trainer, end.steps_done, end.stopped || is_last)?;
        }
        if end.stopped {
            break;
        }
    }
    report(pending, watcher)?;
    Ok(end)
}

/// One optimizer step. Returns loss, denominator, labels and gradient norm on their way to the host, and whether the workers agreed to stop.
fn train_step(trainer: &mut Trainer, batch: &StepBatch, wants_stop: bool) -> Result<(Readback, bool)> {
    let mut extras = zero_gradients(trainer)?;
    add_extras(trainer.recipe, &batch.packs, wants_stop, &mut extras, trainer.model.device())?;
    let (last, before) = batch.packs.split_last().map_or((None, &batch.packs[..]), |(last, before)| (Some(last), before));
    for pack in before {
        add_gradients(&trainer.model, pack, &extras)?;
    }
    let stop_agreed = finish_and_sum(trainer, last, &extras, wants_stop)?;
    let learning_rate = trainer.schedule.learning_rate(batch.step);
    let scalar = |place| tch::no_grad(|| extras.narrow(0, place, 1).squeeze());
    let sums = LossSums { loss: scalar(EXTRA_LOSS), denominator: scalar(EXTRA_DENOMINATOR) };
    let norm = trainer.optimizer.step(trainer.model.parameters_mut(), learning_rate, &sums)?;
    let numbers = tch::no_grad(|| Tensor::cat(&[extras.narrow(0, 0, EXTRA_LABELS + 1), norm.view([1])], 0));
    Ok((Readback::start(&numbers)?, stop_agreed))
}

/// Forward and backward of one pack: adds its gradients to the flat buffer and its loss to the extras.
fn add_gradients(model: &ModernBert, pack: &Pack, extras: &Tensor) -> Result<()> {
    let input = PackedInput::new(&pack.input_ids, &pack.lengths, model.device())?;
    let labelled = Labelled::new(&pack.labels, &pack.label_weights, model.device())?;
    let loss_sum = model.loss_sum(&input, &labelled)?;
    loss_sum.f_backward()?;
    let _ = tch::no_grad(|| extras.narrow(0, EXTRA_LOSS, 1).f_add_(&loss_sum.detach()))?;
    Ok(())
}

/// Zeroes gradients and extras; returns the extras.
fn zero_gradients(trainer: &Trainer) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let parameters = trainer.model.parameters();
    let mut gradients = parameters.gradients()?.shallow_clone();
    let _ = gradients.zero_();
    let start = parameters.values().numel() as i64;
    Ok(gradients.narrow(0, start, gradients.numel() as i64 - start))
}

/// Writes what this worker's packs add to the denominator and the counts.
fn add_extras(recipe: &Recipe, packs: &[Pack], wants_stop: bool, extras: &mut Tensor, device: Device) -> Result<()> {
    let labels: usize = packs.iter().map(Pack::num_labels).sum();
    let examples: usize = packs.iter().map(Pack::num_examples).sum();
    let mut numbers = vec![0.0_f32; extras.numel()];
    numbers[EXTRA_DENOMINATOR as usize] = match recipe.objective.loss_norm {
        LossNorm::TokenMean => labels as f32,
        LossNorm::PerExample => examples as f32,
    };
    numbers[EXTRA_LABELS as usize] = labels as f32;
    numbers[EXTRA_STOP as usize] = f32::from(u8::from(wants_stop));
    let _guard = tch::no_grad_guard();
    extras.f_copy_(&memory::to_device(Tensor::f_from_slice(&numbers)?, device)?)?;
    Ok(())
}

/// Runs the last pack and sums gradients and extras over the workers; returns whether any of them wants to stop.
///
/// On a CPU each bucket of gradients is summed as soon as the backward pass has completed it; gradients on a GPU go through host memory.
fn finish_and_sum(trainer: &mut Trainer, last: Option<&Pack>, extras: &Tensor, wants_stop: bool) -> Result<bool> {
    let Trainer { model, collective, buckets, .. } = trainer;
    let last_pack = || last.map_or(Ok(()), |pack| add_gradients(model, pack, extras));
    if collective.world_size() == 1 {
        return last_pack().map(|()| wants_stop);
    }
    let mut gradients = model.parameters().gradients()?.shallow_clone();
    if gradients.device() == Device::Cpu {
        overlap::reduce_during(&mut gradients, buckets, collective.as_mut(), last_pack)?;
    } else {
        last_pack()?;
        let stop_at = model.parameters().values().numel() + EXTRA_STOP as usize;
        let mut host = gradients.to_device(Device::Cpu);
        let any_stop = memory::with_floats_mut(&mut host, |data| collective.all_reduce_sum(data).map(|()| data[stop_at] > 0.0))??;
        tch::no_grad(|| gradients.f_copy_(&host))?;
        return Ok(any_stop);
    }
    Ok(extras.double_value(&[EXTRA_STOP]) > 0.0)
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

/// Waits for a step's numbers and hands the report on.
///
/// # Errors
/// [`FailureKind::Run`] when the loss is not finite: the parameters are still those of the step before.
fn report(pending: Option<PendingReport>, watcher: &mut dyn Watcher) -> Result<()> {
    let Some(PendingReport { numbers, mut partial }) = pending else { return Ok(()) };
    let numbers: Vec<f64> = numbers.finish()?.into_iter().map(f64::from).collect();
    let [loss_sum, denominator, labels, norm] = numbers[..] else { unreachable!("four numbers were sent") };
    partial.loss = loss_sum / denominator;
    partial.labels = labels as u64;
    partial.gradient_norm = norm;
    if !partial.loss.is_finite() || !norm.is_finite() {
        return Err(Failure::new(FailureKind::Run, "the loss or its gradient is not finite")
            .at(format!("step {}", partial.step))
            .found(format!("loss {}, gradient norm {norm}", partial.loss))
            .hint(format!(
                "lower `train.learning_rate`, lengthen the warm-up, or look at the batch: cloze data inspect RECIPE --step {}",
                partial.step - 1
            ))
            .into());
    }
    watcher.step_done(&partial)
}
