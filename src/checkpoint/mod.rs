//! Checkpoints: folders of `safetensors` files in a bucket or on a disk that are whole or invisible.
//!
//! Every worker writes its share of the state. When all of them have, the leader writes the manifest, which states the size and the hash
//! of each file. A load takes the newest manifest whose files all agree with it. The folders open in Hugging Face `transformers` as they
//! are, except where a tensor is divided over several files.

pub mod hf;

mod atomic;
mod copies;
mod format;
mod manifest;
mod pieces;

mod cache;
mod retention;

mod store;

mod commit;
mod load;
mod prune;

mod difference;
mod report;

pub use atomic::atomic_write;
pub use copies::Copies;
pub use difference::{Difference, difference};
pub use format::NamedTensorOwned;
pub use manifest::{CheckpointState, step_of_folder};
pub use pieces::Piece;
pub use report::{Overview, Verification};
pub use retention::MIN_KEPT_GOOD;
pub use store::{CheckpointStore, Loaded, Share, StorePolicy};

#[cfg(test)]
mod tests;
