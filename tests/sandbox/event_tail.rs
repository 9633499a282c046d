//! The events of a long run as they come, each read once.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;

use serde_json::Value;

/// A place in an event log. Only whole lines are taken, so a line that a crash cut off is never seen.
pub struct EventTail {
    path: PathBuf,
    offset: u64,
}

impl EventTail {
    /// The beginning of a log, which may not be there yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, offset: 0 }
    }

    /// The events that came since the last call.
    pub fn read(&mut self) -> Vec<Value> {
        let Ok(mut file) = File::open(&self.path) else { return Vec::new() };
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(self.offset)).expect("go to a place in the events");
        file.read_to_end(&mut bytes).expect("read the events");
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        self.offset += whole as u64;
        let lines = bytes[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice(line).expect("every event is a line of JSON")).collect()
    }
}
