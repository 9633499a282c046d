//! Where a batch reads its samples.

use crate::dataset::{Dataset, Sample};

/// Numbered samples whose lengths are known before they are read. The prepared dataset is one; tests keep theirs in memory.
pub trait SampleSource {
    /// Number of samples.
    fn num_samples(&self) -> u64;

    /// Length of a sample in tokens, special tokens included. Does not read the sample.
    fn length(&self, sample: u64) -> u32;

    /// Number of a sample's task. Does not read the sample.
    fn task(&self, sample: u64) -> u32;

    /// Reads a sample. Fails where its storage is damaged.
    fn read(&self, sample: u64) -> anyhow::Result<Sample>;

    /// Name of a task, by the number that a [`Sample`] carries.
    fn task_name(&self, task: u32) -> &str;
}

impl SampleSource for Dataset {
    fn num_samples(&self) -> u64 {
        Dataset::num_samples(self)
    }

    fn length(&self, sample: u64) -> u32 {
        Dataset::length(self, sample)
    }

    fn task(&self, sample: u64) -> u32 {
        Dataset::task(self, sample)
    }

    fn read(&self, sample: u64) -> anyhow::Result<Sample> {
        Dataset::read(self, sample)
    }

    fn task_name(&self, task: u32) -> &str {
        self.manifest().tasks.get(task as usize).map_or("?", |task| task.name.as_str())
    }
}
