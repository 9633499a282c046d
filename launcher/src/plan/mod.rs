//! What a run will need, before it is started.

pub mod memory;

pub use memory::{MemoryPlan, memory, parameters};
