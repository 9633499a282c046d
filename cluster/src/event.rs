//! Everything that happens in a run, as one closed list. Terminal, JSONL and `TensorBoard` read the same events.

use cloze_recipes::failure::Failure;
use serde::{Deserialize, Serialize};

use crate::protocol::{FailureClass, StepReport};

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The controller starts or resumes a run.
    RunStarted {
        /// Name of the run.
        name: String,
        /// Hash of its recipe.
        recipe_hash: String,
        /// Number of worker slots.
        workers: u32,
        /// Fewest workers with which the run goes on; `None` where all slots must be filled.
        min_workers: Option<u32>,
        /// Steps of the whole run.
        steps: u64,
    },
    /// How a resumed run is operated has changed: what was set anew in its recipe.
    RecipeChanged {
        /// Each as `key=value`.
        changes: Vec<String>,
    },
    /// The dashboard can be opened.
    DashboardListening {
        /// Its address.
        url: String,
    },
    /// This coordinator takes over from one that ended without a word.
    CoordinatorRestarted {
        /// The newest generation.
        generation: u64,
        /// Whether that generation goes on.
        adopted: bool,
    },
    /// A worker process exists.
    WorkerStarted {
        /// Its slot.
        worker: u32,
        /// Its process id.
        process_id: u32,
    },
    /// A worker has joined the coordinator.
    WorkerJoined {
        /// Its slot.
        worker: u32,
        /// Its host.
        host: String,
        /// Its process id there.
        #[serde(default)]
        process_id: u32,
        /// It is the same process as before and had only lost its connection.
        rejoined: bool,
    },
    /// The members of a generation were told to start.
    GenerationStarted {
        /// Number of the generation, from 1.
        generation: u64,
        /// Number of its ranks.
        world_size: u32,
        /// Slots of its members, by rank.
        workers: Vec<u32>,
        /// Why now.
        reason: String,
    },
    /// The generation has its state and trains from it.
    Restored {
        /// Number of the generation.
        generation: u64,
        /// Steps done at the restored state; 0 from scratch.
        step: u64,
        /// `scratch`, the checkpoint's URL, `memory` when every member already had the state, or `memory of worker N`.
        source: String,
        /// Newer checkpoints that were passed over, each with its reason.
        skipped: Vec<String>,
        /// Seconds that it took.
        seconds: f64,
    },
    /// One optimizer step.
    Step {
        /// Number of the generation.
        generation: u64,
        /// Its numbers; they stand beside `generation` in the JSON.
        #[serde(flatten)]
        report: StepReport,
    },
    /// Training goes on, and the steps since the last report have no report of their own (`train.log_every_steps`).
    Progress {
        /// Number of the generation.
        generation: u64,
        /// Steps done.
        step: u64,
    },
    /// A checkpoint is complete and visible.
    CheckpointSaved {
        /// Steps done at the checkpoint.
        step: u64,
        /// Where it is.
        url: String,
        /// Bytes of all its files.
        bytes: u64,
        /// Seconds that the save took.
        seconds: f64,
        /// Seconds of these in which training stood still.
        blocked_s: f64,
    },
    /// A worker has lost its seat.
    WorkerLost {
        /// Its slot.
        worker: u32,
        /// Its rank in the running generation; `None` while no generation runs, or where it is no member.
        rank: Option<u32>,
        /// Its host.
        host: String,
        /// What kind of failure it is.
        class: FailureClass,
        /// How it was noticed.
        reason: String,
    },
    /// The threads of a worker that is stuck were written down before it is killed.
    StackDumped {
        /// Its slot.
        worker: u32,
        /// Its process id.
        process_id: u32,
        /// The file.
        path: String,
    },
    /// A worker process has ended.
    WorkerExited {
        /// Its slot.
        worker: u32,
        /// Its process id.
        process_id: u32,
        /// Exit code or signal.
        status: String,
        /// The end of its log.
        tail: String,
    },
    /// The generation cannot go on.
    GenerationAborted {
        /// Number of the generation.
        generation: u64,
        /// Why.
        reason: String,
        /// Last step that the leader is known to have done.
        step: u64,
        /// Slot of the one worker that is to blame, where that is known.
        #[serde(default)]
        worker: Option<u32>,
        /// Its rank.
        #[serde(default)]
        rank: Option<u32>,
    },
    /// The members have left a generation at a step that they agreed on, so that the next one can have other members.
    GenerationRegrouped {
        /// Number of the generation.
        generation: u64,
        /// Why.
        reason: String,
        /// Steps done.
        step: u64,
    },
    /// Training goes on after a generation was aborted.
    Recovered {
        /// The generation that goes on.
        generation: u64,
        /// The generation that failed.
        failed_generation: u64,
        /// What kind of failure it was.
        class: FailureClass,
        /// Seconds from the abort to the first step done.
        seconds: f64,
        /// Steps that have to be done again.
        steps_lost: u64,
        /// Where the state came from, as in `restored`.
        source: String,
    },
    /// A host whose workers failed too often is used no more.
    HostExcluded {
        /// Its name.
        host: String,
        /// Failures of its workers.
        failures: u32,
    },
    /// A worker process takes the place of one that ended.
    WorkerRestarted {
        /// Its slot.
        worker: u32,
        /// Restarts of this slot so far, from 1.
        attempt: u32,
        /// Restarts that the run has left.
        budget_left: u32,
    },
    /// A worker is done and leaves as it should.
    WorkerFinished {
        /// Its slot.
        worker: u32,
        /// Steps done.
        step: u64,
    },
    /// Something that a user should know and that does not end the run.
    Warning {
        /// One sentence, lowercase.
        message: String,
    },
    /// All steps are done and saved.
    RunFinished {
        /// Steps done.
        step: u64,
        /// Seconds since this controller started.
        seconds: f64,
    },
    /// The run was asked to stop and its state is saved.
    RunStopped {
        /// Steps done at the last saved state.
        step: u64,
    },
    /// The run failed.
    RunFailed {
        /// Why.
        failure: Failure,
    },
}

