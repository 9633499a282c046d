//! Where a run's files about jobs are.
//!
//! ```text
//! RUN/
//!   bin/HASH/             the programs as they were when the run was submitted
//!   slurm/
//!     submission.json     cluster, machines and programs of all jobs of the run; written last
//!     cluster.yaml        the cluster file, as it was
//!     NAME.sh             the script of each job
//!     jobs.jsonl          what was asked of SLURM
//!     attempts.jsonl      what came of it
//!     cancelled.json      left by `cloze cancel`
//!     lock                held by whoever submits
//!   logs/job-ID.log       output of each job, over all its starts
//!   logs/host-NODE.log    output of what a job starts on its other nodes
//! ```

use std::path::PathBuf;

use crate::run_folder::RunPaths;

/// The files about jobs of one run.
#[derive(Clone, Debug)]
pub struct JobPaths {
    run: RunPaths,
}

impl JobPaths {
    /// Those of this run.
    pub fn of(run: &RunPaths) -> Self {
        Self { run: run.clone() }
    }

    /// The run.
    pub fn run(&self) -> &RunPaths {
        &self.run
    }

    /// The folder of most of them.
    pub fn root(&self) -> PathBuf {
        self.run.root().join("slurm")
    }

    /// What all jobs of the run have in common.
    pub fn submission(&self) -> PathBuf {
        self.root().join("submission.json")
    }

    /// The cluster file, as it was.
    pub fn cluster(&self) -> PathBuf {
        self.root().join("cluster.yaml")
    }

    /// The script of a job.
    pub fn script(&self, name: &str) -> PathBuf {
        self.root().join(format!("{name}.sh"))
    }

    /// What was asked of the batch system.
    pub fn jobs(&self) -> PathBuf {
        self.root().join("jobs.jsonl")
    }

    /// What came of it.
    pub fn attempts(&self) -> PathBuf {
        self.root().join("attempts.jsonl")
    }

    /// The mark of `cloze cancel`.
    pub fn cancelled(&self) -> PathBuf {
        self.root().join("cancelled.json")
    }

    /// Held by whoever submits.
    pub fn lock(&self) -> PathBuf {
        self.root().join("lock")
    }

    /// The folder of all logs.
    pub fn logs(&self) -> PathBuf {
        self.run.root().join("logs")
    }

    /// The programs as they were when the run was submitted.
    pub fn programs(&self) -> PathBuf {
        self.run.root().join("bin")
    }
}
