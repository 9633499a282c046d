//! What a sweep would do next, for whoever only looks: whether trials still wait at their rungs, and the first array of jobs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use cloze_recipes::failure::Failure;
use cloze_recipes::site::{Site, SshSite};
use cloze_recipes::study::Study;

use super::batch::{Assignment, Batch};
use super::controller::limits_of;
use super::decide::{Action, SweepState, TrialStatus, decide};
use super::folder::{StudyFolder, StudyInfo, SweepOptions, SweepPlan, study_hash};
use super::graph::Graph;
use super::hosts::places_of_host;
use super::lock::FileLock;
use super::queue::{MAX_ELEMENTS, QueueOptions, elements_at_once, share_of};
use super::record::{TrialRecord, TrialState};
use super::work::run_facts;
use crate::report::event_sample::{self, Sampling};
use crate::slurm::Version;
use crate::words::counted;

/// How the event log of a trial is looked at: its first and its last bytes.
const SAMPLING: Sampling = Sampling { max_bytes: 64 << 10, num_blocks: 2 };

/// Stands for the characters that tell the jobs of a study, and its programs, from those of others.
const KEY_PLACE: &str = "KEY";

/// The trials as decisions see them.
pub(super) fn statuses(plan: &SweepPlan, records: &[TrialRecord]) -> Vec<TrialStatus> {
    let of = |(trial, record): (usize, &TrialRecord)| TrialStatus {
        parent: plan.trials[trial].parent,
        climbs: plan.climbs(trial),
        state: record.state,
        fruitless_attempts: record.fruitless_attempts,
        retry_at: record.retry_at,
        rungs: record.rungs.clone(),
    };
    records.iter().enumerate().map(of).collect()
}

/// Whether nothing is left to do, so that a trial that waits at its rung waits for good. `records` are in the plan's order.
pub fn is_over(now: f64, plan: &SweepPlan, records: &[TrialRecord]) -> bool {
    let state = SweepState { trials: statuses(plan, records), is_draining: false };
    decide(now, &state, &limits_of(plan, usize::MAX)).1.is_over()
}

/// Newest step of the run of a trial that is out, by the ends of its event log; 0 where it has none yet.
pub fn newest_step(run: &Path) -> u64 {
    match event_sample::read(&run.join("events.jsonl"), SAMPLING) {
        Ok(sample) => sample.map_or(0, |sample| sample.view.progress.step),
        Err(failure) => {
            tracing::warn!(%failure, "the step of a trial is the newest that was saved");
            0
        }
    }
}

/// Newest saved step of the run of a trial, from which its next job goes on; 0 where nothing is saved.
pub fn saved_step(run: &Path) -> u64 {
    run_facts(run).map_or_else(
        |failure| {
            tracing::warn!(%failure, "the step of a trial is the newest that its record knows");
            0
        },
        |facts| facts.saved_step,
    )
}

/// Whether a trial that is out only waits in a queue: nobody works on its attempt or has begun to, and it has no outcome that waits for the
/// controller. Where it is not known when it was handed out, as in a folder that was brought from a bucket, nothing is said.
pub fn is_queued(folder: &StudyFolder, plan: &SweepPlan, record: &TrialRecord) -> bool {
    let Some(place) = record.place.filter(|_| record.state == TrialState::Training && plan.has_queue()) else { return false };
    let lock = folder.trial_lock_path(&record.hash);
    let is_worked_on = FileLock::holder(&lock).unwrap_or_else(|failure| {
        tracing::warn!(%failure, "it is not known whether anybody works on a trial");
        Some(String::new())
    });
    if is_worked_on.is_some() || folder.outcome_path(&record.hash, record.attempts).exists() {
        return false;
    }
    let Some(handed_out) = written(&folder.batch_path(place.batch)) else { return false };
    // Locks of a shared disk may be invisible here; whoever takes this one writes it, and whoever trains writes events.
    let has_begun = |path: &Path| written(path).is_some_and(|time| time >= handed_out);
    !has_begun(&lock) && !has_begun(&folder.run_path(&record.name).join("events.jsonl"))
}

/// When a file was written last; `None` where that is not known.
fn written(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|found| found.modified()).ok()
}

