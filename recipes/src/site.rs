//! A cluster file: how jobs are started at one site. One file serves every recipe.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::study::Container;

/// Silence after which a sweep takes its trials away from a host that cannot be reached, in seconds, unless a cluster file says otherwise.
pub const LOST_AFTER_S: u32 = 300;

/// A checked cluster file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Site {
    /// Names the site in tables.
    pub name: String,
    /// How its machines are reached.
    pub kind: SiteKind,
    /// Folder for runs and studies that all nodes share under this path; `None` is the current folder.
    pub folder: Option<PathBuf>,
    /// Container of every job, unless the recipe names one.
    pub container: Option<Container>,
    /// Modules of every job, before those of the recipe.
    pub modules: Vec<String>,
    /// Variables of every job; those of the recipe win.
    pub environment: BTreeMap<String, String>,
    /// Lines of shell of every job, before those of the recipe.
    pub setup: Vec<String>,
    /// Checks of the machines before step 0.
    pub preflight: Preflight,
    /// Memory of one GPU, in MiB, for `cloze plan`; `None` where it is not known.
    pub gpu_memory_mib: Option<u64>,
    /// Tokens that one worker trains on in a second, by `cloze bench RECIPE`, for the time that `cloze plan` expects.
    pub tokens_per_second: Option<f64>,
}

/// How a site's machines are reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SiteKind {
    /// This machine.
    Local,
    /// Hosts that a remote shell reaches.
    Ssh(SshSite),
    /// A batch system.
    Slurm(SlurmSite),
}

/// Hosts that a remote shell reaches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshSite {
    /// Hosts, in order; runs take as many as they have nodes.
    pub hosts: Vec<String>,
    /// The remote shell and its options; the host and one command line follow.
    pub command: Vec<String>,
    /// Silence after which a sweep takes its trials away from a host that cannot be reached, in seconds.
    pub lost_after_s: u32,
}

/// What a site's SLURM wants.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlurmSite {
    /// `--partition`
    pub partition: Option<String>,
    /// `--account`
    pub account: Option<String>,
    /// `--qos`
    pub qos: Option<String>,
    /// `--constraint`
    pub constraint: Option<String>,
    /// Nodes that no job may use.
    pub exclude: Vec<String>,
    /// Type of the GPUs in a generic resource, as in `gpu:TYPE:N`.
    pub gpu_type: Option<String>,
    /// Further options of `sbatch`, each as it stands.
    pub options: Vec<String>,
    /// Time limit where the recipe states none, in minutes.
    pub time_limit_minutes: Option<u32>,
    /// How long before the time limit a job is warned, in seconds.
    pub warning_s: u32,
    /// Jobs that one run may use up, at most.
    pub max_jobs: u32,
    /// Interval at which the states of jobs are asked for, in seconds; it doubles up to 16 times as long while nothing changes.
    pub poll_s: u32,
}

/// Checks of the machines before step 0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preflight {
    /// Whether they are made.
    pub enabled: bool,
    /// A pair of nodes below this share of the median bandwidth is slow.
    pub min_bandwidth_share: f64,
    /// A node whose matrix product takes longer than this many times the median is slow.
    pub max_slowdown: f64,
    /// Longest time for all checks, in seconds.
    pub timeout_s: u32,
}
