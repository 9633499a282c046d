//! The sign of life of what works on a host: a file of the study folder that changes while the disk can be reached from there.
//!
//! A host that nobody reaches may still train, and a controller must not give its trials away while it does. So what works there ends
//! itself once it could not write its sign for a third of the time after which a controller counts it as lost, and also when it finds that
//! its batch was given up.
//!
//! | thread  | on error                        | on stop            |
//! |---------|---------------------------------|--------------------|
//! | `beat`  | tries again                     | ends with its work |
//! | `fence` | has none; it reads a clock only | ends with its work |

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Builder, sleep};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::claim::Worker;
use super::folder::StudyFolder;

/// Longest interval between two signs, in seconds.
const BEAT_MAX_S: u64 = 10;

/// Signs that fit into the time without one that a process survives.
const BEATS_OF_FENCE: u64 = 5;

/// The process ends itself within this part of the time after which it counts as lost.
const FENCE_PART: u64 = 3;

/// Interval at which the clock and the end of the work are looked at, in milliseconds.
const POLL_MS: u64 = 200;

/// When what works on a host gives a sign, and when it ends itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BeatTimes {
    /// Interval of the signs.
    pub beat: Duration,
    /// Longest time without one.
    pub fence: Duration,
}

impl BeatTimes {
    /// Those of a site that counts a silent host as lost after so many seconds.
    pub(super) fn of(lost_after_s: u32) -> Self {
        let fence_s = u64::from(lost_after_s) / FENCE_PART;
        let beat = Duration::from_secs(BEAT_MAX_S).min(Duration::from_secs(fence_s) / BEATS_OF_FENCE as u32);
        Self { beat, fence: Duration::from_secs(fence_s) }
    }
}

/// Gives signs until it is dropped.
pub(super) struct Beat {
    is_over: Arc<AtomicBool>,
}

impl Beat {
    /// Begins to give signs of a batch. Once there was none for too long, or the batch is given up, the session of this process is ended;
    /// `leave` is called once where the batch is to save and leave.
    pub(super) fn begin(
        folder: &StudyFolder,
        batch: u32,
        worker: &Worker,
        times: BeatTimes,
        leave: impl FnOnce() + Send + 'static,
    ) -> anyhow::Result<Self> {
        let beat = Self { is_over: Arc::new(AtomicBool::new(false)) };
        let began = Instant::now();
        let newest_ms = Arc::new(AtomicU64::new(0));
        let (is_over, newest, worker_of_beat) = (beat.is_over.clone(), newest_ms.clone(), worker.clone());
        let (path, mark, wish) = (folder.beat_path(batch), folder.given_up_path(batch), folder.leave_path(batch));
        let give = move || {
            let mut leave = Some(leave);
            let mut number = 0_u64;
            while !is_over.load(Ordering::Relaxed) {
                number += 1;
                if mark.exists() {
                    tracing::error!(batch, "a controller has given the batch up; what works on it here is ended");
                    end(&worker_of_beat);
                }
                if wish.exists()
                    && let Some(leave) = leave.take()
                {
                    leave();
                }
                // The time before: what takes long has not been seen by anybody earlier.
                let asked_ms = began.elapsed().as_millis() as u64;
                match sign(&path, number) {
                    Ok(()) => newest.store(asked_ms, Ordering::Relaxed),
                    Err(error) => tracing::warn!(%error, "the sign of life cannot be written"),
                }
                wait(times.beat, &is_over);
            }
        };
        let (is_over, worker) = (beat.is_over.clone(), worker.clone());
        // A thread of its own: one that writes to a disk that does not answer stands still.
        let watch = move || {
            while !is_over.load(Ordering::Relaxed) {
                let newest = Duration::from_millis(newest_ms.load(Ordering::Relaxed));
                if is_cut_off(began.elapsed(), newest, times.fence) {
                    end(&worker);
                }
                sleep(Duration::from_millis(POLL_MS));
            }
        };
        Builder::new().name("beat".to_owned()).spawn(give).context("start a thread")?;
        Builder::new().name("fence".to_owned()).spawn(watch).context("start a thread")?;
        Ok(beat)
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// Whether the disk could not be written for too long.
fn is_cut_off(now: Duration, newest: Duration, fence: Duration) -> bool {
    now.saturating_sub(newest) >= fence
}

/// Writes the sign over the one before: in place, since a full disk is not one that cannot be reached, and through to the file server.
fn sign(path: &Path, number: u64) -> std::io::Result<()> {
    let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    file.write_all(format!("{number:020}\n").as_bytes())?;
    file.sync_data()
}

fn wait(time: Duration, is_over: &AtomicBool) {
    let until = Instant::now() + time;
    while Instant::now() < until && !is_over.load(Ordering::Relaxed) {
        sleep(Duration::from_millis(POLL_MS).min(time));
    }
}

fn end(worker: &Worker) {
    if let Err(error) = worker.end() {
        // Without its list of processes a host can end this one only; its programs are found by the next visit. The log may lie on the
        // very disk that does not answer, so nothing is said of it.
        drop(error);
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_ends_long_before_it_counts_as_lost() {
        for (lost_after_s, beat_ms, fence_s) in [(15, 1000, 5), (300, 10_000, 100), (86_400, 10_000, 28_800)] {
            let times = BeatTimes::of(lost_after_s);
            assert_eq!((times.beat.as_millis(), times.fence.as_secs()), (beat_ms, fence_s), "{lost_after_s}");
        }
    }

    #[test]
    fn only_the_time_since_the_newest_sign_counts() {
        let s = Duration::from_secs;
        for (now, newest, expected) in [(4, 0, false), (5, 0, true), (100, 96, false), (100, 95, true), (3, 7, false)] {
            assert_eq!(is_cut_off(s(now), s(newest), s(5)), expected, "{now} {newest}");
        }
    }

    #[test]
    fn a_sign_changes_while_the_work_lasts() {
        let root = tempfile::tempdir().unwrap();
        let folder = StudyFolder::new(root.path().to_owned());
        folder.make().unwrap();
        let worker = Worker::this_process("n1").unwrap();
        let times = BeatTimes { beat: Duration::from_millis(10), fence: Duration::from_mins(10) };
        let read = || std::fs::read_to_string(folder.beat_path(3)).unwrap_or_default();
        let is_told = Arc::new(AtomicBool::new(false));
        let told = is_told.clone();
        let beat = Beat::begin(&folder, 3, &worker, times, move || told.store(true, Ordering::Relaxed)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !read().ends_with("3\n") {
            assert!(Instant::now() < deadline, "{}", read());
            sleep(Duration::from_millis(5));
        }
        assert!(!is_told.load(Ordering::Relaxed));
        std::fs::write(folder.leave_path(3), "").unwrap();
        while !is_told.load(Ordering::Relaxed) {
            assert!(Instant::now() < deadline, "nobody was told to leave");
            sleep(Duration::from_millis(5));
        }
        drop(beat);
        sleep(Duration::from_millis(4 * POLL_MS));
        let last = read();
        sleep(Duration::from_millis(50));
        assert_eq!(read(), last);
    }
}
