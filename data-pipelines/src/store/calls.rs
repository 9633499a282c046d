//! Blocking calls on a store.

use std::ops::Range;
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::Context;
use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, ObjectMeta, ObjectStoreExt, PutMode, PutPayload};
use tokio::runtime::{Builder, Runtime};

use super::Store;
use super::failure::explain;

/// Threads of the runtime that waits for sockets; the work itself happens elsewhere.
const RUNTIME_THREADS: usize = 2;

/// What a store says about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Key below the store's prefix; empty when the prefix itself is the object.
    pub key: String,
    /// Size in bytes.
    pub size: u64,
    /// Entity tag, where the store has one.
    pub etag: Option<String>,
    /// Time of the last change, in microseconds since 1970.
    pub last_modified_us: i64,
}

/// Runs a future on the shared small runtime and waits for it. Must not be called from inside async code.
pub fn block_on<F: Future>(future: F) -> anyhow::Result<F::Output> {
    Ok(runtime()?.block_on(future))
}

/// Reads a part of an object; shorter where the object ends. Fails when it is missing or ends before the range begins.
pub fn read_range(store: &Store, key: &str, range: Range<u64>) -> anyhow::Result<Bytes> {
    let path = store.path(key)?;
    let started = Instant::now();
    let read = async { store.object_store.get_opts(&path, GetOptions::new().with_range(Some(range))).await?.bytes().await };
    Ok(block_on(read)?.map_err(|error| explain(store, "read object", key, started, &error))?)
}

/// Writes an object; it appears whole or not at all. Missing folders are created.
pub fn put(store: &Store, key: &str, content: impl Into<Bytes>) -> anyhow::Result<()> {
    let path = store.path(key)?;
    let started = Instant::now();
    block_on(store.object_store.put(&path, PutPayload::from(content.into())))?
        .map_err(|error| explain(store, "write object", key, started, &error))?;
    Ok(())
}

/// Writes an object where there is none: true when it was written, false when there was one, which stays as it is.
///
/// Some stores take the condition and ignore it; [`super::probe_conditional_put`] finds out.
pub fn put_if_absent(store: &Store, key: &str, content: impl Into<Bytes>) -> anyhow::Result<bool> {
    let path = store.path(key)?;
    let started = Instant::now();
    Ok(create(store, &path, content.into())?.map_err(|error| explain(store, "write object", key, started, &error))?)
}

/// The conditional write itself, with the store's own error.
pub(super) fn create(store: &Store, path: &ObjectPath, content: Bytes) -> anyhow::Result<object_store::Result<bool>> {
    match block_on(store.object_store.put_opts(path, PutPayload::from(content), PutMode::Create.into()))? {
        Ok(_) => Ok(Ok(true)),
        Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Ok(Ok(false)),
        Err(error) => Ok(Err(error)),
    }
}

/// Everything below the prefix, sorted by key. A prefix that does not exist has nothing below it.
pub fn list(store: &Store) -> anyhow::Result<Vec<ObjectInfo>> {
    list_below(store, "")
}

/// Everything in a folder below the prefix, sorted by key; keys begin with the folder.
pub fn list_below(store: &Store, folder: &str) -> anyhow::Result<Vec<ObjectInfo>> {
    let started = Instant::now();
    let path = store.path(folder)?;
    let prefix = (!path.as_ref().is_empty()).then_some(&path);
    let found: Vec<ObjectMeta> = block_on(store.object_store.list(prefix).try_collect())?
        .map_err(|error| explain(store, "list objects", folder, started, &error))?;
    let mut found: Vec<ObjectInfo> = found.into_iter().map(|meta| info_of(store, &meta)).collect();
    found.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(found)
}

/// Size and version of one object. Fails when it is missing.
pub fn head(store: &Store, key: &str) -> anyhow::Result<ObjectInfo> {
    let path = store.path(key)?;
    let started = Instant::now();
    let result = block_on(store.object_store.get_opts(&path, GetOptions::new().with_head(true)))?;
    let meta = result.map_err(|error| explain(store, "look up object", key, started, &error))?.meta;
    Ok(ObjectInfo { key: key.to_owned(), ..info_of(store, &meta) })
}

/// Size of one object in bytes; `None` when it is missing.
pub fn size_of(store: &Store, key: &str) -> anyhow::Result<Option<u64>> {
    let path = store.path(key)?;
    let started = Instant::now();
    match block_on(store.object_store.get_opts(&path, GetOptions::new().with_head(true)))? {
        Ok(found) => Ok(Some(found.meta.size)),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(explain(store, "look up object", key, started, &error).into()),
    }
}

