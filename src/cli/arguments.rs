//! The command line as typed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use cloze_recipes::recipe::Recipe;

/// Instruction-tunes masked language models, from a YAML recipe to a table of scores.
#[derive(Parser)]
#[command(name = "cloze", version, about, max_term_width = 100)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Subcommand)]
pub enum Command {
    /// Check a recipe or a cluster file and say everything that is wrong with it
    Check(CheckArguments),
    /// Print the JSON Schema of recipes or of cluster files, for editors
    Schema(SchemaArguments),
    /// Prepare, look at, verify or generate data
    Data {
        /// What to do with data.
        #[command(subcommand)]
        command: DataCommand,
    },
    /// Train a recipe
    Train(TrainArguments),
    /// Go on with a run: with its workers where they still live, else from its newest good checkpoint
    Resume(ResumeArguments),
    /// Fill slots of a run with workers of this host
    Join(JoinArguments),
    /// Say what a run of a recipe will need, and everything that is wrong before it is started
    Plan(super::plan::PlanArguments),
    /// Check the machines of a run before step 0 and name those that must not be used
    Preflight(super::preflight::PreflightArguments),
    /// What `cloze preflight` starts on each node
    #[command(hide = true)]
    PreflightAgent,
    /// Submit a recipe to the batch system of a cluster
    Submit(super::submit::SubmitArguments),
    /// What a job executes on its first node
    #[command(hide = true)]
    Allocation(super::jobs::AllocationArguments),
    /// Cancel the jobs of a run
    Cancel(super::jobs::CancelArguments),
    /// Print the logs of a run
    Logs(super::jobs::LogsArguments),
    /// Run every point of a recipe's sweep, and survive whatever happens to the controller
    Sweep {
        /// What to do with a sweep.
        #[command(subcommand)]
        command: super::sweep::SweepCommand,
    },
    /// Run everything that a paper's table needs, and print it beside ours
    Reproduce(super::reproduce::ReproduceArguments),
    /// Say how a run is
    Status(super::status::StatusArguments),
    /// Watch a run until it ends
    Watch(super::status::WatchRunArguments),
    /// Score a model on the evaluation tasks of a recipe or run
    Eval(EvalArguments),
    /// Put the results of runs or of a study beside a paper's table, with verdicts and plots
    Report(super::report::ReportArguments),
    /// List, search and show runs
    Runs(super::runs::RunsArguments),
    /// Say what two runs differ in: their recipes key by key, and their results
    Diff(super::runs::DiffArguments),
    /// Answer texts with a model folder, as JSON lines
    Predict(PredictArguments),
    /// List, verify, compare, delete and export checkpoints
    Checkpoints {
        /// What to do with checkpoints.
        #[command(subcommand)]
        command: super::checkpoints::CheckpointsCommand,
    },
    /// Write a run's newest good checkpoint as a Hugging Face model folder
    Export(ExportArguments),
    /// Run one forward pass from file to file, to compare a conversion with its original
    Forward(ForwardArguments),
    /// Time the training steps of a recipe, or of a fixed workload file
    Bench(BenchArguments),
    /// Compute what a run at another size would lose its time to, or predict a finished run
    Simulate(super::simulate::SimulateArguments),
    /// Measure one coordinator under thousands of pretended workers
    BenchCoordinator(super::load::LoadArguments),
}

/// A recipe and what is changed in it.
#[derive(Args)]
pub struct RecipeArguments {
    /// Recipe file
    pub recipe: PathBuf,
    /// Changes of it.
    #[command(flatten)]
    pub changes: ChangeArguments,
}

impl RecipeArguments {
    /// Reads, changes and checks the recipe.
    pub fn load(&self) -> anyhow::Result<Recipe> {
        self.changes.load(&self.recipe)
    }
}

