//! The part of a machine that one of several trials on it gets.

use serde::{Deserialize, Serialize};

/// Which of the trials that share a machine this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its place, from 0.
    pub place: u32,
    /// Number of trials that share the machine.
    pub of: u32,
}

impl Part {
    /// The whole machine.
    pub const WHOLE: Self = Self { place: 0, of: 1 };

    /// A part of this part.
    #[must_use]
    pub fn within(self, part: Self) -> Self {
        Self { place: self.place * part.of + part.place, of: self.of * part.of }
    }

    /// Cores of this part: an even share, at least one.
    pub fn cores(self, all: u32) -> u32 {
        (all / self.of.max(1)).max(1)
    }

    /// GPUs of this part, for so many workers: its own where there are enough for all parts, else some that others use too.
    pub fn gpus(self, all: &[String], workers: u32) -> Vec<String> {
        let first = self.place as usize * workers as usize;
        let count = (workers as usize).min(all.len());
        (0..count).map(|index| all[(first + index) % all.len()].clone()).collect()
    }
}

/// Of so many places the one that the fewest of these trials have, the first of several. One whose machine was divided into more places is
/// counted where its GPUs are, which are dealt out round after round.
pub(super) fn least_used(places: u32, taken: &(impl Iterator<Item = u32> + Clone)) -> u32 {
    let num_at = |place: u32| taken.clone().filter(|other| other % places == place).count();
    (0..places).min_by_key(|&place| num_at(place)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_place_comes_first() {
        let cases: [(&[u32], u32); 5] = [(&[], 0), (&[0, 2], 1), (&[0, 1, 2], 0), (&[0, 0, 1, 2, 2], 1), (&[3, 4], 2)];
        for (taken, expected) in cases {
            assert_eq!(least_used(3, &taken.iter().copied()), expected, "{taken:?}");
        }
    }

    #[test]
    fn cores_are_shared_evenly() {
        let cases = [(8, 1, 8), (8, 3, 2), (2, 4, 1), (1, 1, 1)];
        for (all, of, expected) in cases {
            assert_eq!(Part { place: 0, of }.cores(all), expected, "{all} cores for {of}");
        }
        assert_eq!(Part { place: 1, of: 2 }.within(Part { place: 2, of: 3 }), Part { place: 5, of: 6 });
    }

    #[test]
    fn gpus_are_own_where_there_are_enough() {
        let all: Vec<String> = (0..4).map(|gpu| gpu.to_string()).collect();
        let gpus = |place, of, workers| Part { place, of }.gpus(&all, workers).join(",");
        assert_eq!([gpus(0, 2, 2), gpus(1, 2, 2)], ["0,1", "2,3"]);
        // Eight small trials on four GPUs: two on each.
        assert_eq!([gpus(3, 8, 1), gpus(4, 8, 1), gpus(7, 8, 1)], ["3", "0", "3"]);
        // More workers than GPUs take all of them.
        assert_eq!(gpus(0, 1, 9), "0,1,2,3");
        assert_eq!(Part::WHOLE.gpus(&[], 2), Vec::<String>::new());
    }
}
