//! Other machines, and what is started there: through a remote shell, or by a batch system's step command.
//!
//! A [`RemoteHost`] is a name and the words that stand before a command line. What runs there is always `cloze` itself; it finds the
//! run's token in the run folder, so that no secret is ever part of a command line. `crew.rs` keeps one `cloze join` alive on each host
//! of a run; `restart.rs` decides, purely, what to do when one ends.

mod crew;
mod preparation;
mod remote;
mod restart;

pub use crew::{HostSlots, HostsPlan};
pub use preparation::Preparation;
pub use remote::{CommandForm, RemoteHost, is_name_of, shell_line};

pub(crate) use crew::{HostCrew, HostEvent};
pub(crate) use restart::HostDecision;
