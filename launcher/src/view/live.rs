//! Whether a run has a live controller.

use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::Path;

/// Whether some process holds the lock of this run folder. Nothing is written, and the shared lock that finds it out is held for
/// an instant only; a folder without a lock file was never controlled.
pub fn controller_lives(run: &Path) -> io::Result<bool> {
    let file = match File::open(run.join("lock")) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match file.try_lock_shared() {
        Ok(()) => file.unlock().map(|()| false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_seen_and_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!controller_lives(folder.path()).unwrap());
        let controller = File::create(folder.path().join("lock")).unwrap();
        assert!(!controller_lives(folder.path()).unwrap());
        controller.try_lock().expect("looking leaves no lock behind");
        assert!(controller_lives(folder.path()).unwrap());
        drop(controller);
        assert!(!controller_lives(folder.path()).unwrap());
    }
}
