//! Batches against a batch system of a shell's making: what is submitted, found again, cancelled, and waited for.

use std::path::PathBuf;

use cloze_recipes::failure::FailureKind;
use cloze_recipes::site::SiteKind;
use cloze_recipes::study::{Metric, Score};

use super::super::folder::{StudyFolder, StudyInfo};
use super::*;
use crate::slurm::fixtures::{cluster, resources, whole_site};
use crate::sweep::record::Place;

fn info() -> StudyInfo {
    StudyInfo {
        version: 1,
        name: "glue".to_owned(),
        file: PathBuf::from("glue.yaml"),
        profile: None,
        overrides: Vec::new(),
        hash: "0123456789abcdef".to_owned(),
        key: "a1b2".to_owned(),
        cluster: None,
        expected: None,
        metric: Metric { task: None, score: Score::Accuracy },
        keys: Vec::new(),
        created: 1.0,
    }
}

fn options(folder: &str, nodes: u32, concurrency: (u32, u32)) -> QueueOptions {
    QueueOptions {
        folder: StudyFolder::new(PathBuf::from(folder)),
        info: info(),
        program: PathBuf::from("/shared/glue/bin/1f/cloze"),
        resources: resources(nodes),
        site: whole_site(),
        concurrency,
    }
}

fn batch(elements: usize) -> Batch {
    Batch { number: 3, elements: vec![Vec::new(); elements] }
}

fn script_of(queue: &Queue) -> String {
    queue.options.script(&batch(6), 4, &queue.exclude, queue.slurm.version()).unwrap()
}

/// A partition of eight nodes.
const SINFO: (&str, &str) = ("sinfo", "echo 'main*|up|infinite|8|8|16000|(null)'");

const OUT: Out<'_> = Out { trial: 0, hash: "h", place: Place { batch: 3, element: 0 } };

/// The next look at the queue comes at once.
fn look(queue: &mut Queue) -> anyhow::Result<Vec<Gone>> {
    queue.next_poll_at = Instant::now();
    queue.gone(&[OUT])
}

#[test]
fn an_element_has_all_nodes_of_its_trial() {
    let (_programs, slurm) = cluster(&[SINFO]);
    let mut queue = Queue::over(options("/shared/glue", 2, (8, 1)), slurm).unwrap();
    assert_eq!(queue.avoid(&["n7".to_owned(), "n5".to_owned()]).news, ["n7", "n5"]);
    assert_eq!(queue.avoid(&["n7".to_owned()]), Avoided::default());
    let script = "\
#!/bin/bash
#SBATCH --job-name=cloze-glue-0123456789-a1b2-000003
#SBATCH --chdir=/shared/glue
#SBATCH --output=/shared/glue/jobs/job-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --array=0-5%4
#SBATCH --partition=main
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gres=gpu:4
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --exclude=n5,n7

exec /shared/glue/bin/1f/cloze sweep work /shared/glue --batch 3 --cores 32
";
    assert_eq!(script_of(&queue), script);
    // What works on it needs `srun`, so it stays outside of the container, in which an element of one node is as a whole.
    let container = cloze_recipes::study::Container { image: "cloze.sqsh".to_owned(), mounts: Vec::new() };
    queue.options.resources.container = Some(container.clone());
    assert_eq!(script_of(&queue), script);
    let (_programs, slurm) = cluster(&[]);
    let mut one = Queue::over(options("/shared/glue", 1, (8, 2)), slurm).unwrap();
    one.options.resources.container = Some(container);
    assert!(script_of(&one).contains("\nexec srun "));
}

#[test]
fn trials_of_several_nodes_are_not_packed() {
    let failure = Queue::new(options("/shared/glue", 2, (8, 2))).unwrap_err();
    assert_eq!((failure.kind, failure.place.as_deref()), (FailureKind::Recipe, Some("sweep.pack")));
    assert_eq!((failure.expected.as_deref(), failure.found.as_deref()), (Some("1, since `resources.nodes` is 2"), Some("2")));
}

