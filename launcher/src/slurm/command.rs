//! One program of the batch system: started, bounded in time and output, its words kept.

use std::io::{self, Read};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cloze_recipes::failure::{Failure, FailureKind};
use rustix::process::{Pid, Signal, kill_process_group};

/// Most that is read of one program's output, in bytes: a line of a job has some 200, so this is more than 100,000 jobs.
const MAX_OUTPUT_BYTES: u64 = 32 << 20;

/// Most that is kept of its complaints, in bytes.
const MAX_COMPLAINT_BYTES: usize = 2_000;

/// Interval at which the end of a program is looked for.
const END_POLL_MS: u64 = 5;

/// Variables that change what the asking programs print or leave out.
const DISTRACTING_PREFIXES: [&str; 4] = ["SQUEUE_", "SINFO_", "SACCT_", "SLURM_TIME_FORMAT"];

/// Variables of a job around this process that a new job must not inherit, and those that override what its script says; what names the
/// cluster stays.
const JOB_PREFIXES: [&str; 5] = ["SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "PMI"];

/// Variables that say which GPUs a job has.
const GPU_VARIABLES: [&str; 4] = ["CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "GPU_DEVICE_ORDINAL"];

/// Variables that begin like those of a job and name the cluster.
const CLUSTER_VARIABLES: [&str; 3] = ["SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS"];

/// What a program said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// Its output.
    pub output: String,
    /// Its complaints, trimmed and cut.
    pub complaints: String,
    /// Whether it ended with 0.
    pub is_success: bool,
    /// `exit code 1`, or the signal.
    pub status: String,
}

/// A program with its arguments.
#[derive(Clone, Debug)]
pub(super) struct Question {
    program: PathBuf,
    arguments: Vec<String>,
    deadline: Duration,
    submits: bool,
}

impl Question {
    /// A program that is asked something, and must have answered in this time.
    pub(super) fn new(program: impl Into<PathBuf>, arguments: Vec<String>, deadline: Duration) -> Self {
        Self { program: program.into(), arguments, deadline, submits: false }
    }

    /// The program starts a new job, which gets this process's variables, but not those of a job around it.
    pub(super) fn that_submits(mut self) -> Self {
        self.submits = true;
        self
    }

    /// `sbatch --parsable script.sh`
    pub(super) fn shown(&self) -> String {
        let name = self.program.file_name().map_or_else(|| self.program.display().to_string(), |name| name.display().to_string());
        std::iter::once(name).chain(self.arguments.iter().cloned()).collect::<Vec<_>>().join(" ")
    }

    /// Starts the program and waits for its end. An error is one of this machine (it cannot be started) or the deadline; what the
    /// program itself complains of is in the answer.
    pub(super) fn ask(&self) -> Result<Answer, Failure> {
        let mut child = self.command().spawn().map_err(|error| self.failure("cannot be started").because(error))?;
        let (output, complaints) = (reader("output", child.stdout.take()), reader("complaints", child.stderr.take()));
        let status = self.wait(&mut child)?;
        let output = join(output).map_err(|error| self.failure("gave an answer that cannot be read").because(error))?;
        let complaints = join(complaints).map_err(|error| self.failure("gave an answer that cannot be read").because(error))?;
        let status_text = status.code().map_or_else(|| status.to_string(), |code| format!("exit code {code}"));
        Ok(Answer { output, complaints: cut(complaints.trim()), is_success: status.success(), status: status_text })
    }

    /// The output of a program that must end with 0; else its complaints become the cause.
    pub(super) fn ask_well(&self) -> Result<String, Failure> {
        let answer = self.ask()?;
        if answer.is_success { Ok(answer.output) } else { Err(self.complaint(&answer)) }
    }

    /// The failure of a program that ended with another code than 0.
    pub(super) fn complaint(&self, answer: &Answer) -> Failure {
        let failure = self.failure("failed").found(&answer.status);
        if answer.complaints.is_empty() { failure } else { failure.because(&answer.complaints) }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own, so that at the deadline everything ends that holds the pipes open.
        command.process_group(0);
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| is_removed(name, self.submits)) {
                command.env_remove(name);
            }
        }
        if !self.submits {
            command.env("LC_ALL", "C");
        }
        command
    }

    fn wait(&self, child: &mut Child) -> Result<ExitStatus, Failure> {
        let deadline = Instant::now() + self.deadline;
        loop {
            match child.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(END_POLL_MS)),
                Ok(None) => {
                    end(child);
                    return Err(self.failure(&format!("did not answer within {} s", self.deadline.as_secs())));
                }
                Err(error) => {
                    end(child);
                    return Err(self.failure("cannot be waited for").because(error));
                }
            }
        }
    }

    fn failure(&self, what: &str) -> Failure {
        let name = self.program.file_name().map_or_else(String::new, |name| name.display().to_string());
        Failure::new(FailureKind::Environment, format!("`{name}` {what}")).at(cut(&self.shown()))
    }
}

