//! Stores one large object whose content lies in several pieces of memory: without putting them together, hashed on another thread
//! meanwhile, and given up at a deadline.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use bytes::Bytes;
use cloze_recipes::failure::{Failure, FailureKind};
use futures::stream::{self, StreamExt, TryStreamExt};
use object_store::path::Path as ObjectPath;
use object_store::{PutMultipartOptions, PutOptions, PutPayload};
use tokio::time::{sleep, timeout, timeout_at};

use super::Store;
use super::calls::block_on;
use super::failure::explain;

/// Objects are uploaded in parts of this size, in bytes, and smaller ones in one request; stores want at least 5 MiB.
const PART_BYTES: usize = 16 << 20;
/// Most parts of one object: stores take 10 000. Larger objects have larger parts.
const PARTS_MAX: usize = 9_000;
/// Parts of one object under way at a time: 64 MiB, enough to fill a fast link while single requests wait.
const PARTS_IN_FLIGHT: usize = 4;
/// An object is sent from the start at most this often. Single requests are repeated by the store's client; but an upload whose last
/// answer was lost cannot be resumed.
const ATTEMPTS_MAX: u32 = 3;
/// Wait before an object is sent again, in milliseconds, times the attempt.
const RETRY_WAIT_MS: u64 = 200;
/// Longest time to withdraw an upload that failed.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);
/// A file is written in chunks of this many bytes, so that a slow disk is noticed between two of them.
const CHUNK_BYTES: usize = 16 << 20;
/// How a file that is still being written is told from others; the name begins with a dot.
const PARTIAL_SUFFIX: &str = ".partial";

/// What was stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3 hash of the content, 64 hexadecimal digits.
    pub blake3: String,
}

/// Why an object was not stored.
enum UploadError {
    Store(object_store::Error),
    TooSlow,
}

impl From<object_store::Error> for UploadError {
    fn from(error: object_store::Error) -> Self {
        Self::Store(error)
    }
}

impl From<io::Error> for UploadError {
    fn from(error: io::Error) -> Self {
        Self::Store(object_store::Error::Generic { store: "file system", source: Box::new(error) })
    }
}

/// Writes an object made of `pieces`, one after another; it appears whole or not at all. An object that was there is replaced.
///
/// Fails when it is not stored before `deadline`, and when the store fails for longer than its retries.
pub fn put_pieces(store: &Store, key: &str, pieces: &[Bytes], deadline: Instant) -> anyhow::Result<Written> {
    let hash = thread::scope(|scope| {
        let hasher = thread::Builder::new().name("cloze-hash".to_owned()).spawn_scoped(scope, || hash(pieces));
        let hasher = hasher.context("start a thread to hash an object")?;
        let stored = if store.is_local() { put_file(store, key, pieces, deadline) } else { put_object(store, key, pieces, deadline) };
        let hash = hasher.join().map_err(|_| anyhow!("hashing {key} panicked"))?;
        stored.map(|()| hash)
    })?;
    Ok(Written { size: length(pieces) as u64, blake3: hash.to_hex().to_string() })
}

/// Removes what interrupted writes have left in a folder of this machine; a bucket has nothing of the kind that could be seen.
///
/// Nobody may be writing there. A folder that is not there holds nothing.
pub fn remove_leftovers(store: &Store, folder: &str) -> anyhow::Result<()> {
    if !store.is_local() {
        return Ok(());
    }
    let path = PathBuf::from(store.url(folder));
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context(format!("look for leftovers in {}", path.display())),
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("look for leftovers in {}", path.display()))?;
        if is_leftover(&entry.file_name()) {
            fs::remove_file(entry.path()).with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn hash(pieces: &[Bytes]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for piece in pieces {
        hasher.update(piece);
    }
    hasher.finalize()
}

fn length(pieces: &[Bytes]) -> usize {
    pieces.iter().map(Bytes::len).sum()
}

fn put_file(store: &Store, key: &str, pieces: &[Bytes], deadline: Instant) -> anyhow::Result<()> {
    // Refuses a key that leaves the folder.
    store.path(key)?;
    let started = Instant::now();
    let path = PathBuf::from(store.url(key));
    let partial = partial_name(&path);
    let written = write_file(&partial, pieces, deadline).and_then(|()| publish(&partial, &path).map_err(UploadError::from));
    written.map_err(|error| {
        // What is left of the attempt is of no use; the first error is the one to report.
        drop(fs::remove_file(&partial));
        told(store, key, started, &error).into()
    })
}

fn write_file(path: &Path, pieces: &[Bytes], deadline: Instant) -> Result<(), UploadError> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut file = File::create(path)?;
    for chunk in pieces.iter().flat_map(|piece| piece.chunks(CHUNK_BYTES)) {
        if Instant::now() >= deadline {
            return Err(UploadError::TooSlow);
        }
        file.write_all(chunk)?;
    }
    Ok(file.sync_all()?)
}

