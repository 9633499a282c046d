//! What a plan is computed from.

use cloze_recipes::recipe::{ModelShape, Recipe};

/// Everything that is known before a run.
#[derive(Clone, Debug)]
pub struct PlanFacts {
    /// What is to be done.
    pub recipe: Recipe,
    /// Extents of its model.
    pub shape: ModelShape,
    /// Rows of its embedding.
    pub vocab: u64,
    /// Machines of the run.
    pub nodes: u32,
    /// Workers of the run, over all machines.
    pub workers: u32,
    /// Its data.
    pub data: DataFacts,
    /// Its machines.
    pub machine: MachineFacts,
    /// The sweep over it; `None` is one run.
    pub trials: Option<TrialFacts>,
}

/// What is known of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFacts {
    /// It is prepared, as its manifest says.
    Prepared {
        /// Samples in all shards.
        samples: u64,
        /// Samples of one epoch, which are fewer where the mixture takes at most so many of a task.
        epoch_samples: u64,
        /// Tokens in all shards.
        tokens: u64,
        /// Bytes of all shards.
        bytes: u64,
    },
    /// Only its sources are known.
    Sources {
        /// Bytes of the record files, as stored.
        stored_bytes: u64,
        /// About as many when decompressed.
        text_bytes: u64,
    },
    /// Not even those.
    Unknown,
}

/// What is known of the machines.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MachineFacts {
    /// Memory of one worker: its GPU's, or its part of a machine's.
    pub worker_memory_mib: Option<u64>,
    /// Tokens that one worker trains on in a second.
    pub tokens_per_second: Option<f64>,
    /// Time limit of one job, in minutes.
    pub time_limit_minutes: Option<u32>,
    /// How long before the limit a job begins to save and leave, in seconds.
    pub warning_s: u32,
    /// Jobs that one run may use up.
    pub max_jobs: Option<u32>,
}

/// What is known of a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrialFacts {
    /// Runs in all, seeds included.
    pub trials: u64,
    /// Runs at the same time, at most.
    pub concurrency: u32,
    /// Runs that share one allocation, each with all its workers.
    pub pack: u32,
    /// Runs are stopped that fall behind, so that the numbers are the most that can come.
    pub stops_early: bool,
}
