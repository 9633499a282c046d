//! What a controller has done on a host by one short command there (`cloze sweep visit`): batches begun, asked to leave, ended, looked at.
//!
//! A visit may be given twice, and nobody may hear of its end: what it starts is claimed once ([`super::claim`]), outlives it, and is found
//! by the next one. It reads the study folder of its host, and does nothing where that is not the one of the controller.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};
use serde::{Deserialize, Serialize};

use super::batch::{Batch, Outcome};
use super::claim::{Claim, Worker};
use super::folder::StudyFolder;
use super::steps::shown;
use crate::run_folder::storage;

/// Version of the report, so that programs of two versions notice each other.
const VERSION: u32 = 1;

/// Longest wait for what was started to claim its batch, in seconds; it takes some 10 ms.
const CLAIM_WAIT_S: u64 = 20;

/// Interval at which the claim is looked for, in milliseconds.
const CLAIM_POLL_MS: u64 = 10;

/// What a visit is to do on its host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// The host, as the controller calls it.
    pub host: String,
    /// What the lock of the controller says; a folder that says something else is another one. `None` only looks.
    pub controller: Option<String>,
    /// Batches to begin, each with its place among so many.
    pub starts: Vec<Start>,
    /// Batches to look at.
    pub looks: Vec<u32>,
    /// Batches that are to save and leave.
    pub stops: Vec<u32>,
    /// Batches of which nothing may be left.
    pub ends: Vec<u32>,
    /// The host was checked, so nothing that begins checks it again.
    pub is_checked: bool,
}

/// A batch to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Its number.
    pub batch: u32,
    /// Its place on the host.
    pub place: u32,
    /// Number of places there.
    pub of: u32,
}

/// How a batch is, as its host sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// Nobody has begun.
    Absent,
    /// It is worked on.
    Lives,
    /// All its outcomes are written.
    Ended,
    /// Nothing of it runs any more, and an outcome is missing.
    Gone(String),
    /// What was started has ended before it began.
    Failed(String),
}

/// What a visit tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Version of the report.
    visit: u32,
    /// The batches that were to begin or to be looked at.
    pub batches: BTreeMap<u32, Word>,
}

impl Orders {
    /// Whether there is nothing to do or to look at.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty() && [&self.looks, &self.stops, &self.ends].iter().all(|batches| batches.is_empty())
    }

    /// The arguments of `cloze sweep visit` behind the study folder.
    pub fn words(&self) -> Vec<String> {
        let mut words = vec![format!("--host={}", self.host)];
        words.extend(self.controller.iter().map(|controller| format!("--controller={controller}")));
        words.extend(self.starts.iter().map(|Start { batch, place, of }| format!("--start={batch}:{place}:{of}")));
        for (name, batches) in [("look", &self.looks), ("stop", &self.stops), ("end", &self.ends)] {
            words.extend(batches.iter().map(|batch| format!("--{name}={batch}")));
        }
        words.extend(self.is_checked.then(|| "--checked".to_owned()));
        words
    }
}

impl std::str::FromStr for Start {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers: Vec<u32> = text.split(':').map(str::parse).collect::<Result<_, _>>().map_err(|_| "three numbers are needed")?;
        match numbers[..] {
            [batch, place, of] if place < of => Ok(Self { batch, place, of }),
            _ => Err("BATCH:PLACE:OF is needed, with a place below the last".to_owned()),
        }
    }
}

impl Report {
    /// The report among what a host has said: its remote shell may have printed other lines before.
    pub fn find(output: &str) -> Option<Self> {
        let reports = output.lines().rev().filter_map(|line| serde_json::from_str::<Self>(line.trim()).ok());
        reports.into_iter().find(|report| report.visit == VERSION)
    }

    /// One line.
    pub fn line(&self) -> anyhow::Result<String> {
        serde_json::to_string(self).context("write a report")
    }
}

/// Does what was ordered on this host, in the study folder here; `program` is the `cloze` program. Fails with kind `Environment` where the
/// folder is not the controller's.
pub fn visit(folder: &StudyFolder, program: PathBuf, orders: &Orders) -> anyhow::Result<Report> {
    if let Some(controller) = &orders.controller {
        check_is_shared(folder, controller)?;
    }
    let visit = Visit { folder, program, orders };
    for &batch in &orders.ends {
        if let Some(worker) = visit.worker(batch)? {
            worker.end().context("end the processes of a batch")?;
        }
    }
    for &batch in &orders.stops {
        if let Some(worker) = visit.worker(batch)? {
            worker.stop().context("ask a process to leave")?;
        }
    }
    let mut batches = BTreeMap::new();
    let mut begun = Vec::new();
    for start in &orders.starts {
        match visit.word(start.batch)? {
            Word::Absent => begun.push((start.batch, visit.start(start)?)),
            word => drop(batches.insert(start.batch, word)),
        }
    }
    for (batch, child) in begun {
        batches.insert(batch, visit.wait_for_claim(batch, child)?);
    }
    for &batch in &orders.looks {
        batches.insert(batch, visit.word(batch)?);
    }
    Ok(Report { visit: VERSION, batches })
}

