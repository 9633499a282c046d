//! One worker process: started in a process group of its own or found again, its output in its log, ended on request.

use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use cloze_cluster::environment::{COORDINATOR_KEY_VARIABLE, TOKEN_VARIABLE};
use cloze_cluster::host::host_name;
use cloze_recipes::failure::{Failure, FailureKind};
use rustix::process::Signal;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::contact::Contact;
use super::dump::write_dump;
use super::log;
use super::record::{self, ProcessRecord};
use crate::run_folder::{RunPaths, storage};

/// Interval at which a process that is nobody's child here is looked for.
const WATCH_MS: u64 = 100;

/// Orders that wait for one process: a freeze, a dump and a kill at most come together.
const MAX_ORDERS: usize = 8;

/// How much memory cuBLAS works in, which it reads when it starts: eight buffers of 4 MiB. Only so is what it computes repeatable.
const CUBLAS_VARIABLE: &str = "CUBLAS_WORKSPACE_CONFIG";
const CUBLAS_WORKSPACE: &str = ":4096:8";

/// What all worker processes of one program have in common.
#[derive(Clone, Debug)]
pub(super) struct WorkerCommand {
    /// The worker binary.
    pub binary: PathBuf,
    /// The run folder.
    pub paths: RunPaths,
    /// How the coordinator is reached.
    pub contact: Contact,
    /// Slots of the run.
    pub slots: u32,
    /// Number of workers that this program starts on this machine, which share its cores.
    pub local_workers: u32,
    /// Hash of the run's whole recipe.
    pub recipe_hash: String,
    /// Whether this program is `cloze join`.
    pub by_join: bool,
    /// A process that has not joined for so long after its start hangs.
    pub join_within: Duration,
}

/// What a process can be made to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ProcessOrder {
    /// End, by SIGKILL.
    Kill,
    /// Stand still, by SIGSTOP.
    Freeze,
    /// Leave its stacks in this file and end.
    DumpAndKill(PathBuf),
}

/// A process that lives.
pub(super) struct WorkerProcess {
    record: ProcessRecord,
    log_path: PathBuf,
    body: Body,
    orders: mpsc::Receiver<ProcessOrder>,
}

/// How a process is watched.
enum Body {
    /// This program's child; killed when it is dropped, with all that it has started.
    Child(OwnProcess),
    /// Started by an earlier controller.
    Found(FoundProcess),
}

/// A child of this program.
struct OwnProcess(Child);

/// A process of an earlier controller; like a child it is killed when it is dropped.
struct FoundProcess(ProcessRecord);

/// A process that has ended.
#[derive(Debug)]
pub(super) struct Exit {
    /// Its slot.
    pub worker: u32,
    /// Its process id.
    pub process_id: u32,
    /// Exit code; `None` after a signal, and for a process that was not this program's child.
    pub code: Option<i32>,
    /// `exit code 1`, `SIGKILL`.
    pub status: String,
    /// Its last lines.
    pub tail: String,
    /// Where its stacks were written before its end, or why they could not be.
    pub dump: Option<Result<PathBuf, String>>,
}

impl WorkerProcess {
    /// Starts the process of a slot, with the failures that it is to practise. Fails with kind `Environment` when the binary
    /// cannot be run, and with kind `Storage` when its log or its record cannot be written.
    pub(super) fn start(command: &WorkerCommand, worker: u32, drills: &[String]) -> anyhow::Result<(Self, mpsc::Sender<ProcessOrder>)> {
        let log_path = command.paths.log(worker);
        let log_failure = |error: &std::io::Error| storage("write a worker's log", &log_path, error);
        let mut log = log::open(&log_path).map_err(|error| log_failure(&error))?;
        let log_start = log.metadata().map_err(|error| log_failure(&error))?.len();
        let copy = || log.try_clone().map_err(|error| log_failure(&error));
        let (output, errors) = (copy()?, copy()?);
        let mut start = Command::new(&command.binary);
        start
            .args(["train", "--coordinator", &command.contact.coordinator, "--run"])
            .arg(command.paths.root())
            .args(["--worker", &worker.to_string(), "--local-workers", &command.local_workers.to_string()])
            .args(drills.iter().flat_map(|drill| ["--drill", drill.as_str()]))
            .env(TOKEN_VARIABLE, command.contact.token.expose())
            // A key of this program's own environment is another one's.
            .env_remove(COORDINATOR_KEY_VARIABLE)
            .envs(command.contact.key.map(|key| (COORDINATOR_KEY_VARIABLE, key.to_string())))
            .envs(std::env::var_os(CUBLAS_VARIABLE).is_none().then_some((CUBLAS_VARIABLE, CUBLAS_WORKSPACE)))
            // Ctrl-C in the terminal must reach the launcher only, which asks the workers to save first; and a worker must outlive a launcher
            // that was killed.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .kill_on_drop(true);
        let child = start.spawn().map_err(|error| {
            Failure::new(FailureKind::Environment, "the worker binary cannot be started")
                .at(command.binary.display())
                .because(error)
                .hint("`cloze-worker` belongs beside `cloze`; build both with `make build`")
        })?;
        let process_id = child.id().context("read a new process's id")?;
        let start_ticks = record::start_ticks(process_id).context("read a new process's start time")?;
        log.write_all(log::header(worker, process_id).as_bytes()).map_err(|error| log_failure(&error))?;
        let (slots, host, recipe_hash, by_join) = (command.slots, host_name(), command.recipe_hash.clone(), command.by_join);
        let record = ProcessRecord { worker, slots, process_id, start_ticks, host, recipe_hash, by_join, log_start };
        record.write(&command.paths)?;
        Ok(Self::new(record, log_path, Body::Child(OwnProcess(child))))
    }

