//! Finds out whether a store honours a write on the condition that there is no such object.

use std::fs::File;
use std::io::Read as _;
use std::time::Instant;

use anyhow::Context;
use bytes::Bytes;

use super::Store;
use super::calls::{create, delete};
use super::failure::{causes, explain};

/// Random bytes in the name of the object that is tried: 128 bits, so that no two programs try the same one.
const NAME_BYTES: usize = 16;
/// The system's error for an operation that a file system does not have, such as a hard link: `EPERM`.
const NOT_PERMITTED: i32 = 1;

/// What a store does with a write on the condition that there is no such object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConditionalPut {
    /// The second write is refused.
    Honoured,
    /// The second write succeeds as if there were no condition.
    Ignored,
    /// The store has no such write.
    Unsupported,
}

/// Writes a small object under a fresh name twice, both times on the condition that there is none, and deletes it again.
pub fn probe_conditional_put(store: &Store) -> anyhow::Result<ConditionalPut> {
    // Nothing else may lie below the name of an object: some stores take such a name for a folder.
    let key = format!("probe-{}", fresh_name()?);
    let found = create_twice(store, &key);
    let deleted = delete(store, &key);
    let found = found?;
    deleted?;
    Ok(found)
}

fn create_twice(store: &Store, key: &str) -> anyhow::Result<ConditionalPut> {
    let path = store.path(key)?;
    for _ in 0..2 {
        let started = Instant::now();
        match create(store, &path, Bytes::from_static(b"probe"))? {
            Ok(true) => {}
            // Refused at once: a repeated request has met its own object, which proves as much.
            Ok(false) => return Ok(ConditionalPut::Honoured),
            Err(error) if is_unsupported(store, &error) => return Ok(ConditionalPut::Unsupported),
            Err(error) => return Err(explain(store, "try a conditional write", key, started, &error).into()),
        }
    }
    Ok(ConditionalPut::Ignored)
}

fn is_unsupported(store: &Store, error: &object_store::Error) -> bool {
    if matches!(error, object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. }) {
        return true;
    }
    if !store.is_local() {
        return causes(error).any(|cause| cause.to_string().contains("501 Not Implemented"));
    }
    // A conditional write of a file is a hard link, which not every file system has.
    causes(error)
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|error| error.kind() == std::io::ErrorKind::Unsupported || error.raw_os_error() == Some(NOT_PERMITTED))
}

fn fresh_name() -> anyhow::Result<String> {
    let mut bytes = [0; NAME_BYTES];
    File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut bytes)).context("read /dev/urandom for a fresh name")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fmt;
    use std::pin::Pin;
    use std::sync::Arc;

    use futures::stream::BoxStream;
    use object_store::memory::InMemory;
    use object_store::path::Path;
    use object_store::{
        CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions,
        PutPayload, PutResult, Result,
    };

    use super::super::list;
    use super::*;

    /// A store that takes the condition of a write and ignores it, or has no such write.
    #[derive(Debug)]
    struct Careless {
        inner: InMemory,
        ignores: bool,
    }

    impl fmt::Display for Careless {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "Careless")
        }
    }

    type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

    impl ObjectStore for Careless {
        fn put_opts<'life0, 'life1, 'async_trait>(
            &'life0 self,
            location: &'life1 Path,
            payload: PutPayload,
            options: PutOptions,
        ) -> Answer<'async_trait, PutResult>
        where
            'life0: 'async_trait,
            'life1: 'async_trait,
            Self: 'async_trait,
        {
            if options.mode == PutMode::Create && !self.ignores {
                let error = object_store::Error::NotImplemented { operation: "create".to_owned(), implementer: self.to_string() };
                return Box::pin(std::future::ready(Err(error)));
            }
            self.inner.put_opts(location, payload, PutMode::Overwrite.into())
        }

        fn put_multipart_opts<'life0, 'life1, 'async_trait>(
            &'life0 self,
            location: &'life1 Path,
            options: PutMultipartOptions,
        ) -> Answer<'async_trait, Box<dyn MultipartUpload>>
        where
            'life0: 'async_trait,
            'life1: 'async_trait,
            Self: 'async_trait,
        {
            self.inner.put_multipart_opts(location, options)
        }

        fn get_opts<'life0, 'life1, 'async_trait>(
            &'life0 self,
            location: &'life1 Path,
            options: GetOptions,
        ) -> Answer<'async_trait, GetResult>
        where
            'life0: 'async_trait,
            'life1: 'async_trait,
            Self: 'async_trait,
        {
            self.inner.get_opts(location, options)
        }

        fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
            self.inner.delete_stream(locations)
        }

        fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
            self.inner.list(prefix)
        }

        fn list_with_delimiter<'life0, 'life1, 'async_trait>(&'life0 self, prefix: Option<&'life1 Path>) -> Answer<'async_trait, ListResult>
        where
            'life0: 'async_trait,
            'life1: 'async_trait,
            Self: 'async_trait,
        {
            self.inner.list_with_delimiter(prefix)
        }

        fn copy_opts<'life0, 'life1, 'life2, 'async_trait>(
            &'life0 self,
            from: &'life1 Path,
            to: &'life2 Path,
            options: CopyOptions,
        ) -> Answer<'async_trait, ()>
        where
            'life0: 'async_trait,
            'life1: 'async_trait,
            'life2: 'async_trait,
            Self: 'async_trait,
        {
            self.inner.copy_opts(from, to, options)
        }
    }

    #[test]
    fn a_store_is_told_by_what_it_does() {
        let folder = tempfile::tempdir().unwrap();
        let over = |object_store: Arc<dyn ObjectStore>| Store::over(object_store, Path::from("a/prefix"), "memory:///a/prefix");
        let careless = |ignores| over(Arc::new(Careless { inner: InMemory::new(), ignores }));
        let cases = [
            (super::super::open(&folder.path().join("new").display().to_string(), &BTreeMap::new()).unwrap(), ConditionalPut::Honoured),
            (over(Arc::new(InMemory::new())), ConditionalPut::Honoured),
            (careless(true), ConditionalPut::Ignored),
            (careless(false), ConditionalPut::Unsupported),
        ];
        for (store, expected) in cases {
            assert_eq!(probe_conditional_put(&store).unwrap(), expected, "{}", store.display_url);
            assert!(list(&store).unwrap().is_empty(), "the probe leaves nothing behind");
        }
    }
}
