//! Trials as arrays of jobs in a batch system: one array for a batch, one element for each allocation.
//!
//! A batch's job has a name that no other has, made of the study's hash, the folder's random key and the batch's number. Which batch a
//! trial is in is on the disk before the job is submitted; so whoever finds a trial in a batch asks for the name, and nothing is submitted
//! twice.

mod script;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use cloze_recipes::failure::Failure;

pub use self::script::{QueueOptions, site_of_jobs};
pub(super) use self::script::{elements_at_once, job_name, share_of};
use super::batch::Batch;
use super::executor::{Gone, Out};
use crate::run_folder::{READABLE, write_whole};
use crate::slurm::{
    Avoided, JobId, JobState, SILENCE_MAX_S, SUBMIT_SETTLED_S, Silence, Slurm, State, Told, after_silence, avoid, next_poll,
};

/// Most elements of one array; batch systems allow 1,001 unless told otherwise.
pub const MAX_ELEMENTS: usize = 1000;

/// Interval at which outcomes are looked for, at most; asking the batch system is rarer.
const POLL_MS: u64 = 500;

/// Answers in a row in which a job is missing before it counts as gone: a busy batch system forgets to mention some.
const MAX_MISSES: u32 = 3;

/// Time after which no further array is told of nodes to avoid in one look, in seconds; two questions of 30 s may still be under way, and
/// all of it is far below the 300 s of a lease.
const KEEP_AWAY_S: u64 = 30;

/// The jobs of a sweep.
#[derive(Debug)]
pub struct Queue {
    options: QueueOptions,
    slurm: Slurm,
    poll_s: u32,
    jobs: BTreeMap<u32, Job>,
    /// Elements that a new array may run at the same time.
    free: u32,
    next_poll_at: Instant,
    unchanged_polls: u32,
    last_states: BTreeMap<JobId, State>,
    /// Answers in a row without an element of a batch.
    misses: BTreeMap<(u32, u32), u32>,
    /// Questions in a row that got no answer, and when the first of them was asked.
    unanswered: Option<(u32, Instant)>,
    /// Nodes that new jobs do not use, besides those of the site. A new controller begins with none, as `cloze resume` does.
    exclude: BTreeSet<String>,
    /// Most nodes that a job may be kept away from, those of the site included; `None` before anybody has asked.
    max_excluded: Option<usize>,
    /// Whether it was said that a job is kept away from no more nodes.
    has_spared: bool,
}

/// The job of a batch.
#[derive(Clone, Debug)]
struct Job {
    /// `None` where nobody has found it.
    id: Option<JobId>,
    /// Elements that run at the same time, at most.
    limit: u32,
    cancel: Cancel,
    /// How many of the nodes to avoid its script names.
    num_avoided: usize,
    /// How many those elements have been told of that waited then. One that begins again knows what its script says.
    told: BTreeMap<Option<u32>, usize>,
    /// When this controller has begun to look after it.
    since: Instant,
}

impl Job {
    fn new(id: Option<JobId>, limit: u32, num_avoided: usize) -> Self {
        Self { id, limit, cancel: Cancel::No, num_avoided, told: BTreeMap::new(), since: Instant::now() }
    }
}

/// A job that is to leave the queue and that SLURM could not be told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftBehind {
    /// Its name.
    pub name: String,
    /// Its number; `None` where nobody has found it.
    pub job: Option<JobId>,
}

/// Whether the job of a batch is to leave the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cancel {
    No,
    /// It is, and SLURM has not been told: perhaps nobody has found it yet.
    Wanted,
    Done,
}

impl Queue {
    /// Finds the batch system. Fails with kind `Environment` where it is not here, and with `Recipe` where several trials are to share
    /// several nodes.
    pub fn new(options: QueueOptions) -> Result<Self, Failure> {
        let slurm = Slurm::find(options.site_of_jobs()?)?;
        Self::over(options, slurm)
    }

    fn over(options: QueueOptions, slurm: Slurm) -> Result<Self, Failure> {
        let (poll_s, free) = (options.site_of_jobs()?.poll_s, elements_at_once(options.concurrency));
        Ok(Self {
            options,
            slurm,
            poll_s,
            jobs: BTreeMap::new(),
            free,
            next_poll_at: Instant::now(),
            unchanged_polls: 0,
            last_states: BTreeMap::new(),
            misses: BTreeMap::new(),
            unanswered: None,
            exclude: BTreeSet::new(),
            max_excluded: None,
            has_spared: false,
        })
    }