/// The script of the first array of jobs that a sweep submits to a site of this version; the characters that only a submission knows are
/// left open. Fails with kind `Recipe` where the trials cannot be jobs of the site.
pub fn first_script(study: &Study, graph: &Graph, folder: &StudyFolder, (site, version): (&Site, Version)) -> anyhow::Result<String> {
    let plan = SweepPlan::new(study, graph, SweepOptions { site: Some(site.clone()), ..SweepOptions::default() });
    let options = QueueOptions {
        info: StudyInfo::new(study, study_hash(&plan)?, KEY_PLACE.to_owned(), 0.0),
        program: folder.programs_path().join(PathBuf::from(KEY_PLACE).join("cloze")),
        folder: folder.clone(),
        resources: plan.resources.clone(),
        site: site.clone(),
        concurrency: (plan.concurrency, plan.pack),
    };
    Ok(first_script_of(&options, &plan, version)?)
}

/// The jobs that a sweep submits first, in words.
pub fn first_jobs_text(plan: &SweepPlan) -> String {
    let (batch, open_elements) = first_batch(plan);
    let (first, at_once) = (batch.elements.len(), elements_at_once((plan.concurrency, plan.pack)));
    let later = plan.trials.len() - batch.elements.iter().map(Vec::len).sum::<usize>();
    let arrays = open_elements.div_ceil(MAX_ELEMENTS);
    let arrays =
        if arrays > 1 { format!("{arrays} arrays, the first of {first} jobs") } else { format!("1 array of {}", counted(first, "job")) };
    let later = if later > 0 { format!("; {} when these have ended", counted(later, "trial")) } else { String::new() };
    format!("jobs at first: {arrays}, at most {at_once} at the same time, {} each{later}", counted(plan.resources.nodes as usize, "node"))
}

/// How many trials a list of hosts has at the same time, in words.
pub fn hosts_text(plan: &SweepPlan, site: &SshSite) -> String {
    let (hosts, concurrency) = (site.hosts.len(), plan.concurrency);
    let places = places_of_host(concurrency, hosts);
    let idle = hosts.saturating_sub(concurrency as usize);
    let idle =
        if idle > 0 { format!("; {} idle at any time, since `sweep.concurrency` is {concurrency}", stay(idle)) } else { String::new() };
    format!("on {}, at most {concurrency} at the same time, at most {places} on each{idle}", counted(hosts, "host"))
}

fn stay(num_hosts: usize) -> String {
    format!("{} {}", counted(num_hosts, "host"), if num_hosts == 1 { "stays" } else { "stay" })
}

fn first_script_of(options: &QueueOptions, plan: &SweepPlan, version: Version) -> Result<String, Failure> {
    options.site_of_jobs()?;
    let (batch, open_elements) = first_batch(plan);
    let limit = share_of(elements_at_once(options.concurrency), batch.elements.len(), open_elements);
    options.script(&batch, limit, &BTreeSet::new(), version)
}

/// The first batch of a sweep in a queue, and the number of elements of all batches that are handed out with it.
fn first_batch(plan: &SweepPlan) -> (Batch, usize) {
    // As the controller does: a queue takes all that can start, unless the results of some choose the next.
    let concurrency = if plan.early_stopping.is_none() { usize::MAX } else { plan.concurrency as usize };
    let records: Vec<TrialRecord> = plan.trials.iter().map(|trial| TrialRecord::new(trial, plan.parent_hash(trial))).collect();
    let state = SweepState { trials: statuses(plan, &records), is_draining: false };
    let (actions, _) = decide(0.0, &state, &limits_of(plan, concurrency));
    let starts = actions.into_iter().filter_map(|action| match action {
        Action::Start { trial, until_step } => Some(Assignment { trial: plan.trials[trial].hash.clone(), attempt: 1, until_step }),
        Action::FailWithParent { .. } => None,
    });
    let starts: Vec<Assignment> = starts.collect();
    let pack = plan.pack.max(1) as usize;
    let elements: Vec<Vec<Assignment>> = starts.chunks(pack).map(<[Assignment]>::to_vec).collect();
    let open_elements = elements.len();
    (Batch { number: 1, elements: elements.into_iter().take(MAX_ELEMENTS).collect() }, open_elements)
}

