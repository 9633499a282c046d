//! Loss and throughput by step, in a bounded number of points.

use serde::{Deserialize, Serialize};

/// Most points that a curve keeps. A screen is no wider, and this many are about 100 kB of JSON.
pub const MAX_POINTS: usize = 2_000;

/// One step of the curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Steps done.
    pub step: u64,
    /// Loss of the step; `None` where it was not finite.
    pub loss: Option<f64>,
    /// Tokens per second; `None` where it was not finite.
    pub tokens_per_s: Option<f64>,
}

/// Every `stride`-th step, and the newest step whatever its number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Distance of the points, in steps; it doubles whenever the curve would get too long.
    pub stride: u64,
    /// The points, by rising step.
    pub points: Vec<Point>,
    /// How often points were taken away again; a reader that holds older ones needs the whole curve then.
    #[serde(skip)]
    rewrites: u64,
}

impl Default for Curve {
    fn default() -> Self {
        Self { stride: 1, points: Vec::new(), rewrites: 0 }
    }
}

impl Curve {
    /// Adds a step. One that was done before replaces itself and everything after it.
    pub fn add(&mut self, point: Point) {
        let kept = self.points.partition_point(|known| known.step < point.step);
        if kept < self.points.len() {
            self.points.truncate(kept);
            self.rewrites += 1;
        } else if self.points.last().is_some_and(|last| !self.is_settled(last)) {
            self.points.pop();
        }
        self.points.push(point);
        if self.points.len() > MAX_POINTS {
            self.stride *= 2;
            let stride = self.stride;
            self.points.retain(|known| known.step.is_multiple_of(stride) || known.step == point.step);
            self.rewrites += 1;
        }
    }

    /// How often points were taken away so far.
    pub fn rewrites(&self) -> u64 {
        self.rewrites
    }

    /// The newest step whose point stays when the next one comes; 0 before the first.
    pub fn settled_step(&self) -> u64 {
        self.points.iter().rev().find(|point| self.is_settled(point)).map_or(0, |point| point.step)
    }

    /// The points behind a step.
    pub fn after(&self, step: u64) -> &[Point] {
        &self.points[self.points.partition_point(|point| point.step <= step)..]
    }

    /// Replaces everything behind a step, as a reader of [`Curve::after`] does.
    pub fn continue_after(&mut self, step: u64, points: Vec<Point>) {
        self.points.truncate(self.points.partition_point(|point| point.step <= step));
        self.points.extend(points);
    }

    fn is_settled(&self, point: &Point) -> bool {
        point.step.is_multiple_of(self.stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(step: u64, loss: f64) -> Point {
        Point { step, loss: Some(loss), tokens_per_s: None }
    }

    fn curve(steps: impl IntoIterator<Item = u64>) -> Curve {
        let mut curve = Curve::default();
        steps.into_iter().for_each(|step| curve.add(point(step, 1.0)));
        curve
    }

    fn steps(curve: &Curve) -> Vec<u64> {
        curve.points.iter().map(|point| point.step).collect()
    }

    #[test]
    fn a_replayed_step_replaces_the_later_ones() {
        let mut curve = curve(1..=7);
        assert_eq!(curve.rewrites(), 0);
        curve.add(point(5, 2.0));
        assert_eq!(steps(&curve), [1, 2, 3, 4, 5]);
        assert_eq!(curve.points[4].loss, Some(2.0));
        assert_eq!(curve.rewrites(), 1);
    }

    #[test]
    fn a_long_curve_is_halved_and_keeps_its_newest_point() {
        let most = MAX_POINTS as u64;
        let full = curve(1..=most);
        assert_eq!((full.points.len(), full.stride, full.settled_step()), (MAX_POINTS, 1, most));
        // One more than fits: of 1..=2001 the even ones stay, and the newest.
        let halved = curve(1..=most + 1);
        assert_eq!((halved.points.len(), halved.stride, halved.rewrites()), (MAX_POINTS / 2 + 1, 2, 1));
        assert_eq!(halved.points[..2].iter().map(|point| point.step).collect::<Vec<_>>(), [2, 4]);
        assert_eq!((halved.settled_step(), halved.points.last().map(|point| point.step)), (most, Some(most + 1)));
        // The next one takes the place of the newest, which is none of every second.
        let next = curve(1..=most + 2);
        assert_eq!((next.points.len(), next.points.last().map(|point| point.step)), (MAX_POINTS / 2 + 1, Some(most + 2)));
        let long = curve(1..=40 * most);
        assert!(long.points.len() <= MAX_POINTS && long.points.len() >= MAX_POINTS / 2, "{}", long.points.len());
    }

    #[test]
    fn a_reader_that_follows_has_the_same_points() {
        let mut written = curve(1..=MAX_POINTS as u64 + 1);
        let mut read = written.clone();
        for step in MAX_POINTS as u64 + 2..MAX_POINTS as u64 + 9 {
            let (settled, rewrites) = (written.settled_step(), written.rewrites());
            written.add(point(step, 0.5));
            assert_eq!(written.rewrites(), rewrites);
            read.continue_after(settled, written.after(settled).to_vec());
            assert_eq!(read.points, written.points, "step {step}");
        }
    }

    #[test]
    fn the_points_behind_a_step() {
        let curve = curve(1..=5);
        for (step, expected) in [(0, 5), (3, 2), (5, 0), (9, 0)] {
            assert_eq!(curve.after(step).len(), expected, "behind {step}");
        }
    }
}
