//! Outputs of several versions, as their programs print them.

use super::*;

fn id(text: &str) -> JobId {
    text.parse().unwrap()
}

#[test]
fn sbatch_names_the_new_job() {
    let cases = [
        ("12\n", Some("12")),
        ("12;blue\n", Some("12")),
        ("note: your project has 3 days left\n4711\n", Some("4711")),
        ("Submitted batch job 12\n", None),
        ("", None),
    ];
    for (output, expected) in cases {
        assert_eq!(submitted_job(output).map(|id| id.to_string()).as_deref(), expected, "{output}");
    }
}

/// 22.05: elements of an array one by one, thanks to `-r`; a job that waits for another one.
const QUEUE: &str = "\
2_2|PENDING|0:00|UNLIMITED||JobArrayTaskLimit
3|PENDING|0:00|1:00:00||Dependency
1|RUNNING|1-02:00:01|2-00:00:00|n[1-2]|None
2_0|COMPLETED|0:03|365-00:00:00|n1|None
9|PENDING|0:00|1:00||Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions
broken line
";

#[test]
fn the_queue_is_read() {
    let jobs = queue(QUEUE);
    assert_eq!(jobs.len(), 5);
    let running = &jobs[&id("1")];
    assert_eq!((running.state, running.nodes.as_str(), running.reason.as_deref()), (State::Running, "n[1-2]", None));
    assert_eq!((running.elapsed_s, running.limit_s), (Some(93_601), Some(172_800)));
    assert_eq!(jobs[&id("3")].reason.as_deref(), Some("Dependency"));
    assert_eq!((jobs[&id("2_2")].state, jobs[&id("2_2")].limit_s), (State::Pending, None));
    assert!(jobs[&id("9")].reason.as_deref().unwrap().starts_with("Nodes required"));
}

#[test]
fn elements_that_wait_together_are_told_apart() {
    // 20.11 without `-r`, and the form of `scontrol`.
    let jobs = queue("7_[0,3-5%2]|PENDING|0:00|1:00||Resources\n7_[8-12:2]|PENDING|0:00|1:00||Resources\n");
    let elements: Vec<String> = jobs.keys().map(ToString::to_string).collect();
    assert_eq!(elements, ["7_0", "7_3", "7_4", "7_5", "7_8", "7_10", "7_12"]);
}

#[test]
fn the_account_keeps_the_last_start() {
    let output = "1|REQUEUED|0:0|30|n[1-2]\n1|PREEMPTED|0:15|12|n3\n1|CANCELLED by 1000|0:0|5|n[1-2]\n2_0|FAILED|3:0|3|n1\n\
                  2_[1-2]|PENDING|0:0|0|None assigned\n8|OUT_OF_MEMORY|0:125|70|n1\n";
    let jobs = account(output);
    let last = &jobs[&id("1")];
    assert_eq!((last.state, last.requeues, last.cancelled_by, last.elapsed_s), (State::Cancelled, Some(2), Some(1000), Some(5)));
    assert_eq!(jobs[&id("2_0")].exit, Some(ExitStatus { code: 3, signal: 0 }));
    assert_eq!((jobs[&id("2_2")].state, jobs[&id("2_2")].nodes.as_str(), jobs[&id("2_2")].exit), (State::Pending, "", None));
    assert_eq!((jobs[&id("8")].state, jobs[&id("8")].exit), (State::OutOfMemory, Some(ExitStatus { code: 0, signal: 125 })));
}