    /// Takes over a process that an earlier controller started.
    pub(super) fn find(command: &WorkerCommand, record: ProcessRecord) -> (Self, mpsc::Sender<ProcessOrder>) {
        let log_path = command.paths.log(record.worker);
        Self::new(record.clone(), log_path, Body::Found(FoundProcess(record)))
    }

    fn new(record: ProcessRecord, log_path: PathBuf, body: Body) -> (Self, mpsc::Sender<ProcessOrder>) {
        let (sender, orders) = mpsc::channel(MAX_ORDERS);
        (Self { record, log_path, body, orders }, sender)
    }

    /// Its process id.
    pub(super) fn process_id(&self) -> u32 {
        self.record.process_id
    }

    /// Follows orders until the process has ended.
    pub(super) async fn wait(mut self) -> Exit {
        let mut dump = None;
        let (code, status) = loop {
            tokio::select! {
                end = self.body.ended() => break end,
                Some(order) = self.orders.recv() => match order {
                    ProcessOrder::Freeze => self.signal(Signal::STOP),
                    ProcessOrder::Kill => self.signal(Signal::KILL),
                    ProcessOrder::DumpAndKill(path) => {
                        let written = write_dump(self.record.process_id, &path).await;
                        dump = Some(written.map(|()| path).map_err(|error| error.to_string()));
                        self.signal(Signal::KILL);
                    }
                }
            }
        };
        let tail = log::tail(&self.log_path, self.record.log_start).unwrap_or_else(|error| format!("(its log cannot be read: {error})"));
        Exit { worker: self.record.worker, process_id: self.record.process_id, code, status, tail, dump }
    }

    fn signal(&self, signal: Signal) {
        // A process that has just ended takes no signal, and needs none.
        if let Err(error) = self.body.signal(signal) {
            tracing::debug!(worker = self.record.worker, %error, "a worker process was already gone");
        }
    }
}

impl Body {
    /// Waits for the end; exit code and words for it.
    async fn ended(&mut self) -> (Option<i32>, String) {
        match self {
            Self::Child(OwnProcess(child)) => {
                let process_id = child.id();
                let status = child.wait().await;
                // A script around a worker may have ended alone; the worker would keep its seat.
                if let Some(process_id) = process_id {
                    record::end_group(process_id);
                }
                match status {
                    Ok(status) => (status.code(), status_text(status)),
                    Err(error) => (None, format!("an unknown status: {error}")),
                }
            }
            Self::Found(FoundProcess(record)) => {
                let mut tick = interval(Duration::from_millis(WATCH_MS));
                tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
                while record.is_alive() {
                    tick.tick().await;
                }
                (None, "a status that only an earlier controller could have seen".to_owned())
            }
        }
    }

    fn signal(&self, signal: Signal) -> std::io::Result<()> {
        match self {
            // A child that nobody has waited for keeps its process id, so that the signal cannot reach another process.
            Self::Child(OwnProcess(child)) => child.id().map_or(Ok(()), |process_id| record::send(process_id, signal)),
            Self::Found(FoundProcess(record)) => record.signal(signal),
        }
    }
}

impl Drop for OwnProcess {
    fn drop(&mut self) {
        if let Some(process_id) = self.0.id() {
            record::end_group(process_id);
        }
    }
}

impl Drop for FoundProcess {
    fn drop(&mut self) {
        if let Err(error) = self.0.signal(Signal::KILL) {
            tracing::debug!(worker = self.0.worker, %error, "a worker process was already gone");
        }
    }
}

