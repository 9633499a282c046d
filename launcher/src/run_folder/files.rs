//! Files of a run folder that appear whole or not at all.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use cloze_recipes::failure::{Failure, FailureKind};

/// Rights of a file that everybody may read, less what the process's mask takes away.
pub(crate) const READABLE: u32 = 0o666;

/// Rights of a file that holds a secret.
pub(crate) const SECRET: u32 = 0o600;

/// Writes a file so that it appears whole or not at all, with these rights from its first byte on.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let temporary = path.with_extension("partial");
    let written = remove_if_there(&temporary).and_then(|()| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    written.map_err(|error| storage("write a file", path, &error).into())
}

/// Removes a file; one that is not there is as good as removed.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// A failure of the run folder's disk.
pub(crate) fn storage(operation: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new(FailureKind::Storage, format!("failed to {operation}"))
        .at(path.display())
        .because(error)
        .hint("is the disk full, or the folder not yours to write?")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_keeps_its_secret() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.json");
        // What a controller that died while writing left behind, readable for all.
        fs::write(folder.path().join("control.partial"), "torn").unwrap();
        for text in ["one", "two"] {
            write_whole(&path, text.as_bytes(), SECRET).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        remove_if_there(&path).unwrap();
        remove_if_there(&path).unwrap();
        assert!(!path.exists());
    }
}
