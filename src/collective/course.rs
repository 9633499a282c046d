//! In which order a rank sends and receives the pieces of a vector: a pure function of operation, length, world size and rank.
//!
//! A piece starts its journey at one rank and goes from each rank to the next. Where it arrives it is added to, or replaces, what lies there, and
//! is then sent on from there; so a piece needs no memory of its own. A rank first sends its piece of the first few windows. Afterwards everything
//! that it receives causes at most one send: of the same piece, or, when the journey ends here, of its own piece of a later window.

use std::collections::VecDeque;
use std::ops::Range;

use super::header::Header;
use super::layout::{Layout, MAX_PIECE_ELEMENTS, PIPELINE_DEPTH_WINDOWS};

/// Bytes of one `f32` on the wire.
pub const BYTES_PER_ELEMENT: usize = 4;
/// What of a broadcast is received before it is sent on.
const RELAY_BYTES: usize = MAX_PIECE_ELEMENTS * BYTES_PER_ELEMENT;

/// What arrives next, where it belongs, and what leaves after it. Ranges are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receive {
    /// Place of the arriving values.
    pub range: Range<usize>,
    /// Whether they are added to what is there; otherwise they replace it.
    pub is_added: bool,
    /// What is complete with it and is sent.
    pub then_send: Option<Range<usize>>,
}

/// Everything that one rank does in one operation.
pub struct Course<R> {
    /// Announces the operation.
    pub header: Header,
    /// Whether this rank sends anything.
    pub sends: bool,
    /// Whether this rank receives anything.
    pub receives: bool,
    /// What can be sent at once.
    pub first_sends: VecDeque<Range<usize>>,
    /// What arrives, in this order.
    pub arrivals: R,
}

/// How the pieces of one sum or gathering go round.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    layout: Layout,
    /// The piece whose journey begins at this rank.
    start: usize,
    /// Steps in which the arriving piece is added; in the later ones it replaces.
    num_adding_steps: usize,
    num_steps: usize,
}

impl Turn {
    /// A sum for everybody: once round to add, once more with the sum. `world_size` is at least 2 here and below.
    pub fn all_reduce(len: usize, world_size: usize, rank: usize) -> Self {
        Self { layout: Layout::new(len, world_size), start: rank, num_adding_steps: world_size - 1, num_steps: 2 * (world_size - 1) }
    }

    /// Sums that end where they belong: the journey of piece `c` begins at the rank after `c`.
    pub fn reduce_scatter(len: usize, world_size: usize, rank: usize) -> Self {
        let start = (rank + world_size - 1) % world_size;
        Self { layout: Layout::by_share(len, world_size), start, num_adding_steps: world_size - 1, num_steps: world_size - 1 }
    }

    /// Everybody's share goes round once.
    pub fn all_gather(len: usize, world_size: usize, rank: usize) -> Self {
        Self { layout: Layout::by_share(len, world_size), start: rank, num_adding_steps: 0, num_steps: world_size - 1 }
    }

    /// Everybody's share goes `distance` ranks on; those of the ranks in between arrive too.
    pub fn gather_share(len: usize, world_size: usize, rank: usize, distance: usize) -> Self {
        Self { num_steps: distance, ..Self::all_gather(len, world_size, rank) }
    }

    /// What the rank sends and receives.
    pub fn course(&self, header: Header) -> Course<impl Iterator<Item = Receive>> {
        let windows = 0..self.layout.num_windows().min(PIPELINE_DEPTH_WINDOWS);
        let first_sends = windows.map(|window| self.place(window, self.start)).collect();
        Course { header, sends: true, receives: true, first_sends, arrivals: self.arrivals() }
    }

    /// A few windows at a time, and of these one step after the other, so that several pieces are always under way.
    fn arrivals(&self) -> impl Iterator<Item = Receive> {
        let num_windows = self.layout.num_windows();
        (0..num_windows).step_by(PIPELINE_DEPTH_WINDOWS).flat_map(move |block| {
            let windows = block..num_windows.min(block + PIPELINE_DEPTH_WINDOWS);
            (0..self.num_steps).flat_map(move |step| windows.clone().map(move |window| self.arrival(step, window)))
        })
    }

