//! The subcommands of `cloze`, one module for each group of them.

pub mod arguments;
pub mod data;
pub mod describe;
pub mod run;
pub mod worker_process;

mod errors;

pub use errors::{error_text, start_logging};
