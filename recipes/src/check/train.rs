//! The training: an end, a schedule that fits into it, and a precision that the device has.

use super::Context;
use crate::raw::{ScheduleRaw, TrainRaw, defaults};
use crate::recipe::{Device, Precision, ScheduleKind, ScheduleRecipe, Shard, TrainRecipe};

pub(super) fn check(context: &mut Context<'_>, raw: &TrainRaw) -> TrainRecipe {
    match (raw.steps, raw.epochs) {
        (Some(_), Some(_)) => {
            context.problem("train.epochs", "found both `steps` and `epochs`, expected exactly one of them; unset the other with `null`");
        }
        (None, None) => context.problem("train", "found neither `steps` nor `epochs`, expected exactly one of them"),
        _ => {}
    }
    for (index, beta) in raw.betas.iter().enumerate() {
        if !(0.0..1.0).contains(beta) {
            context.mismatch(&format!("train.betas.{index}"), beta, "a number of at least 0 and below 1");
        }
    }
    if raw.precision == Precision::Bfloat16 && raw.device == Device::Cpu {
        context.mismatch("train.precision", "`bfloat16` with `device: cpu`", "`float32` on a cpu, or `device: cuda`");
    }
    if raw.replicate_shards && raw.shard == Shard::None {
        context.mismatch(
            "train.replicate_shards",
            "`true` with `shard: none`",
            "`false`, since every worker holds the whole state; or a shard",
        );
    }
    TrainRecipe {
        schedule: checked_schedule(context, &raw.schedule, raw.steps),
        steps: raw.steps,
        epochs: raw.epochs,
        batch_examples: raw.batch_examples,
        micro_batch_tokens: raw.micro_batch_tokens,
        learning_rate: raw.learning_rate,
        betas: raw.betas,
        epsilon: raw.epsilon,
        weight_decay: raw.weight_decay,
        clip_norm: raw.clip_norm,
        device: raw.device,
        precision: raw.precision,
        threads: raw.threads,
        log_every_steps: raw.log_every_steps,
        shard: raw.shard,
        replicate_shards: raw.replicate_shards,
        audit_samples: raw.audit_samples,
        deterministic: raw.deterministic,
    }
}

/// Stated warm-up steps leave the default ratio out; neither leaves it in.
fn checked_schedule(context: &mut Context<'_>, raw: &ScheduleRaw, steps: Option<u64>) -> ScheduleRecipe {
    if raw.warmup_steps.is_some() && raw.warmup_ratio.is_some() {
        let message = "found both `warmup_steps` and `warmup_ratio`, expected at most one of them; unset the other with `null`";
        context.problem("train.schedule.warmup_ratio", message);
    }
    let warmup_ratio = match raw.warmup_steps {
        Some(_) => None,
        None => Some(raw.warmup_ratio.unwrap_or_else(defaults::warmup_ratio)),
    };
    if let (Some(warmup), Some(steps)) = (raw.warmup_steps, steps)
        && warmup > steps
    {
        context.mismatch("train.schedule.warmup_steps", warmup, format!("at most train.steps, which is {steps}"));
    }
    if let (ScheduleKind::Wsd, Some(warmup)) = (raw.kind, warmup_ratio)
        && warmup + raw.decay_ratio > 1.0
    {
        let found = format!("{} after a warm-up of {warmup}", raw.decay_ratio);
        context.mismatch("train.schedule.decay_ratio", found, "both together at most 1");
    }
    ScheduleRecipe {
        kind: raw.kind,
        warmup_steps: raw.warmup_steps,
        warmup_ratio,
        end_ratio: raw.end_ratio,
        power: raw.power,
        decay_ratio: raw.decay_ratio,
    }
}
