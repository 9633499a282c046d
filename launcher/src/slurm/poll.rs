//! How often the batch system is asked.

use std::time::Duration;

/// While nothing changes, the interval doubles until it is this many times as long.
const LONGEST_FACTOR: u32 = 16;

/// Wait before the states of jobs are asked for again, after this many answers in a row that brought nothing new.
pub fn next_poll(unchanged_polls: u32, poll_s: u32) -> Duration {
    let factor = 1_u32.checked_shl(unchanged_polls).filter(|&factor| factor != 0).unwrap_or(LONGEST_FACTOR).min(LONGEST_FACTOR);
    Duration::from_secs(u64::from(poll_s) * u64::from(factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_doubles_up_to_a_limit() {
        let cases = [(0, 2, 2), (1, 2, 4), (3, 2, 16), (4, 2, 32), (5, 2, 32), (31, 2, 32), (32, 2, 32), (u32::MAX, 3, 48)];
        for (unchanged, poll_s, seconds) in cases {
            assert_eq!(next_poll(unchanged, poll_s), Duration::from_secs(seconds), "{unchanged}");
        }
    }
}
