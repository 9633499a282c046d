//! Checks of the machines of an allocation before step 0: devices that compute rightly and fast enough, links between all pairs of
//! nodes, the place of the checkpoints, clocks. The nodes that are to blame are named with a reason.
//!
//! | file | does |
//! |---|---|
//! | `runner.rs` | starts an agent on every node, asks for one measurement after another; start here |
//! | `agent.rs` | what runs on a node, and answers |
//! | `protocol.rs` | what the two say to each other, as lines of JSON through the agent's standard input and output |
//! | `link.rs` | how two agents measure the bandwidth between them |
//! | `schedule.rs` | which pairs measure at the same time, pure |
//! | `decision.rs` | from measurements to bad nodes, pure |
//!
//! The agents and the runner share a fresh secret, which travels through standard input only.

mod agent;
mod decision;
mod link;
mod protocol;
mod runner;
mod schedule;

pub use agent::{AgentTools, run_agent};
pub use decision::{BadNode, decide};
pub use protocol::{DeviceMeasurement, Measurements, NodeMeasurement, PairMeasurement, Setup};
pub use runner::{NodeOptions, PreflightOptions, PreflightReport, run_preflight};
