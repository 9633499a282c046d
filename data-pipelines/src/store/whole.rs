//! Whole objects, hashed while they are read.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt as _;
use std::sync::PoisonError;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Instant;

use bytes::Bytes;
use cloze_recipes::failure::{Failure, FailureKind};

use super::calls::{ObjectInfo, head};
use super::failure::explain;
use super::{ObjectReader, Store};

/// Objects of a bucket are read in pieces of this many bytes, one ahead.
const PIECE_BYTES: u64 = 8 << 20;
/// Files are handed from reading to hashing in chunks of this many bytes, which are still in the processor's cache then.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks that may wait to be hashed.
const CHUNKS_AHEAD: usize = 4;

/// Reads a whole object. Fails when it is missing or larger than `max_bytes`.
pub fn read_all(store: &Store, key: &str, max_bytes: u64) -> anyhow::Result<Bytes> {
    Ok(read_hashed(store, key, max_bytes)?.0)
}

/// Reads a whole object and hashes it meanwhile: its content and its BLAKE3 hash in hexadecimal digits. Fails like [`read_all`].
pub fn read_hashed(store: &Store, key: &str, max_bytes: u64) -> anyhow::Result<(Bytes, String)> {
    let info = head(store, key)?;
    if info.size > max_bytes {
        return Err(Failure::new(FailureKind::Input, "object is too large")
            .at(store.url(key))
            .expected(format!("at most {max_bytes} bytes"))
            .found(format!("{} bytes", info.size))
            .into());
    }
    let (content, hash) = if store.is_local() { read_file(store, &info)? } else { read_object(store, &info)? };
    Ok((content.into(), hash.to_hex().to_string()))
}

/// The store's client would copy a file twice on its way through a pool of threads, which takes as long as the reading.
///
/// A file that is written to or replaced meanwhile is a storage failure, as it is with the client: a torn content would have a hash like
/// any other.
fn read_file(store: &Store, info: &ObjectInfo) -> anyhow::Result<(Vec<u8>, blake3::Hash)> {
    // Refuses a key that leaves the folder.
    store.path(&info.key)?;
    let url = store.url(&info.key);
    let started = Instant::now();
    let read = || -> io::Result<Option<(Vec<u8>, blake3::Hash)>> {
        let file = File::open(&url)?;
        let (content, hash) = fill(&file, info.size)?;
        let is_as_told = content.len() as u64 == info.size && is_version(&file.metadata()?, info);
        Ok(is_as_told.then_some((content, hash)))
    };
    let failed = |error: &object_store::Error| explain(store, "read object", &info.key, started, error);
    match read() {
        Ok(Some(read)) => Ok(read),
        Ok(None) => Err(failed(&changed(&url)).into()),
        Err(error) => Err(failed(&as_store_error(error, &url)).into()),
    }
}

/// Whether a file is still the version that the store has told of.
fn is_version(metadata: &Metadata, info: &ObjectInfo) -> bool {
    let last_modified_us = metadata.mtime() * 1_000_000 + metadata.mtime_nsec() / 1_000;
    (metadata.len(), last_modified_us) == (info.size, info.last_modified_us)
}

fn changed(path: &str) -> object_store::Error {
    object_store::Error::Precondition { path: path.to_owned(), source: "its size or the time of its last change is another one".into() }
}

/// At most `num_bytes` bytes from the beginning of a file, and their hash, which another thread computes just behind the reading.
fn fill(mut file: &File, num_bytes: u64) -> io::Result<(Vec<u8>, blake3::Hash)> {
    // Zeroed memory of this size comes from the system untouched, so this costs nothing.
    let mut content = vec![0; num_bytes as usize];
    let (num_read, hash) = thread::scope(|scope| {
        let (read, to_hash) = mpsc::sync_channel(CHUNKS_AHEAD);
        let hasher = thread::Builder::new().name("cloze-hash".to_owned()).spawn_scoped(scope, || hash(to_hash))?;
        let mut num_read = 0;
        for chunk in content.chunks_mut(CHUNK_BYTES) {
            let length = read_up_to(&mut file, chunk)?;
            num_read += length;
            // The hasher stops before the last chunk only where it panics, which the join below tells.
            let _ = read.send(&chunk[..length]);
            if length < chunk.len() {
                break;
            }
        }
        drop(read);
        let hash = hasher.join().map_err(|_| io::Error::other("the thread that hashes a file panicked"))?;
        io::Result::Ok((num_read, hash))
    })?;
    content.truncate(num_read);
    Ok((content, hash))
}

