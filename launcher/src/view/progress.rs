//! How far a run is, and how fast.

use std::collections::VecDeque;

use cloze_cluster::StepReport;
use serde::{Deserialize, Serialize};

/// Steps over which means are taken; enough to even out single steps, few enough to show a change within a minute or so.
const MEAN_STEPS: usize = 50;

/// Weight of the newest loss in the smoothed one; the last 20 or so steps make up most of it.
const SMOOTHING_WEIGHT: f64 = 0.1;

/// Numbers of the newest step, and means over the last ones. A number that is not finite is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Loss of the newest step.
    pub loss: Option<f64>,
    /// Exponential mean of the losses.
    pub smoothed_loss: Option<f64>,
    /// Learning rate of the newest step.
    pub learning_rate: Option<f64>,
    /// Gradient norm of the newest step, before clipping.
    pub gradient_norm: Option<f64>,
    /// Tokens per second of the newest step.
    pub tokens_per_s: Option<f64>,
    /// Tokens per second over the last steps of this generation.
    pub mean_tokens_per_s: Option<f64>,
    /// Examples per second of the newest step.
    pub examples_per_s: Option<f64>,
    /// Position in the data: examples that the steps up to this one trained on.
    pub examples: u64,
    /// Examples of the whole run, at the newest step's number of examples.
    pub examples_in_all: u64,
    /// Seconds until the last step, at the pace of the last ones.
    pub eta_s: Option<f64>,
    /// Examples of the newest step that was reported.
    #[serde(skip)]
    examples_per_step: u64,
    /// The last steps of this generation.
    #[serde(skip)]
    window: VecDeque<Moment>,
}

/// What a mean needs of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Moment {
    step: u64,
    time: f64,
    tokens: u64,
    seconds: f64,
}

impl Progress {
    /// Takes in a step that was reported at `time`.
    pub fn step_done(&mut self, time: f64, report: &StepReport) {
        if self.window.back().is_some_and(|last| last.step >= report.step) {
            self.window.clear();
        }
        if self.window.len() == MEAN_STEPS {
            self.window.pop_front();
        }
        self.window.push_back(Moment { step: report.step, time, tokens: report.tokens, seconds: report.seconds });
        self.step = report.step;
        self.loss = finite(report.loss);
        self.smoothed_loss = smoothed(self.smoothed_loss, self.loss);
        self.learning_rate = finite(report.learning_rate);
        self.gradient_norm = finite(report.gradient_norm);
        self.tokens_per_s = finite(report.tokens_per_s);
        self.mean_tokens_per_s = self.mean_speed();
        self.examples_per_s = finite(report.examples_per_s);
        // Every step has the same number of examples, so that a replayed step counts once.
        self.examples_per_step = report.examples;
        self.examples = report.step.saturating_mul(report.examples);
        self.examples_in_all = self.steps.max(report.step).saturating_mul(report.examples);
        self.eta_s = finite(self.seconds_per_step(report) * self.steps.saturating_sub(report.step) as f64);
    }

    /// Later steps than the reported one are done.
    pub fn reached(&mut self, step: u64) {
        if step <= self.step {
            return;
        }
        let (left_before, left) = (self.steps.saturating_sub(self.step), self.steps.saturating_sub(step));
        self.eta_s = self.eta_s.filter(|_| left_before > 0).map(|eta_s| eta_s * left as f64 / left_before as f64);
        self.step = step;
        self.examples = step.saturating_mul(self.examples_per_step);
    }

    /// Examples of a step, as the newest report says; 0 before the first.
    pub fn examples_per_step(&self) -> u64 {
        self.examples_per_step
    }

    /// The state of another step is in memory now: after a loss of steps, or after a resume.
    pub fn restored(&mut self, step: u64) {
        self.examples = self.examples.checked_div(self.step).unwrap_or(0) * step;
        self.step = step;
        self.pause();
    }

    /// Training stands still; pauses do not count as slow steps.
    pub fn pause(&mut self) {
        self.window.clear();
        self.eta_s = None;
    }

