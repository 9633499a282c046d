//! A worker's log. The process itself writes its output there, so that it loses nothing when its controller is killed; this
//! program keeps the file within bounds and reads its end.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

/// A log above this size, in bytes, is put aside when the slot's next process starts; the one put aside before it goes.
const MAX_LOG_BYTES: u64 = 64 << 20;

/// How far back from the end the last lines are looked for, in bytes.
const MAX_TAIL_BYTES: u64 = 64 << 10;

/// Lines that are kept for the message about a worker that ended.
const TAIL_LINES: usize = 8;

/// Longest kept line, in characters.
const MAX_TAIL_LINE_CHARACTERS: usize = 400;

/// How the line begins that this program writes for each process.
const HEADER: &str = "== worker ";

/// Opens a slot's log to append to it; one that has grown too large is put aside first.
pub(super) fn open(path: &Path) -> io::Result<File> {
    open_within(path, MAX_LOG_BYTES)
}

fn open_within(path: &Path, max_bytes: u64) -> io::Result<File> {
    if fs::metadata(path).is_ok_and(|log| log.len() > max_bytes) {
        let mut aside = path.as_os_str().to_owned();
        aside.push(".1");
        fs::rename(path, aside)?;
    }
    OpenOptions::new().append(true).create(true).open(path)
}

/// The line that tells the processes of a log apart.
pub(super) fn header(worker: u32, process_id: u32) -> String {
    format!("{HEADER}{worker}, process {process_id} ==\n")
}

/// The last lines of a log from this byte on, the oldest first.
pub(super) fn tail(path: &Path, from: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let start = from.max(file.metadata()?.len().saturating_sub(MAX_TAIL_BYTES));
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(MAX_TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut lines: Vec<&str> = text.lines().filter(|line| !line.starts_with(HEADER)).collect();
    lines.drain(..lines.len().saturating_sub(TAIL_LINES));
    let lines: Vec<String> = lines.into_iter().map(|line| line.chars().take(MAX_TAIL_LINE_CHARACTERS).collect()).collect();
    Ok(lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_last_lines_of_the_last_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker-0.log");
        let old = "== worker 0, process 1 ==\nold\n";
        let many: String = (0..100).map(|number| format!("line {number}\n")).collect();
        let long = format!("{}\n", "x".repeat(2 * MAX_TAIL_BYTES as usize));
        let cases = [
            ("nothing", String::new(), 0, String::new()),
            ("without a line end", "a\n\nb".to_owned(), 3, "a\n\nb".to_owned()),
            ("many lines", many, TAIL_LINES, (92..100).map(|number| format!("line {number}\n")).collect::<String>().trim_end().to_owned()),
            ("a long line", long, 1, "x".repeat(MAX_TAIL_LINE_CHARACTERS)),
        ];
        for (name, output, lines, expected) in cases {
            fs::write(&path, format!("{old}{}{output}", header(0, 2))).unwrap();
            let found = tail(&path, old.len() as u64).unwrap();
            assert_eq!((found.lines().count(), found), (lines, expected), "{name}");
        }
    }

    #[test]
    fn words_before_the_header_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker-0.log");
        fs::write(&path, format!("too quick\n{}", header(0, 2))).unwrap();
        assert_eq!(tail(&path, 0).unwrap(), "too quick");
    }

    #[test]
    fn a_large_log_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker-0.log");
        let aside = folder.path().join("worker-0.log.1");
        for (text, is_put_aside) in [("12345678", false), ("123456789", true), ("abcdefghi", true)] {
            fs::write(&path, text).unwrap();
            drop(open_within(&path, 8).unwrap());
            assert_eq!(fs::read_to_string(&path).unwrap().is_empty(), is_put_aside, "{text}");
            assert_eq!(fs::read_to_string(&aside).ok().as_deref(), is_put_aside.then_some(text));
        }
    }
}
