//! Files that appear whole: written under a temporary name, flushed to the disk, then renamed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cloze_recipes::failure::{Failure, FailureKind};

/// Writes `bytes` so that a reader sees the old file or the new one and nothing between.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let temporary = temporary(path);
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        disk_failure("write file", path, &error)
    })?;
    publish(&temporary, path)
}

/// Renames a finished temporary file to its final name and makes the rename durable.
pub(crate) fn publish(temporary: &Path, path: &Path) -> Result<(), Failure> {
    fs::rename(temporary, path).map_err(|error| disk_failure("rename finished file", path, &error))?;
    if let Some(folder) = path.parent() {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| disk_failure("flush folder", folder, &error))?;
    }
    Ok(())
}

/// The name under which a file is written: beside the final one, so that the rename stays on one file system.
pub(crate) fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    PathBuf::from(name)
}

/// Creates a folder and its parents.
pub(crate) fn create_folder(path: &Path) -> Result<(), Failure> {
    fs::create_dir_all(path).map_err(|error| disk_failure("create folder", path, &error))
}

/// What a user is told when the local disk refuses; `operation` is a verb phrase such as "write shard".
pub(crate) fn disk_failure(operation: &str, path: &Path, error: &io::Error) -> Failure {
    let hint = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            "free space on that disk, or set `data.output` to a larger one; finished work is kept and the same command goes on"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "check the owner and the permissions of that path",
        io::ErrorKind::NotFound => "check that the path exists and was not removed by another program",
        _ => "check the disk, then run the same command again",
    };
    Failure::new(FailureKind::Storage, format!("failed to {operation}")).at(path.display()).because(error).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_replaces_the_old_one_and_leaves_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_whole(&path, b"one").unwrap();
        write_whole(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_folder_is_a_storage_failure_that_names_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let failure = write_whole(&folder.path().join("none/a.json"), b"one").unwrap_err();
        assert_eq!(failure.kind, FailureKind::Storage);
        assert!(failure.place.unwrap().ends_with("none/a.json"));
    }

    #[test]
    fn a_full_disk_says_so_and_what_to_do() {
        let error = io::Error::new(io::ErrorKind::StorageFull, "no space left on device");
        let failure = disk_failure("write shard", Path::new("/data/shard-00000.arrow"), &error);
        assert_eq!(failure.what, "failed to write shard");
        assert!(failure.hint.unwrap().contains("free space"));
    }
}
