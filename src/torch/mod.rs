//! What libtorch has and tch does not expose: packed-token operations with flat gradients, fused `AdamW`, memory that is given
//! back and taken again, CUDA at run time.
//!
//! This folder and `src/collective/nccl/` hold the package's only `unsafe` code; here it is calls into the C++ shim (`shim.hpp` documents each) and views of tensor memory.

pub mod cuda;
pub mod listen;
pub mod memory;
pub mod ops;
mod sys;