/// Gives a finished file its name. A rename is durable once the folder is, and a new folder once the one around it is.
fn publish(partial: &Path, path: &Path) -> io::Result<()> {
    fs::rename(partial, path)?;
    for folder in path.ancestors().skip(1).take(2).filter(|folder| !folder.as_os_str().is_empty()) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// A hidden name in the same folder; the process id keeps two writers of the same file apart.
fn partial_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}{PARTIAL_SUFFIX}", std::process::id()))
}

/// Whether a name is one of [`partial_name`], or one under which the store's client writes: `#` and digits at the end.
fn is_leftover(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let is_staged = name.rsplit_once('#').is_some_and(|(_, digits)| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()));
    is_staged || (name.starts_with('.') && name.ends_with(PARTIAL_SUFFIX))
}

fn put_object(store: &Store, key: &str, pieces: &[Bytes], deadline: Instant) -> anyhow::Result<()> {
    let path = store.path(key)?;
    let started = Instant::now();
    block_on(send_repeatedly(store, &path, pieces, deadline.into()))?.map_err(|error| told(store, key, started, &error).into())
}

async fn send_repeatedly(store: &Store, path: &ObjectPath, pieces: &[Bytes], deadline: tokio::time::Instant) -> Result<(), UploadError> {
    let mut attempt = 1;
    loop {
        match send(store, path, pieces, deadline).await {
            Err(UploadError::Store(error)) if attempt < ATTEMPTS_MAX && may_pass(&error) => {
                let wait = Duration::from_millis(RETRY_WAIT_MS * u64::from(attempt));
                timeout_at(deadline, sleep(wait)).await.map_err(|_| UploadError::Store(error))?;
                attempt += 1;
            }
            result => return result,
        }
    }
}

/// A refusal does not pass; an outage or a lost answer may.
fn may_pass(error: &object_store::Error) -> bool {
    use object_store::Error as StoreError;
    !matches!(
        error,
        StoreError::PermissionDenied { .. }
            | StoreError::Unauthenticated { .. }
            | StoreError::NotImplemented { .. }
            | StoreError::NotSupported { .. }
    )
}

async fn send(store: &Store, path: &ObjectPath, pieces: &[Bytes], deadline: tokio::time::Instant) -> Result<(), UploadError> {
    let object_store = store.object_store.as_ref();
    let total = length(pieces);
    if total <= PART_BYTES {
        let payload: PutPayload = pieces.iter().cloned().collect();
        return in_time(deadline, object_store.put_opts(path, payload, PutOptions::default())).await.map(|_| ());
    }
    let mut upload = in_time(deadline, object_store.put_multipart_opts(path, PutMultipartOptions::default())).await?;
    let parts = split(pieces, PART_BYTES.max(total.div_ceil(PARTS_MAX)));
    let sends: Vec<_> = parts.into_iter().map(|part| upload.put_part(part)).collect();
    let sent = stream::iter(sends).buffer_unordered(PARTS_IN_FLIGHT).try_for_each(|()| std::future::ready(Ok(())));
    let result = match in_time(deadline, sent).await {
        Ok(()) => in_time(deadline, upload.complete()).await.map(|_| ()),
        Err(error) => Err(error),
    };
    if result.is_err() {
        // The first error says more than one of the clean-up; leftover parts are invisible and expire by the bucket's rules.
        drop(timeout(ABORT_TIMEOUT, upload.abort()).await);
    }
    result
}

async fn in_time<T>(deadline: tokio::time::Instant, request: impl Future<Output = object_store::Result<T>>) -> Result<T, UploadError> {
    match timeout_at(deadline, request).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(UploadError::TooSlow),
    }
}

/// Cuts pieces into parts of equal size, the last one shorter, without copying.
fn split(pieces: &[Bytes], part_bytes: usize) -> Vec<PutPayload> {
    let (mut parts, mut part, mut room) = (Vec::new(), Vec::new(), part_bytes);
    for piece in pieces {
        let mut rest = piece.clone();
        while !rest.is_empty() {
            let slice = rest.split_to(rest.len().min(room));
            room -= slice.len();
            part.push(slice);
            if room == 0 {
                parts.push(std::mem::take(&mut part).into_iter().collect());
                room = part_bytes;
            }
        }
    }
    if !part.is_empty() {
        parts.push(part.into_iter().collect());
    }
    parts
}

