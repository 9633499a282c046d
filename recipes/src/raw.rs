//! The recipe, and the cluster file, as a user writes it: every default and every bound that a single value can break.
//!
//! The JSON Schema comes from these types, comments included. What only two values together can break is in `check`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

mod operation;
mod site;
mod study;

pub use operation::{CheckpointRaw, ClusterRaw, HangRaw};
pub use site::{PreflightRaw, SiteKindRaw, SiteRaw, SlurmRaw, SshRaw};
pub use study::{
    AfterRaw, ColumnRaw, ContainerRaw, DistributionRaw, EarlyStoppingRaw, ExpectedRaw, MetricRaw, OrderRaw, RandomRaw, ResourcesRaw,
    RowRaw, SweepRaw,
};

use crate::recipe::{Auxiliary, Device, LossNorm, Masking, ModelShape, Precision, ScheduleKind, Shard, Truncation};

/// A Cloze recipe: what a run is to do.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Cloze recipe")]
pub struct RecipeRaw {
    /// Schema version.
    #[schemars(range(min = 1, max = 1))]
    pub version: u32,
    /// Path of a recipe to start from, relative to this file. Maps merge key by key, lists and single values replace, `null` unsets.
    pub extends: Option<String>,
    /// Names the run folder: letters, digits, `-`, `_` and `.`.
    #[schemars(length(min = 1))]
    pub name: String,
    /// Every random draw is a hash of this seed and integers.
    #[serde(default = "defaults::seed")]
    pub seed: u64,
    /// Which model, from where.
    pub model: ModelRaw,
    /// Which records, how they become samples.
    pub data: DataRaw,
    /// What is masked and how the loss is formed.
    #[serde(default)]
    pub objective: ObjectiveRaw,
    /// Batch, optimizer, schedule, device.
    pub train: TrainRaw,
    /// Where and how often state is saved.
    #[serde(default)]
    pub checkpoint: CheckpointRaw,
    /// How failures are met.
    #[serde(default)]
    pub cluster: ClusterRaw,
    /// What is scored by `cloze eval`, in order.
    #[serde(default)]
    pub evaluation: Vec<EvaluationRaw>,
    /// Maps that `--profile NAME` lays over the recipe, key by key, after `extends` and before `--set`.
    #[serde(default)]
    pub profiles: BTreeMap<String, serde_json::Map<String, serde_json::Value>>,
    /// Machines that one run wants.
    #[serde(default)]
    pub resources: ResourcesRaw,
    /// The stage whose model a run starts from.
    pub after: Option<AfterRaw>,
    /// The runs that are to be made of this recipe.
    pub sweep: Option<SweepRaw>,
    /// What a paper says comes out.
    pub expected: Option<ExpectedRaw>,
}

/// Which model, from where: a `path`, or a `preset` with optional `shape`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelRaw {
    /// Hugging Face checkpoint folder to start from, relative to this file. Not together with `preset` or `shape`.
    #[schemars(length(min = 1))]
    pub path: Option<String>,
    /// Size of a model from scratch.
    pub preset: Option<Preset>,
    /// Single sizes that differ from the preset; without a preset, the four sizes that have no default.
    pub shape: Option<ShapeRaw>,
    /// Folder with `tokenizer.json`, or that file, relative to this file. Defaults to `path`; required without it.
    #[schemars(length(min = 1))]
    pub tokenizer: Option<String>,
    /// Token placed right before the mask; it must be one token of the tokenizer.
    #[serde(default = "defaults::anchor_token")]
    #[schemars(length(min = 1))]
    pub anchor_token: String,
}

/// Size of a `ModernBERT` from scratch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// 4 layers of width 128: for tests and demonstrations.
    Tiny,
    /// 10 layers of width 384.
    Small,
    /// 22 layers of width 768, as `ModernBERT` base.
    Base,
    /// 28 layers of width 1024, as `ModernBERT` large.
    Large,
}

impl Preset {
    /// The shape that the name stands for.
    pub fn shape(self) -> ModelShape {
        let [hidden_size, intermediate_size, num_hidden_layers, num_attention_heads] = match self {
            Self::Tiny => [128, 192, 4, 4],
            Self::Small => [384, 576, 10, 6],
            Self::Base => [768, 1152, 22, 12],
            Self::Large => [1024, 2624, 28, 16],
        };
        ModelShape {
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            global_attn_every_n_layers: 3,
            local_attention: 128,
            global_rope_theta: 160_000.0,
            local_rope_theta: 10_000.0,
            max_position_embeddings: 8192,
        }
    }
}

