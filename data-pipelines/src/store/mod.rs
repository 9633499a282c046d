//! Folders and buckets behind one interface, with bounded waits and errors that a user can act on.
//!
//! [`open`] takes a path, `file://` or `s3://` url. The calls block, so that programs without an async runtime can use them;
//! they must not be made from inside async code. Everything slow has a bound: see the constants in `location.rs`.

mod calls;
mod failure;
mod location;
mod reader;

pub use calls::{ObjectInfo, block_on, delete, head, list, put, read_all};
pub use failure::explain;
pub use location::{Store, open};
pub use reader::ObjectReader;
