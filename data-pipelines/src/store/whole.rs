//! Whole objects in memory: read in parts, several at a time, each hashed by whoever read it. One stream from a bucket is slow, and one
//! thread reads and hashes slower than a local disk delivers.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use blake3::hazmat::{ChainingValue, HasherExt as _, Mode, merge_subtrees_non_root, merge_subtrees_root};
use bytes::Bytes;
use cloze_recipes::failure::{Failure, FailureKind};
use object_store::GetOptions;

use super::calls::{block_on, head};
use super::failure::{changed_meanwhile, explain, shorter_than_said};
use super::{ObjectInfo, Store};

/// Bytes of a part. A power of two, so that every part is a subtree of the hash's tree.
const PART_BYTES: usize = 8 << 20;
/// Parts of one object that are read at the same time. Their memory comes on top of the object's.
const PARTS_IN_FLIGHT: usize = 4;

/// Reads a whole object. Fails when it is missing or larger than `max_bytes`, and when it changes meanwhile.
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
    let (content, hash) = read_parts(store, &info, PART_BYTES)?;
    Ok((content.into(), hash.to_hex().to_string()))
}

/// Reads an object of a known size and hashes it; `part_bytes` is a power of two, and at least one chunk of the hash.
fn read_parts(store: &Store, info: &ObjectInfo, part_bytes: usize) -> anyhow::Result<(Vec<u8>, blake3::Hash)> {
    let mut content = vec![0; usize::try_from(info.size).context("the object does not fit this machine's memory")?];
    if content.len() <= part_bytes {
        fetch(store, info, 0, &mut content)?;
        let hash = blake3::hash(&content);
        return Ok((content, hash));
    }
    let mut values = vec![ChainingValue::default(); content.len().div_ceil(part_bytes)];
    let num_readers = values.len().min(PARTS_IN_FLIGHT);
    let starts = (0_u64..).step_by(part_bytes);
    let parts = content.chunks_mut(part_bytes).zip(&mut values).zip(starts);
    let parts = Mutex::new(parts.map(|((content, value), start)| Part { start, content, value }));
    thread::scope(|scope| {
        let read = || read_next_parts(store, info, &parts);
        let named = || thread::Builder::new().name("object-reader".to_owned());
        let readers: io::Result<Vec<_>> = (0..num_readers).map(|_| named().spawn_scoped(scope, read)).collect();
        let readers = readers.inspect_err(|_| leave_the_rest(&parts)).context("start a thread to read an object")?;
        let panicked = |_| Err(anyhow!("reading a part of {} panicked", store.url(&info.key)));
        readers.into_iter().try_for_each(|reader| reader.join().unwrap_or_else(panicked))
    })?;
    let (left, right) = halves(&values);
    let hash = merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash);
    Ok((content, hash))
}

/// A part that is still to be read.
struct Part<'a> {
    start: u64,
    content: &'a mut [u8],
    value: &'a mut ChainingValue,
}

/// Reads and hashes one part after another until none is left, or one fails: then nobody needs the others.
fn read_next_parts<'a>(store: &Store, info: &ObjectInfo, parts: &Mutex<impl Iterator<Item = Part<'a>>>) -> anyhow::Result<()> {
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    while let Some(Part { start, content, value }) = next() {
        if let Err(error) = fetch(store, info, start, content) {
            leave_the_rest(parts);
            return Err(error);
        }
        *value = blake3::Hasher::new().set_input_offset(start).update(content).finalize_non_root();
    }
    Ok(())
}

fn leave_the_rest<'a>(parts: &Mutex<impl Iterator<Item = Part<'a>>>) {
    parts.lock().unwrap_or_else(PoisonError::into_inner).by_ref().for_each(drop);
}

/// Fills `content` from the object's bytes that begin at `start`.
fn fetch(store: &Store, info: &ObjectInfo, start: u64, content: &mut [u8]) -> anyhow::Result<()> {
    if content.is_empty() {
        return Ok(());
    }
    let range = start..start + content.len() as u64;
    let options = GetOptions::new().with_range(Some(range)).with_if_match(info.etag.clone());
    let path = store.path(&info.key)?;
    let started = Instant::now();
    let answer = block_on(async {
        let answer = store.object_store.get_opts(&path, options).await?;
        // Some stores have no entity tags, or take the condition and ignore it.
        let is_same = (answer.meta.size, answer.meta.last_modified.timestamp_micros()) == (info.size, info.last_modified_us);
        Ok(if is_same { Some(answer.bytes().await?) } else { None })
    })?;
    let answer = answer.map_err(|error| explain(store, "read object", &info.key, started, &error))?;
    let Some(bytes) = answer else { return Err(changed_meanwhile(&store.url(&info.key)).into()) };
    if bytes.len() != content.len() {
        return Err(shorter_than_said(&store.url(&info.key), content.len(), bytes.len()).into());
    }
    content.copy_from_slice(&bytes);
    Ok(())
}

/// The value of parts that follow each other, which are one subtree.
fn subtree(values: &[ChainingValue]) -> ChainingValue {
    match values {
        [value] => *value,
        _ => {
            let (left, right) = halves(values);
            merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

/// At least two parts, divided as BLAKE3 does it: the left side is the largest power of two that leaves something for the right.
fn halves(values: &[ChainingValue]) -> (&[ChainingValue], &[ChainingValue]) {
    values.split_at(values.len().next_power_of_two() / 2)
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::with_object;
    use super::super::put;
    use super::*;

    const PART: usize = 1 << 10;

    #[test]
    fn parts_of_any_number_give_the_whole_object_and_its_hash() {
        for parts in 0..20 {
            for size in [parts * PART, parts * PART + 1, parts * PART + PART - 1] {
                let content: Vec<u8> = (0..size).map(|place| (place / 7 * 31 + place) as u8).collect();
                let (_folder, store, info) = with_object(&content);
                let (read, hash) = read_parts(&store, &info, PART).unwrap();
                assert!(read == content, "{size}");
                assert_eq!(hash, blake3::hash(&content), "{size}");
            }
        }
    }

    #[test]
    fn an_object_of_several_parts_comes_with_its_hash() {
        let content: Vec<u8> = (0..PART_BYTES * 2 + 5).map(|place| (place >> 3) as u8).collect();
        let (_folder, store, _) = with_object(&content);
        let (read, hash) = read_hashed(&store, "object", content.len() as u64).unwrap();
        assert!(read == content);
        assert_eq!(hash, blake3::hash(&content).to_hex().to_string());
    }

    #[test]
    fn an_object_that_changes_while_it_is_read_is_a_storage_failure() {
        for changed in [60, 10 * PART] {
            let (_folder, store, info) = with_object(&[1; 9 * PART]);
            put(&store, "object", vec![2; changed]).unwrap();
            let failure = read_parts(&store, &info, PART).unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!(failure.kind, FailureKind::Storage);
            assert_eq!(failure.what, "failed to read object: the object changed meanwhile");
        }
    }
}
