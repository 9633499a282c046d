//! What stands around a run: machines, the earlier stage, the sweep, what is expected.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::study::Score;

/// Machines that one run wants.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResourcesRaw {
    /// Nodes of one run.
    #[serde(default = "defaults::one")]
    #[schemars(range(min = 1, max = 4096))]
    pub nodes: u32,
    /// Worker processes on each node; with GPUs one for each GPU.
    #[serde(default = "defaults::one")]
    #[schemars(range(min = 1, max = 1024))]
    pub workers_per_node: u32,
    /// GPUs on each node; unset is one for each worker with `train.device: cuda`, else none.
    #[schemars(range(min = 0, max = 1024))]
    pub gpus_per_node: Option<u32>,
    /// CPU cores of one worker; unset leaves it to the cluster.
    #[schemars(range(min = 1, max = 4096))]
    pub cpus_per_worker: Option<u32>,
    /// Memory of one node, in MiB; unset leaves it to the cluster.
    #[schemars(range(min = 1, max = 1_073_741_824))]
    pub memory_per_node_mib: Option<u64>,
    /// Time limit of one job, in minutes; a longer run goes on in the next job. Unset takes the cluster's.
    #[schemars(range(min = 1, max = 525_600))]
    pub time_limit_minutes: Option<u32>,
    /// Container that the processes run in.
    pub container: Option<ContainerRaw>,
    /// Environment modules to load, in order.
    #[serde(default)]
    #[schemars(inner(length(min = 1)))]
    pub modules: Vec<String>,
    /// Variables to set; no secrets.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Lines of shell before anything is started.
    #[serde(default)]
    #[schemars(inner(length(min = 1)))]
    pub setup: Vec<String>,
}

/// Container that the processes run in.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ContainerRaw {
    /// Image, as `--container-image` takes it.
    #[schemars(length(min = 1))]
    pub image: String,
    /// Mounts, each `SRC:DST` or `SRC:DST:FLAGS`.
    #[serde(default)]
    #[schemars(inner(length(min = 1)))]
    pub mounts: Vec<String>,
}

/// The stage whose model a run starts from.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AfterRaw {
    /// Recipe of the earlier stage, relative to this file; unset is no earlier stage.
    #[schemars(length(min = 1))]
    pub recipe: Option<String>,
    /// What is changed in it, by dotted key, as `--set` would.
    #[serde(default)]
    pub set: Map<String, Value>,
}

/// The runs that are to be made of one recipe.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SweepRaw {
    /// Every combination of these values, by dotted key; the last key changes fastest.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, Vec<Value>>")]
    pub grid: Map<String, Value>,
    /// Groups of keys whose values go together, place by place.
    #[serde(default)]
    #[schemars(with = "Vec<BTreeMap<String, Vec<Value>>>")]
    pub paired: Vec<Map<String, Value>>,
    /// Points stated one by one, each a map of dotted keys.
    #[serde(default)]
    pub list: Vec<Map<String, Value>>,
    /// Points drawn at random.
    pub random: Option<RandomRaw>,
    /// Seeds of every point; unset takes the recipe's own.
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub seeds: Vec<u64>,
    /// Trials that run at the same time, at most; as many as `pack` unless stated.
    #[schemars(range(min = 1, max = 10_000))]
    pub concurrency: Option<u32>,
    /// Trials that share one allocation, at the same time, each with its part of the machine.
    #[serde(default = "defaults::one")]
    #[schemars(range(min = 1, max = 1024))]
    pub pack: u32,
    /// What trials are compared by; unset is the mean accuracy over the tasks, or the loss of a recipe without tasks.
    pub metric: Option<MetricRaw>,
    /// Stops trials that fall behind; unset lets all of them end.
    pub early_stopping: Option<EarlyStoppingRaw>,
}

/// Points drawn at random; every draw is a hash of seed, key and number.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RandomRaw {
    /// Number of points.
    #[schemars(range(min = 1, max = 10_000))]
    pub samples: u32,
    /// Seed of the draws.
    #[serde(default)]
    pub seed: u64,
    /// What is drawn, by dotted key.
    #[schemars(with = "BTreeMap<String, DistributionRaw>")]
    pub keys: Map<String, Value>,
}

