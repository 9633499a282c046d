//! What is known of one trial: a record of the study folder, which only the controller writes.

use cloze_recipes::failure::{Failure, FailureKind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::folder::PlannedTrial;

/// Longest record that is read, in bytes; an evaluation with its confusion matrices has some ten thousand.
pub const MAX_RECORD_BYTES: u64 = 16 << 20;

/// How far a trial is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrialState {
    /// It is to be started, or started again.
    #[default]
    Waiting,
    /// It was handed to a machine or a queue.
    Training,
    /// All its steps are done, and it is not scored yet.
    Trained,
    /// It is trained and, where its recipe says so, scored and exported.
    Done,
    /// It fell behind, its state is saved, and it goes on only if it is among the best of its rung after all.
    StoppedEarly,
    /// It failed, and is not tried again unless somebody asks.
    Failed,
}

impl TrialState {
    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Training => "training",
            Self::Trained => "trained",
            Self::Done => "done",
            Self::StoppedEarly => "stopped_early",
            Self::Failed => "failed",
        }
    }
}

/// A rung that a trial has reached, and how good it was there.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rung {
    /// Steps done.
    pub step: u64,
    /// The sweep's metric there; `None` counts as the worst.
    pub metric: Option<f64>,
}

/// Where a trial was handed to: a batch of `jobs/`, and its element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Number of the batch, from 1.
    pub batch: u32,
    /// Element of the batch, from 0.
    pub element: u32,
}

/// One file of `trials/`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrialRecord {
    /// Hash of everything that the trial computes from.
    pub hash: String,
    /// Name of its run.
    pub name: String,
    /// Values of the swept keys, without the seed.
    pub parameters: Map<String, Value>,
    /// Its seed.
    pub seed: u64,
    /// Hash of what its data is prepared from.
    pub data_hash: String,
    /// Hash of the earlier stage.
    pub parent: Option<String>,
    /// Its run folder, below the study folder.
    pub run: String,
    /// Whether the sweep asks for it; otherwise it is only the earlier stage of one that is asked for.
    pub wanted: bool,
    /// How far it is.
    pub state: TrialState,
    /// Steps done of its newest saved state that is known.
    pub step: u64,
    /// How often it was handed to a machine or a queue.
    pub attempts: u32,
    /// Failed attempts in a row that brought no new step.
    pub fruitless_attempts: u32,
    /// Unix time before which it is not tried again, in seconds.
    pub retry_at: Option<f64>,
    /// Where it was handed to last.
    pub place: Option<Place>,
    /// Rungs that it has reached, in order.
    pub rungs: Vec<Rung>,
    /// Why its last attempt failed.
    pub failure: Option<Failure>,
    /// The sweep's metric.
    pub metric: Option<f64>,
    /// What `eval.json` of its run says, so that a controller on another machine has it too.
    pub evaluation: Option<Value>,
    /// Unix time of the last change, in seconds.
    pub updated: f64,
}

impl TrialRecord {
    /// The record of a trial that nobody has started.
    pub fn new(trial: &PlannedTrial, parent: Option<&str>) -> Self {
        Self {
            hash: trial.hash.clone(),
            name: trial.name.clone(),
            parameters: trial.parameters.clone(),
            seed: trial.seed,
            data_hash: trial.data_hash.clone(),
            parent: parent.map(str::to_owned),
            run: format!("runs/{}", trial.name),
            wanted: trial.wanted,
            state: TrialState::Waiting,
            step: 0,
            attempts: 0,
            fruitless_attempts: 0,
            retry_at: None,
            place: None,
            rungs: Vec::new(),
            failure: None,
            metric: None,
            evaluation: None,
            updated: 0.0,
        }
    }

    /// Reads a record. Fails with kind `Damaged` where it is not whole or of another trial than its name says.
    pub fn parse(bytes: &[u8], hash: &str, place: &str) -> Result<Self, Failure> {
        let damaged = |what: &str| {
            Failure::new(FailureKind::Damaged, what)
                .at(place)
                .hint("remove the file; the trial then begins anew with what its run folder holds, and loses its count of attempts")
        };
        let record: Self = serde_json::from_slice(bytes).map_err(|error| damaged("the record of a trial cannot be read").because(error))?;
        if record.hash == hash {
            Ok(record)
        } else {
            Err(damaged("the record of a trial is of another one").expected(hash).found(&record.hash))
        }
    }

    /// Forgets its failures, so that it is tried again.
    pub fn reset(&mut self) {
        (self.state, self.fruitless_attempts, self.retry_at, self.failure) = (TrialState::Waiting, 0, None, None);
    }
}
