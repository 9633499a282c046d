//! How far an earlier controller's events tell of a run, so that its successor tells of every step once.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use cloze_cluster::{Event, Held, Recorded};

/// How much of a log's end is searched, in bytes: thousands of events. Where none of them is a step, the newest steps may be told twice.
const MAX_TAIL_BYTES: u64 = 1 << 20;

/// The newest step of which a log tells, or the state with which its generation began. Lines that cannot be read are passed over.
pub(super) fn last_told(events: &Path) -> io::Result<Option<Held>> {
    Ok(last_step(&tail_of(events)?))
}

/// The newest generation of which a log tells; 0 where it tells of none.
pub(super) fn last_generation(events: &Path) -> io::Result<u64> {
    let tail = tail_of(events)?;
    let found = newest_first(&tail).find_map(|event| match event {
        Event::GenerationStarted { generation, .. } | Event::Step { generation, .. } | Event::Progress { generation, .. } => {
            Some(generation)
        }
        _ => None,
    });
    Ok(found.unwrap_or(0))
}

/// The end of a log; nothing where there is none.
fn tail_of(events: &Path) -> io::Result<Vec<u8>> {
    let mut tail = Vec::new();
    let mut file = match File::open(events) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(tail),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MAX_TAIL_BYTES)))?;
    file.take(MAX_TAIL_BYTES).read_to_end(&mut tail)?;
    Ok(tail)
}

fn newest_first(lines: &[u8]) -> impl Iterator<Item = Event> + use<'_> {
    let recorded = lines.rsplit(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice::<Recorded>(line).ok());
    recorded.map(|recorded| recorded.event)
}

fn last_step(lines: &[u8]) -> Option<Held> {
    newest_first(lines).find_map(|event| match event {
        Event::Step { generation, report } => Some(Held { generation, step: report.step }),
        Event::Restored { generation, step, .. } => Some(Held { generation, step }),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::fixtures::step;

    fn line(event: Event) -> String {
        serde_json::to_string(&Recorded { time: 1.0, event }).unwrap() + "\n"
    }

    fn restored(generation: u64, step: u64) -> Event {
        Event::Restored { generation, step, source: "memory".to_owned(), skipped: Vec::new(), seconds: 0.1 }
    }

    #[test]
    fn the_newest_step_or_state_counts() {
        let warning = || line(Event::Warning { message: "late".to_owned() });
        let stepped = line(step(1, 7, 0.5));
        let cases = [
            ("nothing", String::new(), None),
            ("no step", warning(), None),
            ("a step", stepped.clone() + &warning(), Some(Held { generation: 1, step: 7 })),
            ("a torn step", stepped.clone() + &line(step(1, 8, 0.5))[..30], Some(Held { generation: 1, step: 7 })),
            ("a newer generation", stepped + &line(restored(2, 5)), Some(Held { generation: 2, step: 5 })),
        ];
        for (name, text, expected) in cases {
            assert_eq!(last_step(text.as_bytes()), expected, "{name}");
        }
    }

    #[test]
    fn only_the_end_of_a_long_log_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        assert_eq!(last_told(&path).unwrap(), None);
        let text: String = (1..=20_000).map(|number| line(step(1, number, 0.5))).collect();
        assert!(text.len() as u64 > 2 * MAX_TAIL_BYTES);
        std::fs::write(&path, text).unwrap();
        assert_eq!(last_told(&path).unwrap(), Some(Held { generation: 1, step: 20_000 }));
    }

    #[test]
    fn a_generation_that_came_to_nothing_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        assert_eq!(last_generation(&path).unwrap(), 0);
        let text = line(step(1, 7, 0.5)) + &line(crate::view::fixtures::generation(2, &[0])) + &line(Event::RunStopped { step: 7 });
        std::fs::write(&path, text).unwrap();
        assert_eq!(last_generation(&path).unwrap(), 2);
    }
}
