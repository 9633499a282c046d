//! Which part of the flat buffers belongs to which rank: its share of every segment, so that each segment can be exchanged by itself.
//!
//! A rank keeps its shares one behind the other, in the order of the segments, in a shard. What has weight decay comes first there too. Where it
//! keeps a replica of another rank's shares, they follow behind its own in the same way.

use std::ops::Range;

use super::buckets::Segment;
use crate::collective::share_of;

/// One rank's shares, and where they lie in the shard of the rank that keeps them.
#[derive(Clone, Debug)]
pub struct ShardLayout {
    rank: usize,
    world_size: usize,
    /// The first float that is theirs.
    start: usize,
    parts: Vec<ShardPart>,
}

/// The share of one segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPart {
    /// The segment in the flat buffer.
    pub segment: Range<usize>,
    /// The share in the flat buffer.
    pub share: Range<usize>,
    /// The share in the shard; as long.
    pub place: Range<usize>,
    /// Whether it has weight decay.
    pub is_decayed: bool,
}

impl ShardPart {
    /// The share, counted from the start of its segment.
    pub fn in_segment(&self) -> Range<usize> {
        self.share.start - self.segment.start..self.share.end - self.segment.start
    }

    /// What of the share lies in a range of the flat buffer: there, and in the shard.
    pub fn within(&self, range: &Range<usize>) -> Option<(Range<usize>, Range<usize>)> {
        let start = self.share.start.max(range.start);
        let end = self.share.end.min(range.end);
        let moved = |flat: usize| flat - self.share.start + self.place.start;
        (start < end).then(|| (start..end, moved(start)..moved(end)))
    }
}

impl ShardLayout {
    /// The shares of `rank` (below `world_size`).
    pub fn new(segments: &[Segment], rank: usize, world_size: usize) -> Self {
        Self::at(0, segments, (rank, world_size))
    }

    /// The shares of another rank of the same world, behind these.
    pub fn behind(&self, segments: &[Segment], rank: usize) -> Self {
        Self::at(self.start + self.num_floats(), segments, (rank, self.world_size))
    }

    fn at(start: usize, segments: &[Segment], (rank, world_size): (usize, usize)) -> Self {
        let mut end = start;
        let parts = segments.iter().map(|Segment { range, is_decayed }| {
            let share = share_of(range.len(), world_size, rank);
            let start = end;
            end += share.len();
            let share = range.start + share.start..range.start + share.end;
            ShardPart { segment: range.clone(), share, place: start..end, is_decayed: *is_decayed }
        });
        let parts = parts.collect();
        Self { rank, world_size, start, parts }
    }

    /// Whose shares these are, and among how many.
    pub fn rank_of(&self) -> (usize, usize) {
        (self.rank, self.world_size)
    }

    /// The shares, segment by segment.
    pub fn parts(&self) -> &[ShardPart] {
        &self.parts
    }

    /// Floats of these shares.
    pub fn num_floats(&self) -> usize {
        self.end() - self.start
    }

    /// Places in the shard: of what has weight decay, and of the rest behind it.
    pub fn places(&self) -> (Range<usize>, Range<usize>) {
        let decayed_end = self.parts.iter().filter(|part| part.is_decayed).map(|part| part.place.end).max().unwrap_or(self.start);
        (self.start..decayed_end, decayed_end..self.end())
    }

    fn end(&self) -> usize {
        self.parts.last().map_or(self.start, |part| part.place.end)
    }
}

/// Whose share of the state a worker has, among how many, and of whose it has a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharePlace {
    /// This rank.
    pub rank: usize,
    /// All ranks.
    pub world_size: usize,
    /// How many ranks before this one the replica's owner is, round the world; 0 for none.
    pub replica_distance: usize,
}

impl SharePlace {
    /// That of these shares.
    pub fn of(own: &ShardLayout, replica: Option<&ShardLayout>) -> Self {
        let (rank, world_size) = own.rank_of();
        let replica_distance = replica.map_or(0, |replica| (rank + world_size - replica.rank_of().0) % world_size);
        Self { rank, world_size, replica_distance }
    }

