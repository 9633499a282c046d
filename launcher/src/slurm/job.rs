//! Jobs and what becomes of them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A job, or one element of an array of jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct JobId {
    /// Number of the job, or of the whole array.
    pub job: u64,
    /// The element of an array.
    pub element: Option<u32>,
}

impl JobId {
    /// A job that is no array, or an array as a whole.
    pub fn whole(job: u64) -> Self {
        Self { job, element: None }
    }

    /// One element of this array.
    #[must_use]
    pub fn element(self, element: u32) -> Self {
        Self { element: Some(element), ..self }
    }
}

impl fmt::Display for JobId {
    /// `12`, or `12_3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.element {
            None => write!(f, "{}", self.job),
            Some(element) => write!(f, "{}_{element}", self.job),
        }
    }
}

impl FromStr for JobId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` names no job");
        let (job, element) = match text.split_once('_') {
            None => (text, None),
            Some((job, element)) => (job, Some(element.parse().map_err(|_| wrong())?)),
        };
        Ok(Self { job: job.parse().map_err(|_| wrong())?, element })
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for JobId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// How a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Waits for machines, for another job, or for its turn in an array.
    Pending,
    /// Has its machines, which are made ready.
    Configuring,
    /// Runs.
    Running,
    /// Stands still.
    Suspended,
    /// Its processes are being ended. Whether it is then over or waits again is not known yet.
    Completing,
    /// Was put back and waits again, or is held.
    Requeued,
    /// Ended with 0.
    Completed,
    /// Ended with another code.
    Failed,
    /// Somebody cancelled it, or its dependency cannot be satisfied any more.
    Cancelled,
    /// Reached its time limit.
    Timeout,
    /// Had to make room for another job.
    Preempted,
    /// A node of it failed.
    NodeFail,
    /// Used more memory than it had asked for.
    OutOfMemory,
    /// A word that this program does not know.
    Other,
}

impl State {
    /// From the long or short name in any program's output; `CANCELLED by 0` and `RUNNING+` are understood.
    pub fn from_name(name: &str) -> Self {
        let word = name.split([' ', '+', '\u{0}']).next().unwrap_or_default();
        match word {
            "PENDING" | "PD" => Self::Pending,
            "CONFIGURING" | "CF" | "POWER_UP_NODE" => Self::Configuring,
            "RUNNING" | "R" | "SIGNALING" | "SI" | "STAGE_OUT" | "SO" | "RESIZING" | "RS" | "UPDATE_DB" => Self::Running,
            "SUSPENDED" | "S" | "STOPPED" | "ST" => Self::Suspended,
            "COMPLETING" | "CG" => Self::Completing,
            "REQUEUED" | "RQ" | "REQUEUE_FED" | "RF" | "REQUEUE_HOLD" | "RH" | "SPECIAL_EXIT" | "SE" | "RESV_DEL_HOLD" | "RD" => {
                Self::Requeued
            }
            "COMPLETED" | "CD" => Self::Completed,
            "FAILED" | "F" | "LAUNCH_FAILED" | "RECONFIG_FAIL" => Self::Failed,
            "CANCELLED" | "CA" | "REVOKED" | "RV" => Self::Cancelled,
            "TIMEOUT" | "TO" | "DEADLINE" | "DL" => Self::Timeout,
            "PREEMPTED" | "PR" => Self::Preempted,
            "NODE_FAIL" | "NF" | "BOOT_FAIL" | "BF" => Self::NodeFail,
            "OUT_OF_MEMORY" | "OOM" => Self::OutOfMemory,
            _ => Self::Other,
        }
    }

    /// Whether the job is over. One in an unknown state is not.
    pub fn is_end(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Failed | Self::Cancelled | Self::Timeout | Self::Preempted | Self::NodeFail | Self::OutOfMemory
        )
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pending => "pending",
            Self::Configuring => "configuring",
            Self::Running => "running",
            Self::Suspended => "suspended",
            Self::Completing => "completing",
            Self::Requeued => "requeued",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Timeout => "time limit",
            Self::Preempted => "preempted",
            Self::NodeFail => "node failure",
            Self::OutOfMemory => "out of memory",
            Self::Other => "unknown",
        })
    }
}

/// How a job ended: the exit code of its script and the signal that ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// Exit code.
    pub code: u32,
    /// Signal; 0 is none.
    pub signal: u32,
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.signal {
            0 => write!(f, "exit code {}", self.code),
            signal => write!(f, "signal {signal}"),
        }
    }
}

/// What is known of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobState {
    /// How it is.
    pub state: State,
    /// How it ended, once it has and somebody knows.
    pub exit: Option<ExitStatus>,
    /// How long it has run since its last start, in seconds.
    pub elapsed_s: Option<u64>,
    /// Its nodes, as in `n[1-2]`; empty while it waits.
    pub nodes: String,
    /// Why it waits or ended, in the batch system's word.
    pub reason: Option<String>,
    /// How often it was put back, where that is known.
    pub requeues: Option<u32>,
    /// User id of whoever cancelled it, where that is known.
    pub cancelled_by: Option<u32>,
    /// Its time limit, in seconds; `None` where there is none or it was not asked for.
    pub limit_s: Option<u64>,
    /// Whether it is being preempted and has not ended yet.
    pub is_preempted: bool,
}

impl JobState {
    /// A job of which only this is known.
    pub fn new(state: State) -> Self {
        Self {
            state,
            exit: None,
            elapsed_s: None,
            nodes: String::new(),
            reason: None,
            requeues: None,
            cancelled_by: None,
            limit_s: None,
            is_preempted: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_have_one_spelling() {
        for (text, id) in [("12", JobId::whole(12)), ("12_3", JobId::whole(12).element(3))] {
            assert_eq!(text.parse::<JobId>().unwrap(), id);
            assert_eq!(id.to_string(), text);
            assert_eq!(serde_json::from_str::<JobId>(&serde_json::to_string(&id).unwrap()).unwrap(), id);
        }
        for text in ["", "x", "12_", "12_[1-3]", "-1", "12;cluster", "12.batch"] {
            assert!(text.parse::<JobId>().is_err(), "{text}");
        }
    }

    #[test]
    fn states_of_several_versions() {
        let cases = [
            ("CANCELLED by 1000", State::Cancelled, true),
            ("CANCELLED+", State::Cancelled, true),
            ("PD", State::Pending, false),
            ("COMPLETING", State::Completing, false),
            ("REQUEUE_HOLD", State::Requeued, false),
            ("DEADLINE", State::Timeout, true),
            ("OUT_OF_ME+", State::Other, false),
            ("BOOT_FAIL", State::NodeFail, true),
            ("SOMETHING_NEW", State::Other, false),
        ];
        for (name, state, is_end) in cases {
            assert_eq!((State::from_name(name), State::from_name(name).is_end()), (state, is_end), "{name}");
        }
    }
}
