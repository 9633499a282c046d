//! What pencil and paper say about the same run: Daly's formula for the wall time, and the interval between checkpoints that makes it
//! shortest. A simulation that is far from it is wrong.
//!
//! With M seconds between failures, R seconds to recover, and work cut into segments of `w` seconds that cost `d` seconds each and are
//! done again from their begin after a failure, a run of T seconds of work takes
//!
//! ```text
//! M · exp(R / M) · (exp((w + d) / M) - 1) · T / w
//! ```
//!
//! (Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps"). Where the state survives in memory a
//! segment is one step; where it does not, it is the interval between two checkpoints.
//!
//! Left out: failures of the coordinator, and the generation that forms when a node comes back.

use super::costs::{Costs, Loses};
use super::engine::Case;
use super::model::Model;

/// Terms of the distribution of broken nodes; with more of them at once than this a run has other worries.
const MAX_BROKEN_NODES: u32 = 4096;

/// Estimates for one case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Estimate {
    /// Seconds of the whole run.
    pub wall_s: f64,
    /// Share of them in which steps that count are computed.
    pub goodput: f64,
    /// Seconds of training between two checkpoints that make the run shortest; `None` where nothing fails or nothing is saved.
    pub best_interval_s: Option<f64>,
}

/// Estimates a case without simulating it.
pub(super) fn estimate(costs: &Costs, case: &Case) -> Estimate {
    let model = Model::new(costs, case.gpus);
    let saves = costs.checkpoint.every_s.is_some() || costs.checkpoint.every_steps.is_some();
    let upload_s = model.upload_s();
    let blocked_s = costs.checkpoint.snapshot_s + if case.mechanisms.async_checkpoint { 0.0 } else { upload_s };
    let step_s = model.mean_step_s() * shrunken_factor(costs, case, &model);
    let work_s = step_s * costs.run.steps as f64;
    let interval_s = interval_s(costs, step_s).unwrap_or(work_s).min(work_s);
    let blocked_s = if saves { blocked_s } else { 0.0 };
    // The last checkpoint is waited for, and replaces the one that would be due there.
    let last_s = if saves { costs.checkpoint.snapshot_s + upload_s - blocked_s } else { 0.0 };
    let training_s = match model.mtbf_s() {
        None => work_s * (interval_s + blocked_s) / interval_s,
        Some(mtbf_s) => {
            let in_memory = case.mechanisms.restart_in_place && case.mechanisms.memory_restore;
            let (segment_s, cost_s) = if in_memory { (step_s, blocked_s * step_s / interval_s) } else { (interval_s, blocked_s) };
            // Until an upload is complete a failure also costs what was done meanwhile.
            let late_s = if in_memory || !case.mechanisms.async_checkpoint { 0.0 } else { upload_s };
            daly_wall_s(mtbf_s, recovery_s(costs, case, &model) + late_s, segment_s, cost_s) * work_s
        }
    };
    let wall_s = costs.run.startup_s + training_s + last_s;
    let goodput = costs.step.compute_s * costs.run.steps as f64 / wall_s;
    let best_interval_s = model.mtbf_s().filter(|_| saves).map(|mtbf_s| daly_interval_s(mtbf_s, blocked_s));
    Estimate { wall_s, goodput, best_interval_s }
}

/// Seconds of work between two checkpoints; `None` where there are none.
fn interval_s(costs: &Costs, step_s: f64) -> Option<f64> {
    let by_steps = costs.checkpoint.every_steps.map(|steps| steps as f64 * step_s);
    match (costs.checkpoint.every_s, by_steps) {
        (Some(seconds), Some(steps)) => Some(seconds.min(steps)),
        (one, other) => one.or(other),
    }
}

/// Wall seconds of one second of work.
fn daly_wall_s(mtbf_s: f64, recovery_s: f64, work_s: f64, cost_s: f64) -> f64 {
    mtbf_s * (recovery_s / mtbf_s).exp() * ((work_s + cost_s) / mtbf_s).exp_m1() / work_s
}

/// Daly's interval: Young's square root with the terms that matter when a checkpoint is not much cheaper than a failure.
fn daly_interval_s(mtbf_s: f64, blocked_s: f64) -> f64 {
    if blocked_s >= 2.0 * mtbf_s {
        return mtbf_s;
    }
    let ratio = blocked_s / (2.0 * mtbf_s);
    (2.0 * blocked_s * mtbf_s).sqrt() * (1.0 + ratio.sqrt() / 3.0 + ratio / 9.0) - blocked_s
}