/// Whether a variable is kept from a program.
fn is_removed(name: &str, submits: bool) -> bool {
    let distracts = DISTRACTING_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    let of_a_job = JOB_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) && !CLUSTER_VARIABLES.contains(&name);
    distracts || (submits && (of_a_job || GPU_VARIABLES.contains(&name)))
}

fn end(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw)
        && let Err(error) = kill_process_group(group, Signal::KILL)
    {
        tracing::debug!(%error, "a program was already gone");
    }
    if let Err(error) = child.wait() {
        tracing::debug!(%error, "a program that was killed could not be waited for");
    }
}

/// Reads a pipe to its end on a thread, so that neither pipe fills up while the other is read.
fn reader(name: &str, pipe: Option<impl Read + Send + 'static>) -> Option<io::Result<JoinHandle<io::Result<String>>>> {
    let pipe = pipe?;
    Some(thread::Builder::new().name(name.to_owned()).spawn(move || read_bounded(pipe)))
}

fn read_bounded(pipe: impl Read) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut pipe = pipe.take(MAX_OUTPUT_BYTES + 1);
    pipe.read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_OUTPUT_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("more than {MAX_OUTPUT_BYTES} bytes")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn join(reader: Option<io::Result<JoinHandle<io::Result<String>>>>) -> io::Result<String> {
    match reader {
        None => Ok(String::new()),
        Some(handle) => handle?.join().unwrap_or_else(|_| Err(io::Error::other("the reading thread panicked"))),
    }
}

/// The last part of a text that is too long to show, on a character boundary.
fn cut(text: &str) -> String {
    if text.len() <= MAX_COMPLAINT_BYTES {
        return text.to_owned();
    }
    let start = (text.len() - MAX_COMPLAINT_BYTES..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len());
    format!("…{}", &text[start..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(commands: &str, deadline_ms: u64) -> Question {
        Question::new("/bin/sh", vec!["-c".to_owned(), commands.to_owned()], Duration::from_millis(deadline_ms))
    }

    #[test]
    fn output_complaints_and_status_are_kept_apart() {
        let answer = shell("echo out; echo err >&2; exit 3", 10_000).ask().unwrap();
        assert_eq!((answer.output.as_str(), answer.complaints.as_str()), ("out\n", "err"));
        assert_eq!((answer.is_success, answer.status.as_str()), (false, "exit code 3"));
        let failure = shell("echo 'invalid partition' >&2; exit 1", 10_000).ask_well().unwrap_err();
        assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Environment, "`sh` failed"));
        assert_eq!((failure.cause.as_deref(), failure.found.as_deref()), (Some("invalid partition"), Some("exit code 1")));
        // More than a pipe holds, on both.
        let answer = shell("head -c 300000 /dev/zero | tr '\\0' a >&2; head -c 300000 /dev/zero | tr '\\0' b", 10_000).ask().unwrap();
        assert_eq!(answer.output.len(), 300_000);
        assert!(answer.complaints.len() < MAX_COMPLAINT_BYTES + 10);
    }

    #[test]
    fn a_program_that_hangs_is_ended_with_its_children() {
        let started = Instant::now();
        let failure = shell("sleep 60 & sleep 60", 200).ask().unwrap_err();
        assert!(failure.what.contains("did not answer"), "{failure}");
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_program_that_is_not_there() {
        let failure = Question::new("/nowhere/sbatch", Vec::new(), Duration::from_secs(1)).ask().unwrap_err();
        assert_eq!(failure.what, "`sbatch` cannot be started");
    }

    #[test]
    fn variables_that_would_mislead_are_kept_away() {
        let cases = [
            ("SQUEUE_FORMAT", false, true),
            ("SINFO_ALL", true, true),
            ("SLURM_JOB_ID", false, false),
            ("SLURM_JOB_ID", true, true),
            ("SLURM_MEM_PER_CPU", true, true),
            ("SLURMD_NODENAME", true, true),
            ("CUDA_VISIBLE_DEVICES", true, true),
            ("CUDA_VISIBLE_DEVICES", false, false),
            ("SLURM_CONF", true, false),
            ("SBATCH_ACCOUNT", true, true),
            ("SALLOC_PARTITION", true, true),
            ("SBATCH_ACCOUNT", false, false),
            ("AWS_ACCESS_KEY_ID", true, false),
        ];
        for (name, submits, expected) in cases {
            assert_eq!(is_removed(name, submits), expected, "{name}");
        }
    }
}
