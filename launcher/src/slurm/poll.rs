//! How often the batch system is asked.

use std::thread::sleep;
use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};

/// While nothing changes, the interval doubles until it is this many times as long.
const LONGEST_FACTOR: u32 = 16;

/// Times that a question is asked whose answer a job cannot do without.
const MAX_TRIES: u32 = 5;

/// Wait before the second of them, in seconds; it doubles, so all waits are 2 + 4 + 8 + 16 = 30 s.
const FIRST_RETRY_S: u64 = 2;

/// Asks again where the batch system gives no answer. For questions that change nothing.
pub(super) fn patiently<T>(mut ask: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let mut wait_s = FIRST_RETRY_S;
    for _ in 1..MAX_TRIES {
        match ask() {
            Err(error) if error.downcast_ref::<Failure>().is_some_and(|failure| failure.kind == FailureKind::Environment) => {
                tracing::warn!(error = format!("{error:#}"), wait_s, "the batch system is asked again");
                sleep(Duration::from_secs(wait_s));
                wait_s *= 2;
            }
            result => return result,
        }
    }
    ask()
}

/// Wait before the states of jobs are asked for again, after this many answers in a row that brought nothing new.
pub fn next_poll(unchanged_polls: u32, poll_s: u32) -> Duration {
    let factor = 1_u32.checked_shl(unchanged_polls).filter(|&factor| factor != 0).unwrap_or(LONGEST_FACTOR).min(LONGEST_FACTOR);
    Duration::from_secs(u64::from(poll_s) * u64::from(factor))
}

/// Longest time in which the batch system answers nothing, in seconds, before a program that polls it gives up: 10 min. Its controller is
/// back within seconds of a restart, and within minutes where another machine takes over.
pub const SILENCE_MAX_S: u64 = 600;

/// Longest wait between two questions that get no answer, in seconds.
const SILENCE_RETRY_MAX_S: u64 = 60;

/// What whoever polls does after a question without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// Asks again after this time.
    AskAgain(Duration),
    /// Gives up.
    GiveUp,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SilenceReason {
    /// It may pass.
    MayPass,
    /// It has lasted too long.
    TooLong,
}

/// Decides after so many questions in a row without an answer, the first of which was asked so long ago.
pub fn after_silence(unanswered: u32, silent: Duration) -> (Silence, SilenceReason) {
    if silent >= Duration::from_secs(SILENCE_MAX_S) {
        return (Silence::GiveUp, SilenceReason::TooLong);
    }
    let doublings = unanswered.saturating_sub(1).min(SILENCE_RETRY_MAX_S.ilog2());
    let wait_s = (FIRST_RETRY_S << doublings).min(SILENCE_RETRY_MAX_S);
    (Silence::AskAgain(Duration::from_secs(wait_s)), SilenceReason::MayPass)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_batch_system_is_asked_again_within_a_bound() {
        let again = |seconds| (Silence::AskAgain(Duration::from_secs(seconds)), SilenceReason::MayPass);
        let cases = [
            (1, 0, again(2)),
            (2, 2, again(4)),
            (5, 30, again(32)),
            (6, 62, again(60)),
            (u32::MAX, 599, again(60)),
            (1, 600, (Silence::GiveUp, SilenceReason::TooLong)),
            (14, 640, (Silence::GiveUp, SilenceReason::TooLong)),
        ];
        for (unanswered, silent_s, expected) in cases {
            assert_eq!(after_silence(unanswered, Duration::from_secs(silent_s)), expected, "{unanswered}, {silent_s} s");
        }
    }

    #[test]
    fn the_interval_doubles_up_to_a_limit() {
        let cases = [(0, 2, 2), (1, 2, 4), (3, 2, 16), (4, 2, 32), (5, 2, 32), (31, 2, 32), (32, 2, 32), (u32::MAX, 3, 48)];
        for (unchanged, poll_s, seconds) in cases {
            assert_eq!(next_poll(unchanged, poll_s), Duration::from_secs(seconds), "{unchanged}");
        }
    }
}
