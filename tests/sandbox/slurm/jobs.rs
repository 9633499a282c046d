//! What a test asks of a cluster, and what it does to it.

use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{POLL_INTERVAL, SlurmCluster};
use crate::sandbox::{Outcome, Process, run_command};

/// Longest wait for a job's state or a node's, unless a test names another. The slowest is a job whose node crashed: 27 s on a free machine.
const STATE_TIMEOUT: Duration = Duration::from_mins(2);

impl SlurmCluster {
    /// Runs a program on the login host to its end.
    #[track_caller]
    pub fn run(&self, program: &str, arguments: &[&str]) -> Outcome {
        run_command(self.command(program).args(arguments))
    }

    /// Submits a script in bash and returns the job's number.
    #[track_caller]
    pub fn submit(&self, options: &[&str], script: &str) -> u64 {
        let mut command = self.command("sbatch");
        command.args(["--parsable", "--output=/dev/null"]).args(options);
        let outcome = Process::start(&mut command, &format!("#!/bin/bash\n{script}\n")).wait().expect_code(0);
        // Behind a semicolon there may be the name of the cluster.
        let number = outcome.stdout.trim().split(';').next().unwrap_or_default().to_owned();
        number.parse().unwrap_or_else(|_| panic!("`{number}` is no number of a job"))
    }

    /// One of the fields that `scontrol show job` prints, as in `Restarts`; `None` where the job or the field is not known. Of an array,
    /// it is that of the task that comes first.
    pub fn job_field(&self, job: u64, field: &str) -> Option<String> {
        let outcome = self.run("scontrol", &["--oneliner", "show", "job", &job.to_string()]);
        let prefix = format!("{field}=");
        outcome.stdout.split_whitespace().find_map(|word| word.strip_prefix(&prefix)).map(str::to_owned)
    }

    /// The state of a job, as in `RUNNING`.
    pub fn job_state(&self, job: u64) -> Option<String> {
        self.job_field(job, "JobState")
    }

    /// Waits until a job is in one of some states.
    #[track_caller]
    pub fn wait_for_state(&self, job: u64, states: &[&str]) -> String {
        let mut last = None;
        self.wait_for_change(&format!("job {job} is {}", states.join(" or ")), || {
            last = self.job_state(job);
            last.as_deref().is_some_and(|state| states.contains(&state))
        });
        last.unwrap_or_default()
    }

    /// Waits until something holds that takes seconds in a cluster; what fails shows the logs of the daemons.
    #[track_caller]
    pub fn wait_for_change(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + STATE_TIMEOUT;
        while !holds() {
            let jobs = || self.run("scontrol", &["show", "job"]).stdout + &self.run("sinfo", &["--long", "--Node"]).stdout;
            assert!(Instant::now() < deadline, "{what}: not within {STATE_TIMEOUT:?}\n{}\n{}", jobs(), self.fleet.logs());
            sleep(POLL_INTERVAL);
        }
    }

    /// Cancels a job.
    #[track_caller]
    pub fn cancel(&self, job: u64) {
        self.run("scancel", &[&job.to_string()]).expect_code(0);
    }

    /// The node on which a job's script runs.
    #[track_caller]
    pub fn batch_node(&self, job: u64) -> String {
        self.job_field(job, "BatchHost").expect("the job has a node")
    }

    /// Nodes of a job, in order.
    #[track_caller]
    pub fn nodes_of(&self, job: u64) -> Vec<String> {
        let list = self.job_field(job, "NodeList").expect("the job has nodes");
        let names = self.run("scontrol", &["show", "hostnames", &list]).expect_code(0);
        names.stdout.lines().map(str::to_owned).collect()
    }

    /// The state of a node, as in `IDLE` or `DOWN*`.
    pub fn node_state(&self, node: &str) -> String {
        self.run("sinfo", &["--noheader", "--partition=main", "--format=%T", "--nodes", node]).stdout.trim().to_uppercase()
    }

    /// Whether a node has work; while it is looked at often, SLURM does not tell a part of its processors from all of them.
    pub fn is_busy(&self, node: &str) -> bool {
        ["MIXED", "ALLOCATED"].contains(&self.node_state(node).as_str())
    }

    /// Waits until no job runs and all nodes take new ones.
    #[track_caller]
    pub fn wait_for_idle_nodes(&self) {
        self.wait_for_change("all nodes are idle", || {
            let states = self.run("sinfo", &["--noheader", "--Node", "--partition=main", "--format=%T"]).stdout;
            states.lines().filter(|state| *state == "idle").count() == self.options.num_nodes
        });
    }

    /// A node loses power: its daemon and everything that runs there is gone. SLURM finds out after about 15 s.
    #[track_caller]
    pub fn kill_node(&self, node: &str) {
        self.fleet.kill_on(node, |_| true);
    }

    /// Only a node's daemon is killed; what it has started runs on.
    #[track_caller]
    pub fn kill_daemon(&self, node: &str) {
        self.fleet.kill_on(node, |name| name == "slurmd");
    }

    /// Ends a job's script with SIGKILL, as the kernel does when memory runs out; SLURM then ends what is left of the job.
    #[track_caller]
    pub fn kill_script(&self, job: u64) {
        self.run("scancel", &["--batch", "--signal=KILL", &job.to_string()]).expect_code(0);
    }

    /// Starts a node's daemon, for the first time or again.
    pub fn start_node(&self, node: &str) {
        self.fleet.begin_on(node, &self.daemon_line(&format!("slurmd -D -N {node}"), node));
    }

    /// Everything on a node stands still, and its address answers no more.
    pub fn freeze_node(&self, node: &str) {
        self.fleet.signal_on(node, "STOP");
    }

    /// It goes on.
    pub fn thaw_node(&self, node: &str) {
        self.fleet.signal_on(node, "CONT");
    }
}
