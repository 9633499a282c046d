//! The programs of a run, kept as they were when it was submitted: a job may start days later, when they have been built anew.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use cloze_recipes::failure::{Failure, FailureKind};
use serde::{Deserialize, Serialize};

use super::paths::JobPaths;
use crate::run_folder::storage;

/// Characters of a content hash that name a folder; 64 bits do not meet by chance.
const HASH_LENGTH: usize = 16;

/// The programs of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Programs {
    /// The command line program.
    pub cloze: PathBuf,
    /// The worker program, in the same folder.
    pub worker: PathBuf,
    /// Hash of both.
    pub hash: String,
}

impl Programs {
    /// Keeps these programs in the run's folder: as a second name of the same file where that is possible, else as a copy.
    pub fn keep(paths: &JobPaths, cloze: &Path, worker: &Path) -> anyhow::Result<Self> {
        Self::keep_in(&paths.programs(), cloze, worker)
    }

    /// As [`Programs::keep`], in any folder.
    pub fn keep_in(folder: &Path, cloze: &Path, worker: &Path) -> anyhow::Result<Self> {
        let hash = hash_of(cloze, worker)?;
        let folder = folder.join(&hash[..HASH_LENGTH]);
        fs::create_dir_all(&folder).map_err(|error| storage("create a folder", &folder, &error))?;
        let programs = Self { cloze: folder.join("cloze"), worker: folder.join("cloze-worker"), hash };
        for (from, to) in [(cloze, &programs.cloze), (worker, &programs.worker)] {
            link_or_copy(from, to).map_err(|error| storage("keep a program", to, &error))?;
        }
        programs.check()?;
        Ok(programs)
    }

    /// These programs where they are, of which others may be kept already.
    pub fn found_at(cloze: PathBuf, worker: PathBuf) -> anyhow::Result<Self> {
        let hash = hash_of(&cloze, &worker)?;
        Ok(Self { cloze, worker, hash })
    }

    /// Refuses programs that are no longer those that were kept, with kind `Mismatch`: somebody wrote into the file itself, which the
    /// run's folder shares, and did not put another one in its place.
    pub fn check(&self) -> anyhow::Result<()> {
        let found = hash_of(&self.cloze, &self.worker)?;
        if found == self.hash {
            return Ok(());
        }
        Err(Failure::new(FailureKind::Mismatch, "the programs in the run's folder were changed")
            .at(self.cloze.display())
            .expected(format!("hash {}", self.hash))
            .found(format!("hash {found}"))
            .hint("build into new files, as cargo and `install` do; `cloze resume RUN` submits the run again with the programs of today")
            .into())
    }
}

fn hash_of(cloze: &Path, worker: &Path) -> anyhow::Result<String> {
    let mut hasher = blake3::Hasher::new();
    for path in [cloze, worker] {
        let failed = |error: io::Error| {
            Failure::new(FailureKind::Environment, "a program of the run cannot be read").at(path.display()).because(error)
        };
        let length = fs::metadata(path).map_err(failed)?.len();
        hasher.update(&length.to_le_bytes());
        hasher.update_reader(File::open(path).map_err(failed)?).map_err(failed)?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn link_or_copy(from: &Path, to: &Path) -> io::Result<()> {
    let from = fs::canonicalize(from)?;
    if to.exists() {
        return Ok(());
    }
    if fs::hard_link(&from, to).is_ok() {
        return Ok(());
    }
    let partial = to.with_extension("partial");
    fs::copy(&from, &partial)?;
    fs::rename(&partial, to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_kept_by_their_content() {
        let folder = tempfile::tempdir().unwrap();
        let [cloze, worker, kept] = ["cloze", "worker", "bin"].map(|name| folder.path().join(name));
        fs::write(&cloze, "one").unwrap();
        fs::write(&worker, "two").unwrap();
        let programs = Programs::keep_in(&kept, &cloze, &worker).unwrap();
        assert_eq!(Programs::keep_in(&kept, &cloze, &worker).unwrap(), programs);
        assert_eq!(fs::read_dir(&kept).unwrap().count(), 1);
        // Another file under the old name, as a build makes it, leaves the kept one alone.
        fs::remove_file(&cloze).unwrap();
        fs::write(&cloze, "newer").unwrap();
        assert_eq!(fs::read_to_string(&programs.cloze).unwrap(), "one");
        programs.check().unwrap();
        let newer = Programs::keep_in(&kept, &cloze, &worker).unwrap();
        assert_ne!(newer.hash, programs.hash);
        assert_eq!(fs::read_dir(&kept).unwrap().count(), 2);
        // Written into, which reaches the kept one.
        fs::write(&worker, "changed").unwrap();
        let failure: Failure = programs.check().unwrap_err().downcast().unwrap();
        assert_eq!(failure.kind, FailureKind::Mismatch);
    }
}
