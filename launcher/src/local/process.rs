//! One worker process: started in a process group of its own, its output in its log, ended on request.

use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use cloze_cluster::Secret;
use cloze_recipes::failure::{Failure, FailureKind};
use tokio::process::{Child, Command};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::log::{WorkerLog, pump};
use crate::run_folder::{RunFolder, storage};

/// Environment variable with the run's token; an argument would show in the list of processes.
pub(super) const TOKEN_VARIABLE: &str = "CLOZE_TOKEN";

/// After a process has ended, longest wait for the rest of its output; a grandchild may still hold the pipe.
const OUTPUT_DRAIN_S: u64 = 1;

/// What all worker processes of a run have in common.
#[derive(Clone, Copy)]
pub(super) struct WorkerCommand<'a> {
    /// The worker binary.
    pub binary: &'a Path,
    /// The run folder.
    pub run: &'a RunFolder,
    /// Where the coordinator listens.
    pub coordinator: SocketAddr,
    /// The run's token.
    pub token: &'a Secret,
    /// Number of workers on this machine, which share its cores.
    pub local_workers: u32,
}

/// A process that was started.
pub(super) struct WorkerProcess {
    worker: u32,
    process_id: u32,
    child: Child,
    kill: Arc<Notify>,
    log: Arc<Mutex<WorkerLog>>,
}

/// A process that has ended.
#[derive(Debug)]
pub(super) struct Exit {
    /// Its slot.
    pub worker: u32,
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// `exit code 1`, `SIGKILL`.
    pub status: String,
    /// Its last lines.
    pub tail: String,
    /// Why its log could not be written; such a process is killed.
    pub log_error: Option<std::io::Error>,
}

impl WorkerProcess {
    /// Starts the process of a slot. Fails with kind `Environment` when the binary cannot be run, and with kind `Storage` when
    /// its log cannot be written.
    pub(super) fn start(command: WorkerCommand<'_>, worker: u32) -> anyhow::Result<Self> {
        let log_path = command.run.log_path(worker);
        let mut log = WorkerLog::open(&log_path).map_err(|error| storage("open a worker's log", &log_path, &error))?;
        let mut child = Command::new(command.binary)
            .args(["train", "--coordinator", &command.coordinator.to_string(), "--run"])
            .arg(command.run.path())
            .args(["--worker", &worker.to_string(), "--local-workers", &command.local_workers.to_string()])
            .env(TOKEN_VARIABLE, command.token.expose())
            // Ctrl-C in the terminal must reach the launcher only, which asks the workers to save first.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| {
                Failure::new(FailureKind::Environment, "the worker binary cannot be started")
                    .at(command.binary.display())
                    .because(error)
                    .hint("`cloze-worker` belongs beside `cloze`; build both with `make build`")
            })?;
        let process_id = child.id().context("read a new process's id")?;
        if let Err(error) = log.note(&format!("== worker {worker}, process {process_id} ==")) {
            // The process is killed when it is dropped; this only makes it certain before the error is told.
            let _ = child.start_kill();
            return Err(storage("write a worker's log", &log_path, &error).into());
        }
        Ok(Self { worker, process_id, child, kill: Arc::new(Notify::new()), log: Arc::new(Mutex::new(log)) })
    }

    /// Its process id.
    pub(super) fn process_id(&self) -> u32 {
        self.process_id
    }

    /// Ends the process with SIGKILL when it is notified.
    pub(super) fn kill_switch(&self) -> Arc<Notify> {
        Arc::clone(&self.kill)
    }

    /// Copies the output into the log until the process has ended.
    pub(super) async fn wait(mut self) -> Exit {
        let (output, errors) = (self.child.stdout.take(), self.child.stderr.take());
        let log = Arc::clone(&self.log);
        let copying = async move {
            let copy_output = async { if let Some(output) = output { pump(output, &log).await } else { Ok(()) } };
            let copy_errors = async { if let Some(errors) = errors { pump(errors, &log).await } else { Ok(()) } };
            tokio::try_join!(copy_output, copy_errors).map(|_| ())
        };
        tokio::pin!(copying);
        let mut copied = None;
        let status = loop {
            tokio::select! {
                status = self.child.wait() => break status,
                () = self.kill.notified() => self.kill_now(),
                result = &mut copying, if copied.is_none() => {
                    if result.is_err() {
                        self.kill_now();
                    }
                    copied = Some(result);
                }
            }
        };
        if copied.is_none() {
            copied = timeout(Duration::from_secs(OUTPUT_DRAIN_S), copying).await.ok();
        }
        self.exit(status, copied.and_then(Result::err))
    }

    fn kill_now(&mut self) {
        // A process that has just ended cannot be killed, and need not be.
        if let Err(error) = self.child.start_kill() {
            tracing::debug!(worker = self.worker, %error, "a worker process was already gone");
        }
    }

    fn exit(&self, status: std::io::Result<ExitStatus>, log_error: Option<std::io::Error>) -> Exit {
        let tail = self.log.lock().unwrap_or_else(PoisonError::into_inner).tail();
        let (code, status) = match status {
            Ok(status) => (status.code(), status_text(status)),
            Err(error) => (None, format!("an unknown status: {error}")),
        };
        Exit { worker: self.worker, code, status, tail, log_error }
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
    use super::*;

    #[test]
    fn statuses() {
        // A wait status holds the exit code in its second byte and a signal in its first.
        let cases = [(0, "exit code 0"), (5 << 8, "exit code 5"), (9, "SIGKILL"), (11, "SIGSEGV"), (64, "signal 64")];
        for (raw, text) in cases {
            assert_eq!(status_text(ExitStatus::from_raw(raw)), text);
        }
    }
}
