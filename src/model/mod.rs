//! Models over packed tokens: one self-contained file per architecture, and what they share.

pub mod config;
pub mod folder;
pub mod modernbert;
pub mod packed;
pub mod parameters;
pub mod pieces;

#[cfg(test)]
mod tests;
