//! What is to come, by time. Of two entries with one time the one that was put in first comes first, so a simulation has one course.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// Things that happen at known times.
#[derive(Debug)]
pub(super) struct Queue<E> {
    entries: BinaryHeap<Reverse<Entry<E>>>,
    num_put: u64,
}

/// One of them.
#[derive(Debug)]
struct Entry<E> {
    at: f64,
    number: u64,
    event: E,
}

impl<E> Queue<E> {
    /// An empty queue.
    pub(super) fn new() -> Self {
        Self { entries: BinaryHeap::new(), num_put: 0 }
    }

    /// Puts in what happens at a time.
    pub(super) fn put(&mut self, at: f64, event: E) {
        self.entries.push(Reverse(Entry { at, number: self.num_put, event }));
        self.num_put += 1;
    }

    /// Takes out what happens next, with its time.
    pub(super) fn take(&mut self) -> Option<(f64, E)> {
        self.entries.pop().map(|Reverse(entry)| (entry.at, entry.event))
    }
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<E> Eq for Entry<E> {}

impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Entry<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at.total_cmp(&other.at).then(self.number.cmp(&other.number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_out_by_time_and_then_by_age() {
        let mut queue = Queue::new();
        for (at, event) in [(2.0, 'c'), (1.0, 'a'), (2.0, 'd'), (1.5, 'b'), (2.0, 'e')] {
            queue.put(at, event);
        }
        let order: String = std::iter::from_fn(|| queue.take()).map(|(_, event)| event).collect();
        assert_eq!(order, "abcde");
    }
}