    /// What arrives in step 0 is the piece with which the previous rank began, then the one before, and so on.
    fn arrival(&self, step: usize, window: usize) -> Receive {
        let world_size = self.layout.world_size();
        let range = self.place(window, (self.start + 2 * world_size - 1 - step) % world_size);
        let later = window + PIPELINE_DEPTH_WINDOWS;
        let then_send = if step + 1 < self.num_steps {
            Some(range.clone())
        } else {
            (later < self.layout.num_windows()).then(|| self.place(later, self.start))
        };
        Receive { range, is_added: step < self.num_adding_steps, then_send }
    }

    fn place(&self, window: usize, piece: usize) -> Range<usize> {
        let Range { start, end } = self.layout.piece(window, piece);
        start * BYTES_PER_ELEMENT..end * BYTES_PER_ELEMENT
    }
}

/// The course of a broadcast: the root's bytes go round once, and the rank before the root keeps them.
pub fn relay(header: Header, world_size: usize, rank: usize) -> Course<impl Iterator<Item = Receive>> {
    let Header { root, len, .. } = header;
    let is_root = rank == root;
    let sends = (rank + 1) % world_size != root;
    let first_sends = if is_root { VecDeque::from([Range { start: 0, end: len }]) } else { VecDeque::new() };
    let num_arrivals = if is_root { 0 } else { len.div_ceil(RELAY_BYTES) };
    let arrivals = (0..num_arrivals).map(move |chunk| {
        let range = chunk * RELAY_BYTES..len.min((chunk + 1) * RELAY_BYTES);
        let then_send = sends.then(|| range.clone());
        Receive { range, is_added: false, then_send }
    });
    Course { header, sends, receives: !is_root, first_sends, arrivals }
}

#[cfg(test)]
mod tests {
    use super::super::api::Operation;
    use super::*;

    fn header(operation: Operation, root: usize, len: usize) -> Header {
        Header { operation, root, sequence: 0, len }
    }

    /// What each rank puts on the wire, from its course alone.
    fn sent(course: Course<impl Iterator<Item = Receive>>) -> Vec<Range<usize>> {
        course.first_sends.into_iter().chain(course.arrivals.filter_map(|arrival| arrival.then_send)).collect()
    }

    fn received(course: Course<impl Iterator<Item = Receive>>) -> Vec<Range<usize>> {
        course.arrivals.map(|arrival| arrival.range).collect()
    }

    #[test]
    fn what_a_rank_sends_is_what_the_next_one_receives() {
        for (world_size, len) in [(2, 7), (2, 1_000_003), (3, 1), (3, 100_003), (5, 1_000_003)] {
            for rank in 0..world_size {
                let next = (rank + 1) % world_size;
                let gather_one = |len, world_size, rank| Turn::gather_share(len, world_size, rank, 1);
                let gather_last = |len, world_size, rank| Turn::gather_share(len, world_size, rank, world_size - 1);
                for make in [Turn::all_reduce, Turn::reduce_scatter, Turn::all_gather, gather_one, gather_last] {
                    let header = header(Operation::AllReduce, 0, len);
                    let (mine, theirs) = (make(len, world_size, rank), make(len, world_size, next));
                    assert_eq!(sent(mine.course(header)), received(theirs.course(header)), "world {world_size}, length {len}, rank {rank}");
                }
            }
        }
    }

    #[test]
    fn a_broadcast_reaches_everybody_but_the_root_once() {
        let (world_size, len) = (4, 3 * RELAY_BYTES + 5);
        for root in 0..world_size {
            let header = header(Operation::Broadcast, root, len);
            for rank in 0..world_size {
                let bytes = |ranges: Vec<Range<usize>>| ranges.iter().map(Range::len).sum::<usize>();
                let is_last = (rank + 1) % world_size == root;
                let course = relay(header, world_size, rank);
                assert_eq!((course.sends, course.receives), (!is_last, rank != root));
                assert_eq!(bytes(sent(course)), if is_last { 0 } else { len });
                assert_eq!(bytes(received(relay(header, world_size, rank))), if rank == root { 0 } else { len });
            }
        }
    }
}
