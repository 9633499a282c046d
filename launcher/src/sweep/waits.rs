//! Waits of an attempt for other processes, each with a bound.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};

use super::lock::{FileLock, Taken};
use super::steps::{StopLevel, interrupted};
use crate::view::controller_lives;

/// Interval at which locks and a run's controller are looked at, in milliseconds.
const POLL_MS: u64 = 100;

/// Longest wait for another process that works on the same trial, in seconds. One whose node is gone may hold its lock for as long as
/// the file server believes in it.
pub(super) const TRIAL_LOCK_WAIT_S: u64 = 180;

/// Longest wait for another trial that prepares the same data, in seconds: 6 h. It is the slowest thing that is waited for, since a first
/// pass reads all sources; after it the attempt has failed, and is tried again.
pub(super) const DATA_LOCK_WAIT_S: u64 = 21_600;

/// Longest time in which the controller of an earlier attempt still has the run and tells no event, in seconds: 1 h. While it does, its
/// steps count, so it is waited for; its own limits on silent workers (`cluster.hang`) are shorter.
const CONTROLLER_SILENCE_S: u64 = 3600;

/// What whoever waits for another process does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    /// Waits on: the other one works, and time is left.
    Wait,
    /// Leaves: somebody asked for that.
    Leave,
    /// Gives up: the time is over.
    GiveUp,
}

/// Decides about a wait that has lasted so long, or has brought no news for so long.
fn patience(waited: Duration, limit_s: u64, is_asked_to_stop: bool) -> Patience {
    if is_asked_to_stop {
        Patience::Leave
    } else if waited >= Duration::from_secs(limit_s) {
        Patience::GiveUp
    } else {
        Patience::Wait
    }
}

/// Takes a lock, once whoever else has it lets go of it. `what` is what that one does, for the failure at the end of the wait.
pub(super) fn wait_for_lock(path: &Path, what: &str, limit_s: u64, stop: &StopLevel) -> anyhow::Result<FileLock> {
    let started = Instant::now();
    loop {
        let holder = match FileLock::take(path)? {
            Taken::Ours(lock) => return Ok(lock),
            Taken::Held(holder) => holder,
        };
        match patience(started.elapsed(), limit_s, stop.is_asked()) {
            Patience::Wait => sleep(Duration::from_millis(POLL_MS)),
            Patience::Leave => return Err(interrupted().into()),
            Patience::GiveUp => {
                return Err(Failure::new(FailureKind::Run, format!("another process {what}"))
                    .at(path.display())
                    .expected(format!("its end within {limit_s} s"))
                    .found(holder)
                    .hint("look whether it still works; where it hangs, end it")
                    .into());
            }
        }
    }
}

/// Waits until the controller that an earlier attempt has left behind lets go of the run.
pub(super) fn wait_for_controller(run: &Path, stop: &StopLevel) -> anyhow::Result<()> {
    wait_for_controller_within(run, CONTROLLER_SILENCE_S, stop)
}

fn wait_for_controller_within(run: &Path, silence_s: u64, stop: &StopLevel) -> anyhow::Result<()> {
    let mut told = told_bytes(run);
    let mut last_news = Instant::now();
    while controller_lives(run).with_context(|| format!("look at the lock of {}", run.display()))? {
        let now_told = told_bytes(run);
        if now_told != told {
            (told, last_news) = (now_told, Instant::now());
        }
        match patience(last_news.elapsed(), silence_s, stop.is_asked()) {
            Patience::Wait => sleep(Duration::from_millis(POLL_MS)),
            Patience::Leave => return Err(interrupted().into()),
            Patience::GiveUp => {
                return Err(Failure::new(FailureKind::Run, "a controller of an earlier attempt has the run and tells nothing")
                    .at(run.display())
                    .expected(format!("an event, or its end, within {silence_s} s"))
                    .found(format!("{} bytes of events.jsonl, as before", told.unwrap_or(0)))
                    .hint("control.json in the run folder has its process id; where it hangs, end it")
                    .into());
            }
        }
    }
    Ok(())
}

/// How much the events of a run are, in bytes; they only grow.
fn told_bytes(run: &Path) -> Option<u64> {
    fs::metadata(run.join("events.jsonl")).ok().map(|found| found.len())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::thread;

    use super::*;

    fn failure(result: anyhow::Result<()>) -> Failure {
        result.unwrap_err().downcast().unwrap()
    }

    #[test]
    fn a_wait_ends_by_a_wish_or_by_its_bound() {
        let cases = [
            (0, 10, false, Patience::Wait),
            (9, 10, false, Patience::Wait),
            (10, 10, false, Patience::GiveUp),
            (u64::MAX, 10, true, Patience::Leave),
            (0, 0, false, Patience::GiveUp),
        ];
        for (waited_s, limit_s, is_asked, expected) in cases {
            assert_eq!(patience(Duration::from_secs(waited_s), limit_s, is_asked), expected, "{waited_s} of {limit_s}");
        }
    }

    #[test]
    fn a_lock_is_waited_for_so_long_and_its_holder_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.lock");
        let Taken::Ours(held) = FileLock::take(&path).unwrap() else { panic!("nobody has it") };
        let take = |limit_s, stop: &StopLevel| wait_for_lock(&path, "prepares the same data", limit_s, stop).map(drop);
        let late = failure(take(0, &StopLevel::default()));
        assert_eq!((late.kind, late.what.as_str()), (FailureKind::Run, "another process prepares the same data"));
        assert_eq!(late.expected.as_deref(), Some("its end within 0 s"));
        assert!(late.found.unwrap().contains(&format!("process {}", std::process::id())));
        let asked = StopLevel::default();
        asked.ask();
        assert_eq!(failure(take(100, &asked)).kind, FailureKind::Interrupted);
        drop(held);
        take(0, &StopLevel::default()).unwrap();
    }

    #[test]
    fn a_controller_is_waited_for_while_it_has_news() {
        let folder = tempfile::tempdir().unwrap();
        let (run, stop) = (folder.path(), StopLevel::default());
        wait_for_controller(run, &stop).unwrap();
        let lock = File::create(run.join("lock")).unwrap();
        lock.lock().unwrap();
        let silent = failure(wait_for_controller_within(run, 0, &stop));
        assert_eq!(silent.what, "a controller of an earlier attempt has the run and tells nothing");
        // Its events come more often than its silence may last, so twice that time is no reason to give up.
        let talking = thread::scope(|scope| {
            let waiting = scope.spawn(|| wait_for_controller_within(run, 2, &stop));
            for event in 1..=20 {
                fs::write(run.join("events.jsonl"), "x".repeat(event)).unwrap();
                sleep(Duration::from_millis(200));
            }
            drop(lock);
            waiting.join().unwrap()
        });
        talking.unwrap();
    }
}
