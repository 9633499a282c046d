//! `events.jsonl`: one line of JSON for each event, visible as soon as it is written.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use cloze_cluster::Recorded;

/// How far back from the end the start of a torn last line is looked for, in bytes; the largest event is far shorter.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// The event log.
#[derive(Debug)]
pub struct Jsonl {
    file: File,
}

impl Jsonl {
    /// Opens the log to append to it. A last line that a crash cut off is removed, so that every line can be read.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: open_whole_lines(path)? })
    }

    /// Appends one event with a single write. Floating-point numbers keep their full precision; one that is not finite
    /// becomes null.
    pub fn write(&mut self, recorded: &Recorded) -> io::Result<()> {
        let mut line = serde_json::to_vec(recorded)?;
        line.push(b'\n');
        self.file.write_all(&line)
    }
}

/// Opens a file of lines to append to it, without a last line that a crash cut off.
pub(super) fn open_whole_lines(path: &Path) -> io::Result<File> {
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    let whole = whole_lines_bytes(&mut file)?;
    file.set_len(whole)?;
    file.seek(SeekFrom::End(0))?;
    Ok(file)
}

/// Length of the file up to its last line feed.
fn whole_lines_bytes(file: &mut File) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let start = length.saturating_sub(MAX_LINE_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut end = Vec::new();
    io::Read::by_ref(file).take(MAX_LINE_BYTES).read_to_end(&mut end)?;
    match end.iter().rposition(|&byte| byte == b'\n') {
        Some(position) => Ok(start + position as u64 + 1),
        None if start == 0 => Ok(0),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, format!("the last {MAX_LINE_BYTES} bytes hold no line end"))),
    }
}

#[cfg(test)]
mod tests {
    use cloze_cluster::Event;

    use super::*;

    fn warning(message: &str) -> Recorded {
        Recorded { time: 1.5, event: Event::Warning { message: message.to_owned() } }
    }

    #[test]
    fn lines_are_appended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        for message in ["one", "two"] {
            Jsonl::open(&path).unwrap().write(&warning(message)).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "{\"time\":1.5,\"event\":\"warning\",\"message\":\"one\"}\n{\"time\":1.5,\"event\":\"warning\",\"message\":\"two\"}\n"
        );
    }

    #[test]
    fn a_torn_line_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        for (before, after) in [("{}\n{\"time", "{}\n"), ("{\"ti", ""), ("", ""), ("{}\n", "{}\n")] {
            std::fs::write(&path, before).unwrap();
            drop(Jsonl::open(&path).unwrap());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), after, "{before:?}");
        }
    }
}