#[cfg(test)]
mod tests {
    use cloze_recipes::failure::FailureKind;
    use cloze_recipes::site::SiteKind;
    use cloze_recipes::study::{Metric, Resources, Score};

    use super::super::fixtures::{self, stage, trial};
    use super::super::folder::PlannedTrial;
    use super::super::lock::Taken;
    use super::super::record::{Place, Rung};
    use super::*;
    use crate::sample;

    /// A stage, two trials that start from it, and two that do not.
    fn plan() -> SweepPlan {
        let after_stage = |hash| PlannedTrial { parent: Some(0), ..trial(hash) };
        SweepPlan { pack: 2, ..fixtures::plan(vec![stage("stage"), after_stage("a"), after_stage("b"), trial("c"), trial("d")]) }
    }

    fn resources() -> Resources {
        Resources { workers_per_node: 2, cpus_per_worker: Some(3), ..sample::resources() }
    }

    fn site(kind: &str) -> Site {
        fixtures::site("mine", kind)
    }

    fn options(site: Site) -> QueueOptions {
        let metric = Metric { task: None, score: Score::Loss };
        let info = StudyInfo {
            version: 1,
            name: "demo".to_owned(),
            file: PathBuf::from("demo.yaml"),
            profile: None,
            overrides: Vec::new(),
            hash: "0123456789abcdef".to_owned(),
            key: KEY_PLACE.to_owned(),
            cluster: None,
            expected: None,
            metric,
            keys: Vec::new(),
            created: 0.0,
        };
        let folder = StudyFolder::new(PathBuf::from("/shared/studies/demo"));
        QueueOptions { folder, info, program: PathBuf::from("/bin/cloze"), resources: resources(), site, concurrency: (4, 2) }
    }

    #[test]
    fn the_first_array_holds_what_needs_no_stage() {
        let script = |plan| first_script_of(&options(site("kind: slurm")), &plan, Version { year: 22, month: 5 }).unwrap();
        let expected = "\
#!/bin/bash
#SBATCH --job-name=cloze-demo-0123456789-KEY-000001
#SBATCH --chdir=/shared/studies/demo
#SBATCH --output=/shared/studies/demo/jobs/job-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --array=0-1%2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=6
#SBATCH --signal=B:USR2@120
#SBATCH --requeue

exec /bin/cloze sweep work /shared/studies/demo --batch 1 --cores 6
";
        assert_eq!(script(plan()), expected);
        // Alone in an element, of which four run at the same time.
        let of_early_stopping = SweepPlan { early_stopping: Some((10, 3)), concurrency: 1, pack: 1, ..plan() };
        assert!(script(of_early_stopping).contains("--array=0-0%"), "early stopping hands out no more than run");
    }

    #[test]
    fn the_first_jobs_are_told_in_words() {
        let text = "jobs at first: 1 array of 2 jobs, at most 2 at the same time, 1 node each; 2 trials when these have ended";
        assert_eq!(first_jobs_text(&plan()), text);
        let SiteKind::Ssh(ssh) = site("kind: ssh\nssh: {hosts: [a, b, c]}").kind else { panic!("it has hosts") };
        assert_eq!(hosts_text(&plan(), &ssh), "on 3 hosts, at most 4 at the same time, at most 2 on each");
        let narrow = SweepPlan { concurrency: 1, ..plan() };
        let expected =
            "on 3 hosts, at most 1 at the same time, at most 1 on each; 2 hosts stay idle at any time, since `sweep.concurrency` is 1";
        assert_eq!(hosts_text(&narrow, &ssh), expected);
        let many = (0..2500).map(|number| trial(&format!("t{number}"))).collect();
        let text =
            "jobs at first: 3 arrays, the first of 1000 jobs, at most 4 at the same time, 1 node each; 1500 trials when these have ended";
        assert_eq!(first_jobs_text(&fixtures::plan(many)), text);
    }

