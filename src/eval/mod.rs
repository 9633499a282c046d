//! Evaluation: rows become prompts with a mask, the labels' words are scored there, and the scores become a table.

pub mod metrics;
pub mod prompt;
pub mod report;
pub mod rows;
pub mod score;
pub mod task;
