//! What must hold whatever is cut off: nothing is submitted twice.

use std::path::PathBuf;

use super::super::client::fixtures::{cluster, site as slurm_site};
use super::super::verdict::Decision;
use super::*;
use crate::sample;

fn submission() -> Submission {
    let programs = Programs {
        cloze: PathBuf::from("/runs/first/bin/1f/cloze"),
        worker: PathBuf::from("/runs/first/bin/1f/cloze-worker"),
        hash: "1f".to_owned(),
    };
    let site = Site {
        name: "mine".to_owned(),
        kind: SiteKind::Slurm(slurm_site()),
        folder: None,
        container: None,
        modules: Vec::new(),
        environment: std::collections::BTreeMap::new(),
        setup: Vec::new(),
        preflight: cloze_recipes::site::Preflight { enabled: false, min_bandwidth_share: 0.3, max_slowdown: 3.0, timeout_s: 300 },
        gpu_memory_mib: None,
        tokens_per_second: None,
    };
    let resources = Resources { nodes: 2, workers_per_node: 3, ..sample::resources() };
    Submission::new(site, resources, programs, false).unwrap()
}

fn run() -> (tempfile::TempDir, RunPaths) {
    let folder = tempfile::tempdir().unwrap();
    let paths = RunPaths::find(folder.path()).unwrap();
    (folder, paths)
}

#[test]
fn a_submission_reads_back() {
    let (_folder, run) = run();
    let paths = JobPaths::of(&run);
    assert_eq!(Submission::read(&paths).unwrap(), None);
    fs::create_dir_all(paths.root()).unwrap();
    let submission = submission();
    submission.write(&paths).unwrap();
    assert_eq!(Submission::read(&paths).unwrap(), Some(submission.clone()));
    assert_eq!(submission.workers(), 6);
    assert_eq!(submission.job_name("my run/ü", 3), format!("cloze-my-run---{}-3", submission.key));
    assert!(!submission.key.is_empty());
}

#[test]
fn a_job_is_on_the_disk_before_it_is_submitted() {
    let (_folder, run) = run();
    // The script and the intent must be there when `sbatch` is called.
    let sbatch = r#"[ -s "$2" ] && grep -q intent "${2%/*}/jobs.jsonl" && echo 41 || exit 1"#;
    let (_programs, slurm) = cluster(&[("sbatch", sbatch)]);
    let mut jobs = Jobs::open(&slurm, &run).unwrap();
    let job = jobs.submit(&submission(), "first", Role::Asked, &[]).unwrap();
    assert_eq!((job, jobs.ids()), (JobId::whole(41), vec![JobId::whole(41)]));
    let script = fs::read_to_string(JobPaths::of(&run).script(&jobs.records()[0].name)).unwrap();
    assert!(script.contains("\nexec /runs/first/bin/1f/cloze allocation "), "{script}");
    assert_eq!(jobs.successor_of(job), None);
    let successor = jobs.submit(&submission(), "first", Role::Successor { of: job }, &["n3".to_owned()]).unwrap();
    assert_eq!(jobs.successor_of(job), Some(successor));
}

/// A run whose submitter was cut off, by its own clock at this Unix time; the name of the job.
fn cut_off(run: &RunPaths, time: f64) -> String {
    let paths = JobPaths::of(run);
    fs::create_dir_all(paths.root()).unwrap();
    let name = submission().job_name("first", 1);
    let intent = JobEvent::Intent { time, name: name.clone(), role: Role::Asked, exclude: Vec::new() };
    journal::append(&paths.jobs(), &intent).unwrap();
    name
}

#[test]
fn an_intent_without_an_outcome_is_looked_for_by_its_name() {
    let (_folder, run) = run();
    let name = cut_off(&run, 1.0);
    let (_programs, slurm) = cluster(&[("squeue", &format!("echo '7|{name}'")), ("sacct", "true")]);
    let jobs = Jobs::open(&slurm, &run).unwrap();
    assert_eq!((jobs.records()[0].job, jobs.records()[0].is_open()), (Some(JobId::whole(7)), false));
}

