//! From a generation's failure to the first step after it.

use std::time::Duration;

use super::Roster;
use crate::event::Event;
use crate::protocol::FailureClass;

/// How a source begins that is a worker's memory and no saved state.
const MEMORY: &str = "memory";

/// A generation whose failure has not been overcome yet.
pub(super) struct FailedGeneration {
    generation: u64,
    class: FailureClass,
    at: Duration,
    /// Steps done before it.
    step: u64,
}

/// The state from which a generation trains.
pub(super) struct RestoredState {
    step: u64,
    source: String,
}

impl Roster {
    /// A generation has failed. Where the one before it failed too and made no step, this goes on with that failure.
    pub(super) fn note_failure(&mut self, now: Duration, class: FailureClass) {
        let step = self.step;
        match &mut self.failed {
            Some(failed) => failed.step = failed.step.max(step),
            None => self.failed = Some(FailedGeneration { generation: self.state.generation, class, at: now, step }),
        }
    }

    /// The newest generation trains from this state.
    pub(super) fn note_restored(&mut self, step: u64, source: &str) {
        (self.step, self.told) = (step, Some(step));
        if !source.starts_with(MEMORY) {
            let saved_step = self.state.saved_step;
            if step == 0 && saved_step > 0 {
                let message = format!("the run saved step {saved_step}, and no checkpoint of it is left: it starts from scratch");
                self.events.push(Event::Warning { message });
            }
            self.state.saved_step = step;
        }
        self.restored = Some(RestoredState { step, source: source.to_owned() });
    }

    /// The leader has done `step` steps.
    pub(super) fn note_step(&mut self, at: Duration, step: u64) {
        self.stepped = true;
        self.state.fruitless_generations = 0;
        let Some(restored) = &self.restored else { return };
        let Some(FailedGeneration { generation: failed_generation, class, at: failed_at, step: failed_step }) = self.failed.take() else {
            return;
        };
        tracing::debug!(step, failed_generation, "training goes on");
        self.events.push(Event::Recovered {
            generation: self.state.generation,
            failed_generation,
            class,
            seconds: at.saturating_sub(failed_at).as_secs_f64(),
            steps_lost: failed_step.saturating_sub(restored.step),
            source: restored.source.clone(),
        });
    }

    /// Whether the leader is past the state that the generation began with.
    pub(super) fn is_past_restored(&self, step: u64) -> bool {
        self.restored.as_ref().is_some_and(|restored| step > restored.step)
    }
}
