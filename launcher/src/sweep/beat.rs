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

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Builder, sleep};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::claim::Worker;
use super::folder::StudyFolder;

/// After so many seconds without a sign what works on a controller's own machine counts as lost for one on another machine.
pub(super) const LOST_AFTER_S: u32 = 300;

/// Longest sign of life that is read, in bytes.
const MAX_SIGN_BYTES: u64 = 64;

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

/// Waits so long, or until the work is over.
pub(super) fn wait(time: Duration, is_over: &AtomicBool) {
    let until = Instant::now() + time;
    while Instant::now() < until && !is_over.load(Ordering::Relaxed) {
        sleep(Duration::from_millis(POLL_MS).min(time));
    }
}

/// Ends the session of this process.
pub(super) fn end(worker: &Worker) {
    if let Err(error) = worker.end() {
        // Without its list of processes a host can end this one only; its programs are found by the next visit. The log may lie on the
        // very disk that does not answer, so nothing is said of it.
        drop(error);
        std::process::abort();
    }
}

/// The signs of a batch, as a controller sees them that cannot ask its machine.
#[derive(Debug, Default)]
pub(super) struct Signs {
    /// The newest, and since when it is the same.
    newest: Option<(Vec<u8>, Duration)>,
}

impl Signs {
    /// How long the sign of a batch has not changed at this time of the controller's clock, as far as it has looked.
    pub(super) fn silent(&mut self, now: Duration, folder: &StudyFolder, batch: u32) -> Duration {
        let mut sign = Vec::new();
        let read = File::open(folder.beat_path(batch)).and_then(|file| file.take(MAX_SIGN_BYTES).read_to_end(&mut sign));
        match read {
            Ok(_) => self.note(now, Ok(sign)),
            Err(error) if error.kind() == ErrorKind::NotFound => self.note(now, Ok(Vec::new())),
            Err(error) => {
                tracing::debug!(%error, batch, "a sign of life cannot be read");
                self.note(now, Err(error))
            }
        }
    }

    fn note(&mut self, now: Duration, sign: io::Result<Vec<u8>>) -> Duration {
        // Whoever cannot read the disk cannot tell that nobody writes to it.
        let Ok(sign) = sign else {
            self.newest = None;
            return Duration::ZERO;
        };
        let newest = self.newest.get_or_insert_with(|| (sign.clone(), now));
        if newest.0 != sign {
            *newest = (sign, now);
        }
        now.saturating_sub(newest.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_is_as_old_as_this_controller_has_seen_it_unchanged() {
        let mut signs = Signs::default();
        let s = Duration::from_secs;
        let mut note =
            |now, sign: Option<&[u8]>| signs.note(s(now), sign.map(<[u8]>::to_vec).ok_or_else(|| io::Error::other("gone"))).as_secs();
        // (time, sign, how long it has not changed): what it was before the first look counts for nothing.
        let looks: [(u64, Option<&[u8]>, u64); 7] = [
            (1000, Some(b"1"), 0),
            (1200, Some(b"1"), 200),
            (1250, Some(b"2"), 0),
            (1549, Some(b"2"), 299),
            (1550, None, 0),
            (1551, Some(b"2"), 0),
            (1851, Some(b"2"), 300),
        ];
        for (now, sign, expected) in looks {
            assert_eq!(note(now, sign), expected, "at {now}");
        }
    }

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