    /// Keeps new jobs away from these nodes, and in the next look those that wait. Enough nodes for a job are always left; which bad ones
    /// go on to be used is told the first time only.
    pub fn avoid(&mut self, nodes: &[String]) -> Avoided {
        if nodes.iter().all(|node| self.exclude.contains(node)) {
            return Avoided::default();
        }
        let max_excluded = self.max_excluded();
        let known: Vec<String> = self.exclude.iter().cloned().collect();
        let of_site = self.options.site_of_jobs().map_or(&[][..], |site| &site.exclude);
        let mut avoided = avoid(nodes, &known, of_site, max_excluded);
        self.exclude.extend(avoided.news.iter().cloned());
        if !avoided.news.is_empty() {
            self.next_poll_at = Instant::now();
        }
        if self.has_spared {
            avoided.spared.clear();
        }
        self.has_spared |= !avoided.spared.is_empty();
        avoided
    }

    /// Most nodes that a job may be kept away from. While nobody says how many there are, it is kept away from none.
    fn max_excluded(&mut self) -> usize {
        if self.max_excluded.is_none() {
            match self.slurm.max_excluded(self.options.resources.nodes) {
                Ok(max_excluded) => self.max_excluded = Some(max_excluded),
                Err(failure) => tracing::warn!(%failure, "it is not known how many nodes a job can be kept away from"),
            }
        }
        self.max_excluded.unwrap_or(0)
    }

    /// Submits a batch as one array, the first of arrays with so many elements in all, which share what room there is. Where it is not
    /// known whether a submission came through, its name tells, now or later; an error says that there is surely no job.
    pub fn submit(&mut self, batch: &Batch, open_elements: usize) -> anyhow::Result<()> {
        let script = self.options.folder.job_path(&format!("batch-{:06}.sh", batch.number));
        let limit = share_of(self.free, batch.elements.len(), open_elements);
        let text = self.options.script(batch, limit, &self.exclude, self.slurm.version())?;
        write_whole(&script, text.as_bytes(), READABLE)?;
        let submitted = self.slurm.submit(&script, &[]);
        let id = match submitted {
            Ok(id) => Some(id),
            Err(failure) if Slurm::is_refusal(&failure) => return Err(failure.into()),
            Err(failure) => {
                tracing::warn!(%failure, batch = batch.number, "it is not known whether a batch was submitted; its job is looked for");
                // Where the queue does not answer now, the next look asks again.
                self.slurm.find_by_name(&self.name(batch.number)).ok().and_then(|found| Some(JobId::whole(found.last()?.job)))
            }
        };
        self.jobs.insert(batch.number, Job::new(id, limit, self.exclude.len()));
        self.free = self.free.saturating_sub(limit);
        self.next_poll_at = Instant::now() + next_poll(0, self.poll_s);
        self.unchanged_polls = 0;
        Ok(())
    }