/// Shape of a `ModernBERT`; names as in a Hugging Face config.json.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ShapeRaw {
    /// Width of the residual stream.
    #[schemars(range(min = 8, max = 65_536))]
    pub hidden_size: Option<u32>,
    /// Width of one half of the GLU.
    #[schemars(range(min = 8, max = 262_144))]
    pub intermediate_size: Option<u32>,
    /// Number of layers.
    #[schemars(range(min = 1, max = 1024))]
    pub num_hidden_layers: Option<u32>,
    /// Number of heads; divides `hidden_size`, head width even.
    #[schemars(range(min = 1, max = 1024))]
    pub num_attention_heads: Option<u32>,
    /// Every n-th layer (0, n, 2n, …) attends globally; 3 unless stated.
    #[schemars(range(min = 1, max = 1024))]
    pub global_attn_every_n_layers: Option<u32>,
    /// Whole window of a local layer, in tokens, even; 128 unless stated.
    #[schemars(range(min = 2, max = 1_048_576))]
    pub local_attention: Option<u32>,
    /// Rotary base of the global layers; 160000 unless stated.
    #[schemars(range(min = 1.0, max = 1e12))]
    pub global_rope_theta: Option<f64>,
    /// Rotary base of the local layers; 10000 unless stated.
    #[schemars(range(min = 1.0, max = 1e12))]
    pub local_rope_theta: Option<f64>,
    /// Longest document, in tokens; 8192 unless stated.
    #[schemars(range(min = 8, max = 1_048_576))]
    pub max_position_embeddings: Option<u32>,
}

/// Which records, how they become samples.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataRaw {
    /// Inputs, in order.
    #[schemars(length(min = 1))]
    pub sources: Vec<SourceRaw>,
    /// Folder of the prepared shards, relative to the current folder.
    #[schemars(length(min = 1))]
    pub output: String,
    /// Regular expressions on task names; a task that matches none is dropped. Empty keeps every task.
    #[serde(default)]
    #[schemars(inner(length(min = 1)))]
    pub only: Vec<String>,
    /// Regular expressions on task names; a task that matches any is dropped.
    #[serde(default)]
    #[schemars(inner(length(min = 1)))]
    pub hold_out: Vec<String>,
    /// Regular expressions on template types; a row whose template type matches any is dropped.
    #[serde(default)]
    #[schemars(inner(length(min = 1)))]
    pub hold_out_templates: Vec<String>,
    /// At most this many tasks, drawn by the hash of seed and name: those of a smaller number are among those of a larger one.
    #[schemars(range(min = 1))]
    pub max_tasks: Option<u64>,
    /// At most this many samples of a task. Not together with `wanted_total`.
    #[schemars(range(min = 1))]
    pub cap_per_task: Option<u64>,
    /// Wanted number of samples; the cap per task is found by bisection.
    #[schemars(range(min = 1))]
    pub wanted_total: Option<u64>,
    /// Share of each task's samples that is left of them after the cap; a smaller share lies within a larger one.
    #[serde(default = "defaults::fraction")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub fraction: f64,
    /// At most this many samples of a task in one epoch, other ones in each; all of them where unset.
    #[schemars(range(min = 1))]
    pub mixing_cap: Option<u64>,
    /// Longest sample, in tokens, special tokens included.
    #[serde(default = "defaults::max_length")]
    #[schemars(range(min = 8, max = 1_048_576))]
    pub max_length: u32,
    /// What happens to a longer one.
    #[serde(default = "defaults::truncate")]
    pub truncate: Truncation,
    /// Text of a sample: `{inputs}`, `{anchor}` and `{target}` are replaced; `{target}` occurs once.
    #[serde(default = "defaults::template")]
    pub template: String,
}

/// One input of the data preparation.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceRaw {
    /// `file:///…`, `s3://bucket/prefix`, or a path relative to this file; a folder means every record file below it.
    #[schemars(length(min = 1))]
    pub url: String,
    /// Task name for records that carry none.
    #[schemars(length(min = 1))]
    pub task: Option<String>,
    /// Options of the object store by their usual names (`endpoint`, `region`, `allow_http`); secrets come from the environment.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
}

