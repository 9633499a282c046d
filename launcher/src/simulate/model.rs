//! From costs to seconds: a step, a save, a restore, at a given number of nodes.

use super::costs::{AllReduce, Costs};
use super::spent::{Cause, Spent};

/// Share of a step's computing that the backward pass takes: it does twice the products of the forward pass. No more of the
/// all-reduce than this can be hidden behind it.
const BACKWARD_SHARE: f64 = 2.0 / 3.0;

/// Quantiles over which the mean wait for the slowest GPU is taken.
const SLOWEST_QUANTILES: u32 = 1024;

/// Costs at one size.
#[derive(Clone, Debug)]
pub(super) struct Model<'a> {
    costs: &'a Costs,
    /// Nodes at full size.
    pub nodes: u32,
}

impl<'a> Model<'a> {
    /// The model of a cluster of so many GPUs.
    pub(super) fn new(costs: &'a Costs, gpus: u32) -> Self {
        Self { costs, nodes: (gpus / costs.gpus_per_node).max(1) }
    }

    /// Where the time of a step on `active` nodes goes; `unit` in (0, 1) says how unlucky its slowest GPU is. The batch is the same on
    /// fewer nodes, so each of them computes for longer.
    pub(super) fn step(&self, active: u32, unit: f64) -> Spent {
        let compute_s = self.costs.step.compute_s;
        let busy_s = compute_s * f64::from(self.nodes) / f64::from(active);
        let workers = f64::from(active) * f64::from(self.costs.gpus_per_node);
        let straggler_s = busy_s * self.costs.step.jitter * slowest_of(workers, unit);
        let all_reduce_s = self.all_reduce_s(active);
        let hidden_s = (self.costs.step.hidden_share * all_reduce_s).min(BACKWARD_SHARE * busy_s);
        let mut parts = Spent::default();
        parts.add(Cause::Compute, compute_s);
        parts.add(Cause::Shrunken, busy_s - compute_s);
        parts.add(Cause::Stragglers, straggler_s);
        parts.add(Cause::Communication, all_reduce_s - hidden_s);
        parts
    }

    /// Mean seconds of a step at full size.
    pub(super) fn mean_step_s(&self) -> f64 {
        let middles = (0..SLOWEST_QUANTILES).map(|piece| (f64::from(piece) + 0.5) / f64::from(SLOWEST_QUANTILES));
        middles.map(|unit| self.step(self.nodes, unit).total()).sum::<f64>() / f64::from(SLOWEST_QUANTILES)
    }

    /// Seconds to sum the gradients over all GPUs: a ring within each node, then over the nodes.
    ///
    /// A ring moves 2 (n - 1) / n of the bytes over each link, in 2 (n - 1) messages. A double tree moves all bytes up and down
    /// and has 2 log2(n) messages one after another.
    pub(super) fn all_reduce_s(&self, active: u32) -> f64 {
        let (network, bytes) = (&self.costs.network, self.costs.step.gradient_bytes);
        let ring = |members: u32, latency_s: f64, bytes_per_s: f64| {
            let others = f64::from(members.saturating_sub(1));
            2.0 * others * latency_s + 2.0 * others / f64::from(members.max(1)) * bytes / bytes_per_s
        };
        let inside_s = ring(self.costs.gpus_per_node, network.inside.latency_s, network.inside.bytes_per_s);
        let between_s = match network.all_reduce {
            _ if active <= 1 => 0.0,
            AllReduce::Ring => ring(active, network.between.latency_s, network.between.bytes_per_s),
            AllReduce::Tree => 2.0 * f64::from(active).log2() * network.between.latency_s + 2.0 * bytes / network.between.bytes_per_s,
        };
        inside_s + between_s
    }

    /// Seconds to write a checkpoint to the store, every node its share.
    pub(super) fn upload_s(&self) -> f64 {
        let checkpoint = &self.costs.checkpoint;
        checkpoint.bytes / (checkpoint.node_bytes_per_s * f64::from(self.nodes)).min(checkpoint.store_bytes_per_s)
    }

    /// Seconds to get the state from the store: the leader reads all of it and the others get it over the network.
    pub(super) fn restore_from_store_s(&self) -> f64 {
        let checkpoint = &self.costs.checkpoint;
        checkpoint.bytes / checkpoint.node_bytes_per_s.min(checkpoint.store_bytes_per_s) + self.restore_from_memory_s()
    }

    /// Seconds to get the state from a survivor to everybody who lacks it: a pipelined broadcast, bound by the slower of both links.
    pub(super) fn restore_from_memory_s(&self) -> f64 {
        let network = &self.costs.network;
        let bytes_per_s = network.inside.bytes_per_s.min(network.between.bytes_per_s);
        f64::from(self.nodes).log2().ceil() * network.between.latency_s + self.costs.checkpoint.bytes / bytes_per_s
    }

    /// Seconds to form and connect a generation.
    pub(super) fn regroup_s(&self) -> f64 {
        let gpus = f64::from(self.nodes) * f64::from(self.costs.gpus_per_node);
        self.costs.recovery.regroup_s + self.costs.recovery.regroup_s_per_gpu * gpus
    }

    /// Mean seconds between two failures of the whole cluster; `None` where nothing fails.
    pub(super) fn mtbf_s(&self) -> Option<f64> {
        let gpus = f64::from(self.nodes) * f64::from(self.costs.gpus_per_node);
        self.costs.failures.gpu_mtbf_hours.map(|hours| hours * 3600.0 / gpus)
    }

