//! The subcommands of `cloze`, one module for each group of them.

pub mod arguments;
pub mod bench;
pub mod checkpoints;
pub mod data;
pub mod describe;
pub mod hosts;
pub mod jobs;
pub mod join;
pub mod load;
pub mod places;
pub mod plan;
pub mod preflight;
pub mod report;
pub mod reproduce;
pub mod run;
pub mod runs;
pub mod simulate;
pub mod status;
pub mod submit;
pub mod sweep;
pub mod worker_process;

mod bucket_runs;
mod errors;
mod expectation;
mod inputs;
mod operation;
mod partition;
mod run_place;
mod trial;

pub use errors::{error_text, start_logging};
