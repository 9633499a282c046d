//! Packing examples into forward passes of a token budget, and dealing the packs out to workers.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// First-fit-decreasing packing: lists of offsets into `lengths`, each ascending, whose lengths add up to `budget` at most.
///
/// A sample longer than the budget gets a pack of its own. Equal lengths go in the order of their offsets, so the result
/// depends on the arguments alone. First-fit-decreasing needs at most 11/9 of the fewest possible packs, plus one.
/// Lengths and budget are in tokens.
pub fn pack(lengths: &[u32], budget: u32) -> Vec<Vec<u32>> {
    let mut order: Vec<u32> = (0..lengths.len() as u32).collect();
    order.sort_unstable_by_key(|&offset| (Reverse(lengths[offset as usize]), offset));
    let mut packs: Vec<Vec<u32>> = Vec::new();
    let mut rooms = Rooms::new(lengths.len(), budget);
    for offset in order {
        let length = lengths[offset as usize];
        if length > budget {
            packs.push(vec![offset]);
            rooms.close(packs.len() - 1);
            continue;
        }
        // Every pack that is not open yet has the whole budget, so the first fit is at most one past the open ones.
        let chosen = rooms.take_first(length);
        if chosen == packs.len() {
            packs.push(Vec::new());
        }
        packs[chosen].push(offset);
    }
    for offsets in &mut packs {
        offsets.sort_unstable();
    }
    packs
}

/// The room left in each pack, as a tree of maxima, so that the first fit is found in O(log n).
struct Rooms {
    /// Leaves start here; a power of two.
    num_leaves: usize,
    /// Node `i` holds the larger of nodes `2 i` and `2 i + 1`; node 1 is the root.
    largest: Vec<u32>,
}

impl Rooms {
    /// Room for as many packs as there are samples, none of them used.
    fn new(num_packs: usize, budget: u32) -> Self {
        let num_leaves = num_packs.next_power_of_two();
        Self { num_leaves, largest: vec![budget; 2 * num_leaves] }
    }

    /// Takes `length` tokens of the first pack that has them. There always is one: as many packs as samples.
    fn take_first(&mut self, length: u32) -> usize {
        let mut node = 1;
        while node < self.num_leaves {
            node = if self.largest[2 * node] >= length { 2 * node } else { 2 * node + 1 };
        }
        self.set(node, self.largest[node] - length);
        node - self.num_leaves
    }

    /// Leaves no room in a pack.
    fn close(&mut self, index: usize) {
        self.set(self.num_leaves + index, 0);
    }

    fn set(&mut self, leaf: usize, room: u32) {
        self.largest[leaf] = room;
        let mut node = leaf / 2;
        while node >= 1 {
            self.largest[node] = self.largest[2 * node].max(self.largest[2 * node + 1]);
            node /= 2;
        }
    }
}

