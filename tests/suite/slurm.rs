//! Runs in jobs of a SLURM cluster: whatever happens to a job, its run goes on to the same weights; what was cancelled stays cancelled; and
//! what the cluster cannot give is refused before anything is submitted.
//!
//! The cluster is a real one. Tests share one where they can: each starts runs one after the other.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{
    CLOZE, Outcome, RECIPE, Run, SlurmCluster, SlurmOptions, World, fake_slurm, fake_slurm_with_a_queue, run_command, wait_until,
};

/// How long a run that goes to its end is to train, in seconds, so that something can happen on the way.
const RUN_S: f64 = 8.0;
/// Bounds of its steps, whatever the pace of this machine.
const FEWEST_STEPS: u64 = 120;
const MOST_STEPS: u64 = 5000;
/// Steps by which the pace is measured.
const PACE_STEPS: u64 = 40;
/// The step after which something happens.
const DISTURBED_STEP: u64 = 30;
/// Longest wait for something that takes seconds on a free machine.
const TIMEOUT: Duration = Duration::from_mins(3);
/// Settings of all runs: two nodes with a worker each, and few checkpoints besides those that are asked for.
const SETTINGS: [&str; 8] = [
    "--set",
    "resources.nodes=2",
    "--set",
    "checkpoint.every_steps=50",
    "--set",
    "cluster.heartbeat_timeout_ms=5000",
    "--set",
    "checkpoint.keep_last=2",
];

/// A cluster, and the folder that all of its nodes share.
struct Site {
    cluster: SlurmCluster,
    world: World,
}

/// A run that nothing happens to.
struct Undisturbed {
    steps: u64,
    /// Its last checkpoint.
    tensors: BTreeMap<String, Vec<u8>>,
}

impl Site {
    fn start(test: &str, options: SlurmOptions) -> Option<Self> {
        let cluster = SlurmCluster::start(test, options)?;
        let world = World::prepared();
        for partition in ["main", "spot", "nowhere"] {
            world.write(&format!("{partition}.yaml"), cluster_file(&format!("partition: {partition}, max_jobs: 5")));
        }
        Some(Self { cluster, world })
    }

    fn cloze(&self, arguments: &[&str]) -> Outcome {
        run_command(&mut self.world.command_by(self.cluster.command(CLOZE), arguments))
    }

    /// Submits the recipe; returns the run and its job.
    fn submit(&self, cluster_file: &str, name: &str, settings: &[&str]) -> (Run, u64) {
        let outcome = self.cloze(&submit_arguments(cluster_file, name, settings)).expect_code(0);
        (self.world.run(name), job_of(&outcome))
    }

    /// Submits it with as many steps as the undisturbed run, and waits until something may happen.
    fn submit_and_wait(&self, cluster_file: &str, name: &str, undisturbed: &Undisturbed) -> (Run, u64) {
        let (run, job) = self.submit(cluster_file, name, &["--set", &format!("train.steps={}", undisturbed.steps)]);
        self.wait_for_step(&run, DISTURBED_STEP);
        (run, job)
    }

    fn wait_for_step(&self, run: &Run, step: u64) {
        self.cluster.wait_for_change("the run trains", || run.last_step() >= step);
    }

    /// Waits for the end of the run and of all jobs. No process may be left, and the weights must be those of an undisturbed run.
    fn expect_same_end(&self, run: &Run, undisturbed: &Undisturbed) {
        self.cluster.wait_for_change("the run is finished", || !run.events_named("run_finished").is_empty());
        self.expect_no_job(run);
        assert!(run.checkpoint_tensors(undisturbed.steps) == undisturbed.tensors, "the weights differ from those of an undisturbed run");
    }

    /// Waits until nothing is queued and nothing runs.
    fn expect_no_job(&self, run: &Run) {
        self.cluster.wait_for_change("all jobs are over", || self.queue().is_empty());
        wait_until("all workers are gone", TIMEOUT, || run.live_workers() == 0);
    }

    fn queue(&self) -> String {
        self.cluster.run("squeue", &["--noheader", "--format=%i %T"]).expect_code(0).stdout
    }
}

impl Drop for Site {
    /// A test that fails shows what the jobs said, which goes with the world.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let runs = fs::read_dir(self.world.path("")).into_iter().flatten().filter_map(Result::ok);
        let logs = runs.flat_map(|run| fs::read_dir(run.path().join("logs")).into_iter().flatten().filter_map(Result::ok));
        for log in logs.filter(|log| log.file_name().to_string_lossy().starts_with("job-")) {
            let text = fs::read_to_string(log.path()).unwrap_or_default();
            let shown = format!("== {}\n{text}\n", log.path().display());
            std::io::stderr().write_all(shown.as_bytes()).expect("write to stderr");
        }
    }
}

