//! Runs on a cluster whose batch system is SLURM.
//!
//! `client.rs` is the batch system: a few calls with deadlines, over `command.rs`; `parse.rs` reads what its programs print, and
//! `version.rs` says what differs between versions. `script.rs` writes batch scripts. `submission.rs` submits the jobs of one run, never
//! twice, by way of `journal.rs`. `allocation.rs` is what such a job executes: it takes the run to its end or to the end of the job, by
//! way of `attempt.rs`, which `trial.rs` shares: it does the same for a trial of a sweep, without deciding what follows.
//! Four decisions are pure: whether a job begins (`begin.rs`), what follows at its end (`verdict.rs`), which bad nodes are left out
//! (`exclusion.rs`, for sweeps too), when to ask again and when to give up (`poll.rs`).
//!
//! | task             | name               | on error                                       | on stop                               |
//! |------------------|--------------------|------------------------------------------------|---------------------------------------|
//! | a program's pipe | `output`, `complaints` | the call fails                             | ends with the program                 |
//! | a sleeping step  | `preemption watch` | a warning; preemption is then heard of later   | asked, killed after 5 s, with its job |
//!
//! Nothing outside this folder knows the batch system, besides the command line.

mod allocation;
mod attempt;
mod begin;
mod client;
mod command;
mod element;
mod exclusion;
mod job;
mod journal;
mod log_end;
mod logs;
mod machines;
mod overview;
mod parse;
mod partition;
mod paths;
mod poll;
mod preflight;
mod quote;
mod script;
mod snapshot;
mod submission;
mod trial;
mod verdict;
mod version;
mod watch;

pub use allocation::{AllocationOptions, JobOutcome, run_in_job};
pub use client::{PARTITION_KEY, SUBMIT_SETTLED_S, Slurm, Told};
pub use element::array_element;
pub use exclusion::{Avoided, avoid};
pub use job::{ExitStatus, JobId, JobState, State};
pub use journal::{AttemptEvent, JobEvent, JobRecord, Role};
pub use logs::{LogChoice, show_logs};
pub use machines::{has_container, step_on_this_node};
pub use overview::{AttemptView, JobView, JobsView, jobs_text, view_jobs};
pub use partition::{Fit, NodeGroup, Partition, Wish};
pub use paths::JobPaths;
pub use poll::{SILENCE_MAX_S, Silence, after_silence, next_poll};
pub use preflight::{BadNode, NodeCheck, check_this_node};
pub use quote::{shell_word, shell_words};
pub use script::{ArrayRange, Dependency, JobRequest, container_options, cpus_per_node, render};
pub use snapshot::Programs;
pub use submission::{Jobs, Submission, Wanted, mark_cancelled, unfinished_jobs, unmark_cancelled};
pub use trial::{TrialNodes, TrialNodesEnd, run_over_nodes};
pub use verdict::Decision;
pub use version::{Dialect, Version};

#[cfg(test)]
pub(crate) use client::fixtures;
pub(crate) use client::other_cluster;