    /// Fewest nodes with which an elastic run goes on.
    pub(super) fn min_nodes(&self) -> u32 {
        let nodes = (f64::from(self.nodes) * self.costs.recovery.min_nodes_share).ceil() as u32;
        nodes.clamp(1, self.nodes)
    }
}

/// How far the slowest of `count` normally distributed times is above their mean, in standard deviations, at the quantile `unit`.
///
/// All of `count` are below x with probability F(x)^count, so x is the quantile of F at unit^(1 / count).
fn slowest_of(count: f64, unit: f64) -> f64 {
    // 1 - unit^(1 / count), without the loss of digits where the power is close to 1.
    upper_quantile(-(unit.ln() / count).exp_m1())
}

/// The x that a standard normal variable exceeds with probability `tail`; 0 for a tail of one half or more.
///
/// Formula 26.2.23 of Abramowitz and Stegun, whose error is below 4.5e-4.
fn upper_quantile(tail: f64) -> f64 {
    if tail >= 0.5 {
        return 0.0;
    }
    let t = (-2.0 * tail.ln()).sqrt();
    let numerator = 0.010_328_f64.mul_add(t, 0.802_853).mul_add(t, 2.515_517);
    let denominator = 0.001_308_f64.mul_add(t, 0.189_269).mul_add(t, 1.432_788).mul_add(t, 1.0);
    (t - numerator / denominator).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::super::sample::costs;
    use super::*;

    fn close(left: f64, right: f64, tolerance: f64) -> bool {
        (left - right).abs() <= tolerance * right.abs().max(1e-12)
    }

    #[test]
    fn normal_tails_are_those_of_the_tables() {
        for (tail, expected) in [(0.158_655, 1.0), (0.025, 1.959_964), (1e-3, 3.090_232), (1e-6, 4.753_424), (0.5, 0.0), (0.9, 0.0)] {
            assert!((upper_quantile(tail) - expected).abs() < 5e-4, "{tail}: {}", upper_quantile(tail));
        }
    }

    #[test]
    fn the_slowest_of_many_is_slower() {
        // The median of the slowest of n has the tail 1 - 2^(-1/n): for n = 1000 that is 6.93e-4, or 3.198 deviations.
        assert!((slowest_of(1000.0, 0.5) - 3.198).abs() < 2e-3, "{}", slowest_of(1000.0, 0.5));
        assert!(slowest_of(16_384.0, 0.5) > slowest_of(1024.0, 0.5));
        assert!(slowest_of(8.0, 0.9) > slowest_of(8.0, 0.1));
    }

    #[test]
    fn a_ring_and_a_tree_move_what_the_formulas_say() {
        let mut costs = costs();
        costs.gpus_per_node = 4;
        costs.step.gradient_bytes = 1e9;
        costs.network.inside = super::super::costs::LinkCosts { latency_s: 1e-3, bytes_per_s: 1e10 };
        costs.network.between = super::super::costs::LinkCosts { latency_s: 1e-2, bytes_per_s: 1e9 };
        let inside_s = 2.0 * 3.0 * 1e-3 + 2.0 * 3.0 / 4.0 * 0.1;
        costs.network.all_reduce = AllReduce::Ring;
        assert!(close(Model::new(&costs, 32).all_reduce_s(8), inside_s + 2.0 * 7.0 * 1e-2 + 2.0 * 7.0 / 8.0, 1e-12));
        costs.network.all_reduce = AllReduce::Tree;
        assert!(close(Model::new(&costs, 32).all_reduce_s(8), inside_s + 2.0 * 3.0 * 1e-2 + 2.0, 1e-12));
        assert!(close(Model::new(&costs, 32).all_reduce_s(1), inside_s, 1e-12), "one node has nobody to talk to");
    }

    #[test]
    fn no_more_is_hidden_than_the_backward_pass_can_hide() {
        let mut costs = costs();
        costs.step.compute_s = 0.3;
        costs.step.jitter = 0.0;
        costs.step.hidden_share = 1.0;
        let model = Model::new(&costs, 64);
        let all_reduce_s = model.all_reduce_s(model.nodes);
        assert!(all_reduce_s < 0.2, "{all_reduce_s}");
        assert!(model.step(model.nodes, 0.5).get(Cause::Communication).abs() < 1e-12);
        costs.step.compute_s = 1e-6;
        let model = Model::new(&costs, 64);
        let exposed_s = model.step(model.nodes, 0.5).get(Cause::Communication);
        assert!(close(exposed_s, all_reduce_s - 1e-6 * BACKWARD_SHARE, 1e-9), "{exposed_s}");
    }

    #[test]
    fn fewer_nodes_take_longer_for_the_same_batch() {
        let costs = costs();
        let model = Model::new(&costs, 64);
        let parts = model.step(6, 0.5);
        assert!(close(parts.get(Cause::Compute), costs.step.compute_s, 1e-12));
        assert!(close(parts.get(Cause::Shrunken), costs.step.compute_s / 3.0, 1e-12), "eight nodes' work on six");
    }

    #[test]
    fn the_store_bounds_an_upload_by_many_nodes() {
        let mut costs = costs();
        costs.checkpoint.bytes = 1e10;
        costs.checkpoint.node_bytes_per_s = 1e9;
        costs.checkpoint.store_bytes_per_s = 4e9;
        assert!(close(Model::new(&costs, 16).upload_s(), 5.0, 1e-12), "two nodes write 2e9 bytes/s");
        assert!(close(Model::new(&costs, 64).upload_s(), 2.5, 1e-12), "eight nodes are held to the store's 4e9");
    }
}
