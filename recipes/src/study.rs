//! What stands around a run in a recipe file: the machines it wants, the stage it starts from, the sweep over it, and what is expected of it.
//!
//! None of this changes what a run computes, so none of it is part of a run's recipe or of its hash. A [`Study`] is a recipe file read
//! whole; [`crate::recipe::Recipe`] is the part that one run obeys.

mod arms;
mod draw;
mod expand;
mod stages;
mod trials;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::recipe::Recipe;

pub(crate) use arms::check_arms;
pub(crate) use stages::{Scope, Stages, start_as_stage};
pub(crate) use trials::trials_of;

/// Most trials of one sweep.
pub const MAX_TRIALS: u64 = 10_000;

/// A recipe file, read whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Study {
    /// The file, absolute.
    pub file: PathBuf,
    /// The run that the file states, without any value of the sweep.
    pub recipe: Recipe,
    /// Machines that one run wants.
    pub resources: Resources,
    /// The stage whose model a run starts from.
    pub after: Option<After>,
    /// The runs that are to be made of it; `None` is the one run of `recipe`.
    pub sweep: Option<Sweep>,
    /// What a paper says comes out.
    pub expected: Option<Expected>,
    /// The profile that was asked for, such as `toy`.
    pub profile: Option<String>,
    /// The overrides that were asked for.
    pub overrides: Vec<String>,
}

/// Machines that one run wants.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resources {
    /// Nodes of one run.
    pub nodes: u32,
    /// Worker processes on each node; with GPUs one for each GPU.
    pub workers_per_node: u32,
    /// GPUs on each node; 0 asks for none.
    pub gpus_per_node: u32,
    /// CPU cores of one worker; `None` leaves it to the cluster.
    pub cpus_per_worker: Option<u32>,
    /// Memory of one node, in MiB; `None` leaves it to the cluster.
    pub memory_per_node_mib: Option<u64>,
    /// Time limit of one job, in minutes; a longer run goes on in the next job. `None` takes the cluster's.
    pub time_limit_minutes: Option<u32>,
    /// Container that the processes run in, where the cluster has pyxis and enroot.
    pub container: Option<Container>,
    /// Environment modules to load, in order.
    pub modules: Vec<String>,
    /// Variables to set; no secrets.
    pub environment: BTreeMap<String, String>,
    /// Lines of shell before anything is started.
    pub setup: Vec<String>,
}

/// A container, by pyxis' options.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// `--container-image`
    pub image: String,
    /// `--container-mounts`, each `SRC:DST` or `SRC:DST:FLAGS`
    pub mounts: Vec<String>,
}

/// The stage whose model a run starts from: what that recipe trains is exported once, and `model.path` is the export.
#[derive(Clone, Debug, PartialEq)]
pub struct After {
    /// Recipe file of the earlier stage, absolute.
    pub recipe: PathBuf,
    /// What is changed in it, as `--set` would.
    pub overrides: Vec<String>,
}

/// The runs that are to be made of one recipe: every point of the space, with every seed.
#[derive(Clone, Debug, PartialEq)]
pub struct Sweep {
    /// Where the points come from.
    pub space: Space,
    /// Seeds of every point; empty takes the recipe's own.
    pub seeds: Vec<u64>,
    /// Trials that run at the same time, at most.
    pub concurrency: u32,
    /// Trials that share one allocation, at the same time, each with its part of the machine.
    pub pack: u32,
    /// What trials are compared by.
    pub metric: Metric,
    /// Stops trials that fall behind; `None` lets all of them end.
    pub early_stopping: Option<EarlyStopping>,
}

impl Sweep {
    /// The swept keys, in the sweep's order, each once.
    pub fn keys(&self) -> Vec<&str> {
        self.space.keys()
    }

    /// Number of trials: every point with every seed.
    pub fn num_trials(&self) -> u64 {
        self.space.num_points().saturating_mul(self.seeds.len().max(1) as u64)
    }
}

/// Points of a sweep: grid times paired times list times random, each absent part counting as one point that changes nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Space {
    /// Every combination of these values, the last key changing fastest.
    pub grid: Vec<(String, Vec<serde_json::Value>)>,
    /// Groups of keys whose values go together, place by place.
    pub paired: Vec<Vec<(String, Vec<serde_json::Value>)>>,
    /// Points stated one by one.
    pub list: Vec<Vec<(String, serde_json::Value)>>,
    /// Points drawn at random.
    pub random: Option<RandomSpace>,
}

impl Space {
    /// The keys whose values the points state, in order, each once.
    pub fn keys(&self) -> Vec<&str> {
        let grid = self.grid.iter().map(|(key, _)| key);
        let paired = self.paired.iter().flatten().map(|(key, _)| key);
        let list = self.list.iter().flatten().map(|(key, _)| key);
        let random = self.random.iter().flat_map(|random| &random.keys).map(|(key, _)| key);
        let mut keys: Vec<&str> = Vec::new();
        for key in grid.chain(paired).chain(list).chain(random) {
            if !keys.contains(&key.as_str()) {
                keys.push(key);
            }
        }
        keys
    }

