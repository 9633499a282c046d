//! Events in words, one line each, for the terminal.

use cloze_cluster::{FailureClass, StepReport};

use super::numbers::{clock_text, compact, eta_seconds};

/// `step 120/300 · loss 1.234 · lr 9.8e-4 · 812 examples/s · 33k tokens/s · ETA 0:42`.
pub(super) fn step(report: &StepReport, total_steps: u64, seconds_per_step: f64) -> String {
    let eta = eta_seconds(report.step, total_steps, Some(seconds_per_step)).map_or_else(|| "?".to_owned(), clock_text);
    format!(
        "step {}/{total_steps} · loss {:.3} · lr {:.1e} · {} examples/s · {} tokens/s · ETA {eta}",
        report.step,
        report.loss,
        report.learning_rate,
        compact(report.examples_per_s),
        compact(report.tokens_per_s),
    )
}

/// `run demo: 300 steps with 2 workers, at least 1`.
pub(super) fn run_started(name: &str, steps: u64, workers: u32, min_workers: Option<u32>) -> String {
    let at_least = min_workers.map_or_else(String::new, |min_workers| format!(", at least {min_workers}"));
    format!("run {name}: {steps} steps with {}{at_least}", count(u64::from(workers), "worker"))
}

/// `generation 2 started with 2 workers from step 50`, and where the state was if not in a checkpoint.
pub(super) fn generation_started(generation: u64, world_size: u32, step: u64, source: &str) -> String {
    let from = match source {
        "scratch" => source.to_owned(),
        memory if is_memory(memory) => format!("step {step} in {memory}"),
        _ => format!("step {step}"),
    };
    format!("generation {generation} started with {} from {from}", count(u64::from(world_size), "worker"))
}

/// `checkpoint of step 300 saved: URL (12MB in 0.4 s, training waited 0.02 s)`.
pub(super) fn checkpoint_saved(step: u64, url: &str, bytes: u64, seconds: f64, blocked_s: f64) -> String {
    format!("checkpoint of step {step} saved: {url} ({}B in {seconds:.1} s, training waited {blocked_s:.2} s)", compact(bytes as f64))
}

/// `worker 1 (rank 1) on node-a lost: no heartbeat for 2.1 s`.
pub(super) fn worker_lost(worker: u32, rank: Option<u32>, host: &str, class: FailureClass, reason: &str) -> String {
    let host = if host.is_empty() { String::new() } else { format!(" on {host}") };
    match (rank, class) {
        (_, FailureClass::Excluded) => format!("worker {worker}{host} is not let in: {reason}"),
        (Some(rank), _) => format!("worker {worker} (rank {rank}){host} lost: {reason}"),
        (None, _) => format!("worker {worker}{host} lost before it could start: {reason}"),
    }
}

/// `recovered in 0.8 s, 0 steps lost, state from memory of worker 0`.
pub(super) fn recovered(seconds: f64, steps_lost: u64, source: &str) -> String {
    format!("recovered in {seconds:.1} s, {} lost, state from {source}", count(steps_lost, "step"))
}

/// Whether the old generation went on without a pause.
pub(super) fn coordinator_restarted(generation: u64, adopted: bool) -> String {
    if adopted {
        format!("coordinator restarted; generation {generation} goes on")
    } else {
        format!("coordinator restarted; generation {generation} could not be taken over, and the workers start another")
    }
}

/// `1 worker`, `2 workers`.
pub(super) fn count(number: u64, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

fn is_memory(source: &str) -> bool {
    source.starts_with("memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_generation_starts() {
        let cases = [
            (0, "scratch", "generation 3 started with 1 worker from scratch"),
            (50, "file:///c/step-000000000050", "generation 3 started with 1 worker from step 50"),
            (57, "memory", "generation 3 started with 1 worker from step 57 in memory"),
            (57, "memory of worker 0", "generation 3 started with 1 worker from step 57 in memory of worker 0"),
        ];
        for (step, source, text) in cases {
            assert_eq!(generation_started(3, 1, step, source), text);
        }
    }

    #[test]
    fn losses() {
        let class = FailureClass::MissedHeartbeat;
        let cases = [
            (worker_lost(1, Some(0), "node-a", class, "x"), "worker 1 (rank 0) on node-a lost: x"),
            (worker_lost(1, None, "node-a", class, "x"), "worker 1 on node-a lost before it could start: x"),
            (worker_lost(1, Some(1), "", class, "x"), "worker 1 (rank 1) lost: x"),
            (worker_lost(2, None, "node-a", FailureClass::Excluded, "x"), "worker 2 on node-a is not let in: x"),
        ];
        for (found, text) in cases {
            assert_eq!(found, text);
        }
    }

    #[test]
    fn recoveries() {
        assert_eq!(recovered(0.84, 0, "memory of worker 0"), "recovered in 0.8 s, 0 steps lost, state from memory of worker 0");
        assert_eq!(
            recovered(12.0, 1, "file:///c/step-000000000050"),
            "recovered in 12.0 s, 1 step lost, state from file:///c/step-000000000050"
        );
    }

    #[test]
    fn starts() {
        assert_eq!(run_started("demo", 300, 2, None), "run demo: 300 steps with 2 workers");
        assert_eq!(run_started("demo", 300, 2, Some(1)), "run demo: 300 steps with 2 workers, at least 1");
        assert_eq!(coordinator_restarted(3, true), "coordinator restarted; generation 3 goes on");
    }
}
