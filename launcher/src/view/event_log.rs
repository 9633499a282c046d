//! Follows `events.jsonl` while a controller writes it, reading every byte once.

use std::fs::File;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use cloze_cluster::Recorded;
use cloze_recipes::failure::{Failure, FailureKind};

use super::RunView;

/// Longest line, in bytes; the largest real event is a generation of thousands of workers, below a tenth of this.
const MAX_LINE_BYTES: u64 = 4 << 20;

/// A place in an event log, and the view of everything before it.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    /// Bytes of the lines that were read; a line that is still being written is read when it is whole.
    offset: u64,
    events: u64,
    passed_over: u64,
    damaged: u64,
    view: RunView,
}

impl EventLog {
    /// The log of a run folder, from its beginning. Nothing is read yet.
    pub fn of_run(folder: &Path) -> Self {
        Self { path: folder.join("events.jsonl"), offset: 0, events: 0, passed_over: 0, damaged: 0, view: RunView::default() }
    }

    /// The view of what was read so far.
    pub fn view(&self) -> &RunView {
        &self.view
    }

    /// The view, when the log is not read any further.
    pub fn into_view(self) -> RunView {
        self.view
    }

    /// Fails with kind `Damaged` where lines were read and not one of them is an event: whoever follows the log would wait for ever.
    pub fn expect_events(&self) -> Result<(), Failure> {
        let (passed_over, damaged) = (self.passed_over, self.damaged);
        if self.events > 0 || passed_over + damaged == 0 {
            return Ok(());
        }
        Err(Failure::new(FailureKind::Damaged, "the event log holds no event")
            .at(self.path.display())
            .found(format!("{damaged} damaged lines, {passed_over} of another version of cloze"))
            .hint("`cloze resume RUN --workers N` goes on with the run from its newest checkpoint"))
    }

    /// Lines that are JSON and no event that this version knows; another version wrote them.
    pub fn passed_over(&self) -> u64 {
        self.passed_over
    }

    /// Lines that are no JSON, or too long; something has damaged the file.
    pub fn damaged(&self) -> u64 {
        self.damaged
    }

    /// Reads what is new and says whether there was anything. A log that became shorter is another one, and read from its
    /// beginning. Fails with kind `Input` when there is no log, and `Storage` when it cannot be read.
    pub fn read_new(&mut self) -> Result<bool, Failure> {
        let mut file = File::open(&self.path).map_err(|error| match error.kind() {
            ErrorKind::NotFound if self.path.with_file_name("run.json").exists() => {
                Failure::new(FailureKind::Input, "the event log of this run is not there")
                    .at(self.path.display())
                    .hint("was the run never started? `cloze resume RUN --workers N` goes on with it from its newest checkpoint")
            }
            ErrorKind::NotFound => Failure::new(FailureKind::Input, "this folder holds no run")
                .at(self.path.display())
                .hint("name the folder of a run, or the address of its dashboard"),
            _ => self.unreadable(&error),
        })?;
        let length = file.metadata().map_err(|error| self.unreadable(&error))?.len();
        if length < self.offset {
            *self =
                Self { path: std::mem::take(&mut self.path), offset: 0, events: 0, passed_over: 0, damaged: 0, view: RunView::default() };
        }
        if length == self.offset {
            return Ok(false);
        }
        file.seek(SeekFrom::Start(self.offset)).map_err(|error| self.unreadable(&error))?;
        let before = self.offset;
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let bytes = reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line).map_err(|error| self.unreadable(&error))?;
            let mut length = bytes as u64;
            let is_whole = line.last() == Some(&b'\n');
            if !is_whole && length < MAX_LINE_BYTES {
                // The end of the log, or of what the controller has written of its next line.
                return Ok(self.offset > before);
            }
            if !is_whole {
                length += reader.skip_until(b'\n').map_err(|error| self.unreadable(&error))? as u64;
            }
            match serde_json::from_slice::<Recorded>(&line) {
                Ok(recorded) => {
                    self.view.apply(&recorded);
                    self.events += 1;
                }
                Err(error) if error.is_data() => self.passed_over += 1,
                Err(_) => self.damaged += 1,
            }
            self.offset += length;
        }
    }

    fn unreadable(&self, error: &std::io::Error) -> Failure {
        Failure::new(FailureKind::Storage, "failed to read the event log").at(self.path.display()).because(error)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;

    use super::*;
    use crate::view::fixtures::{recorded, start, step};

    fn text_of(events: Vec<cloze_cluster::Event>) -> String {
        recorded(events).iter().map(|event| serde_json::to_string(event).unwrap() + "\n").collect()
    }

    #[test]
    fn a_growing_log_is_read_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let mut log = EventLog::of_run(folder.path());
        assert_eq!(log.read_new().unwrap_err().kind, FailureKind::Input);
        fs::write(&path, text_of(start())).unwrap();
        assert!(log.read_new().unwrap());
        assert!(!log.read_new().unwrap());
        // A line in two parts is read when it is whole.
        let line = text_of(vec![step(1, 1, 2.0)]);
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(&line.as_bytes()[..30]).unwrap();
        assert!(!log.read_new().unwrap());
        file.write_all(&line.as_bytes()[30..]).unwrap();
        assert!(log.read_new().unwrap());
        assert_eq!((log.view().totals.steps, log.view().progress.step), (1, 1));
    }

    #[test]
    fn another_log_of_the_same_name_is_read_from_its_beginning() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        fs::write(&path, text_of(start().into_iter().chain([step(1, 1, 2.0), step(1, 2, 2.0)]).collect())).unwrap();
        let mut log = EventLog::of_run(folder.path());
        assert!(log.read_new().unwrap());
        fs::write(&path, text_of(start().into_iter().chain([step(1, 1, 2.0)]).collect())).unwrap();
        assert!(log.read_new().unwrap());
        assert_eq!(log.into_view().totals.steps, 1);
    }

    #[test]
    fn damaged_lines_and_those_of_another_version_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let text = text_of(start()) + "{\"time\":1,\"event\":\"dance\"}\n{\"time\":1,\"event\":\"worker_finished\"}\n";
        fs::write(folder.path().join("events.jsonl"), &text).unwrap();
        let mut log = EventLog::of_run(folder.path());
        assert!(log.read_new().unwrap());
        assert_eq!((log.passed_over(), log.view().name.as_str()), (2, "demo"));
        let long = "x".repeat(MAX_LINE_BYTES as usize + 10);
        let more = text_of(vec![step(1, 1, 2.0)]);
        fs::write(folder.path().join("events.jsonl"), format!("{text}{{\"time\":\n{long}\n{more}{{\"time\":1,")).unwrap();
        assert!(log.read_new().unwrap());
        // What was cut off at the end is still being written, and no damage.
        assert_eq!((log.passed_over(), log.damaged(), log.view().progress.step), (2, 2, 1));
        log.expect_events().unwrap();
        // One without any event would be followed for ever; an empty one is only young.
        for (text, is_right) in [("", true), ("{\"time\":", true), ("junk\n", false)] {
            fs::write(folder.path().join("events.jsonl"), text).unwrap();
            let mut log = EventLog::of_run(folder.path());
            log.read_new().unwrap();
            assert_eq!(log.expect_events().is_ok(), is_right, "{text}");
        }
    }
}
