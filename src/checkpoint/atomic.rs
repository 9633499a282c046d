//! Local files that appear whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cloze_recipes::failure::{Failure, FailureKind};

/// Writes a file next to its place, makes it durable and moves it there; a file that was there before is replaced.
///
/// Fails with kind storage, and then leaves nothing behind.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let temporary = temporary_name(path);
    let written = write_durably(&temporary, bytes).and_then(|()| fs::rename(&temporary, path)).and_then(|()| sync_folder(path));
    written.map_err(|error| {
        // What is left of the attempt is of no use; the first error is the one to report.
        drop(fs::remove_file(&temporary));
        Failure::new(FailureKind::Storage, "failed to write a file")
            .at(path.display())
            .because(error)
            .hint("check that its folder exists, is writable and has space left")
    })?;
    Ok(())
}

/// A hidden name in the same folder; the process id keeps two writers of the same file apart.
fn temporary_name(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}", std::process::id()));
    path.with_file_name(name)
}

fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A rename is durable once the folder is.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_nothing_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        for content in [b"one".as_slice(), b"", b"three"] {
            atomic_write(&path, content).unwrap();
            assert_eq!(fs::read(&path).unwrap(), content);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_names_the_file_and_cleans_up() {
        let dir = tempfile::tempdir().unwrap();
        let taken = dir.path().join("taken");
        fs::create_dir(&taken).unwrap();
        for path in [taken, dir.path().join("none/a.bin")] {
            let failure: Failure = atomic_write(&path, b"x").unwrap_err().downcast().unwrap();
            assert_eq!((failure.kind, failure.place), (FailureKind::Storage, Some(path.display().to_string())));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
