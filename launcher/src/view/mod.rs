//! A run as a person looks at it: what stands in its events, put together.
//!
//! [`RunView`] is a pure fold of recorded events. The dashboard folds them as they happen, `cloze status` and `cloze watch`
//! read them from the log ([`EventLog`]); all show the same view. [`ledger`] makes the records of `failures.jsonl`.

mod curve;
mod event_log;
mod live;
mod progress;
mod run;
mod text;
mod worker;

pub mod ledger;

#[cfg(test)]
pub(crate) mod fixtures;

pub use curve::{Curve, MAX_POINTS, Point};
pub use event_log::EventLog;
pub use ledger::{Decision, FailureRecord, Ledger};
pub use live::controller_lives;
pub use progress::Progress;
pub use run::{CheckpointView, RunState, RunView, Seen, StepUpdate, Totals, WarningView};
pub use text::{status_line, status_page};
pub use worker::{WorkerState, WorkerView};
