//! Operations that all workers of a generation take part in: sums, whole or by shares, broadcasts, barriers.
//!
//! One trait, several transports. Every transport gives equal bits on all ranks, bounds every wait, names the ranks in its
//! errors and can be aborted from another thread. A world of one is still a world.

pub mod api;
pub mod local;
pub mod nccl;

mod course;
mod handshake;
mod header;
mod layout;
mod leader;
mod link;

#[cfg(test)]
mod conformance;

pub use api::{AbortHandle, Collective, CollectiveError, DeviceFloats};
pub use layout::share_of;
pub use leader::{is_leader, leader_work};