/// `exit code 1`, or the name of the signal.
fn status_text(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => signal_hook::low_level::signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_owned),
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use cloze_cluster::Secret;

    use super::*;
    use crate::sample::script;

    #[test]
    fn statuses() {
        // A wait status holds the exit code in its second byte and a signal in its first.
        let cases = [(0, "exit code 0"), (5 << 8, "exit code 5"), (9, "SIGKILL"), (11, "SIGSEGV"), (64, "signal 64")];
        for (raw, text) in cases {
            assert_eq!(status_text(ExitStatus::from_raw(raw)), text);
        }
    }

    /// A command whose worker is this shell script, in a run folder without a run.
    fn command(folder: &Path, commands: &str) -> WorkerCommand {
        let binary = script(folder, commands);
        let paths = RunPaths::new(folder.to_owned());
        for folder in paths.folders() {
            fs::create_dir_all(folder).unwrap();
        }
        let contact = Contact { coordinator: "127.0.0.1:1".to_owned(), token: Secret::new("token"), key: None };
        WorkerCommand {
            binary,
            paths,
            contact,
            slots: 4,
            local_workers: 2,
            recipe_hash: "l".to_owned(),
            by_join: false,
            join_within: Duration::from_mins(1),
        }
    }

    #[tokio::test]
    async fn output_goes_straight_to_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let command = command(folder.path(), "echo \"$@\"; echo $CLOZE_TOKEN $CLOZE_COORDINATOR_KEY $CUBLAS_WORKSPACE_CONFIG >&2; exit 7");
        let (process, _orders) = WorkerProcess::start(&command, 1, &["nan@3".to_owned()]).unwrap();
        let process_id = process.process_id();
        let exit = process.wait().await;
        assert_eq!((exit.worker, exit.process_id, exit.code, exit.status.as_str()), (1, process_id, Some(7), "exit code 7"));
        let run = folder.path().display();
        let line = format!("train --coordinator 127.0.0.1:1 --run {run} --worker 1 --local-workers 2 --drill nan@3");
        assert_eq!(exit.tail, format!("{line}\ntoken :4096:8"));
        assert!(exit.dump.is_none());
        let log = fs::read_to_string(command.paths.log(1)).unwrap();
        assert!(log.contains(&format!("== worker 1, process {process_id} ==\n")), "{log}");
    }

    #[tokio::test]
    async fn the_coordinators_key_is_in_the_environment_only() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = command(folder.path(), "echo \"$@\"; echo \"key: $CLOZE_COORDINATOR_KEY\"");
        let key = cloze_cluster::RunKey::random().unwrap().pinned().unwrap();
        command.contact.key = Some(key);
        let (process, _orders) = WorkerProcess::start(&command, 0, &[]).unwrap();
        let tail = process.wait().await.tail;
        assert!(tail.ends_with(&format!("key: {key}")) && tail.matches(&key.to_string()).count() == 1, "{tail}");
    }

    #[tokio::test]
    async fn a_worker_inside_a_script_is_ended_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let command = command(folder.path(), "sleep 3600 & echo $! > \"$5/inner\"; wait");
        let (process, orders) = WorkerProcess::start(&command, 1, &[]).unwrap();
        let process = tokio::spawn(process.wait());
        let inner = inner_of(folder.path()).await;
        orders.send(ProcessOrder::Kill).await.unwrap();
        assert_eq!(process.await.unwrap().status, "SIGKILL");
        expect_gone(inner).await;
    }

    #[tokio::test]
    async fn a_worker_is_not_left_by_a_script_that_ends_alone() {
        let folder = tempfile::tempdir().unwrap();
        let command = command(folder.path(), "sleep 3600 & echo $! > \"$5/inner\"; exit 3");
        let (process, _orders) = WorkerProcess::start(&command, 1, &[]).unwrap();
        assert_eq!(process.wait().await.code, Some(3));
        expect_gone(inner_of(folder.path()).await).await;
    }

    /// What a script has started.
    async fn inner_of(folder: &Path) -> u32 {
        for _ in 0..2000 {
            if let Some(inner) = fs::read_to_string(folder.join("inner")).ok().and_then(|text| text.trim().parse().ok()) {
                return inner;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("the script has started nothing");
    }

    async fn expect_gone(inner: u32) {
        // Whoever inherits it may not have asked how it ended.
        let state = |stat: String| stat.rsplit(')').next().unwrap().trim_start().chars().next();
        let lives = || fs::read_to_string(format!("/proc/{inner}/stat")).is_ok_and(|stat| state(stat) != Some('Z'));
        for _ in 0..1000 {
            if !lives() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("process {inner} is left");
    }

    /// A process that has just been started shows no command line for an instant.
    fn wait_for_one(paths: &RunPaths) -> Vec<ProcessRecord> {
        for _ in 0..1000 {
            let found = record::living(paths).unwrap();
            if !found.is_empty() {
                return found;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the process is not found");
    }

    #[tokio::test]
    async fn a_process_of_an_earlier_controller_is_watched_and_ended() {
        let folder = tempfile::tempdir().unwrap();
        let command = command(folder.path(), "kill -STOP $$");
        let (mine, _orders) = WorkerProcess::start(&command, 2, &[]).unwrap();
        let found = wait_for_one(&command.paths);
        assert_eq!((found.len(), found[0].worker, found[0].process_id), (1, 2, mine.process_id()));
        let mine = tokio::spawn(mine.wait());
        let (other, orders) = WorkerProcess::find(&command, found[0].clone());
        let other = tokio::spawn(other.wait());
        let dump = command.paths.dump(2, found[0].process_id);
        orders.send(ProcessOrder::Freeze).await.unwrap();
        orders.send(ProcessOrder::DumpAndKill(dump.clone())).await.unwrap();
        let (mine, other) = (mine.await.unwrap(), other.await.unwrap());
        assert_eq!((mine.status.as_str(), other.code), ("SIGKILL", None));
        assert_eq!(other.dump, Some(Ok(dump.clone())));
        assert!(fs::read_to_string(dump).unwrap().contains("worker.sh"));
        assert!(record::living(&command.paths).unwrap().is_empty());
    }
}
