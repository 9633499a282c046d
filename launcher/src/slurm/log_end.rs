//! Whether the logs of a run are at their end, for whoever follows them.

use cloze_recipes::failure::{Failure, FailureKind};

use super::journal::{self, AttemptEvent};
use super::paths::JobPaths;
use super::verdict::Decision;
use crate::run_folder::RunPaths;
use crate::view::{EventLog, RunState, controller_lives};

/// Looks for the end of a run.
pub(super) struct LogEnd {
    run: RunPaths,
    events: EventLog,
}

impl LogEnd {
    /// Of this run; nothing is read yet.
    pub fn of(run: &RunPaths) -> Self {
        Self { run: run.clone(), events: EventLog::of_run(run.root()) }
    }

    /// Whether nothing goes on with the run by itself: the last attempt of its jobs has decided so, or, without jobs, it has ended.
    pub fn is_reached(&mut self) -> anyhow::Result<bool> {
        let paths = JobPaths::of(&self.run);
        let attempts: Vec<AttemptEvent> = journal::read(&paths.attempts())?;
        if let Some(last) = attempts.last() {
            return Ok(is_last_word(last, paths.cancelled().exists()));
        }
        // The first job still waits.
        if paths.root().exists() || !self.run.events().exists() {
            return Ok(false);
        }
        self.events.read_new()?;
        let state = self.events.view().state;
        Ok(matches!(state, RunState::Finished | RunState::Stopped | RunState::Failed) && !self.has_controller()?)
    }

    fn has_controller(&self) -> Result<bool, Failure> {
        let what = "failed to look at the run folder's lock";
        controller_lives(self.run.root())
            .map_err(|error| Failure::new(FailureKind::Storage, what).at(self.run.root().display()).because(error))
    }
}

/// Whether no other attempt follows this event by itself.
fn is_last_word(event: &AttemptEvent, is_cancelled: bool) -> bool {
    match event {
        AttemptEvent::Started { .. } => false,
        AttemptEvent::Ended { decision, .. } => is_cancelled || matches!(decision, Decision::Finish | Decision::GiveUp { .. }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use cloze_cluster::{Event, Recorded};

    use super::*;

    #[test]
    fn an_attempt_that_another_one_follows_is_no_end() {
        let ended = |decision| AttemptEvent::Ended {
            time: 1.0,
            attempt: 1,
            job: "7".parse().unwrap(),
            decision,
            reason: String::new(),
            elapsed_s: 1,
            bad_nodes: Vec::new(),
            failure: None,
        };
        let cases = [
            (Decision::Finish, false, true),
            (Decision::GiveUp { code: 3 }, false, true),
            (Decision::Requeue, false, false),
            (Decision::Leave { code: 130 }, false, false),
            (Decision::Leave { code: 130 }, true, true),
            (Decision::Replace { exclude: Vec::new() }, false, false),
        ];
        for (decision, is_cancelled, expected) in cases {
            assert_eq!(is_last_word(&ended(decision.clone()), is_cancelled), expected, "{decision}");
        }
    }

    #[test]
    fn a_run_without_jobs_ends_by_its_events() {
        let folder = tempfile::tempdir().unwrap();
        let mut end = LogEnd::of(&RunPaths::new(folder.path().to_owned()));
        assert!(!end.is_reached().unwrap(), "nothing has happened yet");
        let write = |events: &[Event]| {
            let lines = events.iter().map(|event| serde_json::to_string(&Recorded { time: 1.0, event: event.clone() }).unwrap() + "\n");
            fs::write(folder.path().join("events.jsonl"), lines.collect::<String>()).unwrap();
        };
        let started = Event::RunStarted { name: "r".to_owned(), recipe_hash: "h".to_owned(), workers: 1, min_workers: None, steps: 3 };
        write(std::slice::from_ref(&started));
        assert!(!end.is_reached().unwrap());
        write(&[started, Event::RunFinished { step: 3, seconds: 1.0 }]);
        assert!(end.is_reached().unwrap());
        fs::create_dir(folder.path().join("slurm")).unwrap();
        assert!(!end.is_reached().unwrap(), "a job of it waits");
    }
}
