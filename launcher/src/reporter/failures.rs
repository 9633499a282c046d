//! `failures.jsonl`: one line of JSON for each failure, once it is known how it was met.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use cloze_cluster::{Event, Recorded};

use super::jsonl::open_whole_lines;
use crate::view::ledger::{FailureRecord, Ledger};

/// The failure log.
#[derive(Debug)]
pub struct FailureLog {
    file: File,
    ledger: Ledger,
}

impl FailureLog {
    /// Opens the log to append to it.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: open_whole_lines(path)?, ledger: Ledger::new() })
    }

    /// Takes in an event of an earlier controller, which wrote what was known then.
    pub fn recall(&mut self, recorded: &Recorded) {
        drop(self.complete(recorded));
    }

    /// Takes in an event, and writes the failures that it completes. The end of the run completes all of them.
    pub fn write(&mut self, recorded: &Recorded) -> io::Result<()> {
        let mut lines = Vec::new();
        for record in self.complete(recorded) {
            serde_json::to_writer(&mut lines, &record)?;
            lines.push(b'\n');
        }
        self.file.write_all(&lines)
    }

    fn complete(&mut self, recorded: &Recorded) -> Vec<FailureRecord> {
        let mut records = self.ledger.apply(recorded);
        if matches!(recorded.event, Event::RunFinished { .. } | Event::RunStopped { .. } | Event::RunFailed { .. }) {
            records.extend(self.ledger.finish());
        }
        records
    }
}

#[cfg(test)]
mod tests {
    use cloze_cluster::FailureClass;

    use super::*;

    fn recorded(event: Event) -> Recorded {
        Recorded { time: 1.0e9, event }
    }

    fn lost(worker: u32) -> Recorded {
        let (host, reason) = ("node-a".to_owned(), "no heartbeat for 2.1 s".to_owned());
        recorded(Event::WorkerLost { worker, rank: Some(worker), host, class: FailureClass::MissedHeartbeat, reason })
    }

    fn workers(path: &Path) -> Vec<Option<u32>> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str::<FailureRecord>(line).unwrap().worker).collect()
    }

    #[test]
    fn the_end_writes_what_is_open() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("failures.jsonl");
        let mut log = FailureLog::open(&path).unwrap();
        log.write(&lost(1)).unwrap();
        assert!(workers(&path).is_empty());
        log.write(&recorded(Event::RunStopped { step: 3 })).unwrap();
        assert_eq!(workers(&path), [Some(1)]);
    }

    #[test]
    fn what_an_earlier_controller_left_open_is_written_by_its_successor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("failures.jsonl");
        let mut log = FailureLog::open(&path).unwrap();
        for event in [lost(0), recorded(Event::RunStopped { step: 3 }), lost(1)] {
            log.recall(&event);
        }
        log.write(&recorded(Event::RunStopped { step: 5 })).unwrap();
        assert_eq!(workers(&path), [Some(1)], "the first one was written before");
    }
}
