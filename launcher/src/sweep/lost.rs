//! What has become of trials that are out, for whoever only looks: whether they run or wait in a queue, which no record says, and, while no
//! controller lives and takes their ends in, whether they are still there.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use cloze_recipes::failure::Failure;
use cloze_recipes::site::Site;
use serde::Serialize;

use super::claim::Claim;
use super::folder::{StudyFolder, StudyInfo, SweepPlan};
use super::hosts::{HostsOptions, look_at};
use super::lock::FileLock;
use super::outlook::is_queued;
use super::queue::{Word, job_name, site_of_jobs, told, unknown};
use super::record::{Place, TrialRecord, TrialState};
use super::visit::Word as HostWord;
use super::work::as_failure;
use crate::slurm::{JobId, JobState, Slurm, other_cluster};

/// Most batches whose jobs are looked for by name; each takes a question or two.
const MAX_BATCHES: usize = 64;

/// What is known of a trial that is out, besides its record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OutState {
    /// It waits in a queue, and nobody has begun to work on it.
    Queued,
    /// It waits in a queue once more after somebody has worked on it, as after the loss of its node.
    QueuedAgain,
    /// The batch system runs its job.
    Running,
    /// It has ended, and its outcome waits for a controller.
    Ended,
    /// Nobody works on it any more, as these words say, and it has no outcome.
    Gone(String),
}

impl OutState {
    /// It in a word or two.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::QueuedAgain => "queued again",
            Self::Running => "running",
            Self::Ended => "ended",
            Self::Gone(_) => "gone",
        }
    }

    /// Whether it waits in a queue, and goes on from its newest saved state.
    pub fn waits(&self) -> bool {
        matches!(self, Self::Queued | Self::QueuedAgain)
    }
}

/// The trials that only wait in a queue, by hash.
pub fn queued(folder: &StudyFolder, plan: &SweepPlan, records: &[TrialRecord]) -> BTreeMap<String, OutState> {
    let waiting = records.iter().filter(|record| is_queued(folder, plan, record));
    waiting.map(|record| (record.hash.clone(), OutState::Queued)).collect()
}

/// Adds what the batch system says of trials that are out, for whoever looks while a controller lives, which takes their ends in. Returns why
/// the batch system could not be asked.
pub fn add_told(folder: &StudyFolder, plan: &SweepPlan, records: &[TrialRecord], outs: &mut BTreeMap<String, OutState>) -> Option<Failure> {
    let is_out = |record: &&TrialRecord| plan.has_queue() && record.state == TrialState::Training;
    let open: Vec<Open<'_>> = records.iter().filter(is_out).filter_map(|record| Open::of(record, true)).collect();
    add_words(folder, plan, &open, outs)
}

/// Adds what has become of the trials that are out, where no controller lives. Returns why the batch system could not be asked.
pub fn add_lost(folder: &StudyFolder, plan: &SweepPlan, records: &[TrialRecord], outs: &mut BTreeMap<String, OutState>) -> Option<Failure> {
    let mut open = Vec::new();
    for record in records.iter().filter(|record| record.state == TrialState::Training) {
        if folder.outcome_path(&record.hash, record.attempts).exists() {
            outs.insert(record.hash.clone(), OutState::Ended);
        } else {
            open.extend(Open::of(record, is_worked_on(folder, record)));
        }
    }
    if plan.has_queue() {
        return add_words(folder, plan, &open, outs);
    }
    open.retain(|open| !open.is_held);
    if open.is_empty() {
        return None;
    }
    if let Some(site) = plan.site.as_ref().filter(|_| plan.hosts().is_some()) {
        return match ask_hosts(folder, plan, site, open.iter().map(|open| open.place.batch).collect()) {
            Err(error) => Some(as_failure(&error)),
            Ok(Asked { ends, failure }) => {
                outs.extend(open.iter().filter_map(|open| Some((open.hash.to_owned(), ends.get(&open.place.batch)?.clone()))));
                failure
            }
        };
    }
    let gone = || OutState::Gone("no process of this machine works on it".to_owned());
    // What another machine works on, only its signs of life tell, and a controller that has seen them for a while.
    let here = open.into_iter().filter(|open| !is_elsewhere(folder, open.place.batch));
    outs.extend(here.map(|open| (open.hash.to_owned(), gone())));
    None
}