/// A run on this machine with as many workers, of as many steps as take some seconds.
fn undisturbed(world: &World) -> Undisturbed {
    let train = |name: &str, steps: u64| {
        let steps = format!("train.steps={steps}");
        world.train(name, &[["--workers", "2", "--quiet", "--set", &steps].as_slice(), SETTINGS.as_slice()].concat())
    };
    let pace = train("pace", PACE_STEPS).events_named("step");
    let time = |event: Option<&Value>| event.and_then(|event| event["time"].as_f64()).expect("a step has a time");
    let step_s = (time(pace.last()) - time(pace.first())) / (PACE_STEPS - 1) as f64;
    let steps = ((RUN_S / step_s.max(1e-6)) as u64).clamp(FEWEST_STEPS, MOST_STEPS);
    Undisturbed { steps, tensors: train("undisturbed", steps).checkpoint_tensors(steps) }
}

fn cluster_file(slurm: &str) -> String {
    format!("version: 1\nname: test\nkind: slurm\nslurm: {{{slurm}}}\npreflight: {{timeout_s: 120}}\n")
}

fn submit_arguments<'a>(cluster_file: &'a str, name: &'a str, settings: &[&'a str]) -> Vec<&'a str> {
    [["submit", RECIPE, "--cluster", cluster_file, "--run", name].as_slice(), SETTINGS.as_slice(), settings].concat()
}

/// The job that a command has submitted.
fn job_of(outcome: &Outcome) -> u64 {
    outcome.stdout.trim().parse().unwrap_or_else(|_| panic!("`{}` is no number of a job", outcome.stdout))
}

/// What was written down of attempts, by the kind of line.
fn attempts(run: &Run, event: &str) -> Vec<Value> {
    let text = fs::read_to_string(run.path.join("slurm/attempts.jsonl")).unwrap_or_default();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("an attempt is a line of JSON"));
    lines.filter(|line| line["event"] == event).collect()
}

#[test]
fn runs_are_put_back_cancelled_and_resumed() {
    let Some(site) = Site::start("runs in jobs of SLURM", SlurmOptions::default()) else { return };
    let undisturbed = undisturbed(&site.world);
    refuse_what_the_cluster_cannot_give(&site);
    put_back_on_a_warning(&site, &undisturbed);
    cancel_and_resume(&site, &undisturbed);
    go_on_in_a_successor(&site, &undisturbed);
}

fn refuse_what_the_cluster_cannot_give(site: &Site) {
    site.cloze(&submit_arguments("nowhere.yaml", "run", &[])).expect_code(3).expect_words(&["partition", "nowhere", "main, spot, urgent"]);
    let too_much = ["--set", "resources.nodes=5", "--set", "resources.gpus_per_node=3"];
    site.cloze(&submit_arguments("main.yaml", "run", &too_much)).expect_code(3).expect_words(&["main", "5", "4", "3", "2"]);
    let shown = site.cloze(&submit_arguments("main.yaml", "run", &["--dry-run", "--set", "resources.gpus_per_node=1"])).expect_code(0);
    let root = site.world.path("run").display().to_string();
    assert_eq!(
        shown.stdout.replace(&root, "RUN"),
        "\
#!/bin/bash
#SBATCH --job-name=cloze-run-DRY-RUN-1
#SBATCH --chdir=RUN
#SBATCH --output=RUN/logs/job-%j.log
#SBATCH --open-mode=append
#SBATCH --partition=main
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --signal=B:USR2@120
#SBATCH --requeue

exec RUN/bin/DRY-RUN/cloze allocation RUN
"
    );
    assert_eq!(site.queue(), "");
    assert!(!site.world.path("run").exists(), "a run folder was made for nothing");
}