/// Mean seconds from a failure to the next step.
fn recovery_s(costs: &Costs, case: &Case, model: &Model<'_>) -> f64 {
    let (recovery, mechanisms) = (&costs.recovery, case.mechanisms);
    let in_memory = mechanisms.restart_in_place && mechanisms.memory_restore;
    let restore_s = if in_memory { model.restore_from_memory_s() } else { model.restore_from_store_s() };
    let of_classes = costs.failures.classes.iter().map(|class| {
        let noticed_s = if mechanisms.fast_detection { class.detected_s } else { class.undetected_s };
        let rest_s = if mechanisms.restart_in_place {
            let replaced =
                class.loses == Loses::Process || (class.loses == Loses::Node && (!mechanisms.elastic || recovery.spare_nodes > 0));
            let waits = class.loses == Loses::Node && !mechanisms.elastic;
            let restored = !in_memory || class.loses != Loses::Nothing;
            recovery.abort_s
                + model.regroup_s()
                + if waits { recovery.node_replacement_s } else { 0.0 }
                + if replaced { recovery.process_start_s } else { 0.0 }
                + if restored { restore_s } else { 0.0 }
        } else {
            recovery.requeue_s + restore_s
        };
        class.share * (noticed_s + rest_s)
    });
    of_classes.sum()
}

/// By how much steps take longer on average because nodes are missing. Nodes break independently of each other and are away for a
/// fixed time, so their number has a Poisson distribution.
fn shrunken_factor(costs: &Costs, case: &Case, model: &Model<'_>) -> f64 {
    let (true, true, Some(mtbf_s)) = (case.mechanisms.elastic, case.mechanisms.restart_in_place, model.mtbf_s()) else { return 1.0 };
    let share: f64 = costs.failures.classes.iter().filter(|class| class.loses == Loses::Node).map(|class| class.share).sum();
    let mean = share / mtbf_s * costs.recovery.node_replacement_s;
    let (mut probability, mut factor, mut seen) = ((-mean).exp(), 0.0, 0.0);
    for broken in 0..MAX_BROKEN_NODES {
        let missing = broken.saturating_sub(costs.recovery.spare_nodes).min(model.nodes - model.min_nodes());
        factor += probability * f64::from(model.nodes) / f64::from(model.nodes - missing);
        seen += probability;
        probability *= mean / f64::from(broken + 1);
    }
    // A mean beyond what the terms cover leaves nothing to divide by; then every node that may be missing is.
    if seen > 0.5 { factor / seen } else { f64::from(model.nodes) / f64::from(model.min_nodes()) }
}

#[cfg(test)]
mod tests {
    use super::super::mechanisms::Mechanisms;
    use super::super::sample::costs;
    use super::*;

    #[test]
    fn the_interval_is_youngs_where_checkpoints_are_cheap() {
        // sqrt(2 · 1 · 20,000) = 200, and the correction is below one per cent.
        let interval_s = daly_interval_s(20_000.0, 1.0);
        assert!((interval_s - 200.0).abs() < 2.0, "{interval_s}");
        assert!((daly_interval_s(10.0, 30.0) - 10.0).abs() < 1e-12, "saving takes longer than the cluster lives");
    }

    #[test]
    fn the_interval_makes_the_formula_shortest() {
        let (mtbf_s, blocked_s) = (2_000.0, 20.0);
        let best_s = daly_interval_s(mtbf_s, blocked_s);
        let wall_s = |interval_s: f64| daly_wall_s(mtbf_s, 60.0, interval_s, blocked_s);
        for factor in [0.5, 0.8, 1.25, 2.0] {
            assert!(wall_s(best_s) < wall_s(best_s * factor), "{factor}");
        }
    }

    #[test]
    fn without_failures_only_checkpoints_and_communication_are_paid() {
        let mut costs = costs();
        costs.failures.gpu_mtbf_hours = None;
        costs.step.jitter = 0.0;
        let case = Case { gpus: 64, mechanisms: Mechanisms::all() };
        let estimate = estimate(&costs, &case);
        let step_s = Model::new(&costs, 64).mean_step_s();
        let work_s = step_s * 5_000.0;
        let expected = 30.0 + work_s * 120.5 / 120.0 + 16.0;
        assert!((estimate.wall_s - expected).abs() < 1e-6 * expected, "{} {expected}", estimate.wall_s);
        assert_eq!(estimate.best_interval_s, None);
    }

    #[test]
    fn spares_keep_an_elastic_run_at_full_size() {
        let mut costs = costs();
        let case = Case { gpus: 64, mechanisms: Mechanisms::all() };
        costs.recovery.spare_nodes = 0;
        let without = shrunken_factor(&costs, &case, &Model::new(&costs, 64));
        // 0.4 of the failures lose a node, every 1,000 s, for 300 s: 0.12 nodes of 8 are away on average. One away costs 8/7, so it is
        // a little more than 0.12/8.
        assert!((1.015..1.02).contains(&without), "{without}");
        costs.recovery.spare_nodes = 4;
        let with = shrunken_factor(&costs, &case, &Model::new(&costs, 64));
        assert!((with - 1.0).abs() < 1e-5, "{with}");
    }
}
