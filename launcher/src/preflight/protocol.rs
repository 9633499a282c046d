//! What runner and agents say to each other, and what comes out of it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use cloze_cluster::Secret;
use serde::{Deserialize, Serialize};

/// Longest line between runner and agent, in bytes; the device check of 16 GPUs takes a few thousand.
pub(super) const MAX_LINE_BYTES: usize = 1 << 20;

/// What an agent must know. There are no secrets in it but the one of this check.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Proves to other agents that they belong together.
    pub secret: Secret,
    /// The node's name in the list of nodes.
    pub node: String,
    /// The worker binary, under the same path on every node.
    pub worker_binary: PathBuf,
    /// `cpu` or `cuda`
    pub device: String,
    /// Devices that are checked, from 0.
    pub num_devices: u32,
    /// Whether products in bfloat16 are checked too.
    pub bfloat16: bool,
    /// Where checkpoints go: a path or a URL.
    pub place: String,
    /// Options of that store.
    pub options: BTreeMap<String, String>,
    /// Longest time of one task of the node, in seconds.
    pub task_timeout_s: u64,
}

/// What the runner asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub(super) enum Request {
    /// The first one.
    Setup(Box<Setup>),
    /// The clock, in microseconds since 1970.
    Clock,
    /// The check of all devices.
    Devices,
    /// A small object, written to the place of the checkpoints and deleted.
    Store,
    /// The bandwidth to another agent and back.
    Measure(Peer),
}

/// Another agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Peer {
    /// Its node.
    pub node: String,
    /// Names or addresses of its host, the likeliest first.
    pub hosts: Vec<String>,
    /// Where it listens.
    pub port: u16,
    /// How long each direction is measured, in milliseconds.
    pub window_ms: u64,
}

/// What an agent answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// To the setup.
    Ready(Ready),
    /// Microseconds since 1970.
    Clock(i64),
    /// One for each device.
    Devices(Vec<DeviceMeasurement>),
    /// Seconds of the write.
    Store(f64),
    /// Megabits a second there and back.
    Measure {
        /// From the agent that was asked.
        up: f64,
        /// To it.
        down: f64,
    },
    /// What went wrong.
    Failed(String),
}

/// Where an agent can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ready {
    /// Name of its host, as the kernel knows it.
    pub host: String,
    /// What tells machines apart, whatever they are called.
    pub machine: String,
    /// Addresses of the host, without loopback.
    pub addresses: Vec<IpAddr>,
    /// Where it listens.
    pub port: u16,
}

/// One device of a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceMeasurement {
    /// `cpu`, `cuda:0`.
    pub device: String,
    /// What was wrong: a product that is not as it must be, or a device that does not answer.
    pub error: Option<String>,
    /// Seconds of the fastest of several products; `None` after an error.
    pub seconds: Option<f64>,
    /// The same in 10^9 operations a second.
    pub gflops: Option<f64>,
}

/// One node.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct NodeMeasurement {
    /// Its name in the list of nodes.
    pub node: String,
    /// Name of its host, as its kernel knows it.
    pub host: Option<String>,
    /// Why nothing could be asked of it.
    pub error: Option<String>,
    /// Its devices.
    pub devices: Vec<DeviceMeasurement>,
    /// Why they could not be checked.
    pub device_error: Option<String>,
    /// Seconds of a write to the place of the checkpoints.
    pub store_s: Option<f64>,
    /// Why that failed.
    pub store_error: Option<String>,
    /// How far its clock is ahead of the median of the nodes' clocks, in seconds.
    pub clock_skew_s: Option<f64>,
}

/// Two nodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PairMeasurement {
    /// One of them.
    pub a: String,
    /// The other.
    pub b: String,
    /// Bandwidth of the slower direction, in megabits a second.
    pub mbit_per_s: Option<f64>,
    /// Why it could not be measured.
    pub error: Option<String>,
    /// Why it could not be measured the first time, where the second time it could.
    pub first_error: Option<String>,
}

/// Everything that was measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measurements {
    /// The nodes, in their order.
    pub nodes: Vec<NodeMeasurement>,
    /// Those pairs that were measured.
    pub pairs: Vec<PairMeasurement>,
}
