//! A run in a job: what the batch script becomes on the first node, from its start to the decision what follows.

use std::io::Write;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use cloze_cluster::RunEnd;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;

use super::attempt::{Attempt, Attempted, one_line};
use super::begin::{Arrival, Begin, Predecessor, decide_begin};
use super::client::{SUBMIT_SETTLED_S, Slurm};
use super::exclusion::{Avoided, avoid};
use super::job::{JobId, JobState, State};
use super::journal::{self, AttemptEvent, JobRecord, Role};
use super::machines::Machines;
use super::paths::JobPaths;
use super::poll::patiently;
use super::submission::{Jobs, Submission, unix_time};
use super::verdict::{AttemptEnd, Circumstances, Decision, decide};
use super::watch::Warnings;
use crate::run_folder::{RunFolder, RunPaths};

/// Longest wait for a job to be over that this one waited for, in seconds; its processes may take their time to end.
const PREDECESSOR_WAIT_S: u64 = 120;

/// Interval at which it is looked at, in seconds.
const PREDECESSOR_POLL_S: u64 = 2;

/// What a job's run needs, besides its folder.
pub struct AllocationOptions<'a> {
    /// The run.
    pub paths: RunPaths,
    /// Opens the run folder and its data, and says how many steps there are.
    pub open: &'a dyn Fn(&RunPaths) -> anyhow::Result<(RunFolder, Recipe, u64)>,
    /// Build of the worker program.
    pub worker_build: String,
    /// Where progress is shown; usually standard error, which is the job's log.
    pub output: &'a dyn Fn() -> Box<dyn Write + Send>,
}

/// How a job is to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobOutcome {
    /// Exit code.
    pub code: u8,
    /// The failure to show.
    pub failure: Option<Failure>,
}

/// Runs an attempt of a run in the job around this process, and does what is decided at its end. Blocks. An error is one before the
/// attempt has begun, or of the run folder's disk.
pub fn run_in_job(options: &AllocationOptions<'_>) -> anyhow::Result<JobOutcome> {
    let warnings = Warnings::listen()?;
    let submission = Submission::read(&JobPaths::of(&options.paths))?.ok_or_else(|| {
        Failure::new(FailureKind::Recipe, "this run has no jobs").at(options.paths.root().display()).hint("`cloze submit` submits a run")
    })?;
    let slurm = Arc::new(Slurm::find(submission.slurm()?)?);
    let machines = patiently(|| Ok(Machines::of_this_job(&slurm)?))?;
    let mut job =
        Job { options, submission, slurm, machines, warnings, started: Instant::now(), attempt: 0, role: Role::Asked, exclude: Vec::new() };
    if let Some(outcome) = job.arrive()? {
        return Ok(outcome);
    }
    let Attempted { end, bad_nodes } = job.attempt();
    let (end, failure) = match end {
        RunEnd::Finished { .. } => (AttemptEnd::Finished, None),
        RunEnd::Stopped { .. } => (AttemptEnd::Stopped, None),
        RunEnd::Failed(failure) => (AttemptEnd::Failed(failure.kind), Some(failure)),
    };
    job.leave(end, failure, bad_nodes)
}

/// The job around this process.
struct Job<'a> {
    options: &'a AllocationOptions<'a>,
    submission: Submission,
    slurm: Arc<Slurm>,
    machines: Machines,
    warnings: Warnings,
    started: Instant,
    /// Number of the attempt, from 1.
    attempt: u32,
    role: Role,
    /// Nodes that this job does not use, besides those of the site.
    exclude: Vec<String>,
}

