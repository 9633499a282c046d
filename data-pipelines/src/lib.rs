//! From record files in a folder or a bucket to the batches of a training step.
//!
//! Preparation runs once: [`store`] opens a folder or a bucket, [`tokenizer`] turns text into ids, [`record`] reads records,
//! [`select`] decides which samples of a task are kept, [`shard`] and [`manifest`] are the files on disk, [`prepare`] is the
//! whole of it. Training reads what preparation wrote: [`dataset`] gives one sample, [`draw`] and [`permutation`] are the
//! randomness that needs no state, [`batch`] and [`mask`] make a batch a pure function of recipe and step. [`synth`] writes a
//! corpus to try it all on and [`inspect`] prints what the model will see.

pub mod store;
pub mod tokenizer;

pub mod record;
pub mod select;

mod files;
pub mod shard;

pub mod manifest;

pub mod prepare;

pub mod dataset;

pub mod draw;
pub mod permutation;

pub mod batch;
pub mod mask;

pub mod synth;

pub mod inspect;

#[cfg(test)]
pub(crate) mod fixtures;