#[test]
fn jobs_that_are_shown_are_read() {
    let alone = "JobId=1 JobName=a b=c UserId=root(0) JobState=FAILED Reason=NonZeroExitCode Dependency=(null) Requeue=1 Restarts=2 \
                 ExitCode=3:0 RunTime=00:00:03 TimeLimit=365-00:00:00 NodeList=n[1-2] BatchHost=n1";
    let preempted = "JobId=4 JobState=RUNNING Reason=None Restarts=0 ExitCode=0:0 RunTime=00:01:03 TimeLimit=UNLIMITED \
                     PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=2026-01-01T00:01:00 NodeList=n1";
    let calm = preempted.replace("JobId=4", "JobId=5").replace("PreemptTime=2026-01-01T00:01:00", "PreemptTime=None");
    let element = "JobId=6 ArrayJobId=2 ArrayTaskId=3 ArrayTaskThrottle=2 JobState=COMPLETING Reason=None ExitCode=0:0 RunTime=00:00:09";
    let waiting = "JobId=2 ArrayJobId=2 ArrayTaskId=4-5,9%2 JobState=PENDING Reason=JobArrayTaskLimit ExitCode=0:0 NodeList=(null)";
    let jobs = shown_jobs(&[alone, preempted, &calm, element, waiting, "No jobs"].join("\n"));
    let failed = &jobs[&id("1")];
    assert_eq!((failed.state, failed.exit, failed.requeues), (State::Failed, Some(ExitStatus { code: 3, signal: 0 }), Some(2)));
    assert_eq!((failed.elapsed_s, failed.limit_s, failed.reason.as_deref()), (Some(3), Some(31_536_000), Some("NonZeroExitCode")));
    assert!(jobs[&id("4")].is_preempted && !jobs[&id("5")].is_preempted);
    assert_eq!((jobs[&id("2_3")].state, jobs[&id("2_3")].exit), (State::Completing, None));
    let waiting: Vec<String> = jobs.iter().filter(|(_, job)| job.state == State::Pending).map(|(id, _)| id.to_string()).collect();
    assert_eq!(waiting, ["2_4", "2_5", "2_9"]);
}

#[test]
fn names_are_compared_whole() {
    let output = "12_[0-3]|cloze-a\n12_4|cloze-a\n13|cloze-a-2\n9|cloze-a\n";
    let jobs: Vec<String> = jobs_of_name(output, "cloze-a").iter().map(ToString::to_string).collect();
    assert_eq!(jobs, ["9", "12"]);
}

#[test]
fn partitions_of_unequal_nodes_are_put_together() {
    let output = "main*|up|1-00:00:00|2|64|512000+|gpu:h100:8(S:0-1)|idle|n[01-02]\nmain|up|1-00:00:00|1|32|256000|gpu:a100:4(S:0,2),nvme:1|down*|n7\n\
                  debug|down|30:00|4+|8|4096|(null)\nold|up|infinite|1|8|4096|gpu:2\n";
    let partitions = partitions(output);
    assert_eq!(partitions.iter().map(|partition| partition.name.as_str()).collect::<Vec<_>>(), ["main", "debug", "old"]);
    let main = &partitions[0];
    assert_eq!((main.nodes, main.cpus_per_node, main.memory_per_node_mib, main.limit_s), (3, 64, 512_000, Some(86_400)));
    assert_eq!(main.gpus_per_node, BTreeMap::from([("a100".to_owned(), 4), ("h100".to_owned(), 8)]));
    let groups: Vec<_> = main.groups.iter().map(|group| (group.state.as_str(), group.cpus, group.names.len())).collect();
    assert_eq!(groups, [("idle", 64, 2), ("down*", 32, 1)]);
    assert_eq!((partitions[1].groups[0].state.as_str(), partitions[1].groups[0].names.len()), ("", 0));
    assert!(!partitions[1].is_up && partitions[1].gpus_per_node.is_empty());
    assert_eq!((partitions[1].limit_s, partitions[1].nodes, partitions[2].limit_s), (Some(1800), 4, None));
    assert_eq!(partitions[2].gpus_per_node, BTreeMap::from([(String::new(), 2)]));
}

#[test]
fn durations() {
    let cases = [
        ("0:00", Some(0)),
        ("1:05", Some(65)),
        ("01:00:00", Some(3600)),
        ("2-01:00:00", Some(176_400)),
        ("1-12", Some(129_600)),
        ("1-12:30", Some(131_400)),
        ("30", Some(1800)),
        ("UNLIMITED", None),
        ("infinite", None),
        ("INVALID", None),
        ("", None),
        ("n/a", None),
    ];
    for (text, expected) in cases {
        assert_eq!(duration_s(text), expected, "{text}");
    }
}

#[test]
fn lists_of_nodes_are_told_apart() {
    let names = |lists: &[&str]| nodes_of_lists(lists.iter().copied()).into_iter().collect::<Vec<_>>().join(" ");
    assert_eq!(names(&["n[08-10,12],m1", "m1"]), "m1 n08 n09 n10 n12");
    assert_eq!(names(&["r[1-2]n[0-1]"]), "r1n0 r1n1 r2n0 r2n1");
    assert_eq!(names(&["", "n5"]), "n5");
    assert_eq!(nodes_of_lists(["n[0-99999999999]"]).len(), MAX_LIST_NODES);
}
