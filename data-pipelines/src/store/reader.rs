//! An object as a byte stream of bounded memory: it is read in ranges, one ahead.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::Context;
use bytes::Bytes;
use cloze_recipes::failure::{Failure, FailureKind};
use object_store::GetOptions;
use object_store::path::Path as ObjectPath;
use tokio::task::JoinHandle;

use super::calls::runtime;
use super::failure::{explain, shorter_than_said};
use super::{ObjectInfo, Store};

/// Reads one object from start to end; holds at most two ranges. An object that changes meanwhile is an error.
pub struct ObjectReader {
    store: Store,
    path: ObjectPath,
    info: ObjectInfo,
    range_bytes: u64,
    current: Bytes,
    ahead: Option<Request>,
    next_start: u64,
    digest: Arc<Mutex<blake3::Hasher>>,
}

struct Request {
    started: Instant,
    num_bytes: u64,
    answer: JoinHandle<object_store::Result<Bytes>>,
}

impl ObjectReader {
    /// Starts to read the object that `info` describes, in ranges of `range_bytes` bytes.
    pub fn new(store: &Store, info: &ObjectInfo, range_bytes: u64) -> anyhow::Result<Self> {
        let mut reader = Self {
            store: store.clone(),
            path: store.path(&info.key)?,
            info: info.clone(),
            range_bytes,
            current: Bytes::new(),
            ahead: None,
            next_start: 0,
            digest: Arc::default(),
        };
        reader.ahead = reader.request()?;
        Ok(reader)
    }

    /// The running blake3 hash of what was read; complete once the reader has reported the end.
    pub fn digest(&self) -> Arc<Mutex<blake3::Hasher>> {
        Arc::clone(&self.digest)
    }

    /// The failure inside an error of [`Read::read`], also when it came through a decoder; else one made from the error.
    pub fn failure(error: io::Error, place: &str) -> Failure {
        match error.downcast::<Failure>() {
            Ok(failure) => failure,
            Err(error) => Failure::new(FailureKind::Input, "failed to read input").at(place).because(error),
        }
    }

    fn request(&mut self) -> anyhow::Result<Option<Request>> {
        let start = self.next_start;
        let end = self.info.size.min(start + self.range_bytes);
        if start == end {
            return Ok(None);
        }
        self.next_start = end;
        let options = GetOptions::new().with_range(Some(start..end)).with_if_match(self.info.etag.clone());
        let (object_store, path) = (Arc::clone(&self.store.object_store), self.path.clone());
        let answer = runtime()?.spawn(async move { object_store.get_opts(&path, options).await?.bytes().await });
        Ok(Some(Request { started: Instant::now(), num_bytes: end - start, answer }))
    }

    /// Takes the range that was asked for and asks for the next; false at the end.
    fn advance(&mut self) -> anyhow::Result<bool> {
        let Some(request) = self.ahead.take() else { return Ok(false) };
        let answer = runtime()?.block_on(request.answer).context("wait for an object store request")?;
        let bytes = answer.map_err(|error| explain(&self.store, "read object", &self.info.key, request.started, &error))?;
        if bytes.len() as u64 != request.num_bytes {
            return Err(shorter_than_said(&self.store.url(&self.info.key), request.num_bytes as usize, bytes.len()).into());
        }
        self.ahead = self.request()?;
        self.digest.lock().unwrap_or_else(PoisonError::into_inner).update(&bytes);
        self.current = bytes;
        Ok(true)
    }
}

impl Read for ObjectReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        if self.current.is_empty() {
            let more = self.advance().map_err(|error| match error.downcast::<Failure>() {
                Ok(failure) => io::Error::other(failure),
                Err(error) => io::Error::other(format!("{error:#}")),
            })?;
            if !more {
                return Ok(0);
            }
        }
        let num_bytes = out.len().min(self.current.len());
        out[..num_bytes].copy_from_slice(&self.current.split_to(num_bytes));
        Ok(num_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::with_object;
    use super::super::put;
    use super::*;

    #[test]
    fn ranges_of_any_size_give_the_whole_object_and_its_hash() {
        let content: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let (_folder, store, info) = with_object(&content);
        for range_bytes in [1, 7, 500, 1000, 5000] {
            let mut reader = ObjectReader::new(&store, &info, range_bytes).unwrap();
            let digest = reader.digest();
            let mut read = Vec::new();
            reader.read_to_end(&mut read).unwrap();
            assert_eq!(read, content, "{range_bytes}");
            assert_eq!(digest.lock().unwrap().finalize(), blake3::hash(&content), "{range_bytes}");
        }
    }

    #[test]
    fn an_empty_object_ends_at_once() {
        let (_folder, store, info) = with_object(b"");
        assert_eq!(ObjectReader::new(&store, &info, 8).unwrap().read(&mut [0; 4]).unwrap(), 0);
    }

    #[test]
    fn an_object_that_changes_while_it_is_read_is_a_storage_failure() {
        let (_folder, store, info) = with_object(&[1; 100]);
        put(&store, "object", vec![2; 60]).unwrap();
        let error = ObjectReader::new(&store, &info, 80).unwrap().read_to_end(&mut Vec::new()).unwrap_err();
        let failure = ObjectReader::failure(error, "elsewhere");
        assert_eq!(failure.kind, FailureKind::Storage);
        assert_eq!(failure.what, "failed to read object: the object changed meanwhile");
    }
}
