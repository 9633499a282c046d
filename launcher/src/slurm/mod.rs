//! Runs on a cluster whose batch system is SLURM.

mod client;
mod command;
mod element;
mod job;
mod journal;
mod parse;
mod partition;
mod paths;
mod poll;
mod quote;
mod script;
mod snapshot;
mod verdict;
mod version;

pub use client::Slurm;
pub use element::array_element;
pub use job::{ExitStatus, JobId, JobState, State};
pub use partition::{Partition, Wish};
pub use poll::next_poll;
pub use quote::{shell_word, shell_words};
pub use script::{ArrayRange, Dependency, JobRequest, container_options, cpus_per_node, render};
pub use snapshot::Programs;
pub use version::{Dialect, Version};
