//! Trials in the queue of a batch system, or on hosts, that nobody can ask from here. Nothing is started there; once what is out is to
//! stop, it is given up, and its jobs are named.
//!
//! A batch that is given up is marked in the study folder. An element of it that begins after that ends at once, where its node sees the
//! mark; one that runs already goes on, and its outcome counts no more.

use std::collections::BTreeSet;

use super::batch::Batch;
use super::executor::{Gone, Out};
use super::folder::{StudyFolder, StudyInfo};
use super::queue::job_name;
use crate::run_folder::{READABLE, write_whole};

/// The jobs of a sweep in such a queue.
#[derive(Debug)]
pub struct Unreached {
    folder: StudyFolder,
    /// The study, which names its jobs.
    info: StudyInfo,
    /// The cluster, in words.
    place: String,
    /// Whether jobs of a queue are out there, and not processes of hosts, which end themselves once they see that they were given up.
    is_queue: bool,
    /// Whether what is out is to stop.
    is_stopped: bool,
    /// The batches that were given up.
    given_up: BTreeSet<u32>,
}

impl Unreached {
    /// What is out of a study; `place` says in words where, and `is_queue` whether in jobs.
    pub fn new(folder: StudyFolder, info: StudyInfo, place: String, is_queue: bool) -> Self {
        Self { folder, info, place, is_queue, is_stopped: false, given_up: BTreeSet::new() }
    }

    /// What is out is given up in the next look.
    pub fn stop(&mut self) {
        self.is_stopped = true;
    }

    /// All that is out, once it was to stop. The mark of a batch is on the disk before.
    pub fn gone(&mut self, outs: &[Out<'_>]) -> anyhow::Result<Vec<Gone>> {
        if !self.is_stopped {
            return Ok(Vec::new());
        }
        for out in outs {
            let batch = out.place.batch;
            if !self.given_up.contains(&batch) {
                write_whole(&self.folder.given_up_path(batch), b"", READABLE)?;
                self.given_up.insert(batch);
            }
        }
        Ok(outs.iter().map(|out| Gone::ended(out.trial, format!("it was given up; {} was not asked", self.place))).collect())
    }

    /// Refuses a batch: nothing is handed out to a queue that cannot be asked.
    pub fn submit(&self, batch: &Batch) -> anyhow::Result<()> {
        anyhow::bail!("batch {} cannot be handed out: {} cannot be asked from here", batch.number, self.place)
    }

    /// What to say of the jobs or processes that may still be there.
    pub fn left_behind(&self) -> Vec<String> {
        let text = |&batch: &u32| {
            if !self.is_queue {
                let place = &self.place;
                return format!("what works on batch {batch} may still run on a host of {place}, until it sees there that it was given up");
            }
            let name = job_name(&self.info, batch);
            format!("job {name} may still be in the queue of {0}; on a host of {0}: scancel --name={name}", self.place)
        };
        self.given_up.iter().map(text).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::Place;
    use super::*;

    #[test]
    fn what_is_out_is_given_up_once_it_is_to_stop() {
        let root = tempfile::tempdir().unwrap();
        let folder = StudyFolder::new(root.path().to_owned());
        folder.make().unwrap();
        let info = serde_json::json!({
            "version": 1, "name": "demo", "file": "demo.yaml", "profile": null, "overrides": [], "hash": "ab", "key": "k",
            "expected": null, "metric": {"task": null, "score": "loss"}, "keys": [], "created": 1.0,
        });
        let mut unreached = Unreached::new(folder.clone(), serde_json::from_value(info).unwrap(), "the cluster `lab`".to_owned(), true);
        let out = |trial, batch| Out { trial, hash: "h", place: Place { batch, element: trial as u32 } };
        let outs = [out(0, 3), out(1, 3), out(2, 4)];
        assert_eq!((unreached.gone(&outs).unwrap(), unreached.left_behind()), (Vec::new(), Vec::new()));
        assert!(!folder.given_up_path(3).exists());
        unreached.stop();
        let gone: Vec<usize> = unreached.gone(&outs).unwrap().into_iter().map(|gone| gone.trial).collect();
        assert_eq!(gone, [0, 1, 2]);
        assert!([3, 4].iter().all(|&batch| folder.given_up_path(batch).is_file()) && !folder.given_up_path(5).exists());
        let left = unreached.left_behind();
        let (name, place) = ("cloze-demo-ab-k-000003", "the cluster `lab`");
        assert_eq!(left.len(), 2);
        assert_eq!(left[0], format!("job {name} may still be in the queue of {place}; on a host of {place}: scancel --name={name}"));
        unreached.is_queue = false;
        assert!(unreached.left_behind()[0].starts_with("what works on batch 3 may still run on a host of the cluster `lab`"));
        assert!(unreached.submit(&Batch { number: 5, elements: Vec::new() }).is_err());
    }
}
