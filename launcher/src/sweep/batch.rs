//! What passes between the controller and the processes that work on trials: batches one way, outcomes the other.

use cloze_recipes::failure::{Failure, FailureKind};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::folder::{StudyFolder, read_json};

/// One attempt at one trial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assignment {
    /// Hash of the trial.
    pub trial: String,
    /// Number of the attempt, from 1.
    pub attempt: u32,
    /// Step at which the trial pauses; `None` trains to the end.
    pub until_step: Option<u64>,
}

/// Trials that are handed out together. Each element gets an allocation of its own and runs its trials at the same time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// Its number, from 1.
    pub number: u32,
    /// Its elements.
    pub elements: Vec<Vec<Assignment>>,
}

impl Batch {
    /// Reads a batch. Fails with kind `Input` where there is none.
    pub fn read(folder: &StudyFolder, number: u32) -> Result<Self, Failure> {
        let path = folder.batch_path(number);
        let missing = || Failure::new(FailureKind::Input, "there is no such batch").at(path.display());
        read_json(&path)?.ok_or_else(missing)
    }

    /// The trials of one element. Fails with kind `Input` where there is none.
    pub fn element(&self, element: u32) -> Result<&[Assignment], Failure> {
        self.elements.get(element as usize).map(Vec::as_slice).ok_or_else(|| {
            Failure::new(FailureKind::Input, "there is no such element in the batch")
                .expected(format!("a number below {}", self.elements.len()))
                .found(element)
        })
    }
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The trial is trained, and what its recipe asks for afterwards is there.
    Done,
    /// It is saved at the step at which it was to pause.
    Paused,
    /// It failed before all its steps were done.
    FailedInTraining,
    /// It failed after all its steps were done.
    FailedAfterTraining,
}

/// One file of `jobs/outcomes/`: how an attempt ended, by the process that made it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// Hash of the trial.
    pub trial: String,
    /// Number of the attempt.
    pub attempt: u32,
    /// How it ended.
    pub end: End,
    /// Steps done of the newest saved state.
    pub step: u64,
    /// The sweep's metric at that step.
    pub metric: Option<f64>,
    /// What `eval.json` of the run says.
    pub evaluation: Option<Value>,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// Nodes that another attempt does better without.
    #[serde(default)]
    pub bad_nodes: Vec<String>,
    /// Host of the process.
    pub host: String,
    /// Unix time of the end by that host's clock, in seconds.
    pub finished: f64,
}

impl Outcome {
    /// Reads the outcome of an attempt; `None` where there is none yet. Fails with kind `Damaged` where it is of another attempt.
    pub fn read(folder: &StudyFolder, trial: &str, attempt: u32) -> Result<Option<Self>, Failure> {
        let path = folder.outcome_path(trial, attempt);
        let Some(outcome) = read_json::<Self>(&path)? else { return Ok(None) };
        if outcome.trial == trial && outcome.attempt == attempt {
            return Ok(Some(outcome));
        }
        Err(Failure::new(FailureKind::Damaged, "the outcome of an attempt is of another one")
            .at(path.display())
            .expected(format!("attempt {attempt} at {trial}"))
            .found(format!("attempt {} at {}", outcome.attempt, outcome.trial)))
    }

    /// Writes it, whole.
    pub fn write(&self, folder: &StudyFolder) -> anyhow::Result<()> {
        StudyFolder::write_json(&folder.outcome_path(&self.trial, self.attempt), self)
    }
}
