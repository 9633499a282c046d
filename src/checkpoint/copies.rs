//! Memory for copies of tensors that is used again for the next checkpoint: taking gigabytes anew each time would cost the steps
//! beside it more than the copying itself.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use bytes::Bytes;

/// Bytes of a page, or of a part of one.
const PAGE_BYTES: usize = 4 << 10;

/// Where the memory of copies comes from, and goes back to.
#[derive(Clone, Debug, Default)]
pub struct Copies {
    pool: Arc<Mutex<Pool>>,
}

#[derive(Debug, Default)]
struct Pool {
    /// Memory that no copy uses at the moment.
    free: Vec<Vec<u8>>,
    /// Sizes of the memory that copies use.
    used: Vec<usize>,
    /// Sizes of the memory that is still to be prepared.
    wanted: Vec<usize>,
    /// A thread prepares memory.
    is_preparing: bool,
}

/// A copy whose memory goes back when nobody reads it any more.
struct Copied {
    memory: Vec<u8>,
    copies: Copies,
}

impl Copies {
    /// Takes memory for copies of these sizes, as far as there is none yet, in a thread that ends when it has. A copy that is made
    /// before finds what is there by then, and takes the rest itself.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn prepare(&self, sizes: &[usize]) -> io::Result<()> {
        let mut pool = self.pool();
        pool.wanted = pool.missing(sizes);
        if pool.is_preparing || pool.wanted.is_empty() {
            return Ok(());
        }
        let copies = self.clone();
        let prepare = move || while copies.provide_next() {};
        thread::Builder::new().name("checkpoint-memory".to_owned()).spawn(prepare)?;
        pool.is_preparing = true;
        Ok(())
    }

    /// Copies bytes into memory of just their size.
    pub fn copy(&self, bytes: &[u8]) -> Bytes {
        let free = self.pool().take(bytes.len());
        let mut memory = free.unwrap_or_else(|| Vec::with_capacity(bytes.len()));
        memory.clear();
        memory.extend_from_slice(bytes);
        Bytes::from_owner(Copied { memory, copies: self.clone() })
    }

    /// Gives up what no copy uses. After all copies of a share that is what the share does not need: shares are dealt out anew when
    /// workers come or go.
    pub fn trim(&self) {
        let mut pool = self.pool();
        pool.free.clear();
        pool.wanted.clear();
    }

    /// Puts the next memory that is wanted into the pool; false where none is. The pool is free meanwhile.
    fn provide_next(&self) -> bool {
        let wanted = self.pool().next_wanted();
        let Some(size) = wanted else { return false };
        let memory = provided(size);
        self.pool().free.push(memory);
        true
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// Those of these sizes for which there is no memory, whether free or in use.
    fn missing(&self, sizes: &[usize]) -> Vec<usize> {
        let mut there: BTreeMap<usize, usize> = BTreeMap::new();
        for size in self.free.iter().map(Vec::capacity).chain(self.used.iter().copied()) {
            *there.entry(size).or_default() += 1;
        }
        let is_missing = |size: &usize| match there.get_mut(size) {
            Some(count) if *count > 0 => {
                *count -= 1;
                false
            }
            _ => true,
        };
        sizes.iter().copied().filter(is_missing).collect()
    }

    /// The next size to prepare; after the last the thread ends.
    fn next_wanted(&mut self) -> Option<usize> {
        let next = self.wanted.pop();
        self.is_preparing = next.is_some();
        next
    }

    /// Free memory of a size, if there is some. Either way it is not to be prepared any more.
    fn take(&mut self, size: usize) -> Option<Vec<u8>> {
        self.used.push(size);
        if let Some(place) = self.free.iter().position(|memory| memory.capacity() == size) {
            return Some(self.free.swap_remove(place));
        }
        remove(&mut self.wanted, size);
        None
    }

    fn give(&mut self, memory: Vec<u8>) {
        remove(&mut self.used, memory.capacity());
        self.free.push(memory);
    }
}

