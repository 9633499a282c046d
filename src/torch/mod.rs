//! What libtorch has and tch does not expose: packed-token operations with flat gradients, fused `AdamW`, CUDA at run time.
//!
//! This folder holds the package's only `unsafe` code: calls into the C++ shim (`shim.hpp` documents each) and views of tensor memory.

pub mod cuda;
pub mod memory;
pub mod ops;
pub mod overlap;
mod sys;
