//! What was trained: every sample of every epoch exactly once, as in a run that nothing happened to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::sandbox::{Run, number};

/// Every line of an audit begins with this; the place where a line goes on behind one that a kill cut off.
const LINE_START: &str = "{\"generation\":";

/// A sample in an epoch.
type Sample = (u64, u64);

/// What the workers wrote down, by step and generation; one entry for each worker's share.
#[derive(Default)]
pub struct History(BTreeMap<u64, BTreeMap<u64, Vec<Vec<Sample>>>>);

/// What a comparison found besides equality.
#[derive(Debug, PartialEq, Eq)]
pub struct Findings {
    /// Steps of which a worker ended between adding its share and writing it down; the weights alone prove these shares.
    pub unwritten: usize,
}

impl History {
    /// Reads what all workers of a run wrote.
    pub fn of(run: &Run) -> Self {
        let mut history = Self::default();
        let folder = run.path.join("audit");
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            history.read(&entry.expect("list the audits").path());
        }
        history
    }

    fn read(&mut self, path: &Path) {
        let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for line in text.lines() {
            self.add(line, path);
        }
    }

    /// Adds a line. What a killed worker left of one stands before the first line of its replacement, or at the very end.
    fn add(&mut self, line: &str, path: &Path) {
        let start = line.rfind(LINE_START).unwrap_or(0);
        let Ok(line) = serde_json::from_str::<Value>(&line[start..]) else { return };
        let samples = line["samples"].as_array().unwrap_or_else(|| panic!("{}: {line}", path.display()));
        let share = samples.iter().map(|sample| (number(&sample[0]), number(&sample[1]))).collect();
        self.0.entry(number(&line["step"])).or_default().entry(number(&line["generation"])).or_default().push(share);
    }

    /// The generation whose result of a step counts, and its samples, sorted: a step is done again only when what was done before is gone.
    fn committed(&self, step: u64) -> Option<(u64, Vec<Sample>)> {
        let (generation, shares) = self.0.get(&step)?.last_key_value()?;
        let mut samples: Vec<Sample> = shares.iter().flatten().copied().collect();
        samples.sort_unstable();
        Some((*generation, samples))
    }

    /// Compares every step with those of a run without faults; what differs is told for each step.
    pub fn compare(&self, expected: &Self, num_steps: u64) -> Result<Findings, String> {
        let mut findings = Findings { unwritten: 0 };
        let mut complaints = Vec::new();
        for step in 1..=num_steps {
            let Some((generation, samples)) = self.committed(step) else {
                complaints.push(format!("step {step}: nobody wrote down what it trained on"));
                continue;
            };
            let (_, wanted) = expected.committed(step).ok_or_else(|| format!("step {step}: the reference does not have it"))?;
            if samples == wanted {
                continue;
            }
            // Only the last step of a generation that broke can lack a share.
            let is_last = self.committed(step + 1).is_some_and(|(next, _)| next != generation);
            if is_last && is_part(&samples, &wanted) {
                findings.unwritten += 1;
            } else {
                let (found, wanted) = (samples.len(), wanted.len());
                complaints.push(format!("step {step}, generation {generation}: {found} samples, not the {wanted} expected"));
            }
        }
        let extra = self.0.keys().filter(|step| **step > num_steps).count();
        if extra > 0 {
            complaints.push(format!("{extra} steps beyond the last"));
        }
        if complaints.is_empty() { Ok(findings) } else { Err(complaints.join("\n")) }
    }

    /// Checks that no epoch has a sample twice, and every epoch but the last has all of them.
    pub fn check_epochs(&self, num_samples: u64) -> Result<(), String> {
        let mut epochs: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
        for step in self.0.keys() {
            for (epoch, sample) in self.committed(*step).map(|(_, samples)| samples).unwrap_or_default() {
                if !epochs.entry(epoch).or_default().insert(sample) {
                    return Err(format!("step {step}: sample {sample} of epoch {epoch} came before"));
                }
            }
        }
        let last = epochs.keys().next_back().copied();
        for (epoch, samples) in epochs {
            if Some(epoch) != last && samples.len() as u64 != num_samples {
                return Err(format!("epoch {epoch}: {} samples of {num_samples}", samples.len()));
            }
        }
        Ok(())
    }
}

