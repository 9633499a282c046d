//! Membership of a run: which workers are there, who is lost, and which generation trains.
//!
//! One coordinator owns the truth. Workers join it over TCP, prove that they know the run's token and carry the same recipe
//! and build, and send heartbeats. When all of them are there, the coordinator starts a generation; when one is lost, it
//! aborts the generation and waits for a replacement, or goes on with fewer where the recipe allows it. When the coordinator
//! itself is lost, workers train on and join its successor, which reads the journal and lets the generation go on. Everything
//! that is worth telling a user leaves as an [`Event`].
//!
//! The decision itself is [`membership::decide`], a pure function of a clock reading, a state and limits.

pub mod client;
pub mod coordinator;
pub mod environment;
pub mod event;
pub mod host;
pub mod journal;
pub mod load;
pub mod membership;
pub mod protocol;
pub mod secret;
pub mod tls;

pub use client::{Client, EVERY_GENERATION, JoinOptions, report_exit};
pub use coordinator::{Control, Coordinator, CoordinatorOptions, RunEnd};
pub use event::{Event, Recorded};
pub use journal::{Journal, Memory, Past};
pub use membership::HangLimits;
pub use protocol::{
    CoordinatorMessage, ExitReport, FailureClass, Held, JoinRequest, Phase, SavedFile, Share, StateSource, StepReport, Unreported,
    WorkerMessage,
};
pub use secret::Secret;
pub use tls::{PinnedKey, RunKey};