/// What is changed in a recipe file.
#[derive(Args)]
pub struct ChangeArguments {
    /// Profile of the recipe to lay over it, such as `toy`
    #[arg(long, value_name = "NAME")]
    pub profile: Option<String>,
    /// Change a value, as in `--set train.learning_rate=1e-4`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

impl ChangeArguments {
    /// Reads, changes and checks the recipe.
    pub fn load(&self, recipe: &Path) -> anyhow::Result<Recipe> {
        cloze_recipes::load_with_profile(recipe, &self.overrides, self.profile.as_deref())
    }
}

/// Arguments of `cloze check`.
#[derive(Args)]
pub struct CheckArguments {
    /// Recipe file
    #[arg(required_unless_present = "cluster")]
    pub recipe: Option<PathBuf>,
    /// Changes of it.
    #[command(flatten)]
    pub changes: ChangeArguments,
    /// Print the recipe with its bases, profile, overrides and defaults filled in
    #[arg(long, requires = "recipe")]
    pub resolved: bool,
    /// Check this cluster file
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<PathBuf>,
}

/// Arguments of `cloze schema`.
#[derive(Args)]
pub struct SchemaArguments {
    /// Print the schema of cluster files
    #[arg(long)]
    pub cluster: bool,
}

/// Subcommands of `cloze data`.
#[derive(Subcommand)]
pub enum DataCommand {
    /// Read, filter, cap and tokenise a recipe's sources into shards
    Prepare(PrepareArguments),
    /// Show samples as the model sees them
    Inspect(InspectArguments),
    /// Check every prepared shard against the manifest
    Verify(RecipeArguments),
    /// Write a small generated corpus with tokenizer and evaluation files
    Synth(SynthArguments),
}

/// Arguments of `cloze data prepare`.
#[derive(Args)]
pub struct PrepareArguments {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArguments,
    /// Prepare again although inputs, recipe or tokenizer changed
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `cloze data inspect`.
#[derive(Args)]
pub struct InspectArguments {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArguments,
    /// Step whose batch is shown, from 0
    #[arg(long, default_value_t = 0)]
    pub step: u64,
    /// Number of samples shown
    #[arg(long, short = 'n', default_value_t = 8)]
    pub count: usize,
}

/// Arguments of `cloze data synth`.
#[derive(Args)]
pub struct SynthArguments {
    /// Folder to write
    pub output: PathBuf,
    /// Seed of the generator
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Number of training records
    #[arg(long, default_value_t = 20_000)]
    pub examples: u64,
}

/// Arguments of `cloze train`.
#[derive(Args)]
pub struct TrainArguments {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArguments,
    /// How many workers, and where.
    #[command(flatten)]
    pub workers: WorkerArguments,
    /// The other hosts.
    #[command(flatten)]
    pub hosts: super::hosts::HostsArguments,
    /// Run folder [default: runs/ and the recipe's name]
    #[arg(long)]
    pub run: Option<PathBuf>,
    /// How the run is watched.
    #[command(flatten)]
    pub watch: WatchArguments,
}

/// Arguments of `cloze resume`.
#[derive(Args)]
pub struct ResumeArguments {
    /// Run folder
    pub run: PathBuf,
    /// Resume a run of jobs on this machine, instead of submitting it again
    #[arg(long)]
    pub here: bool,
    /// Operate the run otherwise from here on, as in `--set cluster.max_restarts=10`; what it computes stays. May be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// How many workers, and where.
    #[command(flatten)]
    pub workers: WorkerArguments,
    /// The other hosts.
    #[command(flatten)]
    pub hosts: super::hosts::HostsArguments,
    /// How the run is watched.
    #[command(flatten)]
    pub watch: WatchArguments,
}

/// How many workers a run has, and where they are, shared by `train` and `resume`.
#[derive(Args)]
pub struct WorkerArguments {
    /// Workers of the run [default: 1; resumed, as many as before]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub workers: Option<u32>,
    /// How many of them are started on this machine, from slot 0; the others come by `cloze join` [default: all]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(0..=1024))]
    pub local: Option<u32>,
    /// Longest wait for all workers to join, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 90, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub join_timeout: u64,
}

/// How a run is watched, shared by `train` and `resume`.
#[derive(Args)]
pub struct WatchArguments {
    /// Address that the coordinator listens on; port 0 takes a free one [default: 127.0.0.1:0; resumed, where it listened before]
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Address that the dashboard listens on, or `off`; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub dashboard: DashboardPlace,
    /// Print no progress
    #[arg(long, short)]
    pub quiet: bool,
    /// Save and leave after this step; `cloze resume` goes on from it as if it had not been left
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub until_step: Option<u64>,
    /// Drill: let worker N (from 0) fail once at a step, to watch the run recover; KIND is kill, freeze, hang, nan or oom; may be repeated
    #[arg(long = "drill", value_name = "KIND:N@STEP")]
    pub drills: Vec<String>,
    /// The same as `--drill kill:N@STEP`
    #[arg(long = "kill-worker", value_name = "N@STEP")]
    pub killed_workers: Vec<String>,
}

/// Where the dashboard listens; `None` is nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DashboardPlace(pub Option<SocketAddr>);

impl FromStr for DashboardPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        text.parse::<SocketAddr>()
            .map(|address| Self(Some(address)))
            .map_err(|error| format!("expected `off` or an address such as 127.0.0.1:4243: {error}"))
    }
}

/// Arguments of `cloze join`.
#[derive(Args)]
pub struct JoinArguments {
    /// Run folder, on a disk that this host shares with the controller
    pub run: PathBuf,
    /// Slots to fill, such as `2-3` or `2,5`
    #[arg(long)]
    pub slots: String,
    /// `host:port` of the coordinator [default: from control.json in the run folder]
    #[arg(long, value_name = "HOST:PORT")]
    pub coordinator: Option<String>,
    /// Longest wait for the controller, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub join_timeout: u64,
}