/// Deals packs out to workers: the largest first, each to the worker with the fewest tokens so far (then the fewest packs,
/// then the lowest rank). Entry `rank` lists that worker's packs, ascending; with fewer packs than workers some have none.
///
/// # Panics
/// If `world_size` is 0.
pub fn assign(pack_tokens: &[u64], world_size: usize) -> Vec<Vec<usize>> {
    assert!(world_size > 0, "packs are dealt out to at least one worker");
    let mut order: Vec<usize> = (0..pack_tokens.len()).collect();
    order.sort_unstable_by_key(|&index| (Reverse(pack_tokens[index]), index));
    let mut loads: BinaryHeap<Reverse<(u64, usize, usize)>> = (0..world_size).map(|rank| Reverse((0, 0, rank))).collect();
    let mut assigned = vec![Vec::new(); world_size];
    for index in order {
        let Some(Reverse((tokens, count, rank))) = loads.pop() else { break };
        assigned[rank].push(index);
        loads.push(Reverse((tokens + pack_tokens[index], count + 1, rank)));
    }
    for indices in &mut assigned {
        indices.sort_unstable();
    }
    assigned
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens_of(pack: &[u32], lengths: &[u32]) -> u64 {
        pack.iter().map(|&offset| u64::from(lengths[offset as usize])).sum()
    }

    proptest! {
        #[test]
        fn packs_hold_every_slot_once_within_the_budget(lengths in prop::collection::vec(1u32..300, 0..200), budget in 1u32..400) {
            let packs = pack(&lengths, budget);
            let mut all: Vec<u32> = packs.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len() as u32).collect::<Vec<_>>());
            for pack in &packs {
                prop_assert!(!pack.is_empty() && pack.is_sorted());
                prop_assert!(tokens_of(pack, &lengths) <= u64::from(budget) || pack.len() == 1);
            }
        }

        #[test]
        fn first_fit_wastes_little(lengths in prop::collection::vec(10u32..100, 200..400)) {
            let packs = pack(&lengths, 1000);
            let tokens: u64 = lengths.iter().map(|&length| u64::from(length)).sum();
            // No length exceeds a tenth of the budget: a new pack is opened only when the others are more than 9/10 full.
            prop_assert!(packs.len() as u64 <= tokens.div_ceil(901) + 1, "{} packs for {tokens} tokens", packs.len());
        }

        #[test]
        fn the_tree_finds_what_a_plain_search_finds(lengths in prop::collection::vec(1u32..100, 1..80)) {
            let mut order: Vec<usize> = (0..lengths.len()).collect();
            order.sort_by_key(|&offset| Reverse(lengths[offset]));
            let mut plain: Vec<(u32, Vec<u32>)> = Vec::new();
            for offset in order {
                let found = plain.iter().position(|(used, _)| used + lengths[offset] <= 120);
                let index = found.unwrap_or_else(|| { plain.push((0, Vec::new())); plain.len() - 1 });
                plain[index].0 += lengths[offset];
                plain[index].1.push(offset as u32);
            }
            let mut expected: Vec<Vec<u32>> = plain.into_iter().map(|(_, offsets)| offsets).collect();
            for offsets in &mut expected { offsets.sort_unstable(); }
            prop_assert_eq!(pack(&lengths, 120), expected);
        }

        #[test]
        fn assignment_is_a_balanced_partition(tokens in prop::collection::vec(1u64..5000, 0..60), world_size in 1usize..9) {
            let assigned = assign(&tokens, world_size);
            prop_assert_eq!(assigned.len(), world_size);
            let mut all = assigned.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..tokens.len()).collect::<Vec<_>>());
            // The last pack went to the least loaded worker, so no two loads differ by more than the largest pack.
            let loads: Vec<u64> = assigned.iter().map(|indices| indices.iter().map(|&index| tokens[index]).sum()).collect();
            let spread = loads.iter().max().unwrap() - loads.iter().min().unwrap();
            prop_assert!(spread <= tokens.iter().copied().max().unwrap_or(0));
        }
    }

    #[test]
    fn known_packings() {
        let cases: [(&[u32], u32, &[&[u32]]); 6] = [
            (&[], 10, &[]),
            (&[4], 10, &[&[0]]),
            (&[11], 10, &[&[0]]),
            (&[11, 3, 12, 7], 10, &[&[2], &[0], &[1, 3]]),
            (&[5, 5, 5], 10, &[&[0, 1], &[2]]),
            (&[2, 6, 4, 8], 10, &[&[0, 3], &[1, 2]]),
        ];
        for (lengths, budget, expected) in cases {
            assert_eq!(pack(lengths, budget), expected, "{lengths:?} in {budget}");
        }
    }

    #[test]
    fn known_assignments() {
        assert_eq!(assign(&[10, 10, 10, 10], 2), [vec![0, 2], vec![1, 3]]);
        assert_eq!(assign(&[7, 20, 7, 6], 2), [vec![1], vec![0, 2, 3]]);
        assert_eq!(assign(&[5], 3), [vec![0], vec![], vec![]]);
        assert_eq!(assign(&[], 2), [Vec::<usize>::new(), Vec::new()]);
    }
}