#[test]
fn a_queue_that_does_not_answer_for_a_while_is_asked_again() {
    let squeue = r#"[ -e "${0%/*}/up" ] || { echo 'Unable to contact slurm controller' >&2; exit 1; }
case "$*" in *--name=*) echo "9|cloze-glue-0123456789-a1b2-000003";; *) echo '9_0|FAILED|0:05|1:00|n1|None';; esac"#;
    let (programs, slurm) = cluster(&[("squeue", squeue), ("sacct", "true"), ("scontrol", "true")]);
    let mut queue = Queue::over(options("/shared/glue", 1, (1, 1)), slurm).unwrap();
    assert!(look(&mut queue).unwrap().is_empty());
    assert!(queue.next_poll_at > Instant::now(), "it is asked again later");
    assert!(look(&mut queue).unwrap().is_empty());
    assert_eq!(queue.unanswered.map(|(count, _)| count), Some(2));
    // The silence has begun so long ago that nobody waits on.
    let long_ago = Instant::now().checked_sub(Duration::from_secs(SILENCE_MAX_S)).unwrap();
    queue.unanswered = Some((13, long_ago));
    let failure: Failure = look(&mut queue).unwrap_err().downcast().unwrap();
    assert_eq!(failure.kind, FailureKind::Environment);
    assert!(failure.cause.unwrap().contains("Unable to contact") && failure.hint.unwrap().contains("cloze sweep resume /shared/glue"));
    queue.unanswered = Some((3, Instant::now()));
    std::fs::write(programs.path().join("up"), "").unwrap();
    let gone = look(&mut queue).unwrap();
    assert_eq!((gone.len(), gone[0].trial), (1, 0));
    assert_eq!(queue.unanswered, None, "a silence that is over does not count for the next");
}

#[test]
fn a_job_that_shows_up_after_its_cancellation_is_cancelled() {
    let squeue = r#"[ -e "${0%/*}/up" ] || exit 0
case "$*" in *--name=*) echo "9|cloze-glue-0123456789-a1b2-000003";; *) echo '9_0|RUNNING|0:05|1:00|n1|None';; esac"#;
    let scancel = r#"echo "$@" >> "${0%/*}/cancelled""#;
    let (programs, slurm) = cluster(&[("squeue", squeue), ("sacct", "true"), ("scancel", scancel)]);
    let mut queue = Queue::over(options("/shared/glue", 1, (1, 1)), slurm).unwrap();
    queue.cancel(&[OUT]);
    assert!(queue.gone(&[OUT]).unwrap().is_empty());
    let cancelled = || std::fs::read_to_string(programs.path().join("cancelled")).unwrap_or_default();
    let unknown = LeftBehind { name: "cloze-glue-0123456789-a1b2-000003".to_owned(), job: None };
    assert_eq!((queue.left_behind(), cancelled()), (vec![unknown.clone()], String::new()));
    assert!(unknown.to_string().contains("was not found"));
    std::fs::write(programs.path().join("up"), "").unwrap();
    assert!(look(&mut queue).unwrap().is_empty());
    assert!(look(&mut queue).unwrap().is_empty());
    assert_eq!((queue.left_behind(), cancelled()), (Vec::new(), "9\n".to_owned()), "once, and nothing is left to tell");
}

#[test]
fn a_job_that_cannot_be_cancelled_is_told_as_that() {
    let squeue = r#"case "$*" in *--name=*) echo "9|cloze-glue-0123456789-a1b2-000003";; *) echo '9_0|RUNNING|0:05|1:00|n1|None';; esac"#;
    let scancel = r#"[ -e "${0%/*}/up" ] || { echo 'Unable to contact slurm controller' >&2; exit 1; }
echo "$@" >> "${0%/*}/cancelled""#;
    let (programs, slurm) = cluster(&[("squeue", squeue), ("sacct", "true"), ("scancel", scancel)]);
    let mut queue = Queue::over(options("/shared/glue", 1, (1, 1)), slurm).unwrap();
    queue.cancel(&[OUT]);
    look(&mut queue).unwrap();
    let left: Vec<String> = queue.left_behind().iter().map(ToString::to_string).collect();
    assert_eq!(left, ["job 9 (cloze-glue-0123456789-a1b2-000003) could not be cancelled and may still run: scancel 9"]);
    std::fs::write(programs.path().join("up"), "").unwrap();
    look(&mut queue).unwrap();
    // Somebody signals once more.
    queue.cancel(&[OUT]);
    assert_eq!(queue.left_behind(), []);
    look(&mut queue).unwrap();
    assert_eq!(std::fs::read_to_string(programs.path().join("cancelled")).unwrap(), "9\n");
}