impl Job<'_> {
    /// Decides whether there is anything to do. If so the attempt is noted, and a successor waits for it to fail.
    fn arrive(&mut self) -> anyhow::Result<Option<JobOutcome>> {
        let slurm = Arc::clone(&self.slurm);
        let mut jobs = patiently(|| Jobs::open(&slurm, &self.options.paths))?;
        if !self.paths().cancelled().exists() {
            self.settle(&mut jobs)?;
        }
        let mine = jobs.records().iter().find(|record| record.id_here() == Some(self.machines.job)).cloned();
        if let Some(record) = mine {
            (self.role, self.exclude) = (record.role, record.exclude);
        }
        let attempts: Vec<AttemptEvent> = journal::read(&self.paths().attempts())?;
        let begun = num_begun(jobs.records(), &attempts);
        let all = attempts.iter().filter(|event| matches!(event, AttemptEvent::Started { .. })).count() as u32;
        let max_jobs = self.submission.slurm()?.max_jobs;
        let (predecessor, last_decision) = match self.role {
            // One that was put back has begun before, and nobody has gone on in its place.
            Role::Successor { of } if self.machines.requeues == 0 => (self.end_of(of)?, decision_of(&attempts, of)),
            _ => (Predecessor::None, None),
        };
        let is_cancelled = self.paths().cancelled().exists();
        let is_replaced = is_replaced(jobs.records(), self.role);
        let arrival = Arrival { predecessor, last_decision, is_replaced, is_cancelled, attempts: begun, max_jobs };
        let (begin, reason) = decide_begin(&arrival);
        self.attempt = all + 1;
        match begin {
            Begin::Go => {}
            Begin::Nothing => {
                self.say(&format!("job {} has nothing to do: {reason}", self.machines.job))?;
                return Ok(Some(JobOutcome { code: 0, failure: None }));
            }
            Begin::GiveUp => {
                let failure = Failure::new(FailureKind::Run, format!("the run does not begin: {reason}"));
                return Ok(Some(JobOutcome { code: failure.kind.exit_code(), failure: Some(failure) }));
            }
        }
        let Machines { job, name, requeues, nodes } = self.machines.clone();
        let shown = nodes.join(", ");
        self.say(&format!("job {job}, attempt {} ({} of at most {max_jobs}), on {shown}", self.attempt, begun + 1))?;
        journal::append(
            &self.paths().attempts(),
            &AttemptEvent::Started { time: unix_time()?, attempt: self.attempt, job, name, requeues, nodes },
        )?;
        if begun + 1 < max_jobs {
            self.queue_successor(&mut jobs)?;
        }
        Ok(None)
    }

    /// The job before, or an earlier start of this one, may have been cut off while it submitted another, which this one must not meet.
    fn settle(&self, jobs: &mut Jobs<'_>) -> anyhow::Result<()> {
        for name in jobs.open_names() {
            self.say(&format!("job {name}, whose submission was cut off, is looked for, for up to {SUBMIT_SETTLED_S} s"))?;
        }
        jobs.settle()
    }

    /// A job that waits for this one to fail, because a warning may not come. The run goes on without one where none is allowed.
    fn queue_successor(&mut self, jobs: &mut Jobs<'_>) -> anyhow::Result<()> {
        let job = self.machines.job;
        if let Some(successor) = jobs.successor_of(job) {
            match patiently(|| Ok(self.slurm.states(&[successor])?)) {
                Ok(known) if known.values().all(|state| state.state.is_end()) => {}
                Ok(_) => return Ok(()),
                // The run goes on with the successor that was submitted; a second one could meet it.
                Err(error) => return self.say(&format!("warning: SLURM does not say how job {successor} is: {}", one_line(&error))),
            }
        }
        match jobs.submit(&self.submission, &self.run_name()?, Role::Successor { of: job }, &self.exclude) {
            Ok(successor) => self.say(&format!("job {successor} goes on with the run if this one fails")),
            Err(error) => self.say(&format!("warning: no job waits for this one to fail: {}", one_line(&error))),
        }
    }

    fn attempt(&self) -> Attempted {
        let Self { options, submission, slurm, machines, warnings, .. } = self;
        Attempt { options, submission, slurm, machines, warnings, until_step: None, is_quiet: false }.go()
    }

    /// Decides what follows, writes it down and does it.
    fn leave(&self, end: AttemptEnd, failure: Option<Failure>, bad_nodes: Vec<String>) -> anyhow::Result<JobOutcome> {
        let shown = if end == AttemptEnd::Finished { None } else { self.own_state()? };
        let slurm_site = self.submission.slurm()?;
        let attempts = num_begun(&journal::jobs(journal::read(&self.paths().jobs())?), &journal::read(&self.paths().attempts())?);
        let circumstances = Circumstances {
            end,
            warning: self.warnings.seen(),
            elapsed_s: elapsed_s(shown.as_ref(), self.started.elapsed()),
            limit_s: shown.as_ref().and_then(|job| job.limit_s),
            warning_s: u64::from(slurm_site.warning_s),
            state: shown.as_ref().map(|job| job.state),
            is_preempted: shown.as_ref().is_some_and(|job| job.is_preempted),
            is_cancelled: self.paths().cancelled().exists(),
            attempts,
            max_jobs: slurm_site.max_jobs,
            bad_nodes,
            num_nodes: self.machines.nodes.len(),
        };
        let (decision, reason) = decide(&circumstances);
        let decision = self.leave_enough_nodes(decision)?;
        self.note_end(&decision, &reason.to_string(), &circumstances, failure.as_ref())?;
        let code = self.apply(&decision, end)?;
        Ok(JobOutcome { code, failure: failure.filter(|_| code != 0) })
    }

    /// Leaves a job that takes the place of this one enough nodes to start: it would wait for ever where one that is bad is the last that
    /// it could have. The pre-flight finds that node again, and each try counts against `slurm.max_jobs`.
    fn leave_enough_nodes(&self, decision: Decision) -> anyhow::Result<Decision> {
        let Decision::Replace { exclude } = decision else { return Ok(decision) };
        let avoided = bounded(&self.slurm, &self.submission, &self.exclude, &exclude)?;
        if let Some(warning) = avoided.warning {
            self.say(&warning)?;
        }
        Ok(Decision::Replace { exclude: avoided.news })
    }

    fn note_end(&self, decision: &Decision, reason: &str, now: &Circumstances, failure: Option<&Failure>) -> anyhow::Result<()> {
        self.say(&format!("attempt {} ended: {reason}; {decision}", self.attempt))?;
        let event = AttemptEvent::Ended {
            time: unix_time()?,
            attempt: self.attempt,
            job: self.machines.job,
            decision: decision.clone(),
            reason: reason.to_owned(),
            elapsed_s: now.elapsed_s,
            bad_nodes: now.bad_nodes.clone(),
            failure: failure.cloned(),
        };
        journal::append(&self.paths().attempts(), &event)
    }

    /// Does what was decided; the exit code of the job.
    fn apply(&self, decision: &Decision, end: AttemptEnd) -> anyhow::Result<u8> {
        let job = self.machines.job;
        let failed = match end {
            AttemptEnd::Failed(kind) => kind.exit_code(),
            AttemptEnd::Stopped | AttemptEnd::Finished => FailureKind::Interrupted.exit_code(),
        };
        match decision {
            Decision::Finish => self.cancel_successor().map(|()| 0),
            Decision::GiveUp { code } => self.cancel_successor().map(|()| *code),
            Decision::Leave { code } => Ok(*code),
            Decision::Requeue => match self.slurm.requeue(job) {
                Ok(()) => Ok(0),
                Err(failure) => {
                    self.say(&format!("warning: the job cannot be put back, so its successor goes on: {}", one_line(&failure.into())))?;
                    Ok(failed)
                }
            },
            Decision::Replace { exclude } => {
                let mut all = self.exclude.clone();
                all.extend(exclude.iter().cloned());
                let mut jobs = Jobs::open(&self.slurm, &self.options.paths)?;
                let successor = jobs.successor_of(job);
                let replacement = jobs.submit(&self.submission, &self.run_name()?, Role::Replacement { of: job }, &all);
                match (replacement, successor) {
                    (Ok(replacement), successor) => {
                        jobs.cancel(&successor.into_iter().collect::<Vec<_>>())?;
                        self.say(&format!("job {replacement} takes the place of this one"))?;
                    }
                    (Err(error), Some(successor)) => {
                        let cause = one_line(&error);
                        self.say(&format!("warning: no job takes the place of this one, so job {successor} goes on: {cause}"))?;
                        self.keep_away(&mut jobs, successor, &all)?;
                    }
                    (Err(error), None) => return Err(error),
                }
                Ok(failed)
            }
        }
    }

    /// Tells a job that waits which nodes are bad. Where that is refused it may meet them, which is better than that nothing goes on.
    fn keep_away(&self, jobs: &mut Jobs<'_>, successor: JobId, nodes: &[String]) -> anyhow::Result<()> {
        if nodes.is_empty() {
            return Ok(());
        }
        match jobs.exclude(successor, &self.submission.slurm()?.exclude, nodes) {
            Ok(()) => self.say(&format!("job {successor} does not use {}", nodes.join(", "))),
            Err(error) => self.say(&format!("warning: job {successor} may meet {}: {}", nodes.join(", "), one_line(&error))),
        }
    }

    fn cancel_successor(&self) -> anyhow::Result<()> {
        let mut jobs = Jobs::open(&self.slurm, &self.options.paths)?;
        let successor: Vec<JobId> = jobs.successor_of(self.machines.job).into_iter().collect();
        jobs.cancel(&successor)
    }

    /// What the batch system says of this job; `None` where it does not answer.
    fn own_state(&self) -> anyhow::Result<Option<JobState>> {
        match self.slurm.show(self.machines.job) {
            Ok(state) => Ok(state),
            Err(failure) => {
                self.say(&format!("warning: SLURM does not say how this job is: {}", one_line(&failure.into())))?;
                Ok(None)
            }
        }
    }

    /// The state of a job once its processes are ended; one that is still being ended after the wait counts as over.
    fn end_of(&self, job: JobId) -> anyhow::Result<Predecessor> {
        let deadline = Instant::now() + Duration::from_secs(PREDECESSOR_WAIT_S);
        loop {
            let state = patiently(|| Ok(self.slurm.states(&[job])?))?.get(&job).map(|job| job.state);
            match state {
                // A node that does not answer keeps it so for long; its processes have ended or cannot be reached.
                Some(State::Completing) if Instant::now() >= deadline => return Ok(Predecessor::Forgotten),
                Some(State::Completing) => {}
                state => return Ok(state.map_or(Predecessor::Forgotten, Predecessor::Known)),
            }
            sleep(Duration::from_secs(PREDECESSOR_POLL_S));
        }
    }

    fn paths(&self) -> JobPaths {
        JobPaths::of(&self.options.paths)
    }

    fn run_name(&self) -> anyhow::Result<String> {
        Ok(crate::run_folder::read_info(&self.options.paths)?.name)
    }

    fn say(&self, line: &str) -> anyhow::Result<()> {
        let mut output = (self.options.output)();
        writeln!(output, "{line}")
            .and_then(|()| output.flush())
            .map_err(|error| Failure::new(FailureKind::Storage, "failed to write to the job's log").because(error).into())
    }
}

