//! The checked recipe: everything a run needs to know, with every value inside its bounds.
//!
//! The rest of the program sees only these types. They serialise to the shape that a recipe file has, so that a printed
//! recipe can be read back.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A checked recipe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recipe {
    /// Schema version, 1.
    pub version: u32,
    /// Names the run folder: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Every random draw is a hash of this seed and integers.
    pub seed: u64,
    /// Which model, from where.
    pub model: ModelRecipe,
    /// Which records, how they become samples.
    pub data: DataRecipe,
    /// What is masked and how the loss is formed.
    pub objective: ObjectiveRecipe,
    /// Batch, optimizer, schedule, device.
    pub train: TrainRecipe,
    /// Where and how often state is saved.
    pub checkpoint: CheckpointRecipe,
    /// How failures are met.
    pub cluster: ClusterRecipe,
    /// What is scored by `cloze eval`, in order.
    pub evaluation: Vec<EvaluationTask>,
}

/// Which model, from where. Exactly one of `path` and `preset`/`shape` is the source of the weights.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelRecipe {
    /// Hugging Face checkpoint folder to start from; `None` starts from scratch with `shape`.
    pub path: Option<PathBuf>,
    /// Folder with `tokenizer.json`, or that file. Defaults to `path`.
    pub tokenizer: PathBuf,
    /// Shape of a model from scratch (a `preset` with single values replaced by `shape:`); `None` with `path`.
    pub shape: Option<ModelShape>,
    /// Token placed right before the mask, such as `[unused0]`.
    pub anchor_token: String,
}

/// Shape of a `ModernBERT`; names as in a Hugging Face config.json. The vocabulary comes from the tokenizer, rounded up to 64.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width of one half of the GLU.
    pub intermediate_size: u32,
    /// Number of layers.
    pub num_hidden_layers: u32,
    /// Number of heads; divides `hidden_size`, head width even.
    pub num_attention_heads: u32,
    /// Every n-th layer (0, n, 2n, …) attends globally.
    pub global_attn_every_n_layers: u32,
    /// Whole window of a local layer, in tokens; a query sees `local_attention / 2` on each side.
    pub local_attention: u32,
    /// `RoPE` base of the global layers.
    pub global_rope_theta: f64,
    /// `RoPE` base of the local layers.
    pub local_rope_theta: f64,
    /// Longest document, in tokens.
    pub max_position_embeddings: u32,
}

/// Which records, how they become samples.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DataRecipe {
    /// Inputs, in order.
    pub sources: Vec<DataSource>,
    /// Folder of the prepared shards.
    pub output: PathBuf,
    /// Regular expressions on task names; a task that matches none is dropped. Empty keeps every task.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub only: Vec<String>,
    /// Regular expressions on task names; a task that matches any is dropped.
    pub hold_out: Vec<String>,
    /// At most this many tasks, drawn by the hash of seed and name: those of a smaller number are among those of a larger one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tasks: Option<u64>,
    /// At most this many samples of a task. Not together with `wanted_total`.
    pub cap_per_task: Option<u64>,
    /// Wanted number of samples; the cap per task is found by bisection.
    pub wanted_total: Option<u64>,
    /// Share of each task's samples that is left of them after the cap, above 0, at most 1; a smaller share lies within a larger one.
    #[serde(skip_serializing_if = "is_whole")]
    pub fraction: f64,
    /// At most this many samples of a task in one epoch, other ones in each; `None` takes every sample once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixing_cap: Option<u64>,
    /// Longest sample, in tokens, special tokens included.
    pub max_length: u32,
    /// What happens to a longer one.
    pub truncate: Truncation,
    /// Text of a sample: `{inputs}`, `{anchor}` and `{target}` are replaced; `{target}` occurs once.
    pub template: String,
    /// Part of the tasks' templates kept away from training: rows whose template type matches any of these regular expressions are dropped.
    pub hold_out_templates: Vec<String>,
}

/// A key that came later than the hash of recipes is left out where it changes nothing, so that their hashes stay.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "the form that serde calls")]
fn is_whole(fraction: &f64) -> bool {
    *fraction >= 1.0
}

/// One input of the data preparation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DataSource {
    /// `file:///…`, `s3://`, `gs://` or `az://bucket/prefix`, or a path; a folder means every record file below it.
    pub url: String,
    /// Task name for records that carry none.
    pub task: Option<String>,
    /// Options of the object store by their usual names (endpoint, region, `allow_http`); secrets come from the environment.
    pub options: BTreeMap<String, String>,
}

