//! A run at a size that is not at hand, computed from measured costs: how much of its time is useful, and what the rest is lost to.
//!
//! | step | module | in | out |
//! |---|---|---|---|
//! | read | `read` | a YAML file | [`Costs`], or every problem in it |
//! | model | `model` | costs, number of GPUs | seconds of a step, a save, a restore |
//! | simulate | `engine` | costs, one [`Case`], a seed | one [`Outcome`]; pure, the same for the same seed |
//! | compare | `study` | many cases and seeds | means with their confidence, beside the closed form of Young and Daly |
//! | check | `replay` | the events of a finished run | predicted wall time beside the measured one |
//!
//! Nothing here starts a process or reads a clock.

mod closed_form;
mod costs;
mod engine;
mod mechanisms;
mod model;
mod queue;
mod random;
mod read;
mod recovery;
mod replay;
mod spent;
mod study;

pub use costs::{
    AllReduce, CheckpointCosts, ClassCosts, CoordinatorCosts, Costs, FailureCosts, LinkCosts, Loses, NetworkCosts, RecoveryCosts,
    RunLength, StepCosts,
};
pub use engine::{Case, Outcome, ScheduledFailure, simulate, simulate_schedule};
pub use mechanisms::Mechanisms;
pub use read::read;
pub use replay::{Interruption, Observed, Prediction, observe, predict, read_events};
pub use spent::{Cause, Spent};
pub use study::{ArrangementReport, CauseShare, Interval, Seeds, SizeReport, Study, study};

#[cfg(test)]
mod sample;
#[cfg(test)]
mod tests;