/// Bad nodes that the next job does not use, and what to say of the others.
struct Bounded {
    news: Vec<String>,
    warning: Option<String>,
}

/// Those of the bad nodes that a run's next job can do without, besides those that it is kept away from already. While SLURM does not say
/// how many nodes there are, it is kept away from no more.
fn bounded(slurm: &Slurm, submission: &Submission, known: &[String], bad: &[String]) -> anyhow::Result<Bounded> {
    let wanted = submission.resources.nodes;
    let (max_excluded, why) = match slurm.max_excluded(wanted) {
        Ok(max_excluded) => (max_excluded, format!("without more nodes fewer than the {wanted} that it needs would be left")),
        Err(failure) => (0, format!("SLURM does not say whether enough others would be left: {}", one_line(&failure.into()))),
    };
    let Avoided { news, spared } = avoid(bad, known, &submission.slurm()?.exclude, max_excluded);
    let nodes = spared.join(", ");
    let warning = (!spared.is_empty()).then(|| format!("warning: the next job may still use {nodes}, which failed this attempt: {why}"));
    Ok(Bounded { news, warning })
}

/// Attempts since somebody last asked for the run. They are told by their jobs: times are those of the clocks of many hosts.
fn num_begun(records: &[JobRecord], attempts: &[AttemptEvent]) -> u32 {
    let asked = records.iter().rposition(|record| record.role == Role::Asked).unwrap_or(0);
    let is_since = |event: &&AttemptEvent| match event {
        AttemptEvent::Started { name, .. } => records[asked..].iter().any(|record| record.name == *name),
        AttemptEvent::Ended { .. } => false,
    };
    attempts.iter().filter(is_since).count() as u32
}

