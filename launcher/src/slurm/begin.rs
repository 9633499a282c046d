//! Whether a job that starts may begin with its run. Pure: what is known of its predecessor and of the run goes in.

use std::fmt;

use super::job::State;
use super::verdict::Decision;

/// What is known when a job starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The job that this one waited for to fail: its state, where anybody knows it. `None` for a job that did not wait.
    pub predecessor: Option<Option<State>>,
    /// What that job decided at its end, if it came to that.
    pub last_decision: Option<Decision>,
    /// Whether `cloze cancel` was called.
    pub is_cancelled: bool,
    /// Attempts since somebody asked for the run, without this one.
    pub attempts: u32,
    /// Most attempts.
    pub max_jobs: u32,
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
    if let Some(predecessor) = arrival.predecessor {
        match predecessor {
            Some(State::Cancelled) => return (Begin::Nothing, BeginReason::PredecessorCancelled),
            Some(State::Completed) => return (Begin::Nothing, BeginReason::PredecessorDone),
            Some(state) if !state.is_end() => return (Begin::Nothing, BeginReason::PredecessorLives),
            _ => {}
        }
        if matches!(arrival.last_decision, Some(Decision::Finish | Decision::GiveUp { .. } | Decision::Replace { .. })) {
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
        let free = Arrival { predecessor: None, last_decision: None, is_cancelled: false, attempts: 0, max_jobs: 3 };
        let after = |state| Arrival { predecessor: Some(state), ..free.clone() };
        let decided = |decision| Arrival { last_decision: Some(decision), ..after(Some(State::Failed)) };
        let cases = [
            (free.clone(), Begin::Go, BeginReason::Free),
            (Arrival { is_cancelled: true, ..free.clone() }, Begin::Nothing, BeginReason::Cancelled),
            (Arrival { attempts: 3, ..free.clone() }, Begin::GiveUp, BeginReason::NoAttemptLeft),
            (after(Some(State::Cancelled)), Begin::Nothing, BeginReason::PredecessorCancelled),
            (after(Some(State::Completed)), Begin::Nothing, BeginReason::PredecessorDone),
            (after(Some(State::Pending)), Begin::Nothing, BeginReason::PredecessorLives),
            (after(Some(State::Running)), Begin::Nothing, BeginReason::PredecessorLives),
            (after(Some(State::Timeout)), Begin::Go, BeginReason::Free),
            (after(Some(State::NodeFail)), Begin::Go, BeginReason::Free),
            (after(Some(State::Preempted)), Begin::Go, BeginReason::Free),
            (after(None), Begin::Go, BeginReason::Free),
            (decided(Decision::GiveUp { code: 3 }), Begin::Nothing, BeginReason::PredecessorDecided),
            (decided(Decision::Replace { exclude: Vec::new() }), Begin::Nothing, BeginReason::PredecessorDecided),
            (decided(Decision::Leave { code: 130 }), Begin::Go, BeginReason::Free),
            // It was put back and then failed to start.
            (decided(Decision::Requeue), Begin::Go, BeginReason::Free),
        ];
        for (arrival, begin, reason) in cases {
            assert_eq!(decide_begin(&arrival), (begin, reason), "{arrival:?}");
        }
    }
}
