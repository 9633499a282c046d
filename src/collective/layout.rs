//! How a vector is cut for the ring: windows, and in each window one piece per rank.
//!
//! A piece is what travels in one message. Piece `c` of a window starts its journey at rank `c`, collects the other ranks'
//! values on its way round, and goes round a second time with the sum. Windows are independent of each other, so that
//! several are under way at a time.

use std::ops::Range;

/// Largest piece: 128 KiB as bytes, so that what was just added is still in the second-level cache when it is sent on.
pub const MAX_PIECE_ELEMENTS: usize = 32 * 1024;

/// Smallest piece that is worth a message of its own (16 KiB); a vector is not cut finer for the sake of overlap.
const MIN_PIECE_ELEMENTS: usize = 4 * 1024;

/// Windows under way at a time. While one piece is summed, one is sent and one is on the wire; the fourth takes up jitter.
pub const PIPELINE_DEPTH_WINDOWS: usize = 4;

/// Where the pieces of one vector lie. A pure function of length and world size, so that all ranks agree on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    len_elements: usize,
    world_size: usize,
    num_windows: usize,
    cut: Cut,
}

/// What a window is cut from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// From the whole vector, so that a window is one stretch of memory.
    Vector,
    /// From every rank's share, so that piece `c` of all windows together is the share of rank `c`.
    Shares,
}

impl Layout {
    /// The layout of `len_elements` values over `world_size` ranks (at least one), for a sum that everybody wants.
    pub fn new(len_elements: usize, world_size: usize) -> Self {
        Self::cut(len_elements, world_size, Cut::Vector)
    }

    /// The layout for sums of which each rank wants its share: piece `c` of all windows together is the share of rank `c`.
    pub fn by_share(len_elements: usize, world_size: usize) -> Self {
        Self::cut(len_elements, world_size, Cut::Shares)
    }

    fn cut(len_elements: usize, world_size: usize, cut: Cut) -> Self {
        let fair = len_elements.div_ceil(world_size * PIPELINE_DEPTH_WINDOWS);
        let piece = fair.clamp(MIN_PIECE_ELEMENTS, MAX_PIECE_ELEMENTS);
        Self { len_elements, world_size, num_windows: len_elements.div_ceil(world_size * piece), cut }
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Number of windows; 0 for an empty vector.
    pub fn num_windows(&self) -> usize {
        self.num_windows
    }

    /// The elements of piece `piece` (below the world size) in a window; may be empty.
    pub fn piece(&self, window: usize, piece: usize) -> Range<usize> {
        match self.cut {
            Cut::Vector => part_of(part_of(0..self.len_elements, window, self.num_windows), piece, self.world_size),
            Cut::Shares => part_of(share_of(self.len_elements, self.world_size, piece), window, self.num_windows),
        }
    }
}

/// The part of a vector that belongs to `rank` when it is dealt out: nearly equal, contiguous, and all of them together are the vector.
pub fn share_of(len: usize, world_size: usize, rank: usize) -> Range<usize> {
    part_of(0..len, rank, world_size)
}

/// The share of the rank `distance` places before `rank`, round the world; `distance` is at most the world size.
pub fn share_before(len: usize, world_size: usize, rank: usize, distance: usize) -> Range<usize> {
    share_of(len, world_size, (rank + world_size - distance) % world_size)
}

/// Part `part` of a range that is cut into `num_parts` nearly equal parts.
fn part_of(range: Range<usize>, part: usize, num_parts: usize) -> Range<usize> {
    range.start + share(range.len(), part, num_parts)..range.start + share(range.len(), part + 1, num_parts)
}

/// Where part `part` of `len` starts when it is cut into `num_parts` nearly equal parts.
fn share(len: usize, part: usize, num_parts: usize) -> usize {
    len / num_parts * part + len % num_parts * part / num_parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_vector_has_no_window() {
        assert_eq!(Layout::new(0, 3).num_windows(), 0);
    }

    #[test]
    fn a_mebibyte_is_cut_fine_enough_to_overlap() {
        assert_eq!(Layout::new(256 * 1024, 4).num_windows(), PIPELINE_DEPTH_WINDOWS);
        assert_eq!(Layout::new(256 * 1024, 2).num_windows(), PIPELINE_DEPTH_WINDOWS);
    }

    proptest! {
        #[test]
        fn pieces_cover_the_vector_in_order_and_are_bounded(len in 0usize..3_000_000, world_size in 1usize..9) {
            let layout = Layout::new(len, world_size);
            let mut end = 0;
            for window in 0..layout.num_windows() {
                for piece in 0..world_size {
                    let range = layout.piece(window, piece);
                    prop_assert_eq!(range.start, end);
                    prop_assert!(range.len() <= MAX_PIECE_ELEMENTS);
                    end = range.end;
                }
            }
            prop_assert_eq!(end, len);
        }

        #[test]
        fn shares_cover_the_vector_and_their_windows_cover_them(len in 0usize..3_000_000, world_size in 1usize..9) {
            let layout = Layout::by_share(len, world_size);
            let mut end = 0;
            for rank in 0..world_size {
                let share = share_of(len, world_size, rank);
                prop_assert_eq!(share.start, end);
                prop_assert!(share.len() == len / world_size || share.len() == len / world_size + 1);
                for window in 0..layout.num_windows() {
                    let range = layout.piece(window, rank);
                    prop_assert_eq!(range.start, end);
                    prop_assert!(range.len() <= MAX_PIECE_ELEMENTS);
                    end = range.end;
                }
                prop_assert_eq!(end, share.end);
            }
            prop_assert_eq!(end, len);
        }
    }
}