fn is_elsewhere(folder: &StudyFolder, batch: u32) -> bool {
    matches!(Claim::read(folder, batch), Ok(Some(Claim::Taken(worker))) if worker.runs_under_this_kernel().is_err())
}

/// A trial that is out and has told no outcome.
struct Open<'a> {
    hash: &'a str,
    place: Place,
    /// Whether somebody works on it, or sees to its end.
    is_held: bool,
}

impl<'a> Open<'a> {
    fn of(record: &'a TrialRecord, is_held: bool) -> Option<Self> {
        Some(Self { hash: &record.hash, place: record.place?, is_held })
    }
}

/// Adds what the batch system says of these trials.
fn add_words(folder: &StudyFolder, plan: &SweepPlan, open: &[Open<'_>], outs: &mut BTreeMap<String, OutState>) -> Option<Failure> {
    if open.is_empty() {
        return None;
    }
    match jobs_of(folder, plan, open.iter().map(|open| open.place.batch).collect()) {
        Ok(jobs) => {
            let told: Vec<_> =
                open.iter().filter_map(|open| Some((open.hash.to_owned(), jobs.state_of(open, outs.get(open.hash))?))).collect();
            outs.extend(told);
            None
        }
        Err(failure) => Some(failure),
    }
}

/// Where that is not known, somebody may.
fn is_worked_on(folder: &StudyFolder, record: &TrialRecord) -> bool {
    FileLock::holder(&folder.trial_lock_path(&record.hash)).map_or(true, |holder| holder.is_some())
}

/// What hosts have said.
struct Asked {
    /// The batches on which nobody works any more.
    ends: BTreeMap<u32, OutState>,
    /// Why some hosts said nothing.
    failure: Option<Failure>,
}

/// Asks the hosts of these batches whether anybody works on them; nothing is changed there.
fn ask_hosts(folder: &StudyFolder, plan: &SweepPlan, site: &Site, batches: BTreeSet<u32>) -> anyhow::Result<Asked> {
    let mut asked = Asked { ends: BTreeMap::new(), failure: None };
    let mut looks: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for batch in batches {
        match Claim::read(folder, batch)? {
            Some(Claim::Taken(worker)) => looks.entry(worker.host).or_default().push(batch),
            None | Some(Claim::Withdrawn) => drop(asked.ends.insert(batch, OutState::Gone("nobody has begun with it".to_owned()))),
        }
    }
    let program = std::env::current_exe().context("find this program")?;
    for (host, batches) in looks {
        let options = HostsOptions { folder: folder.clone(), program: program.clone(), resources: plan.resources.clone(), concurrency: 1 };
        match look_at(options, site, &host, batches) {
            Ok(words) => asked.ends.extend(words.into_iter().filter_map(|(batch, word)| Some((batch, state(word)?)))),
            Err(failure) => asked.failure = Some(Failure { what: format!("host {host}: {}", failure.what), ..failure }),
        }
    }
    Ok(asked)
}

/// What a host's word means; `None` where it is worked on.
fn state(word: HostWord) -> Option<OutState> {
    match word {
        HostWord::Lives => None,
        HostWord::Ended => Some(OutState::Ended),
        HostWord::Gone(how) | HostWord::Failed(how) => Some(OutState::Gone(how)),
        HostWord::Absent => Some(OutState::Gone("nobody has begun with it".to_owned())),
    }
}

/// The jobs of some batches.
#[derive(Debug, Default)]
struct Jobs {
    /// By batch; `None` where there is no job of its name.
    ids: BTreeMap<u32, Option<JobId>>,
    states: BTreeMap<JobId, JobState>,
}

impl Jobs {
    /// How a trial is of which so much is known from files; `None` where that stays as it is.
    fn state_of(&self, open: &Open<'_>, known: Option<&OutState>) -> Option<OutState> {
        match self.word(open.place)? {
            Word::Waits if known == Some(&OutState::Queued) => None,
            Word::Waits => Some(OutState::QueuedAgain),
            Word::Runs => Some(OutState::Running),
            Word::Ended(how) => (!open.is_held).then_some(OutState::Gone(how)),
            Word::Nothing => None,
        }
    }

    /// What is said of the element of a trial; `None` where it was not asked for.
    fn word(&self, place: Place) -> Option<Word> {
        let id = *self.ids.get(&place.batch)?;
        let Some(id) = id else { return Some(Word::Ended("the batch system knows no job of its batch".to_owned())) };
        Some(match told(id, place.element, &self.states) {
            Word::Nothing => Word::Ended(unknown(id, place.element)),
            word => word,
        })
    }
}

fn jobs_of(folder: &StudyFolder, plan: &SweepPlan, batches: BTreeSet<u32>) -> Result<Jobs, Failure> {
    let Some(site) = &plan.site else { return Ok(Jobs::default()) };
    let slurm = Slurm::find(site_of_jobs(&plan.resources, plan.pack, site)?)?;
    look(&slurm, &folder.info()?, batches)
}

/// Asks for the jobs of these batches, whose names begin with the study's.
fn look(slurm: &Slurm, info: &StudyInfo, batches: BTreeSet<u32>) -> Result<Jobs, Failure> {
    if let (Some(theirs), Some(here)) = (&info.cluster, slurm.cluster_name())
        && *theirs != here
    {
        return Err(other_cluster(theirs, &here, "study.json"));
    }
    let mut jobs = Jobs::default();
    for batch in batches.into_iter().take(MAX_BATCHES) {
        let found = slurm.find_by_name(&job_name(info, batch))?;
        jobs.ids.insert(batch, found.last().map(|id| JobId::whole(id.job)));
    }
    let ids: Vec<JobId> = jobs.ids.values().filter_map(|id| *id).collect();
    if !ids.is_empty() {
        jobs.states = slurm.states(&ids)?;
    }
    Ok(jobs)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use cloze_recipes::study::{Metric, Score};

    use super::super::claim::Worker;
    use super::super::fixtures::{self, site, trial};
    use super::super::lock::Taken;
    use super::*;
    use crate::slurm::fixtures::cluster;

    /// A study of three trials that are out as the elements of one batch.
    fn study(root: &std::path::Path) -> (StudyFolder, SweepPlan, Vec<TrialRecord>) {
        let folder = StudyFolder::new(root.to_owned());
        folder.make().unwrap();
        let plan = fixtures::plan(["a", "b", "c"].map(trial).to_vec());
        let out = |(element, trial): (u32, _)| {
            let place = Some(Place { batch: 1, element });
            TrialRecord { state: TrialState::Training, attempts: 1, place, ..TrialRecord::new(trial, None) }
        };
        let records = (0_u32..).zip(&plan.trials).map(out).collect();
        (folder, plan, records)
    }

    #[test]
    fn what_nobody_works_on_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let (folder, plan, mut records) = study(root.path());
        fs::write(folder.outcome_path("a", 1), "{}").unwrap();
        let Taken::Ours(_lock) = FileLock::take(&folder.trial_lock_path("b")).unwrap() else { panic!("nobody has it") };
        let mut outs = BTreeMap::new();
        assert_eq!(add_lost(&folder, &plan, &records, &mut outs), None);
        let gone = OutState::Gone("no process of this machine works on it".to_owned());
        assert_eq!(outs, BTreeMap::from([("a".to_owned(), OutState::Ended), ("c".to_owned(), gone)]));
        records[2].state = TrialState::Done;
        let mut outs = BTreeMap::new();
        add_lost(&folder, &plan, &records, &mut outs);
        assert_eq!(outs.len(), 1, "only what is out is looked for");
        // On hosts it is their claims that say who began; nobody has to be asked where nobody did.
        records[2].state = TrialState::Training;
        let on_hosts = SweepPlan { site: Some(site("lab", "kind: ssh\nssh: {hosts: [n1], command: ['false']}")), ..plan.clone() };
        let mut outs = BTreeMap::new();
        assert_eq!(add_lost(&folder, &on_hosts, &records, &mut outs), None);
        assert_eq!(outs.get("c"), Some(&OutState::Gone("nobody has begun with it".to_owned())));
        let worker =
            Worker { host: "n1".to_owned(), process_id: 1, start_ticks: 1, boot: "b".to_owned(), machine: "m".to_owned(), part: None };
        Claim::Taken(worker).make(&folder, 1).unwrap();
        let mut outs = BTreeMap::new();
        let unasked = add_lost(&folder, &on_hosts, &records, &mut outs).unwrap();
        assert_eq!((unasked.what.as_str(), outs.len()), ("host n1: this program fails there", 1));
    }

    #[test]
    fn a_batch_system_that_is_not_there_is_told() {
        let root = tempfile::tempdir().unwrap();
        let (folder, plan, records) = study(root.path());
        let plan = SweepPlan { site: Some(site("mine", "kind: slurm")), ..plan };
        let mut outs = BTreeMap::new();
        assert!(add_lost(&folder, &plan, &records, &mut outs).is_some(), "the folder lacks study.json, or there is no SLURM");
        assert!(outs.is_empty(), "of what could not be asked nothing is said");
    }

    #[test]
    fn elements_are_looked_up_by_the_name_of_their_batch() {
        let queue = r#"case "$*" in
*--name=*-000001*) echo '77|cloze-demo-ab-k-000001';;
*--name=*) ;;
*) echo '77_0|RUNNING|0:10|1:00|n1|None'; echo '77_1|FAILED|0:10|1:00|n1|None'
   echo '77_3|PENDING|0:00|1:00||BeginTime';;
