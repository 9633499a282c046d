//! The number of a run that a metric asks for.

use cloze_recipes::study::{Metric, Score};

use super::loaded_run::LoadedRun;
use super::material::Trial;

/// Percent of a whole.
const PERCENT: f64 = 100.0;

/// State of a study's trial whose scores count. One that waits at a rung has scores too, of a model that is not trained to its end.
pub(super) const DONE: &str = "done";

/// Whether the scores of a trial count: those of a study's trial only once it is done.
pub fn counts(trial: &Trial) -> bool {
    trial.stands_alone || trial.state == DONE
}

/// The number of a trial, shares in percent; `None` where it has none (yet), or is not done.
pub fn value_of_trial(trial: &Trial, metric: &Metric) -> Option<f64> {
    if counts(trial) { value_of(&trial.run, metric) } else { None }
}

/// The number of a run, shares in percent; `None` where the run has none (yet).
pub fn value_of(run: &LoadedRun, metric: &Metric) -> Option<f64> {
    if metric.score == Score::Loss {
        return run.final_loss();
    }
    let evaluation = run.evaluation.as_ref()?;
    let share = match (&metric.task, metric.score) {
        (None, Score::Accuracy) => evaluation.mean_accuracy,
        (None, _) => evaluation.mean_macro_f1,
        (Some(name), score) => {
            let task = evaluation.tasks.iter().find(|task| task.name == *name)?;
            if score == Score::Accuracy { task.scores.accuracy } else { task.scores.macro_f1 }
        }
    };
    share.is_finite().then_some(share * PERCENT)
}

/// Whether a larger number is the better one.
pub fn more_is_better(score: Score) -> bool {
    score != Score::Loss
}

/// Decimals that a number of a score is shown with.
pub fn decimals(score: Score) -> usize {
    if score == Score::Loss { 4 } else { 2 }
}

/// A metric in words.
pub fn name_of(metric: &Metric) -> String {
    let score = match metric.score {
        Score::Accuracy => "accuracy",
        Score::MacroF1 => "macro-F1",
        Score::Loss => return "training loss".to_owned(),
    };
    format!("{} {score}", metric.task.as_deref().unwrap_or("mean"))
}

/// What an axis of the score is called.
pub fn axis_name(metric: &Metric) -> String {
    if metric.score == Score::Loss { name_of(metric) } else { format!("{}, %", name_of(metric)) }
}
