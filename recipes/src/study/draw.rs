//! Random draws of a sweep, as hashes: the same point comes out on every machine, in whatever order points are made.

use serde_json::Value as Json;

use super::Distribution;

/// Fractional bits of a draw from 0 to below 1: as many as an `f64` holds.
const FRACTION_BITS: u32 = 53;

/// The draw of one key for one sample.
pub(super) fn draw(distribution: &Distribution, seed: u64, key: &str, number: u64) -> Json {
    let bits = bits(seed, key, number);
    match distribution {
        Distribution::Choice(values) => values.get(scaled(bits, values.len() as u64) as usize).cloned().unwrap_or(Json::Null),
        Distribution::Integer(low, high) => {
            let count = u64::try_from(i128::from(*high) - i128::from(*low)).unwrap_or(u64::MAX).saturating_add(1);
            // The sum lies between the two bounds.
            Json::from((i128::from(*low) + i128::from(scaled(bits, count))) as i64)
        }
        Distribution::Uniform(low, high) => Json::from(six_digits(low + fraction(bits) * (high - low)).clamp(*low, *high)),
        Distribution::LogUniform(low, high) => {
            let logarithm = low.ln() + fraction(bits) * (high.ln() - low.ln());
            Json::from(six_digits(logarithm.exp()).clamp(*low, *high))
        }
    }
}

/// 64 random bits from seed, key and number.
fn bits(seed: u64, key: &str, number: u64) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"cloze sweep\0").update(&seed.to_le_bytes()).update(&number.to_le_bytes()).update(key.as_bytes());
    let mut first = [0; 8];
    hasher.finalize_xof().fill(&mut first);
    u64::from_le_bytes(first)
}

/// From 0 to below `count`, by the high bits; the bias is below `count` / 2^64.
fn scaled(bits: u64, count: u64) -> u64 {
    ((u128::from(bits) * u128::from(count)) >> 64) as u64
}

/// From 0 to below 1.
fn fraction(bits: u64) -> f64 {
    (bits >> (u64::BITS - FRACTION_BITS)) as f64 / (1_u64 << FRACTION_BITS) as f64
}

/// Rounded to six digits, as tables and `--set` show it; that also hides what the logarithms of two machines differ in.
fn six_digits(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_the_same_everywhere() {
        let learning_rate = |number| draw(&Distribution::LogUniform(1e-5, 1e-4), 1, "train.learning_rate", number);
        let drawn: Vec<f64> = (0..3).map(|number| learning_rate(number).as_f64().unwrap()).collect();
        assert_eq!(drawn, FIXED, "a change of these numbers changes every random sweep");
    }

    const FIXED: [f64; 3] = [5.9624e-5, 5.65505e-5, 1.13391e-5];

    #[test]
    fn draws_lie_within_their_bounds_and_fill_them() {
        let all = |distribution: &Distribution| -> Vec<Json> { (0..4000).map(|number| draw(distribution, 7, "k", number)).collect() };
        let numbers = |distribution: &Distribution| -> Vec<f64> { all(distribution).iter().map(|value| value.as_f64().unwrap()).collect() };
        let mean = |numbers: &[f64]| numbers.iter().sum::<f64>() / numbers.len() as f64;

        let uniform = numbers(&Distribution::Uniform(-1.0, 3.0));
        assert!(uniform.iter().all(|value| (-1.0..=3.0).contains(value)));
        assert!((mean(&uniform) - 1.0).abs() < 0.1, "{}", mean(&uniform));

        let logarithms: Vec<f64> = numbers(&Distribution::LogUniform(1e-6, 1e-2)).iter().map(|value| value.log10()).collect();
        assert!(logarithms.iter().all(|value| (-6.0..=-2.0).contains(value)));
        assert!((mean(&logarithms) + 4.0).abs() < 0.1, "{}", mean(&logarithms));

        let integers = all(&Distribution::Integer(-2, 2));
        for value in -2..=2 {
            let count = integers.iter().filter(|drawn| drawn.as_i64() == Some(value)).count();
            assert!((600..1000).contains(&count), "{value}: {count} of 4000");
        }
        let choice = all(&Distribution::Choice(vec!["a".into(), Json::Null]));
        assert!((1800..2200).contains(&choice.iter().filter(|drawn| drawn.is_null()).count()));
        assert_eq!(
            draw(&Distribution::Integer(i64::MIN, i64::MAX), 1, "k", 0),
            draw(&Distribution::Integer(i64::MIN, i64::MAX), 1, "k", 0)
        );
        assert_eq!(draw(&Distribution::Uniform(0.5, 0.5), 1, "k", 0), Json::from(0.5));
    }

    #[test]
    fn seed_key_and_number_each_change_the_draw() {
        let one = bits(1, "a", 0);
        assert!(one != bits(2, "a", 0) && one != bits(1, "b", 0) && one != bits(1, "a", 1));
    }
}
