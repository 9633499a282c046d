//! One visit, from here: the remote shell is started, bounded in time and output, and its end is told.

use std::io::Read;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use cloze_recipes::failure::{Failure, FailureKind};
use rustix::process::{Pid, Signal, kill_process_group};

use super::super::folder::StudyFolder;
use super::super::steps::shown;
use super::super::visit::{Orders, Report};
use crate::hosts::RemoteHost;

/// Longest visit, in seconds. What it begins may take 20 s to claim its batch, and modules may be slow to load.
const VISIT_S: u64 = 90;

/// Interval at which the end of a visit is looked for, in milliseconds.
const POLL_MS: u64 = 10;

/// Longest wait for the end of what a visit has said, once it has ended, in milliseconds.
const PIPE_WAIT_MS: u64 = 5000;

/// Most that is read of what a host says, in bytes; a report of a thousand batches has some 20,000.
const MAX_OUTPUT_BYTES: u64 = 1 << 20;

/// Most of its last line that a failure tells, in characters.
const MAX_LINE_CHARS: usize = 300;

/// Exit codes of a shell that cannot run the command.
const NOT_RUN: [i32; 2] = [126, 127];

/// Exit code of remote shells that have not reached the host.
const NOT_REACHED: i32 = 255;

/// What to do where another program answers, or none.
const SAME_PROGRAMS: &str = "`cloze` must be there under the same path as here, and of the same version";

/// What all visits of a study have in common.
#[derive(Clone, Debug)]
pub(in super::super) struct Visitor {
    /// Words before the program that prepare a host.
    pub preparation: Vec<String>,
    /// The `cloze` program.
    pub program: std::path::PathBuf,
    /// The study folder.
    pub folder: StudyFolder,
}

impl Visitor {
    /// Has the orders carried out on their host, and returns what it tells. Fails with kind `Environment`, and with words that fit behind
    /// the name of the host.
    pub(in super::super) fn visit(&self, host: &RemoteHost, orders: &Orders) -> Result<Report, Failure> {
        let mut words = self.words(&["sweep".to_owned(), "visit".to_owned(), self.folder.root().display().to_string()]);
        words.extend(orders.words());
        let output = ask(host, &words)?;
        Report::find(&output).ok_or_else(|| {
            Failure::new(FailureKind::Environment, "another version of this program is there").found(last_line(&output)).hint(SAME_PROGRAMS)
        })
    }

    /// Finds out whether the host can be reached and has the program. Nothing of the study must be there.
    pub(in super::super) fn greet(&self, host: &RemoteHost) -> Result<(), Failure> {
        ask(host, &self.words(&["--version".to_owned()])).map(drop)
    }

    fn words(&self, arguments: &[String]) -> Vec<String> {
        let mut words = self.preparation.clone();
        words.push(self.program.display().to_string());
        words.extend_from_slice(arguments);
        words
    }
}

fn ask(host: &RemoteHost, words: &[String]) -> Result<String, Failure> {
    let (status, output, complaints) = run(host.command(words))?;
    if status.success() { Ok(output) } else { Err(failure(status, &complaints)) }
}

fn run(mut command: Command) -> Result<(ExitStatus, String, String), Failure> {
    // Ctrl-C in the terminal must reach the controller only.
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child =
        command.spawn().map_err(|error| Failure::new(FailureKind::Environment, "its remote shell could not be started").because(error))?;
    let (output, complaints) = (Pipe::new("output", child.stdout.take()), Pipe::new("complaints", child.stderr.take()));
    let status = wait(&mut child)?;
    let deadline = Instant::now() + Duration::from_millis(PIPE_WAIT_MS);
    Ok((status, output.text(deadline), complaints.text(deadline)))
}

fn wait(child: &mut Child) -> Result<ExitStatus, Failure> {
    let deadline = Instant::now() + Duration::from_secs(VISIT_S);
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if Instant::now() < deadline => sleep(Duration::from_millis(POLL_MS)),
            Ok(None) => {
                end(child);
                return Err(Failure::new(FailureKind::Environment, format!("it did not answer within {VISIT_S} s")));
            }
            Err(error) => {
                end(child);
                return Err(Failure::new(FailureKind::Environment, "its remote shell cannot be waited for").because(error));
            }
        }
    }
}

