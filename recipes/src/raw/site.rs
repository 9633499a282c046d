//! The cluster file as a user writes it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::ContainerRaw;

/// A cluster file: how jobs are started at one site.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Cloze cluster file")]
pub struct SiteRaw {
    /// Schema version.
    #[schemars(range(min = 1, max = 1))]
    pub version: u32,
    /// Names the site in tables: letters, digits, `-`, `_` and `.`.
    #[schemars(length(min = 1))]
    pub name: String,
    /// How its machines are reached.
    pub kind: SiteKindRaw,
    /// Folder for runs and studies, relative to this file; all nodes must share it under one path. Unset is the current folder.
    #[schemars(length(min = 1))]
    pub folder: Option<String>,
    /// What the site's SLURM wants; with `kind: slurm`.
    pub slurm: Option<SlurmRaw>,
    /// Hosts that a remote shell reaches; with `kind: ssh`.
    pub ssh: Option<SshRaw>,
    /// Container of every job, unless the recipe names one.
    pub container: Option<ContainerRaw>,
    /// Environment modules of every job, before those of the recipe.
    #[serde(default)]
    #[schemars(inner(length(min = 1)))]
    pub modules: Vec<String>,
    /// Variables of every job; those of the recipe win. No secrets.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Lines of shell of every job, before those of the recipe.
    #[serde(default)]
    #[schemars(inner(length(min = 1)))]
    pub setup: Vec<String>,
    /// Checks of the machines before step 0.
    #[serde(default)]
    pub preflight: PreflightRaw,
    /// Memory of one GPU, in MiB, for `cloze plan`.
    #[schemars(range(min = 1, max = 16_777_216))]
    pub gpu_memory_mib: Option<u64>,
    /// Tokens that one worker trains on in a second, by `cloze bench RECIPE`, for the time that `cloze plan` expects.
    #[schemars(range(max = 1e12), extend("exclusiveMinimum" = 0.0))]
    pub tokens_per_second: Option<f64>,
}

/// How a site's machines are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SiteKindRaw {
    /// This machine.
    Local,
    /// Hosts that a remote shell reaches.
    Ssh,
    /// A batch system.
    Slurm,
}

/// What the site's SLURM wants.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SlurmRaw {
    /// Partition of the jobs; unset is the cluster's default.
    #[schemars(length(min = 1))]
    pub partition: Option<String>,
    /// Account that jobs are booked on.
    #[schemars(length(min = 1))]
    pub account: Option<String>,
    /// Quality of service.
    #[schemars(length(min = 1))]
    pub qos: Option<String>,
    /// Features that the nodes must have.
    #[schemars(length(min = 1))]
    pub constraint: Option<String>,
    /// Nodes that no job may use.
    #[serde(default)]
    #[schemars(inner(length(min = 1)))]
    pub exclude: Vec<String>,
    /// Type of the GPUs, as in `gpu:TYPE:N`.
    #[schemars(length(min = 1))]
    pub gpu_type: Option<String>,
    /// Further options of `sbatch`, each as it stands, such as `--reservation=NAME`.
    #[serde(default)]
    #[schemars(inner(length(min = 1)))]
    pub options: Vec<String>,
    /// Time limit where the recipe states none, in minutes.
    #[schemars(range(min = 1, max = 525_600))]
    pub time_limit_minutes: Option<u32>,
    /// How long before the time limit a job is warned, in seconds.
    #[serde(default = "defaults::warning_s")]
    #[schemars(range(min = 1, max = 65_535))]
    pub warning_s: u32,
    /// Jobs that one run may use up, at most.
    #[serde(default = "defaults::max_jobs")]
    #[schemars(range(min = 1, max = 1000))]
    pub max_jobs: u32,
    /// Interval at which the states of jobs are asked for, in seconds.
    #[serde(default = "defaults::poll_s")]
    #[schemars(range(min = 1, max = 3600))]
    pub poll_s: u32,
}

/// Hosts that a remote shell reaches.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SshRaw {
    /// Hosts, in order; runs take as many as they have nodes.
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub hosts: Vec<String>,
    /// The remote shell and its options; the host and one command line follow.
    #[serde(default = "defaults::ssh_command")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub command: Vec<String>,
    /// Silence after which a sweep takes its trials away from a host that cannot be reached, in seconds; what works there ends itself after
    /// a third of it without the disk.
    #[serde(default = "defaults::lost_after_s")]
    #[schemars(range(min = 15, max = 86400))]
    pub lost_after_s: u32,
}

/// Checks of the machines before step 0.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PreflightRaw {
    /// Whether they are made.
    #[serde(default = "defaults::enabled")]
    pub enabled: bool,
    /// A pair of nodes below this share of the median bandwidth is slow.
    #[serde(default = "defaults::min_bandwidth_share")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_bandwidth_share: f64,
    /// A node whose matrix product takes longer than this many times the median is slow.
    #[serde(default = "defaults::max_slowdown")]
    #[schemars(range(min = 1.0, max = 1e6))]
    pub max_slowdown: f64,
    /// Longest time for all checks, in seconds.
    #[serde(default = "defaults::timeout_s")]
    #[schemars(range(min = 1, max = 86_400))]
    pub timeout_s: u32,
}

impl Default for PreflightRaw {
    fn default() -> Self {
        Self {
            enabled: defaults::enabled(),
            min_bandwidth_share: defaults::min_bandwidth_share(),
            max_slowdown: defaults::max_slowdown(),
            timeout_s: defaults::timeout_s(),
        }
    }
}

impl Default for SlurmRaw {
    fn default() -> Self {
        Self {
            partition: None,
            account: None,
            qos: None,
            constraint: None,
            exclude: Vec::new(),
            gpu_type: None,
            options: Vec::new(),
            time_limit_minutes: None,
            warning_s: defaults::warning_s(),
            max_jobs: defaults::max_jobs(),
            poll_s: defaults::poll_s(),
        }
    }
}

/// The defaults that are not zero.
mod defaults {
    pub(super) fn warning_s() -> u32 {
        120
    }

    pub(super) fn max_jobs() -> u32 {
        20
    }

    pub(super) fn poll_s() -> u32 {
        2
    }

    pub(super) fn ssh_command() -> Vec<String> {
        ["ssh", "-o", "BatchMode=yes"].map(str::to_owned).to_vec()
    }

    pub(super) fn lost_after_s() -> u32 {
        crate::site::LOST_AFTER_S
    }

    pub(super) fn enabled() -> bool {
        true
    }

    pub(super) fn min_bandwidth_share() -> f64 {
        0.3
    }

    pub(super) fn max_slowdown() -> f64 {
        3.0
    }

    pub(super) fn timeout_s() -> u32 {
        300
    }
}
