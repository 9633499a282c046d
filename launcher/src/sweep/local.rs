//! Trials on this machine: each a child process of its own, which outlives a controller that is killed.
//!
//! Where the study folder lies on a disk that several machines share, what an earlier controller has started may run on another one, which
//! nobody here can ask: it keeps its trial while it gives signs of life (`beat.rs`).

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloze_cluster::host::host_name;
use cloze_recipes::failure::{Failure, FailureKind};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::batch::Batch;
use super::beat::{LOST_AFTER_S, Signs};
use super::claim::{Claim, Worker};
use super::executor::{Gone, Out};
use super::folder::StudyFolder;
use super::lock::{FileLock, holder_process};
use super::share::least_used;
use super::steps::shown;
use crate::local::forget_earlier;
use crate::run_folder::{READABLE, RunPaths, storage, write_whole};
use crate::view::controller_lives;

/// Interval at which the processes are looked at.
const POLL_MS: u64 = 100;

/// Longest wait for the run of a trial whose process was killed, in seconds: it saves and leaves, and has its place meanwhile. After that
/// the trial is given back, and its next attempt waits for the run.
const LEAVE_WAIT_S: u64 = 180;

/// The processes of this machine.
#[derive(Debug)]
pub struct Local {
    folder: StudyFolder,
    program: PathBuf,
    /// Processes at the same time, at most; each gets its part of the machine.
    concurrency: u32,
    /// The children, by batch.
    children: BTreeMap<u32, (Child, u32)>,
    /// What an earlier controller has started, by batch.
    found: BTreeMap<u32, Found>,
    /// Children whose outcome is there and that have not ended yet; they hold no place any more.
    leaving: Vec<Child>,
    /// How a batch without an outcome has ended, and since when that is known; what its process has started may still leave.
    ended: BTreeMap<u32, (String, Instant)>,
    /// When this controller began.
    began: Instant,
    news: Vec<String>,
}

/// Where a batch of an earlier controller is worked on.
#[derive(Debug)]
enum Found {
    /// Nobody has begun with it, and nobody will.
    Nowhere,
    /// On this machine, in this place where its claim names one, or on none any more.
    Here(Option<u32>),
    /// On another machine.
    Elsewhere(Worker, Signs),
}

impl Local {
    /// Nothing runs yet; `program` is the `cloze` program.
    pub fn new(folder: StudyFolder, program: PathBuf, concurrency: u32) -> Self {
        Self {
            folder,
            program,
            concurrency: concurrency.max(1),
            children: BTreeMap::new(),
            found: BTreeMap::new(),
            leaving: Vec::new(),
            ended: BTreeMap::new(),
            began: Instant::now(),
            news: Vec::new(),
        }
    }

    /// Starts a batch, which has one element here.
    pub fn submit(&mut self, batch: &Batch) -> anyhow::Result<()> {
        self.reap();
        let log_path = self.folder.log_path(&format!("batch-{:06}", batch.number));
        let opened = OpenOptions::new().create(true).append(true).open(&log_path);
        let log = opened.map_err(|error| storage("open a log", &log_path, &error))?;
        let errors = log.try_clone().map_err(|error| storage("open a log", &log_path, &error))?;
        let found = self.found.values().filter_map(|found| if let Found::Here(place) = found { *place } else { None });
        let place = least_used(self.concurrency, &self.children.values().map(|(_, place)| *place).chain(found));
        let child = Command::new(&self.program)
            .args(["sweep", "work"])
            .arg(self.folder.root())
            .args(["--batch", &batch.number.to_string(), "--element", "0"])
            .args(["--place", &place.to_string(), "--of", &self.concurrency.to_string()])
            // It leads a session of its own at once: Ctrl-C in the terminal must reach the controller only, and the work must outlive it.
            .arg(format!("--host={}", host_name()))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn();
        let child = child.map_err(|error| {
            Failure::new(FailureKind::Environment, "a trial cannot be started").at(self.program.display()).because(error)
        })?;
        self.children.insert(batch.number, (child, place));
        Ok(())
    }

    /// What is to be told, each once.
    pub fn news(&mut self) -> Vec<String> {
        std::mem::take(&mut self.news)
    }

