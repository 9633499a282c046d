//! `AdamW` over flat buffers: fused calls for what decays and for what does not.

use std::ops::Range;

use anyhow::Result;
use cloze_recipes::recipe::{Shard, TrainRecipe};
use tch::{Kind, Tensor};

use crate::model::parameters::FlatParameters;
use crate::torch::ops::{self, AdamWBuffers, AdamWOptions};

/// Optimizer state: two float32 moments of every parameter, or of this worker's shard, and the number of steps taken.
#[derive(Debug)]
pub struct AdamW {
    /// Running mean of the gradients, `[P]` or `[S]`.
    pub first_moment: Tensor,
    /// Running mean of their squares, `[P]` or `[S]`.
    pub second_moment: Tensor,
    step: Tensor,
    settings: Settings,
}

/// The numbers of a recipe that do not change from step to step.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Largest gradient norm; 0 is no limit.
    pub clip_norm: f64,
}

/// What was summed over the batch beside the gradients; float32 scalars on the device.
#[derive(Debug)]
pub struct LossSums {
    /// Sum of the weighted losses.
    pub loss: Tensor,
    /// What loss and gradients are divided by.
    pub denominator: Tensor,
}

impl From<&TrainRecipe> for Settings {
    fn from(recipe: &TrainRecipe) -> Self {
        Self { betas: recipe.betas, epsilon: recipe.epsilon, weight_decay: recipe.weight_decay, clip_norm: recipe.clip_norm }
    }
}

/// A stretch of parameters that is updated in one call.
#[derive(Debug)]
pub struct Part {
    /// Its values.
    pub values: Tensor,
    /// Its gradients.
    pub gradients: Tensor,
    /// Its place in the moments.
    pub moments: Range<usize>,
    /// Whether it has weight decay.
    pub is_decayed: bool,
}

/// What becomes of a step; float32 scalars on the device.
#[derive(Debug)]
pub struct Verdict {
    /// Gradient norm before clipping.
    pub norm: Tensor,
    divisor: Tensor,
    /// 1 where loss or norm is not finite.
    skip: Tensor,
}

impl AdamW {
    /// Zeroed state for parameters that have taken no step.
    pub fn new(parameters: &FlatParameters, settings: Settings) -> Self {
        let length = match parameters.shard() {
            Shard::None => parameters.length(),
            _ => parameters.shard_floats() as i64,
        };
        let float = (Kind::Float, parameters.values().device());
        let zeros = || Tensor::zeros([length], float);
        Self { first_moment: zeros(), second_moment: zeros(), step: Tensor::zeros([] as [i64; 0], float), settings }
    }

    /// Sets the number of steps that the moments have seen, after they were restored.
    pub fn set_steps_done(&mut self, steps_done: u64) {
        let _ = tch::no_grad(|| self.step.fill_(steps_done as f64));
    }

    /// Number of steps that the moments have seen.
    #[cfg(test)]
    pub fn steps_done(&self) -> u64 {
        self.step.double_value(&[]) as u64
    }

    /// Takes one step with gradients that are sums: they are divided by `denominator` (a float32 scalar on the device) and clipped.
    /// A loss or norm that is not finite leaves the state as it is. Returns the norm before clipping, still on the device.
    pub fn step(&mut self, parameters: &mut FlatParameters, learning_rate: f64, sums: &LossSums) -> Result<Tensor> {
        let parts = whole(parameters)?;
        let verdict = self.judge(&norm_of_all(parameters)?, sums)?;
        self.update(&parts, &verdict, learning_rate)?;
        parameters.refresh();
        Ok(verdict.norm)
    }

    /// Decides about a step whose summed gradients have this norm.
    pub fn judge(&self, summed_norm: &Tensor, sums: &LossSums) -> Result<Verdict> {
        let _guard = tch::no_grad_guard();
        let denominator = &sums.denominator;
        let norm = summed_norm.f_div(denominator)?;
        let skip = (&norm + &sums.loss).isfinite().logical_not().to_kind(Kind::Float);
        let divisor = match self.settings.clip_norm {
            limit if limit > 0.0 => denominator * ((&norm + 1e-6) / limit).clamp_min(1.0),
            _ => denominator.shallow_clone(),
        };
        Ok(Verdict { norm, divisor, skip })
    }

    /// Updates values and moments, or leaves them and the number of steps as they are, as the verdict says. The gradients are divided in place.
    pub fn update(&mut self, parts: &[Part], verdict: &Verdict, learning_rate: f64) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let Verdict { divisor, skip, .. } = verdict;
        let _ = self.step.f_add_scalar_(1.0)?.f_sub_(skip)?;
        for part in parts.iter().filter(|part| !part.moments.is_empty()) {
            let moments = |flat: &Tensor| flat.f_narrow(0, part.moments.start as i64, part.moments.len() as i64);
            let buffers = AdamWBuffers {
                parameter: &part.values,
                gradient: &part.gradients,
                first_moment: &moments(&self.first_moment)?,
                second_moment: &moments(&self.second_moment)?,
                step: &self.step,
                gradient_divisor: divisor,
                skip,
            };
            let Settings { betas: [beta1, beta2], epsilon, weight_decay, .. } = self.settings;
            let weight_decay = if part.is_decayed { weight_decay } else { 0.0 };
            ops::adamw(&buffers, &AdamWOptions { learning_rate, beta1, beta2, weight_decay, epsilon })?;
        }
        Ok(())
    }
}

/// All parameters of a model that is not shared out: the matrices, and the rest.
pub fn whole(parameters: &FlatParameters) -> Result<Vec<Part>> {
    let (total, decayed) = (parameters.length(), parameters.decayed_length());
    let part = |range: Range<i64>, is_decayed| -> Result<Part> {
        let narrow = |flat: &Tensor| flat.f_narrow(0, range.start, range.end - range.start);
        let moments = range.start as usize..range.end as usize;
        Ok(Part { values: narrow(parameters.values())?, gradients: narrow(parameters.gradients()?)?, moments, is_decayed })
    };
    Ok(vec![part(0..decayed, true)?, part(decayed..total, false)?])
}

/// Norm of all gradients of a model that is not shared out.
pub fn norm_of_all(parameters: &FlatParameters) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    Ok(parameters.gradients()?.f_narrow(0, 0, parameters.length())?.f_norm()?)
}
