//! The tests' own SLURM cluster does what the tests of runs on it rely on, and leaves nothing behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::sandbox::{SlurmCluster, SlurmOptions, run_command, wait_until};

/// Longest wait for something that takes a second on a free machine.
const TIMEOUT: Duration = Duration::from_mins(1);
/// Names the file into which the test that is to be killed writes the cluster's folder.
const KILLED_TEST: &str = "CLOZE_TEST_KILLED";

/// A folder for what jobs write.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("make a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Words of a file, sorted; none where it is not there.
    fn words(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.path(name)).unwrap_or_default();
        let mut words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        words.sort();
        words
    }
}

#[test]
fn jobs_run_are_requeued_cancelled_and_preempted() {
    let Some(cluster) = SlurmCluster::start("plain jobs of SLURM", SlurmOptions::default()) else { return };
    let place = Place::new();
    let say = |what: &str, name: &str| format!("echo {what} >> {}", place.path(name).display());

    // A job over all nodes, each of which is a host of its own, with GPUs.
    let job = cluster.submit(
        &["--nodes=4", "--gres=gpu:fake:2", "--ntasks-per-node=1"],
        &format!("srun bash -c '{}'", say("$(hostname):$SLURM_PROCID:$CUDA_VISIBLE_DEVICES", "all")),
    );
    cluster.wait_for_state(job, &["COMPLETED"]);
    assert_eq!(place.words("all"), ["n1:0:0,1", "n2:1:0,1", "n3:2:0,1", "n4:3:0,1"]);
    assert_eq!(cluster.nodes_of(job), ["n1", "n2", "n3", "n4"]);

    let array = cluster.submit(&["--array=0-5%2"], &say("$SLURM_ARRAY_TASK_ID", "array"));
    cluster.wait_for_change("all tasks of an array have run", || place.words("array").len() == 6);
    assert_eq!(place.words("array"), ["0", "1", "2", "3", "4", "5"]);
    let after = cluster.submit(&[&format!("--dependency=afterany:{array}")], &say("after", "after"));
    cluster.wait_for_state(after, &["COMPLETED"]);

    // Started again under the same number.
    let script = format!("{}; test $SLURM_RESTART_COUNT -gt 0 || sleep 1000", say("${SLURM_RESTART_COUNT:-0}", "requeued"));
    let job = cluster.submit(&["--requeue"], &format!("SLURM_RESTART_COUNT=${{SLURM_RESTART_COUNT:-0}}\n{script}"));
    cluster.wait_for_change("a job runs", || !place.words("requeued").is_empty());
    cluster.run("scontrol", &["requeue", &job.to_string()]).expect_code(0);
    cluster.wait_for_state(job, &["COMPLETED"]);
    assert_eq!(place.words("requeued"), ["0", "1"]);
    assert_eq!(cluster.job_field(job, "Restarts").as_deref(), Some("1"));

    let job = cluster.submit(&[], "sleep 1000");
    cluster.wait_for_state(job, &["RUNNING"]);
    cluster.cancel(job);
    cluster.wait_for_state(job, &["CANCELLED"]);
    // Not even what has left the job's session outlives it.
    let job = cluster.submit(&[], &format!("setsid sleep 1000 & {}; sleep 1000", say("started", "killed")));
    cluster.wait_for_change("a job runs", || !place.words("killed").is_empty());
    let node = cluster.batch_node(job);
    cluster.kill_script(job);
    cluster.wait_for_state(job, &["FAILED"]);
    let sleeps = |process_id: &u32| fs::read_to_string(format!("/proc/{process_id}/comm")).is_ok_and(|name| name.trim() == "sleep");
    wait_until("what a job has left is gone", TIMEOUT, || !cluster.fleet().processes_on(&node).iter().any(sleeps));

    // All nodes are taken, so the urgent job gets one of them and the other job begins again behind it.
    let script = format!("trap '{}' TERM\n{}\nsleep 1000 & while true; do wait; done", say("warned", "spot"), say("started", "spot"));
    let spot = cluster.submit(&["--partition=spot", "--nodes=4", "--exclusive", "--requeue"], &script);
    cluster.wait_for_change("the spot job runs", || !place.words("spot").is_empty());
    let urgent = cluster.submit(&["--partition=urgent", "--exclusive"], "true");
    cluster.wait_for_state(urgent, &["COMPLETED"]);
    cluster.wait_for_change("the spot job runs again", || place.words("spot").len() >= 3);
    assert_eq!(place.words("spot"), ["started", "started", "warned"]);
    cluster.cancel(spot);
    cluster.wait_for_idle_nodes();
}

