//! Learning rate as a pure function of the step.

use cloze_recipes::recipe::{ScheduleKind, ScheduleRecipe};

/// A schedule over a known number of steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    recipe: ScheduleRecipe,
    peak: f64,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// A schedule that peaks at `peak` and ends after `total_steps`.
    pub fn new(recipe: &ScheduleRecipe, peak: f64, total_steps: u64) -> Self {
        let from_ratio = (recipe.warmup_ratio.unwrap_or(0.0) * total_steps as f64).ceil() as u64;
        let warmup_steps = recipe.warmup_steps.unwrap_or(from_ratio);
        Self { recipe: recipe.clone(), peak, warmup_steps, total_steps }
    }

    /// Learning rate of the step that follows `steps_done` steps.
    ///
    /// The warm-up is `peak * steps_done / warmup_steps`, so that the very first step has rate 0 as in transformers' schedules.
    pub fn learning_rate(&self, steps_done: u64) -> f64 {
        if steps_done < self.warmup_steps {
            return self.peak * steps_done as f64 / self.warmup_steps as f64;
        }
        let span = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((steps_done - self.warmup_steps) as f64 / span as f64).min(1.0);
        self.peak * self.shape(progress, span)
    }

    /// Share of the peak at a progress from 0 (end of the warm-up) to 1 (last step).
    fn shape(&self, progress: f64, span: u64) -> f64 {
        let end = self.recipe.end_ratio;
        let between = |remaining: f64| end + (1.0 - end) * remaining;
        match self.recipe.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => between(1.0 - progress),
            ScheduleKind::Cosine => between(0.5 * (1.0 + (std::f64::consts::PI * progress).cos())),
            ScheduleKind::Polynomial => between((1.0 - progress).powf(self.recipe.power)),
            ScheduleKind::Wsd => {
                let decay = (self.recipe.decay_ratio * self.total_steps as f64 / span as f64).clamp(0.0, 1.0);
                let into_decay = if decay > 0.0 { ((progress - (1.0 - decay)) / decay).max(0.0) } else { 0.0 };
                between(1.0 - into_decay)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind, warmup_steps: u64) -> Schedule {
        let recipe =
            ScheduleRecipe { kind, warmup_steps: Some(warmup_steps), warmup_ratio: None, end_ratio: 0.0, power: 2.0, decay_ratio: 0.2 };
        Schedule::new(&recipe, 1.0, 100)
    }

    fn rates(schedule: &Schedule, steps: &[u64]) -> Vec<f64> {
        steps.iter().map(|&step| (schedule.learning_rate(step) * 1e6).round() / 1e6).collect()
    }

    #[test]
    fn every_shape_at_its_corners() {
        let steps = [0, 5, 10, 55, 80, 90, 100, 200];
        let table = [
            (ScheduleKind::Linear, [0.0, 0.5, 1.0, 0.5, 0.222_222, 0.111_111, 0.0, 0.0]),
            (ScheduleKind::Cosine, [0.0, 0.5, 1.0, 0.5, 0.116_978, 0.030_154, 0.0, 0.0]),
            (ScheduleKind::Polynomial, [0.0, 0.5, 1.0, 0.25, 0.049_383, 0.012_346, 0.0, 0.0]),
            (ScheduleKind::Constant, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
            (ScheduleKind::Wsd, [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]),
        ];
        for (kind, expected) in table {
            assert_eq!(rates(&schedule(kind, 10), &steps), expected, "{kind:?}");
        }
    }

    #[test]
    fn no_warm_up_starts_at_the_peak() {
        assert_eq!(rates(&schedule(ScheduleKind::Linear, 0), &[0, 50]), [1.0, 0.5]);
    }

    #[test]
    fn a_warm_up_ratio_is_rounded_up() {
        let recipe = ScheduleRecipe { warmup_steps: None, warmup_ratio: Some(0.05), ..schedule(ScheduleKind::Linear, 0).recipe };
        assert_eq!(Schedule::new(&recipe, 1.0, 30).warmup_steps, 2);
    }
}
