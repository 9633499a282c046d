//! The events of a run as its controller, perhaps on another host, writes them down.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;

use cloze_cluster::{Event, Recorded};

/// Most that is read at once, in bytes; the largest event is far shorter.
const MAX_READ_BYTES: u64 = 4 << 20;

/// A place in `events.jsonl`. Only whole lines are taken, so that a line that is being written is read when it is complete.
#[derive(Debug)]
pub(super) struct EventTail {
    path: PathBuf,
    offset: u64,
}

impl EventTail {
    /// The beginning of a log, which may not be there yet.
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, offset: 0 }
    }

    /// The next events; none where there are no new ones. The file is opened anew each time, since a network file system shows
    /// what another host wrote only then. A line of another version of this program is passed over.
    pub(super) fn read(&mut self) -> io::Result<Vec<Event>> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        file.take(MAX_READ_BYTES).read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        if whole == 0 && bytes.len() as u64 == MAX_READ_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{MAX_READ_BYTES} bytes hold no line end")));
        }
        self.offset += whole as u64;
        let lines = bytes[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        Ok(lines.filter_map(|line| serde_json::from_slice::<Recorded>(line).ok()).map(|recorded| recorded.event).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_whole_line_is_read_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let mut tail = EventTail::new(path.clone());
        assert!(tail.read().unwrap().is_empty());
        let line = |step| serde_json::to_string(&Recorded { time: 1.0, event: Event::RunStopped { step } }).unwrap();
        let (first, second) = (line(1), line(2));
        let (begin, rest) = second.split_at(20);
        let cases = [
            (format!("{first}\n{{\"event\":\"unheard_of\"}}\n{begin}"), vec![Event::RunStopped { step: 1 }]),
            (String::new(), Vec::new()),
            (format!("{rest}\n"), vec![Event::RunStopped { step: 2 }]),
        ];
        let mut written = String::new();
        for (text, events) in cases {
            written.push_str(&text);
            std::fs::write(&path, &written).unwrap();
            assert_eq!(tail.read().unwrap(), events, "{text}");
        }
    }
}
