//! Readers of the event stream: the terminal, `events.jsonl`, `failures.jsonl`, `TensorBoard`, the dashboard and the
//! bucket's registry.
//!
//! The launcher hands every event to [`Reporters`], which stamps it with the time once and gives it to each reader. A reader
//! that cannot write ends the run with a failure of kind `Storage`.

mod all;
mod failures;
mod jsonl;
pub(crate) mod numbers;
mod registry;
mod sentences;
mod tensorboard;
mod terminal;

pub use all::Reporters;
pub(crate) use all::terminal;
pub use failures::FailureLog;
pub use jsonl::Jsonl;
pub use tensorboard::TensorBoard;
pub use terminal::{Terminal, TerminalStyle};
