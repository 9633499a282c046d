//! From record files to shards, once for a recipe.
//!
//! [`prepare`] goes over the inputs in two passes. The first reads every file (decoding, parsing and tokenising on all cores) and
//! leaves one *part* for each in `.parts` below the output folder: the samples that passed all filters, tokenised. Parts are
//! named by everything they depend on and appear whole, so that an interrupted preparation goes on with the files that are
//! missing. The second pass knows how many samples each task has, finds the cap, and copies the samples that are kept into
//! shards. The manifest is written last.
//!
//! | file | does |
//! |---|---|
//! | `run.rs` | the order of it all; start here |
//! | `settings.rs` | what a preparation depends on, and whether the folder is up to date |
//! | `pipeline.rs` | threads and queues of the first pass |
//! | `template.rs`, `sample.rs` | a record becomes tokens |
//! | `tasks.rs`, `parts.rs` | counts by task, part files |
//! | `write.rs` | cap, draw, shards, manifest |

mod parts;
mod pipeline;
mod run;
mod sample;
mod settings;
mod tasks;
mod template;
mod write;

pub use run::{PrepareOptions, PrepareOutcome, ProgressLine, prepare};
pub use settings::check_prepared;
