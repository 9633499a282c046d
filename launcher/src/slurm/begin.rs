//! Whether a job that starts may begin with its run. Pure: what is known of its predecessor and of the run goes in.

use std::fmt;

use super::job::State;
use super::verdict::Decision;

/// What is known when a job starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The job that this one waited for to fail.
    pub predecessor: Predecessor,
    /// What that job decided at its end, if it came to that.
    pub last_decision: Option<Decision>,
    /// Whether a job was submitted that takes that job's place.
    pub is_replaced: bool,
    /// Whether `cloze cancel` was called.
    pub is_cancelled: bool,
    /// Attempts since somebody asked for the run, without this one.
    pub attempts: u32,
    /// Most attempts.
    pub max_jobs: u32,
}

/// The job that another one waited for to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predecessor {
    /// There is none.
    None,
    /// Nobody knows it any more, or how it ended.
    Forgotten,
    /// It is in this state.
    Known(State),
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Go on with the run.
    Go,
    /// End at once, with 0: there is nothing to do.
    Nothing,
    /// End at once, with the code of a failed run.
    GiveUp,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BeginReason {
    /// Nothing speaks against it.
    Free,
    /// `cloze cancel` was called.
    Cancelled,
    /// Somebody cancelled the job before.
    PredecessorCancelled,
    /// The job before runs or waits again.
    PredecessorLives,
    /// The job before ended well.
    PredecessorDone,
    /// The job before has decided that nothing goes on by itself, or that another job takes its place.
    PredecessorDecided,
    /// No attempt is left.
    NoAttemptLeft,
}

/// Decides whether a job begins with its run.
pub fn decide_begin(arrival: &Arrival) -> (Begin, BeginReason) {
    if arrival.is_cancelled {
        return (Begin::Nothing, BeginReason::Cancelled);
    }
    if arrival.predecessor != Predecessor::None {
        match arrival.predecessor {
            Predecessor::Known(State::Cancelled) => return (Begin::Nothing, BeginReason::PredecessorCancelled),
            Predecessor::Known(State::Completed) => return (Begin::Nothing, BeginReason::PredecessorDone),
            Predecessor::Known(state) if !state.is_end() => return (Begin::Nothing, BeginReason::PredecessorLives),
            _ => {}
        }
        let is_decided = match arrival.last_decision {
            Some(Decision::Finish | Decision::GiveUp { .. }) => true,
            // The decision is written down before the other job is submitted, which may have failed.
            Some(Decision::Replace { .. }) => arrival.is_replaced,
            Some(Decision::Requeue | Decision::Leave { .. }) | None => false,
        };
        if is_decided {
            return (Begin::Nothing, BeginReason::PredecessorDecided);
        }
    }
    if arrival.attempts >= arrival.max_jobs {
        return (Begin::GiveUp, BeginReason::NoAttemptLeft);
    }
    (Begin::Go, BeginReason::Free)
}

impl fmt::Display for BeginReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Free => "nothing speaks against it",
            Self::Cancelled => "`cloze cancel` was called; `cloze resume` submits the run again",
            Self::PredecessorCancelled => "the job before was cancelled; `cloze resume` submits the run again",
            Self::PredecessorLives => "the job before runs or waits again",
            Self::PredecessorDone => "the job before ended well",
            Self::PredecessorDecided => "the job before has decided that this one is not needed",
            Self::NoAttemptLeft => "all attempts are used up (`slurm.max_jobs`); `cloze resume` submits the run again",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_begin() {
        let free = Arrival {
            predecessor: Predecessor::None,
            last_decision: None,
            is_replaced: false,
            is_cancelled: false,
            attempts: 0,
            max_jobs: 3,
        };
        let after = |state| Arrival { predecessor: Predecessor::Known(state), ..free.clone() };
        let decided = |decision| Arrival { last_decision: Some(decision), ..after(State::Failed) };
        let cases = [
            (free.clone(), Begin::Go, BeginReason::Free),
            (Arrival { is_cancelled: true, ..free.clone() }, Begin::Nothing, BeginReason::Cancelled),
            (Arrival { attempts: 3, ..free.clone() }, Begin::GiveUp, BeginReason::NoAttemptLeft),
            (after(State::Cancelled), Begin::Nothing, BeginReason::PredecessorCancelled),
            (after(State::Completed), Begin::Nothing, BeginReason::PredecessorDone),
            (after(State::Pending), Begin::Nothing, BeginReason::PredecessorLives),
            (after(State::Running), Begin::Nothing, BeginReason::PredecessorLives),
            (after(State::Timeout), Begin::Go, BeginReason::Free),
            (after(State::NodeFail), Begin::Go, BeginReason::Free),
            (after(State::Preempted), Begin::Go, BeginReason::Free),
            (Arrival { predecessor: Predecessor::Forgotten, ..free.clone() }, Begin::Go, BeginReason::Free),
            (decided(Decision::GiveUp { code: 3 }), Begin::Nothing, BeginReason::PredecessorDecided),
            (decided(Decision::Replace { exclude: Vec::new() }), Begin::Go, BeginReason::Free),
            (
                Arrival { is_replaced: true, ..decided(Decision::Replace { exclude: Vec::new() }) },
                Begin::Nothing,
                BeginReason::PredecessorDecided,
            ),
            (decided(Decision::Leave { code: 130 }), Begin::Go, BeginReason::Free),
            // It was put back and then failed to start.
            (decided(Decision::Requeue), Begin::Go, BeginReason::Free),
        ];
        for (arrival, begin, reason) in cases {
            assert_eq!(decide_begin(&arrival), (begin, reason), "{arrival:?}");
        }
    }
}
