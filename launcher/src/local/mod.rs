//! A run as seen from one machine: the coordinator, worker processes, and a loop that keeps them alive.
//!
//! | task          | name (tracing span) | on error                                      | on stop                                         |
//! |---------------|---------------------|-----------------------------------------------|-------------------------------------------------|
//! | the loop      | the caller's thread | kills the workers and returns the error       | ask, wait, kill, report                         |
//! | coordinator   | `coordinator`       | the loop returns its error                    | `Control::Stop`; dropped with the loop          |
//! | a process     | `worker process`    | its exit carries the error                    | killed after the deadline, or with its task     |
//!
//! A launcher that ends in order leaves no worker behind. One that is killed leaves them all: they train on, look for a coordinator
//! for a while, and the next launcher finds them by `processes/` and `control.json` and takes them over. `cloze join` runs the same
//! processes under a loop of its own, without a coordinator.

mod adoption;
mod contact;
mod crew;
mod drill;
mod dump;
mod event_tail;
mod launch;
mod log;
mod process;
mod record;
mod restart;
pub(crate) mod signals;
mod slot_locks;
mod slots;
mod supervisor;
mod told;

pub(crate) use adoption::forget_earlier;
pub use drill::{Drill, DrillKind};
pub use launch::{HostsEnd, LaunchOptions, LaunchPlan, launch, launch_on_hosts};
pub(crate) use record::{is_same_process, session_of, start_ticks};
pub use slots::{SlotsOptions, last_local_workers, last_workers, serve_slots};