    /// The rank of whose share there is a replica.
    pub fn replica_of(self) -> Option<usize> {
        let Self { rank, world_size, replica_distance } = self;
        (replica_distance > 0).then(|| (rank + world_size - replica_distance) % world_size)
    }
}

/// Deals whole tensors of these lengths out to ranks so that each gets about as much: the longest first, each to the rank that has the least.
pub fn deal(lengths: &[usize], world_size: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(lengths[index]), index));
    let mut loads = vec![0; world_size];
    let mut ranks = vec![0; lengths.len()];
    for index in order {
        let rank = (0..world_size).min_by_key(|&rank| (loads[rank], rank)).unwrap_or(0);
        loads[rank] += lengths[index];
        ranks[index] = rank;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sharding::buckets::{Buckets, Place};

    fn segments(lengths: &[usize], rest: usize, floats_min: usize) -> Vec<Segment> {
        let mut end = 0;
        let places = lengths.iter().map(|&length| {
            end += length;
            Place { offset: end - length, length }
        });
        let places: Vec<Place> = places.collect();
        Buckets::new(&places, end + rest, floats_min).segments().to_vec()
    }

    proptest! {
        #[test]
        fn shares_cover_everything_once_in_any_world(
            lengths in prop::collection::vec(1usize..50, 1..12), rest in 1usize..30, floats_min in 1usize..90, world_size in 1usize..9,
        ) {
            let segments = segments(&lengths, rest, floats_min);
            let total = lengths.iter().sum::<usize>() + rest;
            let mut owners = vec![0; total];
            for rank in 0..world_size {
                let layout = ShardLayout::new(&segments, rank, world_size);
                let mut end = 0;
                for part in layout.parts() {
                    prop_assert_eq!(part.place.start, end);
                    prop_assert_eq!(part.place.len(), part.share.len());
                    prop_assert!(part.share.len() <= part.segment.len().div_ceil(world_size));
                    prop_assert_eq!(part.in_segment().start + part.segment.start, part.share.start);
                    let (decayed, rest) = layout.places();
                    prop_assert!(part.is_decayed || part.place.start >= rest.start);
                    prop_assert!(!part.is_decayed || part.place.end <= decayed.end);
                    end = part.place.end;
                    owners[part.share.clone()].iter_mut().for_each(|count| *count += 1);
                }
                prop_assert_eq!(end, layout.num_floats());
                // A replica is the same shares, moved.
                let other = (rank + 1) % world_size;
                let (replica, original) = (layout.behind(&segments, other), ShardLayout::new(&segments, other, world_size));
                prop_assert_eq!(replica.num_floats(), original.num_floats());
                for (part, original) in replica.parts().iter().zip(original.parts()) {
                    prop_assert_eq!((&part.share, part.place.start), (&original.share, original.place.start + end));
                }
                let (decayed, rest) = replica.places();
                prop_assert_eq!((decayed.start, decayed.end, rest.end), (end, rest.start, end + replica.num_floats()));
            }
            prop_assert!(owners.iter().all(|&count| count == 1));
        }

        #[test]
        fn dealing_gives_every_tensor_to_one_rank_and_spreads_the_load(
            lengths in prop::collection::vec(0usize..1000, 0..40), world_size in 1usize..9,
        ) {
            let ranks = deal(&lengths, world_size);
            prop_assert!(ranks.iter().all(|&rank| rank < world_size));
            let load = |rank: usize| lengths.iter().zip(&ranks).filter(|(_, of)| **of == rank).map(|(length, _)| length).sum::<usize>();
            let longest = lengths.iter().copied().max().unwrap_or(0);
            let most = (0..world_size).map(load).max().unwrap_or(0);
            let least = (0..world_size).map(load).min().unwrap_or(0);
            prop_assert!(most - least <= longest);
        }
    }

    #[test]
    fn what_of_a_share_lies_in_a_range() {
        let part = ShardPart { segment: 10..30, share: 20..30, place: 5..15, is_decayed: true };
        for (range, expected) in [
            (0..20, None),
            (30..40, None),
            (0..100, Some((20..30, 5..15))),
            (25..28, Some((25..28, 10..13))),
            (18..22, Some((20..22, 5..7))),
        ] {
            assert_eq!(part.within(&range), expected, "{range:?}");
        }
    }
}