    fn mean_speed(&self) -> Option<f64> {
        let seconds: f64 = self.window.iter().map(|moment| moment.seconds).sum();
        let tokens: u64 = self.window.iter().map(|moment| moment.tokens).sum();
        finite(tokens as f64 / seconds)
    }

    /// The pace by the clock, which counts what happens between steps too; of a single step its own duration. Steps that are told to a new
    /// controller all at once took as long as they say themselves.
    fn seconds_per_step(&self, report: &StepReport) -> f64 {
        match (self.window.front(), self.window.back()) {
            (Some(first), Some(last)) if last.step > first.step && last.time >= first.time => {
                // The first one ended where the clock begins, and may have waited for much else.
                let own = self.window.iter().skip(1).map(|moment| moment.seconds).sum::<f64>() / (self.window.len() - 1) as f64;
                ((last.time - first.time) / (last.step - first.step) as f64).max(own)
            }
            _ => report.seconds,
        }
    }
}

/// The number, if it is one.
pub(super) fn finite(number: f64) -> Option<f64> {
    number.is_finite().then_some(number)
}

fn smoothed(before: Option<f64>, loss: Option<f64>) -> Option<f64> {
    match (before, loss) {
        (Some(before), Some(loss)) => Some(before + SMOOTHING_WEIGHT * (loss - before)),
        (before, loss) => loss.or(before),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::fixtures::report;

    #[test]
    fn numbers_of_the_newest_step() {
        let mut progress = Progress { steps: 300, ..Progress::default() };
        progress.step_done(10.0, &report(1, 2.0));
        // One step of half a second: 299 to go.
        assert_eq!((progress.loss, progress.smoothed_loss, progress.eta_s), (Some(2.0), Some(2.0), Some(149.5)));
        progress.step_done(12.0, &report(2, 1.0));
        assert_eq!((progress.step, progress.examples, progress.examples_in_all), (2, 16, 2400));
        // By the clock a step takes two seconds, whatever the step itself says.
        assert_eq!(progress.eta_s, Some(596.0));
        assert!((progress.smoothed_loss.unwrap() - 1.9).abs() < 1e-12);
        // 100 tokens in half a second each.
        assert_eq!(progress.mean_tokens_per_s, Some(200.0));
    }

    #[test]
    fn steps_that_are_told_at_once_took_their_time() {
        let mut progress = Progress { steps: 300, ..Progress::default() };
        for step in 1..=20 {
            progress.step_done(10.0, &report(step, 1.0));
        }
        assert_eq!(progress.eta_s, Some(140.0), "280 steps of half a second");
    }

    #[test]
    fn numbers_that_are_not_finite_are_none() {
        let mut progress = Progress { steps: 3, ..Progress::default() };
        progress.step_done(1.0, &report(1, 2.0));
        let mut broken = report(2, f64::NAN);
        (broken.gradient_norm, broken.tokens_per_s, broken.examples_per_s) = (f64::INFINITY, f64::NAN, f64::NEG_INFINITY);
        progress.step_done(2.0, &broken);
        assert_eq!((progress.loss, progress.gradient_norm, progress.tokens_per_s, progress.examples_per_s), (None, None, None, None));
        assert_eq!(progress.smoothed_loss, Some(2.0), "the mean stays where it was");
        assert!(!serde_json::to_string(&progress).unwrap().contains("NaN"));
    }

    #[test]
    fn the_mean_forgets_old_steps_and_pauses() {
        let mut progress = Progress { steps: 1000, ..Progress::default() };
        for step in 1..=60 {
            let mut slow_at_first = report(step, 1.0);
            if step <= 10 {
                slow_at_first.seconds = 100.0;
            }
            progress.step_done(step as f64, &slow_at_first);
        }
        assert_eq!((progress.mean_tokens_per_s, progress.eta_s), (Some(200.0), Some(940.0)));
        progress.restored(50);
        assert_eq!((progress.step, progress.examples, progress.eta_s), (50, 400, None));
        progress.step_done(500.0, &report(51, 1.0));
        assert_eq!(progress.eta_s, Some(474.5), "949 steps of half a second");
    }
}
