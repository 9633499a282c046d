//! Starts a run and keeps it alive: the run folder, worker processes of this machine, and what the user sees.
//!
//! [`launch`] owns the coordinator and the worker processes of one run until it ends. Every event of the run goes through
//! one [`reporter::Reporters`] to the terminal, `events.jsonl` and `TensorBoard`.

pub mod local;
pub mod reporter;
pub mod run_folder;

#[cfg(test)]
mod sample;

pub use cloze_cluster::RunEnd;
pub use local::{LaunchOptions, PlannedFault, launch};
pub use reporter::TerminalStyle;
pub use run_folder::{NewRun, RunFolder, RunInfo};
