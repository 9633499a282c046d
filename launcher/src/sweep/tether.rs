//! What works on the machine of a controller lasts no longer than the lease of its study, where the study has one.
//!
//! Another host knows of such a trial only what the bucket says. So whoever works on it looks at the lease too: where nobody has renewed it
//! for a third of its time, since the controller is gone or the bucket out of reach, the trial saves and leaves; after two thirds all of it
//! is ended, and once another controller has the lease, at once. Until then nobody else can have begun with it.
//!
//! | thread   | on error                        | on stop            |
//! |----------|---------------------------------|--------------------|
//! | `lease`  | tries again                     | ends with its work |
//! | `tether` | has none; it reads a clock only | ends with its work |

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Builder, sleep};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloze_data::store::Store;

use super::beat::{end, wait};
use super::claim::Worker;
use super::lease::{Home, LEASE_S, Sight};
use super::time::unix_now_s;

/// Interval at which the lease is looked at: a controller renews it every 20 s.
const LOOK: Duration = Duration::from_secs(10);

/// Interval at which the clock and the end of the work are looked at.
const POLL: Duration = Duration::from_millis(200);

/// A trial saves and leaves after this part of the time of a lease, and is ended after twice that.
const LEAVE_PART: f64 = 3.0;

/// What becomes of a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// A controller has been heard of.
    Stays,
    /// It saves and leaves.
    Leaves,
    /// It is ended.
    Ends,
}

/// What becomes of a trial that has heard of no renewal for so long.
fn verdict(silent: Duration) -> Verdict {
    let leave_s = LEASE_S / LEAVE_PART;
    match silent.as_secs_f64() {
        silent_s if silent_s >= 2.0 * leave_s => Verdict::Ends,
        silent_s if silent_s >= leave_s => Verdict::Leaves,
        _ => Verdict::Stays,
    }
}

/// When a lease was renewed by this process's own clock, which shows `asked` at this Unix time. The controller has the same clock, being on
/// the same machine; one that was set back meanwhile makes no renewal newer than the look at it.
fn renewed_at(asked: Duration, unix_s: f64, renewed_unix_s: f64) -> Duration {
    asked.saturating_sub(Duration::from_secs_f64((unix_s - renewed_unix_s).max(0.0)))
}

/// Watches the lease until it is dropped.
pub(super) struct Tether {
    is_over: Arc<AtomicBool>,
}

impl Tether {
    /// Begins to watch; `None` where another controller has the study already, or its own has said nothing for too long. `leave` is called
    /// once where the work is to save and leave, and the session of this process is ended where that is too late.
    pub(super) fn begin(store: Store, home: Home, worker: &Worker, leave: impl FnOnce() + Send + 'static) -> anyhow::Result<Option<Self>> {
        let Sight::Ours(renewed) = Sight::look(&store, &home)? else { return Ok(None) };
        let age = Duration::from_secs_f64((unix_now_s() - renewed).max(0.0));
        if verdict(age) != Verdict::Stays {
            return Ok(None);
        }
        // A clock that is as old as the newest renewal, as far as this machine is.
        let began = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
        let tether = Self { is_over: Arc::new(AtomicBool::new(false)) };
        let newest_ms = Arc::new(AtomicU64::new(0));
        let (is_over, newest, worker_of_look) = (tether.is_over.clone(), newest_ms.clone(), worker.clone());
        let look = move || {
            let mut known = renewed;
            loop {
                wait(LOOK, &is_over);
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
                let (asked, asked_unix_s) = (began.elapsed(), unix_now_s());
                match Sight::look(&store, &home) {
                    Ok(Sight::Ours(renewed)) if renewed.to_bits() == known.to_bits() => {}
                    Ok(Sight::Ours(renewed)) => {
                        known = renewed;
                        newest.fetch_max(renewed_at(asked, asked_unix_s, renewed).as_millis() as u64, Ordering::Relaxed);
                    }
                    Ok(Sight::Theirs(holder)) => {
                        tracing::error!(holder, "another controller may have this trial; what works on it here is ended");
                        end(&worker_of_look);
                    }
                    // Whoever takes it is seen at one of the next looks.
                    Ok(Sight::Nobodys) => tracing::warn!("nobody has the lease of the study"),
                    Err(error) => tracing::warn!(error = format!("{error:#}"), "the lease of the study cannot be read"),
                }
            }
        };
        let (is_over, worker) = (tether.is_over.clone(), worker.clone());
        // A thread of its own: one that asks a bucket that does not answer stands still.
        let watch = move || {
            let mut leave = Some(leave);
            while !is_over.load(Ordering::Relaxed) {
                let silent = began.elapsed().saturating_sub(Duration::from_millis(newest_ms.load(Ordering::Relaxed)));
                match verdict(silent) {
                    Verdict::Stays => {}
                    Verdict::Leaves => leave.take().into_iter().for_each(|leave| leave()),
                    Verdict::Ends => end(&worker),
                }
                sleep(POLL);
            }
        };
        Builder::new().name("lease".to_owned()).spawn(look).context("start a thread")?;
        Builder::new().name("tether".to_owned()).spawn(watch).context("start a thread")?;
        Ok(Some(tether))
    }
}

impl Drop for Tether {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_has_ended_long_before_its_lease_is_over() {
        let cases = [
            (0, Verdict::Stays),
            (99, Verdict::Stays),
            (100, Verdict::Leaves),
            (199, Verdict::Leaves),
            (200, Verdict::Ends),
            (900, Verdict::Ends),
        ];
        for (silent_s, expected) in cases {
            assert_eq!(verdict(Duration::from_secs(silent_s)), expected, "{silent_s} s");
        }
    }

    #[test]
    fn a_renewal_is_as_old_as_its_controller_says() {
        let s = Duration::from_secs;
        // Its writing took long, so that it is old when it is seen.
        assert_eq!(renewed_at(s(100), 1000.0, 960.0), s(60));
        // By a clock that was set back it is from the future; before the watch began it is as old as the watch.
        assert_eq!(renewed_at(s(100), 1000.0, 1500.0), s(100));
        assert_eq!(renewed_at(s(100), 1000.0, 100.0), s(0));
    }
}
