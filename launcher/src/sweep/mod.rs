//! Many runs of one recipe: trials by content hash, handed to machines, scored, and never done twice.
//!
//! | process                | name                        | on error                               | on stop                              |
//! |------------------------|-----------------------------|----------------------------------------|--------------------------------------|
//! | the controller         | the caller's thread         | ends; what is out goes on              | asks what is out to save, waits      |
//! | an element             | `cloze sweep work`          | its outcomes carry the errors          | asks its runs to save, ends the rest |
//! | a visit of a host      | `cloze sweep visit`         | its host is left out for a while       | ends by itself, within a bound       |
//! | training over nodes    | `cloze sweep train`         | its failure becomes the outcome        | SIGUSR2                              |
//! | a program of a trial   | `cloze train`, `eval`, …    | its failure becomes the outcome        | SIGUSR2 to runs, SIGTERM to others   |
//!
//! [`graph`] finds what trials share, [`decide`] and [`ladder`] say what happens next, [`controller`] does it. Records
//! ([`record`], [`journal`]) are written by the controller alone; an element ([`work`]) leaves outcomes, which the controller takes in.

pub mod batch;
pub mod claim;
pub mod controller;
pub mod decide;
pub mod executor;
pub mod folder;
pub mod graph;
pub mod hosts;
pub mod journal;
pub mod ladder;
pub mod lease;
pub mod leave;
pub mod local;
pub mod lock;
pub mod lost;
pub mod open;
pub mod outlook;
pub mod queue;
pub mod record;
pub mod same_data;
pub mod share;
mod short;
pub mod steps;
pub mod talk;
pub mod text;
pub mod unreached;
pub mod visit;
pub mod work;

mod beat;
#[cfg(test)]
mod fixtures;
mod site_choice;
mod tether;
mod time;
mod waits;
