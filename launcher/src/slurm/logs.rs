//! The logs of a run with jobs, one after another or as they grow.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};

use super::journal::{self, AttemptEvent};
use super::log_end::LogEnd;
use super::paths::JobPaths;
use crate::run_folder::{RunPaths, storage};

/// Interval at which logs are looked at while they are followed, in milliseconds.
const FOLLOW_MS: u64 = 300;

/// How long logs that are followed must be silent after the end of their run, in milliseconds: last words come after that end is told.
const SETTLED_MS: u64 = 1500;

/// Most that is read of one log before the next one has its turn, in bytes.
const TURN_BYTES: u64 = 1 << 20;

/// Which logs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogChoice {
    /// Of this worker only.
    pub worker: Option<u32>,
    /// Of this job only, as in `12` or `12_3`.
    pub job: Option<String>,
    /// Of this attempt only: the part of its job's log that is its own. Other logs go on over all attempts.
    pub attempt: Option<u32>,
    /// Go on while they grow, until the run is over.
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
    /// Whether the last line that said so began the chosen attempt.
    is_in_attempt: bool,
}

/// Prints every line of the chosen logs behind its source, once: what a node says is in the log of the job too. Says whether there was any log.
/// With `follow` it ends some moments after the run is over. Fails with kind `Recipe` on an attempt that there is not.
pub fn show_logs(run: &RunPaths, choice: &LogChoice, output: &mut dyn Write) -> anyhow::Result<bool> {
    let choice = &of_attempt(run, choice)?;
    let mut places: BTreeMap<Source, Place> = BTreeMap::new();
    let mut end = LogEnd::of(run);
    // For how long nothing was said after the end of the run.
    let mut silent_ms: Option<u64> = None;
    loop {
        let is_last = !choice.follow || silent_ms.is_some_and(|silent_ms| silent_ms >= SETTLED_MS);
        let mut is_new = false;
        for (source, path) in sources(run, choice)? {
            let place = places.entry(source.clone()).or_default();
            let before = place.offset;
            let printer = Printer { run, choice, source: &source };
            while printer.read_turn(&path, place, output)? {}
            is_new |= place.offset != before;
            if is_last {
                let rest = std::mem::take(&mut place.rest);
                printer.print(place, &rest, output)?;
            }
        }
        output.flush()?;
        if is_last {
            return Ok(!places.is_empty());
        }
        silent_ms = if is_new || !end.is_reached()? { None } else { Some(silent_ms.map_or(0, |silent_ms| silent_ms + FOLLOW_MS)) };
        sleep(Duration::from_millis(FOLLOW_MS));
    }
}

/// The choice with the job of its attempt, where it names one.
fn of_attempt(run: &RunPaths, choice: &LogChoice) -> anyhow::Result<LogChoice> {
    let Some(wanted) = choice.attempt else { return Ok(choice.clone()) };
    let events: Vec<AttemptEvent> = journal::read(&JobPaths::of(run).attempts())?;
    let mut begun = events.iter().filter_map(|event| match event {
        AttemptEvent::Started { attempt, job, .. } => Some((*attempt, *job)),
        AttemptEvent::Ended { .. } => None,
    });
    let Some((_, job)) = begun.clone().find(|(attempt, _)| *attempt == wanted) else {
        let last = begun.by_ref().map(|(attempt, _)| attempt).max();
        let expected = last.map_or_else(|| "a run whose job has begun".to_owned(), |last| format!("1 to {last}"));
        let failure = Failure::new(FailureKind::Recipe, "the run has no such attempt").at(run.root().display());
        return Err(failure.expected(expected).found(wanted).hint("`cloze status` lists the attempts of each job").into());
    };
    Ok(LogChoice { job: Some(job.to_string()), ..choice.clone() })
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

/// Prints one log.
struct Printer<'a> {
    run: &'a RunPaths,
    choice: &'a LogChoice,
    source: &'a Source,
}

impl Printer<'_> {
    /// Prints the next lines; whether there may be more.
    fn read_turn(&self, path: &Path, place: &mut Place, output: &mut dyn Write) -> anyhow::Result<bool> {
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
            let text = std::mem::replace(&mut place.rest, rest);
            self.print(place, &text, output)?;
        }
        Ok(read as u64 == TURN_BYTES)
    }

    fn print(&self, place: &mut Place, text: &[u8], output: &mut dyn Write) -> io::Result<()> {
        let prefix = match self.source {
            Source::Job(_, job) => format!("job {job}"),
            Source::Node(node) => format!("node {node}"),
            Source::Worker(worker) => format!("worker {worker}"),
        };
        for line in String::from_utf8_lossy(text).lines() {
            if let Some(attempt) = begun_attempt(line) {
                place.is_in_attempt = Some(attempt) == self.choice.attempt;
            }
            let is_chosen = self.choice.attempt.is_none() || place.is_in_attempt;
            if is_chosen && !self.is_shown_elsewhere(line) {
                writeln!(output, "{prefix} | {line}")?;
            }
        }
        Ok(())
    }

    /// Whether a line of a job's log is one that a node has said, `NODE: …`, whose own log is shown too.
    fn is_shown_elsewhere(&self, line: &str) -> bool {
        if !matches!(self.source, Source::Job(..)) || self.choice.job.is_some() {
            return false;
        }
        let name = line.split_once(": ").map(|(name, _)| name).filter(|name| !name.is_empty() && !name.contains(char::is_whitespace));
        name.is_some_and(|name| self.run.host_log(name).is_file())
    }
}

