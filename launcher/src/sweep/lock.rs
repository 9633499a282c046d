//! Locks on files: who holds one is a live process, however it ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read as _, Seek as _, Write as _};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use cloze_cluster::host::host_name;
use cloze_recipes::failure::Failure;

use crate::run_folder::storage;

/// Longest text of a lock that is read, in bytes: a process id and a host name.
const MAX_TEXT_BYTES: u64 = 320;

/// How often a lock is tried: whoever looks whether it is held holds it for an instant.
const TRIES: u32 = 10;

/// Wait between two tries, in milliseconds.
const RETRY_MS: u64 = 10;

/// A lock that this process holds until the value is dropped.
#[derive(Debug)]
pub struct FileLock {
    _file: File,
}

/// What became of a try.
#[derive(Debug)]
pub enum Taken {
    /// The lock is ours.
    Ours(FileLock),
    /// Another live process has it: `process 7 of host`.
    Held(String),
}

impl FileLock {
    /// Tries to take a lock; the file is made where it is missing. Fails with kind `Storage` where the file cannot be written.
    pub fn take(path: &Path) -> Result<Taken, Failure> {
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = opened.map_err(|error| storage("open a lock", path, &error))?;
        for attempt in 1.. {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if attempt < TRIES => sleep(Duration::from_millis(RETRY_MS)),
                Err(TryLockError::WouldBlock) => return Ok(Taken::Held(holder_text(&mut file))),
                Err(TryLockError::Error(error)) => return Err(storage("take a lock", path, &error)),
            }
        }
        let text = format!("{} {}\n", std::process::id(), host_name());
        let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(text.as_bytes()));
        written.map_err(|error| storage("write a lock", path, &error))?;
        Ok(Taken::Ours(Self { _file: file }))
    }

    /// Who holds a lock; `None` where nobody does. Nothing is written.
    pub fn holder(path: &Path) -> Result<Option<String>, Failure> {
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(storage("open a lock", path, &error)),
        };
        match file.try_lock_shared() {
            Ok(()) => file.unlock().map(|()| None).map_err(|error| storage("release a lock", path, &error)),
            Err(TryLockError::WouldBlock) => Ok(Some(holder_text(&mut file))),
            Err(TryLockError::Error(error)) => Err(storage("look at a lock", path, &error)),
        }
    }
}

/// Who took a lock last, whether or not it is still held, and when; `None` where nobody ever has.
pub fn last_holder(path: &Path) -> Result<Option<(String, SystemTime)>, Failure> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(storage("open a lock", path, &error)),
    };
    // Whoever takes a lock writes it, and nobody else does.
    let taken = file.metadata().and_then(|found| found.modified()).map_err(|error| storage("look at a lock", path, &error))?;
    Ok(Some((holder_text(&mut file), taken)))
}

/// Process id and host that a lock names: `7 host`. `None` where it is not held, or its owner has not written yet.
pub fn holder_process(path: &Path) -> Result<Option<(u32, String)>, Failure> {
    if FileLock::holder(path)?.is_none() {
        return Ok(None);
    }
    let text = File::open(path).and_then(|mut file| read_text(&mut file)).map_err(|error| storage("read a lock", path, &error))?;
    Ok(text.split_once(' ').and_then(|(process_id, host)| Some((process_id.parse().ok()?, host.to_owned()))))
}

fn holder_text(file: &mut File) -> String {
    match read_text(file).ok().as_deref().and_then(|text| text.split_once(' ')) {
        Some((process_id, host)) => format!("process {process_id} of {host}"),
        // The owner has locked the file and not yet written who it is.
        None => "another process".to_owned(),
    }
}

fn read_text(file: &mut File) -> io::Result<String> {
    let mut text = String::new();
    file.take(MAX_TEXT_BYTES).read_to_string(&mut text)?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_lock_is_held_once_and_names_its_holder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        assert_eq!((FileLock::holder(&path).unwrap(), holder_process(&path).unwrap()), (None, None));
        let Taken::Ours(lock) = FileLock::take(&path).unwrap() else { panic!("nobody has it") };
        let holder = format!("process {} of {}", std::process::id(), host_name());
        let Taken::Held(found) = FileLock::take(&path).unwrap() else { panic!("it is held") };
        assert_eq!((&found, FileLock::holder(&path).unwrap().as_ref()), (&holder, Some(&holder)));
        assert_eq!(holder_process(&path).unwrap(), Some((std::process::id(), host_name())));
        let taken = last_holder(&path).unwrap().unwrap();
        drop(lock);
        assert_eq!((last_holder(&path).unwrap().unwrap(), taken.0.clone()), (taken, holder.clone()), "also when it is free again");
        assert_eq!(last_holder(&folder.path().join("none")).unwrap(), None);
        // A process that another test starts has the file open too, from its fork to its exec.
        let deadline = Instant::now() + Duration::from_secs(10);
        while FileLock::holder(&path).unwrap().is_some() && Instant::now() < deadline {
            sleep(Duration::from_millis(RETRY_MS));
        }
        assert_eq!(FileLock::holder(&path).unwrap(), None);
        assert!(matches!(FileLock::take(&path).unwrap(), Taken::Ours(_)));
    }
}
