//! What follows after an attempt of a run in a job. Pure: what happened goes in, decision and reason come out.

use std::fmt;

use cloze_recipes::failure::FailureKind;
use serde::{Deserialize, Serialize};

use super::job::State;

/// Time by which a batch system may warn too early or end a job too late, in seconds: it looks at limits every 30 s and promises 60.
const LIMIT_SLACK_S: u64 = 90;

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttemptEnd {
    /// The run is finished.
    Finished,
    /// The workers saved and left, on request.
    Stopped,
    /// The run, or the way to it, failed.
    Failed(FailureKind),
}

/// A signal that the attempt has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Warning {
    /// SIGUSR2: the batch system warns of the time limit, or somebody wants the run elsewhere.
    Early,
    /// SIGTERM: the batch system ends the job.
    Terminate,
    /// The steps of the job were ended and the job was not: it has to make room.
    Preempted,
    /// SIGINT or SIGHUP.
    Interrupt,
}

/// What is known at the end of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Circumstances {
    /// How it ended.
    pub end: AttemptEnd,
    /// The most urgent signal that it has seen.
    pub warning: Option<Warning>,
    /// How long the job has run, in seconds.
    pub elapsed_s: u64,
    /// Its time limit, in seconds.
    pub limit_s: Option<u64>,
    /// How long before the limit it is warned, in seconds.
    pub warning_s: u64,
    /// What the batch system says of the job; `None` where it does not answer.
    pub state: Option<State>,
    /// Whether the batch system says that the job has to make room.
    pub is_preempted: bool,
    /// Whether `cloze cancel` was called.
    pub is_cancelled: bool,
    /// Attempts of the run, this one included.
    pub attempts: u32,
    /// Most attempts.
    pub max_jobs: u32,
    /// Nodes that are to blame.
    pub bad_nodes: Vec<String>,
    /// Nodes of the job.
    pub num_nodes: usize,
}

/// What follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// The run is done; the successor is not needed.
    Finish,
    /// The same job goes back into the queue.
    Requeue,
    /// Another job takes its place, away from these nodes.
    Replace {
        /// Nodes that the new job must not use.
        exclude: Vec<String>,
    },
    /// Nothing goes on by itself; the successor is cancelled.
    GiveUp {
        /// Exit code.
        code: u8,
    },
    /// The job ends badly, on which its successor waits; or the batch system puts it back by itself.
    Leave {
        /// Exit code.
        code: u8,
    },
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The run is finished.
    Finished,
    /// `cloze cancel` was called.
    Cancelled,
    /// A failure that another attempt would meet again.
    Permanent(FailureKind),
    /// A node is to blame.
    BadNode,
    /// No attempt is left.
    NoAttemptLeft(u32),
    /// The batch system is ending the job.
    BeingEnded,
    /// The batch system is ending the job, and has put it back or does so by itself.
    PutBack,
    /// Somebody stopped the run, not the batch system.
    StoppedByUser,
    /// The time limit is near.
    TimeLimit,
    /// The time limit is over.
    PastTimeLimit,
    /// Asked for by SIGUSR2 long before the time limit.
    AskedFor,
    /// The job has to make room.
    Preempted,
    /// The store may be back later.
    Storage,
    /// The batch system does not say how the job is.
    StateUnknown,
}

/// Decides what follows.
pub fn decide(now: &Circumstances) -> (Decision, Reason) {
    let interrupted = FailureKind::Interrupted.exit_code();
    if now.end == AttemptEnd::Finished {
        return (Decision::Finish, Reason::Finished);
    }
    if now.is_cancelled {
        return (Decision::GiveUp { code: interrupted }, Reason::Cancelled);
    }
    if let AttemptEnd::Failed(kind) = now.end {
        if are_to_blame(kind, &now.bad_nodes, now.num_nodes) {
            return again(now, Decision::Replace { exclude: now.bad_nodes.clone() }, Reason::BadNode);
        }
        match (kind, now.warning) {
            (FailureKind::Storage, None) => return again(now, Decision::Requeue, Reason::Storage),
            // Processes that the batch system ends fail in many ways; that it ends them is what counts.
            (FailureKind::Run | FailureKind::Storage | FailureKind::Interrupted, Some(_)) => {}
            _ => return (Decision::GiveUp { code: kind.exit_code() }, Reason::Permanent(kind)),
        }
    }
    stopped(now)
}

