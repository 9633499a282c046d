//! The number of workers changes who computes, not what is computed.

use crate::sandbox::{World, expect_close};

/// Workers add the same numbers in another order, which 32-bit floats round differently.
const RELATIVE_TOLERANCE: f64 = 1e-5;

#[test]
fn one_two_and_three_workers_train_alike() {
    let world = World::prepared();
    let losses = |workers: &str| {
        let name = format!("by-{workers}");
        world.train(&name, &["--workers", workers, "--quiet", "--set", "train.steps=12"]).losses()
    };
    let alone = losses("1");
    assert_eq!(alone.len(), 12);
    assert!(alone[&12] < alone[&1], "nothing was learned, so equal losses would say nothing");
    for workers in ["2", "3"] {
        let together = losses(workers);
        assert_eq!(together.len(), alone.len(), "{workers} workers");
        expect_close(&together, &alone, RELATIVE_TOLERANCE);
    }
}
