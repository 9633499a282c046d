//! Membership of a run: which workers are there, who is lost, and which generation trains.
//!
//! One coordinator owns the truth. Workers join it over TCP, prove that they know the run's token and carry the same recipe
//! and build, and send heartbeats. When all of them are there, the coordinator starts a generation; when one is lost, it
//! aborts the generation and waits for a replacement. Everything that is worth telling a user leaves as an [`Event`].
//!
//! The decision itself is [`membership::decide`], a pure function of a clock reading, a state and limits.

pub mod client;
pub mod coordinator;
pub mod event;
pub mod host;
pub mod membership;
pub mod protocol;
pub mod secret;

pub use client::{Client, EVERY_GENERATION, JoinOptions};
pub use coordinator::{Control, Coordinator, CoordinatorOptions, RunEnd};
pub use event::{Event, Recorded};
pub use protocol::{CoordinatorMessage, JoinRequest, Phase, StepReport, WorkerMessage};
pub use secret::Secret;
