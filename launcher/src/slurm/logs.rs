//! The logs of a run with jobs, one after another or as they grow.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use crate::run_folder::{RunPaths, storage};

/// Interval at which logs are looked at while they are followed, in milliseconds.
const FOLLOW_MS: u64 = 300;

/// Most that is read of one log before the next one has its turn, in bytes.
const TURN_BYTES: u64 = 1 << 20;

/// Which logs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogChoice {
    /// Of this worker only.
    pub worker: Option<u32>,
    /// Of this job only, as in `12` or `12_3`.
    pub job: Option<String>,
    /// Go on while they grow.
    pub follow: bool,
}

/// What a log belongs to, in the order in which logs are shown.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Job(u64, String),
    Node(String),
    Worker(u32),
}

/// One log and what was read of it.
#[derive(Debug, Default)]
struct Place {
    offset: u64,
    /// The beginning of a line that is still being written.
    rest: Vec<u8>,
}

/// Prints every line of the chosen logs behind its source. Says whether there was any log; with `follow` it ends only with an error, for
/// instance when somebody closes the other end.
pub fn show_logs(run: &RunPaths, choice: &LogChoice, output: &mut dyn Write) -> anyhow::Result<bool> {
    let mut places: BTreeMap<Source, Place> = BTreeMap::new();
    loop {
        let mut is_new = false;
        for (source, path) in sources(run, choice)? {
            let place = places.entry(source.clone()).or_default();
            while read_turn(&source, &path, place, output)? {
                is_new = true;
            }
            if !choice.follow {
                print(&source, &std::mem::take(&mut place.rest), output)?;
            }
        }
        if !choice.follow {
            return Ok(!places.is_empty());
        }
        if !is_new {
            output.flush()?;
            sleep(Duration::from_millis(FOLLOW_MS));
        }
    }
}

/// The chosen logs that are there.
fn sources(run: &RunPaths, choice: &LogChoice) -> anyhow::Result<BTreeMap<Source, PathBuf>> {
    let folder = run.root().join("logs");
    let failed = |error: io::Error| storage("list the logs of the run", &folder, &error);
    let mut found = BTreeMap::new();
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries.map_err(failed)?,
    };
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let source = path.file_name().and_then(|name| name.to_str()).and_then(source_of);
        if let Some(source) = source.filter(|source| is_chosen(source, choice)) {
            found.insert(source, path);
        }
    }
    Ok(found)
}

/// From the name of a file.
fn source_of(name: &str) -> Option<Source> {
    let name = name.strip_suffix(".log")?;
    let (kind, rest) = name.split_once('-')?;
    match kind {
        "job" => Some(Source::Job(rest.split('_').next()?.parse().ok()?, rest.to_owned())),
        "host" => Some(Source::Node(rest.to_owned())),
        "worker" => rest.parse().ok().map(Source::Worker),
        _ => None,
    }
}

fn is_chosen(source: &Source, choice: &LogChoice) -> bool {
    match (source, choice.worker, &choice.job) {
        (_, None, None) => true,
        (Source::Worker(worker), Some(chosen), _) => *worker == chosen,
        (Source::Job(_, job), _, Some(chosen)) => job == chosen || job.split('_').next() == Some(chosen),
        _ => false,
    }
}

/// Prints the next lines of one log; whether there may be more.
fn read_turn(source: &Source, path: &Path, place: &mut Place, output: &mut dyn Write) -> anyhow::Result<bool> {
    let failed = |error: io::Error| storage("read a log of the run", path, &error);
    // Opened anew each time, since a network file system shows what another host wrote only then.
    let mut file = File::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.len() < place.offset {
        // Another process of the slot has begun a new one.
        *place = Place::default();
    }
    file.seek(SeekFrom::Start(place.offset)).map_err(failed)?;
    let read = file.take(TURN_BYTES).read_to_end(&mut place.rest).map_err(failed)?;
    place.offset += read as u64;
    if let Some(end) = place.rest.iter().rposition(|&byte| byte == b'\n') {
        let rest = place.rest.split_off(end + 1);
        print(source, &std::mem::replace(&mut place.rest, rest), output)?;
    }
    Ok(read as u64 == TURN_BYTES)
}

fn print(source: &Source, text: &[u8], output: &mut dyn Write) -> io::Result<()> {
    let prefix = match source {
        Source::Job(_, job) => format!("job {job}"),
        Source::Node(node) => format!("node {node}"),
        Source::Worker(worker) => format!("worker {worker}"),
    };
    for line in String::from_utf8_lossy(text).lines() {
        writeln!(output, "{prefix} | {line}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(run: &RunPaths, choice: &LogChoice) -> String {
        let mut output = Vec::new();
        show_logs(run, choice, &mut output).unwrap();
        String::from_utf8(output).unwrap()
    }

    #[test]
    fn lines_stand_behind_their_source() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunPaths::new(folder.path().to_owned());
        assert!(!show_logs(&run, &LogChoice::default(), &mut Vec::new()).unwrap());
        fs::create_dir(folder.path().join("logs")).unwrap();
        let files =
            [("job-12.log", "a\nb"), ("job-9.log", "c\n"), ("worker-0.log", "w\n"), ("host-n2.log", "h\n"), ("worker-0.log.1", "old\n")];
        for (name, text) in files {
            fs::write(folder.path().join("logs").join(name), text).unwrap();
        }
        assert_eq!(shown(&run, &LogChoice::default()), "job 9 | c\njob 12 | a\njob 12 | b\nnode n2 | h\nworker 0 | w\n");
        assert_eq!(shown(&run, &LogChoice { worker: Some(0), ..LogChoice::default() }), "worker 0 | w\n");
        assert_eq!(shown(&run, &LogChoice { job: Some("12".to_owned()), ..LogChoice::default() }), "job 12 | a\njob 12 | b\n");
        assert_eq!(shown(&run, &LogChoice { worker: Some(7), ..LogChoice::default() }), "");
    }

    #[test]
    fn only_whole_lines_are_read_while_a_log_grows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job-1.log");
        let (source, mut place, mut output) = (Source::Job(1, "1".to_owned()), Place::default(), Vec::new());
        for (text, expected) in [("one\ntw", "job 1 | one\n"), ("one\ntwo\n", "job 1 | one\njob 1 | two\n")] {
            fs::write(&path, text).unwrap();
            read_turn(&source, &path, &mut place, &mut output).unwrap();
            assert_eq!(String::from_utf8(output.clone()).unwrap(), expected);
        }
        // A new log under the old name.
        fs::write(&path, "x\n").unwrap();
        read_turn(&source, &path, &mut place, &mut output).unwrap();
        assert!(String::from_utf8(output).unwrap().ends_with("job 1 | x\n"));
    }
}
