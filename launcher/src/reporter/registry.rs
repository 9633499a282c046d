//! The run's record in the bucket of its checkpoints: told at the start, with checkpoints, and at the end, by a thread of its own, since
//! a slow bucket must not hold up the run.
//!
//! | thread         | on error                                   | on stop                                             |
//! |----------------|--------------------------------------------|-----------------------------------------------------|
//! | `run-registry` | warns; the next telling tries again         | ends when the value is dropped, waited for a while  |

use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cloze_cluster::{Event, Recorded};

use crate::registry::{RecordPlace, publish};

/// Shortest time between two tellings of a run that goes on, in seconds. A run that saves every few seconds need not tell each time.
const INTERVAL_S: f64 = 60.0;

/// Longest wait for the last telling, when the run is over. A job that is warned of its end has more to do, and little time.
const LAST_WAIT: Duration = Duration::from_secs(5);

/// Interval at which its end is looked for.
const POLL: Duration = Duration::from_millis(20);

/// Tells a bucket how the run is.
pub(super) struct Registry {
    orders: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
    last_told: Option<f64>,
}

impl Registry {
    /// A teller for a run folder; `None` where the run has no bucket. A recipe that cannot be read has been refused before.
    pub(super) fn of_run(folder: &Path) -> anyhow::Result<Option<Self>> {
        let recipe = cloze_recipes::read_rendered(&folder.join("recipe.yaml"))?;
        let Some(place) = RecordPlace::of_recipe(&recipe) else { return Ok(None) };
        // One order waits at most: whoever takes it reads what is newest then.
        let (orders, inbox) = sync_channel(1);
        let folder = folder.to_path_buf();
        let thread = thread::Builder::new().name("run-registry".to_owned()).spawn(move || tell(&folder, &place, &inbox))?;
        Ok(Some(Self { orders: Some(orders), thread: Some(thread), last_told: None }))
    }

    /// Takes note of an event that is in the run folder already.
    pub(super) fn apply(&mut self, recorded: &Recorded) {
        if is_due(self.last_told, recorded) {
            self.last_told = Some(recorded.time);
            // A full queue has an order in it that will see this event too; a thread that is gone has said why.
            let _ = self.orders.as_ref().map(|orders| orders.try_send(()));
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.orders = None;
        let Some(thread) = self.thread.take() else { return };
        let deadline = Instant::now() + LAST_WAIT;
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                tracing::warn!(wait_s = LAST_WAIT.as_secs(), "the bucket has not taken how the run ended; its listing stays behind");
                return;
            }
            sleep(POLL);
        }
        if thread.join().is_err() {
            tracing::warn!("the thread that tells the bucket of the run has failed");
        }
    }
}

/// Whether the bucket is to be told of the run, last told at this time.
fn is_due(last_told: Option<f64>, recorded: &Recorded) -> bool {
    match recorded.event {
        Event::RunStarted { .. } | Event::RunFinished { .. } | Event::RunStopped { .. } | Event::RunFailed { .. } => true,
        Event::CheckpointSaved { .. } => last_told.is_none_or(|last| recorded.time - last >= INTERVAL_S),
        _ => false,
    }
}

/// Body of the thread.
fn tell(folder: &Path, place: &RecordPlace, orders: &Receiver<()>) {
    while let Ok(()) = orders.recv() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64());
        if let Err(error) = publish(folder, place, now) {
            tracing::warn!(error = format!("{error:#}"), "the bucket could not be told how the run is; the run goes on");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_and_ends_are_told_and_of_checkpoints_one_a_minute() {
        let at = |time, event| Recorded { time, event };
        let saved = || Event::CheckpointSaved { step: 1, url: String::new(), bytes: 1, seconds: 1.0, blocked_s: 0.0 };
        let cases = [
            ("a checkpoint, the first word", None, at(10.0, saved()), true),
            ("a checkpoint soon after", Some(10.0), at(69.0, saved()), false),
            ("a checkpoint a minute later", Some(10.0), at(70.0, saved()), true),
            ("the end at once", Some(10.0), at(10.1, Event::RunStopped { step: 3 }), true),
            ("anything else", None, at(10.0, Event::Warning { message: String::new() }), false),
        ];
        for (name, last, recorded, expected) in cases {
            assert_eq!(is_due(last, &recorded), expected, "{name}");
        }
    }
}
