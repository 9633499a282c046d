//! `AdamW` over the flat buffers: two fused calls, one for what decays and one for what does not.

use anyhow::Result;
use cloze_recipes::recipe::TrainRecipe;
use tch::{Kind, Tensor};

use crate::model::parameters::FlatParameters;
use crate::torch::ops::{self, AdamWBuffers, AdamWOptions};

/// Optimizer state: two float32 moments of every parameter, and the number of steps taken.
#[derive(Debug)]
pub struct AdamW {
    /// Running mean of the gradients, `[P]`.
    pub first_moment: Tensor,
    /// Running mean of their squares, `[P]`.
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

impl AdamW {
    /// Zeroed state for parameters that have taken no step.
    pub fn new(parameters: &FlatParameters, settings: Settings) -> Self {
        let zeros = || parameters.values().zeros_like();
        let step = Tensor::zeros([] as [i64; 0], (Kind::Float, parameters.values().device()));
        Self { first_moment: zeros(), second_moment: zeros(), step, settings }
    }

    /// Sets the number of steps that the moments have seen, after they were restored.
    pub fn set_steps_done(&mut self, steps_done: u64) {
        let _ = tch::no_grad(|| self.step.fill_(steps_done as f64));
    }

    /// Takes one step with gradients that are sums: they are divided by `denominator` (a float32 scalar on the device) and clipped.
    /// A loss or norm that is not finite leaves the parameters as they are. Returns the norm before clipping, still on the device.
    pub fn step(&mut self, parameters: &mut FlatParameters, learning_rate: f64, sums: &LossSums) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let total = parameters.values().numel() as i64;
        let gradients = parameters.gradients()?.narrow(0, 0, total);
        let denominator = &sums.denominator;
        let norm = gradients.norm() / denominator;
        let skip = (&norm + &sums.loss).isfinite().logical_not().to_kind(Kind::Float);
        let divisor = match self.settings.clip_norm {
            limit if limit > 0.0 => denominator * ((&norm + 1e-6) / limit).clamp_min(1.0),
            _ => denominator.shallow_clone(),
        };
        let _ = self.step.f_add_scalar_(1.0)?;
        let decayed = parameters.decayed_length();
        for (start, length, weight_decay) in [(0, decayed, self.settings.weight_decay), (decayed, total - decayed, 0.0)] {
            if length == 0 {
                continue;
            }
            let part = |flat: &Tensor| flat.narrow(0, start, length);
            let buffers = AdamWBuffers {
                parameter: &part(parameters.values()),
                gradient: &part(&gradients),
                first_moment: &part(&self.first_moment),
                second_moment: &part(&self.second_moment),
                step: &self.step,
                gradient_divisor: &divisor,
                skip: &skip,
            };
            let [beta1, beta2] = self.settings.betas;
            ops::adamw(&buffers, &AdamWOptions { learning_rate, beta1, beta2, weight_decay, epsilon: self.settings.epsilon })?;
        }
        parameters.refresh();
        Ok(norm)
    }
}