fn told(store: &Store, key: &str, started: Instant, error: &UploadError) -> Failure {
    match error {
        UploadError::Store(error) => explain(store, "write object", key, started, error),
        UploadError::TooSlow => Failure::new(FailureKind::Storage, "failed to write object: it took too long")
            .at(store.url(key))
            .found(format!("not stored after {:.1} s", started.elapsed().as_secs_f64()))
            .hint("a faster store or a longer time limit (`checkpoint.upload_timeout_s`) helps"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use object_store::memory::InMemory;

    use super::super::{list, open, read_all};
    use super::*;

    /// Longer than any test takes.
    fn soon() -> Instant {
        Instant::now() + Duration::from_mins(5)
    }

    fn stores(folder: &tempfile::TempDir) -> [Store; 2] {
        let memory = Store::over(Arc::new(InMemory::new()), ObjectPath::from("p"), "memory:///p");
        [open(&folder.path().display().to_string(), &BTreeMap::new()).unwrap(), memory]
    }

    #[test]
    fn pieces_become_one_object_with_its_hash() {
        let folder = tempfile::tempdir().unwrap();
        let large: Vec<u8> = (0..2 * PART_BYTES + 77).map(|index| (index / 7) as u8).collect();
        let large = Bytes::from(large);
        for store in stores(&folder) {
            let cases = [
                vec![],
                vec![Bytes::new(), Bytes::from_static(b"one"), Bytes::from_static(b"two")],
                vec![large.slice(..100), large.slice(100..PART_BYTES + 3), large.slice(PART_BYTES + 3..)],
            ];
            for pieces in cases {
                let written = put_pieces(&store, "deep/er/object", &pieces, soon()).unwrap();
                let whole = pieces.concat();
                assert_eq!(written, Written { size: whole.len() as u64, blake3: blake3::hash(&whole).to_hex().to_string() });
                assert!(read_all(&store, "deep/er/object", written.size).unwrap() == whole, "{}", store.display_url);
            }
            assert_eq!(list(&store).unwrap().len(), 1);
        }
        assert_eq!(fs::read_dir(folder.path().join("deep/er")).unwrap().count(), 1);
    }

    #[test]
    fn nothing_is_stored_after_the_deadline() {
        let folder = tempfile::tempdir().unwrap();
        let pieces = [Bytes::from(vec![1; PART_BYTES + 1])];
        // A store in memory answers at once, so only the folder can be too late for certain.
        let store = &stores(&folder)[0];
        let failure = put_pieces(store, "late", &pieces, Instant::now()).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.what, "failed to write object: it took too long");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_a_storage_failure() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "").unwrap();
        let store = &stores(&folder)[0];
        let failure = put_pieces(store, "file/object", &[Bytes::from_static(b"x")], soon()).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.kind, FailureKind::Storage);
        assert!(put_pieces(store, "../object", &[], soon()).is_err());
    }

    #[test]
    fn parts_have_one_size_and_keep_the_order() {
        let pieces = [Bytes::from_static(b"abc"), Bytes::new(), Bytes::from_static(b"defgh"), Bytes::from_static(b"i")];
        for (part_bytes, expected) in [(4, vec!["abcd", "efgh", "i"]), (3, vec!["abc", "def", "ghi"]), (100, vec!["abcdefghi"])] {
            let parts: Vec<Bytes> = split(&pieces, part_bytes).into_iter().map(Bytes::from).collect();
            assert_eq!(parts, expected, "{part_bytes}");
        }
    }

    #[test]
    fn leftovers_go_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let store = &stores(&folder)[0];
        fs::create_dir(folder.path().join("step")).unwrap();
        let stay = ["manifest.json", "a#b", ".hidden", "model.partial", "#"];
        for name in stay.iter().chain(&[".model.1234.partial", "manifest.json#1", "manifest.json#27"]) {
            fs::write(folder.path().join("step").join(name), "").unwrap();
        }
        remove_leftovers(store, "step").unwrap();
        remove_leftovers(store, "none").unwrap();
        let mut left: Vec<_> =
            fs::read_dir(folder.path().join("step")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        let mut stay = stay.map(str::to_owned).to_vec();
        stay.sort();
        assert_eq!(left, stay);
        assert!(is_leftover(partial_name(Path::new("/a/b")).file_name().unwrap()));
    }
}
