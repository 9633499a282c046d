//! What a run costs: seconds, bytes and rates that were measured, or assumed and said to be.

use serde::Deserialize;

/// Everything that a simulation is told. [`read()`](super::read()) makes one of a file and refuses what cannot be.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Costs {
    /// Sizes to simulate, in GPUs.
    pub gpus: Vec<u32>,
    /// GPUs of one node; a node fails as a whole.
    pub gpus_per_node: u32,
    /// How long the run is.
    pub run: RunLength,
    /// One optimizer step.
    pub step: StepCosts,
    /// What gradients and states travel on.
    pub network: NetworkCosts,
    /// Saving and reading checkpoints.
    pub checkpoint: CheckpointCosts,
    /// What fails, how often, and how soon it is noticed.
    pub failures: FailureCosts,
    /// What it takes to go on.
    pub recovery: RecoveryCosts,
    /// Failures of the coordinator itself; absent where it never fails.
    pub coordinator: Option<CoordinatorCosts>,
}

/// How long a run is.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunLength {
    /// Optimizer steps.
    pub steps: u64,
    /// Seconds from the command to the begin of the first step.
    pub startup_s: f64,
}

/// One optimizer step at full size.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepCosts {
    /// Mean seconds that one GPU computes.
    pub compute_s: f64,
    /// Standard deviation of one GPU's compute seconds, as a share of their mean; the step waits for the slowest GPU.
    pub jitter: f64,
    /// Bytes of all gradients.
    pub gradient_bytes: f64,
    /// Share of the all-reduce that runs while the backward pass still computes.
    pub hidden_share: f64,
}

/// The network within and between nodes.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkCosts {
    /// How the nodes sum.
    pub all_reduce: AllReduce,
    /// Between the GPUs of a node.
    pub inside: LinkCosts,
    /// Between nodes; the bandwidth is that of a whole node in one direction.
    pub between: LinkCosts,
}

/// The algorithm of the sum over nodes. Within a node it is always a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AllReduce {
    /// Latency grows with the number of nodes.
    Ring,
    /// Latency grows with its logarithm.
    Tree,
}

/// One kind of link.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkCosts {
    /// Seconds that a message takes however short it is.
    pub latency_s: f64,
    /// Bytes per second in one direction.
    pub bytes_per_s: f64,
}

/// Saving and reading.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointCosts {
    /// Seconds from one save to the next; absent where saves do not go by time.
    pub every_s: Option<f64>,
    /// Steps from one save to the next; absent where saves do not go by steps.
    pub every_steps: Option<u64>,
    /// Bytes of one checkpoint: weights and optimizer state.
    pub bytes: f64,
    /// Seconds that training stands still for the copy to host memory.
    pub snapshot_s: f64,
    /// Bytes per second that one node writes to or reads from the store.
    pub node_bytes_per_s: f64,
    /// Bytes per second that the store takes or gives in all.
    pub store_bytes_per_s: f64,
}

/// What fails.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailureCosts {
    /// Hours of one GPU between two failures of whatever class; absent where nothing fails.
    pub gpu_mtbf_hours: Option<f64>,
    /// The classes; their shares add up to 1.
    pub classes: Vec<ClassCosts>,
}

/// One class of failures.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassCosts {
    /// Its name, for people.
    pub name: String,
    /// Share of all failures.
    pub share: f64,
    /// What is gone afterwards.
    pub loses: Loses,
    /// Seconds until the coordinator knows.
    pub detected_s: f64,
    /// Seconds until it is known without a coordinator: usually the timeout of a collective operation.
    pub undetected_s: f64,
}

/// What a failure takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loses {
    /// Only the step in progress; every process lives.
    Nothing,
    /// One process with its memory; its node is sound.
    Process,
    /// One node with all its processes.
    Node,
}

/// What it takes to go on after a failure.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoveryCosts {
    /// Seconds from the decision to end a generation until every survivor has left it.
    pub abort_s: f64,
    /// Seconds to form a generation and connect it, at any size.
    pub regroup_s: f64,
    /// Seconds that each GPU adds to that.
    pub regroup_s_per_gpu: f64,
    /// Seconds from starting a worker process until it has joined.
    pub process_start_s: f64,
    /// Seconds until a failed node is replaced within the allocation.
    pub node_replacement_s: f64,
    /// Seconds until a whole job is queued, started and ready again; what every failure costs without a restart in place.
    pub requeue_s: f64,
    /// Nodes that stand by.
    pub spare_nodes: u32,
    /// Smallest share of the nodes with which an elastic run goes on.
    pub min_nodes_share: f64,
}

/// Failures of the coordinator.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoordinatorCosts {
    /// Hours between two of its failures.
    pub mtbf_hours: f64,
    /// Seconds until it is back and has adopted the running generation.
    pub restart_s: f64,
}
