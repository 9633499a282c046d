//! The calls, against programs of a shell's making.

use std::fs;

use cloze_recipes::study::Resources;

use super::super::job::{ExitStatus, State};
use super::fixtures::{cluster, resources, site};
use super::*;

fn id(text: &str) -> JobId {
    text.parse().unwrap()
}

#[test]
fn a_machine_without_the_programs() {
    let folder = tempfile::tempdir().unwrap();
    let failure = Slurm::at(Some(folder.path().to_owned()), &site()).unwrap_err();
    assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Environment, "`sbatch` cannot be started"));
    assert!(failure.hint.unwrap().contains("login node"));
}

#[test]
fn a_refusal_keeps_the_words_of_the_batch_system() {
    let (_folder, slurm) = cluster(&[("sbatch", "echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1")]);
    let failure = slurm.submit(Path::new("job.sh"), &[]).unwrap_err();
    assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Environment, "SLURM refused the job"));
    assert!(failure.cause.unwrap().contains("nope") && failure.hint.unwrap().contains("slurm.partition"));
}

#[test]
fn a_submission_names_its_job() {
    let (folder, slurm) = cluster(&[("sbatch", r#"echo "$@" > "${0%/*}/asked"; echo 4711"#)]);
    assert_eq!(slurm.submit(Path::new("/run/job.sh"), &["--hold".to_owned()]).unwrap(), id("4711"));
    assert_eq!(fs::read_to_string(folder.path().join("asked")).unwrap(), "--parsable --hold /run/job.sh\n");
}

/// The queue knows 1 and the array 2; it says that `2_0` is over. 3 and 4 are forgotten there.
const SQUEUE: (&str, &str) =
    ("squeue", "printf '1|RUNNING|0:05|1:00|n1|None\\n2_0|FAILED|0:03|1:00|n1|None\\n2_1|PENDING|0:00|1:00||Priority\\n'");
/// Only the controller's memory knows 4.
const SCONTROL: (&str, &str) = (
    "scontrol",
    r#"echo "$@" >> "${0%/*}/shown"
case "$4" in 4) echo "JobId=4 JobState=TIMEOUT ExitCode=0:15 RunTime=00:01:00 Restarts=0 Reason=TimeLimit";;
2) echo "JobId=2 ArrayJobId=2 ArrayTaskId=0 JobState=FAILED ExitCode=3:0";;
*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;; esac"#,
);

#[test]
fn states_come_from_whoever_knows() {
    let sacct = ("sacct", "printf '1|PENDING|0:0|0|None assigned\\n2_0|FAILED|7:0|3|n1\\n3|CANCELLED by 1000|0:0|5|n1\\n'");
    let (folder, slurm) = cluster(&[SQUEUE, SCONTROL, sacct]);
    let states = slurm.states(&[id("1"), id("2"), id("3"), id("4"), id("5")]).unwrap();
    let short: Vec<String> = states.iter().map(|(id, job)| format!("{id} {}", job.state)).collect();
    assert_eq!(short, ["1 running", "2_0 failed", "2_1 pending", "3 cancelled", "4 time limit"]);
    assert_eq!(states[&id("2_0")].exit, Some(ExitStatus { code: 7, signal: 0 }));
    assert_eq!(states[&id("3")].cancelled_by, Some(1000));
    // What the accounting has answered is not asked again.
    assert_eq!(fs::read_to_string(folder.path().join("shown")).unwrap(), "-o show job 4\n-o show job 5\n");
    assert_eq!(slurm.states(&[id("2_1")]).unwrap().len(), 1);
}

#[test]
fn states_without_accounting() {
    let sacct = ("sacct", r#"echo x >> "${0%/*}/accounts"; echo "Slurm accounting storage is disabled" >&2; exit 1"#);
    let (folder, slurm) = cluster(&[SQUEUE, SCONTROL, sacct]);
    for _ in 0..2 {
        let states = slurm.states(&[id("2"), id("4")]).unwrap();
        assert_eq!(states[&id("2_0")].exit, Some(ExitStatus { code: 3, signal: 0 }));
        assert_eq!((states[&id("4")].state, states[&id("4")].reason.as_deref()), (State::Timeout, Some("TimeLimit")));
    }
    assert_eq!(fs::read_to_string(folder.path().join("accounts")).unwrap(), "x\n");
}

#[test]
fn a_controller_that_does_not_answer_is_no_empty_queue() {
    let (_folder, slurm) = cluster(&[("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")]);
    let failure = slurm.states(&[id("1")]).unwrap_err();
    assert!(failure.cause.unwrap().contains("Unable to contact"));
}

#[test]
fn jobs_that_are_over_can_be_cancelled() {
    let (_folder, slurm) =
        cluster(&[("scancel", "echo 'scancel: error: Kill job error on job id 9: Invalid job id specified' >&2; exit 1")]);
    slurm.cancel(&[id("9")]).unwrap();
    let (_folder, slurm) = cluster(&[("scancel", "echo 'scancel: error: Access/permission denied' >&2; exit 1")]);
    assert!(slurm.cancel(&[id("9")]).is_err());
}

#[test]
fn a_cluster_says_what_it_is_called() {
    let config = r"printf 'Configuration data as of now\nAccountingStorageHost   = h\nClusterName             = alpha\n'";
    let (_folder, slurm) = cluster(&[("scontrol", config)]);
    assert_eq!(slurm.cluster_name().as_deref(), Some("alpha"));
    let (_folder, silent) = cluster(&[("scontrol", "exit 1")]);
    assert_eq!(silent.cluster_name(), None);
}

#[test]
fn partitions_are_checked_by_name() {
    let (_folder, slurm) = cluster(&[("sinfo", "printf 'main|up|1:00:00|4|4|4096|(null)\\nbig|up|infinite|99|64|4096|gpu:8\\n'")]);
    let wish = Wish::of(&Resources { nodes: 8, gpus_per_node: 0, cpus_per_worker: None, ..resources(1) }, &site());
    assert_eq!(slurm.fit(&wish).unwrap().misfits.len(), 1);
    let named = |partition: Option<&str>| Slurm {
        site: SlurmSite { partition: partition.map(str::to_owned), ..site() },
        folder: slurm.folder.clone(),
        version: slurm.version,
        no_accounting: AtomicBool::new(false),
    };
    assert!(named(None).fit(&wish).unwrap().misfits.is_empty());
    assert!(named(Some("main,big")).fit(&wish).unwrap().misfits.is_empty());
    let missing = named(Some("bgi")).fit(&wish).unwrap().misfits;
    assert_eq!((missing[0].expected.as_deref(), missing[0].found.as_deref()), (Some("one of main, big"), Some("bgi")));
}

#[test]
fn an_array_is_told_of_nodes_where_nothing_but_its_progress_speaks_against_it() {
    let shown = "echo 'JobId=9 ArrayJobId=9 ArrayTaskId=1 JobState=PENDING ExcNodeList=n[5-6]'";
    let begun = "9_0: Job is no longer pending execution";
    let cases = [
        (begun.to_owned(), 3, Some(Told::All)),
        (format!("{begun}\n\n9_2: Job is no longer pending execution"), 3, Some(Told::All)),
        (format!("{begun}\n9_1: Access/permission denied"), 3, None),
        (String::new(), 3, None),
        (begun.to_owned(), 2, Some(Told::TooMany)),
    ];
    for (complaints, max_excluded, expected) in cases {
        let scontrol = format!("case \"$1\" in update) printf '%s\\n' '{complaints}' >&2; exit 1;; *) {shown};; esac");
        let (_folder, slurm) = cluster(&[("scontrol", &scontrol)]);
        let told = slurm.exclude_more_nodes(id("9"), &["n7".to_owned(), "n5".to_owned()], max_excluded);
        assert_eq!(told.ok(), expected, "{complaints}");
    }
    let (_folder, begun) = cluster(&[("scontrol", "echo 'JobId=9 ArrayJobId=9 ArrayTaskId=1 JobState=RUNNING'")]);
    assert_eq!(begun.exclude_more_nodes(id("9"), &["n7".to_owned()], 9).unwrap(), Told::NothingWaits);
}

#[test]
fn the_nodes_of_a_partition_bound_what_is_excluded() {
    let (_folder, slurm) = cluster(&[("sinfo", "printf 'main|up|1:00:00|4|4|4096|(null)\nbig|up|infinite|99|64|4096|gpu:8\n'")]);
    assert_eq!([2, 4, 9].map(|nodes| slurm.max_excluded(nodes).unwrap()), [2, 0, 0]);
}
