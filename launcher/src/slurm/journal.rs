//! What a run has asked of the batch system, and what came of it: `slurm/jobs.jsonl` and `slurm/attempts.jsonl`.
//!
//! A job's line of intent, with a name that no other job has, is on the disk before the job is submitted; so whoever finds an intent
//! without an outcome can ask for the name, and submits nothing twice.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use cloze_recipes::failure::{Failure, FailureKind};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::job::JobId;
use super::verdict::Decision;
use crate::run_folder::storage;

/// Longest journal that is read, in bytes. A run has some dozens of jobs, each with a few lines.
const MAX_JOURNAL_BYTES: u64 = 16 << 20;

/// A line of `slurm/jobs.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum JobEvent {
    /// A job is about to be submitted.
    Intent {
        /// Unix time, in seconds.
        time: f64,
        /// Name of the job.
        name: String,
        /// Why there is one.
        role: Role,
        /// Nodes that it must not use, besides those of the site.
        exclude: Vec<String>,
    },
    /// It was submitted, or was found to have been.
    Submitted {
        /// Unix time, in seconds.
        time: f64,
        /// Name of the job.
        name: String,
        /// Its number.
        job: JobId,
    },
    /// There is no such job: it was refused, or nobody knows its name.
    Dropped {
        /// Unix time, in seconds.
        time: f64,
        /// Name of the job.
        name: String,
        /// Why.
        reason: String,
    },
    /// It was cancelled by this program.
    Cancelled {
        /// Unix time, in seconds.
        time: f64,
        /// Number of the job.
        job: JobId,
    },
    /// It waits, and is kept away from more nodes than its intent says.
    Excluded {
        /// Unix time, in seconds.
        time: f64,
        /// Number of the job.
        job: JobId,
        /// All nodes that it must not use, besides those of the site.
        exclude: Vec<String>,
    },
    /// The run has left the cluster that had the jobs so far, all of which are over: their numbers mean nothing where it is now.
    Moved {
        /// Unix time, in seconds.
        time: f64,
        /// What SLURM calls the cluster that it has now.
        cluster: String,
    },
}

/// Why there is a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Role {
    /// Somebody asked for it.
    Asked,
    /// It waits for another one to fail.
    Successor {
        /// The other one.
        of: JobId,
    },
    /// It takes the place of another one.
    Replacement {
        /// The other one.
        of: JobId,
    },
}

/// A line of `slurm/attempts.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum AttemptEvent {
    /// A job has started and begins with the run.
    Started {
        /// Unix time, in seconds.
        time: f64,
        /// Number of the attempt, from 1.
        attempt: u32,
        /// The job.
        job: JobId,
        /// Its name.
        name: String,
        /// How often it was put back before.
        requeues: u32,
        /// Its nodes.
        nodes: Vec<String>,
    },
    /// An attempt has ended in order. One that was killed has no such line.
    Ended {
        /// Unix time, in seconds.
        time: f64,
        /// Number of the attempt.
        attempt: u32,
        /// The job.
        job: JobId,
        /// What followed.
        decision: Decision,
        /// Why.
        reason: String,
        /// How long the job had run, in seconds.
        elapsed_s: u64,
        /// Nodes that were to blame.
        bad_nodes: Vec<String>,
        /// The failure, where there was one.
        failure: Option<Failure>,
    },
}

/// A job of the run, as its lines say.
#[derive(Clone, Debug, PartialEq)]
pub struct JobRecord {
    /// Its name.
    pub name: String,
    /// Why there is one.
    pub role: Role,
    /// Nodes that it must not use, besides those of the site.
    pub exclude: Vec<String>,
    /// Its number, once that is known.
    pub job: Option<JobId>,
    /// There is no such job.
    pub is_dropped: bool,
    /// It was cancelled by this program.
    pub is_cancelled: bool,
    /// It is over, in a cluster that the run has left.
    pub is_elsewhere: bool,
}