#[test]
fn nodes_are_lost_and_come_back() {
    let options = SlurmOptions { num_nodes: 3, gpus_per_node: 0, accounting: true, ..SlurmOptions::default() };
    let Some(cluster) = SlurmCluster::start("nodes of SLURM that fail", options) else { return };
    let place = Place::new();
    let script = format!("echo $(hostname) >> {}; sleep 1000", place.path("hosts").display());
    let job = cluster.submit(&["--nodes=1", "--requeue"], &script);
    cluster.wait_for_change("a job runs", || place.words("hosts").len() == 1);
    let first = cluster.batch_node(job);

    cluster.kill_node(&first);
    assert!(cluster.fleet().processes_on(&first).is_empty());
    // The dead node is found out and the job begins again on another.
    cluster.wait_for_change("the job runs again", || place.words("hosts").len() == 2);
    let second = cluster.batch_node(job);
    assert_ne!(first, second);
    assert!(cluster.node_state(&first).starts_with("DOWN"), "{}", cluster.node_state(&first));
    cluster.start_node(&first);
    cluster.wait_for_change("the node is back", || cluster.node_state(&first) == "IDLE");

    // One that cannot be reached or does not answer for a moment, or whose daemon dies and comes back, loses nothing.
    let connect = format!("exec 3<> /dev/tcp/{second}/6818");
    let is_reached = || run_command(cluster.command("timeout").args(["2", "bash", "-c", &connect])).code == Some(0);
    assert!(is_reached());
    cluster.fleet().cut(&second);
    assert!(!is_reached());
    cluster.fleet().heal(&second);
    wait_until("the node is reached again", TIMEOUT, is_reached);
    assert_eq!(run_command(&mut cluster.command_on(&second, "hostname")).stdout.trim(), second);
    cluster.freeze_node(&second);
    cluster.thaw_node(&second);
    cluster.kill_daemon(&second);
    assert!(!cluster.fleet().processes_on(&second).is_empty(), "the job lives without the node's daemon");
    cluster.start_node(&second);
    cluster.wait_for_change("the node is back", || cluster.is_busy(&second));
    assert_eq!(cluster.job_state(job).as_deref(), Some("RUNNING"));
    cluster.cancel(job);
    cluster.wait_for_state(job, &["CANCELLED"]);

    // The accounting has what the controller forgets: both starts.
    cluster.wait_for_change("the job is accounted for", || {
        let arguments =
            ["--jobs", &job.to_string(), "--duplicates", "--allocations", "--noheader", "--parsable2", "--format=State,NodeList"];
        let rows = cluster.run("sacct", &arguments).expect_code(0).stdout;
        let rows: Vec<&str> = rows.lines().collect();
        rows.len() == 2 && rows[0].ends_with(first.as_str()) && rows[1].starts_with("CANCELLED") && rows[1].ends_with(second.as_str())
    });
}

#[test]
fn a_cluster_is_gone_with_its_test() {
    let hold = |path: &Path| {
        let cluster = SlurmCluster::start("SLURM and a killed test", SlurmOptions { num_nodes: 2, ..SlurmOptions::default() })?;
        cluster.submit(&["--nodes=2"], "srun sleep 1000");
        cluster.wait_for_change("all nodes have work", || cluster.fleet().nodes().all(|node| cluster.is_busy(node)));
        fs::write(path, cluster.fleet().folder().display().to_string()).expect("tell the folder");
        Some(cluster)
    };
    if let Some(path) = std::env::var_os(KILLED_TEST) {
        let _cluster = hold(Path::new(&path));
        std::thread::sleep(TIMEOUT);
        panic!("this process was to be killed");
    }
    let place = Place::new();
    let Some(cluster) = hold(&place.path("here")) else { return };
    let folder = fs::read_to_string(place.path("here")).expect("the folder is told");
    assert!(!processes_of(&folder).is_empty());
    drop(cluster);
    expect_nothing_left(&folder);

    let this_test = "suite::slurm_sandbox::a_cluster_is_gone_with_its_test";
    let mut command = Command::new(std::env::current_exe().expect("find this program"));
    command.args(["--exact", this_test]).env(KILLED_TEST, place.path("there")).stdin(Stdio::null()).stdout(Stdio::null());
    let mut killed = command.spawn().expect("start this test again");
    wait_until("the other process has a cluster", TIMEOUT, || place.path("there").exists());
    let folder = fs::read_to_string(place.path("there")).expect("the folder is told");
    killed.kill().expect("kill the other process");
    killed.wait().expect("wait for the other process");
    wait_until("the cluster of a killed test is gone", TIMEOUT, || processes_of(&folder).is_empty() && !Path::new(&folder).exists());
}

#[track_caller]
fn expect_nothing_left(folder: &str) {
    assert_eq!(processes_of(folder), Vec::<String>::new());
    assert!(!Path::new(folder).exists(), "{folder} is left");
}

/// Processes that name a folder in their arguments or environment, as all daemons and jobs of a cluster do.
fn processes_of(folder: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").expect("list the processes").filter_map(Result::ok);
    let mentions = |path: PathBuf| {
        let bytes = fs::read(path).unwrap_or_default();
        bytes.windows(folder.len()).any(|part| part == folder.as_bytes())
    };
    let ours = entries.filter(|entry| mentions(entry.path().join("cmdline")) || mentions(entry.path().join("environ")));
    ours.map(|entry| fs::read_to_string(entry.path().join("comm")).unwrap_or_default().trim().to_owned()).collect()
}