esac"#;
        let (_programs, slurm) = cluster(&[("squeue", queue), ("sacct", "exit 1"), ("scontrol", "echo 'ClusterName = here'")]);
        let info = StudyInfo {
            version: 1,
            name: "demo".to_owned(),
            file: PathBuf::from("demo.yaml"),
            profile: None,
            overrides: Vec::new(),
            hash: "ab".to_owned(),
            key: "k".to_owned(),
            cluster: None,
            expected: None,
            metric: Metric { task: None, score: Score::Loss },
            keys: Vec::new(),
            created: 0.0,
        };
        let jobs = look(&slurm, &info, BTreeSet::from([1, 2])).unwrap();
        let of = |batch, element| jobs.word(Place { batch, element });
        let ended = |how: &str| Some(Word::Ended(how.to_owned()));
        assert_eq!((of(1, 0), of(1, 3)), (Some(Word::Runs), Some(Word::Waits)));
        assert_eq!(of(1, 1), ended("job 77_1: failed"));
        assert_eq!(of(1, 2), ended("the batch system does not know job 77_2 any more"));
        assert_eq!(of(2, 0), ended("the batch system knows no job of its batch"));
        assert_eq!(of(3, 0), None, "nobody has asked");
        let state = |element, is_held, known: Option<OutState>| {
            jobs.state_of(&Open { hash: "h", place: Place { batch: 1, element }, is_held }, known.as_ref())
        };
        assert_eq!(state(0, true, None), Some(OutState::Running));
        assert_eq!(state(0, true, Some(OutState::Queued)), Some(OutState::Running), "it is made ready there");
        assert_eq!(state(3, true, None), Some(OutState::QueuedAgain), "somebody has worked on it, and it waits once more");
        assert_eq!(state(3, true, Some(OutState::Queued)), None, "it is queued, as its files say");
        assert_eq!(state(1, true, None), None, "its controller takes that in");
        assert_eq!(state(1, false, None), Some(OutState::Gone("job 77_1: failed".to_owned())));
        let elsewhere = StudyInfo { cluster: Some("there".to_owned()), ..info };
        assert!(look(&slurm, &elsewhere, BTreeSet::from([1])).unwrap_err().what.contains("another cluster"));
    }
}
