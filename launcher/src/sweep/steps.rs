//! The programs that a trial consists of, each a child of this process: started, asked to leave, and asked why it failed.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::run_folder::storage;

/// Interval at which the end of a program and a wish to stop are looked for, in milliseconds.
const POLL_MS: u64 = 50;

/// How much of the end of a log is searched for what a program said last, in bytes.
const MAX_TAIL_BYTES: u64 = 64 << 10;

/// What this process was asked for, as its threads see it.
#[derive(Debug, Default)]
pub struct StopLevel(AtomicU8);

impl StopLevel {
    /// Save and leave; a batch system says so some time ahead of a time limit.
    pub fn ask(&self) {
        self.0.fetch_max(1, Ordering::SeqCst);
    }

    /// Save and leave, as somebody says who may lose his patience.
    pub fn ask_firmly(&self) {
        self.0.fetch_max(2, Ordering::SeqCst);
    }

    /// Leave at once.
    pub fn force(&self) {
        self.0.store(3, Ordering::SeqCst);
    }

    /// Whether anybody asked who may lose his patience.
    pub fn is_firmly_asked(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 1
    }

    /// Whether anybody asked.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 0
    }

    fn is_forced(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 2
    }
}

/// What a program does with a wish to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manners {
    /// It controls a run: it is asked, and saves.
    Saves,
    /// It can be done again: it is ended.
    Ends,
}

/// Runs a program to its end, its output behind what the log holds. Fails with the program's own failure, and with kind `Interrupted`
/// where it was asked to stop.
pub fn run(mut command: Command, log_path: &Path, manners: Manners, stop: &StopLevel) -> anyhow::Result<()> {
    if stop.is_asked() {
        return Err(interrupted().into());
    }
    let log = OpenOptions::new().create(true).append(true).open(log_path).map_err(|error| storage("open a log", log_path, &error))?;
    let log_start = log.metadata().map_err(|error| storage("open a log", log_path, &error))?.len();
    let errors = log.try_clone().map_err(|error| storage("open a log", log_path, &error))?;
    // A group of its own: what ends the program ends what it has started, and nothing else.
    let child = command.stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0).spawn().map_err(|error| {
        Failure::new(FailureKind::Environment, "a program of a trial cannot be started").at(command.get_program().display()).because(error)
    })?;
    let status = wait(child, manners, stop)?;
    if status.success() {
        return Ok(());
    }
    if stop.is_asked() && (manners == Manners::Ends || status.code().is_none()) {
        return Err(interrupted().into());
    }
    Err(failure_of(status, log_path, log_start).into())
}

/// Waits for the end of a program; hands the wishes of others on meanwhile.
fn wait(mut child: Child, manners: Manners, stop: &StopLevel) -> anyhow::Result<ExitStatus> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("read a new process's id")?;
    let (mut is_asked, mut is_forced) = (false, false);
    loop {
        if let Some(status) = child.try_wait().context("wait for a program of a trial")? {
            return Ok(status);
        }
        if stop.is_asked() && !is_asked {
            is_asked = true;
            signal(pid, manners, false);
        }
        if stop.is_forced() && !is_forced {
            is_forced = true;
            signal(pid, manners, true);
        }
        sleep(Duration::from_millis(POLL_MS));
    }
}

/// Passes a wish on. A controller of a run takes SIGUSR2 as often as it comes, also beside a SIGTERM that a batch system sends to all
/// processes; two SIGTERMs make it end its workers at once.
fn signal(pid: Pid, manners: Manners, is_forced: bool) {
    let sent = match (manners, is_forced) {
        (Manners::Saves, false) => kill_process(pid, Signal::USR2),
        (Manners::Saves, true) => kill_process(pid, Signal::TERM).and_then(|()| {
            sleep(Duration::from_millis(4 * POLL_MS));
            kill_process(pid, Signal::TERM)
        }),
        (Manners::Ends, false) => kill_process_group(pid, Signal::TERM),
        (Manners::Ends, true) => kill_process_group(pid, Signal::KILL),
    };
    if let Err(error) = sent {
        tracing::debug!(%error, "a program of a trial had ended before it was told");
    }
}

