//! The subcommands of `cloze`, one module for each group of them.

pub mod arguments;
pub mod checkpoints;
pub mod data;
pub mod describe;
pub mod join;
pub mod load;
pub mod plan;
pub mod report;
pub mod reproduce;
pub mod run;
pub mod runs;
pub mod simulate;
pub mod status;
pub mod sweep;
pub mod worker_process;

mod bucket_runs;
mod errors;

pub use errors::{error_text, start_logging};