/// Arguments of `cloze eval`.
#[derive(Args)]
pub struct EvalArguments {
    /// Recipe file, or run folder
    pub target: PathBuf,
    /// Model folder to score instead of the recipe's or the run's
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Changes of a recipe; not for a run.
    #[command(flatten)]
    pub changes: ChangeArguments,
    /// Folder for eval.json and eval.md [default: eval/ in the run folder, or runs/NAME-eval]
    #[arg(long)]
    pub output: Option<PathBuf>,
}

/// Arguments of `cloze predict`.
#[derive(Args)]
pub struct PredictArguments {
    /// Model folder with tokenizer
    #[arg(long)]
    pub model: PathBuf,
    /// Labels to choose among, separated by commas; without, the most probable tokens are listed
    #[arg(long)]
    pub labels: Option<String>,
    /// Prompt around each text
    #[arg(long, default_value = "{text}\nAnswer: {anchor} {mask}")]
    pub template: String,
    /// Token before the mask
    #[arg(long, default_value = "[unused0]")]
    pub anchor: String,
    /// Longest prompt, in tokens
    #[arg(long, default_value_t = 2048)]
    pub max_length: usize,
    /// Texts; without, each line of stdin is one
    pub texts: Vec<String>,
}

/// Arguments of `cloze export`.
#[derive(Args)]
pub struct ExportArguments {
    /// Run folder
    pub run: PathBuf,
    /// Folder to write; must not exist
    #[arg(long)]
    pub output: PathBuf,
}

/// Where a single pass is computed.
#[derive(Args)]
pub struct PlacementArguments {
    /// Device of the tensors
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Compute in bfloat16 (GPU)
    #[arg(long)]
    pub bfloat16: bool,
}

/// Names of devices.
#[derive(Clone, Copy, ValueEnum)]
pub enum DeviceName {
    /// The host processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// Arguments of `cloze forward`.
#[derive(Args)]
pub struct ForwardArguments {
    /// Model folder
    #[arg(long)]
    pub model: PathBuf,
    /// safetensors file with `input_ids` int32 `[T]`, `lengths` int32 `[B]` and optional `labels` int32 `[T]`
    #[arg(long)]
    pub input: PathBuf,
    /// safetensors file to write, with `logits` float32 `[T, vocab]` and `loss` where labels were given
    #[arg(long)]
    pub output: PathBuf,
    /// Also write the gradient of the mean loss for every parameter, as `gradient.NAME`
    #[arg(long)]
    pub gradients: bool,
    /// Also take this many `AdamW` steps on the pack and write their `losses`
    #[arg(long, default_value_t = 0)]
    pub steps: usize,
    /// Learning rate of those steps
    #[arg(long, default_value_t = 1e-3)]
    pub learning_rate: f64,
    /// Device and precision.
    #[command(flatten)]
    pub placement: PlacementArguments,
}

/// Names of model shapes.
#[derive(Clone, Copy, ValueEnum)]
pub enum PresetName {
    /// 4 layers of width 128.
    Tiny,
    /// 10 layers of width 384.
    Small,
    /// `ModernBERT` base.
    Base,
    /// `ModernBERT` large.
    Large,
}

/// Arguments of `cloze bench`.
#[derive(Args)]
pub struct BenchArguments {
    /// Recipe whose steps are timed, as one worker does them on its prepared data; `--workload` times a file instead
    #[arg(required_unless_present = "workload", conflicts_with = "workload")]
    pub recipe: Option<PathBuf>,
    /// Changes of it.
    #[command(flatten)]
    pub changes: ChangeArguments,
    /// Workers of the run on this machine, which share its cores and each batch
    #[arg(long, default_value_t = 1, conflicts_with = "workload", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: u32,
    /// Timed steps
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub steps: u64,
    /// Steps before the clock starts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=1_000_000))]
    pub warmup_steps: u64,
    /// Replay this safetensors file with `input_ids` and `labels` int32 `[T]` and `offsets` int64 `[examples + 1]` instead
    #[arg(long, value_name = "FILE")]
    pub workload: Option<PathBuf>,
    /// Preset of the model that replays the workload [default: tiny]
    #[arg(long, value_enum)]
    pub model: Option<PresetName>,
    /// Tokens of one step of the workload, at most [default: 4096]
    #[arg(long)]
    pub batch_tokens: Option<u64>,
    /// CPU threads for the workload; 0 takes all cores [default: 0]
    #[arg(long)]
    pub threads: Option<u32>,
    /// Device for the workload [default: cpu]
    #[arg(long, value_enum)]
    pub device: Option<DeviceName>,
    /// Compute the workload in bfloat16 (GPU)
    #[arg(long)]
    pub bfloat16: bool,
}
