//! .
pub mod failure;
pub mod recipe;
