//! The coordinator: one tokio loop that owns the membership.
//!
//! | task          | name (tracing span)      | on error                                | on stop                                    |
//! |---------------|--------------------------|-----------------------------------------|--------------------------------------------|
//! | the loop      | the caller's task        | returns it; the run is over             | says farewell and drops all outboxes       |
//! | the reception | `coordinator reception`  | logs it and accepts again after a while | waits half a second for the last messages  |
//! | a connection  | `coordinator connection` | tells the loop `Closed` with the reason | ends when the loop drops its outbox        |
//!
//! Connection tasks read, check and forward; they decide nothing. The loop applies what
//! [`membership::decide`](crate::membership::decide) says.

mod admission;
mod connection;
mod reception;
mod roster;
mod server;

pub use server::{Control, Coordinator, CoordinatorOptions, RunEnd};
