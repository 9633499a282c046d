//! All readers of one run behind one call.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use cloze_cluster::{Event, Recorded};
use cloze_recipes::failure::{Failure, FailureKind};

use super::registry::Registry;
use super::{FailureLog, Jsonl, TensorBoard, Terminal, TerminalStyle};
use crate::dashboard::Dashboard;
use crate::run_folder::{RunFolder, RunPaths, storage};
use crate::view::RunView;

/// The readers of one run.
pub struct Reporters {
    terminal: Terminal,
    jsonl: Jsonl,
    failures: FailureLog,
    tensorboard: TensorBoard,
    dashboard: Option<Dashboard>,
    registry: Option<Registry>,
    paths: RunPaths,
}

impl Reporters {
    /// Opens the files in the run folder; fails with kind `Storage` when they cannot be read or written.
    pub fn open(run: &RunFolder, terminal: Terminal) -> anyhow::Result<Self> {
        let paths = run.paths().clone();
        let jsonl = Jsonl::open(&paths.events()).map_err(|error| storage("open the event log", &paths.events(), &error))?;
        let mut failures =
            FailureLog::open(&paths.failures()).map_err(|error| storage("open the failure log", &paths.failures(), &error))?;
        replay(&paths, |recorded| failures.recall(recorded))?;
        let tensorboard = TensorBoard::create(&paths.tensorboard())
            .map_err(|error| storage("create a TensorBoard file", &paths.tensorboard(), &error))?;
        let registry = Registry::of_run(run.path())?;
        Ok(Self { terminal, jsonl, failures, tensorboard, dashboard: None, registry, paths })
    }

    /// Adds a dashboard, which is shown everything that happened so far.
    pub fn attach(&mut self, mut dashboard: Dashboard) -> anyhow::Result<()> {
        let mut view = RunView::default();
        replay(&self.paths, |recorded| view.apply(recorded))?;
        dashboard.seed(view);
        self.dashboard = Some(dashboard);
        Ok(())
    }

    /// Stamps an event with the present time and gives it to every reader. Fails with kind `Storage` when one cannot write.
    pub fn write(&mut self, event: Event) -> anyhow::Result<()> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).context("read the time of day")?.as_secs_f64();
        let recorded = Recorded { time, event };
        self.jsonl.write(&recorded).map_err(|error| storage("write the event log", &self.paths.events(), &error))?;
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.publish(&recorded);
        }
        if let Some(registry) = &mut self.registry {
            registry.apply(&recorded);
        }
        self.failures.write(&recorded).map_err(|error| storage("write the failure log", &self.paths.failures(), &error))?;
        self.tensorboard.write(&recorded).map_err(|error| storage("write a TensorBoard file", &self.paths.tensorboard(), &error))?;
        shown(self.terminal.write(&recorded))
    }

    /// Shows a line that is no event of the run, such as one of another host; only the terminal has it.
    pub fn say(&mut self, line: &str) -> anyhow::Result<()> {
        shown(self.terminal.say(line))
    }

    /// Lets the dashboard's readers see the end.
    pub async fn close(&mut self) {
        if let Some(dashboard) = self.dashboard.take() {
            dashboard.close().await;
        }
    }
}

fn shown(result: io::Result<()>) -> anyhow::Result<()> {
    match result {
        // Somebody closed the other end, as `| head` does; the run goes on, and the files have everything.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(Failure::new(FailureKind::Storage, "failed to write progress to standard error").because(error).into()),
        Ok(()) => Ok(()),
    }
}

/// Reads the events that are in the log already. A line of another version of this program is passed over.
fn replay(paths: &RunPaths, mut reader: impl FnMut(&Recorded)) -> anyhow::Result<()> {
    let path = paths.events();
    let file = File::open(&path).map_err(|error| storage("read the event log", &path, &error))?;
    for line in BufReader::new(file).split(b'\n') {
        let line = line.map_err(|error| storage("read the event log", &path, &error))?;
        match serde_json::from_slice::<Recorded>(&line) {
            Ok(recorded) => reader(&recorded),
            Err(error) => tracing::debug!(%error, "an event of an earlier controller is not understood"),
        }
    }
    Ok(())
}

/// Makes the terminal reader of a run.
pub(crate) fn terminal(output: Box<dyn Write + Send>, style: TerminalStyle, log_every_steps: u64) -> Terminal {
    Terminal::new(output, style, log_every_steps)
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
        let terminal = terminal(Box::new(io::sink()), TerminalStyle::default(), 1);
        let mut reporters = Reporters::open(&run, terminal).unwrap();
        reporters.write(Event::Warning { message: "disk is slow".to_owned() }).unwrap();
        reporters.write(Event::RunStopped { step: 3 }).unwrap();
        let text = std::fs::read_to_string(run.paths().events()).unwrap();
        let events: Vec<Recorded> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(events.len(), 2);
        assert!(events[0].time <= events[1].time && events[0].time > 1.0e9);
        assert_eq!(std::fs::read_dir(run.paths().tensorboard()).unwrap().count(), 1);
        assert_eq!(std::fs::read_to_string(run.paths().failures()).unwrap(), "");
    }

    #[test]
    fn a_log_is_replayed_without_what_is_not_understood() {
        let root = tempfile::tempdir().unwrap();
        let run = folder(root.path());
        let line = serde_json::to_string(&Recorded { time: 2.0, event: Event::RunStopped { step: 3 } }).unwrap();
        std::fs::write(run.paths().events(), format!("{{\"time\":1.0,\"event\":\"unheard_of\"}}\n{line}\n")).unwrap();
        let mut times = Vec::new();
        replay(run.paths(), |recorded| times.push(recorded.time)).unwrap();
        assert_eq!(times, [2.0]);
    }

    #[test]
    fn a_reader_that_cannot_write_is_a_storage_failure() {
        let root = tempfile::tempdir().unwrap();
        let run = folder(root.path());
        let terminal = terminal(Box::new(Full), TerminalStyle::default(), 1);
        let mut reporters = Reporters::open(&run, terminal).unwrap();
        let error = reporters.write(Event::Warning { message: "disk is slow".to_owned() }).unwrap_err();
        assert_eq!(error.downcast::<Failure>().unwrap().kind, FailureKind::Storage);
    }
}