fn end(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw)
        && let Err(error) = kill_process_group(group, Signal::KILL)
    {
        tracing::debug!(%error, "a remote shell was already gone");
    }
    if let Err(error) = child.wait() {
        tracing::debug!(%error, "a remote shell that was killed could not be waited for");
    }
}

/// What a pipe brings, read on a thread, so that neither pipe fills up while the other is read.
struct Pipe {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Pipe {
    fn new(name: &str, pipe: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let kept = bytes.clone();
        let read = move |pipe| {
            let mut pipe = Read::take(pipe, MAX_OUTPUT_BYTES);
            let mut part = [0; 4096];
            // What cannot be read is no report, and that is told.
            while let Ok(count @ 1..) = pipe.read(&mut part) {
                if let Ok(mut bytes) = kept.lock() {
                    bytes.extend_from_slice(&part[..count]);
                }
            }
        };
        let reader = pipe.and_then(|pipe| thread::Builder::new().name(name.to_owned()).spawn(move || read(pipe)).ok());
        Self { bytes, reader }
    }

    /// What has come. A connection that the remote shell leaves open for the next time may hold the pipe, so its end is not waited for
    /// long.
    fn text(self, deadline: Instant) -> String {
        while self.reader.as_ref().is_some_and(|reader| !reader.is_finished()) && Instant::now() < deadline {
            sleep(Duration::from_millis(POLL_MS));
        }
        self.bytes.lock().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }
}

/// A visit that has ended with another code than 0.
fn failure(status: ExitStatus, complaints: &str) -> Failure {
    let said = complaints.lines().find_map(|line| line.strip_prefix("error: ")).unwrap_or_else(|| last_line(complaints));
    let said: String = said.chars().take(MAX_LINE_CHARS).collect();
    let (what, hint) = match status.code() {
        Some(NOT_REACHED) | None => {
            ("it cannot be reached", Some("try the remote shell by hand: it must ask for no password, and know the host's key"))
        }
        Some(code) if NOT_RUN.contains(&code) => ("this program cannot be run there", Some(SAME_PROGRAMS)),
        Some(_) => ("this program fails there", None),
    };
    let failure = Failure::new(FailureKind::Environment, what).found(shown(status));
    let failure = if said.is_empty() { failure } else { failure.because(said) };
    hint.map_or(failure.clone(), |hint| failure.hint(hint))
}

fn last_line(text: &str) -> &str {
    text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A visitor whose remote shell is this script; `$1` is the host and `$2` the line.
    fn visit(script: &str) -> Result<Report, Failure> {
        let folder = StudyFolder::new(PathBuf::from("/studies/it's"));
        let visitor = Visitor { preparation: Vec::new(), program: PathBuf::from("/bin/cloze"), folder };
        let command = ["sh", "-c", script, "ssh"].map(str::to_owned);
        visitor.visit(&RemoteHost::by_shell("n1", &command), &Orders { host: "n1".to_owned(), ..Orders::default() })
    }

    #[test]
    fn a_report_is_found_and_no_report_is_a_failure_in_words() {
        assert!(visit(r#"echo welcome; echo '{"visit":1,"batches":{}}'"#).is_ok());
        // (script, what, cause)
        let cases = [
            ("echo 'ssh: connect to host n1: No route' >&2; exit 255", "it cannot be reached", "ssh: connect to host n1: No route"),
            ("echo 'sh: not found' >&2; exit 127", "this program cannot be run there", "sh: not found"),
            ("printf 'error: no study\\n\\nhint: x\\n' >&2; exit 4", "this program fails there", "no study"),
            ("kill -9 $$", "it cannot be reached", ""),
        ];
        for (script, what, cause) in cases {
            let failure = visit(script).unwrap_err();
            assert_eq!(
                (failure.kind, failure.what.as_str(), failure.cause.as_deref().unwrap_or_default()),
                (FailureKind::Environment, what, cause),
                "{script}"
            );
        }
        let other = visit("echo nonsense").unwrap_err();
        assert_eq!((other.what.as_str(), other.found.as_deref()), ("another version of this program is there", Some("nonsense")));
        // The host, and one line.
        let told = visit("echo \"$1|$2|$#\" >&2; exit 9").unwrap_err();
        assert_eq!(told.cause.as_deref(), Some("n1|/bin/cloze sweep visit '/studies/it'\\''s' '--host=n1'|2"));
    }
}