#[test]
fn a_submission_is_given_up_by_the_clock_of_whoever_looks_for_it() {
    let now = unix_time().unwrap();
    // The clock of the submitter may be right, or an hour behind or ahead.
    for time in [now, now - 3600.0, now + 3600.0] {
        let (_folder, run) = run();
        let name = cut_off(&run, time);
        // Its job is on its way, and there at the fourth question.
        let squeue = format!(r#"echo >> "${{0%/*}}/asked"; [ "$(wc -l < "${{0%/*}}/asked")" -lt 4 ] || echo '7|{name}'"#);
        let (programs, slurm) = cluster(&[("squeue", &squeue), ("sacct", "true")]);
        let mut jobs = Jobs::open(&slurm, &run).unwrap();
        assert_eq!(jobs.open_names(), [name.as_str()], "{}", time - now);
        jobs.settle_within(Duration::from_mins(1), Duration::from_millis(1)).unwrap();
        assert_eq!(jobs.ids(), [JobId::whole(7)], "{}", time - now);
        assert_eq!(fs::read_to_string(programs.path().join("asked")).unwrap().lines().count(), 4);
    }
    for time in [now, now - 3600.0, now + 3600.0] {
        let (_folder, run) = run();
        cut_off(&run, time);
        let (_programs, slurm) = cluster(&[("squeue", "true"), ("sacct", "true")]);
        let mut jobs = Jobs::open(&slurm, &run).unwrap();
        let since = Instant::now();
        jobs.settle_within(Duration::from_millis(300), Duration::from_millis(50)).unwrap();
        assert!(since.elapsed() >= Duration::from_millis(300));
        assert!(jobs.records()[0].is_dropped && jobs.open_names().is_empty(), "{}", time - now);
        // What is known is not waited for.
        jobs.settle_within(Duration::from_hours(1), Duration::from_hours(1)).unwrap();
    }
}

#[test]
fn an_intent_stays_open_while_nobody_answers() {
    let (_folder, run) = run();
    cut_off(&run, 1.0);
    let paths = JobPaths::of(&run);
    let (_programs, slurm) = cluster(&[("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")]);
    assert!(Jobs::open(&slurm, &run).is_err());
    assert!(journal::jobs(journal::read(&paths.jobs()).unwrap())[0].is_open());
}

/// A run whose only job was submitted to a cluster, with lines about how it went on.
fn submitted(run: &RunPaths, cluster: Option<&str>, lines: &[JobEvent], decision: Option<Decision>) {
    let paths = JobPaths::of(run);
    fs::create_dir_all(paths.root()).unwrap();
    Submission { cluster: cluster.map(str::to_owned), ..submission() }.write(&paths).unwrap();
    let (name, job) = ("cloze-a-1".to_owned(), JobId::whole(7));
    let intent = JobEvent::Intent { time: 1.0, name: name.clone(), role: Role::Asked, exclude: Vec::new() };
    let taken = JobEvent::Submitted { time: 1.0, name: name.clone(), job };
    for event in [intent, taken].iter().chain(lines) {
        journal::append(&paths.jobs(), event).unwrap();
    }
    let started = AttemptEvent::Started { time: 1.0, attempt: 1, job, name, requeues: 0, nodes: Vec::new() };
    journal::append(&paths.attempts(), &started).unwrap();
    if let Some(decision) = decision {
        let (reason, bad_nodes) = (String::new(), Vec::new());
        let ended = AttemptEvent::Ended { time: 2.0, attempt: 1, job, decision, reason, elapsed_s: 1, bad_nodes, failure: None };
        journal::append(&paths.attempts(), &ended).unwrap();
    }
}

#[test]
fn a_run_with_jobs_in_another_cluster_is_named_until_they_are_over() {
    let (_programs, slurm) = cluster(&[("scontrol", "echo 'ClusterName = alpha'")]);
    let cancelled = [JobEvent::Cancelled { time: 2.0, job: JobId::whole(7) }];
    let dropped = [JobEvent::Dropped { time: 2.0, name: "cloze-a-1".to_owned(), reason: String::new() }];
    let cases: [(Option<&str>, &[JobEvent], Option<Decision>, bool); 8] = [
        (None, &[], None, true),
        (Some("alpha"), &[], None, true),
        (Some("beta"), &[], None, false),
        (Some("beta"), &[], Some(Decision::Requeue), false),
        (Some("beta"), &[], Some(Decision::Leave { code: 130 }), false),
        (Some("beta"), &[], Some(Decision::GiveUp { code: 9 }), true),
        (Some("beta"), &cancelled, None, true),
        (Some("beta"), &dropped, None, true),
    ];
    for (known, lines, decision, may_go_on) in cases {
        let (_folder, run) = run();
        submitted(&run, known, lines, decision.clone());
        // The jobs themselves may be anywhere: a federation brings them to other clusters than the one that was asked.
        assert_eq!(Jobs::open(&slurm, &run).unwrap().ids(), [JobId::whole(7)]);
        let opened = Jobs::open_here(&slurm, &run).map(|jobs| jobs.ids());
        assert_eq!(opened.is_ok(), may_go_on, "{known:?} {lines:?} {decision:?}");
        let now = Submission::read(&JobPaths::of(&run)).unwrap().unwrap().cluster;
        match opened {
            Ok(ids) if known == Some("beta") => assert_eq!((ids.len(), now.as_deref()), (0, Some("alpha")), "7 is a stranger's job here"),
            Ok(ids) => assert_eq!((ids.len(), now.as_deref()), (1, known)),
            Err(error) => {
                let failure: Failure = error.downcast().unwrap();
                assert_eq!((failure.kind, now.as_deref()), (FailureKind::Mismatch, Some("beta")));
                assert!(failure.hint.unwrap().contains("set `cluster` to null in slurm/submission.json"));
            }
        }
    }
}

#[test]
fn a_refused_job_is_not_looked_for_again() {
    let (_folder, run) = run();
    let (_programs, slurm) =
        cluster(&[("sbatch", "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"), ("squeue", "true"), ("sacct", "true")]);
    let mut jobs = Jobs::open(&slurm, &run).unwrap();
    let failure: Failure = jobs.submit(&submission(), "first", Role::Asked, &[]).unwrap_err().downcast().unwrap();
    assert!(failure.hint.unwrap().contains("limit"));
    assert!(jobs.records()[0].is_dropped);
}

#[test]
fn a_submission_that_went_through_behind_an_error_is_taken() {
    let (_folder, run) = run();
    let sbatch = r#"echo "sbatch: error: Batch job submission failed: Socket timed out" >&2; exit 1"#;
    let squeue = r#"for word; do case $word in --name=*) echo "9|${word#--name=}";; esac; done"#;
    let (_programs, slurm) = cluster(&[("sbatch", sbatch), ("squeue", squeue), ("sacct", "true")]);
    let mut jobs = Jobs::open(&slurm, &run).unwrap();
    assert_eq!(jobs.submit(&submission(), "first", Role::Asked, &[]).unwrap(), JobId::whole(9));
}

#[test]
fn a_job_that_waits_is_told_of_bad_nodes_and_its_record_says_so() {
    let (_folder, run) = run();
    let scontrol = r#"echo "$@" > "${0%/*}/told""#;
    let (programs, slurm) = cluster(&[("sbatch", "echo 41"), ("scontrol", scontrol)]);
    let mut jobs = Jobs::open(&slurm, &run).unwrap();
    let job = jobs.submit(&submission(), "first", Role::Asked, &["n3".to_owned()]).unwrap();
    jobs.exclude(job, &["n9".to_owned(), "n3".to_owned()], &["n3".to_owned(), "n1".to_owned()]).unwrap();
    assert_eq!(fs::read_to_string(programs.path().join("told")).unwrap(), "update JobId=41 ExcNodeList=n1,n3,n9\n");
    assert_eq!(jobs.records()[0].exclude, ["n3", "n1"]);
    // What the batch system refuses is not written down.
    let (_programs, refusing) = cluster(&[("scontrol", "echo 'slurm_update error: Job is no longer pending' >&2; exit 1")]);
    drop(jobs);
    let mut jobs = Jobs::open(&refusing, &run).unwrap();
    assert!(jobs.exclude(job, &[], &["n5".to_owned()]).is_err());
    assert_eq!(jobs.records()[0].exclude, ["n3", "n1"]);
}
