//! Folders and buckets behind one interface, with bounded waits and errors that a user can act on.
//!
//! [`open`] takes a path, `file://`, `s3://`, `gs://` or `az://` url. The calls block, so that programs without an async runtime can
//! use them; they must not be made from inside async code. Everything slow has a bound: see the constants in `cloud.rs` and `upload.rs`.

mod calls;
mod cloud;
mod failure;
#[cfg(test)]
mod fixtures;
mod location;
mod probe;
mod reader;
mod upload;
mod whole;

pub use calls::{ObjectInfo, block_on, delete, head, list, list_below, put, put_if_absent, read_range, size_of};
pub use failure::explain;
pub use location::{Store, open};
pub use probe::{ConditionalPut, probe_conditional_put};
pub use reader::ObjectReader;
pub use upload::{Written, put_pieces, remove_leftovers};
pub use whole::{read_all, read_hashed};
