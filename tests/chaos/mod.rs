//! Faults of every kind, one after another, against one real run; at the end nothing of them may show in what was trained.
//!
//! `schedule.rs` says which faults come in which order, `stage.rs` holds what they happen to, `faults.rs` lets one happen and measures it,
//! `history.rs` compares what was trained with a run without faults, `remains.rs` looks for what was left behind, and `table.rs` prints
//! what was measured. `run.rs` puts them together.

mod faults;
mod history;
mod remains;
mod run;
mod schedule;
mod stage;
mod table;

pub use run::{ChaosOptions, run};
