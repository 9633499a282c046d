//! Starts a run and keeps it alive: the run folder, worker processes of this machine, and what the user sees.
//!
//! [`launch`] owns the coordinator and the worker processes of one run until it ends. Every event of the run goes through
//! one [`reporter::Reporters`] to the terminal, `events.jsonl`, `failures.jsonl`, `TensorBoard` and the dashboard. [`serve_slots`] owns
//! worker processes of a run whose controller is on another host.

pub mod dashboard;
pub mod hosts;
pub mod local;
pub mod plan;
pub mod preflight;
pub mod registry;
pub mod report;
pub mod reporter;
pub mod run_folder;
pub mod simulate;
pub mod slurm;
pub mod sweep;
pub mod view;
pub mod words;

#[cfg(test)]
mod sample;

pub use cloze_cluster::RunEnd;
pub use local::{
    Drill, DrillKind, HostsEnd, LaunchOptions, LaunchPlan, SlotsOptions, last_local_workers, last_workers, launch, launch_on_hosts,
    serve_slots,
};
pub use reporter::TerminalStyle;
pub use run_folder::{ControlFile, NewRun, RunFolder, RunInfo, RunPaths};