/// A warning ahead of the time limit, as SLURM sends it; a second submission meanwhile; logs and status at the end.
fn put_back_on_a_warning(site: &Site, undisturbed: &Undisturbed) {
    let (run, job) = site.submit_and_wait("main.yaml", "warned", undisturbed);
    let steps = format!("train.steps={}", undisturbed.steps);
    let queue = site.queue();
    site.cloze(&submit_arguments("main.yaml", "warned", &["--set", &steps])).expect_code(9).expect_words(&["warned"]);
    assert_eq!(site.queue(), queue, "a run was submitted twice");
    site.cluster.run("scancel", &["--batch", "--signal=USR2", &job.to_string()]).expect_code(0);
    site.expect_same_end(&run, undisturbed);

    assert_eq!(site.cluster.job_field(job, "Restarts").as_deref(), Some("1"));
    assert_eq!(site.cluster.job_state(job).as_deref(), Some("COMPLETED"));
    let ended: Vec<Value> = attempts(&run, "ended").iter().map(|attempt| attempt["decision"].clone()).collect();
    assert_eq!(ended, ["requeue", "finish"]);
    // It went on from the checkpoint that the warning was for, not from one of the regular ones.
    let restored = run.restored_steps();
    assert_eq!(restored.len(), 2);
    assert_eq!(run.events_named("step").len() as u64, undisturbed.steps, "a step was done twice, restored at {restored:?}");

    let run_path = run.path.display().to_string();
    let logs = site.cloze(&["logs", &run_path]).expect_code(0).stdout;
    for part in ["attempt 1 (1 of at most 5)", "attempt 2", "the run is finished"] {
        assert!(logs.contains(part), "`{part}` is missing in:\n{logs}");
    }
    // What the other node says is in its own log and in the job's, and shown once.
    let by_job =
        |line: &str| line.starts_with("job ") && ["n1", "n2", "n3", "n4"].iter().any(|node| line.contains(&format!(" | {node}: ")));
    assert!(logs.contains("\nnode n") && !logs.lines().any(by_job), "{logs}");
    let first = site.cloze(&["logs", &run_path, "--attempt", "1"]).expect_code(0).stdout;
    assert!(first.contains("attempt 1 (1 of at most 5)") && !first.contains("attempt 2 ("), "{first}");
    site.cloze(&["logs", &run_path, "--attempt", "9"]).expect_code(3).expect_words(&["the run has no such attempt", "expected: 1 to "]);
    // The run is over, so following its logs ends.
    assert_eq!(site.cloze(&["logs", &run_path, "--follow"]).expect_code(0).stdout.lines().count(), logs.lines().count());
    let status = site.cloze(&["status", &run_path]).expect_code(0).stdout;
    assert!(status.contains(&format!("job {job}: completed")) && status.contains("attempt 2 on "), "{status}");
}

fn cancel_and_resume(site: &Site, undisturbed: &Undisturbed) {
    let (run, job) = site.submit_and_wait("main.yaml", "cancelled", undisturbed);
    let run_path = run.path.display().to_string();
    site.cloze(&["cancel", &run_path]).expect_code(0).expect_words(&[&job.to_string()]);
    site.expect_no_job(&run);
    assert_eq!(site.cluster.job_state(job).as_deref(), Some("CANCELLED"));
    assert!(run.events_named("run_finished").is_empty());
    assert_eq!(attempts(&run, "started").len(), 1, "a cancelled run went on");

    let resumed = job_of(&site.cloze(&["resume", &run_path]).expect_code(0));
    assert_ne!(resumed, job);
    site.expect_same_end(&run, undisturbed);
}

/// The job dies without a word, and SLURM does not put it back.
fn go_on_in_a_successor(site: &Site, undisturbed: &Undisturbed) {
    let (run, job) = site.submit_and_wait("main.yaml", "killed", undisturbed);
    site.cluster.kill_script(job);
    site.expect_same_end(&run, undisturbed);
    let jobs: Vec<Value> = attempts(&run, "started").iter().map(|attempt| attempt["job"].clone()).collect();
    assert_eq!(jobs.len(), 2, "{jobs:?}");
    assert_ne!(jobs[0], jobs[1], "the successor went on with the run");
    assert_eq!(site.cluster.job_state(job).as_deref(), Some("FAILED"));
}

#[test]
fn runs_make_room_and_leave_lost_nodes() {
    let options = SlurmOptions { accounting: true, gpus_per_node: 0, ..SlurmOptions::default() };
    let Some(site) = Site::start("runs that lose their nodes", options) else { return };
    let undisturbed = undisturbed(&site.world);
    make_room(&site, &undisturbed);
    leave_a_lost_node(&site, &undisturbed);
    stay_cancelled(&site);
}