/// Whether a failure of this kind is that of these nodes of so many, so that another attempt does better without them. Where all of several seem bad, something is wrong that others would
/// have too.
pub fn are_to_blame(kind: FailureKind, bad_nodes: &[String], num_nodes: usize) -> bool {
    let is_of_nodes = matches!(kind, FailureKind::Environment | FailureKind::Run);
    is_of_nodes && !bad_nodes.is_empty() && (bad_nodes.len() < num_nodes || num_nodes == 1)
}

/// After an end that something outside the run has brought.
fn stopped(now: &Circumstances) -> (Decision, Reason) {
    let interrupted = FailureKind::Interrupted.exit_code();
    let leave = Decision::Leave { code: interrupted };
    let nears_limit = now.limit_s.is_some_and(|limit_s| now.elapsed_s + now.warning_s + LIMIT_SLACK_S >= limit_s);
    let is_past_limit = now.limit_s.is_some_and(|limit_s| now.elapsed_s >= limit_s);
    match (now.state, now.warning) {
        (_, None | Some(Warning::Interrupt)) if now.state.is_none_or(|state| state == State::Running) && !now.is_preempted => {
            (Decision::GiveUp { code: interrupted }, Reason::StoppedByUser)
        }
        (Some(State::Requeued | State::Pending | State::Configuring | State::NodeFail), _) => (leave, Reason::PutBack),
        (Some(State::Running | State::Suspended), Some(Warning::Early)) => {
            again(now, Decision::Requeue, if nears_limit { Reason::TimeLimit } else { Reason::AskedFor })
        }
        // Whoever comes this late has seen no warning, or had no time left after it.
        (_, Some(Warning::Terminate)) if is_past_limit => (leave, Reason::PastTimeLimit),
        (Some(State::Running | State::Suspended), _) => again(now, Decision::Requeue, Reason::Preempted),
        (None | Some(State::Other), Some(_)) => (leave, Reason::StateUnknown),
        _ => (leave, Reason::BeingEnded),
    }
}

