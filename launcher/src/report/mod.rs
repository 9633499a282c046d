//! What runs came to, beside what a paper says: tables with verdicts, and plots.
//!
//! | step | module | in | out |
//! |---|---|---|---|
//! | read | `material` | run folders, a study folder | trials with recipe, events and scores, and notes on what could not be read |
//! | judge | `table`, `verdict` | trials, what is expected | rows and columns with mean, deviation, interval and verdict |
//! | draw | `charts` | trials, rows | figures as SVG, each with its numbers |
//! | show | `text`, `page` | the report | terminal, Markdown, JSON, one HTML page |
//!
//! A file that is missing or damaged is named in the report and passed over; only a folder that holds nothing at all is a failure.
//! Reading is bounded: every file has a largest size, and of long event logs evenly spread parts are read.

pub mod statistics;

pub(crate) mod bounded;
pub(crate) mod evaluation;
pub(crate) mod event_sample;
pub(crate) mod loaded_run;
pub(crate) mod study_folder;

mod best_of;
mod charts;
mod material;
mod page;
mod score;
mod study_report;
mod svg;
mod table;
mod text;
mod verdict;

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;

pub use charts::{Figure, Numbers};
pub use study_report::{ReportFormat, StudyReport, report_folders, report_study};
pub use table::{Column, Row, ScoreTable, TrialEntry};
pub use verdict::{Cell, Order, OrderVerdict, Verdict};