#[test]
fn enough_nodes_are_left_for_a_job() {
    let (_programs, slurm) = cluster(&[SINFO]);
    let mut options = options("/shared/glue", 5, (8, 1));
    // Two of eight are the site's own, so one more leaves the five that a job wants.
    if let SiteKind::Slurm(site) = &mut options.site.kind {
        site.exclude = vec!["n[1-2]".to_owned()];
    }
    let mut queue = Queue::over(options, slurm).unwrap();
    let avoided = queue.avoid(&["n2".to_owned(), "n7".to_owned(), "n8".to_owned()]);
    let expected = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    assert_eq!((avoided.news, avoided.spared), (expected(&["n2", "n7"]), expected(&["n8"])));
    assert_eq!(queue.avoid(&["n8".to_owned(), "n6".to_owned()]), Avoided::default(), "that is said once");
    let (_programs, silent) = cluster(&[("sinfo", "exit 1")]);
    let mut queue = Queue::over(super::tests::options("/shared/glue", 1, (8, 1)), silent).unwrap();
    assert_eq!(queue.avoid(&["n7".to_owned()]).spared, ["n7"]);
}

/// One element runs and one waits, unless `begun` is there; then both run. What is told is in `told`, where `broken` does not refuse it.
const SQUEUE: &str = r#"case "$*" in *--name=*) echo "9|cloze-glue-0123456789-a1b2-000003";; *)
if [ -e "${0%/*}/begun" ]; then printf '9_0|PENDING|0:00|1:00||Priority\n9_1|RUNNING|0:05|1:00|n1|None\n'
else printf '9_0|RUNNING|0:05|1:00|n1|None\n9_1|PENDING|0:00|1:00||Priority\n'; fi;; esac"#;
const SCONTROL: &str = r#"case "$1" in update) echo "$@" >> "${0%/*}/told"
[ -e "${0%/*}/broken" ] && echo 'Unable to contact slurm controller' >&2 && exit 1
echo '9_0: Job is no longer pending execution' >&2; exit 1;; esac
[ -e "${0%/*}/all-run" ] && echo "JobId=9 ArrayJobId=9 ArrayTaskId=1 JobState=RUNNING ExcNodeList=n[5,6]" && exit 0
echo "JobId=10 ArrayJobId=9 ArrayTaskId=0 JobState=RUNNING ExcNodeList=n3"
echo "JobId=9 ArrayJobId=9 ArrayTaskId=1 JobState=PENDING ExcNodeList=n[5,6]""#;

#[test]
fn what_waits_is_kept_away_from_nodes_that_turn_out_bad() {
    let (programs, slurm) = cluster(&[SINFO, ("squeue", SQUEUE), ("sacct", "true"), ("scontrol", SCONTROL)]);
    let mut queue = Queue::over(options("/shared/glue", 1, (2, 1)), slurm).unwrap();
    let told = || std::fs::read_to_string(programs.path().join("told")).unwrap_or_default();
    look(&mut queue).unwrap();
    assert_eq!(told(), "", "no node is bad");
    queue.next_poll_at = Instant::now() + Duration::from_mins(1);
    queue.avoid(&["n9".to_owned(), "n7".to_owned()]);
    queue.gone(&[OUT]).unwrap();
    // Those of the job's own script stay, whoever has written it.
    assert_eq!(told(), "update JobId=9 ExcNodeList=n7,n9,n[5,6]\n");
    look(&mut queue).unwrap();
    assert_eq!(told().lines().count(), 1, "once");
    queue.avoid(&["n8".to_owned()]);
    look(&mut queue).unwrap();
    assert_eq!(told().lines().last(), Some("update JobId=9 ExcNodeList=n7,n8,n9,n[5,6]"));
    // Another element waits again, with the list of its script.
    std::fs::write(programs.path().join("begun"), "").unwrap();
    look(&mut queue).unwrap();
    look(&mut queue).unwrap();
    assert_eq!(told().lines().count(), 3);
}

