//! What a process does that does not get on: its threads as the kernel sees them, and their stacks where a debugger is installed.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// Longest time for the kernel's part; reading `/proc` takes milliseconds unless the kernel itself is stuck.
const KERNEL_TIMEOUT_MS: u64 = 500;

/// Longest time for one debugger. With two of them and the kernel's part a dump takes less than 3 s, for which a run waits.
const DEBUGGER_TIMEOUT_MS: u64 = 2_300;

/// Threads that are listed; libtorch and its runtime have some dozens.
const MAX_THREADS: usize = 512;

/// Longest text of a debugger that is kept, in bytes.
const MAX_DEBUGGER_BYTES: u64 = 1 << 20;

/// Writes the dump of a process. Fails when the file cannot be written; what cannot be read is named in the dump.
pub(super) async fn write_dump(process_id: u32, path: &Path) -> io::Result<()> {
    let kernel = timeout(Duration::from_millis(KERNEL_TIMEOUT_MS), spawn_blocking(move || kernel_text(process_id))).await;
    let mut text = match kernel {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => format!("the kernel's view could not be taken: {error}\n"),
        Err(_) => format!("the kernel's view was not there within {KERNEL_TIMEOUT_MS} ms\n"),
    };
    // A stopped process has nothing to show that would be worth the seconds for which the run waits.
    let is_stopped = text.lines().any(|line| line.starts_with("State:\tT"));
    let stacks = if is_stopped { "\nstopped by a signal, so no stacks were taken\n".to_owned() } else { debugger_text(process_id).await };
    text.push_str(&stacks);
    fs::write(path, text)
}

/// Status and threads of a process from `/proc`.
fn kernel_text(process_id: u32) -> String {
    let folder = format!("/proc/{process_id}");
    let mut text = format!("process {process_id}\n\n{}\n", read(&format!("{folder}/status")));
    let threads = match fs::read_dir(format!("{folder}/task")) {
        Ok(threads) => threads,
        Err(error) => return format!("{text}its threads cannot be listed: {error}\n"),
    };
    for thread in threads.flatten().take(MAX_THREADS) {
        let folder = thread.path();
        let of = |file: &str| read(&folder.join(file).to_string_lossy());
        let state = of("status").lines().find_map(|line| line.strip_prefix("State:").map(|state| state.trim().to_owned()));
        let state = state.unwrap_or_else(|| "unknown".to_owned());
        let name = thread.file_name();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "thread {} ({}): {state}; waits in {}; system call {}",
            name.to_string_lossy(),
            of("comm").trim(),
            of("wchan").trim(),
            of("syscall").trim()
        );
    }
    text
}

fn read(path: &str) -> String {
    fs::read(path).map_or_else(|error| format!("({path}: {error})"), |bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// The stacks of all threads by the first debugger that is installed.
async fn debugger_text(process_id: u32) -> String {
    let process = process_id.to_string();
    let process = process.as_str();
    let gdb = ["-p", process, "-batch", "-nx", "-ex", "thread apply all bt 24"];
    let debuggers: [(&str, &[&str]); 2] = [("eu-stack", &["-n", "24", "-p", process]), ("gdb", &gdb)];
    for (program, arguments) in debuggers {
        let mut command = Command::new(program);
        command.args(arguments).process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return format!("\n{program} cannot be started: {error}\n"),
        };
        let Some(output) = child.stdout.take() else { return format!("\n{program} has no output\n") };
        let mut bytes = Vec::new();
        let mut output = output.take(MAX_DEBUGGER_BYTES);
        let whole = timeout(Duration::from_millis(DEBUGGER_TIMEOUT_MS), output.read_to_end(&mut bytes)).await;
        let end = match whole {
            Ok(Ok(_)) => String::new(),
            Ok(Err(error)) => format!("\n{program}: {error}"),
            Err(_) => format!("\n{program} was ended after {DEBUGGER_TIMEOUT_MS} ms"),
        };
        return format!("\n{program}:\n{}{end}\n", String::from_utf8_lossy(&bytes));
    }
    "\nneither eu-stack nor gdb is installed, so there are no stacks\n".to_owned()
}

#[cfg(test)]
mod tests {
    use rustix::process::Signal;

    use super::super::record::send;
    use super::*;

    #[tokio::test]
    async fn a_stopped_process_is_dumped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dump.txt");
        let mut child = Command::new("sleep").arg("600").kill_on_drop(true).spawn().unwrap();
        let process_id = child.id().unwrap();
        send(process_id, Signal::STOP).unwrap();
        while !read(&format!("/proc/{process_id}/status")).contains("(stopped)") {
            tokio::task::yield_now().await;
        }
        write_dump(process_id, &path).await.unwrap();
        let text = fs::read_to_string(&path).unwrap();
        for part in
            [format!("process {process_id}\n"), "State:\tT (stopped)".to_owned(), format!("thread {process_id} (sleep): T (stopped)")]
        {
            assert!(text.contains(&part), "{part:?} in {text}");
        }
        assert!(text.ends_with("no stacks were taken\n"), "{text}");
        send(process_id, Signal::CONT).unwrap();
        write_dump(process_id, &path).await.unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(["eu-stack", "gdb"].iter().any(|name| text.contains(name)), "a debugger, or that there is none: {text}");
        child.kill().await.unwrap();
    }

    #[tokio::test]
    async fn a_process_that_is_gone_is_said_to_be() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dump.txt");
        // Above the largest process id of Linux, 2^22.
        write_dump(1 << 23, &path).await.unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("its threads cannot be listed"));
    }
}
