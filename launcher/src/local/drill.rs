//! Failures on request, to see that a run survives them.

use std::fmt;
use std::str::FromStr;

use cloze_recipes::failure::{Failure, FailureKind};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrillKind {
    /// The process gets SIGKILL.
    Kill,
    /// The process gets SIGSTOP: it falls silent and keeps its connections.
    Freeze,
    /// The worker does nothing for ever, and goes on sending heartbeats.
    Hang,
    /// The worker's loss is not a number.
    NotANumber,
    /// The worker's memory runs out.
    OutOfMemory,
}

/// One failure of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drill {
    /// What goes wrong.
    pub kind: DrillKind,
    /// Slot of the worker.
    pub worker: u32,
    /// A process is killed or frozen when this step or a later one is reported; the others happen to the worker in this step.
    pub step: u64,
}

impl DrillKind {
    /// All kinds, with their names.
    const NAMES: [(&'static str, Self); 5] =
        [("kill", Self::Kill), ("freeze", Self::Freeze), ("hang", Self::Hang), ("nan", Self::NotANumber), ("oom", Self::OutOfMemory)];

    /// Whether the worker brings it about itself.
    pub(super) fn is_in_worker(self) -> bool {
        matches!(self, Self::Hang | Self::NotANumber | Self::OutOfMemory)
    }
}

impl fmt::Display for DrillKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, kind)| kind == self).map_or("", |(name, _)| name);
        f.write_str(name)
    }
}

impl FromStr for Drill {
    type Err = Failure;

    /// Reads `KIND:WORKER@STEP`, such as `freeze:1@40`.
    fn from_str(text: &str) -> Result<Self, Failure> {
        let parse = || {
            let (kind, place) = text.split_once(':')?;
            let (_, kind) = DrillKind::NAMES.into_iter().find(|(name, _)| *name == kind)?;
            let (worker, step) = place.split_once('@')?;
            Some(Self { kind, worker: worker.parse().ok()?, step: step.parse().ok()? })
        };
        parse().ok_or_else(|| {
            Failure::new(FailureKind::Recipe, "this is no drill")
                .expected("KIND:WORKER@STEP with KIND one of kill, freeze, hang, nan and oom, such as kill:0@60")
                .found(text)
        })
    }
}

impl Drill {
    /// The worker's argument for a failure that it brings about itself.
    pub(super) fn worker_argument(&self) -> String {
        format!("{}@{}", self.kind, self.step)
    }

    /// Refuses a drill that cannot happen in a run.
    pub(super) fn check(&self, local_workers: u32, total_steps: u64) -> Result<(), Failure> {
        let shown = format!("{}:{}@{}", self.kind, self.worker, self.step);
        if self.worker >= local_workers {
            return Err(Failure::new(FailureKind::Recipe, "a drill names a worker that is not started here")
                .expected(format!("a worker below {local_workers}"))
                .found(shown));
        }
        // A worker's own failure comes in the course of its step; the others need a step that is reported before the run ends.
        let last = if self.kind.is_in_worker() { total_steps } else { total_steps.saturating_sub(1) };
        if self.step == 0 || self.step > last {
            return Err(Failure::new(FailureKind::Recipe, "a drill names a step that the run does not reach")
                .expected(format!("a step from 1 to {last}"))
                .found(shown));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drills_are_read() {
        let cases = [
            ("kill:0@60", Some(Drill { kind: DrillKind::Kill, worker: 0, step: 60 })),
            ("freeze:12@1", Some(Drill { kind: DrillKind::Freeze, worker: 12, step: 1 })),
            ("nan:1@7", Some(Drill { kind: DrillKind::NotANumber, worker: 1, step: 7 })),
            ("0@60", None),
            ("sneeze:0@60", None),
            ("kill:0", None),
            ("kill:-1@3", None),
            ("kill:0@", None),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse().ok(), expected, "{text}");
        }
        assert_eq!("oom:2@17".parse::<Drill>().unwrap().worker_argument(), "oom@17");
    }

    #[test]
    fn drills_must_be_possible() {
        let cases = [
            ("kill:1@99", None),
            ("kill:1@100", Some("a step from 1 to 99")),
            ("hang:1@100", None),
            ("hang:1@101", Some("a step from 1 to 100")),
            ("freeze:0@0", Some("a step from 1 to 99")),
            ("nan:2@3", Some("a worker below 2")),
        ];
        for (text, expected) in cases {
            let found = text.parse::<Drill>().unwrap().check(2, 100).err().and_then(|failure| failure.expected);
            assert_eq!(found.as_deref(), expected, "{text}");
        }
    }
}
