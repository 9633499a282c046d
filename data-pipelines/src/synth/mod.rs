//! A generated corpus: many small tasks in FLAN's form, their evaluation files, and a tokenizer to go with them.
//!
//! It lets the whole path from records to a scored model run on a bare machine in minutes. Everything follows from one seed.

mod corpus;
mod dice;
mod files;
mod instances;
mod tasks;
pub(crate) mod vocabulary;
mod words;

pub use corpus::{SynthOptions, SynthReport, synth};