fn make_room(site: &Site, undisturbed: &Undisturbed) {
    let (run, job) = site.submit_and_wait("spot.yaml", "preempted", undisturbed);
    let urgent = site.cluster.submit(&["--partition=urgent", "--nodes=4", "--exclusive"], "sleep 1");
    site.cluster.wait_for_state(urgent, &["COMPLETED"]);
    site.expect_same_end(&run, undisturbed);
    let jobs: Vec<Value> = attempts(&run, "started").iter().map(|attempt| attempt["job"].clone()).collect();
    assert_eq!(jobs, [jobs[0].clone(), jobs[0].clone()], "the same job goes on");
    assert_eq!(site.cluster.job_field(job, "Restarts").as_deref(), Some("1"));
    assert_eq!(run.events_named("step").len() as u64, undisturbed.steps, "it left with a checkpoint, so no step was done twice");
}

fn leave_a_lost_node(site: &Site, undisturbed: &Undisturbed) {
    let (run, job) = site.submit_and_wait("main.yaml", "lost", undisturbed);
    let lost = site.cluster.nodes_of(job)[1].clone();
    site.cluster.kill_node(&lost);
    site.expect_same_end(&run, undisturbed);
    let started = attempts(&run, "started");
    assert!(started.len() >= 2, "{started:?}");
    let nodes = started[started.len() - 1]["nodes"].as_array().expect("an attempt has nodes").clone();
    assert!(!nodes.contains(&lost.as_str().into()), "{nodes:?}");
    site.cluster.start_node(&lost);
    site.cluster.wait_for_idle_nodes();
}

/// Somebody cancels the job behind the program's back. Nothing goes on by itself, but it can.
fn stay_cancelled(site: &Site) {
    let (run, job) = site.submit("main.yaml", "stopped", &["--set", "train.steps=1000000"]);
    site.wait_for_step(&run, DISTURBED_STEP);
    site.cluster.cancel(job);
    site.expect_no_job(&run);
    assert_eq!(attempts(&run, "started").len(), 1, "a cancelled run went on");
    let (run_path, before) = (run.path.display().to_string(), run.last_step());
    site.cloze(&["resume", &run_path]).expect_code(0);
    site.wait_for_step(&run, before + 1);
    site.cloze(&["cancel", &run_path]).expect_code(0);
    site.expect_no_job(&run);
}

/// The node lives and SLURM sees nothing wrong with it, but no worker starts there, as where a library is missing.
#[test]
fn a_node_where_no_worker_starts_is_left_out_of_the_next_job() {
    let options = SlurmOptions { num_nodes: 3, gpus_per_node: 0, ..SlurmOptions::default() };
    let Some(site) = Site::start("a node where no worker starts", options) else { return };
    let cluster_file = "version: 1\nname: test\nkind: slurm\nslurm: {partition: main, max_jobs: 5}\npreflight: {enabled: false}\n";
    site.world.write("unchecked.yaml", cluster_file);
    let worker = site.world.worker_broken_on("n2", 127);
    let mut command = site.world.command_by(site.cluster.command(CLOZE), &submit_arguments("unchecked.yaml", "broken", &[]));
    let job = job_of(&run_command(command.env("CLOZE_WORKER", worker)).expect_code(0));
    let run = site.world.run("broken");
    site.cluster.wait_for_change("the first attempt has ended", || !attempts(&run, "ended").is_empty());
    let (started, ended) = (attempts(&run, "started"), attempts(&run, "ended"));
    assert_eq!(started[0]["nodes"], serde_json::json!(["n1", "n2"]), "the controller is not on the node that is broken");
    assert_eq!((&ended[0]["bad_nodes"], &ended[0]["failure"]["kind"]), (&serde_json::json!(["n2"]), &"environment".into()), "{ended:?}");
    assert_eq!(ended[0]["decision"], serde_json::json!({"replace": {"exclude": ["n2"]}}));

    site.cluster.wait_for_change("the run is finished", || !run.events_named("run_finished").is_empty());
    site.expect_no_job(&run);
    let started = attempts(&run, "started");
    assert_eq!((started.len(), &started[1]["nodes"]), (2, &serde_json::json!(["n1", "n3"])), "{started:?}");
    let replacement = started[1]["job"].as_str().map_or_else(|| started[1]["job"].to_string(), str::to_owned);
    assert_ne!(replacement, job.to_string(), "another job takes its place");
    let script = fs::read_to_string(run.path.join(format!("slurm/{}.sh", started[1]["name"].as_str().expect("a job has a name")))).unwrap();
    assert!(script.contains("#SBATCH --exclude=n2\n"), "{script}");
    // The node lives.
    site.cluster.wait_for_idle_nodes();
    // Nothing is left to do for another job.
    let resumed = site.cloze(&["resume", &run.path.display().to_string()]).expect_code(0);
    resumed.expect_words(&["the run is finished at step", "no job is submitted"]);
    site.expect_no_job(&run);
}