    /// Number of points; at least 1.
    pub fn num_points(&self) -> u64 {
        let grid = self.grid.iter().map(|(_, values)| values.len());
        let paired = self.paired.iter().map(|group| group.first().map_or(1, |(_, values)| values.len()));
        let list = [self.list.len().max(1)];
        let random = self.random.iter().map(|random| random.samples as usize);
        grid.chain(paired).chain(list).chain(random).fold(1, |product: u64, count| product.saturating_mul(count as u64))
    }
}

/// Points drawn at random; every draw is a hash of seed, key and number.
#[derive(Clone, Debug, PartialEq)]
pub struct RandomSpace {
    /// Number of points.
    pub samples: u32,
    /// Seed of the draws.
    pub seed: u64,
    /// Key and what is drawn for it.
    pub keys: Vec<(String, Distribution)>,
}

/// What is drawn for one key.
#[derive(Clone, Debug, PartialEq)]
pub enum Distribution {
    /// One of these values.
    Choice(Vec<serde_json::Value>),
    /// Any number between two.
    Uniform(f64, f64),
    /// Any number between two positive ones, uniform in its logarithm.
    LogUniform(f64, f64),
    /// Any integer between two, both included.
    Integer(i64, i64),
}

/// What trials are compared by: a task's score, the mean over the tasks, or the training loss.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metric {
    /// Evaluation task; `None` is the mean over all tasks.
    pub task: Option<String>,
    /// Which number.
    pub score: Score,
}

/// A number that a trial ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// Share of rows answered rightly; more is better.
    Accuracy,
    /// Mean F1 over the labels; more is better.
    MacroF1,
    /// Training loss of the last step; less is better.
    Loss,
}

/// Asynchronous successive halving: at each rung the best share of the trials seen there goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EarlyStopping {
    /// Step of the first rung.
    pub first_step: u64,
    /// Each rung has this many times the steps of the one before, and one in this many trials goes on from it.
    pub factor: u32,
}

/// What a paper says comes out, in the form of its table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    /// Paper and table.
    pub source: String,
    /// Columns, in the table's order.
    pub columns: Vec<ExpectedColumn>,
    /// Rows, in the table's order.
    pub rows: Vec<ExpectedRow>,
    /// Orders that must come out.
    pub orders: Vec<ExpectedOrder>,
    /// Values are of machines or data that cannot be had: shown beside ours, with no verdict on them.
    pub reference_only: bool,
    /// Remark below the table.
    pub note: Option<String>,
}

/// A column of a paper's table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpectedColumn {
    /// Its heading.
    pub name: String,
    /// What we put there. Accuracy and F1 are shown in percent.
    pub metric: Metric,
    /// How far our mean may be from the paper's value, in the column's unit.
    pub tolerance: Option<f64>,
}

/// A row of a paper's table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpectedRow {
    /// Its heading.
    pub name: String,
    /// What of ours stands beside it.
    pub ours: RowSource,
    /// The paper's values, by column name; a column may be absent.
    pub values: BTreeMap<String, f64>,
}

/// What of ours stands in a row. Trials are named by keys of the recipe and the values that they have in them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RowSource {
    /// Nothing: the row is only quoted.
    Quoted,
    /// One arm of the sweep, over its seeds.
    Arm(Vec<(String, serde_json::Value)>),
    /// In each column the best of these arms.
    BestOf(Vec<(String, serde_json::Value)>),
}

impl RowSource {
    /// Keys and values of its trials; empty for a row that is only quoted.
    pub fn values(&self) -> &[(String, serde_json::Value)] {
        match self {
            Self::Quoted => &[],
            Self::Arm(values) | Self::BestOf(values) => values,
        }
    }
}

/// Rows of a column from the best to the worst; rows of one group are not compared with each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpectedOrder {
    /// Column name.
    pub column: String,
    /// Groups of row names, best first.
    pub groups: Vec<Vec<String>>,
}

/// One run of a study: a point of the sweep with one seed.
#[derive(Clone, Debug, PartialEq)]
pub struct Trial {
    /// Values of the swept keys, in the sweep's order, without the seed.
    pub parameters: Vec<(String, serde_json::Value)>,
    /// The run's recipe. Its name is the study's and the first characters of `hash`; `data.output` and, after an earlier stage,
    /// `model.path` lie in the study's folder under their own content hashes.
    pub recipe: Recipe,
    /// Hash of everything that the run computes from: the recipe without its name and places, and the earlier stage.
    pub hash: String,
    /// Hash of what the data is prepared from; trials with the same one share the preparation.
    pub data_hash: String,
    /// Seed that the data is prepared with: the recipe's own, whatever `sweep.seeds` says, so that all seeds train on the same samples.
    pub data_seed: u64,
    /// The earlier stage.
    pub parent: Option<Box<Trial>>,
}

impl Trial {
    /// The recipe that the trial's data is prepared by; trials with the same data hash may take any one of theirs.
    pub fn data_recipe(&self) -> Recipe {
        Recipe { seed: self.data_seed, ..self.recipe.clone() }
    }
}
