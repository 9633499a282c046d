//! A keyed permutation of `0..n` that needs no table: a Feistel network with cycle walking.
//!
//! The network permutes the next domain of an even number of bits, which is less than four times as large as `n`. A value
//! that lands outside `0..n` is encrypted again until it lands inside; since the network is a bijection, so is the walk.

use crate::draw::mix;

/// Rounds of the network. Four suffice for large domains; small ones have weak round functions and want more.
const NUM_ROUNDS: u64 = 8;

/// Distance between the round keys.
const ROUND_KEY_STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// Where `i` goes under the permutation of `0..n` that `key` names. Takes less than four passes of the network on average.
///
/// # Panics
/// If `i` is not below `n`.
pub fn permute(key: u64, n: u64, i: u64) -> u64 {
    assert!(i < n, "index {i} is outside a permutation of {n} values");
    let half_bits = half_bits(n);
    let mut value = encrypt(key, half_bits, i);
    while value >= n {
        value = encrypt(key, half_bits, value);
    }
    value
}

/// Bits of one half of the smallest domain of an even number of bits that holds `0..n`; at least 1, at most 32.
fn half_bits(n: u64) -> u32 {
    let bits = u64::BITS - (n - 1).leading_zeros();
    bits.div_ceil(2).max(1)
}

/// One pass of the network over `2 * half_bits` bits.
fn encrypt(key: u64, half_bits: u32, value: u64) -> u64 {
    let half_mask = (1u64 << half_bits) - 1;
    let (mut left, mut right) = (value >> half_bits, value & half_mask);
    for round in 1..=NUM_ROUNDS {
        let round_key = mix(key.wrapping_add(ROUND_KEY_STEP.wrapping_mul(round)));
        (left, right) = (right, left ^ (mix(right ^ round_key) & half_mask));
    }
    (left << half_bits) | right
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_a_bijection(key in any::<u64>(), n in 1u64..5000) {
            let mut images: Vec<u64> = (0..n).map(|i| permute(key, n, i)).collect();
            images.sort_unstable();
            prop_assert_eq!(images, (0..n).collect::<Vec<_>>());
        }

        #[test]
        fn stays_inside_huge_domains(key in any::<u64>(), n in 1u64.., fraction in 0.0f64..1.0) {
            let i = ((n as f64 * fraction) as u64).min(n - 1);
            prop_assert!(permute(key, n, i) < n);
        }
    }

    #[test]
    fn half_bits_cover_the_domain() {
        for (n, expected) in [(1, 1), (2, 1), (4, 1), (5, 2), (16, 2), (17, 3), (1 << 32, 16), ((1 << 32) + 1, 17), (u64::MAX, 32)] {
            assert_eq!(half_bits(n), expected, "n = {n}");
        }
    }

    #[test]
    fn every_image_is_equally_likely_over_keys() {
        for n in [2u64, 3, 5, 8, 11] {
            let trials = 2000 * n;
            for i in 0..n {
                let mut counts = vec![0u64; n as usize];
                for key in 0..trials {
                    counts[permute(mix(key + 1), n, i) as usize] += 1;
                }
                // 2000 expected, standard deviation below 45.
                assert!(counts.iter().all(|count| (1750..2250).contains(count)), "n = {n}, i = {i}: {counts:?}");
            }
        }
    }

    #[test]
    fn neighbours_scatter() {
        let n = 100_000;
        let near = (0..n - 1).filter(|&i| permute(9, n, i).abs_diff(permute(9, n, i + 1)) < n / 100).count();
        // Two uniform values lie within 1 % of the range of each other about 2 % of the time.
        assert!((1800..2200).contains(&near), "{near}");
    }

    #[test]
    #[should_panic(expected = "outside a permutation")]
    fn refuses_an_index_outside() {
        permute(0, 3, 3);
    }
}
