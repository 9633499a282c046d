//! Which pairs of nodes measure at the same time: a round-robin tournament, in which each round has every node in one pair at most.

/// The rounds of a tournament of so many nodes. Each pair meets once; with an odd number one node has a break in each round.
pub(super) fn rounds(num_nodes: usize) -> Vec<Vec<(usize, usize)>> {
    if num_nodes < 2 {
        return Vec::new();
    }
    // The circle method: the first seat stays, the others move on by one; the seat of nobody makes their number even.
    let num_seats = num_nodes.next_multiple_of(2);
    let circle = num_seats - 1;
    (0..circle)
        .map(|round| {
            let seat = |place: usize| if place == 0 { 0 } else { 1 + (place - 1 + round) % circle };
            let pairs = (0..num_seats / 2).map(|place| (seat(place), seat(num_seats - 1 - place)));
            pairs.filter(|(a, b)| *a < num_nodes && *b < num_nodes).map(|(a, b)| (a.min(b), a.max(b))).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::rounds;

    #[test]
    fn every_pair_meets_once_and_nobody_is_in_two_pairs_of_a_round() {
        for num_nodes in 0..=17 {
            let rounds = rounds(num_nodes);
            let mut met = BTreeSet::new();
            for round in &rounds {
                let mut busy = BTreeSet::new();
                for &(a, b) in round {
                    assert!(a < b && b < num_nodes, "{num_nodes}: {a} {b}");
                    assert!(busy.insert(a) && busy.insert(b), "{num_nodes}: {round:?}");
                    assert!(met.insert((a, b)), "{num_nodes}: {a} {b} meet twice");
                }
            }
            assert_eq!(met.len(), num_nodes * num_nodes.saturating_sub(1) / 2, "{num_nodes}");
            let expected = if num_nodes < 2 { 0 } else { num_nodes.next_multiple_of(2) - 1 };
            assert_eq!(rounds.len(), expected);
        }
    }
}