    /// Trials on whose element nobody works any more. The batch system is asked at intervals that grow while nothing changes, and again
    /// where it does not answer; fails with its own failure where that lasts too long.
    pub fn gone(&mut self, outs: &[Out<'_>]) -> anyhow::Result<Vec<Gone>> {
        if outs.is_empty() || Instant::now() < self.next_poll_at {
            return Ok(Vec::new());
        }
        let states = match self.ask(outs) {
            Ok(states) => states,
            Err(failure) => return self.endure(failure).map(|()| Vec::new()).map_err(Into::into),
        };
        self.unanswered = None;
        self.keep_away(&states);
        // Times and reasons change with every answer; only another state is news.
        let brief: BTreeMap<JobId, State> = states.iter().map(|(id, job)| (*id, job.state)).collect();
        self.unchanged_polls = if brief == self.last_states { self.unchanged_polls.saturating_add(1) } else { 0 };
        self.next_poll_at = Instant::now() + next_poll(self.unchanged_polls, self.poll_s);
        self.count_misses(outs, &states);
        let gone = outs.iter().filter_map(|out| Some(Gone::ended(out.trial, self.end_of(out, &states)?))).collect();
        self.last_states = brief;
        Ok(gone)
    }

    /// Looks for the jobs of these trials, takes off the queue what is to leave it, and asks how the jobs are.
    fn ask(&mut self, outs: &[Out<'_>]) -> Result<BTreeMap<JobId, JobState>, Failure> {
        let batches: BTreeSet<u32> = outs.iter().map(|out| out.place.batch).collect();
        for &batch in &batches {
            self.find(batch)?;
        }
        self.jobs.retain(|batch, _| batches.contains(batch));
        let is_unwanted = |job: &&mut Job| job.cancel == Cancel::Wanted && job.id.is_some();
        let mut unwanted: Vec<&mut Job> = self.jobs.values_mut().filter(is_unwanted).collect();
        if !unwanted.is_empty() {
            self.slurm.cancel(&unwanted.iter().filter_map(|job| job.id).collect::<Vec<_>>())?;
            unwanted.iter_mut().for_each(|job| job.cancel = Cancel::Done);
        }
        let ids: Vec<JobId> = self.jobs.values().filter_map(|job| job.id).collect();
        if ids.is_empty() { Ok(BTreeMap::new()) } else { self.slurm.states(&ids) }
    }

    /// Tells the arrays with elements that wait which nodes have turned out to be bad since. Where that is refused, or not done in time, it
    /// is tried again in the next look; until then they may meet them, which costs an attempt.
    fn keep_away(&mut self, states: &BTreeMap<JobId, JobState>) {
        if self.exclude.is_empty() {
            return;
        }
        let nodes: Vec<String> = self.exclude.iter().cloned().collect();
        let (max_excluded, deadline) = (self.max_excluded(), Instant::now() + Duration::from_secs(KEEP_AWAY_S));
        for job in self.jobs.values_mut().filter(|job| job.cancel == Cancel::No) {
            let Some(id) = job.id else { continue };
            let waits =
                |(found, state): (&JobId, &JobState)| (found.job == id.job && state.state == State::Pending).then_some(found.element);
            let waiting: Vec<Option<u32>> = states.iter().filter_map(waits).collect();
            if waiting.iter().all(|element| *job.told.get(element).unwrap_or(&job.num_avoided) >= nodes.len()) {
                continue;
            }
            match self.slurm.exclude_more_nodes(id, &nodes, max_excluded) {
                Ok(Told::NothingWaits) => {}
                Ok(told) => {
                    if told == Told::TooMany {
                        tracing::warn!(job = %id, nodes = nodes.join(","), "a job that waits may meet bad nodes: too few others would be left");
                    }
                    // Those that have begun meanwhile wait with the list of their script when they begin again.
                    job.told = waiting.into_iter().map(|element| (element, nodes.len())).collect();
                }
                Err(failure) => {
                    tracing::warn!(%failure, job = %id, nodes = nodes.join(","), "a job that waits may meet bad nodes");
                    // Each question may take its whole time, and the lease must be renewed meanwhile.
                    return;
                }
            }
            if Instant::now() >= deadline {
                return;
            }
        }
    }

    /// After a question without an answer: the jobs go on whether anybody asks or not, so a while of silence changes nothing.
    fn endure(&mut self, failure: Failure) -> Result<(), Failure> {
        let (unanswered, since) = self.unanswered.map_or((1, Instant::now()), |(count, since)| (count.saturating_add(1), since));
        self.unanswered = Some((unanswered, since));
        let silent = since.elapsed();
        match after_silence(unanswered, silent) {
            (Silence::AskAgain(wait), reason) => {
                tracing::warn!(%failure, ?reason, wait_s = wait.as_secs(), "the batch system does not answer and is asked again");
                self.next_poll_at = Instant::now() + wait;
                Ok(())
            }
            (Silence::GiveUp, _) => Err(failure
                .expected(format!("an answer within {SILENCE_MAX_S} s"))
                .found(format!("none for {} s, asked {unanswered} times", silent.as_secs()))
                .hint(self.what_goes_on())),
        }
    }

    /// Counts the answers in a row that say nothing of an element, also where they know others of its array.
    fn count_misses(&mut self, outs: &[Out<'_>], states: &BTreeMap<JobId, JobState>) {
        let elements: BTreeSet<(u32, u32)> = outs.iter().map(|out| (out.place.batch, out.place.element)).collect();
        self.misses.retain(|element, _| elements.contains(element));
        for (batch, element) in elements {
            let id = self.jobs.get(&batch).and_then(|job| job.id);
            // An array that is told of as a whole and is over says nothing of its elements.
            let is_told = |id: JobId| states.contains_key(&id.element(element)) || states.get(&id).is_some_and(|job| !job.state.is_end());
            let is_known = id.is_some_and(is_told);
            if is_known {
                self.misses.remove(&(batch, element));
            } else if id.is_some() || self.is_settled(batch) {
                *self.misses.entry((batch, element)).or_default() += 1;
            }
        }
    }

    /// Whether the submission of a batch began so long ago that its job is in the queue or never will be. Clocks of two hosts do not tell;
    /// so it is this controller's that counts, since it has looked for the job first.
    fn is_settled(&self, batch: u32) -> bool {
        self.jobs.get(&batch).is_some_and(|job| job.since.elapsed() > Duration::from_secs(SUBMIT_SETTLED_S))
    }

    /// How the element of a trial has ended; `None` while it has not.
    fn end_of(&self, out: &Out<'_>, states: &BTreeMap<JobId, JobState>) -> Option<String> {
        let job = self.jobs.get(&out.place.batch)?;
        let is_missed = self.misses.get(&(out.place.batch, out.place.element)).is_some_and(|&misses| misses >= MAX_MISSES);
        let Some(id) = job.id else {
            return is_missed.then(|| "its job was never submitted".to_owned());
        };
        match told(id, out.place.element, states) {
            Word::Ended(how) => Some(how),
            Word::Waits | Word::Runs => None,
            Word::Nothing => is_missed.then(|| unknown(id, out.place.element)),
        }
    }

    /// What becomes of the jobs once nobody looks after them.
    fn what_goes_on(&self) -> String {
        let folder = self.options.folder.root().display();
        match self.left_behind().as_slice() {
            [] => format!("the jobs go on by themselves; `cloze sweep resume {folder}` takes them in"),
            left => {
                let names: Vec<String> = left.iter().map(|left| format!("`scancel --name={}`", left.name)).collect();
                format!("jobs that were to be cancelled may still run: {}", names.join(", "))
            }
        }
    }

    /// Finds the job of a batch that an earlier controller has submitted, or whose submission had no clear outcome.
    fn find(&mut self, batch: u32) -> Result<(), Failure> {
        if self.jobs.get(&batch).is_some_and(|job| job.id.is_some()) {
            return Ok(());
        }
        let id = self.slurm.find_by_name(&self.name(batch))?.last().map(|id| JobId::whole(id.job));
        self.job(batch).id = id;
        Ok(())
    }

    fn job(&mut self, batch: u32) -> &mut Job {
        let limit = elements_at_once(self.options.concurrency);
        self.jobs.entry(batch).or_insert_with(|| Job::new(None, limit, 0))
    }

    /// Takes the jobs of these trials off the queue, in the next look: also one that shows up later, and where nobody answers now.
    pub fn cancel(&mut self, outs: &[Out<'_>]) {
        for out in outs {
            let job = self.job(out.place.batch);
            // One that SLURM has been told of stays so: whoever asks twice has nothing else to do about it.
            if job.cancel == Cancel::No {
                job.cancel = Cancel::Wanted;
            }
        }
        self.next_poll_at = Instant::now();
    }

    /// The jobs that are to leave the queue and that SLURM could not be told of.
    pub fn left_behind(&self) -> Vec<LeftBehind> {
        let left = self.jobs.iter().filter(|(_, job)| job.cancel == Cancel::Wanted);
        left.map(|(&batch, job)| LeftBehind { name: self.name(batch), job: job.id }).collect()
    }

    /// Elements that may run beside those of the arrays that are out. Each array keeps its own limit, so what is left is the next one's.
    pub fn room(&mut self, outs: &[Out<'_>]) -> usize {
        let mut open: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for out in outs {
            open.entry(out.place.batch).or_default().insert(out.place.element);
        }
        let all = elements_at_once(self.options.concurrency);
        let limit = |batch| self.jobs.get(batch).map_or(all, |job| job.limit);
        let used: u32 = open.iter().map(|(batch, elements)| (elements.len() as u32).min(limit(batch))).sum();
        self.free = all.saturating_sub(used);
        self.free as usize
    }

    /// Whether the arrays that are out use up what the sweep allows.
    pub fn is_full(&self) -> bool {
        self.free == 0
    }

    /// How many trials share an element.
    pub fn pack(&self) -> usize {
        self.options.concurrency.1.max(1) as usize
    }

    /// How long to wait before the next look at outcomes.
    pub fn poll_interval(&self) -> Duration {
        Duration::from_millis(POLL_MS)
    }

    fn name(&self, batch: u32) -> String {
        job_name(&self.options.info, batch)
    }
}

impl fmt::Display for LeftBehind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        match self.job {
            Some(job) => write!(f, "job {job} ({name}) could not be cancelled and may still run: scancel {job}"),
            None => write!(f, "job {name} was not found; should it show up in `squeue --name={name}`: scancel --name={name}"),
        }
    }
}

/// What a batch system says of an element of an array.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// It is over, in words.
    Ended(String),
    /// It waits, for the first time or again.
    Waits,
    /// It runs.
    Runs,
    /// Nothing.
    Nothing,
}

/// What these states say of an element of an array.
pub(super) fn told(array: JobId, element: u32, states: &BTreeMap<JobId, JobState>) -> Word {
    let id = array.element(element);
    match states.get(&id) {
        Some(state) if state.state.is_end() => Word::Ended(match &state.exit {
            Some(exit) => format!("job {id}: {}, {exit}", state.state),
            None => format!("job {id}: {}", state.state),
        }),
        Some(state) => alive(state.state),
        // Elements that still wait are told of as a whole by some versions.
        None => match states.get(&array) {
            Some(state) if !state.state.is_end() => alive(state.state),
            _ => Word::Nothing,
        },
    }
}

fn alive(state: State) -> Word {
    if matches!(state, State::Pending | State::Requeued | State::Configuring) { Word::Waits } else { Word::Runs }
}

/// How an element has ended of which the batch system says nothing.
pub(super) fn unknown(array: JobId, element: u32) -> String {
    format!("the batch system does not know job {} any more", array.element(element))
}

#[cfg(test)]
mod tests;
