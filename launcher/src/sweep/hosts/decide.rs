//! What becomes of hosts and of the batches that were given to them, purely: facts and limits in, a decision and its reason out.

use std::fmt;
use std::time::Duration;

use super::super::visit::Word;

/// Interval at which the batches of a host are asked for, in seconds; it doubles while nothing changes. Ends are seen before that, since
/// outcomes lie in the study folder.
const LOOK_S: u64 = 2;

/// Longest such interval, in seconds.
const LOOK_MAX_S: u64 = 30;

/// Wait before a host is tried again that could not be visited, in seconds; it doubles.
const RETRY_S: u64 = 2;

/// Longest such wait, in seconds.
const RETRY_MAX_S: u64 = 60;

/// Longest time in which no host at all can be visited, in seconds, before the controller ends: 10 min, as long as for a batch system.
pub(super) const SILENCE_MAX_S: u64 = 600;

/// Longest time in which an outcome of which its host tells is not seen here, in seconds: as long as a file server's client may
/// believe in a list of files that it knows.
const OUTCOME_WAIT_S: u64 = 120;

/// A host, when a batch is to be given to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HostLoad {
    /// It has answered the newest visit, and nothing speaks against it.
    pub is_usable: bool,
    /// Batches that it has.
    pub load: u32,
}

/// The places of each of so many hosts: an even share of the trials that may run at the same time, rounded up.
pub fn places_of_host(concurrency: u32, num_hosts: usize) -> u32 {
    let num_hosts = u32::try_from(num_hosts).unwrap_or(u32::MAX).max(1);
    concurrency.div_ceil(num_hosts).max(1)
}

/// How many more batches may be given out. What is on hosts that are left out takes no room from the others.
pub(super) fn free_places(hosts: &[HostLoad], concurrency: u32) -> usize {
    let places = places_of_host(concurrency, hosts.len());
    let usable = || hosts.iter().filter(|host| host.is_usable);
    let free: u32 = usable().map(|host| places.saturating_sub(host.load)).sum();
    let taken: u32 = usable().map(|host| host.load).sum();
    free.min(concurrency.saturating_sub(taken)) as usize
}

/// The host that gets the next batch: the one with the fewest, the first of several; `None` where all are full or left out.
pub(super) fn next_host(hosts: &[HostLoad], concurrency: u32) -> Option<usize> {
    let places = places_of_host(concurrency, hosts.len());
    let open = hosts.iter().enumerate().filter(|(_, host)| host.is_usable && host.load < places);
    open.min_by_key(|(_, host)| host.load).map(|(index, _)| index)
}

/// What is known of a batch that is out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BatchFacts<'a> {
    /// Its host has answered the newest visit.
    pub is_reached: bool,
    /// What the host has said of it last; `None` before it has said anything.
    pub word: Option<&'a Word>,
    /// How long the host has said the same.
    pub unchanged: Duration,
    /// While its host cannot be visited: how long its sign of life has not changed.
    pub silent: Duration,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is waited for.
    Wait,
    /// It is taken back, which works as long as nobody has begun.
    Withdraw,
    /// Nobody works on it any more.
    Gone,
    /// It is given up, so that another host can have its trial.
    GiveUp,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FateReason {
    /// It is worked on, or will be.
    Works,
    /// Its host says that it was not begun, and can begin it.
    NotBegun,
    /// Its host says that it has ended.
    HasEnded,
    /// Its outcome is on its way.
    OutcomeComes,
    /// Its outcome should be here.
    OutcomeLost,
    /// Its host cannot be reached.
    HostAway,
    /// Its host cannot be reached, and what works there gives no sign of life for so long that it has ended itself.
    HostLost,
}

/// Decides about a batch.
pub(super) fn fate(facts: &BatchFacts<'_>, lost_after: Duration) -> (Fate, FateReason) {
    match facts.word {
        // Told by the host that had it: it stays so, whether the host is there or not.
        Some(Word::Gone(_) | Word::Failed(_)) => (Fate::Gone, FateReason::HasEnded),
        Some(Word::Ended) if facts.unchanged >= Duration::from_secs(OUTCOME_WAIT_S) => (Fate::Gone, FateReason::OutcomeLost),
        Some(Word::Ended) => (Fate::Wait, FateReason::OutcomeComes),
        Some(Word::Lives) if facts.is_reached => (Fate::Wait, FateReason::Works),
        Some(Word::Absent) | None if facts.is_reached => (Fate::Wait, FateReason::NotBegun),
        Some(Word::Absent) | None => (Fate::Withdraw, FateReason::HostAway),
        Some(Word::Lives) if facts.silent >= lost_after => (Fate::GiveUp, FateReason::HostLost),
        Some(Word::Lives) => (Fate::Wait, FateReason::HostAway),
    }
}

/// How long until a host is visited again: one that answers, after so many answers that brought nothing new; one that does not, after so
/// many visits in a row that failed.
pub(super) fn next_visit(failures: u32, unchanged: u32) -> Duration {
    let doubled = |first_s: u64, times: u32, most_s: u64| first_s.checked_shl(times).unwrap_or(most_s).clamp(first_s, most_s);
    let seconds = match failures {
        0 => doubled(LOOK_S, unchanged.min(u64::BITS / 2), LOOK_MAX_S),
        _ => doubled(RETRY_S, (failures - 1).min(u64::BITS / 2), RETRY_MAX_S),
    };
    Duration::from_secs(seconds)
}