/// The failure of whoever was asked to stop.
pub fn interrupted() -> Failure {
    Failure::new(FailureKind::Interrupted, "stopped; what was saved is kept")
}

/// The failure of a program: what it wrote, of the kind that its exit code says.
fn failure_of(status: ExitStatus, log_path: &Path, log_start: u64) -> Failure {
    let kind = status.code().and_then(FailureKind::of_exit_code);
    let text = tail(log_path, log_start).unwrap_or_default();
    let said = text.rfind("\nerror: ").map(|place| place + 1).or_else(|| text.starts_with("error: ").then_some(0));
    let failure = match (kind, said) {
        (Some(kind), Some(place)) => Failure::parse(kind, &text[place + "error: ".len()..]),
        (None, Some(place)) => Failure::parse(FailureKind::Run, &text[place + "error: ".len()..]),
        (kind, None) => Failure::new(kind.unwrap_or(FailureKind::Run), format!("a program of the trial ended with {}", shown(status))),
    };
    if failure.place.is_some() { failure } else { failure.at(log_path.display()) }
}

/// `exit code 3`, `signal 9`.
pub fn shown(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

fn tail(path: &Path, start: u64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(start.max(length.saturating_sub(MAX_TAIL_BYTES))))?;
    let mut bytes = Vec::new();
    file.take(MAX_TAIL_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Instant;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    fn failure(result: anyhow::Result<()>) -> Failure {
        result.unwrap_err().downcast().unwrap()
    }

    #[test]
    fn a_failure_is_what_the_program_said() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let run = |script: &str| run(shell(script), &log, Manners::Ends, &StopLevel::default());
        run("echo fine").unwrap();
        let full = failure(run("echo noise; printf 'error: it broke\\n  where: /a:3\\n\\nhint: mend it\\n' >&2; exit 6"));
        assert_eq!(full, Failure::new(FailureKind::Storage, "it broke").at("/a:3").hint("mend it"));
        // What an earlier program said is not what this one said.
        let silent = failure(run("exit 4"));
        assert_eq!((silent.kind, silent.what.as_str()), (FailureKind::Input, "a program of the trial ended with exit code 4"));
        assert_eq!(silent.place, Some(log.display().to_string()));
        let killed = failure(run("kill -9 $$"));
        assert_eq!((killed.kind, killed.what.as_str()), (FailureKind::Run, "a program of the trial ended with signal 9"));
        let missing = super::run(Command::new("/no/such"), &log, Manners::Ends, &StopLevel::default());
        assert_eq!(failure(missing).kind, FailureKind::Environment);
    }

    #[test]
    fn a_wish_to_stop_is_handed_on() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let stopped = |script: &str, manners, force| {
            let stop = StopLevel::default();
            let started = Instant::now();
            let result = thread::scope(|scope| {
                let running = scope.spawn(|| run(shell(script), &log, manners, &stop));
                sleep(Duration::from_millis(300));
                stop.ask();
                if force {
                    stop.force();
                }
                running.join().unwrap()
            });
            assert!(started.elapsed() < Duration::from_secs(20), "the program was not told");
            result
        };
        // One that can be done again is ended with all that it has started.
        assert_eq!(failure(stopped("sleep 60 & wait", Manners::Ends, false)).kind, FailureKind::Interrupted);
        // A run's controller saves, and its exit code says how that went.
        let saving = "trap 'echo saved; exit 130' USR2; while :; do sleep 0.05; done";
        assert_eq!(failure(stopped(saving, Manners::Saves, false)).kind, FailureKind::Interrupted);
        stopped("trap 'exit 0' USR2; while :; do sleep 0.05; done", Manners::Saves, false).unwrap();
        let stubborn = "trap '' USR2; while :; do sleep 0.05; done";
        assert_eq!(failure(stopped(stubborn, Manners::Saves, true)).kind, FailureKind::Interrupted);
    }
}
