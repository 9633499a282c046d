//! Means over seeds, how sure they are, and whether two of them differ. All of it is pure.
//!
//! Student's distribution is computed from the regularised incomplete beta function: NIST Digital Library of Mathematical Functions,
//! §8.17(v) for its continued fraction, evaluated from the back as in §3.10(iii), and §5.11 for the logarithm of the gamma function.

use serde::Serialize;

/// Terms of the continued fraction. Below the mean of the distribution it converges within about the root of the larger parameter:
/// 400 terms are enough for 10,000 degrees of freedom, above which a run's seeds never are.
const FRACTION_TERMS: u32 = 400;

/// Halvings of the interval that holds a quantile; 2^-100 is below every rounding.
const HALVINGS: u32 = 100;

/// Share of intervals that hold the true mean.
pub const CONFIDENCE: f64 = 0.95;

/// Mean, deviation and confidence of a few numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// How many numbers there are; at least 1.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// Their sample standard deviation, over `count - 1`; null of one number.
    pub deviation: Option<f64>,
    /// The true mean is this close with 95 % confidence, if the numbers are normally distributed; null of one number.
    pub half_width: Option<f64>,
}

impl Summary {
    /// Sums up numbers; `None` where there are none. All of them are finite.
    pub fn of(values: &[f64]) -> Option<Self> {
        let count = values.len();
        if count == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / count as f64;
        if count == 1 {
            return Some(Self { count, mean, deviation: None, half_width: None });
        }
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1) as f64;
        let deviation = variance.sqrt();
        let quantile = student_quantile(f64::midpoint(1.0, CONFIDENCE), (count - 1) as f64);
        Some(Self { count, mean, deviation: Some(deviation), half_width: Some(quantile * deviation / (count as f64).sqrt()) })
    }

    /// The ends of the interval of 95 % confidence.
    pub fn interval(&self) -> Option<(f64, f64)> {
        self.half_width.map(|half_width| (self.mean - half_width, self.mean + half_width))
    }
}

/// Welch's test of two means whose variances may differ.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Welch {
    /// First mean less second, in standard errors.
    pub t: f64,
    /// Degrees of freedom, by Welch and Satterthwaite.
    pub degrees: f64,
    /// Probability of a difference as large as this one, in either direction, if the true means were equal.
    pub p: f64,
}

/// Compares two means; `None` where one of them has a single number, which says nothing about its spread.
pub fn welch(first: &Summary, second: &Summary) -> Option<Welch> {
    let share = |summary: &Summary| summary.deviation.map(|deviation| deviation.powi(2) / summary.count as f64);
    let (one, other) = (share(first)?, share(second)?);
    let difference = first.mean - second.mean;
    if one + other == 0.0 {
        // Every seed gave the same number. Two such means are equal or differ for certain.
        let degrees = (first.count + second.count - 2) as f64;
        let (t, p) = if difference == 0.0 { (0.0, 1.0) } else { (f64::MAX.copysign(difference), 0.0) };
        return Some(Welch { t, degrees, p });
    }
    let t = difference / (one + other).sqrt();
    let degrees = (one + other).powi(2) / (one.powi(2) / (first.count - 1) as f64 + other.powi(2) / (second.count - 1) as f64);
    Some(Welch { t, degrees, p: 2.0 * student_tail(t.abs(), degrees) })
}

/// The quantile of Student's distribution at a probability of 0.5 or more.
pub fn student_quantile(probability: f64, degrees: f64) -> f64 {
    let tail = 1.0 - probability;
    let (mut low, mut high) = (0.0, 1.0);
    while student_tail(high, degrees) > tail && high < f64::MAX / 4.0 {
        high *= 2.0;
    }
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(low, high);
        if student_tail(middle, degrees) > tail {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

/// Probability that a number of Student's distribution is above `t`, which is 0 or more.
fn student_tail(t: f64, degrees: f64) -> f64 {
    incomplete_beta(degrees / 2.0, 0.5, degrees / (degrees + t * t)) / 2.0
}

/// The regularised incomplete beta function.
fn incomplete_beta(a: f64, b: f64, x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return x.clamp(0.0, 1.0);
    }
    // The fraction converges fast below the distribution's mean; above it the function's mirror image does.
    if x > (a + 1.0) / (a + b + 2.0) {
        return 1.0 - incomplete_beta(b, a, 1.0 - x);
    }
    let front = (a * x.ln() + b * (1.0 - x).ln() + ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b)).exp() / a;
    let mut fraction = 1.0;
    for term in (1..=FRACTION_TERMS).rev() {
        let m = f64::from(term / 2);
        let coefficient = if term.is_multiple_of(2) {
            m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m))
        } else {
            -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0))
        };
        fraction = 1.0 + coefficient / fraction;
    }
    front / fraction
}