struct Visit<'a> {
    folder: &'a StudyFolder,
    program: PathBuf,
    orders: &'a Orders,
}

impl Visit<'_> {
    /// The process that works on a batch here, or did.
    fn worker(&self, batch: u32) -> anyhow::Result<Option<Worker>> {
        match Claim::read(self.folder, batch)? {
            None | Some(Claim::Withdrawn) => Ok(None),
            // By its name, or, where controllers call this machine differently, by its kernel.
            Some(Claim::Taken(worker)) if worker.host == self.orders.host || worker.runs_under_this_kernel().unwrap_or(false) => {
                Ok(Some(worker))
            }
            Some(Claim::Taken(worker)) => Err(Failure::new(FailureKind::Environment, "another host has a batch of this one")
                .at(self.folder.claim_path(batch).display())
                .expected(&self.orders.host)
                .found(worker.host)
                .into()),
        }
    }

    /// How a batch is. What a process has left behind that ended by itself is ended too, before the batch counts as gone.
    fn word(&self, batch: u32) -> anyhow::Result<Word> {
        let Some(worker) = self.worker(batch)? else { return Ok(Word::Absent) };
        if worker.is_alive().context("look at a process")? {
            return Ok(Word::Lives);
        }
        if self.is_ended(batch)? {
            return Ok(Word::Ended);
        }
        if !worker.session().context("look at the processes of a batch")?.is_empty() {
            if self.orders.controller.is_some() {
                worker.end().context("end the processes of a batch")?;
            }
            // The next visit sees whether it is.
            return Ok(Word::Lives);
        }
        Ok(Word::Gone(format!("process {} of {} has ended", worker.process_id, worker.host)))
    }

    fn is_ended(&self, batch: u32) -> anyhow::Result<bool> {
        for assignment in Batch::read(self.folder, batch)?.elements.iter().flatten() {
            if Outcome::read(self.folder, &assignment.trial, assignment.attempt)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn start(&self, start: &Start) -> anyhow::Result<Child> {
        let path = self.folder.log_path(&format!("batch-{:06}", start.batch));
        let log: File = OpenOptions::new().create(true).append(true).open(&path).map_err(|error| storage("open a log", &path, &error))?;
        let errors = log.try_clone().map_err(|error| storage("open a log", &path, &error))?;
        let mut command = Command::new(&self.program);
        command.args(["sweep", "work"]).arg(self.folder.root());
        command.args(["--batch", &start.batch.to_string(), "--element", "0"]);
        command.args(["--place", &start.place.to_string(), "--of", &start.of.to_string(), "--host", &self.orders.host]);
        if self.orders.is_checked {
            command.arg("--checked");
        }
        // It leads a session of its own at once, so the end of this one does not reach it; and it must hold no pipe of the remote shell.
        let child = command.stdin(Stdio::null()).stdout(log).stderr(errors).spawn();
        Ok(child.map_err(|error| {
            Failure::new(FailureKind::Environment, "a trial cannot be started").at(self.program.display()).because(error)
        })?)
    }

    fn wait_for_claim(&self, batch: u32, mut child: Child) -> anyhow::Result<Word> {
        let deadline = Instant::now() + Duration::from_secs(CLAIM_WAIT_S);
        loop {
            // The end first: a process that has ended has claimed its batch before, or never will.
            let ended = child.try_wait().context("wait for a process")?;
            if self.worker(batch)?.is_some() {
                return self.word(batch);
            }
            match ended {
                Some(status) => return Ok(Word::Failed(format!("it ended with {} before it began", shown(status)))),
                None if Instant::now() >= deadline => return Ok(Word::Absent),
                None => sleep(Duration::from_millis(CLAIM_POLL_MS)),
            }
        }
    }
}

/// The lock names its controller, which no other folder does.
fn check_is_shared(folder: &StudyFolder, controller: &str) -> Result<(), Failure> {
    let path = folder.lock_path();
    let found = fs::read_to_string(&path).map_err(|error| storage("read the lock of the study", &path, &error))?;
    if found.trim() == controller {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Environment, "the study folder of this host is not the one of the controller")
        .at(folder.root().display())
        .expected(format!("its lock to name `{controller}`"))
        .found(found.trim())
        .hint("all hosts must see one disk under the same path"))
}

#[cfg(test)]
mod tests {
    use super::super::batch::Assignment;
    use cloze_cluster::host::host_name;

    use super::*;