/// Memory of which every page is there: the system provides one only when it is written to.
fn provided(size: usize) -> Vec<u8> {
    let mut memory = vec![0; size];
    memory.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *byte = std::hint::black_box(0));
    memory
}

fn remove(sizes: &mut Vec<usize>, size: usize) {
    if let Some(place) = sizes.iter().position(|&other| other == size) {
        sizes.swap_remove(place);
    }
}

impl AsRef<[u8]> for Copied {
    fn as_ref(&self) -> &[u8] {
        &self.memory
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        self.copies.pool().give(memory);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn held(copies: &Copies) -> Vec<usize> {
        copies.pool().free.iter().map(Vec::capacity).collect()
    }

    fn copy(copies: &Copies, byte: u8, size: usize) -> Bytes {
        copies.copy(&vec![byte; size])
    }

    #[test]
    fn memory_comes_back_and_is_used_again() {
        let copies = Copies::default();
        let sizes = [1000, 3000];
        let first: Vec<Bytes> = sizes.iter().map(|&size| copy(&copies, 1, size)).collect();
        let places: Vec<*const u8> = first.iter().map(|copy| copy.as_ptr()).collect();
        assert!(held(&copies).is_empty());
        drop(first);
        assert_eq!(held(&copies), sizes);
        let second: Vec<Bytes> = sizes.iter().map(|&size| copy(&copies, 2, size)).collect();
        assert_eq!(second.iter().map(|copy| copy.as_ptr()).collect::<Vec<_>>(), places);
        assert!(second.iter().all(|copy| copy.iter().all(|&byte| byte == 2)));
    }

    #[test]
    fn a_copy_that_is_read_is_not_written_over() {
        let copies = Copies::default();
        let slow = copy(&copies, 7, 64);
        let part = slow.slice(3..5);
        drop(slow);
        let next = copy(&copies, 8, 64);
        assert_eq!((part.as_ref(), next[0]), ([7, 7].as_slice(), 8));
    }

    #[test]
    fn memory_that_a_share_does_not_need_is_given_up() {
        let copies = Copies::default();
        drop([copy(&copies, 0, 64), copy(&copies, 0, 128)]);
        let share = copy(&copies, 0, 64);
        copies.trim();
        assert!(held(&copies).is_empty());
        drop(share);
        assert_eq!(held(&copies), [64]);
    }

    #[test]
    fn what_is_prepared_is_what_the_copies_take() {
        let copies = Copies::default();
        let in_use = copy(&copies, 1, 64);
        drop(copy(&copies, 1, 128));
        copies.prepare(&[64, 128, 128, 256]).unwrap();
        let deadline = Instant::now() + Duration::from_mins(1);
        while copies.pool().is_preparing && Instant::now() < deadline {
            thread::yield_now();
        }
        let mut sizes = held(&copies);
        sizes.sort_unstable();
        assert_eq!(sizes, [128, 128, 256], "neither what is in use nor what is free is taken twice");
        let prepared: Vec<*const u8> = copies.pool().free.iter().map(Vec::as_ptr).collect();
        let taken = [copy(&copies, 3, 256), copy(&copies, 3, 128), copy(&copies, 3, 128)];
        assert!(taken.iter().all(|copy| prepared.contains(&copy.as_ptr())));
        assert!(held(&copies).is_empty());
        drop(in_use);
    }

    #[test]
    fn a_copy_does_not_wait_for_what_is_still_to_be_prepared() {
        let mut pool = Pool { wanted: vec![64, 128, 64], is_preparing: true, ..Pool::default() };
        assert!(pool.take(64).is_none());
        assert_eq!(pool.wanted.len(), 2, "the copy takes its memory itself: {:?}", pool.wanted);
        assert_eq!(pool.next_wanted().into_iter().chain(pool.next_wanted()).sum::<usize>(), 64 + 128);
        assert!(pool.is_preparing);
        assert_eq!(pool.next_wanted(), None);
        assert!(!pool.is_preparing);
    }
}