/// Whether the controller ends, since no host has answered for so long.
pub(super) fn is_alone(num_answering: usize, silent: Duration) -> bool {
    num_answering == 0 && silent >= Duration::from_secs(SILENCE_MAX_S)
}

impl fmt::Display for FateReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Works => "it is worked on",
            Self::NotBegun => "it is about to begin",
            Self::HasEnded => "its process has ended",
            Self::OutcomeComes => "its outcome is on its way",
            Self::OutcomeLost => "its outcome is not seen here",
            Self::HostAway => "its host cannot be reached",
            Self::HostLost => "its host cannot be reached, and it gives no sign of life",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(text: &str) -> Vec<HostLoad> {
        let of = |word: &str| HostLoad { is_usable: !word.starts_with('!'), load: word.trim_start_matches('!').parse().unwrap() };
        text.split(' ').map(of).collect()
    }

    #[test]
    fn the_least_used_host_is_next_and_none_gets_more_than_its_share() {
        // (hosts with their loads, `!` for one that is left out; concurrency; free places; the next host)
        let cases = [
            ("0 0", 4, 4, Some(0)),
            ("1 0", 4, 3, Some(1)),
            ("1 1", 4, 2, Some(0)),
            ("2 1", 4, 1, Some(1)),
            ("2 2", 4, 0, None),
            // Three on two hosts: two places on each, and never more than three in all.
            ("1 1", 3, 1, Some(0)),
            ("2 1", 3, 0, Some(1)),
            ("0 0 0", 1, 1, Some(0)),
            ("0 1 0", 1, 0, Some(0)),
            // A host that is left out gives its share to nobody, and what is on it takes none of theirs.
            ("!2 0", 4, 2, Some(1)),
            ("!2 2", 4, 0, None),
            ("!0 !0", 4, 0, None),
        ];
        for (text, concurrency, free, next) in cases {
            let hosts = hosts(text);
            let found = (free_places(&hosts, concurrency), next_host(&hosts, concurrency));
            assert_eq!(found, (free, next), "{text} {concurrency}");
        }
        assert_eq!([places_of_host(4, 2), places_of_host(5, 2), places_of_host(1, 8), places_of_host(3, 0)], [2, 3, 1, 3]);
    }

    #[test]
    fn a_batch_is_given_to_another_host_only_when_nobody_works_on_it() {
        let (lives, ended, absent) = (Word::Lives, Word::Ended, Word::Absent);
        let (gone, failed) = (Word::Gone("x".to_owned()), Word::Failed("x".to_owned()));
        let s = Duration::from_secs;
        // (reached, word, seconds without a change, seconds without a sign)
        let cases = [
            (true, None, 0, 0, Fate::Wait, FateReason::NotBegun),
            (true, Some(&absent), 1000, 1000, Fate::Wait, FateReason::NotBegun),
            (false, None, 0, 0, Fate::Withdraw, FateReason::HostAway),
            (false, Some(&absent), 0, 0, Fate::Withdraw, FateReason::HostAway),
            // While the host says that it lives, no silence counts.
            (true, Some(&lives), 1000, 1000, Fate::Wait, FateReason::Works),
            (false, Some(&lives), 1000, 299, Fate::Wait, FateReason::HostAway),
            (false, Some(&lives), 0, 300, Fate::GiveUp, FateReason::HostLost),
            (true, Some(&gone), 0, 0, Fate::Gone, FateReason::HasEnded),
            (false, Some(&gone), 0, 0, Fate::Gone, FateReason::HasEnded),
            (true, Some(&failed), 0, 0, Fate::Gone, FateReason::HasEnded),
            (true, Some(&ended), 119, 0, Fate::Wait, FateReason::OutcomeComes),
            (false, Some(&ended), 120, 0, Fate::Gone, FateReason::OutcomeLost),
        ];
        for (is_reached, word, unchanged, silent, decision, reason) in cases {
            let facts = BatchFacts { is_reached, word, unchanged: s(unchanged), silent: s(silent) };
            assert_eq!(fate(&facts, s(300)), (decision, reason), "{facts:?}");
        }
    }

    #[test]
    fn hosts_are_visited_less_often_while_nothing_changes() {
        let cases =
            [(0, 0, 2), (0, 1, 4), (0, 3, 16), (0, 4, 30), (0, 1000, 30), (1, 0, 2), (2, 5, 4), (5, 0, 32), (6, 0, 60), (1000, 0, 60)];
        for (failures, unchanged, expected) in cases {
            assert_eq!(next_visit(failures, unchanged).as_secs(), expected, "{failures} {unchanged}");
        }
        let cases = [(0, 599, false), (0, 600, true), (1, 10_000, false)];
        for (num_answering, silent_s, expected) in cases {
            assert_eq!(is_alone(num_answering, Duration::from_secs(silent_s)), expected);
        }
    }
}
