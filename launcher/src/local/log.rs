//! A worker's log: its standard output and error, line by line, with bounds on a line and on the file.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};

/// Longest line, in bytes; a longer one is broken into several.
const MAX_LINE_BYTES: usize = 1 << 16;

/// Most that one controller writes to one slot's log, in bytes; what comes after is dropped, and the log says so.
const MAX_LOG_BYTES: u64 = 1 << 30;

/// Lines that are kept for the message about a worker that failed.
const TAIL_LINES: usize = 8;

/// Longest kept line, in characters.
const MAX_TAIL_LINE_CHARACTERS: usize = 400;

/// The log file of one worker slot, and its last lines.
#[derive(Debug)]
pub(super) struct WorkerLog {
    file: File,
    bytes_left: u64,
    tail: VecDeque<String>,
}

impl WorkerLog {
    /// Opens the log to append to it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        Ok(Self { file, bytes_left: MAX_LOG_BYTES, tail: VecDeque::new() })
    }

    /// Appends a line that this program says.
    pub(super) fn note(&mut self, text: &str) -> io::Result<()> {
        self.append(text.as_bytes())
    }

    /// Appends a line of the worker.
    fn line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(String::from_utf8_lossy(line).chars().take(MAX_TAIL_LINE_CHARACTERS).collect());
        self.append(line)
    }

    /// The worker's last lines, the oldest first.
    pub(super) fn tail(&self) -> String {
        self.tail.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.bytes_left == 0 {
            return Ok(());
        }
        let bytes = line.len() as u64 + 1;
        let last: &[u8] = b"the log is full; later lines are dropped";
        let text = if bytes >= self.bytes_left { last } else { line };
        self.bytes_left = self.bytes_left.saturating_sub(bytes);
        self.file.write_all(&[text, b"\n"].concat())
    }
}

/// Copies a process's output into its log until it ends.
pub(super) async fn pump<R: AsyncRead + Unpin>(output: R, log: &Mutex<WorkerLog>) -> io::Result<()> {
    let mut reader = BufReader::new(output);
    let mut line = Vec::new();
    loop {
        let available = reader.fill_buf().await?;
        if available.is_empty() {
            return if line.is_empty() { Ok(()) } else { write_line(log, &line) };
        }
        let room = &available[..available.len().min(MAX_LINE_BYTES - line.len())];
        let (part, used, complete) = match room.iter().position(|&byte| byte == b'\n') {
            Some(end) => (&room[..end], end + 1, true),
            None => (room, room.len(), line.len() + room.len() == MAX_LINE_BYTES),
        };
        line.extend_from_slice(part);
        reader.consume(used);
        if complete {
            write_line(log, &line)?;
            line.clear();
        }
    }
}

fn write_line(log: &Mutex<WorkerLog>, line: &[u8]) -> io::Result<()> {
    log.lock().unwrap_or_else(PoisonError::into_inner).line(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn logged(output: &[u8]) -> (String, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker-0.log");
        let log = Mutex::new(WorkerLog::open(&path).unwrap());
        pump(output, &log).await.unwrap();
        let tail = log.into_inner().unwrap().tail();
        (std::fs::read_to_string(&path).unwrap(), tail)
    }

    #[tokio::test]
    async fn lines_are_copied() {
        let cases = [("", "", ""), ("a\nb\n", "a\nb\n", "a\nb"), ("a\n\nb", "a\n\nb\n", "a\n\nb")];
        for (output, file, tail) in cases {
            assert_eq!(logged(output.as_bytes()).await, (file.to_owned(), tail.to_owned()), "{output:?}");
        }
    }

    #[tokio::test]
    async fn long_lines_are_broken_and_nothing_is_lost() {
        let output = vec![b'x'; 2 * MAX_LINE_BYTES + 5];
        let (file, tail) = logged(&output).await;
        let lengths: Vec<usize> = file.lines().map(str::len).collect();
        assert_eq!(lengths, [MAX_LINE_BYTES, MAX_LINE_BYTES, 5]);
        assert!(tail.lines().all(|line| line.len() <= MAX_TAIL_LINE_CHARACTERS));
    }

    #[tokio::test]
    async fn the_tail_is_the_last_lines() {
        let output: Vec<u8> = (0..100).flat_map(|number| format!("line {number}\n").into_bytes()).collect();
        let (_, tail) = logged(&output).await;
        let lines: Vec<&str> = tail.lines().collect();
        assert_eq!((lines.len(), lines[0], lines[TAIL_LINES - 1]), (TAIL_LINES, "line 92", "line 99"));
    }

    #[test]
    fn a_full_log_says_so_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker-0.log");
        let mut log = WorkerLog { bytes_left: 8, ..WorkerLog::open(&path).unwrap() };
        for line in ["abc", "defgh", "ijk"] {
            log.line(line.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "abc\nthe log is full; later lines are dropped\n");
        assert_eq!(log.tail(), "abc\ndefgh\nijk");
    }
}
