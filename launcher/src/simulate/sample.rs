//! Costs for the tests of this module: a small cluster in which things fail often.

use super::costs::{
    AllReduce, CheckpointCosts, ClassCosts, Costs, FailureCosts, LinkCosts, Loses, NetworkCosts, RecoveryCosts, RunLength, StepCosts,
};

/// 64 GPUs in 8 nodes, steps of about a second, and a failure of the cluster every 1,000 seconds.
pub(super) fn costs() -> Costs {
    Costs {
        gpus: vec![64],
        gpus_per_node: 8,
        run: RunLength { steps: 5_000, startup_s: 30.0 },
        step: StepCosts { compute_s: 1.0, jitter: 0.01, gradient_bytes: 1e9, hidden_share: 0.8 },
        network: NetworkCosts {
            all_reduce: AllReduce::Tree,
            inside: LinkCosts { latency_s: 1e-6, bytes_per_s: 4e11 },
            between: LinkCosts { latency_s: 1e-5, bytes_per_s: 5e10 },
        },
        checkpoint: CheckpointCosts {
            every_s: Some(120.0),
            every_steps: None,
            bytes: 1.6e10,
            snapshot_s: 0.5,
            node_bytes_per_s: 2e8,
            store_bytes_per_s: 1e9,
        },
        failures: FailureCosts {
            // 64 GPUs fail once in 64,000 s / 64 = 1,000 s.
            gpu_mtbf_hours: Some(64_000.0 / 3600.0),
            classes: vec![
                class("process crash", 0.3, Loses::Process, 1.0, 60.0),
                class("hang", 0.2, Loses::Process, 20.0, 60.0),
                class("node loss", 0.4, Loses::Node, 2.0, 60.0),
                class("network", 0.1, Loses::Nothing, 5.0, 60.0),
            ],
        },
        recovery: RecoveryCosts {
            abort_s: 0.5,
            regroup_s: 1.0,
            regroup_s_per_gpu: 0.001,
            process_start_s: 10.0,
            node_replacement_s: 300.0,
            requeue_s: 180.0,
            spare_nodes: 1,
            min_nodes_share: 0.5,
        },
        coordinator: None,
    }
}

fn class(name: &str, share: f64, loses: Loses, detected_s: f64, undetected_s: f64) -> ClassCosts {
    ClassCosts { name: name.to_owned(), share, loses, detected_s, undetected_s }
}