    /// A study folder with one batch of the trial `a`, whose controller is `7 login`.
    fn study(root: &std::path::Path) -> StudyFolder {
        let folder = StudyFolder::new(root.to_owned());
        folder.make().unwrap();
        fs::write(folder.lock_path(), "7 login\n").unwrap();
        let element = vec![Assignment { trial: "a".to_owned(), attempt: 1, until_step: None }];
        StudyFolder::write_json(&folder.batch_path(1), &Batch { number: 1, elements: vec![element] }).unwrap();
        folder
    }

    fn orders() -> Orders {
        Orders { host: "n1".to_owned(), controller: Some("7 login".to_owned()), ..Orders::default() }
    }

    fn program(root: &std::path::Path, text: &str) -> PathBuf {
        let path = root.join("cloze");
        let write = r#"printf '%s\n' "$1" > "$0" && chmod 755 "$0""#;
        let text = format!("#!/bin/bash\n{text}");
        assert!(Command::new("/bin/sh").args(["-c", write]).arg(&path).arg(text).status().unwrap().success());
        path
    }

    #[test]
    fn orders_are_words_and_reports_are_found_among_other_lines() {
        let start = Start { batch: 7, place: 1, of: 2 };
        let orders = Orders { starts: vec![start], looks: vec![3, 4], stops: vec![3], ends: vec![2], is_checked: true, ..orders() };
        let words = orders.words().join(" ");
        assert_eq!(words, "--host=n1 --controller=7 login --start=7:1:2 --look=3 --look=4 --stop=3 --end=2 --checked");
        assert_eq!("7:1:2".parse(), Ok(start));
        for text in ["7", "7:2:2", "7:1:2:3", "a:0:1", ""] {
            assert!(text.parse::<Start>().is_err(), "{text}");
        }
        let report = Report { visit: VERSION, batches: BTreeMap::from([(7, Word::Lives), (3, Word::Gone("x".to_owned()))]) };
        let line = report.line().unwrap();
        assert_eq!(Report::find(&format!("welcome\n{{}}\n{line}\nlogout\n")), Some(report));
        for other in ["", "welcome", r#"{"visit":2,"batches":{}}"#] {
            assert_eq!(Report::find(other), None, "{other}");
        }
    }

    #[test]
    fn another_folder_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let folder = study(root.path());
        let of = |controller: &str| Orders { controller: Some(controller.to_owned()), looks: vec![1], ..orders() };
        let failure: Failure = visit(&folder, PathBuf::new(), &of("8 login")).unwrap_err().downcast().unwrap();
        assert_eq!((failure.kind, failure.found.as_deref()), (FailureKind::Environment, Some("7 login")));
        assert_eq!(visit(&folder, PathBuf::new(), &of("7 login")).unwrap().batches, BTreeMap::from([(1, Word::Absent)]));
    }

    #[test]
    fn what_was_claimed_is_not_begun_again() {
        let root = tempfile::tempdir().unwrap();
        let folder = study(root.path());
        let begun = root.path().join("begun");
        let program = program(root.path(), &format!("echo >> {}", begun.display()));
        let ordered = Orders { starts: vec![Start { batch: 1, place: 0, of: 1 }], ..orders() };
        let told = |orders: &Orders| visit(&folder, program.clone(), orders).unwrap().batches.remove(&1).unwrap();
        // It claims nothing, and says so by its end.
        assert_eq!(told(&ordered), Word::Failed("it ended with exit code 0 before it began".to_owned()));
        assert_eq!(fs::read_to_string(&begun).unwrap().lines().count(), 1);
        let mut child = Command::new("setsid").args(["sleep", "60"]).spawn().unwrap();
        let start_ticks = crate::local::start_ticks(child.id()).unwrap();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned();
        let worker = Worker { host: "n1".to_owned(), process_id: child.id(), start_ticks, boot, machine: host_name(), part: None };
        Claim::Taken(worker).make(&folder, 1).unwrap();
        assert_eq!(told(&ordered), Word::Lives);
        let by_another_name = Orders { host: "n2".to_owned(), looks: vec![1], ..orders() };
        assert_eq!(told(&by_another_name), Word::Lives, "it is this machine, whatever it is called");
        let far =
            Worker { host: "n9".to_owned(), process_id: 1, start_ticks: 1, boot: "b".to_owned(), machine: "m".to_owned(), part: None };
        Claim::Taken(far).make(&folder, 2).unwrap();
        let strange = Orders { starts: vec![Start { batch: 2, place: 0, of: 1 }], ..orders() };
        let failure: Failure = visit(&folder, program.clone(), &strange).unwrap_err().downcast().unwrap();
        assert_eq!((failure.what.as_str(), failure.found.as_deref()), ("another host has a batch of this one", Some("n9")));
        assert_eq!(fs::read_to_string(&begun).unwrap().lines().count(), 1, "it was started again");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(told(&ordered), Word::Gone(_)));
    }
}
