//! Records of instruction tuning data: which files there are, and what stands in them.
//!
//! [`list_inputs`] finds the files of a recipe's sources, [`RecordReader`] reads one of them in bounded chunks, and
//! [`Chunk::for_each`] parses the records, which can happen on another thread than the reading.

mod fields;
mod input;
mod lines;
mod reader;
mod table;

pub use fields::Record;
pub use input::{Format, Input, list_inputs};
pub use reader::{Chunk, RecordReader, content_hash};
