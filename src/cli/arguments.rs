//! The command line as typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

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
    /// Check a recipe and say everything that is wrong with it
    Check(CheckArguments),
    /// Print the JSON Schema of recipes, for editors
    Schema,
    /// Prepare, look at, verify or generate data
    Data {
        /// What to do with data.
        #[command(subcommand)]
        command: DataCommand,
    },
    /// Train a recipe on this machine
    Train(TrainArguments),
    /// Go on with a run from its newest good checkpoint
    Resume(ResumeArguments),
    /// Score a model on the evaluation tasks of a recipe or run
    Eval(EvalArguments),
    /// Answer texts with a model folder, as JSON lines
    Predict(PredictArguments),
    /// Write a run's newest good checkpoint as a Hugging Face model folder
    Export(ExportArguments),
    /// Run one forward pass from file to file, to compare a conversion with its original
    Forward(ForwardArguments),
    /// Time training steps on a fixed workload file
    Bench(BenchArguments),
}

/// A recipe and what is changed in it.
#[derive(Args)]
pub struct RecipeArguments {
    /// Recipe file
    pub recipe: PathBuf,
    /// Change a value, as in `--set train.learning_rate=1e-4`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

/// Arguments of `cloze check`.
#[derive(Args)]
pub struct CheckArguments {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArguments,
    /// Print the recipe with its bases, overrides and defaults filled in
    #[arg(long)]
    pub resolved: bool,
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
    /// Worker processes on this machine
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: u32,
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
    /// Worker processes on this machine
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: u32,
    /// How the run is watched.
    #[command(flatten)]
    pub watch: WatchArguments,
}

/// How a run is watched, shared by `train` and `resume`.
#[derive(Args)]
pub struct WatchArguments {
    /// Address that the coordinator listens on; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: std::net::SocketAddr,
    /// Print no progress
    #[arg(long, short)]
    pub quiet: bool,
    /// Drill: kill worker N (from 0) once, after the given step, to watch the run recover
    #[arg(long, value_name = "N@STEP")]
    pub kill_worker: Option<String>,
}

/// Arguments of `cloze eval`.
#[derive(Args)]
pub struct EvalArguments {
    /// Recipe file, or run folder
    pub target: PathBuf,
    /// Model folder to score instead of the recipe's or the run's
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Change a value of a recipe; not for a run
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
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
    /// safetensors file with `input_ids` and `labels` int32 `[T]` and `offsets` int64 `[examples + 1]`
    pub workload: PathBuf,
    /// Preset of the model
    #[arg(long, value_enum, default_value_t = PresetName::Tiny)]
    pub model: PresetName,
    /// Tokens of one step, at most
    #[arg(long, default_value_t = 4096)]
    pub batch_tokens: usize,
    /// Timed steps
    #[arg(long, default_value_t = 20)]
    pub steps: usize,
    /// Steps before the clock starts
    #[arg(long, default_value_t = 5)]
    pub warmup_steps: usize,
    /// CPU threads; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    pub threads: u32,
    /// Device and precision.
    #[command(flatten)]
    pub placement: PlacementArguments,
}
