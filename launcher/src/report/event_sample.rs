//! The events of a run, as much of them as a report needs.
//!
//! A short log is read whole. Of a long one evenly spread blocks are read, the first and the last bytes among them: state, failure and
//! newest step stand at its end, and a curve over thousands of steps needs no more than some hundred of them.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use cloze_cluster::{Event, Recorded};
use cloze_recipes::failure::{Failure, FailureKind};

use crate::view::RunView;

/// How much of an event log is read.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Most bytes in all.
    pub max_bytes: u64,
    /// Blocks that a longer log is sampled in; at least 2.
    pub num_blocks: u64,
}

/// What was read of an event log.
#[derive(Clone, Debug, Default)]
pub struct EventSample {
    /// The run after the events that were read.
    pub view: RunView,
    /// Unix time of the first event, in seconds.
    pub first_time: Option<f64>,
    /// Seconds that controllers lived, times their workers. An upper bound where parts of the log were left out.
    pub worker_seconds: f64,
    /// Lines that are no JSON.
    pub damaged_lines: u64,
    /// Bytes of the log that were not looked at.
    pub left_out_bytes: u64,
    /// Start and workers of the controller that wrote the newest event.
    controller: Option<(f64, u32)>,
}

/// Reads an event log; `None` where there is none. Fails with kind `Storage` when it cannot be read.
pub fn read(path: &Path, sampling: Sampling) -> Result<Option<EventSample>, Failure> {
    let unreadable =
        |error: std::io::Error| Failure::new(FailureKind::Storage, "the event log cannot be read").at(path.display()).because(error);
    if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
        return Err(Failure::new(FailureKind::Damaged, "no plain file").at(path.display()));
    }
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    };
    let length = file.metadata().map_err(unreadable)?.len();
    let mut sample = EventSample::default();
    let mut block = Vec::new();
    for (start, size) in blocks(length, sampling) {
        block.clear();
        file.seek(SeekFrom::Start(start)).map_err(unreadable)?;
        (&mut file).take(size).read_to_end(&mut block).map_err(unreadable)?;
        sample.take_in(whole_lines(&block, start == 0));
    }
    sample.left_out_bytes = length.saturating_sub(blocks(length, sampling).iter().map(|(_, size)| size).sum());
    sample.close_controller();
    Ok(Some(sample))
}

/// Start and size of the parts that are read.
fn blocks(length: u64, sampling: Sampling) -> Vec<(u64, u64)> {
    if length <= sampling.max_bytes {
        return vec![(0, length)];
    }
    // The ends say how the run began and how it stands: each of them is a quarter of what is read.
    let end = sampling.max_bytes / 4;
    let num_between = sampling.num_blocks.saturating_sub(2);
    let size = (sampling.max_bytes - 2 * end) / num_between.max(1);
    let free = length - 2 * end;
    let between = (0..num_between).map(|block| (end + (free - size) * (block + 1) / (num_between + 1), size));
    [(0, end)].into_iter().chain(between).chain([(length - end, end)]).collect()
}

/// The lines that a block holds from end to end: the first part of one that begins before it and of one that ends behind it are left out.
fn whole_lines(block: &[u8], is_first: bool) -> &[u8] {
    let start = if is_first { 0 } else { block.iter().position(|&byte| byte == b'\n').map_or(block.len(), |end| end + 1) };
    let end = block.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    block.get(start..end).unwrap_or_default()
}

impl EventSample {
    fn take_in(&mut self, lines: &[u8]) {
        for line in lines.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice::<Recorded>(line) {
                Ok(recorded) => self.apply(&recorded),
                // An event of another version of cloze.
                Err(error) if error.is_data() => {}
                Err(_) => self.damaged_lines += 1,
            }
        }
    }

    fn apply(&mut self, recorded: &Recorded) {
        self.first_time.get_or_insert(recorded.time);
        if let Event::RunStarted { workers, .. } = recorded.event {
            self.close_controller();
            self.controller = Some((recorded.time, workers));
        }
        self.view.apply(recorded);
    }

    /// Adds what the controller up to the newest event cost.
    fn close_controller(&mut self) {
        if let Some((started, workers)) = self.controller.take() {
            self.worker_seconds += (self.view.updated - started).max(0.0) * f64::from(workers);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::view::RunState;
    use crate::view::fixtures::{recorded, start, step};

    const ALL: Sampling = Sampling { max_bytes: 1 << 20, num_blocks: 4 };

    fn log(steps: u64) -> String {
        let events = start()
            .into_iter()
            .chain((1..=steps).map(|number| step(1, number, 2.0)))
            .chain([Event::RunFinished { step: steps, seconds: 9.0 }]);
        recorded(events).iter().map(|event| serde_json::to_string(event).unwrap() + "\n").collect()
    }

    #[test]
    fn a_short_log_is_read_whole_and_a_torn_line_is_no_damage() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        assert!(read(&path, ALL).unwrap().is_none());
        fs::write(&path, log(20) + "{\"time\":").unwrap();
        let sample = read(&path, ALL).unwrap().unwrap();
        assert_eq!((sample.view.state, sample.view.progress.step, sample.view.curve.points.len()), (RunState::Finished, 20, 20));
        assert_eq!((sample.damaged_lines, sample.left_out_bytes), (0, 0));
        // Two workers from second 0 to the end; the start of a run is 7 events, then 20 steps.
        assert!((sample.worker_seconds - 2.0 * 27.0).abs() < 1e-9, "{}", sample.worker_seconds);
    }

    #[test]
    fn of_a_long_log_the_ends_and_parts_between_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        fs::write(&path, log(5000)).unwrap();
        let sample = read(&path, Sampling { max_bytes: 64 << 10, num_blocks: 8 }).unwrap().unwrap();
        assert_eq!((sample.view.state, sample.view.progress.step, sample.view.name.as_str()), (RunState::Finished, 5000, "demo"));
        let steps: Vec<u64> = sample.view.curve.points.iter().map(|point| point.step).collect();
        assert!(steps.len() > 100 && steps.len() < 1000, "{}", steps.len());
        for eighth in 0..8 {
            assert!(steps.iter().any(|step| (eighth * 625..(eighth + 2) * 625).contains(step)), "nothing of eighth {eighth}");
        }
        assert!(sample.left_out_bytes > 500_000);
        assert_eq!(sample.damaged_lines, 0);
    }

    #[test]
    fn damaged_lines_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        fs::write(&path, log(3) + "{\"time\":1,\"event\":\"dance\"}\n\0\0\0\n").unwrap();
        let sample = read(&path, ALL).unwrap().unwrap();
        assert_eq!((sample.damaged_lines, sample.view.progress.step), (1, 3));
        fs::write(&path, "").unwrap();
        assert_eq!(read(&path, ALL).unwrap().unwrap().first_time, None);
    }
}