/// What is masked and how the loss is formed.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ObjectiveRaw {
    /// Objective of the examples that are not answer-token prediction.
    #[serde(default = "defaults::auxiliary")]
    pub auxiliary: Auxiliary,
    /// Share of the examples that take the auxiliary objective; drawn per example and epoch. 0 where `auxiliary` is `none`.
    #[serde(default = "defaults::auxiliary_ratio")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub auxiliary_ratio: f64,
    /// Probability that a token of an auxiliary example is masked.
    #[serde(default = "defaults::mask_probability")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub mask_probability: f64,
    /// What a masked position of an auxiliary example holds.
    #[serde(default = "defaults::masking")]
    pub masking: Masking,
    /// How per-position losses become one number.
    #[serde(default = "defaults::loss_norm")]
    pub loss_norm: LossNorm,
}

/// Batch, optimizer, schedule, device.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainRaw {
    /// Optimizer steps of the run. Exactly one of `steps` and `epochs`.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub steps: Option<u64>,
    /// Passes over the data. Exactly one of `steps` and `epochs`.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub epochs: Option<f64>,
    /// Examples of one optimizer step, over all workers.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch_examples: u32,
    /// Token budget of one forward pass on one worker; at least `data.max_length`.
    #[schemars(range(min = 1, max = 16_777_216))]
    pub micro_batch_tokens: u32,
    /// Peak learning rate.
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0.0))]
    pub learning_rate: f64,
    /// `AdamW` first and second moment decay, each from 0 to below 1.
    #[serde(default = "defaults::betas")]
    pub betas: [f64; 2],
    /// `AdamW` epsilon.
    #[serde(default = "defaults::epsilon")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub epsilon: f64,
    /// Decoupled weight decay of matrices; norms and biases have none.
    #[serde(default = "defaults::weight_decay")]
    #[schemars(range(min = 0.0, max = 10.0))]
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 switches clipping off.
    #[serde(default = "defaults::clip_norm")]
    #[schemars(range(min = 0.0, max = 1e6))]
    pub clip_norm: f64,
    /// Learning rate over the steps.
    #[serde(default)]
    pub schedule: ScheduleRaw,
    /// Device of the tensors.
    #[serde(default = "defaults::device")]
    pub device: Device,
    /// Precision of the forward and backward pass; state is always float32.
    #[serde(default = "defaults::precision")]
    pub precision: Precision,
    /// CPU threads of one worker; 0 shares the machine's cores among the workers.
    #[serde(default)]
    #[schemars(range(min = 0, max = 4096))]
    pub threads: u32,
    /// Every n-th step is logged.
    #[serde(default = "defaults::log_every_steps")]
    #[schemars(range(min = 1))]
    pub log_every_steps: u64,
    /// What the workers divide among themselves instead of each holding a copy; each level includes the ones before.
    #[serde(default = "defaults::shard")]
    pub shard: Shard,
    /// With `shard`: each worker also keeps a replica of another one's share, so that a lost worker takes nothing with it.
    #[serde(default)]
    pub replicate_shards: bool,
    /// Every worker writes down which samples it trained on in which step, in `audit/` of the run folder.
    #[serde(default)]
    pub audit_samples: bool,
    /// GPUs compute with kernels that give the same bits every time, or end with an error where there is none. CPUs do so anyway.
    #[serde(default)]
    pub deterministic: bool,
}

/// Learning rate over the steps: warm-up, then a shape.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScheduleRaw {
    /// Shape after the warm-up.
    #[serde(default = "defaults::schedule_kind")]
    pub kind: ScheduleKind,
    /// Linear warm-up, in steps. Not together with `warmup_ratio`.
    pub warmup_steps: Option<u64>,
    /// Linear warm-up as a share of all steps; 0.05 where neither is stated.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub warmup_ratio: Option<f64>,
    /// Learning rate at the end as a share of the peak.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub end_ratio: f64,
    /// Exponent of the polynomial shape.
    #[serde(default = "defaults::power")]
    #[schemars(range(max = 100.0), extend("exclusiveMinimum" = 0.0))]
    pub power: f64,
    /// Share of all steps that the `wsd` shape spends decaying.
    #[serde(default = "defaults::decay_ratio")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub decay_ratio: f64,
}