/// The logarithm of the gamma function, of a positive number: Stirling's series above 10, to which smaller numbers are raised.
fn ln_gamma(x: f64) -> f64 {
    let (mut x, mut product) = (x, 1.0_f64);
    while x < 10.0 {
        product *= x;
        x += 1.0;
    }
    let inverse = 1.0 / (x * x);
    let series = (1.0 / 12.0 - inverse * (1.0 / 360.0 - inverse * (1.0 / 1260.0 - inverse / 1680.0))) / x;
    (x - 0.5) * x.ln() - x + 0.5 * (2.0 * std::f64::consts::PI).ln() + series - product.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64, tolerance: f64) {
        assert!((found - expected).abs() <= tolerance, "found {found}, expected {expected}");
    }

    #[test]
    fn quantiles_are_those_of_the_printed_tables() {
        // NIST/SEMATECH e-Handbook of Statistical Methods, §1.3.6.7.2, critical values of Student's distribution.
        let table = [
            (0.975, 1.0, 12.706),
            (0.975, 2.0, 4.303),
            (0.975, 4.0, 2.776),
            (0.975, 9.0, 2.262),
            (0.975, 30.0, 2.042),
            (0.975, 100.0, 1.984),
            (0.95, 3.0, 2.353),
            (0.995, 5.0, 4.032),
            (0.999, 10.0, 4.144),
            (0.90, 1.0, 3.078),
        ];
        for (probability, degrees, expected) in table {
            close(student_quantile(probability, degrees), expected, 5e-4);
        }
        close(student_quantile(0.975, 10_000.0), 1.960_2, 5e-4);
        // One degree of freedom is Cauchy's distribution, whose quantile is a tangent.
        close(student_quantile(0.975, 1.0), (0.475 * std::f64::consts::PI).tan(), 1e-9);
        // Two degrees have a closed form as well.
        close(student_tail(1.5, 2.0), 0.5 - 1.5 / (2.0 * (2.0 + 2.25_f64).sqrt()), 1e-12);
    }

    #[test]
    fn gamma_of_half_and_of_integers() {
        close(ln_gamma(0.5), std::f64::consts::PI.sqrt().ln(), 1e-12);
        close(ln_gamma(1.0), 0.0, 1e-12);
        close(ln_gamma(11.0), 3_628_800.0_f64.ln(), 1e-12);
        close(ln_gamma(171.0), 706.573_062_245_787_4, 1e-9);
    }

    #[test]
    fn a_summary_worked_by_hand() {
        // Mean 5, squares 9 + 1 + 1 + 1 + 0 + 0 + 4 + 16 = 32, deviation the root of 32/7, t of 7 degrees 2.365.
        let summary = Summary::of(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]).unwrap();
        assert_eq!((summary.count, summary.mean), (8, 5.0));
        close(summary.deviation.unwrap(), 2.138_09, 1e-5);
        close(summary.half_width.unwrap(), 2.364_624 * 2.138_090 / 8.0_f64.sqrt(), 1e-5);
        assert_eq!(Summary::of(&[]), None);
        let single = Summary::of(&[31.0]).unwrap();
        assert_eq!((single.deviation, single.half_width, single.interval()), (None, None, None));
    }

    #[test]
    fn welch_as_published() {
        // The auto mileage data of the NIST/SEMATECH e-Handbook §1.3.5.3: 249 US cars of 20.14458 +- 6.414700 and 79 Japanese ones of
        // 30.48101 +- 6.107710 miles per gallon; with unequal variances t is -12.94627 at 136.8750 degrees.
        let of = |count, mean, deviation| Summary { count, mean, deviation: Some(deviation), half_width: None };
        let found = welch(&of(249, 20.14458, 6.414_700), &of(79, 30.48101, 6.107_710)).unwrap();
        close(found.t, -12.946_27, 1e-4);
        close(found.degrees, 136.875_0, 1e-3);
        assert!(found.p < 1e-20);
        // The sleep data of Student's paper of 1908 by R's t.test: t = -1.8608, df = 17.776, p = 0.07939.
        let first = Summary::of(&[0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]).unwrap();
        let second = Summary::of(&[1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]).unwrap();
        let found = welch(&first, &second).unwrap();
        close(found.t, -1.860_8, 5e-5);
        close(found.degrees, 17.776, 5e-4);
        close(found.p, 0.079_39, 5e-6);
    }

    #[test]
    fn single_and_equal_numbers() {
        let (one, two) = (Summary::of(&[1.0]).unwrap(), Summary::of(&[1.0, 1.0]).unwrap());
        assert_eq!(welch(&one, &two), None);
        close(welch(&two, &two).unwrap().p, 1.0, 0.0);
        let other = Summary::of(&[2.0, 2.0]).unwrap();
        let certain = welch(&other, &two).unwrap();
        assert!(certain.p == 0.0 && certain.t > 0.0 && certain.t.is_finite());
    }
}
