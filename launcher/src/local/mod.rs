//! One run on this machine: a coordinator, N worker processes, and a loop that keeps them alive.
//!
//! | task          | name (tracing span) | on error                                      | on stop                                         |
//! |---------------|---------------------|-----------------------------------------------|-------------------------------------------------|
//! | the loop      | the caller's thread | kills the workers and returns the error       | ask, wait, kill, report                         |
//! | coordinator   | `coordinator`       | the loop returns its error                    | `Control::Stop`; dropped with the loop          |
//! | a process     | `worker process`    | kills its process; the exit carries the error | killed after the deadline, or with the launcher |
//!
//! A worker process is killed when its task is dropped, and leaves by itself when the coordinator's connection closes, so that
//! none outlives the launcher, however the launcher ends.

mod launch;
mod log;
mod process;
mod restart;
mod signals;
mod supervisor;

pub use launch::{LaunchOptions, PlannedFault, launch};
