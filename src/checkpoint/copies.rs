//! Memory for copies of tensors that is used again for the next checkpoint: taking gigabytes anew each time would cost the steps
//! beside it more than the copying itself.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Memory that no copy uses at the moment.
type Free = Arc<Mutex<Vec<Vec<u8>>>>;

/// Where the memory of copies comes from, and goes back to.
#[derive(Clone, Debug, Default)]
pub struct Copies {
    free: Free,
}

/// A copy whose memory goes back when nobody reads it any more.
struct Copied {
    memory: Vec<u8>,
    free: Free,
}

impl Copies {
    /// Copies bytes into memory of just their size.
    pub fn copy(&self, bytes: &[u8]) -> Bytes {
        let mut memory = self.take(bytes.len());
        memory.clear();
        memory.extend_from_slice(bytes);
        Bytes::from_owner(Copied { memory, free: Arc::clone(&self.free) })
    }

    /// Gives up what no copy uses. After all copies of a share that is what the share does not need: shares are dealt out anew when
    /// workers come or go.
    pub fn trim(&self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn take(&self, size: usize) -> Vec<u8> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = free.iter().position(|memory| memory.capacity() == size);
        fitting.map_or_else(|| Vec::with_capacity(size), |place| free.swap_remove(place))
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
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(copies: &Copies) -> Vec<usize> {
        copies.free.lock().unwrap().iter().map(Vec::capacity).collect()
    }

    #[test]
    fn memory_comes_back_and_is_used_again() {
        let copies = Copies::default();
        let sizes = [1000, 3000];
        let first: Vec<Bytes> = sizes.iter().map(|&size| copies.copy(&vec![1; size])).collect();
        let places: Vec<*const u8> = first.iter().map(|copy| copy.as_ptr()).collect();
        assert!(held(&copies).is_empty());
        drop(first);
        assert_eq!(held(&copies), sizes);
        let second: Vec<Bytes> = sizes.iter().map(|&size| copies.copy(&vec![2; size])).collect();
        assert_eq!(second.iter().map(|copy| copy.as_ptr()).collect::<Vec<_>>(), places);
        assert!(second.iter().all(|copy| copy.iter().all(|&byte| byte == 2)));
    }

    #[test]
    fn a_copy_that_is_read_is_not_written_over() {
        let copies = Copies::default();
        let slow = copies.copy(&[7; 64]);
        let part = slow.slice(3..5);
        drop(slow);
        let next = copies.copy(&[8; 64]);
        assert_eq!((part.as_ref(), next[0]), ([7, 7].as_slice(), 8));
    }

    #[test]
    fn memory_that_a_share_does_not_need_is_given_up() {
        let copies = Copies::default();
        drop([copies.copy(&[0; 64]), copies.copy(&[0; 128])]);
        let share = copies.copy(&[0; 64]);
        copies.trim();
        assert!(held(&copies).is_empty());
        drop(share);
        assert_eq!(held(&copies), [64]);
    }
}