/// What happens to a sample longer than `max_length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// Drop it, and count it.
    Drop,
    /// Cut the prompt on the right and keep anchor and answer.
    PromptKeepAnswer,
    /// Cut on the right as the paper's code does; the answer may go, and the last content token is then the target.
    Right,
}

/// What is masked and how the loss is formed (the `ModernBERT`-Instruct paper, §2.4).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ObjectiveRecipe {
    /// Objective of the examples that are not answer-token prediction.
    pub auxiliary: Auxiliary,
    /// Share of the examples that take the auxiliary objective, 0 to 1; drawn per example and epoch.
    pub auxiliary_ratio: f64,
    /// Probability that a token of an auxiliary example is masked.
    pub mask_probability: f64,
    /// What a masked position holds.
    pub masking: Masking,
    /// How per-position losses become one number.
    pub loss_norm: LossNorm,
}

/// Objective of the examples that are not answer-token prediction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Auxiliary {
    /// Every example predicts its answer token.
    None,
    /// Masked language modelling: the label is the original token.
    Mlm,
    /// Dummy MLM: masked the same way, the label is the mask token itself (paper §2.4).
    DummyMlm,
}

/// What a masked position of an auxiliary example holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Masking {
    /// Always the mask token.
    #[serde(rename = "all_mask")]
    AllMask,
    /// 80 % mask token, 10 % a random token, 10 % unchanged.
    #[serde(rename = "80_10_10")]
    EightyTenTen,
}

/// How per-position losses become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossNorm {
    /// Mean over all labelled positions of the global batch.
    TokenMean,
    /// Mean over the examples of each example's own mean.
    PerExample,
}

/// Batch, optimizer, schedule, device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrainRecipe {
    /// Optimizer steps of the run. A recipe may say `epochs` instead.
    pub steps: Option<u64>,
    /// Passes over the data; exactly one of `steps` and `epochs` is set.
    pub epochs: Option<f64>,
    /// Examples of one optimizer step, over all workers.
    pub batch_examples: u32,
    /// Token budget of one forward pass on one worker; a worker accumulates as many packs as the batch needs.
    pub micro_batch_tokens: u32,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// `AdamW` first and second moment decay.
    pub betas: [f64; 2],
    /// `AdamW` epsilon.
    pub epsilon: f64,
    /// Decoupled weight decay of matrices; norms and biases have none.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 switches clipping off.
    pub clip_norm: f64,
    /// Learning rate over the steps.
    pub schedule: ScheduleRecipe,
    /// Device of the tensors.
    pub device: Device,
    /// Precision of the forward and backward pass; state is always float32.
    pub precision: Precision,
    /// CPU threads of one worker; 0 shares the machine's cores among the workers.
    pub threads: u32,
    /// Every n-th step is logged.
    pub log_every_steps: u64,
    /// What the workers divide among themselves instead of each holding a copy (`ZeRO`).
    pub shard: Shard,
    /// Each worker also keeps a replica of another one's share. Left out of the rendered recipe where it is off.
    #[serde(skip_serializing_if = "is_off")]
    pub replicate_shards: bool,
    /// Every worker writes down which samples it trained on in which step, in `audit/` of the run folder.
    pub audit_samples: bool,
    /// GPUs compute with kernels that give the same bits every time. Left out of the rendered recipe where it is off.
    #[serde(skip_serializing_if = "is_off")]
    pub deterministic: bool,
}

/// What the workers divide among themselves; each level includes the ones before (`ZeRO` stages 1 to 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Shard {
    /// Every worker holds everything.
    None,
    /// The optimizer's moments (`ZeRO` 1).
    Optimizer,
    /// And the gradients (`ZeRO` 2).
    Gradients,
    /// And the parameters (`ZeRO` 3).
    Parameters,
}

/// Learning rate over the steps: warm-up, then a shape.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ScheduleRecipe {
    /// Shape after the warm-up.
    pub kind: ScheduleKind,
    /// Linear warm-up, in steps. Not together with `warmup_ratio`.
    pub warmup_steps: Option<u64>,
    /// Linear warm-up as a share of all steps.
    pub warmup_ratio: Option<f64>,
    /// Learning rate at the end as a share of the peak.
    pub end_ratio: f64,
    /// Exponent of the polynomial shape.
    pub power: f64,
    /// Share of all steps that the WSD shape spends decaying.
    pub decay_ratio: f64,
}

