//! Other machines, and what is started there: through a remote shell, or by a batch system's step command.
//!
//! A [`RemoteHost`] is a name and the words that stand before a command line. What runs there is always `cloze` itself; it finds the
//! run's token in the run folder, so that no secret is ever part of a command line.

mod remote;

pub use remote::{CommandForm, RemoteHost, shell_line};