/// What is drawn for one key: exactly one of these.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DistributionRaw {
    /// One of these values.
    #[schemars(length(min = 1))]
    pub choice: Option<Vec<Value>>,
    /// Any number between two, to six digits.
    pub uniform: Option<[f64; 2]>,
    /// Any number between two above 0, uniform in its logarithm, to six digits.
    pub log_uniform: Option<[f64; 2]>,
    /// Any integer between two, both included.
    pub integer: Option<[i64; 2]>,
}

/// What trials are compared by.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MetricRaw {
    /// Evaluation task; unset is the mean over all tasks.
    #[schemars(length(min = 1))]
    pub task: Option<String>,
    /// Which number.
    #[serde(default = "defaults::score")]
    pub score: Score,
}

/// Asynchronous successive halving.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EarlyStoppingRaw {
    /// Step of the first rung.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub first_step: u64,
    /// Each rung has this many times the steps of the one before, and one in this many trials goes on from it.
    #[serde(default = "defaults::factor")]
    #[schemars(range(min = 2, max = 1000))]
    pub factor: u32,
}

/// What a paper says comes out, in the form of its table.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpectedRaw {
    /// Paper and table.
    #[schemars(length(min = 1))]
    pub source: String,
    /// Columns, in the table's order.
    #[schemars(length(min = 1))]
    pub columns: Vec<ColumnRaw>,
    /// Rows, in the table's order.
    #[schemars(length(min = 1))]
    pub rows: Vec<RowRaw>,
    /// Orders that must come out.
    #[serde(default)]
    pub orders: Vec<OrderRaw>,
    /// Values are of machines or data that cannot be had: shown beside ours, with no verdict on them.
    #[serde(default)]
    pub reference_only: bool,
    /// Remark below the table.
    pub note: Option<String>,
}

/// A column of a paper's table.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ColumnRaw {
    /// Its heading.
    #[schemars(length(min = 1))]
    pub name: String,
    /// Evaluation task whose score we put there; unset is the mean over all tasks.
    #[schemars(length(min = 1))]
    pub task: Option<String>,
    /// Which score; accuracy and F1 are shown in percent.
    #[serde(default = "defaults::score")]
    pub score: Score,
    /// How far our mean may be from the paper's value, in the column's unit.
    #[schemars(range(min = 0.0))]
    pub tolerance: Option<f64>,
}

/// A row of a paper's table.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RowRaw {
    /// Its heading.
    #[schemars(length(min = 1))]
    pub name: String,
    /// The arm of the sweep: swept keys and the values that they have in its trials. A row with neither this nor `best_of` is only quoted.
    pub arm: Option<Map<String, Value>>,
    /// In each column the best of the arms with these values; `{}` is the best of all.
    pub best_of: Option<Map<String, Value>>,
    /// The paper's values, by column name; a column may be absent.
    #[serde(default)]
    pub values: BTreeMap<String, f64>,
}

/// Rows of a column from the best to the worst.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OrderRaw {
    /// Column name.
    pub column: String,
    /// Groups of row names, best first; rows of one group are not compared with each other.
    #[schemars(length(min = 2), inner(length(min = 1)))]
    pub best_first: Vec<Vec<String>>,
}

impl Default for ResourcesRaw {
    fn default() -> Self {
        Self {
            nodes: defaults::one(),
            workers_per_node: defaults::one(),
            gpus_per_node: None,
            cpus_per_worker: None,
            memory_per_node_mib: None,
            time_limit_minutes: None,
            container: None,
            modules: Vec::new(),
            environment: BTreeMap::new(),
            setup: Vec::new(),
        }
    }
}

/// The defaults that are not zero.
mod defaults {
    use crate::study::Score;

    pub(super) fn one() -> u32 {
        1
    }

    pub(super) fn factor() -> u32 {
        3
    }

    pub(super) fn score() -> Score {
        Score::Accuracy
    }
}