#[test]
fn a_run_goes_on_beyond_its_time_limit() {
    let options = SlurmOptions { num_nodes: 2, gpus_per_node: 0, ..SlurmOptions::default() };
    let Some(site) = Site::start("a run beyond its time limit", options) else { return };
    // SLURM warns up to 60 s early, so this comes at once or within the half minute in which it looks again.
    site.world.write("short.yaml", cluster_file("time_limit_minutes: 1, warning_s: 45, max_jobs: 3"));
    let (run, job) = site.submit("short.yaml", "limited", &["--set", "train.steps=1000000"]);
    site.cluster.wait_for_change("the run is put back", || attempts(&run, "started").len() == 2);
    let ended = attempts(&run, "ended");
    assert_eq!((&ended[0]["decision"], &ended[0]["reason"]), (&"requeue".into(), &"the time limit is near".into()));
    let before = run.last_step();
    site.wait_for_step(&run, before + 1);
    let steps: Vec<Value> = run.events_named("step").iter().map(|event| event["step"].clone()).collect();
    assert_eq!(steps, (1..=steps.len() as u64).map(Value::from).collect::<Vec<_>>(), "no step was done twice");
    assert_eq!(site.cluster.job_field(job, "Restarts").as_deref(), Some("1"));
    site.cloze(&["cancel", &run.path.display().to_string()]).expect_code(0);
    site.expect_no_job(&run);
}

#[test]
fn everything_that_a_run_would_meet_is_told_before_it_is_submitted() {
    let world = World::prepared();
    let path = fake_slurm(&world);
    world.write("main.yaml", cluster_file("partition: main"));
    fs::create_dir(world.path("model")).unwrap();
    world.write("wrong.yaml", "extends: recipe.yaml\nversion: 1\nmodel: {path: model, shape: null}\ndata: {output: elsewhere}\n");
    let submit = |recipe: &str, more: &[&str]| {
        let arguments = ["submit", recipe, "--cluster", "main.yaml", "--run", "run"];
        run_command(world.command(&[arguments.as_slice(), more].concat()).env("PATH", &path))
    };
    let wishes = ["--set", "resources.workers_per_node=9", "--set", "resources.cpus_per_worker=1"];
    for more in [["--dry-run"].as_slice(), &[]] {
        let outcome = submit("wrong.yaml", &[wishes.as_slice(), more].concat()).expect_code(3);
        outcome.expect_words(&["3 of ", "partition: no node of the partition has that many cores", "model: ", "prepared data: "]);
    }
    let outcome = submit(RECIPE, &["--set", "resources.memory_per_node_mib=1"]).expect_code(3);
    outcome.expect_words(&["memory: the recipe does not fit"]);
    assert!(!world.path("run").exists(), "a run folder was made for nothing");
    let short = ["--set", "resources.time_limit_minutes=2"];
    let words = ["resources.time_limit_minutes: found 2, expected at least 3", "hint: raise `resources.time_limit_minutes`"];
    submit(RECIPE, &short).expect_code(3).expect_words(&words);
    world.cloze(&[["check", RECIPE, "--cluster", "main.yaml"].as_slice(), &short].concat()).expect_code(3).expect_words(&words);
    let dry = || submit(RECIPE, &["--dry-run"]);
    assert!(dry().expect_code(0).stdout.contains("#SBATCH --partition=main\n"));
    // A folder that is another run's is refused as without `--dry-run`, and left as it is.
    fs::create_dir(world.path("run")).unwrap();
    world.write("run/notes.txt", "mine");
    for more in [["--dry-run"].as_slice(), &[]] {
        submit(RECIPE, more).expect_code(3).expect_words(&["the run folder is not empty", "found: notes.txt"]);
    }
    fs::remove_dir_all(world.path("run")).unwrap();
    world.train("run", &[]);
    dry().expect_code(3).expect_words(&["this run already exists"]);
}

#[test]
fn a_run_whose_cluster_is_lost_is_marked() {
    let world = World::prepared();
    let path = fake_slurm_with_a_queue(&world);
    world.write("main.yaml", cluster_file("partition: main"));
    run_command(world.command(&submit_arguments("main.yaml", "run", &[])).env("PATH", &path)).expect_code(0);
    let elsewhere = |arguments: &[&str]| run_command(world.command(arguments).env("PATH", "/nowhere"));
    let mark = world.path("run/slurm/cancelled.json");
    elsewhere(&["cancel", "run"]).expect_code(5).expect_words(&["sbatch", "a host of the cluster `test`", "--mark-only"]);
    assert!(!mark.exists(), "the run was marked although its jobs go on");
    let marked = elsewhere(&["cancel", "run", "--mark-only"]).expect_code(0);
    marked.expect_words(&["job 77 may still be in the queue of the cluster `test`", "no job of the run"]);
    assert!(mark.is_file());
}

