//! Events for the tests of views.

use cloze_cluster::{Event, FailureClass, Recorded, StepReport, Unreported};

/// A step of 8 examples and 100 tokens in half a second.
pub(crate) fn report(step: u64, loss: f64) -> StepReport {
    StepReport {
        step,
        loss,
        learning_rate: 0.00098,
        gradient_norm: 0.5,
        examples: 8,
        tokens: 100,
        labels: 8,
        seconds: 0.5,
        examples_per_s: 812.3,
        tokens_per_s: 33_000.0,
        before: Unreported::default(),
    }
}

/// The event of a step.
pub(crate) fn step(generation: u64, step: u64, loss: f64) -> Event {
    Event::Step { generation, report: report(step, loss) }
}

/// A run of 300 steps with two workers that has its first generation.
pub(crate) fn start() -> Vec<Event> {
    let mut events =
        vec![Event::RunStarted { name: "demo".to_owned(), recipe_hash: "4f1c".to_owned(), workers: 2, min_workers: None, steps: 300 }];
    for worker in 0..2 {
        events.push(Event::WorkerStarted { worker, process_id: 100 + worker });
        events.push(Event::WorkerJoined { worker, host: "node-a".to_owned(), process_id: 100 + worker, rejoined: false });
    }
    events.extend([generation(1, &[0, 1]), restored(1, 0, "scratch")]);
    events
}

/// A generation of these slots.
pub(crate) fn generation(generation: u64, workers: &[u32]) -> Event {
    Event::GenerationStarted {
        generation,
        world_size: workers.len() as u32,
        workers: workers.to_vec(),
        reason: "all 2 workers are there".to_owned(),
    }
}

/// The state of a generation.
pub(crate) fn restored(generation: u64, step: u64, source: &str) -> Event {
    Event::Restored { generation, step, source: source.to_owned(), skipped: Vec::new(), seconds: 0.1 }
}

/// Worker 1 is lost to a closed connection.
pub(crate) fn lost(rank: Option<u32>) -> Event {
    Event::WorkerLost {
        worker: 1,
        rank,
        host: "node-a".to_owned(),
        class: FailureClass::ConnectionClosed,
        reason: "connection closed".to_owned(),
    }
}

/// A generation ends because of worker 1.
pub(crate) fn aborted(generation: u64, step: u64) -> Event {
    Event::GenerationAborted {
        generation,
        reason: "worker 1 (rank 1) lost: connection closed".to_owned(),
        step,
        worker: Some(1),
        rank: Some(1),
    }
}

/// The end of worker 1's first process.
pub(crate) fn exited() -> Event {
    Event::WorkerExited { worker: 1, process_id: 101, status: "signal 9 (SIGKILL)".to_owned(), tail: "step 57".to_owned() }
}

/// A generation trains again.
pub(crate) fn recovered(generation: u64, failed_generation: u64, class: FailureClass) -> Event {
    Event::Recovered { generation, failed_generation, class, seconds: 0.8, steps_lost: 0, source: "memory of worker 0".to_owned() }
}

/// Events one second apart, from second 0.
pub(crate) fn recorded(events: impl IntoIterator<Item = Event>) -> Vec<Recorded> {
    (0_u32..).zip(events).map(|(second, event)| Recorded { time: f64::from(second), event }).collect()
}
