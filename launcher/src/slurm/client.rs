//! The batch system as this program sees it: a few calls, each bounded in time, all answers read by `parse.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::SlurmSite;

use super::command::Question;
use super::job::{JobId, JobState};
use super::parse;
use super::partition::{Fit, Partition, Wish};
use super::version::{Dialect, Version};

/// Longest wait for a question, in seconds.
const ASK_DEADLINE_S: u64 = 30;

/// Longest wait for a submission, in seconds; a busy controller makes `sbatch` try again for a while.
const SUBMIT_DEADLINE_S: u64 = 120;

/// A submission that began longer ago than this, in seconds, has left its job in the queue or never will: its deadline, and a minute for a
/// slow controller.
pub const SUBMIT_SETTLED_S: u64 = SUBMIT_DEADLINE_S + 60;

/// What a failure says where the job was surely not taken.
const REFUSED: &str = "SLURM refused the job";

/// Complaints of `sbatch` after which the job may be in the queue all the same: the way to the controller broke.
const UNCLEAR: [&str; 5] = ["timed out", "Unable to contact", "ommunication", "Zero Bytes", "onnection"];

/// Jobs that are asked for with one command; their numbers must fit into one command line.
const JOBS_PER_QUESTION: usize = 500;

/// Jobs that are looked at one by one where there is no accounting, in one round; the others wait for the next round.
const SHOWN_JOBS_MAX: usize = 64;

/// What `scontrol` says of an element that has begun since it was last looked at.
const NOT_WAITING: &str = "no longer pending";

/// The key of a cluster file that names the partition.
pub const PARTITION_KEY: &str = "slurm.partition";

/// What the programs say of a job that they have forgotten, or that is over.
const FORGOTTEN: [&str; 3] = ["Invalid job id", "already completing or completed", "Job has already finished"];

/// What became of the wish to keep an array away from nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// All elements that wait know.
    All,
    /// None waits.
    NothingWaits,
    /// With all that it knows already, too few nodes would be left.
    TooMany,
}

/// The batch system of this machine.
#[derive(Debug)]
pub struct Slurm {
    /// Where its programs are; `None` leaves it to the search path.
    folder: Option<PathBuf>,
    version: Version,
    /// Said of partitions and GPUs.
    site: SlurmSite,
    /// Set once the accounting has said that it is off.
    no_accounting: AtomicBool,
}

impl Slurm {
    /// Looks for the programs and their version. Fails with kind `Environment` where there are none, or where they are too old.
    pub fn find(site: &SlurmSite) -> Result<Self, Failure> {
        Self::at(None, site)
    }