/// An event with the time at which it was recorded; one line of `events.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    /// Unix time, in seconds.
    pub time: f64,
    /// What happened; its fields stand beside `time` in the JSON.
    #[serde(flatten)]
    pub event: Event,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Unreported;
    use cloze_recipes::failure::FailureKind;

    fn step(loss: f64) -> Event {
        Event::Step {
            generation: 2,
            report: StepReport {
                step: 51,
                loss,
                learning_rate: 1e-3,
                gradient_norm: 1.0,
                examples: 8,
                tokens: 100,
                labels: 8,
                seconds: 0.5,
                examples_per_s: 16.0,
                tokens_per_s: 200.0,
                before: Unreported::default(),
            },
        }
    }

    fn lost(rank: Option<u32>) -> Event {
        let (host, reason) = ("node".to_owned(), "connection closed".to_owned());
        Event::WorkerLost { worker: 1, rank, host, class: FailureClass::ConnectionClosed, reason }
    }

    /// A report that stands for steps before it.
    fn reported_after(steps: u64) -> StepReport {
        let Event::Step { report, .. } = step(0.1) else { panic!("a step") };
        StepReport { before: Unreported { steps, tokens: 100 * steps, seconds: 0.5 * steps as f64 }, ..report }
    }

    #[test]
    fn a_line_of_an_earlier_version_is_read() {
        let line = "{\"time\":1.0,\"event\":\"generation_aborted\",\"generation\":1,\"reason\":\"x\",\"step\":7}";
        let aborted = Event::GenerationAborted { generation: 1, reason: "x".to_owned(), step: 7, worker: None, rank: None };
        assert_eq!(serde_json::from_str::<Recorded>(line).unwrap().event, aborted);
    }

    #[test]
    fn a_line_is_flat() {
        let line = serde_json::to_string(&Recorded { time: 12.5, event: step(0.1) }).unwrap();
        assert_eq!(
            line,
            "{\"time\":12.5,\"event\":\"step\",\"generation\":2,\"step\":51,\"loss\":0.1,\"learning_rate\":0.001,\"gradient_norm\":1.0,\
             \"examples\":8,\"tokens\":100,\"labels\":8,\"seconds\":0.5,\"examples_per_s\":16.0,\"tokens_per_s\":200.0}"
        );
    }

    #[test]
    fn lines_can_be_read_back_exactly() {
        let events = [
            step(0.1 + 0.2),
            Event::Step { generation: 2, report: reported_after(9) },
            lost(Some(1)),
            lost(None),
            Event::Recovered {
                generation: 3,
                failed_generation: 2,
                class: FailureClass::Hung,
                seconds: 0.75,
                steps_lost: 0,
                source: "memory of worker 0".to_owned(),
            },
            Event::CoordinatorRestarted { generation: 3, adopted: true },
            Event::RunFailed { failure: Failure::new(FailureKind::Run, "restart budget spent").hint("look at the log") },
            Event::Restored { generation: 1, step: 0, source: "scratch".to_owned(), skipped: Vec::new(), seconds: 0.5 },
            Event::Warning { message: "disk is slow".to_owned() },
        ];
        for event in events {
            let recorded = Recorded { time: 1_700_000_000.125, event };
            let line = serde_json::to_string(&recorded).unwrap();
            assert_eq!(serde_json::from_str::<Recorded>(&line).unwrap(), recorded, "{line}");
        }
    }
}