/// Another attempt, if one is left.
fn again(now: &Circumstances, decision: Decision, reason: Reason) -> (Decision, Reason) {
    if now.attempts < now.max_jobs {
        return (decision, reason);
    }
    let code = match now.end {
        AttemptEnd::Failed(kind) => kind.exit_code(),
        AttemptEnd::Stopped | AttemptEnd::Finished => FailureKind::Run.exit_code(),
    };
    (Decision::GiveUp { code }, Reason::NoAttemptLeft(now.max_jobs))
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finish => f.write_str("done"),
            Self::Requeue => f.write_str("the job goes back into the queue"),
            Self::Replace { exclude } if exclude.is_empty() => f.write_str("another job takes its place"),
            Self::Replace { exclude } => write!(f, "another job takes its place, without {}", exclude.join(", ")),
            Self::GiveUp { code } => write!(f, "the run does not go on by itself; exit code {code}"),
            Self::Leave { code } => write!(f, "left to SLURM and to the job that waits for this one to fail; exit code {code}"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished => f.write_str("the run is finished"),
            Self::Cancelled => f.write_str("`cloze cancel` was called"),
            Self::Permanent(kind) => write!(f, "another attempt would fail in the same way (exit code {})", kind.exit_code()),
            Self::BadNode => f.write_str("a node is to blame"),
            Self::NoAttemptLeft(max_jobs) => write!(f, "all {max_jobs} attempts are used up (`slurm.max_jobs`)"),
            Self::BeingEnded => f.write_str("SLURM is ending the job"),
            Self::PutBack => f.write_str("SLURM puts the job back by itself"),
            Self::StoppedByUser => f.write_str("the run was stopped, and not by SLURM"),
            Self::TimeLimit => f.write_str("the time limit is near"),
            Self::PastTimeLimit => f.write_str("the time limit is over"),
            Self::AskedFor => f.write_str("SIGUSR2, long before the time limit"),
            Self::Preempted => f.write_str("the job has to make room for another one"),
            Self::Storage => f.write_str("the store may be back later"),
            Self::StateUnknown => f.write_str("SLURM does not say how the job is"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An hour's job after ten minutes, in which the workers have just saved and left.
    fn now() -> Circumstances {
        Circumstances {
            end: AttemptEnd::Stopped,
            warning: None,
            elapsed_s: 600,
            limit_s: Some(3600),
            warning_s: 120,
            state: Some(State::Running),
            is_preempted: false,
            is_cancelled: false,
            attempts: 3,
            max_jobs: 20,
            bad_nodes: Vec::new(),
            num_nodes: 2,
        }
    }

    fn failed(kind: FailureKind) -> Circumstances {
        Circumstances { end: AttemptEnd::Failed(kind), ..now() }
    }

    fn warned(warning: Warning) -> Circumstances {
        Circumstances { warning: Some(warning), ..now() }
    }

    #[test]
    fn what_ends_a_run() {
        let cases = [
            (Circumstances { end: AttemptEnd::Finished, is_cancelled: true, ..now() }, Decision::Finish, Reason::Finished),
            (Circumstances { is_cancelled: true, ..warned(Warning::Terminate) }, Decision::GiveUp { code: 130 }, Reason::Cancelled),
            (now(), Decision::GiveUp { code: 130 }, Reason::StoppedByUser),
            (warned(Warning::Interrupt), Decision::GiveUp { code: 130 }, Reason::StoppedByUser),
            (failed(FailureKind::Recipe), Decision::GiveUp { code: 3 }, Reason::Permanent(FailureKind::Recipe)),
            (failed(FailureKind::Run), Decision::GiveUp { code: 9 }, Reason::Permanent(FailureKind::Run)),
            (
                Circumstances { warning: Some(Warning::Early), ..failed(FailureKind::Mismatch) },
                Decision::GiveUp { code: 8 },
                Reason::Permanent(FailureKind::Mismatch),
            ),
            (
                Circumstances { bad_nodes: vec!["n3".to_owned(), "n4".to_owned()], ..failed(FailureKind::Environment) },
                Decision::GiveUp { code: 5 },
                Reason::Permanent(FailureKind::Environment),
            ),
            (Circumstances { attempts: 20, ..warned(Warning::Early) }, Decision::GiveUp { code: 9 }, Reason::NoAttemptLeft(20)),
            (Circumstances { attempts: 20, ..failed(FailureKind::Storage) }, Decision::GiveUp { code: 6 }, Reason::NoAttemptLeft(20)),
        ];
        for (now, decision, reason) in cases {
            assert_eq!(decide(&now), (decision, reason), "{now:?}");
        }
    }

    #[test]
    fn what_lets_a_run_go_on() {
        let bad = |kind| Circumstances { bad_nodes: vec!["n3".to_owned()], ..failed(kind) };
        let replace = Decision::Replace { exclude: vec!["n3".to_owned()] };
        let leave = Decision::Leave { code: 130 };
        let cases = [
            (Circumstances { elapsed_s: 3470, ..warned(Warning::Early) }, Decision::Requeue, Reason::TimeLimit),
            // The warning may come a minute early, and the save takes its time.
            (Circumstances { elapsed_s: 3400, ..warned(Warning::Early) }, Decision::Requeue, Reason::TimeLimit),
            (warned(Warning::Early), Decision::Requeue, Reason::AskedFor),
            (Circumstances { limit_s: None, ..warned(Warning::Early) }, Decision::Requeue, Reason::AskedFor),
            (warned(Warning::Terminate), Decision::Requeue, Reason::Preempted),
            (Circumstances { is_preempted: true, ..warned(Warning::Preempted) }, Decision::Requeue, Reason::Preempted),
            (Circumstances { warning: Some(Warning::Preempted), ..failed(FailureKind::Run) }, Decision::Requeue, Reason::Preempted),
            (Circumstances { elapsed_s: 3601, ..warned(Warning::Terminate) }, leave.clone(), Reason::PastTimeLimit),
            (Circumstances { state: Some(State::Completing), ..warned(Warning::Terminate) }, leave.clone(), Reason::BeingEnded),
            (Circumstances { state: Some(State::Cancelled), ..warned(Warning::Terminate) }, leave.clone(), Reason::BeingEnded),
            (Circumstances { state: Some(State::Requeued), ..warned(Warning::Terminate) }, leave.clone(), Reason::PutBack),
            (Circumstances { state: None, ..warned(Warning::Terminate) }, leave, Reason::StateUnknown),
            (bad(FailureKind::Run), replace.clone(), Reason::BadNode),
            (bad(FailureKind::Environment), replace.clone(), Reason::BadNode),
            (Circumstances { num_nodes: 1, ..bad(FailureKind::Environment) }, replace, Reason::BadNode),
            (bad(FailureKind::Recipe), Decision::GiveUp { code: 3 }, Reason::Permanent(FailureKind::Recipe)),
            (failed(FailureKind::Storage), Decision::Requeue, Reason::Storage),
        ];
        for (now, decision, reason) in cases {
            assert_eq!(decide(&now), (decision, reason), "{now:?}");
        }
    }
}