    /// As [`Slurm::find`], with the programs of a folder.
    fn at(folder: Option<PathBuf>, site: &SlurmSite) -> Result<Self, Failure> {
        let question =
            Question::new(program(folder.as_deref(), "sbatch"), vec!["--version".to_owned()], Duration::from_secs(ASK_DEADLINE_S));
        let output = question.ask_well().map_err(|failure| {
            failure.hint("submit from a login node of the cluster, where `sbatch` is in PATH; `module load slurm` may bring it there")
        })?;
        let version = Version::parse(&output)?.check()?;
        Ok(Self { folder, version, site: site.clone(), no_accounting: AtomicBool::new(false) })
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// What must be said differently to this version.
    pub fn dialect(&self) -> Dialect {
        self.version.dialect()
    }

    /// What it calls its cluster; `None` where it does not say so now.
    pub fn cluster_name(&self) -> Option<String> {
        let question = self.question("scontrol", ["show", "config"].map(str::to_owned).to_vec(), ASK_DEADLINE_S);
        match question.ask_well() {
            Ok(output) => parse::cluster_name(&output),
            Err(failure) => {
                tracing::debug!(%failure, "SLURM does not say what it calls its cluster");
                None
            }
        }
    }

    /// Submits a script and returns its job. What is refused (partition, quota, account) is of kind `Environment`, with the batch
    /// system's own words. Whether a failure by the deadline has left a job is known by its name only: see [`Slurm::find_by_name`].
    pub fn submit(&self, script: &Path, options: &[String]) -> Result<JobId, Failure> {
        let mut arguments = vec!["--parsable".to_owned()];
        arguments.extend(options.iter().cloned());
        arguments.push(script.display().to_string());
        let question = self.question("sbatch", arguments, SUBMIT_DEADLINE_S).that_submits();
        let answer = question.ask()?;
        if !answer.is_success {
            let is_unclear = UNCLEAR.iter().any(|words| answer.complaints.contains(words));
            let what = if is_unclear { "SLURM did not say whether it took the job" } else { REFUSED };
            let failure = Failure { what: what.to_owned(), ..question.complaint(&answer) };
            return Err(match hint_of(&answer.complaints) {
                Some(hint) => failure.hint(hint),
                None => failure,
            });
        }
        parse::submitted_job(&answer.output).ok_or_else(|| {
            Failure::new(FailureKind::Environment, "`sbatch` named no job")
                .expected("the number of the new job")
                .found(answer.output.chars().take(200).collect::<String>())
        })
    }

    /// Whether a failed submission has surely left no job.
    pub fn is_refusal(failure: &Failure) -> bool {
        failure.what == REFUSED
    }

    /// What is known of these jobs, asked in one batch; an array brings all of its elements. A job that nobody knows any more is absent.
    pub fn states(&self, jobs: &[JobId]) -> Result<BTreeMap<JobId, JobState>, Failure> {
        let numbers: BTreeSet<u64> = jobs.iter().map(|id| id.job).collect();
        let mut found = BTreeMap::new();
        for chunk in numbers.iter().copied().collect::<Vec<_>>().chunks(JOBS_PER_QUESTION) {
            found.extend(self.states_of(chunk)?);
        }
        let asked: BTreeSet<JobId> = jobs.iter().copied().collect();
        found.retain(|id, _| asked.contains(id) || asked.contains(&JobId::whole(id.job)));
        Ok(found)
    }

    /// All that is known of one job, time limit and preemption among it; `None` where it is forgotten.
    pub fn show(&self, job: JobId) -> Result<Option<JobState>, Failure> {
        let mut found = parse::shown_jobs(&self.ask_of_jobs("scontrol", vec!["-o".into(), "show".into(), "job".into(), job.to_string()])?);
        let first = found.keys().next().copied();
        Ok(found.remove(&job).or_else(|| first.and_then(|id| found.remove(&id))))
    }

    /// This user's jobs of exactly this name that are queued, run, or are over and not forgotten; newest last.
    pub fn find_by_name(&self, name: &str) -> Result<Vec<JobId>, Failure> {
        let name_option = format!("--name={name}");
        let arguments = ["-h", "-a", "--me", "-t", "all", &name_option, "-o", "%i|%j"].map(str::to_owned).to_vec();
        let mut jobs = parse::jobs_of_name(&self.question("squeue", arguments, ASK_DEADLINE_S).ask_well()?, name);
        if !self.no_accounting.load(Ordering::Relaxed) {
            let format = "--format=JobID,JobName%200";
            let user = format!("--user={}", rustix::process::getuid().as_raw());
            let arguments = ["-n", "-P", "-X", &user, "--starttime=now-30days", &name_option, format].map(str::to_owned).to_vec();
            // The queue has answered; the account only adds what it has forgotten.
            match self.question("sacct", arguments, ASK_DEADLINE_S).ask_well() {
                Ok(output) => jobs.extend(parse::jobs_of_name(&output, name)),
                Err(failure) => tracing::debug!(%failure, "jobs of a name were looked for in the queue only"),
            }
        }
        jobs.sort_unstable();
        jobs.dedup();
        Ok(jobs)
    }

    /// Cancels jobs. Those that are over already are left as they are.
    pub fn cancel(&self, jobs: &[JobId]) -> Result<(), Failure> {
        for chunk in jobs.chunks(JOBS_PER_QUESTION) {
            self.ask_of_jobs("scancel", chunk.iter().map(ToString::to_string).collect())?;
        }
        Ok(())
    }

    /// Puts a job that runs back into the queue; its processes are ended.
    pub fn requeue(&self, job: JobId) -> Result<(), Failure> {
        self.question("scontrol", vec!["requeue".to_owned(), job.to_string()], ASK_DEADLINE_S).ask_well().map(drop)
    }

    /// Keeps a job that waits away from these nodes, and from no others.
    pub fn exclude_nodes(&self, job: JobId, nodes: &[String]) -> Result<(), Failure> {
        let arguments = vec!["update".to_owned(), format!("JobId={job}"), format!("ExcNodeList={}", nodes.join(","))];
        self.question("scontrol", arguments, ASK_DEADLINE_S).ask_well().map(drop)
    }

    /// Keeps those elements of an array that wait away from these nodes too, unless they were kept away from more than so many then.
    pub fn exclude_more_nodes(&self, array: JobId, nodes: &[String], max_excluded: usize) -> Result<Told, Failure> {
        let shown = self.ask_of_jobs("scontrol", ["-o", "show", "job", &array.to_string()].map(str::to_owned).to_vec())?;
        let Some(mut lists) = parse::excluded_nodes(&shown) else { return Ok(Told::NothingWaits) };
        lists.extend(nodes.iter().cloned());
        if parse::nodes_of_lists(lists.iter().map(String::as_str)).len() > max_excluded {
            return Ok(Told::TooMany);
        }
        let list = lists.into_iter().collect::<Vec<_>>().join(",");
        let arguments = vec!["update".to_owned(), format!("JobId={array}"), format!("ExcNodeList={list}")];
        let question = self.question("scontrol", arguments, ASK_DEADLINE_S);
        let answer = question.ask()?;
        if answer.is_success || is_all_of(&answer.complaints, NOT_WAITING) {
            return Ok(Told::All);
        }
        Err(question.complaint(&answer))
    }

    /// How many nodes a job of this site can be kept away from at most, with so many left for it; those that the site itself excludes are
    /// among them. A job starts in one partition, so the largest of those that it may start in counts.
    pub fn max_excluded(&self, nodes_left: u32) -> Result<usize, Failure> {
        let partitions = self.partitions()?;
        let is_ours = |name: &str| self.site.partition.as_ref().is_none_or(|names| names.split(',').any(|ours| ours == name));
        let largest = partitions.iter().filter(|partition| is_ours(&partition.name)).map(|partition| partition.nodes).max();
        Ok(largest.unwrap_or(0).saturating_sub(nodes_left) as usize)
    }

    /// The partitions that this user sees.
    pub fn partitions(&self) -> Result<Vec<Partition>, Failure> {
        let arguments = ["-h", "-a", "-o", parse::PARTITION_FORMAT].map(str::to_owned).to_vec();
        Ok(parse::partitions(&self.question("sinfo", arguments, ASK_DEADLINE_S).ask_well()?))
    }

    /// What the site's partition has for a job. Without a named partition, there must be one that can give all.
    pub fn fit(&self, wish: &Wish) -> Result<Fit, Failure> {
        let partitions = self.partitions()?;
        let Some(names) = &self.site.partition else {
            // The cluster chooses its default, which is not known here; what fits nowhere does not fit there.
            return Ok(best_of(partitions.iter().map(|partition| partition.fit(wish))));
        };
        // A list of partitions is allowed; the job starts in one of them.
        let mut fits = Vec::new();
        for name in names.split(',') {
            let Some(partition) = partitions.iter().find(|partition| partition.name == name) else {
                let known: Vec<&str> = partitions.iter().map(|partition| partition.name.as_str()).collect();
                let failure = Failure::new(FailureKind::Recipe, "the cluster has no such partition").at(PARTITION_KEY);
                let failure = failure.expected(format!("one of {}", known.join(", "))).found(name);
                return Ok(Fit { misfits: vec![failure], shortage: None });
            };
            fits.push(partition.fit(wish));
        }
        Ok(best_of(fits.into_iter()))
    }

    /// The names in a list of nodes such as `n[1-3,7]`, in order.
    pub fn host_names(&self, node_list: &str) -> Result<Vec<String>, Failure> {
        let arguments = vec!["show".to_owned(), "hostnames".to_owned(), node_list.to_owned()];
        Ok(parse::host_names(&self.question("scontrol", arguments, ASK_DEADLINE_S).ask_well()?))
    }

    /// One of its programs, for a caller that starts it itself.
    pub fn program(&self, name: &str) -> PathBuf {
        program(self.folder.as_deref(), name)
    }

    /// States of jobs by number: from the queue, then from the account or from the controller's memory what the queue leaves open.
    fn states_of(&self, numbers: &[u64]) -> Result<BTreeMap<JobId, JobState>, Failure> {
        let list = numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        let arguments = ["-h", "-a", "-r", "-t", "all", "-o", parse::QUEUE_FORMAT, "-j", &list].map(str::to_owned).to_vec();
        let mut found = parse::queue(&self.ask_of_jobs("squeue", arguments)?);
        let open = open_questions(numbers, &found);
        if open.is_empty() {
            return Ok(found);
        }
        for (id, job) in self.account(&open) {
            merge(&mut found, id, job);
        }
        for number in open_questions(&open, &found).into_iter().take(SHOWN_JOBS_MAX) {
            let arguments = ["-o", "show", "job", &number.to_string()].map(str::to_owned).to_vec();
            for (id, job) in parse::shown_jobs(&self.ask_of_jobs("scontrol", arguments)?) {
                merge(&mut found, id, job);
            }
        }
        Ok(found)
    }

    /// What the accounting says; nothing where it is off or away.
    fn account(&self, numbers: &[u64]) -> BTreeMap<JobId, JobState> {
        if self.no_accounting.load(Ordering::Relaxed) {
            return BTreeMap::new();
        }
        let list = numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        let format = format!("--format={}", parse::ACCOUNT_FORMAT);
        let question = self.question("sacct", ["-n", "-P", "-X", "-D", &format, "-j", &list].map(str::to_owned).to_vec(), ASK_DEADLINE_S);
        match question.ask() {
            Ok(answer) if answer.is_success => return parse::account(&answer.output),
            Ok(answer) => {
                tracing::debug!(complaint = answer.complaints, "the accounting gave no answer");
                if answer.complaints.contains("disabled") {
                    self.no_accounting.store(true, Ordering::Relaxed);
                }
            }
            Err(failure) => tracing::debug!(%failure, "the accounting gave no answer"),
        }
        BTreeMap::new()
    }

    /// The output of a program that is asked about jobs; empty where it has forgotten them.
    fn ask_of_jobs(&self, program: &str, arguments: Vec<String>) -> Result<String, Failure> {
        let question = self.question(program, arguments, ASK_DEADLINE_S);
        let answer = question.ask()?;
        if answer.is_success || FORGOTTEN.iter().any(|words| answer.complaints.contains(words)) {
            return Ok(answer.output);
        }
        Err(question.complaint(&answer))
    }

    fn question(&self, name: &str, arguments: Vec<String>, deadline_s: u64) -> Question {
        Question::new(self.program(name), arguments, Duration::from_secs(deadline_s))
    }
}

/// The failure of whoever asks one cluster for jobs of another. `file` is what says which one has them.
pub(crate) fn other_cluster(theirs: &str, here: &str, file: &str) -> Failure {
    Failure::new(FailureKind::Mismatch, "the jobs are in another cluster than that of this host")
        .expected(format!("the cluster that SLURM calls `{theirs}`"))
        .found(format!("the cluster that SLURM calls `{here}`"))
        .hint(format!(
            "go on from a host of `{theirs}`; where that cluster is gone, or only its name has changed, set `cluster` to null in {file}"
        ))
}

/// The one that lacks least.
fn best_of(fits: impl Iterator<Item = Fit>) -> Fit {
    fits.min_by_key(|fit| (fit.misfits.len(), fit.shortage.is_some())).unwrap_or_default()
}

/// Whether there are complaints, and all of them say this.
fn is_all_of(complaints: &str, words: &str) -> bool {
    let mut lines = complaints.lines().filter(|line| !line.trim().is_empty()).peekable();
    lines.peek().is_some() && lines.all(|line| line.contains(words))
}

fn program(folder: Option<&Path>, name: &str) -> PathBuf {
    folder.map_or_else(|| PathBuf::from(name), |folder| folder.join(name))
}

/// The jobs of which nothing is known, or that are over without anybody having said how.
fn open_questions(numbers: &[u64], found: &BTreeMap<JobId, JobState>) -> Vec<u64> {
    let is_open = |number: u64| {
        let mut known = found.iter().filter(|(id, _)| id.job == number).peekable();
        known.peek().is_none() || known.any(|(_, job)| job.state.is_end() && job.exit.is_none())
    };
    numbers.iter().copied().filter(|&number| is_open(number)).collect()
}

/// Adds a second answer about a job. The queue knows best how a job is; the others know how it ended.
fn merge(found: &mut BTreeMap<JobId, JobState>, id: JobId, other: JobState) {
    match found.get_mut(&id) {
        None => {
            found.insert(id, other);
        }
        Some(job) if job.state.is_end() && other.state.is_end() => {
            job.exit = job.exit.or(other.exit);
            job.requeues = job.requeues.or(other.requeues);
            job.cancelled_by = job.cancelled_by.or(other.cancelled_by);
            job.reason = job.reason.take().or(other.reason);
        }
        // The accounting lags behind.
        Some(_) => {}
    }
}

/// What a user can do about a refusal.
fn hint_of(complaints: &str) -> Option<&'static str> {
    let hints = [
        ("invalid partition", "name a partition that `sinfo` lists in the cluster file (`slurm.partition`)"),
        ("Invalid account", "name an account that `sacctmgr show associations user=$USER` lists in the cluster file (`slurm.account`)"),
        ("Invalid qos", "name a QOS that this account may use in the cluster file (`slurm.qos`)"),
        ("Requested node configuration is not available", "no node of the partition offers what `resources` asks for"),
        ("QOS", "a limit of the account or QOS is reached: wait for other jobs, or ask for less in `resources`"),
        ("Limit", "a limit of the account or QOS is reached: wait for other jobs, or ask for less in `resources`"),
        ("time limit", "shorten `resources.time_limit_minutes`; a longer run goes on in its next job"),
    ];
    hints.into_iter().find(|(words, _)| complaints.contains(words)).map(|(_, hint)| hint)
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
