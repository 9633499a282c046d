//! All readers of one run behind one call.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use cloze_cluster::{Event, Recorded};
use cloze_recipes::failure::{Failure, FailureKind};

use super::{Jsonl, TensorBoard, Terminal, TerminalStyle};
use crate::run_folder::{RunFolder, storage};

/// The readers of one run.
pub struct Reporters {
    terminal: Terminal,
    jsonl: Jsonl,
    tensorboard: TensorBoard,
    events_path: PathBuf,
    tensorboard_path: PathBuf,
}

impl Reporters {
    /// Opens the files in the run folder; fails with kind `Storage` when they cannot be written.
    pub fn open(run: &RunFolder, terminal: Terminal) -> anyhow::Result<Self> {
        let (events_path, tensorboard_path) = (run.events_path(), run.tensorboard_path());
        let jsonl = Jsonl::open(&events_path).map_err(|error| storage("open the event log", &events_path, &error))?;
        let tensorboard =
            TensorBoard::create(&tensorboard_path).map_err(|error| storage("create a TensorBoard file", &tensorboard_path, &error))?;
        Ok(Self { terminal, jsonl, tensorboard, events_path, tensorboard_path })
    }

    /// Stamps an event with the present time and gives it to every reader. Fails with kind `Storage` when one cannot write.
    pub fn write(&mut self, event: Event) -> anyhow::Result<()> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).context("read the time of day")?.as_secs_f64();
        let recorded = Recorded { time, event };
        self.jsonl.write(&recorded).map_err(|error| storage("write the event log", &self.events_path, &error))?;
        self.tensorboard.write(&recorded).map_err(|error| storage("write a TensorBoard file", &self.tensorboard_path, &error))?;
        match self.terminal.write(&recorded) {
            // Somebody closed the other end, as `| head` does; the run goes on, and the files have everything.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Err(error) => Err(Failure::new(FailureKind::Storage, "failed to write progress to standard error").because(error).into()),
            Ok(()) => Ok(()),
        }
    }
}

/// Makes the terminal reader of a run.
pub(crate) fn terminal(output: Box<dyn Write + Send>, style: TerminalStyle, run: &RunFolder, log_every_steps: u64) -> Terminal {
    Terminal::new(output, style, log_every_steps, format!("`cloze resume {}`", run.path().display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_folder::NewRun;
    use crate::sample::recipe;

    /// A terminal on a full disk.
    struct Full;

    impl Write for Full {
        fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
            Err(io::Error::from(io::ErrorKind::StorageFull))
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn folder(root: &std::path::Path) -> RunFolder {
        let recipe = recipe();
        let new =
            NewRun { name: "run", recipe: &recipe, data_fingerprint: String::new(), command_line: Vec::new(), worker_build: String::new() };
        RunFolder::create(root, &new).unwrap()
    }

    #[test]
    fn every_reader_gets_every_event() {
        let root = tempfile::tempdir().unwrap();
        let run = folder(root.path());
        let terminal = terminal(Box::new(io::sink()), TerminalStyle::default(), &run, 1);
        let mut reporters = Reporters::open(&run, terminal).unwrap();
        reporters.write(Event::Warning { message: "disk is slow".to_owned() }).unwrap();
        reporters.write(Event::RunStopped { step: 3 }).unwrap();
        let text = std::fs::read_to_string(run.events_path()).unwrap();
        let events: Vec<Recorded> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(events.len(), 2);
        assert!(events[0].time <= events[1].time && events[0].time > 1.0e9);
        assert_eq!(std::fs::read_dir(run.tensorboard_path()).unwrap().count(), 1);
    }

    #[test]
    fn a_reader_that_cannot_write_is_a_storage_failure() {
        let root = tempfile::tempdir().unwrap();
        let run = folder(root.path());
        let terminal = terminal(Box::new(Full), TerminalStyle::default(), &run, 1);
        let mut reporters = Reporters::open(&run, terminal).unwrap();
        let error = reporters.write(Event::Warning { message: "disk is slow".to_owned() }).unwrap_err();
        assert_eq!(error.downcast::<Failure>().unwrap().kind, FailureKind::Storage);
    }
}