#[test]
fn what_could_not_be_told_of_bad_nodes_is_told_later() {
    let (programs, slurm) = cluster(&[SINFO, ("squeue", SQUEUE), ("sacct", "true"), ("scontrol", SCONTROL)]);
    let mut queue = Queue::over(options("/shared/glue", 1, (2, 1)), slurm).unwrap();
    let told = || std::fs::read_to_string(programs.path().join("told")).unwrap_or_default().lines().count();
    let set = |name: &str, is_there: bool| {
        let path = programs.path().join(name);
        let done = if is_there { std::fs::write(path, "") } else { std::fs::remove_file(path) };
        done.unwrap();
    };
    // Its last element begins just before it would be told.
    set("all-run", true);
    queue.avoid(&["n9".to_owned()]);
    look(&mut queue).unwrap();
    assert_eq!(told(), 0);
    set("all-run", false);
    set("broken", true);
    look(&mut queue).unwrap();
    look(&mut queue).unwrap();
    assert_eq!(told(), 2, "each look tries it once");
    set("broken", false);
    look(&mut queue).unwrap();
    look(&mut queue).unwrap();
    assert_eq!(told(), 3);
}

#[test]
fn a_batch_without_a_job_is_given_up_by_this_controllers_own_clock() {
    let (_programs, slurm) = cluster(&[("squeue", "true"), ("sacct", "true")]);
    let root = tempfile::tempdir().unwrap();
    let mut queue = Queue::over(options(&root.path().display().to_string(), 1, (1, 1)), slurm).unwrap();
    queue.options.folder.make().unwrap();
    // Whatever the file's time says, by whatever clock.
    let path = queue.options.folder.batch_path(3);
    std::fs::write(&path, "{}").unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    for _ in 0..=MAX_MISSES {
        assert_eq!(look(&mut queue).unwrap(), []);
    }
    let long_ago = Instant::now().checked_sub(Duration::from_secs(SUBMIT_SETTLED_S + 1)).unwrap();
    queue.job(3).since = long_ago;
    for _ in 1..MAX_MISSES {
        assert_eq!(look(&mut queue).unwrap(), []);
    }
    assert_eq!(look(&mut queue).unwrap().len(), 1);
}

#[test]
fn jobs_of_two_folders_have_two_names() {
    let metric = Metric { task: None, score: Score::Accuracy };
    // As folders of before the key have it.
    let text = serde_json::json!({
        "version": 1, "name": "glue", "file": "glue.yaml", "profile": null, "overrides": [], "hash": "0123456789abcdef",
        "expected": null, "metric": metric, "keys": [], "created": 1.0,
    });
    let old: StudyInfo = serde_json::from_value(text).unwrap();
    assert_eq!(job_name(&old, 7), "cloze-glue-0123456789-000007");
    let new = StudyInfo { key: "a1b2c3d4".to_owned(), ..old };
    assert_eq!(job_name(&new, 7), "cloze-glue-0123456789-a1b2c3d4-000007");
}

#[test]
fn arrays_of_one_round_share_the_room() {
    let mut free = 100;
    let mut open = 2500;
    let mut limits = Vec::new();
    for elements in [1000, 1000, 500] {
        let limit = share_of(free, elements, open);
        (free, open) = (free - limit, open - elements);
        limits.push(limit);
    }
    assert_eq!((limits, free), (vec![40, 40, 20], 0));
    assert_eq!(share_of(4, 3, 3), 4);
    assert_eq!(share_of(0, 3, 3), 1);
}
