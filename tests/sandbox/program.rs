//! Programs under test: started with their output kept, bounded in time, and never outliving their test.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

/// Longest time for one program; the slowest one here takes less than a minute on a free machine.
const PROGRAM_TIMEOUT: Duration = Duration::from_mins(5);
/// Interval at which something is looked at again.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// How a program ended.
pub struct Outcome {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// Fails the test unless the program ended with this exit code.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "\n== stdout\n{}\n== stderr\n{}", self.stdout, self.stderr);
        self
    }

    /// Fails the test unless standard error contains every part.
    #[track_caller]
    pub fn expect_words(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(*part), "`{part}` is missing in:\n{}", self.stderr);
        }
        self
    }
}

/// A program that was started; it is killed when the value is dropped.
pub struct Process {
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
    shown: String,
}

impl Process {
    /// Starts a program and gives it an input of at most a few kilobytes.
    pub fn start(command: &mut Command, input: &str) -> Self {
        let shown = format!("{command:?}");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("start a program");
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).expect("write a program's input");
        }
        let (stdout, stderr) = (child.stdout.take().map(read_in_background), child.stderr.take().map(read_in_background));
        Self { child, stdout, stderr, shown }
    }

    /// Waits for the end; fails the test where it does not come.
    #[track_caller]
    pub fn wait(self) -> Outcome {
        self.wait_within(PROGRAM_TIMEOUT)
    }

    /// Waits for the end of a program that may take another time than usual.
    #[track_caller]
    pub fn wait_within(mut self, timeout: Duration) -> Outcome {
        let deadline = Instant::now() + timeout;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("look at a program") {
                break status;
            }
            assert!(Instant::now() < deadline, "not done after {timeout:?}: {}", self.shown);
            sleep(POLL_INTERVAL);
        };
        Outcome { code: status.code(), stdout: text_of(self.stdout.take()), stderr: text_of(self.stderr.take()) }
    }

    /// Ends the program with SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().expect("kill a program");
        self.child.wait().expect("wait for a killed program");
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.signal("TERM");
    }

    /// Sends a signal, such as `STOP`.
    pub fn signal(&self, name: &str) {
        assert!(send_signal(self.child.id(), name), "SIG{name} could not be sent to {}", self.shown);
    }

    /// Whether it has ended; what it wrote is still to be had from [`Process::wait`].
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("look at a program").is_some()
    }
}

impl Drop for Process {
    /// Nothing that a test started outlives it, also where the test fails.
    fn drop(&mut self) {
        // It may have ended long ago; either way it is gone after this.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Runs a program to its end.
#[track_caller]
pub fn run_command(command: &mut Command) -> Outcome {
    Process::start(command, "").wait()
}

/// Sends a signal, such as `KILL`; false where there is no such process any more.
pub fn send_signal(process_id: u32, name: &str) -> bool {
    let command = format!("kill -{name} {process_id}");
    let status = Command::new("sh").args(["-c", &command]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Waits until something holds; fails the test when that takes longer than `timeout`.
#[track_caller]
pub fn wait_until(what: &str, timeout: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + timeout;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within {timeout:?}");
        sleep(POLL_INTERVAL);
    }
}

/// A full pipe would stop the program, so its output is read while it runs.
fn read_in_background(mut stream: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("read a program's output");
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn text_of(reader: Option<JoinHandle<String>>) -> String {
    reader.expect("the output is read once").join().expect("read a program's output")
}
