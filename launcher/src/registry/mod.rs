//! All runs below some folders: found, listed, searched and compared, from their own files and without a server.
//!
//! There is no index that could be out of date: a listing reads the ends of every run's event log, its scores and its recipe. Which run
//! came from which stands in the files of a study's trials. In a bucket, each run leaves a record beside its checkpoints.

mod difference;
mod entry;
mod find;
mod parents;
mod record;
mod text;

pub use difference::{Difference, KeyDifference, MetricDifference, Side, compare};
pub use entry::{CheckpointCount, RunEntry, entries};
pub use find::{DEFAULT_ROOTS, find_runs};
pub use record::{RECORD_FILE, RecordPlace, RunRecord, publish, publish_run};
pub use text::{difference_text, entry_text, list_text};
