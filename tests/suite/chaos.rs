//! Faults of every kind, one after another, leave no trace in what was trained. `scripts/chaos.sh` runs the same with many more.

use crate::chaos::{ChaosOptions, run};

#[test]
fn chaos_schedule() {
    run(&ChaosOptions::from_environment());
}