/// One task scored by `cloze eval`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvaluationRaw {
    /// Name in tables and files: letters, digits, `-`, `_` and `.`.
    #[schemars(length(min = 1))]
    pub name: String,
    /// Files (`.jsonl`, `.jsonl.gz` or `.csv`) or folders of them, relative to this file; in a folder every file is a subtask.
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub files: Vec<String>,
    /// Column names of a csv without a header; empty means that the first line is the header.
    #[serde(default)]
    #[schemars(inner(length(min = 1)))]
    pub columns: Vec<String>,
    /// Prompt: `{column}`, `{anchor}` and `{mask}` are replaced; `{mask}` occurs once.
    #[serde(default = "defaults::evaluation_template")]
    pub template: String,
    /// Column that holds the right answer.
    #[serde(default = "defaults::answer_column")]
    #[schemars(length(min = 1))]
    pub answer_column: String,
    /// Labels in the order of the table.
    #[schemars(length(min = 2))]
    pub labels: Vec<LabelRaw>,
    /// Longest prompt, in tokens; `data.max_length` where unset.
    #[schemars(range(min = 8, max = 1_048_576))]
    pub max_length: Option<u32>,
    /// Score at most this many rows of each file; all where unset.
    #[schemars(range(min = 1))]
    pub limit: Option<u64>,
}

/// One label of an evaluation task.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelRaw {
    /// The value in the answer column.
    #[schemars(length(min = 1))]
    pub value: String,
    /// Words at the mask that stand for it; their probabilities are added. The value itself where unset.
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub words: Option<Vec<String>>,
}

impl Default for ObjectiveRaw {
    fn default() -> Self {
        Self {
            auxiliary: defaults::auxiliary(),
            auxiliary_ratio: defaults::auxiliary_ratio(),
            mask_probability: defaults::mask_probability(),
            masking: defaults::masking(),
            loss_norm: defaults::loss_norm(),
        }
    }
}

impl Default for ScheduleRaw {
    fn default() -> Self {
        Self {
            kind: defaults::schedule_kind(),
            warmup_steps: None,
            warmup_ratio: None,
            end_ratio: 0.0,
            power: defaults::power(),
            decay_ratio: defaults::decay_ratio(),
        }
    }
}

/// The defaults that are not zero, each stated once.
pub(crate) mod defaults {
    use crate::recipe::{Auxiliary, Device, LossNorm, Masking, Precision, ScheduleKind, Shard, Truncation};

    pub(crate) fn seed() -> u64 {
        42
    }

    pub(crate) fn anchor_token() -> String {
        "[unused0]".to_owned()
    }

    pub(crate) fn fraction() -> f64 {
        1.0
    }

    pub(crate) fn max_length() -> u32 {
        2048
    }

    pub(crate) fn truncate() -> Truncation {
        Truncation::PromptKeepAnswer
    }

    pub(crate) fn template() -> String {
        "{inputs}\nAnswer: {anchor} {target}".to_owned()
    }

    pub(crate) fn auxiliary() -> Auxiliary {
        Auxiliary::DummyMlm
    }

    pub(crate) fn auxiliary_ratio() -> f64 {
        0.2
    }

    pub(crate) fn mask_probability() -> f64 {
        0.3
    }

    pub(crate) fn masking() -> Masking {
        Masking::AllMask
    }

    pub(crate) fn loss_norm() -> LossNorm {
        LossNorm::TokenMean
    }

    pub(crate) fn betas() -> [f64; 2] {
        [0.9, 0.999]
    }

    pub(crate) fn epsilon() -> f64 {
        1e-8
    }

    pub(crate) fn weight_decay() -> f64 {
        0.01
    }

    pub(crate) fn clip_norm() -> f64 {
        1.0
    }

    pub(crate) fn schedule_kind() -> ScheduleKind {
        ScheduleKind::Linear
    }

    pub(crate) fn warmup_ratio() -> f64 {
        0.05
    }

    pub(crate) fn power() -> f64 {
        1.0
    }

    pub(crate) fn decay_ratio() -> f64 {
        0.1
    }

    pub(crate) fn device() -> Device {
        Device::Cpu
    }

    pub(crate) fn precision() -> Precision {
        Precision::Float32
    }

    pub(crate) fn log_every_steps() -> u64 {
        1
    }

    pub(crate) fn shard() -> Shard {
        Shard::None
    }

    pub(crate) fn evaluation_template() -> String {
        "{inputs}\nAnswer: {anchor} {mask}".to_owned()
    }

    pub(crate) fn answer_column() -> String {
        "targets".to_owned()
    }
}
