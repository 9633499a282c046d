//! Where the files of a run folder are.

use std::path::{Path, PathBuf};

/// The files of one run folder, by what they hold. Knowing them is no right to write them: see [`RunFolder`](super::RunFolder).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunPaths {
    root: PathBuf,
}

impl RunPaths {
    /// The files below this folder.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The checked recipe.
    pub fn recipe(&self) -> PathBuf {
        self.root.join("recipe.yaml")
    }

    /// What the run was started with.
    pub fn info(&self) -> PathBuf {
        self.root.join("run.json")
    }

    /// Where the live controller can be reached.
    pub fn control(&self) -> PathBuf {
        self.root.join("control.json")
    }

    /// The coordinator's journal.
    pub fn journal(&self) -> PathBuf {
        self.root.join("journal.jsonl")
    }

    /// The event log.
    pub fn events(&self) -> PathBuf {
        self.root.join("events.jsonl")
    }

    /// The failures of the run and how they were met.
    pub fn failures(&self) -> PathBuf {
        self.root.join("failures.jsonl")
    }

    /// The folder of the `TensorBoard` files.
    pub fn tensorboard(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// The log of one worker slot.
    pub fn log(&self, worker: u32) -> PathBuf {
        self.root.join("logs").join(format!("worker-{worker}.log"))
    }

    /// Which process fills a slot.
    pub fn process(&self, worker: u32) -> PathBuf {
        self.processes().join(format!("worker-{worker}.json"))
    }

    /// The folder of the process files.
    pub fn processes(&self) -> PathBuf {
        self.root.join("processes")
    }

    /// The stacks of a process that hung.
    pub fn dump(&self, worker: u32, process_id: u32) -> PathBuf {
        self.root.join("dumps").join(format!("worker-{worker}-{process_id}.txt"))
    }

    /// The folder of the checkpoints, where the recipe names no other place.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The folders that every run has.
    pub fn folders(&self) -> Vec<PathBuf> {
        ["tensorboard", "logs", "processes", "dumps"].into_iter().map(|name| self.root.join(name)).collect()
    }
}
