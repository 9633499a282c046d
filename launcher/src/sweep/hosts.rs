//! Trials on hosts that a remote shell reaches: each a process there, which outlives a broken connection and a controller that is killed.
//!
//! Nothing waits for a remote shell: each host is visited now and then by a short command ([`super::visit`]), on a thread of its own
//! (`visit`), which ends with it and tells its failure as the answer. Which host gets a batch, and when a batch counts as gone, is decided
//! in `decide.rs`. A batch belongs to the process that has claimed it ([`super::claim`]), so it can be ordered twice and is begun once; one
//! that nobody has claimed can be taken back, whether its host is there or not.

mod call;
mod decide;
mod greet;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloze_cluster::host::host_name;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::{Site, SshSite};
use cloze_recipes::study::Resources;

use self::call::Visitor;
pub use self::decide::places_of_host;
use self::decide::{BatchFacts, Fate, HostLoad, SILENCE_MAX_S, fate, free_places, is_alone, next_host, next_visit};
use self::greet::brief;
pub(super) use self::greet::look_at;
pub use self::greet::{greet_hosts, site_of_hosts};
use super::batch::Batch;
use super::beat::Signs;
use super::claim::Claim;
use super::executor::{Gone, Out};
use super::folder::StudyFolder;
use super::share::least_used;
use super::visit::{Orders, Report, Start, Word};
use crate::hosts::{Preparation, RemoteHost, is_name_of};
use crate::run_folder::{READABLE, storage, write_whole};
use crate::slurm::Avoided;

/// Interval at which outcomes and the ends of visits are looked for, in milliseconds; visits are rarer.
const POLL_MS: u64 = 200;

/// Starts of a batch on a host that answers, after each of which nobody had claimed it; then the host is left out.
const MAX_ABSENCES: u32 = 3;

/// Longest wait for the visits that end what is out, in seconds, before the controller leaves.
const END_WAIT_S: u64 = 10;

/// What hosts need to know of their study.
#[derive(Clone, Debug)]
pub struct HostsOptions {
    /// The study folder, under the path that all hosts share.
    pub folder: StudyFolder,
    /// The `cloze` program, under such a path too.
    pub program: PathBuf,
    /// Machines of one trial.
    pub resources: Resources,
    /// Trials that run at the same time, over all hosts.
    pub concurrency: u32,
}

/// The hosts of a sweep.
#[derive(Debug)]
pub struct Hosts {
    visitor: Visitor,
    site: SshSite,
    concurrency: u32,
    /// What the lock of this controller says.
    controller: Option<String>,
    states: Vec<HostState>,
    batches: BTreeMap<u32, Given>,
    answers: (Sender<Answer>, Receiver<Answer>),
    /// When this controller began.
    began: Instant,
    /// When a host has answered last; the beginning, before any has.
    last_answer: Instant,
    news: Vec<String>,
    has_spared: bool,
}

/// A host.
#[derive(Debug)]
struct HostState {
    remote: RemoteHost,
    /// Whether the cluster file names it; one that it names no more may still have batches.
    is_listed: bool,
    /// Whether it has ever answered.
    is_known: bool,
    /// Visits in a row that failed.
    failures: u32,
    /// Whether a visit is under way.
    is_visited: bool,
    next_visit: Instant,
    /// Answers in a row that brought nothing new.
    unchanged: u32,
    check: Check,
    /// Batches that were given up there, of which nothing may be left.
    ends: BTreeSet<u32>,
}

/// What is known of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    /// Each trial checks it.
    Open,
    /// A trial has come to its end there.
    Passed,
    /// It is to blame for a trial's failure.
    Failed,
}

/// A batch that is out.
#[derive(Debug)]
struct Given {
    host: usize,
    place: u32,
    /// What its host has said last, and since when.
    word: Option<(Word, Instant)>,
    /// Its signs of life, looked at while its host cannot be visited.
    signs: Signs,
    stop: Stop,
    /// How often it was started, and nobody had claimed it in time.
    absences: u32,
}

/// Whether a batch is to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    No,
    /// It is, and its host has not been told.
    Wanted,
    Told,
}

/// The end of a visit.
#[derive(Debug)]
struct Answer {
    host: usize,
    orders: Orders,
    result: Result<Report, Failure>,
}

