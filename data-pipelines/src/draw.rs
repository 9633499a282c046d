//! Counter-based random numbers: every draw is a hash of a seed, a purpose and three integers.
//!
//! Nothing here has state, so a draw can be repeated in any order, on any worker, after any restart.

/// What a draw is for. Draws of different streams are independent even where their integers agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Key of an epoch's permutation: (epoch, 0, 0).
    Order = 1,
    /// Objective of an example: (epoch, sample, 0).
    Objective = 2,
    /// Whether a token is masked: (epoch, sample, position).
    MaskToken = 3,
    /// What a masked position holds: (epoch, sample, position).
    MaskKind = 4,
    /// The random token at a masked position: (epoch, sample, position).
    RandomToken = 5,
    /// Generated training rows: (row, number of the draw, 0).
    SyntheticTraining = 6,
    /// Generated evaluation rows: (row, number of the draw, number of the file).
    SyntheticEvaluation = 7,
    /// Key of the order in which a task's samples are taken where epochs take only some: (task, pass, 0).
    TaskOrder = 8,
}

/// Odd constants that keep the places of the inputs apart: (1, 0) and (0, 1) must not meet.
const PLACE_CONSTANTS: [u64; 4] = [0xD1B5_4A32_D192_ED03, 0xABC9_8388_FB8F_AC03, 0x8CB9_2BA7_2F3D_8DD7, 0xAEF1_7502_108E_F2D9];

/// The golden ratio in 64 bits; keeps seed 0 from starting at the fixed point 0 of the mixers.
const SEED_CONSTANT: u64 = 0x9E37_79B9_7F4A_7C15;

/// 64 uniform bits for a seed, a stream and three integers.
pub fn draw_u64(seed: u64, stream: Stream, a: u64, b: u64, c: u64) -> u64 {
    let mut state = mix(seed.wrapping_add(SEED_CONSTANT));
    for (input, constant) in [stream as u64, a, b, c].into_iter().zip(PLACE_CONSTANTS) {
        state = mix_again(state ^ mix(input.wrapping_add(constant)));
    }
    mix(state)
}

/// A uniform number in [0, 1), a multiple of 2^-53, for a seed, a stream and three integers.
pub fn draw_unit(seed: u64, stream: Stream, a: u64, b: u64, c: u64) -> f64 {
    // 53 bits are all that a float64 between 0.5 and 1 resolves.
    (draw_u64(seed, stream, a, b, c) >> 11) as f64 / (1u64 << 53) as f64
}

/// Maps 64 uniform bits to `0..bound`; `bound` is at least 1.
///
/// The high half of the product is off from uniform by less than `bound / 2^64`, which no test could see.
pub fn below(bits: u64, bound: u64) -> u64 {
    ((u128::from(bits) * u128::from(bound)) >> 64) as u64
}

/// Finaliser of splitmix64 with Stafford's constants (variant 13); a bijection of 64 bits.
pub(crate) fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// Finaliser of murmur3 for 64 bits; other constants than [`mix`], so that two of them in a row do not cancel.
fn mix_again(mut value: u64) -> u64 {
    value = (value ^ (value >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    value = (value ^ (value >> 33)).wrapping_mul(0xC4CE_B9FE_1A85_EC53);
    value ^ (value >> 33)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const STREAMS: [Stream; 8] = [
        Stream::Order,
        Stream::Objective,
        Stream::MaskToken,
        Stream::MaskKind,
        Stream::RandomToken,
        Stream::SyntheticTraining,
        Stream::SyntheticEvaluation,
        Stream::TaskOrder,
    ];

    /// Chi-square statistic of counts against equal shares.
    fn chi_square(counts: &[u64]) -> f64 {
        let expected = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
        counts.iter().map(|&count| (count as f64 - expected).powi(2) / expected).sum()
    }

    /// Mean plus six standard deviations of a chi-square variable: mean k, variance 2k.
    fn chi_square_bound(degrees: usize) -> f64 {
        degrees as f64 + 6.0 * (2.0 * degrees as f64).sqrt()
    }

    #[test]
    fn units_are_uniform_along_every_input() {
        for stream in STREAMS {
            for place in 0..4 {
                let mut counts = [0u64; 64];
                for value in 0..64_000u64 {
                    let mut inputs = [7u64, 0, 0, 0];
                    inputs[place] = value;
                    let unit = draw_unit(inputs[0], stream, inputs[1], inputs[2], inputs[3]);
                    assert!((0.0..1.0).contains(&unit));
                    counts[(unit * 64.0) as usize] += 1;
                }
                assert!(chi_square(&counts) < chi_square_bound(63), "{stream:?} along input {place}: {}", chi_square(&counts));
            }
        }
    }

    #[test]
    fn neighbouring_counters_are_independent() {
        let mut counts = [0u64; 256];
        for value in 0..256_000u64 {
            let first = draw_u64(3, Stream::MaskToken, 0, 5, value) >> 60;
            let second = draw_u64(3, Stream::MaskToken, 0, 5, value + 1) >> 60;
            counts[(first * 16 + second) as usize] += 1;
        }
        assert!(chi_square(&counts) < chi_square_bound(255), "{}", chi_square(&counts));
    }

    #[test]
    fn one_input_bit_flips_about_half_of_the_output_bits() {
        for place in 0..4 {
            for bit in 0..64 {
                let mut flipped = 0;
                for base in 0..64u64 {
                    let mut inputs = [base, base + 1, base + 2, base + 3];
                    let before = draw_u64(inputs[0], Stream::Objective, inputs[1], inputs[2], inputs[3]);
                    inputs[place] ^= 1 << bit;
                    flipped += (before ^ draw_u64(inputs[0], Stream::Objective, inputs[1], inputs[2], inputs[3])).count_ones();
                }
                // 64 x 64 fair bits: mean 2048, standard deviation 32.
                assert!((2048 - 200..2048 + 200).contains(&flipped), "input {place} bit {bit}: {flipped}");
            }
        }
    }

    #[test]
    fn places_and_streams_do_not_meet() {
        let mut seen = BTreeSet::new();
        for stream in STREAMS {
            for value in 0..1000u64 {
                for inputs in [[value + 1, 0, 0], [0, value + 1, 0], [0, 0, value + 1]] {
                    assert!(seen.insert(draw_u64(0, stream, inputs[0], inputs[1], inputs[2])), "{stream:?} {inputs:?}");
                }
            }
        }
    }

    #[test]
    fn below_covers_its_range_evenly() {
        assert_eq!(below(0, 1), 0);
        assert_eq!(below(u64::MAX, 1), 0);
        assert_eq!(below(u64::MAX, u64::MAX), u64::MAX - 1);
        let mut counts = [0u64; 7];
        for value in 0..70_000 {
            counts[below(draw_u64(1, Stream::RandomToken, value, 0, 0), 7) as usize] += 1;
        }
        assert!(chi_square(&counts) < chi_square_bound(6), "{counts:?}");
    }
}
