//! Failures on request, to see that a run survives them.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};
use tch::{Device, Tensor};

use crate::batch_feed::StepBatch;

/// How long a drill that hangs sleeps between two looks at nothing; the process is ended from outside.
const HANG_NAP: Duration = Duration::from_mins(1);

/// Floats that no machine has room for: 2^52 of them are 16 PiB.
const TOO_MANY_FLOATS: i64 = 1 << 52;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hang,
    NotANumber,
    OutOfMemory,
}

/// One failure, before the step with this number (from 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drill {
    kind: Kind,
    step: u64,
}

impl FromStr for Drill {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let Some((kind, step)) = text.split_once('@') else { bail!("expected KIND@STEP, found `{text}`") };
        let kind = match kind {
            "hang" => Kind::Hang,
            "nan" => Kind::NotANumber,
            "oom" => Kind::OutOfMemory,
            other => bail!("expected `hang`, `nan` or `oom`, found `{other}`"),
        };
        Ok(Self { kind, step: step.parse()? })
    }
}

/// The failures that this process still has to suffer; each happens once.
#[derive(Debug, Default)]
pub struct Drills(Vec<Drill>);

impl Drills {
    /// These failures.
    pub fn new(drills: Vec<Drill>) -> Self {
        Self(drills)
    }

    /// Lets the failures of a step happen.
    ///
    /// # Errors
    /// What libtorch says about a want of memory.
    pub fn perform(&mut self, batch: &mut StepBatch) -> Result<()> {
        let step = batch.step + 1;
        while let Some(place) = self.0.iter().position(|drill| drill.step == step) {
            let drill = self.0.swap_remove(place);
            tracing::warn!(?drill, "drill");
            match drill.kind {
                Kind::Hang => loop {
                    std::thread::sleep(HANG_NAP);
                },
                Kind::NotANumber => spoil(batch),
                Kind::OutOfMemory => drop(Tensor::f_ones([TOO_MANY_FLOATS], (tch::Kind::Float, Device::Cpu))?),
            }
        }
        Ok(())
    }
}

/// Makes this worker's loss not a number, as a broken memory would.
fn spoil(batch: &mut StepBatch) {
    for weight in batch.packs.iter_mut().flat_map(|pack| &mut pack.label_weights) {
        *weight = f32::NAN;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drills_are_read() {
        assert_eq!("nan@17".parse::<Drill>().unwrap(), Drill { kind: Kind::NotANumber, step: 17 });
        for (text, words) in [("nan", "KIND@STEP"), ("sneeze@1", "`sneeze`"), ("oom@x", "invalid digit")] {
            assert!(text.parse::<Drill>().unwrap_err().to_string().contains(words), "{text}");
        }
    }

    #[test]
    fn each_failure_happens_once() {
        let mut batch = StepBatch { step: 4, packs: Vec::new(), global_examples: 0, global_tokens: 0 };
        let mut drills = Drills::new(vec!["oom@5".parse().unwrap()]);
        let error = drills.perform(&mut batch).unwrap_err();
        assert!(crate::worker::is_want_of_memory(&format!("{error:#}")), "{error:#}");
        drills.perform(&mut batch).unwrap();
    }
}
