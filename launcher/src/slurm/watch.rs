//! What a job hears of its end: signals, and the end of a step that only the batch system ends.
//!
//! Before a job that has to make room is ended, the batch system signals its steps and not its script. So a step that sleeps is kept
//! beside the run; when it ends, the job asks whether it has to make room, and if so stops as on a warning.

use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, getpid, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use signal_hook::flag;

use super::client::Slurm;
use super::job::JobId;
use super::verdict::Warning;

/// How often the sleeping step is looked at, in milliseconds.
const LOOK_MS: u64 = 200;

/// Longest wait for the sleeping step to end, in seconds, before it is killed.
const END_TIMEOUT_S: u64 = 5;

/// Longest sleep of the step, in seconds: 68 years.
const SLEEP_S: u32 = i32::MAX as u32;

/// The signals that this process has seen. The flags stay for the life of the process, so that no signal ends it.
#[derive(Clone, Debug)]
pub struct Warnings {
    flags: Vec<(Warning, Arc<AtomicBool>)>,
}

impl Warnings {
    /// Starts to listen.
    pub fn listen() -> anyhow::Result<Self> {
        let meanings = [
            (Warning::Interrupt, vec![SIGINT, SIGHUP]),
            (Warning::Preempted, Vec::new()),
            (Warning::Terminate, vec![SIGTERM]),
            (Warning::Early, vec![SIGUSR2]),
        ];
        let mut flags = Vec::new();
        for (warning, signals) in meanings {
            let raised = Arc::new(AtomicBool::new(false));
            for signal in signals {
                flag::register(signal, Arc::clone(&raised)).context("listen to signals")?;
            }
            flags.push((warning, raised));
        }
        Ok(Self { flags })
    }

    /// Hears nothing: the signals of a test's process are not its own.
    #[cfg(test)]
    pub(super) fn deaf() -> Self {
        Self { flags: Vec::new() }
    }

    /// The most telling of those that have come: a preemption is passed on as an early warning, and a SIGTERM may follow a warning.
    pub fn seen(&self) -> Option<Warning> {
        self.flags.iter().find(|(_, raised)| raised.load(Ordering::SeqCst)).map(|(warning, _)| *warning)
    }

    fn raise(&self, warning: Warning) {
        for (_, raised) in self.flags.iter().filter(|(known, _)| *known == warning) {
            raised.store(true, Ordering::SeqCst);
        }
    }
}

/// A step that sleeps, and a thread that looks at it. Both end with this value.
pub struct PreemptionWatch {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl PreemptionWatch {
    /// Starts the step with these words before it. Where it cannot be started, the job runs on without it.
    pub fn start(slurm: Arc<Slurm>, job: JobId, step: &[String], warnings: &Warnings) -> anyhow::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let mut words = step.iter();
        let mut command = Command::new(words.next().map(PathBuf::from).unwrap_or_default());
        command.args(words).args(["sleep", &SLEEP_S.to_string()]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().context("start the step that hears of a preemption")?;
        let (watched, warnings) = (Arc::clone(&over), warnings.clone());
        let thread = thread::Builder::new().name("preemption watch".to_owned()).spawn(move || {
            if wait(child, &watched) {
                tell(&slurm, job, &warnings);
            }
        });
        Ok(Self { over, thread: Some(thread.context("start the thread that hears of a preemption")?) })
    }
}

impl Drop for PreemptionWatch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("the preemption watch has failed");
        }
    }
}

/// Waits for the step; says whether it ended before it was to.
fn wait(mut child: Child, over: &AtomicBool) -> bool {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                tracing::debug!(%status, "the sleeping step has ended");
                return true;
            }
            Ok(None) if over.load(Ordering::SeqCst) => {
                if let Err(error) = end(&mut child) {
                    tracing::warn!(%error, "the sleeping step could not be ended");
                }
                return false;
            }
            Ok(None) => thread::sleep(Duration::from_millis(LOOK_MS)),
            Err(error) => {
                tracing::warn!(%error, "the sleeping step cannot be waited for");
                return false;
            }
        }
    }
}

/// Asks `srun` to end its step, and kills it where it does not.
fn end(child: &mut Child) -> io::Result<()> {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        kill_process(pid, Signal::TERM)?;
    }
    let deadline = Instant::now() + Duration::from_secs(END_TIMEOUT_S);
    while Instant::now() < deadline {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(LOOK_MS / 4));
    }
    child.kill()?;
    child.wait().map(drop)
}

/// Stops the run if the job has to make room. Anything else that ended the step, or else the job, has a signal of its own.
fn tell(slurm: &Slurm, job: JobId, warnings: &Warnings) {
    match slurm.show(job) {
        Ok(Some(state)) if state.is_preempted => {
            warnings.raise(Warning::Preempted);
            if let Err(error) = kill_process(getpid(), Signal::USR2) {
                tracing::warn!(%error, "the run could not be told to make room");
            }
        }
        Ok(state) => tracing::debug!(?state, "the sleeping step was ended, and not by a preemption"),
        Err(failure) => tracing::warn!(%failure, "why the sleeping step has ended is not known"),
    }
}
