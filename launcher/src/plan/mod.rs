//! What a run will need, before it is started. Nothing here does I/O: facts in, numbers and verdicts out.

pub mod check;
pub mod facts;
pub mod memory;
pub mod run_plan;

#[cfg(test)]
mod sample;

pub use check::{Check, CheckLevel, check_clock, check_memory, check_time, duration};
pub use facts::{DataFacts, MachineFacts, PlanFacts, TrialFacts};
pub use memory::{MemoryPlan, memory, parameters};
pub use run_plan::{CheckpointPlan, DataPlan, MemoryUse, RunPlan, SweepPlan, TimePlan, TokenPlan};
