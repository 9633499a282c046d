//! The plots of a report, each with its numbers as a table.

mod confusion;
mod curves;
mod figure;
mod spread;
mod swept;

pub(super) use confusion::left_out;
pub(super) use figure::figures;
pub use figure::{Figure, Numbers};