impl Hosts {
    /// The hosts of a site, none of which has been visited. Fails with kind `Recipe` where they are not such a site's.
    pub fn new(options: HostsOptions, site: &Site) -> anyhow::Result<Self> {
        let ssh = site_of_hosts(&options.resources, site)?.clone();
        let lock = options.folder.lock_path();
        let controller = fs::read_to_string(&lock).map_err(|error| storage("read the lock of the study", &lock, &error))?;
        // A file server hears of what a client has written when it is pressed to.
        File::open(&lock).and_then(|file| file.sync_data()).map_err(|error| storage("write the lock of the study", &lock, &error))?;
        let visitor =
            Visitor { preparation: Preparation::of(site, &options.resources).words(), program: options.program, folder: options.folder };
        let here = host_name();
        let states = ssh.hosts.iter().map(|name| HostState::new(RemoteHost::of(name, &ssh.command, &here), true)).collect();
        Ok(Self {
            visitor,
            concurrency: options.concurrency.max(1),
            site: ssh,
            controller: Some(controller.trim().to_owned()),
            states,
            batches: BTreeMap::new(),
            answers: channel(),
            began: Instant::now(),
            last_answer: Instant::now(),
            news: Vec::new(),
            has_spared: false,
        })
    }

    /// Takes in what hosts have answered, and visits those that are to be visited. Fails with kind `Environment` where no host has answered
    /// for too long.
    pub fn tend(&mut self) -> anyhow::Result<()> {
        while let Ok(answer) = self.answers.1.try_recv() {
            self.hear(answer);
        }
        // One that gets nothing any more is not asked, and its silence tells nothing.
        let has_batches = |index: usize| self.batches.values().any(|given| given.host == index);
        let counts = |index: usize, host: &HostState| host.failures == 0 && (host.check != Check::Failed || has_batches(index));
        let num_answering = self.states.iter().enumerate().filter(|(index, host)| counts(*index, host)).count();
        if is_alone(num_answering, self.last_answer.elapsed()) {
            return Err(self.alone().into());
        }
        self.send(Instant::now())
    }

    /// Gives a batch, which has one element here, to the host that is used least.
    pub fn submit(&mut self, batch: &Batch) -> anyhow::Result<()> {
        let host = next_host(&self.loads(), self.concurrency).context("no host has room for a trial")?;
        let taken: Vec<u32> = self.batches.values().filter(|given| given.host == host).map(|given| given.place).collect();
        let place = least_used(self.places(), &taken.iter().copied());
        self.batches.insert(batch.number, Given { host, place, word: None, signs: Signs::default(), stop: Stop::No, absences: 0 });
        self.states[host].next_visit = Instant::now();
        Ok(())
    }

