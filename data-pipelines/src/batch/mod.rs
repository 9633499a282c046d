//! `batch(recipe, step)` is pure: which samples a step trains on, how they are packed and masked, from integers alone.
//!
//! The world size does not enter before [`assign`], which only deals finished packs out. So the examples and their masks
//! are the same at any number of workers, and a run can start at any step without replay.

mod build;
#[cfg(test)]
pub(crate) mod fixture;
mod mixture;
mod pack;
mod plan;
mod source;

pub use build::{Pack, batch, worker_batch};
pub use mixture::Mixture;
pub use pack::{assign, pack};
pub use plan::{BatchPlan, BatchSpec, Slot, slots, total_steps};
pub use source::SampleSource;