/// Whether a job was submitted that takes the place of the one that this job waited for.
fn is_replaced(records: &[JobRecord], role: Role) -> bool {
    let Role::Successor { of } = role else { return false };
    records.iter().any(|record| record.role == Role::Replacement { of } && record.job.is_some() && !record.is_cancelled)
}

/// What a job decided at its last end.
fn decision_of(attempts: &[AttemptEvent], of: JobId) -> Option<Decision> {
    let of_job = attempts.iter().rev().find(|event| match event {
        AttemptEvent::Started { job, .. } | AttemptEvent::Ended { job, .. } => *job == of,
    });
    match of_job {
        Some(AttemptEvent::Ended { decision, .. }) => Some(decision.clone()),
        // It began once more after that, and was killed.
        _ => None,
    }
}

/// How long the job has run, in seconds. Of one that it has put back already, as after the loss of a node, the batch system tells the time
/// since its next start, which is none; this process knows how long it has lived itself.
fn elapsed_s(told: Option<&JobState>, own: Duration) -> u64 {
    told.and_then(|job| job.elapsed_s).unwrap_or(0).max(own.as_secs())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::client::fixtures::{cluster, resources, whole_site};
    use super::super::snapshot::Programs;
    use super::*;

    #[test]
    fn a_job_that_takes_the_place_of_another_has_enough_nodes_to_start() {
        let programs = Programs { cloze: PathBuf::from("cloze"), worker: PathBuf::from("cloze-worker"), hash: "1f".to_owned() };
        let submission = |nodes| Submission::new(whole_site(), resources(nodes), programs.clone(), false).unwrap();
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        // A partition of four nodes.
        let (_folder, slurm) = cluster(&[("sinfo", "printf 'main|up|1:00:00|4|4|4096|(null)\\n'")]);
        let three = bounded(&slurm, &submission(3), &[], &names(&["n2"])).unwrap();
        assert_eq!((three.news, three.warning), (names(&["n2"]), None));
        let cases = [(4, names(&[]), names(&["n2"]), names(&[])), (2, names(&["n1"]), names(&["n2", "n3"]), names(&["n2"]))];
        for (nodes, known, bad, news) in cases {
            let found = bounded(&slurm, &submission(nodes), &known, &bad).unwrap();
            let spared = bad.last().unwrap();
            let warning = format!(
                "warning: the next job may still use {spared}, which failed this attempt: without more nodes fewer than the {nodes} that \
                 it needs would be left"
            );
            assert_eq!((found.news, found.warning), (news, Some(warning)));
        }
        let (_folder, silent) = cluster(&[("sinfo", "exit 1")]);
        let unknown = bounded(&silent, &submission(1), &[], &names(&["n2"])).unwrap();
        assert!(unknown.news.is_empty() && unknown.warning.unwrap().contains("n2, which failed this attempt: SLURM does not say"));
    }

    #[test]
    fn a_run_that_needs_all_nodes_goes_on_with_a_bad_one() {
        let folder = tempfile::tempdir().unwrap();
        let paths = RunPaths::find(folder.path()).unwrap();
        let info = serde_json::json!({"name": "first", "recipe_hash": "4f1c", "data_fingerprint": "d", "cloze_version": "0",
            "worker_build": "b", "git_revision": null, "command_line": ["cloze"], "host": "h", "process_id": 1, "started": 50.0});
        std::fs::write(paths.info(), info.to_string()).unwrap();
        std::fs::create_dir_all(JobPaths::of(&paths).root()).unwrap();
        let programs = Programs { cloze: PathBuf::from("cloze"), worker: PathBuf::from("cloze-worker"), hash: "1f".to_owned() };
        // A partition of four nodes, and a batch system that says nothing of the job.
        let sinfo = "printf 'main|up|1:00:00|4|4|4096|(null)\\n'";
        let (_programs, slurm) =
            cluster(&[("sinfo", sinfo), ("sbatch", "echo 41"), ("scancel", ":"), ("scontrol", "exit 1"), ("squeue", "exit 1")]);
        let slurm = Arc::new(slurm);
        let log = tempfile::NamedTempFile::new().unwrap();
        let options = AllocationOptions {
            paths: paths.clone(),
            open: &|_| unreachable!("no attempt is made"),
            worker_build: String::new(),
            output: &|| Box::new(log.reopen().unwrap()),
        };
        let machines = Machines { job: JobId::whole(7), name: "a".to_owned(), requeues: 0, nodes: Vec::new() };
        let job = |nodes| Job {
            options: &options,
            submission: Submission::new(whole_site(), resources(nodes), programs.clone(), false).unwrap(),
            slurm: Arc::clone(&slurm),
            machines: Machines { nodes: (1..=nodes).map(|node| format!("n{node}")).collect(), ..machines.clone() },
            warnings: Warnings::deaf(),
            started: Instant::now(),
            attempt: 1,
            role: Role::Asked,
            exclude: Vec::new(),
        };
        for (nodes, avoided) in [(3, vec!["n2".to_owned()]), (4, Vec::new())] {
            let failed = AttemptEnd::Failed(FailureKind::Environment);
            job(nodes).leave(failed, None, vec!["n2".to_owned()]).unwrap();
            let records = journal::jobs(journal::read(&JobPaths::of(&paths).jobs()).unwrap());
            assert_eq!(records.last().map(|record| &record.exclude), Some(&avoided), "{nodes} nodes of four");
            let attempts: Vec<AttemptEvent> = journal::read(&JobPaths::of(&paths).attempts()).unwrap();
            assert_eq!(decision_of(&attempts, JobId::whole(7)), Some(Decision::Replace { exclude: avoided }));
        }
    }

    #[test]
    fn a_job_that_was_put_back_has_run_as_long_as_this_process() {
        let told = |elapsed_s| JobState { elapsed_s, ..JobState::new(State::Pending) };
        let cases = [(Some(Some(0)), 90), (Some(Some(100)), 100), (Some(None), 90), (None, 90)];
        for (elapsed, expected) in cases {
            let shown = elapsed.map(told);
            assert_eq!(elapsed_s(shown.as_ref(), Duration::from_millis(90_900)), expected, "{elapsed:?}");
        }
    }

    #[test]
    fn attempts_are_counted_since_the_run_was_asked_for_whatever_the_clocks_say() {
        let record = |name: &str, role| JobRecord {
            name: name.to_owned(),
            role,
            exclude: Vec::new(),
            job: None,
            is_dropped: false,
            is_cancelled: false,
            is_elsewhere: false,
        };
        let of = JobId::whole(7);
        let records =
            [record("a", Role::Asked), record("b", Role::Successor { of }), record("c", Role::Asked), record("d", Role::Successor { of })];
        let started =
            |name: &str, time| AttemptEvent::Started { time, attempt: 1, job: of, name: name.to_owned(), requeues: 0, nodes: Vec::new() };
        // The clock of the node of `b` is ahead, and those of the nodes of `c` and `d` are behind that of whoever asked.
        let attempts = [started("a", 110.0), started("b", 9000.0), started("c", 300.0), started("c", 310.0), started("d", 320.0)];
        assert_eq!((num_begun(&records, &attempts), num_begun(&records[..2], &attempts)), (3, 2));
        assert_eq!(num_begun(&[], &attempts), 0);
    }

    #[test]
    fn the_last_word_of_a_job_counts() {
        let job = JobId::whole(7);
        let started = |attempt| AttemptEvent::Started { time: 1.0, attempt, job, name: String::new(), requeues: 0, nodes: Vec::new() };
        let ended = |attempt, decision| AttemptEvent::Ended {
            time: 1.0,
            attempt,
            job,
            decision,
            reason: String::new(),
            elapsed_s: 0,
            bad_nodes: Vec::new(),
            failure: None,
        };
        let mut attempts = vec![started(1), ended(1, Decision::Requeue), started(2)];
        assert_eq!(decision_of(&attempts, job), None);
        attempts.push(ended(2, Decision::GiveUp { code: 9 }));
        assert_eq!(decision_of(&attempts, job), Some(Decision::GiveUp { code: 9 }));
        assert_eq!(decision_of(&attempts, JobId::whole(8)), None);
    }
}