#[test]
fn a_machine_without_slurm_is_told_so() {
    let world = World::prepared();
    world.write("main.yaml", cluster_file("partition: main"));
    let mut command = world.command(&submit_arguments("main.yaml", "run", &[]));
    command.env("PATH", world.path("nothing"));
    run_command(&mut command).expect_code(5).expect_words(&["sbatch", "hint:"]);
    assert!(!world.path("run").exists(), "a run folder was made for nothing");
}

#[test]
fn the_nodes_of_a_partition_are_counted_before_anything_is_submitted() {
    let options = SlurmOptions { num_nodes: 3, gpus_per_node: 0, ..SlurmOptions::default() };
    let Some(site) = Site::start("the nodes of a partition", options) else { return };
    site.world.write("few.yaml", cluster_file("partition: main, exclude: [\"n[2-3]\"]"));
    site.world.write("sweep.yaml", "extends: recipe.yaml\nversion: 1\nname: many\nresources: {nodes: 2}\nsweep: {seeds: [1, 2]}\n");
    let few = "the partition has fewer nodes for the run than it wants";
    let refused = site.cloze(&submit_arguments("few.yaml", "run", &["--dry-run"])).expect_code(3);
    refused.expect_words(&[few, "expected at most 1, ", "found 2"]);
    site.cloze(&["sweep", "run", "sweep.yaml", "--cluster", "few.yaml"]).expect_code(3).expect_words(&[few, "expected: at most 1, "]);
    let two = ["--set", "resources.nodes=2"];
    let planned = site.cloze(&[["plan", RECIPE, "--cluster", "few.yaml"].as_slice(), &two].concat()).expect_code(3);
    assert!(planned.stdout.contains(&format!("FAIL  partition: {few}; at partition main;")), "{}", planned.stdout);
    // A partition that is not there has its place in the cluster file, whoever asks.
    let (missing, place) = ("the cluster has no such partition", "nowhere.yaml:4:20: slurm.partition");
    site.cloze(&submit_arguments("nowhere.yaml", "run", &[])).expect_code(3).expect_words(&[missing, place]);
    site.cloze(&["sweep", "run", "sweep.yaml", "--cluster", "nowhere.yaml"]).expect_code(3).expect_words(&[missing, place]);
    assert!(!site.world.path("studies").exists() && !site.world.path("run").exists(), "nothing was made");
    // A node that is out of use may come back: the job would wait, and that is said.
    site.cluster.run("scontrol", &["update", "NodeName=n3", "State=DRAIN", "Reason=test"]).expect_code(0);
    let short = "2 of 3 nodes that the run wants are in use in partition main: 1 drained";
    let shown = site.cloze(&submit_arguments("main.yaml", "run", &["--dry-run", "--set", "resources.nodes=3"])).expect_code(0);
    shown.expect_words(&["warning: ", short, "`sinfo -R`"]);
    let planned = site.cloze(&["plan", RECIPE, "--cluster", "main.yaml", "--set", "resources.nodes=3"]).expect_code(0);
    assert!(planned.stdout.contains(&format!("WARN  partition: {short}")), "{}", planned.stdout);
    let quiet = site.cloze(&submit_arguments("main.yaml", "run", &["--dry-run"])).expect_code(0);
    assert!(!quiet.stderr.contains("warning: "), "two nodes are left: {}", quiet.stderr);
    // A run whose job waits is refused by a dry run as by another submission.
    for node in ["n1", "n2"] {
        site.cluster.run("scontrol", &["update", &format!("NodeName={node}"), "State=DRAIN", "Reason=test"]).expect_code(0);
    }
    let (run, job) = site.submit("main.yaml", "waiting", &[]);
    for more in [["--dry-run"].as_slice(), &[]] {
        let again = site.cloze(&submit_arguments("main.yaml", "waiting", more)).expect_code(9);
        again.expect_words(&["this run has jobs that are not over", &format!("job {job}, pending")]);
    }
    site.cloze(&["cancel", &run.path.display().to_string()]).expect_code(0);
    site.expect_no_job(&run);
}
