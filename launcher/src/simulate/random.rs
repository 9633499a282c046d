//! Random numbers without a state: every draw is a hash of a seed, a purpose and a counter.
//!
//! The same counter gives the same draw whatever else was drawn, so two arrangements of one seed meet the same failures, and their
//! difference is not noise.

/// What a draw is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Time from one failure to the next, by the number of the failure.
    FailureGap = 1,
    /// Class of a failure, by its number.
    FailureClass = 2,
    /// The slowest GPU of a step, by the step.
    Slowest = 3,
    /// Time from one failure of the coordinator to the next, by its number.
    CoordinatorGap = 4,
}

/// Odd constants that keep seed, purpose and counter apart.
const PLACE_CONSTANTS: [u64; 3] = [0x9E37_79B9_7F4A_7C15, 0xD1B5_4A32_D192_ED03, 0xABC9_8388_FB8F_AC03];

/// All draws of one seed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draws {
    seed: u64,
}

impl Draws {
    /// The draws of a seed.
    pub(super) fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// A uniform number in (0, 1): the middle of one of 2^53 equal pieces, so that its logarithm is finite.
    pub(super) fn unit(self, purpose: Purpose, counter: u64) -> f64 {
        let mut state = 0;
        for (input, constant) in [self.seed, purpose as u64, counter].into_iter().zip(PLACE_CONSTANTS) {
            state = mix(state ^ mix(input.wrapping_add(constant)));
        }
        // The last piece would round up to 1.
        (((state >> 11) as f64 + 0.5) / (1_u64 << 53) as f64).min(1.0 - f64::EPSILON / 2.0)
    }

    /// An exponentially distributed time with this mean.
    pub(super) fn exponential(self, purpose: Purpose, counter: u64, mean: f64) -> f64 {
        -mean * self.unit(purpose, counter).ln()
    }
}

/// Finaliser of splitmix64; a bijection of 64 bits.
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PURPOSES: [Purpose; 4] = [Purpose::FailureGap, Purpose::FailureClass, Purpose::Slowest, Purpose::CoordinatorGap];

    #[test]
    fn units_are_uniform_for_every_purpose() {
        for purpose in PURPOSES {
            let mut counts = [0_u32; 16];
            for counter in 0..16_000 {
                let unit = Draws::new(7).unit(purpose, counter);
                assert!(unit > 0.0 && unit < 1.0);
                counts[(unit * 16.0) as usize] += 1;
            }
            let chi_square: f64 = counts.iter().map(|&count| (f64::from(count) - 1000.0).powi(2) / 1000.0).sum();
            // 15 degrees of freedom: mean 15, standard deviation 5.5; six of them.
            assert!(chi_square < 48.0, "{purpose:?}: {chi_square}");
        }
    }

    #[test]
    fn exponential_times_have_their_mean_and_spread() {
        let times: Vec<f64> = (0..20_000).map(|counter| Draws::new(1).exponential(Purpose::FailureGap, counter, 50.0)).collect();
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        let variance = times.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / times.len() as f64;
        assert!((mean - 50.0).abs() < 2.0, "{mean}");
        assert!((variance.sqrt() - 50.0).abs() < 3.0, "{variance}");
    }

    #[test]
    fn seeds_and_purposes_differ() {
        let first = Draws::new(1).unit(Purpose::FailureGap, 0);
        assert_eq!(first.to_bits(), Draws::new(1).unit(Purpose::FailureGap, 0).to_bits());
        assert_ne!(first.to_bits(), Draws::new(2).unit(Purpose::FailureGap, 0).to_bits());
        assert_ne!(first.to_bits(), Draws::new(1).unit(Purpose::CoordinatorGap, 0).to_bits());
    }
}
