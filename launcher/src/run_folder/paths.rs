//! Where the files of a run folder are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cloze_recipes::failure::{Failure, FailureKind};

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

    /// The files of a folder that is there, under the one name that every program on this host calls it by: absolute and without
    /// links. Fails with kind `Input` when there is no such folder.
    pub fn find(folder: &Path) -> Result<Self, Failure> {
        let found = fs::canonicalize(folder)
            .and_then(|path| if path.is_dir() { Ok(path) } else { Err(io::Error::from(io::ErrorKind::NotADirectory)) });
        found.map(Self::new).map_err(|error| no_run(folder, &error))
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

    /// What `cloze join` on another host says, where the controller started it. The name is of a host, which may hold what no file
    /// name does.
    pub fn host_log(&self, host: &str) -> PathBuf {
        let plain: String =
            host.chars().map(|letter| if letter.is_ascii_alphanumeric() || ".-".contains(letter) { letter } else { '_' }).collect();
        self.root.join("logs").join(format!("host-{plain}.log"))
    }

    /// Held by the `cloze join` that fills a slot.
    pub fn slot_lock(&self, worker: u32) -> PathBuf {
        self.processes().join(format!("worker-{worker}.lock"))
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

/// The failure of whoever looks for a run where there is none.
pub(super) fn no_run(place: &Path, error: &io::Error) -> Failure {
    Failure::new(FailureKind::Input, "this folder holds no run")
        .at(place.display())
        .because(error)
        .hint("`cloze train RECIPE` starts a run and names its folder")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_name() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        let (run, link) = (root.join("run"), root.join("link"));
        fs::create_dir_all(run.join("logs")).unwrap();
        std::os::unix::fs::symlink(&run, &link).unwrap();
        for name in [run.clone(), root.join("run/"), link.clone(), root.join("link/"), run.join("logs").join("..")] {
            let found = RunPaths::find(&name).unwrap();
            // As text, since paths are compared by their parts.
            assert_eq!(found.root().as_os_str(), run.as_os_str(), "{}", name.display());
        }
        let failure = RunPaths::find(&root.join("nowhere")).unwrap_err();
        assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Input, "this folder holds no run"));
    }
}