    #[test]
    fn trials_that_cannot_be_jobs_have_no_script() {
        let version = Version { year: 22, month: 5 };
        let ssh = first_script_of(&options(site("kind: ssh\nssh: {hosts: [a]}")), &plan(), version).unwrap_err();
        assert_eq!((ssh.kind, ssh.what.as_str()), (FailureKind::Recipe, "the site has no batch system"));
        let mut wide = options(site("kind: slurm"));
        wide.resources.nodes = 2;
        let wide = first_script_of(&wide, &plan(), version).unwrap_err();
        assert_eq!((wide.kind, wide.what.as_str()), (FailureKind::Recipe, "trials of several nodes cannot share them"));
    }

    #[test]
    fn the_newest_step_is_that_of_the_event_log() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(newest_step(folder.path()), 0);
        crate::report::fixtures::run_folder(folder.path(), 1, None);
        assert_eq!(newest_step(folder.path()), 20);
    }

    /// A study folder with one trial in a queue, and the record of its second attempt.
    fn queued(root: &Path) -> (StudyFolder, SweepPlan, TrialRecord) {
        let folder = StudyFolder::new(root.to_owned());
        folder.make().unwrap();
        let plan = SweepPlan { site: Some(site("kind: slurm")), ..fixtures::plan(vec![trial("a")]) };
        let place = Some(Place { batch: 1, element: 0 });
        let record = TrialRecord { state: TrialState::Training, attempts: 2, place, ..TrialRecord::new(&plan.trials[0], None) };
        (folder, plan, record)
    }

    #[test]
    fn a_trial_that_nobody_works_on_is_only_queued() {
        let root = tempfile::tempdir().unwrap();
        let (folder, plan, out) = queued(root.path());
        assert!(!is_queued(&folder, &plan, &out), "nobody here knows when it was handed out");
        fs::write(folder.batch_path(1), "{}").unwrap();
        assert!(is_queued(&folder, &plan, &out));
        let here = SweepPlan { site: None, ..plan.clone() };
        assert!(!is_queued(&folder, &here, &out), "processes of this machine wait in no queue");
        assert!(!is_queued(&folder, &plan, &TrialRecord { state: TrialState::Waiting, ..out.clone() }));
        let outcome = folder.outcome_path("a", 2);
        fs::write(&outcome, "damaged").unwrap();
        assert!(!is_queued(&folder, &plan, &out), "it has ended, and its controller has not heard of it");
        fs::remove_file(&outcome).unwrap();
        let Taken::Ours(lock) = FileLock::take(&folder.trial_lock_path("a")).unwrap() else { panic!("nobody has it") };
        assert!(!is_queued(&folder, &plan, &out), "an element works on it");
        drop(lock);
    }

    #[test]
    fn an_attempt_that_has_begun_is_not_queued() {
        let root = tempfile::tempdir().unwrap();
        let (folder, plan, out) = queued(root.path());
        let run = folder.run_path(&out.name);
        fs::create_dir_all(&run).unwrap();
        let set = |path: &Path, seconds| {
            fs::write(path, "").unwrap();
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
        };
        set(&folder.batch_path(1), 1000);
        let (lock, events) = (folder.trial_lock_path("a"), run.join("events.jsonl"));
        for (lock_s, events_s, expected) in [(900, 900, true), (1001, 900, false), (900, 1001, false)] {
            set(&lock, lock_s);
            set(&events, events_s);
            assert_eq!(is_queued(&folder, &plan, &out), expected, "{lock_s} {events_s}");
        }
    }

    #[test]
    fn a_trial_waits_at_its_rung_until_nothing_is_left_to_do() {
        let plan = SweepPlan { early_stopping: Some((10, 3)), ..plan() };
        let mut records: Vec<TrialRecord> = plan.trials.iter().map(|trial| TrialRecord::new(trial, None)).collect();
        for record in &mut records {
            (record.state, record.rungs) = (TrialState::StoppedEarly, vec![Rung { step: 10, metric: Some(1.0) }]);
        }
        (records[0].state, records[0].rungs) = (TrialState::Done, Vec::new());
        assert!(!is_over(0.0, &plan, &records), "one goes on at least");
        records[1].state = TrialState::Done;
        assert!(is_over(0.0, &plan, &records));
        records[2].state = TrialState::Waiting;
        assert!(!is_over(0.0, &plan, &records));
    }
}