impl JobRecord {
    /// Whether nobody knows what became of its intent.
    pub fn is_open(&self) -> bool {
        self.job.is_none() && !self.is_dropped
    }

    /// Whether it is over for all that the run's folder knows: there is no such job, it was cancelled, or it has decided at its end that
    /// it does not go on.
    pub fn is_over(&self, attempts: &[AttemptEvent]) -> bool {
        self.is_dropped || self.is_cancelled || self.is_elsewhere || self.job.is_some_and(|job| has_ended(job, attempts))
    }

    /// Its number in the cluster that the run is in.
    pub fn id_here(&self) -> Option<JobId> {
        self.job.filter(|_| !self.is_elsewhere)
    }
}

/// Whether the last word of a job is that it is done with the run. One that is left to the batch system may be put back by it.
fn has_ended(job: JobId, attempts: &[AttemptEvent]) -> bool {
    let last = attempts.iter().rev().find(|event| match event {
        AttemptEvent::Started { job: of, .. } | AttemptEvent::Ended { job: of, .. } => *of == job,
    });
    let Some(AttemptEvent::Ended { decision, .. }) = last else { return false };
    matches!(decision, Decision::Finish | Decision::GiveUp { .. } | Decision::Replace { .. })
}

/// The jobs of a run, oldest first.
pub fn jobs(events: Vec<JobEvent>) -> Vec<JobRecord> {
    let mut jobs: Vec<JobRecord> = Vec::new();
    for event in events {
        match event {
            JobEvent::Intent { name, role, exclude, .. } => {
                jobs.push(JobRecord { name, role, exclude, job: None, is_dropped: false, is_cancelled: false, is_elsewhere: false });
            }
            JobEvent::Submitted { name, job, .. } => {
                if let Some(record) = jobs.iter_mut().find(|record| record.name == name) {
                    record.job = Some(job);
                }
            }
            JobEvent::Dropped { name, .. } => {
                if let Some(record) = jobs.iter_mut().find(|record| record.name == name) {
                    record.is_dropped = true;
                }
            }
            JobEvent::Cancelled { job, .. } => {
                for record in jobs.iter_mut().filter(|record| record.job == Some(job)) {
                    record.is_cancelled = true;
                }
            }
            JobEvent::Excluded { job, exclude, .. } => {
                for record in jobs.iter_mut().filter(|record| record.job == Some(job)) {
                    record.exclude.clone_from(&exclude);
                }
            }
            JobEvent::Moved { .. } => jobs.iter_mut().for_each(|record| record.is_elsewhere = true),
        }
    }
    jobs
}

/// Adds a line, and returns when it is on the disk. What a crash left of a line is ended first, so that it stays a line of its own.
pub fn append<T: Serialize>(path: &Path, event: &T) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    let mut appended = || -> io::Result<()> {
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
        if is_torn(&mut file)? {
            line.insert(0, b'\n');
        }
        file.write_all(&line)?;
        file.sync_data()
    };
    appended().map_err(|error| storage("write a line about a job", path, &error).into())
}

/// The lines of a journal; none where there is no file. The last line may be torn; any other that cannot be read is kind `Damaged`.
pub fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Vec<T>> {
    let mut text = String::new();
    match File::open(path) {
        Ok(file) => {
            let read = file.take(MAX_JOURNAL_BYTES + 1).read_to_string(&mut text);
            read.map_err(|error| storage("read what is known about jobs", path, &error))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(storage("read what is known about jobs", path, &error).into()),
    }
    if text.len() as u64 > MAX_JOURNAL_BYTES {
        return Err(damaged(path, 0, &format!("more than {MAX_JOURNAL_BYTES} bytes")).into());
    }
    let lines: Vec<&str> = text.lines().collect();
    let mut events = Vec::new();
    for (place, line) in lines.iter().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        match serde_json::from_str(line) {
            Ok(event) => events.push(event),
            // A crash tears a line; the next one begins behind it.
            Err(error) if error.is_eof() => {
                tracing::warn!(path = %path.display(), line = place + 1, "a line that a crash has cut off is passed over");
            }
            Err(error) => return Err(damaged(path, place + 1, &error.to_string()).into()),
        }
    }
    Ok(events)
}

