//! Shares of checkpoints that other ranks have written, as the leader hears of them.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::lock;
use crate::protocol::SavedFile;

/// Why the shares of a checkpoint are not all there.
#[derive(Debug, thiserror::Error)]
pub enum SharesError {
    /// The generation that saved it is over.
    #[error("{0}")]
    Over(String),
    /// Some did not arrive in time.
    #[error("{0}")]
    Late(String),
}

/// Checkpoints whose shares are kept. One is written at a time; what is older was given up.
const MAX_CHECKPOINTS: usize = 4;

/// Generation and step of a checkpoint.
type Checkpoint = (u64, u64);

/// What has arrived, and a bell for it.
#[derive(Default)]
pub(super) struct Shares {
    arrived: Mutex<Arrived>,
    changed: Condvar,
}

#[derive(Default)]
struct Arrived {
    /// Files by rank, by checkpoint.
    files: BTreeMap<Checkpoint, BTreeMap<u32, Vec<SavedFile>>>,
    aborted: Option<(u64, String)>,
}

impl Shares {
    /// A rank has written its share; one that says so again is heard once.
    pub(super) fn add(&self, checkpoint: Checkpoint, rank: u32, files: Vec<SavedFile>) {
        let mut arrived = lock(&self.arrived);
        arrived.files.entry(checkpoint).or_default().insert(rank, files);
        while arrived.files.len() > MAX_CHECKPOINTS {
            arrived.files.pop_first();
        }
        self.changed.notify_all();
    }

    /// Generations up to this one are over.
    pub(super) fn abort(&self, generation: u64, reason: &str) {
        let mut arrived = lock(&self.arrived);
        if arrived.aborted.as_ref().is_none_or(|(aborted, _)| *aborted < generation) {
            arrived.aborted = Some((generation, reason.to_owned()));
        }
        self.changed.notify_all();
    }

    /// Waits for the files of ranks `1..ranks`, in the order of ranks.
    pub(super) fn wait(&self, checkpoint: Checkpoint, ranks: u32, deadline: Instant) -> Result<Vec<SavedFile>, SharesError> {
        let (generation, step) = checkpoint;
        let mut arrived = lock(&self.arrived);
        loop {
            let missing = arrived.missing(checkpoint, ranks);
            if missing.is_empty() {
                let by_rank = arrived.files.remove(&checkpoint).unwrap_or_default();
                return Ok(by_rank.into_iter().filter(|(rank, _)| (1..ranks).contains(rank)).flat_map(|(_, files)| files).collect());
            }
            if let Some((aborted, reason)) = &arrived.aborted
                && *aborted >= generation
            {
                return Err(SharesError::Over(format!(
                    "generation {generation} was over before all shares of the checkpoint of step {step} were written: {reason}"
                )));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let list = missing.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
                return Err(SharesError::Late(format!(
                    "no word of the shares of the checkpoint of step {step} from rank {list} in generation {generation} in time"
                )));
            }
            arrived = self.changed.wait_timeout(arrived, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Arrived {
    fn missing(&self, checkpoint: Checkpoint, ranks: u32) -> Vec<u32> {
        let there = self.files.get(&checkpoint);
        (1..ranks).filter(|rank| there.is_none_or(|there| !there.contains_key(rank))).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn file(name: &str) -> SavedFile {
        SavedFile { name: name.to_owned(), size: 1, blake3: "00".to_owned() }
    }

    fn names(files: Vec<SavedFile>) -> Vec<String> {
        files.into_iter().map(|file| file.name).collect()
    }

    #[test]
    fn files_come_in_the_order_of_ranks_and_once() {
        let shares = Shares::default();
        shares.add((3, 20), 2, vec![file("c")]);
        shares.add((3, 10), 1, vec![file("another step")]);
        shares.add((2, 20), 1, vec![file("another generation")]);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                shares.add((3, 20), 1, vec![file("a"), file("b")]);
                shares.add((3, 20), 2, vec![file("c")]);
            });
            assert_eq!(names(shares.wait((3, 20), 3, Instant::now() + PATIENCE).unwrap()), ["a", "b", "c"]);
        });
        assert_eq!(shares.wait((3, 20), 1, Instant::now()).unwrap(), Vec::new(), "a leader alone waits for nobody");
    }

    #[test]
    fn a_wait_ends_at_its_deadline_and_with_its_generation() {
        let shares = Shares::default();
        shares.add((3, 20), 2, vec![file("c")]);
        let error = shares.wait((3, 20), 4, Instant::now()).unwrap_err().to_string();
        assert!(error.contains("rank 1, 3 in generation 3"), "{error}");
        shares.abort(2, "older");
        assert!(shares.wait((3, 20), 4, Instant::now()).unwrap_err().to_string().contains("in time"));
        std::thread::scope(|scope| {
            scope.spawn(|| shares.abort(3, "worker 1 lost"));
            let error = shares.wait((3, 20), 4, Instant::now() + PATIENCE).unwrap_err().to_string();
            assert!(error.ends_with("worker 1 lost"), "{error}");
        });
    }

    #[test]
    fn old_checkpoints_are_forgotten() {
        let shares = Shares::default();
        for step in 0..10 {
            shares.add((1, step), 1, vec![file("a")]);
        }
        assert_eq!(lock(&shares.arrived).files.len(), MAX_CHECKPOINTS);
        assert!(shares.wait((1, 9), 2, Instant::now()).is_ok());
        assert!(shares.wait((1, 0), 2, Instant::now()).is_err());
    }
}