/// Whether some sorted samples are among others, none of them twice.
fn is_part(samples: &[Sample], whole: &[Sample]) -> bool {
    let unique: BTreeSet<&Sample> = samples.iter().collect();
    unique.len() == samples.len() && samples.iter().all(|sample| whole.binary_search(sample).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(lines: &[&str]) -> History {
        let mut history = History::default();
        for line in lines {
            history.add(line, Path::new("audit"));
        }
        history
    }

    /// Two steps of two samples each, which are one epoch.
    fn reference() -> History {
        history(&["{\"generation\":1,\"step\":1,\"samples\":[[0,1],[0,2]]}", "{\"generation\":1,\"step\":2,\"samples\":[[0,0],[0,3]]}"])
    }

    #[test]
    fn the_last_generation_counts() {
        let lines = [
            "{\"generation\":1,\"step\":1,\"samples\":[[0,1]]}",
            "{\"generation\":1,\"step\":1,\"samples\":[[0,2]]}",
            // Done in a generation that broke, and again in the next.
            "{\"generation\":1,\"step\":2,\"samples\":[[0,3]]}",
            "{\"generation\":2,\"step\":2,\"samples\":[[0,3]]}",
            "{\"generation\":2,\"st{\"generation\":2,\"step\":2,\"samples\":[[0,0]]}",
            "{\"generation\":2,\"step\":",
        ];
        assert_eq!(history(&lines).compare(&reference(), 2), Ok(Findings { unwritten: 0 }));
    }

    #[test]
    fn only_the_last_step_of_a_generation_may_lack_a_share() {
        let first = "{\"generation\":1,\"step\":1,\"samples\":[[0,1]]}";
        let other_generation = "{\"generation\":2,\"step\":2,\"samples\":[[0,0],[0,3]]}";
        assert_eq!(history(&[first, other_generation]).compare(&reference(), 2), Ok(Findings { unwritten: 1 }));
        let same_generation = "{\"generation\":1,\"step\":2,\"samples\":[[0,0],[0,3]]}";
        assert!(history(&[first, same_generation]).compare(&reference(), 2).unwrap_err().starts_with("step 1, generation 1: 1 samples"));
    }

    #[test]
    fn what_differs_is_told() {
        let second = "{\"generation\":1,\"step\":2,\"samples\":[[0,0],[0,3]]}";
        let cases = [
            (vec![second], "step 1: nobody"),
            (vec!["{\"generation\":1,\"step\":1,\"samples\":[[0,1],[0,1]]}", second], "step 1, generation 1: 2 samples"),
            (vec!["{\"generation\":1,\"step\":1,\"samples\":[[0,1],[0,2],[0,2]]}", second], "step 1, generation 1: 3 samples"),
        ];
        for (lines, expected) in cases {
            let told = history(&lines).compare(&reference(), 2).unwrap_err();
            assert!(told.starts_with(expected), "{told}");
        }
    }

    #[test]
    fn epochs_are_whole() {
        assert_eq!(reference().check_epochs(4), Ok(()));
        let next_epoch = "{\"generation\":1,\"step\":3,\"samples\":[[1,0]]}";
        let mut longer = reference();
        longer.add(next_epoch, Path::new("audit"));
        assert_eq!(longer.check_epochs(4), Ok(()));
        assert_eq!(longer.check_epochs(5), Err("epoch 0: 4 samples of 5".to_owned()));
        longer.add("{\"generation\":1,\"step\":4,\"samples\":[[1,0]]}", Path::new("audit"));
        assert_eq!(longer.check_epochs(4), Err("step 4: sample 0 of epoch 1 came before".to_owned()));
    }
}
