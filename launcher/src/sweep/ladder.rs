//! Early stopping by asynchronous successive halving: which of the trials that wait at a rung go on.
//!
//! A trial trains to its next rung, saves, and waits. It goes on when it is among the best one in `factor` of all trials that have
//! reached that rung so far, so nobody waits for the slowest. Since a trial's schedule belongs to all its steps, one that goes on later
//! computes what it would have computed without the wait.

use std::cmp::Ordering;

use super::record::Rung;

/// The rungs, and which metric is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ladder {
    /// Step of the first rung.
    pub first_step: u64,
    /// Each rung has this many times the steps of the one before, and one in this many trials goes on from it.
    pub factor: u32,
    /// Whether more is better.
    pub more_is_better: bool,
}

/// A trial as the ladder sees it.
#[derive(Clone, Copy, Debug)]
pub struct Climber<'a> {
    /// Rungs that it has reached.
    pub rungs: &'a [Rung],
    /// Whether it waits at the last of them.
    pub is_waiting: bool,
}

impl Ladder {
    /// Step of a rung, from 0.
    pub fn step(&self, rung: usize) -> u64 {
        let exponent = u32::try_from(rung).unwrap_or(u32::MAX);
        self.first_step.saturating_mul(u64::from(self.factor).saturating_pow(exponent))
    }

    /// Trials that may go on, those at the highest rungs first and the better ones of a rung first. While others still climb the share
    /// is rounded down; `closed` says that nobody else comes to any rung, and then one goes on at least, so that a small sweep ends too.
    pub fn promotable(&self, climbers: &[Climber<'_>], closed: bool) -> Vec<usize> {
        let num_rungs = climbers.iter().map(|climber| climber.rungs.len()).max().unwrap_or(0);
        let mut found = Vec::new();
        for rung in (0..num_rungs).rev() {
            let ranked = self.ranked(climbers, rung);
            let quota = ranked.len() / self.factor.max(1) as usize;
            let quota = if closed && found.is_empty() { quota.max(1) } else { quota };
            let waits_here = |&&trial: &&usize| climbers[trial].rungs.len() == rung + 1 && climbers[trial].is_waiting;
            found.extend(ranked.iter().take(quota).filter(waits_here));
        }
        found
    }

    /// Trials that reached a rung, the best first; of equal ones the earlier.
    fn ranked(&self, climbers: &[Climber<'_>], rung: usize) -> Vec<usize> {
        let mut reached: Vec<(usize, Option<f64>)> =
            climbers.iter().enumerate().filter_map(|(trial, climber)| Some((trial, climber.rungs.get(rung)?.metric))).collect();
        reached.sort_by(|(_, a), (_, b)| self.compare(*a, *b));
        reached.into_iter().map(|(trial, _)| trial).collect()
    }

    /// The better metric first; one that is missing or no number comes last.
    fn compare(&self, a: Option<f64>, b: Option<f64>) -> Ordering {
        let value = |metric: Option<f64>| metric.filter(|metric| !metric.is_nan());
        match (value(a), value(b)) {
            (Some(a), Some(b)) if self.more_is_better => b.total_cmp(&a),
            (Some(a), Some(b)) => a.total_cmp(&b),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => Ordering::Equal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LADDER: Ladder = Ladder { first_step: 100, factor: 3, more_is_better: true };

    /// Trials by their metrics at the rungs that they have reached, and whether they wait there.
    fn promotable(ladder: &Ladder, trials: &[(&[f64], bool)], closed: bool) -> Vec<usize> {
        let rungs: Vec<Vec<Rung>> = trials
            .iter()
            .map(|(metrics, _)| metrics.iter().enumerate().map(|(rung, &m)| Rung { step: ladder.step(rung), metric: Some(m) }).collect())
            .collect();
        let climbers: Vec<Climber<'_>> = rungs.iter().zip(trials).map(|(rungs, &(_, is_waiting))| Climber { rungs, is_waiting }).collect();
        ladder.promotable(&climbers, closed)
    }

    #[test]
    fn rungs_grow_by_the_factor() {
        assert_eq!([0, 1, 2].map(|rung| LADDER.step(rung)), [100, 300, 900]);
        assert_eq!(LADDER.step(60), u64::MAX);
    }

    #[test]
    fn one_in_factor_goes_on() {
        let waits = |metric: &'static [f64]| (metric, true);
        // Fewer than a factor of trials: nobody, until nobody else comes.
        let two = [waits(&[0.5]), waits(&[0.6])];
        assert_eq!(promotable(&LADDER, &two, false), [] as [usize; 0]);
        assert_eq!(promotable(&LADDER, &two, true), [1]);
        // The best of three, and of seven the best two.
        assert_eq!(promotable(&LADDER, &[waits(&[0.5]), waits(&[0.7]), waits(&[0.6])], false), [1]);
        let seven = [0.1, 0.9, 0.3, 0.8, 0.5, 0.2, 0.4].map(|metric| [metric]);
        let seven: Vec<(&[f64], bool)> = seven.iter().map(|metric| (metric.as_slice(), true)).collect();
        assert_eq!(promotable(&LADDER, &seven, false), [1, 3]);
        // Less is better.
        let loss = Ladder { more_is_better: false, ..LADDER };
        assert_eq!(promotable(&loss, &[waits(&[0.5]), waits(&[0.7]), waits(&[0.6])], false), [0]);
    }

    #[test]
    fn who_has_gone_on_keeps_its_place_among_the_best() {
        // The best of three trains on; the second best does not take its place.
        let trials: [(&[f64], bool); 3] = [(&[0.9], false), (&[0.8], true), (&[0.7], true)];
        assert_eq!(promotable(&LADDER, &trials, false), [] as [usize; 0]);
        // Three more came, so two may go on: the second best follows late.
        let more: [(&[f64], bool); 6] =
            [(&[0.9, 0.91], true), (&[0.8], true), (&[0.7], true), (&[0.1], true), (&[0.2], true), (&[0.3], true)];
        assert_eq!(promotable(&LADDER, &more, false), [1]);
    }

    #[test]
    fn higher_rungs_come_first_and_a_closed_ladder_ends() {
        let trials: [(&[f64], bool); 4] = [(&[0.9, 0.91], true), (&[0.8], true), (&[0.7], true), (&[0.6], true)];
        assert_eq!(promotable(&LADDER, &trials, false), [] as [usize; 0]);
        // The one at the top goes on, and the rungs below have had their share.
        assert_eq!(promotable(&LADDER, &trials, true), [0]);
        let both: [(&[f64], bool); 6] =
            [(&[0.9, 0.5], true), (&[0.8, 0.6], true), (&[0.7, 0.7], true), (&[0.85], true), (&[0.1], true), (&[0.1], true)];
        assert_eq!(promotable(&LADDER, &both, false), [2, 3]);
    }

    #[test]
    fn what_is_no_number_is_worst_and_equals_keep_their_order() {
        let (nan, missing) = (Rung { step: 100, metric: Some(f64::NAN) }, Rung { step: 100, metric: None });
        let good = Rung { step: 100, metric: Some(0.1) };
        for more_is_better in [true, false] {
            let ladder = Ladder { more_is_better, ..LADDER };
            let rungs = [[nan], [missing], [good]];
            let climbers = rungs.each_ref().map(|rungs| Climber { rungs, is_waiting: true });
            assert_eq!(ladder.promotable(&climbers, false), [2]);
        }
        assert_eq!(promotable(&LADDER, &[(&[0.5], true), (&[0.5], true), (&[0.5], true)], false), [0]);
    }
}