/// The attempt that this line of a job begins: `job 7, attempt 2 (2 of at most 20), on n1`.
fn begun_attempt(line: &str) -> Option<u32> {
    let (job, rest) = line.strip_prefix("job ")?.split_once(", attempt ")?;
    let (attempt, _) = rest.split_once(" (")?;
    if job.contains(' ') { None } else { attempt.parse().ok() }
}

#[cfg(test)]
mod tests {
    use std::thread;

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
        let run = RunPaths::new(folder.path().to_owned());
        let (source, mut place, mut output) = (Source::Job(1, "1".to_owned()), Place::default(), Vec::new());
        let printer = Printer { run: &run, choice: &LogChoice::default(), source: &source };
        for (text, expected) in [("one\ntw", "job 1 | one\n"), ("one\ntwo\n", "job 1 | one\njob 1 | two\n")] {
            fs::write(&path, text).unwrap();
            printer.read_turn(&path, &mut place, &mut output).unwrap();
            assert_eq!(String::from_utf8(output.clone()).unwrap(), expected);
        }
        // A new log under the old name.
        fs::write(&path, "x\n").unwrap();
        printer.read_turn(&path, &mut place, &mut output).unwrap();
        assert!(String::from_utf8(output).unwrap().ends_with("job 1 | x\n"));
    }

    /// A run whose job was put back once, on two nodes.
    fn run_of_two_attempts(root: &Path) -> RunPaths {
        let run = RunPaths::new(root.to_owned());
        for folder in ["logs", "slurm"] {
            fs::create_dir(root.join(folder)).unwrap();
        }
        let job = "job 12, attempt 1 (1 of at most 20), on n1, n2\nn2: worker 1 starts\nno node: a line\n\
                   job 12, attempt 2 (2 of at most 20), on n1, n2\nn2: worker 1 starts again\nattempt 2 ended: done\n";
        fs::write(root.join("logs/job-12.log"), job).unwrap();
        fs::write(root.join("logs/host-n2.log"), "worker 1 starts\nworker 1 starts again\n").unwrap();
        for attempt in [1, 2] {
            let nodes = vec!["n1".to_owned(), "n2".to_owned()];
            let job = "12".parse().unwrap();
            let event = AttemptEvent::Started { time: 1.0, attempt, job, name: "cloze".to_owned(), requeues: attempt - 1, nodes };
            journal::append(&JobPaths::of(&run).attempts(), &event).unwrap();
        }
        run
    }

    #[test]
    fn what_a_node_says_is_shown_once() {
        let folder = tempfile::tempdir().unwrap();
        let run = run_of_two_attempts(folder.path());
        let text = shown(&run, &LogChoice::default());
        assert_eq!(text.matches("worker 1 starts again").count(), 1, "{text}");
        assert!(text.contains("node n2 | worker 1 starts\n") && text.contains("job 12 | no node: a line\n"), "{text}");
        // Of the job alone its log is shown as it is.
        let of_job = shown(&run, &LogChoice { job: Some("12".to_owned()), ..LogChoice::default() });
        assert!(of_job.contains("job 12 | n2: worker 1 starts\n"), "{of_job}");
    }

    #[test]
    fn an_attempt_is_a_part_of_its_jobs_log() {
        let folder = tempfile::tempdir().unwrap();
        let run = run_of_two_attempts(folder.path());
        let of = |attempt| LogChoice { attempt: Some(attempt), ..LogChoice::default() };
        let first = "job 12 | job 12, attempt 1 (1 of at most 20), on n1, n2\njob 12 | n2: worker 1 starts\njob 12 | no node: a line\n";
        assert_eq!(shown(&run, &of(1)), first);
        assert!(shown(&run, &of(2)).ends_with("job 12 | n2: worker 1 starts again\njob 12 | attempt 2 ended: done\n"));
        let failure: Failure = show_logs(&run, &of(3), &mut Vec::new()).unwrap_err().downcast().unwrap();
        assert_eq!((failure.kind, failure.expected.as_deref()), (FailureKind::Recipe, Some("1 to 2")));
        for (line, attempt) in [("job 7, attempt 12 (2 of", Some(12)), ("job 7 of, attempt 1 (", None), ("attempt 1 (", None)] {
            assert_eq!(begun_attempt(line), attempt, "{line}");
        }
    }

    #[test]
    fn logs_that_are_followed_end_with_their_run() {
        let folder = tempfile::tempdir().unwrap();
        let run = run_of_two_attempts(folder.path());
        let ended = AttemptEvent::Ended {
            time: 2.0,
            attempt: 2,
            job: "12".parse().unwrap(),
            decision: super::super::verdict::Decision::Finish,
            reason: "all steps are done".to_owned(),
            elapsed_s: 1,
            bad_nodes: Vec::new(),
            failure: None,
        };
        let followed = thread::scope(|scope| {
            let text = scope.spawn(|| shown(&run, &LogChoice { follow: true, ..LogChoice::default() }));
            sleep(Duration::from_millis(2 * SETTLED_MS));
            assert!(!text.is_finished(), "nobody has said that the run is over");
            journal::append(&JobPaths::of(&run).attempts(), &ended).unwrap();
            let path = folder.path().join("logs/job-12.log");
            let text_before = fs::read_to_string(&path).unwrap();
            fs::write(&path, text_before + "the last word").unwrap();
            text.join().unwrap()
        });
        assert!(followed.contains("job 12 | the last word\n"), "{followed}");
    }
}
