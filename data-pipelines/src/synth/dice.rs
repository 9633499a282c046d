//! Random choices of one generated row.

use crate::draw::{Stream, below, draw_u64};

/// The choices of one row, each a draw with its own number: rows do not depend on each other.
pub(crate) struct Dice {
    seed: u64,
    stream: Stream,
    row: u64,
    file: u64,
    num_draws: u64,
}

impl Dice {
    /// Choices of a training row.
    pub(crate) fn training(seed: u64, row: u64) -> Self {
        Self { seed, stream: Stream::SyntheticTraining, row, file: 0, num_draws: 0 }
    }

    /// Choices of a row of an evaluation file, files numbered from 0.
    pub(crate) fn evaluation(seed: u64, file: u64, row: u64) -> Self {
        Self { seed, stream: Stream::SyntheticEvaluation, row, file, num_draws: 0 }
    }

    /// A number in `0..bound`; `bound` is at least 1.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        let bits = draw_u64(self.seed, self.stream, self.row, self.num_draws, self.file);
        self.num_draws += 1;
        below(bits, bound as u64) as usize
    }

    /// True once in `n` times.
    pub(crate) fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of the items, which are at least one.
    pub(crate) fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    /// `count` different items in random order; there are at least as many.
    pub(crate) fn pick_distinct<T: Copy>(&mut self, items: &[T], count: usize) -> Vec<T> {
        let mut remaining = items.to_vec();
        (0..count).map(|_| remaining.swap_remove(self.below(remaining.len()))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_picks_differ_and_cover() {
        let items: Vec<u32> = (0..6).collect();
        let mut seen = [0; 6];
        for row in 0..300 {
            let picked = Dice::training(1, row).pick_distinct(&items, 3);
            assert!(picked[0] != picked[1] && picked[1] != picked[2] && picked[0] != picked[2]);
            picked.iter().for_each(|&item| seen[item as usize] += 1);
        }
        // 300 x 3 / 6 = 150 each, standard deviation 9.
        assert!(seen.iter().all(|count| (100..200).contains(count)), "{seen:?}");
    }

    #[test]
    fn rows_files_and_splits_differ() {
        let roll = |mut dice: Dice| (0..8).map(|_| dice.below(1000)).collect::<Vec<_>>();
        let rolls =
            [Dice::training(1, 0), Dice::training(1, 1), Dice::training(2, 0), Dice::evaluation(1, 0, 0), Dice::evaluation(1, 1, 0)];
        let rolls = rolls.map(roll);
        for (index, first) in rolls.iter().enumerate() {
            assert!(rolls[index + 1..].iter().all(|second| first != second));
        }
        assert_eq!(rolls[0], roll(Dice::training(1, 0)));
    }
}
