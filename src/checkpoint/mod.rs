//! Checkpoints: folders of `safetensors` files in a bucket or on a disk that are whole or invisible.
//!
//! A save writes the files first and the manifest, which states the size and the hash of each, last. A load takes the newest
//! manifest whose files all agree with it. The folders open in Hugging Face `transformers` as they are.

pub mod hf;

mod atomic;
mod format;
mod manifest;
mod retention;
mod store;

pub use atomic::atomic_write;
pub use format::NamedTensorOwned;
pub use manifest::CheckpointState;
pub use store::{CheckpointStore, Loaded, Saved};
