//! Other machines, and what is started there: through a remote shell, or by a batch system's step command.
//!
//! A [`RemoteHost`] is a name and the words that stand before a command line. What runs there is always `cloze` itself; it finds the
//! run's token in the run folder, so that no secret is ever part of a command line. `crew.rs` keeps one `cloze join` alive on each host
//! of a run; `restart.rs` decides, purely, what to do when one ends.

mod crew;
mod remote;
mod restart;

pub use crew::{HostSlots, HostsPlan};
pub use remote::{CommandForm, RemoteHost, shell_line};

pub(crate) use crew::{HostCrew, HostEvent};
pub(crate) use restart::HostDecision;