/// Shape of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Straight line to the end.
    Linear,
    /// Half a cosine to the end.
    Cosine,
    /// `(1 - progress)^power` to the end.
    Polynomial,
    /// Stays at the peak.
    Constant,
    /// Warm-up, stable, then linear decay over `decay_ratio` of the steps.
    Wsd,
}

/// Device of the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// The host processor.
    Cpu,
    /// An NVIDIA GPU; worker n takes GPU n of its host.
    Cuda,
}

/// Precision of the forward and backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// IEEE single precision throughout.
    Float32,
    /// bfloat16 products, float32 state (GPU only).
    Bfloat16,
}

/// Where and how often state is saved.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckpointRecipe {
    /// `file:///…`, `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`; `None` is `checkpoints/` in the run folder.
    pub url: Option<String>,
    /// Options of the object store, as in [`DataSource::options`].
    pub options: BTreeMap<String, String>,
    /// Save every n steps; the last step is always saved.
    pub every_steps: u64,
    /// Save as well when this many seconds have passed since the last save; such a checkpoint only counts towards `keep_last`.
    pub every_seconds: Option<u64>,
    /// Keep this many newest checkpoints, at least 2 so that a damaged newest one has a predecessor.
    pub keep_last: u32,
    /// Keep this many checkpoints with the lowest training loss as well.
    pub keep_best: u32,
    /// Keep every checkpoint of a step that is a multiple of this for good.
    pub keep_every_steps: Option<u64>,
    /// Folder on a local disk that holds a copy of the newest checkpoint, so that a restart need not fetch it.
    pub cache: Option<PathBuf>,
    /// Longest time to store one checkpoint, in seconds; one that takes longer is given up.
    pub upload_timeout_s: u64,
    /// After a request to stop, longest time for the last step and a full checkpoint, in seconds.
    pub stop_timeout_s: u64,
}

/// How failures are met.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClusterRecipe {
    /// Replacement workers over the whole run before it is given up.
    pub max_restarts: u32,
    /// A worker that has not been heard of for this long is lost.
    pub heartbeat_timeout_ms: u64,
    /// Longest wait inside one collective operation.
    pub collective_timeout_ms: u64,
    /// Fewest workers with which the run goes on when others are lost; `None` waits until every slot is filled again.
    pub min_workers: Option<u32>,
    /// With `min_workers`, how long a lost worker's replacement is waited for before the run goes on without it, in seconds.
    pub replacement_wait_s: u64,
    /// How long workers go on without a coordinator before they save and leave, in seconds.
    pub coordinator_grace_s: u64,
    /// A worker that makes no progress for this long is stuck.
    pub hang: HangRecipe,
    /// Failures of workers on one host after which the host is used no more; 0 never excludes a host.
    pub exclude_host_after: u32,
    /// How often a step is tried again after a loss that is not finite or a want of memory.
    pub retries_per_step: u32,
    /// Workers and coordinator speak by TLS. Left out of the rendered recipe where it is off, so that hashes from before it stay.
    #[serde(skip_serializing_if = "is_off")]
    pub tls: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the form that serde calls")]
fn is_off(switch: &bool) -> bool {
    !switch
}

/// Longest time without progress, in seconds, by what a worker does.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HangRecipe {
    /// Building the model, connecting to the peers, restoring.
    pub init_s: u64,
    /// Waiting for the next batch.
    pub data_s: u64,
    /// One step.
    pub step_s: u64,
    /// Taking a snapshot, or saving the last checkpoint.
    pub checkpoint_s: u64,
}

/// One task scored by `cloze eval`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvaluationTask {
    /// Name in tables and files.
    pub name: String,
    /// Files (`.jsonl`, `.jsonl.gz` or `.csv`), or folders of them; a folder means every such file in it, each a subtask.
    pub files: Vec<PathBuf>,
    /// Column names of a csv without a header; empty means the first line is the header.
    pub columns: Vec<String>,
    /// Prompt: `{column}`, `{anchor}` and `{mask}` are replaced; `{mask}` occurs once.
    pub template: String,
    /// Column that holds the right answer.
    pub answer_column: String,
    /// Labels in the order of the table: the value in the answer column, and the words that stand for it at the mask.
    pub labels: Vec<EvaluationLabel>,
    /// Longest prompt, in tokens; a longer one is cut in the middle of its longest column and counted.
    pub max_length: u32,
    /// Score at most this many rows of each file; `None` is all.
    pub limit: Option<u64>,
}

/// One label of an evaluation task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvaluationLabel {
    /// The value in the answer column.
    pub value: String,
    /// Words at the mask that stand for it; their probabilities are added.
    pub words: Vec<String>,
}
