//! Which `cloze join` fills a slot: it holds a lock for each of its slots, so that a second one, as after a remote shell whose connection
//! broke, does not replace the same worker twice.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::PathBuf;

use cloze_cluster::Event;

use super::event_tail::EventTail;
use crate::run_folder::{RunPaths, storage};

/// Held as long as the value lives; the files stay.
pub(super) struct SlotLocks {
    _files: Vec<File>,
}

impl SlotLocks {
    /// Takes the locks of all these slots; `Err` inside names one that another process holds. Fails with kind `Storage` where the run
    /// folder cannot be written, or its disk knows no locks.
    pub(super) fn take(paths: &RunPaths, slots: &[u32]) -> anyhow::Result<Result<Self, u32>> {
        let mut files = Vec::new();
        for &slot in slots {
            let path: PathBuf = paths.slot_lock(slot);
            let failed = |error: &std::io::Error| storage("lock a slot", &path, error);
            let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(|error| failed(&error))?;
            match file.try_lock() {
                Ok(()) => files.push(file),
                Err(TryLockError::WouldBlock) => return Ok(Err(slot)),
                Err(TryLockError::Error(error)) => return Err(failed(&error).into()),
            }
        }
        Ok(Ok(Self { _files: files }))
    }
}

/// Whether the run has ended since it was last started, as far as its event log says.
pub(super) struct RunEndWatch {
    tail: EventTail,
    has_ended: bool,
}

impl RunEndWatch {
    pub(super) fn new(paths: &RunPaths) -> Self {
        Self { tail: EventTail::new(paths.events()), has_ended: false }
    }

    /// Reads what is new. A log that cannot be read for a moment says nothing.
    pub(super) fn has_ended(&mut self) -> bool {
        while let Ok(events) = self.tail.read() {
            if events.is_empty() {
                break;
            }
            for event in events {
                match event {
                    Event::RunStarted { .. } => self.has_ended = false,
                    Event::RunFinished { .. } | Event::RunStopped { .. } | Event::RunFailed { .. } => self.has_ended = true,
                    _ => {}
                }
            }
        }
        self.has_ended
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_slot_has_one_holder() {
        let folder = tempfile::tempdir().unwrap();
        let paths = RunPaths::new(folder.path().to_owned());
        fs::create_dir(paths.processes()).unwrap();
        let take = |slots: &[u32]| SlotLocks::take(&paths, slots).unwrap();
        let held = take(&[2, 3]).ok().unwrap();
        assert_eq!(take(&[3, 4]).err(), Some(3));
        assert!(take(&[4]).is_ok());
        drop(held);
        assert!(take(&[3, 4]).is_ok());
    }

    #[test]
    fn a_run_that_was_started_again_has_not_ended() {
        let folder = tempfile::tempdir().unwrap();
        let paths = RunPaths::new(folder.path().to_owned());
        let started = || Event::RunStarted { name: "run".into(), recipe_hash: "h".into(), workers: 1, min_workers: None, steps: 1 };
        let line = |event| serde_json::to_string(&cloze_cluster::Recorded { time: 1.0, event }).unwrap() + "\n";
        let mut watch = RunEndWatch::new(&paths);
        assert!(!watch.has_ended());
        let mut text = line(started()) + &line(Event::RunStopped { step: 1 });
        fs::write(paths.events(), &text).unwrap();
        assert!(watch.has_ended());
        text += &line(started());
        fs::write(paths.events(), &text).unwrap();
        assert!(!watch.has_ended());
    }
}