    /// Trials whose process has ended, and of which nothing trains any more. One that an earlier controller has started here is known by
    /// the lock that it holds, one on another machine by its signs of life.
    pub fn gone(&mut self, outs: &[Out<'_>]) -> anyhow::Result<Vec<Gone>> {
        self.reap();
        let mut gone = Vec::new();
        for out in outs {
            let batch = out.place.batch;
            self.find(out)?;
            match self.found.get(&batch) {
                Some(Found::Nowhere) => {
                    gone.push(Gone::not_begun(out.trial));
                    continue;
                }
                Some(Found::Elsewhere(..)) => {
                    gone.extend(self.lost(out)?);
                    continue;
                }
                Some(Found::Here(_)) | None => {}
            }
            let Some(how) = self.end_of(out)? else { continue };
            let since = self.ended.entry(batch).or_insert_with(|| (how.clone(), Instant::now())).1;
            if since.elapsed() < Duration::from_secs(LEAVE_WAIT_S) && self.trains_on(out.hash)? {
                continue;
            }
            // Without an outcome nobody forgets its batch, and its place is free all the same.
            self.forget(batch);
            gone.push(Gone::ended(out.trial, how));
        }
        Ok(gone)
    }

    /// Finds out where a batch is worked on that this controller has not started.
    fn find(&mut self, out: &Out<'_>) -> anyhow::Result<()> {
        let batch = out.place.batch;
        if self.children.contains_key(&batch) || self.found.contains_key(&batch) {
            return Ok(());
        }
        let claim = match Claim::read(&self.folder, batch)? {
            Some(claim) => claim,
            // An earlier version of this program made no claims here; its lock alone says that it works on the trial.
            None if FileLock::holder(&self.folder.trial_lock_path(out.hash))?.is_some() => {
                self.found.insert(batch, Found::Here(None));
                return Ok(());
            }
            None => Claim::Withdrawn.make(&self.folder, batch)?,
        };
        let found = match claim {
            Claim::Withdrawn => Found::Nowhere,
            Claim::Taken(worker) if worker.runs_under_this_kernel().is_ok() => Found::Here(worker.part.map(|part| part.place)),
            Claim::Taken(worker) => {
                self.news.push(format!(
                    "what works on batch {batch} is process {} of {}, which nobody here can ask; it keeps its trial until it has given no sign \
                     of life for {LOST_AFTER_S} s",
                    worker.process_id, worker.machine
                ));
                Found::Elsewhere(worker, Signs::default())
            }
        };
        self.found.insert(batch, found);
        Ok(())
    }

    /// A trial of another machine, once it has given no sign of life for so long that what worked on it has ended itself.
    fn lost(&mut self, out: &Out<'_>) -> anyhow::Result<Option<Gone>> {
        let batch = out.place.batch;
        let Some(Found::Elsewhere(worker, signs)) = self.found.get_mut(&batch) else { return Ok(None) };
        let silent = signs.silent(self.began.elapsed(), &self.folder, batch);
        if silent < Duration::from_secs(LOST_AFTER_S.into()) {
            return Ok(None);
        }
        let (machine, silent_s) = (worker.machine.clone(), silent.as_secs());
        write_whole(&self.folder.given_up_path(batch), b"", READABLE)?;
        // Its workers have ended with it, and here nobody could ask them.
        if let Some(run) = self.run_of(out.hash)?.filter(|run| run.join("run.json").is_file()) {
            forget_earlier(&RunPaths::find(&run)?)?;
        }
        self.found.remove(&batch);
        self.news.push(format!(
            "warning: what worked on batch {batch} on {machine} has given no sign of life for {silent_s} s; its trial begins anew here"
        ));
        Ok(Some(Gone::ended(out.trial, format!("{machine}: it has given no sign of life for {silent_s} s"))))
    }

    /// How the process of a trial has ended; `None` where it lives.
    fn end_of(&mut self, out: &Out<'_>) -> anyhow::Result<Option<String>> {
        if let Some((how, _)) = self.ended.get(&out.place.batch) {
            return Ok(Some(how.clone()));
        }
        if let Some((child, _)) = self.children.get_mut(&out.place.batch) {
            return Ok(child.try_wait().map_err(|error| storage("wait for a process", self.folder.root(), &error))?.map(shown));
        }
        let holder = FileLock::holder(&self.folder.trial_lock_path(out.hash))?;
        Ok(if holder.is_none() { Some("nobody knows how: its controller was killed".to_owned()) } else { None })
    }

    /// Whether the run of a trial still has a controller, which was told to leave when the process that worked on the trial was gone.
    fn trains_on(&self, hash: &str) -> anyhow::Result<bool> {
        let Some(run) = self.run_of(hash)? else { return Ok(false) };
        controller_lives(&run).with_context(|| format!("look at the lock of {}", run.display()))
    }

    fn run_of(&self, hash: &str) -> Result<Option<PathBuf>, Failure> {
        let plan = self.folder.plan()?;
        Ok(plan.trials.iter().find(|trial| trial.hash == hash).map(|trial| self.folder.run_path(&trial.name)))
    }

    /// Forgets a batch, whose outcome is there; its process ends by itself, and its place is free at once.
    pub fn forget(&mut self, batch: u32) {
        self.ended.remove(&batch);
        self.found.remove(&batch);
        if let Some((child, _)) = self.children.remove(&batch) {
            self.leaving.push(child);
            self.reap();
        }
    }

    /// Lets go of the children that have left, so that none stays behind as a zombie.
    fn reap(&mut self) {
        self.leaving.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
    }

    /// Asks the processes to save and leave; asked again they end their programs at once. What works elsewhere finds the wish in the study
    /// folder.
    pub fn stop(&self, outs: &[Out<'_>]) {
        self.each(outs, |pid| kill_process(pid, Signal::TERM));
        self.mark_elsewhere(outs, StudyFolder::leave_path);
    }

    /// Ends the processes; what works elsewhere ends itself once it sees the mark.
    pub fn kill(&self, outs: &[Out<'_>]) {
        self.each(outs, |pid| kill_process_group(pid, Signal::KILL));
        self.mark_elsewhere(outs, StudyFolder::given_up_path);
    }

    fn mark_elsewhere(&self, outs: &[Out<'_>], path: impl Fn(&StudyFolder, u32) -> PathBuf) {
        let batches = outs.iter().map(|out| out.place.batch);
        for batch in batches.filter(|batch| matches!(self.found.get(batch), Some(Found::Elsewhere(..)))) {
            if let Err(error) = write_whole(&path(&self.folder, batch), b"", READABLE) {
                tracing::warn!(%error, batch, "what works on another machine is not told");
            }
        }
    }

    /// How long to wait before the next look.
    pub fn poll_interval() -> Duration {
        Duration::from_millis(POLL_MS)
    }

    fn each(&self, outs: &[Out<'_>], send: impl Fn(Pid) -> rustix::io::Result<()>) {
        // The id of a process that has ended may be another one's by now.
        let is_here = |out: &&Out<'_>| {
            let batch = out.place.batch;
            !self.ended.contains_key(&batch) && !matches!(self.found.get(&batch), Some(Found::Nowhere | Found::Elsewhere(..)))
        };
        for out in outs.iter().filter(is_here) {
            let found = match self.children.get(&out.place.batch) {
                Some((child, _)) => Some(child.id()),
                // A process of an earlier controller: while it holds its lock the id is its own.
                None => holder_process(&self.folder.trial_lock_path(out.hash))
                    .ok()
                    .flatten()
                    .and_then(|(process_id, host)| (host == host_name()).then_some(process_id)),
            };
            let pid = found.and_then(|process_id| Pid::from_raw(i32::try_from(process_id).ok()?));
            if let Some(Err(error)) = pid.map(&send) {
                tracing::debug!(%error, trial = out.hash, "a process had ended before it was told");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{plan, trial};
    use super::super::lock::Taken;
    use super::super::record::Place;
    use super::super::share::Part;
    use super::*;

    /// Trials of an earlier controller, each in a batch of its number.
    fn gone(local: &mut Local, batches: &[u32]) -> Vec<Gone> {
        let out = |&batch| Out { trial: batch as usize, hash: "aa", place: Place { batch, element: 0 } };
        let outs: Vec<Out<'_>> = batches.iter().map(out).collect();
        local.gone(&outs).unwrap()
    }

    fn claimed(folder: &StudyFolder, batch: u32, change: impl Fn(Worker) -> Worker) {
        let worker = change(Worker::this_process(&host_name()).unwrap());
        Claim::Taken(worker).make(folder, batch).unwrap();
    }

    #[test]
    fn a_trial_of_another_machine_is_given_away_once_it_gives_no_sign_of_life() {
        let root = tempfile::tempdir().unwrap();
        let folder = StudyFolder::new(root.path().to_owned());
        folder.make().unwrap();
        StudyFolder::write_json(&folder.plan_path(), &plan(vec![trial("aa")])).unwrap();
        let far = |worker| Worker { boot: "another".to_owned(), machine: "far".to_owned(), ..worker };
        claimed(&folder, 1, far);
        let mut local = Local::new(folder.clone(), PathBuf::from("/nowhere/cloze"), 1);
        let mut look = |age_s: u64, sign: &str| {
            std::fs::write(folder.beat_path(1), sign).unwrap();
            local.began = Instant::now().checked_sub(Duration::from_secs(age_s)).unwrap();
            (gone(&mut local, &[1]), local.news())
        };
        let (nobody, news) = look(0, "1");
        assert!(nobody.is_empty() && news.len() == 1 && news[0].contains("of far"), "{news:?}");
        // Each time until shortly before it counts as lost.
        for (age_s, sign) in [(250, "1"), (260, "2"), (500, "2")] {
            assert_eq!(look(age_s, sign), (Vec::new(), Vec::new()), "{age_s}");
        }
        assert!(!folder.given_up_path(1).exists());
        let (lost, news) = look(601, "2");
        assert!(lost.len() == 1 && lost[0].is_begun && lost[0].how.contains("far"), "{lost:?}");
        assert!(news.len() == 1 && news[0].contains("begins anew"), "{news:?}");
        assert!(folder.given_up_path(1).exists(), "it would go on if it woke up");
    }

    #[test]
    fn what_is_not_claimed_never_begins_and_what_has_ended_here_is_gone_at_once() {
        let root = tempfile::tempdir().unwrap();
        let folder = StudyFolder::new(root.path().to_owned());
        folder.make().unwrap();
        StudyFolder::write_json(&folder.plan_path(), &plan(vec![trial("aa")])).unwrap();
        // An earlier process of this machine, and one from before it was started anew.
        claimed(&folder, 2, |worker| Worker { start_ticks: worker.start_ticks - 1, ..worker });
        claimed(&folder, 3, |worker| Worker { boot: "another".to_owned(), ..worker });
        let mut local = Local::new(folder.clone(), PathBuf::from("/nowhere/cloze"), 1);
        let found = gone(&mut local, &[1, 2, 3]);
        let begun: Vec<(usize, bool)> = found.iter().map(|gone| (gone.trial, gone.is_begun)).collect();
        assert_eq!(begun, [(1, false), (2, true), (3, true)], "{found:?}");
        assert_eq!(Claim::read(&folder, 1).unwrap(), Some(Claim::Withdrawn));
        assert!(local.news().is_empty());
    }

    #[test]
    fn what_an_earlier_version_works_on_without_a_claim_is_not_taken_back() {
        let root = tempfile::tempdir().unwrap();
        let folder = StudyFolder::new(root.path().to_owned());
        folder.make().unwrap();
        let Taken::Ours(lock) = FileLock::take(&folder.trial_lock_path("aa")).unwrap() else { panic!("nobody has it") };
        let mut local = Local::new(folder.clone(), PathBuf::from("/nowhere/cloze"), 1);
        assert_eq!(gone(&mut local, &[1]), Vec::new());
        assert_eq!(Claim::read(&folder, 1).unwrap(), None);
        drop(lock);
        assert!(local.end_of(&Out { trial: 1, hash: "aa", place: Place { batch: 1, element: 0 } }).unwrap().is_some());
    }

    #[test]
    fn a_trial_of_an_earlier_controller_keeps_its_place() {
        let root = tempfile::tempdir().unwrap();
        let folder = StudyFolder::new(root.path().to_owned());
        folder.make().unwrap();
        claimed(&folder, 1, |worker| Worker { part: Some(Part { place: 0, of: 2 }), ..worker });
        let Taken::Ours(_lock) = FileLock::take(&folder.trial_lock_path("aa")).unwrap() else { panic!("nobody has it") };
        let mut local = Local::new(folder, PathBuf::from("/bin/true"), 2);
        assert_eq!(gone(&mut local, &[1]), Vec::new());
        local.submit(&Batch { number: 2, elements: Vec::new() }).unwrap();
        local.forget(1);
        local.submit(&Batch { number: 3, elements: Vec::new() }).unwrap();
        let places: Vec<u32> = local.children.values().map(|(_, place)| *place).collect();
        assert_eq!(places, [1, 0], "the first of them runs beside the one that was there");
    }
}