fn hash(chunks: Receiver<&[u8]>) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for chunk in chunks {
        hasher.update(chunk);
    }
    hasher.finalize()
}

/// Fills `chunk`, or as much of it as there is.
fn read_up_to(file: &mut impl Read, chunk: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < chunk.len() {
        match file.read(&mut chunk[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

fn as_store_error(error: io::Error, path: &str) -> object_store::Error {
    if error.kind() == io::ErrorKind::NotFound {
        return object_store::Error::NotFound { path: path.to_owned(), source: Box::new(error) };
    }
    object_store::Error::Generic { store: "file system", source: Box::new(error) }
}

fn read_object(store: &Store, info: &ObjectInfo) -> anyhow::Result<(Vec<u8>, blake3::Hash)> {
    let mut content = Vec::with_capacity(info.size as usize);
    let mut reader = ObjectReader::new(store, info, PIECE_BYTES)?;
    let digest = reader.digest();
    reader.read_to_end(&mut content).map_err(|error| ObjectReader::failure(error, &store.url(&info.key)))?;
    let hash = digest.lock().unwrap_or_else(PoisonError::into_inner).finalize();
    Ok((content, hash))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::{open, put};
    use super::*;

    fn local(folder: &tempfile::TempDir) -> Store {
        open(&folder.path().display().to_string(), &BTreeMap::new()).unwrap()
    }

    #[test]
    fn files_of_any_length_come_whole_with_their_hash() {
        let folder = tempfile::tempdir().unwrap();
        let store = local(&folder);
        for num_bytes in [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7] {
            let content: Vec<u8> = (0..num_bytes).map(|place| (place / 5) as u8).collect();
            put(&store, "deep/file", content.clone()).unwrap();
            let (read, hash) = read_hashed(&store, "deep/file", num_bytes as u64).unwrap();
            assert!(read == content, "{num_bytes}");
            assert_eq!(hash, blake3::hash(&content).to_hex().to_string(), "{num_bytes}");
        }
    }

    #[test]
    fn missing_and_oversized_objects_are_input_failures() {
        let folder = tempfile::tempdir().unwrap();
        let store = local(&folder);
        put(&store, "a", b"123".to_vec()).unwrap();
        for (key, max_bytes, what) in [("a", 2, "object is too large"), ("none", 9, "failed to look up object: no such file")] {
            let failure = read_all(&store, key, max_bytes).unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!(failure.kind, FailureKind::Input);
            assert_eq!(failure.what, what);
        }
    }

    #[test]
    fn a_file_that_changes_after_it_was_looked_up_is_a_storage_failure() {
        let folder = tempfile::tempdir().unwrap();
        let store = local(&folder);
        put(&store, "file", vec![1; 100]).unwrap();
        let info = head(&store, "file").unwrap();
        let earlier = ObjectInfo { last_modified_us: info.last_modified_us - 1, ..info.clone() };
        let failed = |info: &ObjectInfo| read_file(&store, info).unwrap_err().downcast::<Failure>().unwrap();
        for stale in [ObjectInfo { size: 160, ..info.clone() }, ObjectInfo { size: 60, ..info.clone() }, earlier] {
            let failure = failed(&stale);
            assert_eq!(
                (failure.kind, failure.what.as_str()),
                (FailureKind::Storage, "failed to read object: the object changed meanwhile")
            );
        }
        assert_eq!(read_file(&store, &info).unwrap().0, vec![1; 100]);
        // A file may be older than 1970, as archives leave them.
        let old = std::time::UNIX_EPOCH - std::time::Duration::from_micros(1_500_001);
        File::options().write(true).open(folder.path().join("file")).unwrap().set_modified(old).unwrap();
        assert_eq!(read_all(&store, "file", 100).unwrap(), vec![1; 100]);
        std::fs::remove_file(folder.path().join("file")).unwrap();
        let failure = failed(&info);
        assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Input, "failed to read object: no such file"));
        assert!(read_file(&store, &ObjectInfo { key: "../file".to_owned(), ..info }).is_err());
    }
}
