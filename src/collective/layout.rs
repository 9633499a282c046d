//! How a vector is cut for the ring: windows, and in each window one piece per rank.
//!
//! A piece is what travels in one message. Piece `c` of a window starts its journey at rank `c`, collects the other ranks'
//! values on its way round, and goes round a second time with the sum. Windows are independent of each other, so that
//! several are under way at a time.

use std::ops::Range;

/// Largest piece: 128 KiB as bytes, so that a few of them stay in the second-level cache between socket and sum.
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
}

impl Layout {
    /// The layout of `len_elements` values over `world_size` ranks (at least one).
    pub fn new(len_elements: usize, world_size: usize) -> Self {
        let fair = len_elements.div_ceil(world_size * PIPELINE_DEPTH_WINDOWS);
        let piece = fair.clamp(MIN_PIECE_ELEMENTS, MAX_PIECE_ELEMENTS);
        Self { len_elements, world_size, num_windows: len_elements.div_ceil(world_size * piece) }
    }

    /// Number of windows; 0 for an empty vector.
    pub fn num_windows(&self) -> usize {
        self.num_windows
    }

    /// The elements of piece `piece` (below the world size) in a window; may be empty.
    pub fn piece(&self, window: usize, piece: usize) -> Range<usize> {
        let start = share(self.len_elements, window, self.num_windows);
        let len = share(self.len_elements, window + 1, self.num_windows) - start;
        start + share(len, piece, self.world_size)..start + share(len, piece + 1, self.world_size)
    }
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
    }
}
