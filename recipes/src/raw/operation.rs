//! The part of a recipe about running it: checkpoints, failures, time limits.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

/// Where and how often state is saved.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRaw {
    /// `file:///…`, `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, or a path relative to the current folder; unset is
    /// `checkpoints/` in the run folder.
    #[schemars(length(min = 1))]
    pub url: Option<String>,
    /// Options of the object store, as for `data.sources`.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    /// Save every n steps; the last step is always saved.
    #[serde(default = "defaults::every_steps")]
    #[schemars(range(min = 1))]
    pub every_steps: u64,
    /// Keep this many newest checkpoints; at least 2, so that a damaged newest one has a predecessor.
    #[serde(default = "defaults::keep_last")]
    #[schemars(range(min = 2, max = 1_000_000))]
    pub keep_last: u32,
    /// Save as well when this many seconds have passed since the last save; such a checkpoint only counts towards `keep_last`.
    #[schemars(range(min = 1, max = 31_536_000))]
    pub every_seconds: Option<u64>,
    /// Keep this many checkpoints with the lowest training loss as well.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub keep_best: u32,
    /// Keep every checkpoint of a step that is a multiple of this for good; a multiple of `every_steps`.
    #[schemars(range(min = 1))]
    pub keep_every_steps: Option<u64>,
    /// Folder on a local disk that holds a copy of the newest checkpoint, relative to the current folder.
    #[schemars(length(min = 1))]
    pub cache: Option<String>,
    /// Longest time to store one checkpoint, in seconds; one that takes longer is given up.
    #[serde(default = "defaults::upload_timeout_s")]
    #[schemars(range(min = 1, max = 86_400))]
    pub upload_timeout_s: u64,
    /// After a request to stop, longest time for the last step and a full checkpoint, in seconds.
    #[serde(default = "defaults::stop_timeout_s")]
    #[schemars(range(min = 1, max = 86_400))]
    pub stop_timeout_s: u64,
}

/// How failures are met.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClusterRaw {
    /// Replacement workers over the whole run before it is given up.
    #[serde(default = "defaults::max_restarts")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub max_restarts: u32,
    /// A worker that has not been heard of for this long, in milliseconds, is lost.
    #[serde(default = "defaults::heartbeat_timeout_ms")]
    #[schemars(range(min = 100, max = 3_600_000))]
    pub heartbeat_timeout_ms: u64,
    /// Longest wait inside one collective operation, in milliseconds.
    #[serde(default = "defaults::collective_timeout_ms")]
    #[schemars(range(min = 100, max = 86_400_000))]
    pub collective_timeout_ms: u64,
    /// Fewest workers with which the run goes on when others are lost; unset waits until every slot is filled again.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub min_workers: Option<u32>,
    /// With `min_workers`, how long a lost worker's replacement is waited for before the run goes on without it, in seconds.
    #[serde(default = "defaults::replacement_wait_s")]
    #[schemars(range(min = 0, max = 86_400))]
    pub replacement_wait_s: u64,
    /// How long workers go on without a coordinator before they save and leave, in seconds.
    #[serde(default = "defaults::coordinator_grace_s")]
    #[schemars(range(min = 0, max = 86_400))]
    pub coordinator_grace_s: u64,
    /// A worker that makes no progress for this long is stuck.
    #[serde(default)]
    pub hang: HangRaw,
    /// Failures of workers on one host after which the host is used no more; 0 never excludes a host.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub exclude_host_after: u32,
    /// How often a step is tried again after a loss that is not finite or a want of memory.
    #[serde(default = "defaults::retries_per_step")]
    #[schemars(range(min = 0, max = 100))]
    pub retries_per_step: u32,
    /// Workers and coordinator speak by TLS, and with nobody who does not hold the run's key.
    #[serde(default)]
    pub tls: bool,
}

/// Longest time without progress, in seconds, by what a worker does.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HangRaw {
    /// Building the model, connecting to the peers, restoring.
    #[serde(default = "defaults::hang_init_s")]
    #[schemars(range(min = 1, max = 86_400))]
    pub init_s: u64,
    /// Waiting for the next batch.
    #[serde(default = "defaults::hang_data_s")]
    #[schemars(range(min = 1, max = 86_400))]
    pub data_s: u64,
    /// One step.
    #[serde(default = "defaults::hang_step_s")]
    #[schemars(range(min = 1, max = 86_400))]
    pub step_s: u64,
    /// Taking a snapshot, or saving the last checkpoint.
    #[serde(default = "defaults::hang_checkpoint_s")]
    #[schemars(range(min = 1, max = 86_400))]
    pub checkpoint_s: u64,
}

impl Default for CheckpointRaw {
    fn default() -> Self {
        Self {
            url: None,
            options: BTreeMap::new(),
            every_steps: defaults::every_steps(),
            every_seconds: None,
            keep_last: defaults::keep_last(),
            keep_best: 0,
            keep_every_steps: None,
            cache: None,
            upload_timeout_s: defaults::upload_timeout_s(),
            stop_timeout_s: defaults::stop_timeout_s(),
        }
    }
}

impl Default for ClusterRaw {
    fn default() -> Self {
        Self {
            max_restarts: defaults::max_restarts(),
            heartbeat_timeout_ms: defaults::heartbeat_timeout_ms(),
            collective_timeout_ms: defaults::collective_timeout_ms(),
            min_workers: None,
            replacement_wait_s: defaults::replacement_wait_s(),
            coordinator_grace_s: defaults::coordinator_grace_s(),
            hang: HangRaw::default(),
            exclude_host_after: 0,
            retries_per_step: defaults::retries_per_step(),
            tls: false,
        }
    }
}

impl Default for HangRaw {
    fn default() -> Self {
        Self {
            init_s: defaults::hang_init_s(),
            data_s: defaults::hang_data_s(),
            step_s: defaults::hang_step_s(),
            checkpoint_s: defaults::hang_checkpoint_s(),
        }
    }
}

/// Default values, by the names of their keys.
mod defaults {
    pub(super) fn every_steps() -> u64 {
        500
    }

    pub(super) fn keep_last() -> u32 {
        2
    }

    pub(super) fn max_restarts() -> u32 {
        3
    }

    pub(super) fn heartbeat_timeout_ms() -> u64 {
        2000
    }

    pub(super) fn collective_timeout_ms() -> u64 {
        60_000
    }

    pub(super) fn upload_timeout_s() -> u64 {
        600
    }

    pub(super) fn stop_timeout_s() -> u64 {
        120
    }

    pub(super) fn replacement_wait_s() -> u64 {
        30
    }

    pub(super) fn coordinator_grace_s() -> u64 {
        60
    }

    pub(super) fn hang_init_s() -> u64 {
        600
    }

    pub(super) fn hang_data_s() -> u64 {
        300
    }

    pub(super) fn hang_step_s() -> u64 {
        300
    }

    pub(super) fn hang_checkpoint_s() -> u64 {
        600
    }

    pub(super) fn retries_per_step() -> u32 {
        1
    }
}
