//! What a trial has come to: how far its run is, and the number that it is compared by.

use std::path::Path;

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::study::{Metric, Score};
use serde_json::Value;

use crate::view::{EventLog, RunState};

/// How far the run of a trial is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(in super::super) struct RunFacts {
    /// Steps done of its newest saved state.
    pub saved_step: u64,
    /// All its steps are done and saved.
    pub is_finished: bool,
    /// Training loss of its last step.
    pub loss: Option<f64>,
}

/// How far the run of a folder is; nothing is done where there is none.
pub(in super::super) fn run_facts(run: &Path) -> Result<RunFacts, Failure> {
    if !run.join("events.jsonl").is_file() {
        return Ok(RunFacts::default());
    }
    let mut log = EventLog::of_run(run);
    log.read_new()?;
    let view = log.view();
    let is_finished = view.state == RunState::Finished;
    let newest = view.checkpoints.iter().map(|checkpoint| checkpoint.step).max().unwrap_or(0);
    let saved_step = if is_finished { newest.max(view.progress.step) } else { newest };
    Ok(RunFacts { saved_step, is_finished, loss: view.progress.loss })
}

/// The number that a sweep compares its trials by; `None` where there is none.
pub(super) fn metric(metric: &Metric, evaluation: Option<&Value>, loss: Option<f64>) -> Option<f64> {
    let (of_task, of_all) = match metric.score {
        Score::Loss => return loss.filter(|loss| loss.is_finite()),
        Score::Accuracy => ("accuracy", "mean_accuracy"),
        Score::MacroF1 => ("macro_f1", "mean_macro_f1"),
    };
    let evaluation = evaluation?;
    let value = match &metric.task {
        None => &evaluation[of_all],
        Some(name) => {
            let tasks = evaluation["tasks"].as_array()?;
            &tasks.iter().find(|task| task["name"] == name.as_str())?["scores"][of_task]
        }
    };
    value.as_f64().filter(|value| value.is_finite())
}

/// The failure inside an error, or one made of its causes.
pub(in super::super) fn as_failure(error: &anyhow::Error) -> Failure {
    error.downcast_ref::<Failure>().cloned().unwrap_or_else(|| Failure::new(FailureKind::Run, format!("{error:#}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_metric_is_what_the_sweep_names() {
        let evaluation = json!({
            "mean_accuracy": 0.5, "mean_macro_f1": 0.4,
            "tasks": [{"name": "mmlu", "scores": {"accuracy": 0.25, "macro_f1": 0.2}}],
        });
        let of = |task: Option<&str>, score| metric(&Metric { task: task.map(str::to_owned), score }, Some(&evaluation), Some(1.5));
        assert_eq!(of(None, Score::Accuracy), Some(0.5));
        assert_eq!(of(None, Score::MacroF1), Some(0.4));
        assert_eq!(of(Some("mmlu"), Score::Accuracy), Some(0.25));
        assert_eq!(of(Some("mmlu"), Score::MacroF1), Some(0.2));
        assert_eq!(of(Some("other"), Score::Accuracy), None);
        assert_eq!(of(None, Score::Loss), Some(1.5));
        let loss = Metric { task: None, score: Score::Loss };
        assert_eq!((metric(&loss, None, Some(f64::NAN)), metric(&loss, None, None)), (None, None));
    }
}