/// Deletes an object; one that is not there counts as deleted.
pub fn delete(store: &Store, key: &str) -> anyhow::Result<()> {
    let path = store.path(key)?;
    let started = Instant::now();
    match block_on(store.object_store.delete(&path))? {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(explain(store, "delete object", key, started, &error).into()),
    }
}

/// The runtime all stores share.
pub(super) fn runtime() -> anyhow::Result<&'static Runtime> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let built = Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .thread_name("cloze-store")
        .enable_all()
        .build()
        .context("start the object store runtime")?;
    Ok(RUNTIME.get_or_init(|| built))
}

fn info_of(store: &Store, meta: &ObjectMeta) -> ObjectInfo {
    let key = match meta.location.prefix_match(&store.prefix) {
        Some(parts) => parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/"),
        None => meta.location.to_string(),
    };
    ObjectInfo { key, size: meta.size, etag: meta.e_tag.clone(), last_modified_us: meta.last_modified.timestamp_micros() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cloze_recipes::failure::{Failure, FailureKind};

    use super::super::{read_all, read_hashed};
    use super::*;

    fn local(folder: &tempfile::TempDir) -> Store {
        super::super::open(&folder.path().display().to_string(), &BTreeMap::new()).unwrap()
    }

    #[test]
    fn what_was_put_can_be_listed_read_and_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let store = local(&folder);
        put(&store, "b/two", b"22".to_vec()).unwrap();
        put(&store, "a one", b"1".to_vec()).unwrap();
        let found = list(&store).unwrap();
        assert_eq!(found.iter().map(|info| (info.key.as_str(), info.size)).collect::<Vec<_>>(), [("a one", 1), ("b/two", 2)]);
        assert_eq!(head(&store, "b/two").unwrap(), found[1]);
        assert_eq!(read_all(&store, "b/two", 2).unwrap().as_ref(), b"22");
        delete(&store, "b/two").unwrap();
        delete(&store, "b/two").unwrap();
        assert_eq!(list(&store).unwrap().len(), 1);
    }

    #[test]
    fn an_object_is_created_once() {
        let folder = tempfile::tempdir().unwrap();
        let store = local(&folder);
        assert!(put_if_absent(&store, "a/b", b"one".to_vec()).unwrap());
        assert!(!put_if_absent(&store, "a/b", b"two".to_vec()).unwrap());
        assert_eq!(read_all(&store, "a/b", 9).unwrap().as_ref(), b"one");
        assert_eq!(std::fs::read_dir(folder.path().join("a")).unwrap().count(), 1);
    }

    #[test]
    fn sizes_ranges_folders_and_hashes() {
        let folder = tempfile::tempdir().unwrap();
        let store = local(&folder);
        put(&store, "a/one", b"12345".to_vec()).unwrap();
        put(&store, "b/two", b"2".to_vec()).unwrap();
        assert_eq!((size_of(&store, "a/one").unwrap(), size_of(&store, "a/none").unwrap()), (Some(5), None));
        assert_eq!(read_range(&store, "a/one", 1..3).unwrap().as_ref(), b"23");
        assert_eq!(read_range(&store, "a/one", 3..30).unwrap().as_ref(), b"45");
        assert_eq!(list_below(&store, "a").unwrap().iter().map(|info| info.key.as_str()).collect::<Vec<_>>(), ["a/one"]);
        assert!(list_below(&store, "none").unwrap().is_empty());
        let (content, hash) = read_hashed(&store, "a/one", 5).unwrap();
        assert_eq!(hash, blake3::hash(&content).to_hex().to_string());
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
        assert!(list(&super::super::open("/no/such/folder", &BTreeMap::new()).unwrap()).unwrap().is_empty());
    }

    #[test]
    fn a_bucket_that_refuses_the_connection_fails_within_the_retry_bound() {
        // A port that was free a moment ago refuses at once; the retries then take a few seconds at most.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let options = BTreeMap::from([
            ("endpoint".to_owned(), format!("http://127.0.0.1:{port}")),
            ("allow_http".to_owned(), "true".to_owned()),
            ("skip_signature".to_owned(), "true".to_owned()),
        ]);
        let store = super::super::open("s3://bucket/x", &options).unwrap();
        let failure = head(&store, "a").unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.kind, FailureKind::Storage);
        assert!(failure.cause.unwrap().contains(" s)"));
        assert!(failure.hint.unwrap().contains("endpoint"));
    }
}