    /// Trials on which nobody works any more.
    pub fn gone(&mut self, outs: &[Out<'_>]) -> anyhow::Result<Vec<Gone>> {
        let is_out: BTreeSet<u32> = outs.iter().map(|out| out.place.batch).collect();
        self.batches.retain(|batch, _| is_out.contains(batch));
        let mut gone = Vec::new();
        for out in outs {
            let batch = out.place.batch;
            if !self.batches.contains_key(&batch) && !self.adopt(batch)? {
                gone.push(Gone::not_begun(out.trial));
                continue;
            }
            let found = self.fate_of(batch, out.trial)?;
            if found.is_some() {
                self.batches.remove(&batch);
            }
            gone.extend(found);
        }
        Ok(gone)
    }

    /// Forgets a batch, whose outcome is there; `is_good` says that its trial came to its end. Its process ends by itself.
    pub fn forget(&mut self, batch: u32, is_good: bool) {
        if let Some(given) = self.batches.remove(&batch) {
            let check = &mut self.states[given.host].check;
            if is_good && *check == Check::Open {
                *check = Check::Passed;
            }
        }
    }

    /// Asks what is out to save and leave; asked again it ends its programs at once. What nobody has begun is taken back in the next look,
    /// and what works on a host that cannot be visited finds the wish in the study folder.
    pub fn stop(&mut self, outs: &[Out<'_>]) {
        for out in outs {
            if let Some(given) = self.batches.get_mut(&out.place.batch) {
                if let Err(error) = write_whole(&self.visitor.folder.leave_path(out.place.batch), b"", READABLE) {
                    tracing::warn!(%error, "what works on a host that cannot be visited is not told to leave");
                }
                given.stop = Stop::Wanted;
                self.states[given.host].next_visit = Instant::now();
            }
        }
    }

    /// Ends what is out, as far as its hosts can be visited now.
    pub fn kill(&self, outs: &[Out<'_>]) {
        let mut ends: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
        for out in outs {
            if let Some(given) = self.batches.get(&out.place.batch) {
                ends.entry(given.host).or_default().push(out.place.batch);
            }
        }
        let visits: Vec<_> = ends.into_iter().map(|(host, ends)| self.begin(host, Orders { ends, ..self.orders(host) })).collect();
        let deadline = Instant::now() + Duration::from_secs(END_WAIT_S);
        while visits.iter().flatten().any(|visit| !visit.is_finished()) && Instant::now() < deadline {
            sleep(Duration::from_millis(POLL_MS));
        }
    }

    /// What to say of batches that were to leave and whose hosts could not be told.
    pub fn left_behind(&self) -> Vec<String> {
        let left = self.batches.iter().filter(|(_, given)| given.stop != Stop::No);
        let text = |(batch, given): (&u32, &Given)| {
            let host = &self.states[given.host].remote.name;
            format!("what works on batch {batch} may still run on {host}; `cloze sweep resume` takes it in")
        };
        left.map(text).collect()
    }

    /// Gives no more batches to the host of this one, whose check has failed, as long as another one is left that answers.
    pub fn avoid(&mut self, batch: u32) -> Avoided {
        let Some(host) = self.batches.get(&batch).map(|given| given.host) else { return Avoided::default() };
        let name = vec![self.states[host].remote.name.clone()];
        let others = self.states.iter().enumerate().filter(|(index, other)| *index != host && other.is_listed && other.is_usable());
        match (others.count(), self.states[host].check == Check::Failed) {
            (_, true) => Avoided::default(),
            (0, _) => {
                let spared = if self.has_spared { Vec::new() } else { name };
                self.has_spared = true;
                Avoided { spared, ..Avoided::default() }
            }
            _ => {
                self.states[host].check = Check::Failed;
                Avoided { news: name, ..Avoided::default() }
            }
        }
    }

    /// The host that has a batch.
    pub fn host_of(&self, batch: u32) -> Option<&str> {
        self.batches.get(&batch).map(|given| self.states[given.host].remote.name.as_str())
    }

    /// Trials that may be out beside those that are.
    pub fn room(&self) -> usize {
        free_places(&self.loads(), self.concurrency)
    }

    /// What is to be said of hosts, each once.
    pub fn news(&mut self) -> Vec<String> {
        std::mem::take(&mut self.news)
    }

    /// How long to wait before the next look.
    pub fn poll_interval() -> Duration {
        Duration::from_millis(POLL_MS)
    }

    fn places(&self) -> u32 {
        places_of_host(self.concurrency, self.site.hosts.len())
    }

    fn loads(&self) -> Vec<HostLoad> {
        let load = |index: usize| self.batches.values().filter(|given| given.host == index).count() as u32;
        let listed = self.states.iter().enumerate().filter(|(_, host)| host.is_listed);
        listed.map(|(index, host)| HostLoad { is_usable: host.is_usable(), load: load(index) }).collect()
    }

    fn hear(&mut self, Answer { host: index, orders, result }: Answer) {
        let now = Instant::now();
        let host = &mut self.states[index];
        host.is_visited = false;
        match result {
            Ok(report) => {
                self.last_answer = now;
                if host.failures > 0 {
                    self.news.push(format!("host {} answers again", host.remote.name));
                }
                (host.failures, host.is_known) = (0, true);
                host.ends.retain(|batch| !orders.ends.contains(batch));
                self.note(index, &orders, report, now);
            }
            Err(failure) => {
                host.failures = host.failures.saturating_add(1);
                host.next_visit = now + next_visit(host.failures, 0);
                if host.failures == 1 {
                    self.news.push(format!("warning: host {} is left out until it answers: {}", host.remote.name, brief(&failure)));
                }
                tracing::debug!(%failure, host = host.remote.name, failures = host.failures, "a host could not be visited");
            }
        }
    }

    /// Keeps what a host has told of its batches.
    fn note(&mut self, index: usize, orders: &Orders, report: Report, now: Instant) {
        let mut has_news = false;
        for (batch, word) in report.batches {
            let Some(given) = self.batches.get_mut(&batch).filter(|given| given.host == index) else { continue };
            given.signs = Signs::default();
            given.absences += u32::from(word == Word::Absent);
            if given.word.as_ref().is_none_or(|(known, _)| *known != word) {
                given.word = Some((word, now));
                has_news = true;
            }
            if orders.stops.contains(&batch) && given.stop == Stop::Wanted {
                given.stop = Stop::Told;
            }
        }
        let is_due = self.batches.values().any(|given| given.host == index && (given.word.is_none() || given.stop == Stop::Wanted));
        let host = &mut self.states[index];
        host.unchanged = if has_news { 0 } else { host.unchanged.saturating_add(1) };
        host.next_visit = if is_due { now } else { now + next_visit(0, host.unchanged) };
    }

    /// Visits the hosts whose time has come.
    fn send(&mut self, now: Instant) -> anyhow::Result<()> {
        for index in 0..self.states.len() {
            let host = &self.states[index];
            if host.is_visited || now < host.next_visit {
                continue;
            }
            let orders = self.orders(index);
            let is_needed = !host.is_known || host.failures > 0 || !orders.is_empty();
            if is_needed {
                self.states[index].is_visited = true;
                self.begin(index, orders)?;
            }
        }
        Ok(())
    }

    fn orders(&self, index: usize) -> Orders {
        let host = &self.states[index];
        let mut orders = Orders {
            host: host.remote.name.clone(),
            controller: self.controller.clone(),
            ends: host.ends.iter().copied().collect(),
            is_checked: host.check == Check::Passed,
            ..Orders::default()
        };
        for (&batch, given) in self.batches.iter().filter(|(_, given)| given.host == index) {
            let is_begun = !matches!(given.word, None | Some((Word::Absent, _)));
            if is_begun {
                orders.looks.push(batch);
                orders.stops.extend((given.stop == Stop::Wanted).then_some(batch));
            } else if given.stop == Stop::No {
                orders.starts.push(Start { batch, place: given.place, of: self.places() });
            }
        }
        orders
    }

    fn begin(&self, index: usize, orders: Orders) -> anyhow::Result<thread::JoinHandle<()>> {
        let (visitor, host, sender) = (self.visitor.clone(), self.states[index].remote.clone(), self.answers.0.clone());
        let visit = move || {
            let result = visitor.visit(&host, &orders);
            // Where the controller is gone nobody wants to know.
            drop(sender.send(Answer { host: index, orders, result }));
        };
        thread::Builder::new().name("visit".to_owned()).spawn(visit).context("start a thread")
    }

    /// Finds the host of a batch that an earlier controller has given out; false where nobody had begun with it, and nobody does any more.
    fn adopt(&mut self, batch: u32) -> anyhow::Result<bool> {
        let folder = &self.visitor.folder;
        let found = match Claim::read(folder, batch)? {
            Some(claim) => claim,
            None => Claim::Withdrawn.make(folder, batch)?,
        };
        let Claim::Taken(worker) = found else { return Ok(false) };
        // This machine may have been called otherwise by a controller elsewhere.
        let here = host_name();
        let is_it = |host: &HostState| host.remote.name == worker.host || (host.remote.is_here() && is_name_of(&worker.host, &here));
        let known = self.states.iter().position(is_it);
        let host = known.unwrap_or_else(|| {
            let host = RemoteHost::of(&worker.host, &self.site.command, &here);
            self.states.push(HostState::new(host, false));
            self.states.len() - 1
        });
        let taken: Vec<u32> = self.batches.values().filter(|given| given.host == host).map(|given| given.place).collect();
        let place = worker.part.map_or_else(|| least_used(self.places(), &taken.iter().copied()), |part| part.place);
        // Its claim is all that is known: it lives until its host says something else.
        let word = Some((Word::Lives, Instant::now()));
        self.batches.insert(batch, Given { host, place, word, signs: Signs::default(), stop: Stop::No, absences: 0 });
        self.states[host].next_visit = Instant::now();
        Ok(true)
    }

    /// What has become of a batch, once nobody works on it.
    fn fate_of(&mut self, batch: u32, trial: usize) -> anyhow::Result<Option<Gone>> {
        let folder = self.visitor.folder.clone();
        let Some(given) = self.batches.get_mut(&batch) else { return Ok(None) };
        let host = &mut self.states[given.host];
        let is_reached = host.failures == 0;
        let silent = if is_reached { Duration::ZERO } else { given.signs.silent(self.began.elapsed(), &folder, batch) };
        let facts = BatchFacts {
            is_reached,
            word: given.word.as_ref().map(|(word, _)| word),
            unchanged: given.word.as_ref().map_or(Duration::ZERO, |(_, since)| since.elapsed()),
            silent,
        };
        let is_unbegun = matches!(facts.word, None | Some(Word::Absent));
        let lost_after = Duration::from_secs(self.site.lost_after_s.into());
        let (decision, reason) = match fate(&facts, lost_after) {
            (Fate::Wait, reason) if is_unbegun && (given.stop != Stop::No || given.absences >= MAX_ABSENCES) => (Fate::Withdraw, reason),
            decided => decided,
        };
        match (decision, &given.word) {
            (Fate::Wait, _) => Ok(None),
            (Fate::Withdraw, _) => {
                if Claim::Withdrawn.make(&folder, batch)? == Claim::Withdrawn {
                    let never_begins = given.absences >= MAX_ABSENCES;
                    let how = format!("it was started {MAX_ABSENCES} times, and did not begin");
                    return Ok(Some(if never_begins { self.never_began(batch, trial, &how) } else { Gone::not_begun(trial) }));
                }
                // It has begun, and nobody has heard of that.
                given.word = Some((Word::Lives, Instant::now()));
                host.next_visit = host.next_visit.min(Instant::now() + next_visit(host.failures, 0));
                Ok(None)
            }
            (Fate::GiveUp, _) => {
                write_whole(&folder.given_up_path(batch), b"", READABLE)?;
                host.ends.insert(batch);
                let (name, silent_s) = (&host.remote.name, silent.as_secs());
                self.news.push(format!(
                    "warning: host {name} cannot be reached, and what works there on batch {batch} has given no sign of life for \
                     {silent_s} s; its trial is given to another host"
                ));
                Ok(Some(Gone::ended(trial, format!("{name}: {reason} for {silent_s} s"))))
            }
            // What was ordered twice may have begun after all.
            (Fate::Gone, Some((Word::Failed(_), _))) if Claim::Withdrawn.make(&folder, batch)? != Claim::Withdrawn => {
                given.word = Some((Word::Lives, Instant::now()));
                Ok(None)
            }
            (Fate::Gone, Some((Word::Failed(how), _))) => {
                let how = how.clone();
                Ok(Some(self.never_began(batch, trial, &how)))
            }
            (Fate::Gone, Some((Word::Gone(how), _))) => Ok(Some(Gone::ended(trial, format!("{}: {how}", host.remote.name)))),
            (Fate::Gone, _) => Ok(Some(Gone::ended(trial, format!("{}: {reason}", host.remote.name)))),
        }
    }

    /// What cannot even begin on a host is tried on another one, at no cost of an attempt, and the host gets nothing more; on the last host
    /// it counts as tried.
    fn never_began(&mut self, batch: u32, trial: usize, how: &str) -> Gone {
        let name = self.host_of(batch).unwrap_or_default().to_owned();
        if self.avoid(batch).news.is_empty() && self.has_spared {
            return Gone::ended(trial, format!("{name}: {how}"));
        }
        let line = format!("warning: host {name} gets no more trials: what is started there does not begin: {how}");
        if !self.news.contains(&line) {
            self.news.push(line);
        }
        Gone::not_begun(trial)
    }

    fn alone(&self) -> Failure {
        let names: Vec<&str> = self.states.iter().map(|host| host.remote.name.as_str()).collect();
        let shown = self.visitor.folder.root().display();
        Failure::new(FailureKind::Environment, "no host of the sweep can be reached")
            .at(names.join(", "))
            .expected(format!("an answer of one within {SILENCE_MAX_S} s"))
            .found(format!("none for {} s", self.last_answer.elapsed().as_secs()))
            .hint(format!("what is out goes on by itself; `cloze sweep resume {shown}` takes it in once the hosts are there again"))
    }
}

impl HostState {
    fn new(remote: RemoteHost, is_listed: bool) -> Self {
        Self {
            remote,
            is_listed,
            is_known: false,
            failures: 0,
            is_visited: false,
            next_visit: Instant::now(),
            unchanged: 0,
            check: Check::Open,
            ends: BTreeSet::new(),
        }
    }

    /// Whether it may get batches.
    fn is_usable(&self) -> bool {
        self.is_known && self.failures == 0 && self.check != Check::Failed
    }
}

#[cfg(test)]
mod tests;