fn is_torn(file: &mut File) -> io::Result<bool> {
    if file.metadata()?.len() == 0 {
        return Ok(false);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last[0] != b'\n')
}

fn damaged(path: &Path, line: usize, cause: &str) -> Failure {
    Failure::new(FailureKind::Damaged, "the journal of a run's jobs cannot be read")
        .at(format!("{}, line {line}", path.display()))
        .because(cause)
        .hint("without it a job could be submitted twice: look at `squeue` for jobs of this run, then remove that line")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intent(name: &str) -> JobEvent {
        JobEvent::Intent { time: 1.0, name: name.to_owned(), role: Role::Asked, exclude: vec!["n3".to_owned()] }
    }

    #[test]
    fn jobs_are_what_their_lines_say() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jobs.jsonl");
        assert!(read::<JobEvent>(&path).unwrap().is_empty());
        let job = JobId::whole(7);
        let successor = JobEvent::Intent { time: 2.0, name: "b".to_owned(), role: Role::Successor { of: job }, exclude: Vec::new() };
        let refused = JobEvent::Dropped { time: 4.0, name: "c".to_owned(), reason: "no".to_owned() };
        let events = [
            intent("a"),
            JobEvent::Submitted { time: 1.5, name: "a".to_owned(), job },
            successor,
            intent("c"),
            refused,
            JobEvent::Excluded { time: 4.5, job, exclude: vec!["n4".to_owned()] },
            JobEvent::Cancelled { time: 5.0, job },
        ];
        for event in &events {
            append(&path, event).unwrap();
        }
        let read: Vec<JobEvent> = read(&path).unwrap();
        assert_eq!(read, events);
        let jobs = jobs(read);
        assert_eq!(jobs.iter().map(JobRecord::is_open).collect::<Vec<_>>(), [false, true, false]);
        assert!(jobs[0].is_cancelled && jobs[0].job == Some(job) && jobs[2].is_dropped);
        assert_eq!(jobs[1].role, Role::Successor { of: job });
        assert_eq!((&jobs[0].exclude, &jobs[2].exclude), (&vec!["n4".to_owned()], &vec!["n3".to_owned()]));
    }

    #[test]
    fn a_torn_line_is_passed_over_and_a_wrong_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jobs.jsonl");
        append(&path, &intent("a")).unwrap();
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"event\":\"intent\",\"ti");
        std::fs::write(&path, &text).unwrap();
        assert_eq!(read::<JobEvent>(&path).unwrap().len(), 1);
        append(&path, &intent("b")).unwrap();
        assert_eq!(read::<JobEvent>(&path).unwrap(), [intent("a"), intent("b")]);
        std::fs::write(&path, "{\"event\":\"party\"}\n").unwrap();
        let failure: Failure = read::<JobEvent>(&path).unwrap_err().downcast().unwrap();
        assert_eq!(failure.kind, FailureKind::Damaged);
    }

    #[test]
    fn attempts_keep_their_decision() {
        let event = AttemptEvent::Ended {
            time: 1.0,
            attempt: 2,
            job: JobId::whole(7),
            decision: Decision::Replace { exclude: vec!["n3".to_owned()] },
            reason: "a node is to blame".to_owned(),
            elapsed_s: 5,
            bad_nodes: vec!["n3".to_owned()],
            failure: None,
        };
        let text = serde_json::to_string(&event).unwrap();
        assert!(text.contains(r#""decision":{"replace":{"exclude":["n3"]}}"#), "{text}");
        assert_eq!(serde_json::from_str::<AttemptEvent>(&text).unwrap(), event);
    }
}
