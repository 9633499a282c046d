//! `cloze-worker`: everything with tensors. `cloze` starts it; its arguments are no public interface.

mod audit;
mod batch_feed;
mod bench;
mod bench_checkpoint;
mod bench_collective;
mod bench_recipe;
mod checkpoint;
mod checkpointer;
mod checkpoints_command;
mod collective;
mod device;
mod drill;
mod eval;
mod evaluate;
mod export;
mod forward;
mod generation;
mod model;
mod optim;
mod predict;
mod preflight;
mod restore;
mod sharding;
mod step;
mod torch;
mod train;
mod watcher;
mod worker;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use cloze_cluster::Secret;
use cloze_cluster::environment::{COORDINATOR_KEY_VARIABLE, TOKEN_VARIABLE, given};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::ModelShape;
use signal_hook::consts::{SIGHUP, SIGTERM, SIGUSR1, SIGUSR2};
use tch::Device;

use bench::BenchOptions;
use bench_checkpoint::CheckpointBenchOptions;
use bench_collective::CollectiveBenchOptions;
use bench_recipe::RecipeBenchOptions;
use drill::Drill;
use evaluate::EvaluateOptions;
use forward::{ForwardExtras, ForwardFiles};
use model::modernbert::Placement;
use predict::PredictOptions;
use preflight::PreflightOptions;
use worker::WorkerOptions;

#[derive(Parser)]
#[command(name = "cloze-worker", version, about = "The tensor half of cloze; use `cloze` instead")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Take part in a run.
    Train(TrainArguments),
    /// Score a model on a recipe's tasks.
    Eval(EvalArguments),
    /// Answer texts.
    Predict(PredictArguments),
    /// Write a model folder.
    Export { run: PathBuf, output: PathBuf },
    /// One forward pass from file to file.
    Forward(ForwardArguments),
    /// Time training steps on a workload file.
    Bench(BenchArguments),
    /// Time the steps of the recipe that comes through standard input.
    BenchRecipe(BenchRecipeArguments),
    /// Time the storing and loading of a state of a given size.
    BenchCheckpoint {
        place: String,
        #[arg(long, default_value_t = 100_000_000)]
        params: usize,
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        rounds: u32,
    },
    /// Look at, verify, compare, prune and export checkpoints.
    Checkpoints {
        #[command(subcommand)]
        command: checkpoints_command::CheckpointsCommand,
    },
    /// Check the devices of this machine.
    Preflight(PreflightArguments),
    /// Time the all-reduce of the ring between processes of this machine.
    BenchCollective(BenchCollectiveArguments),
}

#[derive(Args)]
struct TrainArguments {
    #[arg(long)]
    coordinator: String,
    #[arg(long)]
    run: PathBuf,
    #[arg(long)]
    worker: u32,
    #[arg(long, default_value_t = 1)]
    local_workers: u32,
    /// A failure to be practised: `hang`, `nan` or `oom`, and the step before which it happens.
    #[arg(long = "drill", value_name = "KIND@STEP")]
    drills: Vec<Drill>,
}

#[derive(Args)]
struct EvalArguments {
    #[arg(long)]
    recipe: PathBuf,
    #[arg(long)]
    run: Option<PathBuf>,
    #[arg(long)]
    model: Option<PathBuf>,
    #[arg(long)]
    output: PathBuf,
}

#[derive(Args)]
struct PredictArguments {
    #[arg(long)]
    model: PathBuf,
    #[arg(long, value_delimiter = ',')]
    labels: Vec<String>,
    #[arg(long)]
    template: String,
    #[arg(long)]
    anchor: String,
    #[arg(long)]
    max_length: usize,
    texts: Vec<String>,
}

#[derive(Args)]
struct PlacementArguments {
    #[arg(long, default_value = "cpu")]
    device: String,
    #[arg(long)]
    bfloat16: bool,
}

#[derive(Args)]
struct ForwardArguments {
    #[arg(long)]
    model: PathBuf,
    #[arg(long)]
    input: PathBuf,
    #[arg(long)]
    output: PathBuf,
    #[arg(long)]
    gradients: bool,
    #[arg(long, default_value_t = 0)]
    steps: usize,
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    #[command(flatten)]
    placement: PlacementArguments,
}

#[derive(Args)]
struct BenchArguments {
    workload: PathBuf,
    /// The model's shape as JSON.
    #[arg(long)]
    shape: String,
    #[arg(long, default_value_t = 50_368)]
    vocab_size: i64,
    #[arg(long, default_value_t = 4096)]
    batch_tokens: usize,
    #[arg(long, default_value_t = 20)]
    steps: usize,
    #[arg(long, default_value_t = 5)]
    warmup_steps: usize,
    #[arg(long, default_value_t = 0)]
    threads: u32,
    #[command(flatten)]
    placement: PlacementArguments,
}

#[derive(Args)]
struct BenchRecipeArguments {
    #[arg(long, default_value_t = 1)]
    workers: u32,
    #[arg(long, default_value_t = 20)]
    steps: u64,
    #[arg(long, default_value_t = 5)]
    warmup_steps: u64,
}

#[derive(Args)]
struct PreflightArguments {
    #[arg(long, default_value = "cpu")]
    device: String,
    #[arg(long, default_value_t = 1)]
    devices: u32,
    #[arg(long)]
    bfloat16: bool,
}

#[derive(Args)]
struct BenchCollectiveArguments {
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 256])]
    mib: Vec<u64>,
    #[arg(long)]
    repeat: Option<u64>,
    /// The rank that this process is; the parent sets it.
    #[arg(long, hide = true)]
    rank: Option<usize>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let stderr = std::io::stderr;
    // A worker's log goes to a file of the run folder; the other commands share the user's terminal.
    let default_level = if matches!(arguments.command, Command::Train(_)) { "info" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("CLOZE_LOG").unwrap_or_else(|_| default_level.into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr).with_target(false).with_ansi(false).init();
    match run(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let failure = error.downcast_ref::<Failure>();
            let text = failure.map_or_else(|| format!("{error:#}"), Failure::to_string);
            // Nothing is left to tell where stderr itself is gone.
            drop(writeln!(stderr(), "error: {text}"));
            ExitCode::from(failure.map_or(1, |failure| failure.kind.exit_code()))
        }
    }
}

/// A batch system signals all processes of a job or step at once. The launcher hears it too and lets the workers save; one that ended by
/// itself could not. SIGKILL still ends it, and it leaves by itself when nobody controls it any more.
fn leave_signals_to_the_launcher() -> Result<()> {
    for signal in [SIGTERM, SIGHUP, SIGUSR1, SIGUSR2] {
        // Nobody reads the flag; that there is a handler is what counts.
        signal_hook::flag::register(signal, Arc::default()).context("listen to signals")?;
    }
    Ok(())
}

/// Environment variables of this program are read here and in `main`; the object store reads its own.
fn run(command: Command) -> Result<()> {
    let torch_folder = std::env::var_os(torch::cuda::TORCH_FOLDER_VARIABLE).map(PathBuf::from);
    let cores = cores()?;
    let mut stdout = std::io::stdout().lock();
    match command {
        Command::Train(a) => {
            leave_signals_to_the_launcher()?;
            let token = given(TOKEN_VARIABLE)?.context("read the run's token from CLOZE_TOKEN")?;
            let coordinator_key = given(COORDINATOR_KEY_VARIABLE)?.map(|key| key.parse()).transpose()?;
            let TrainArguments { coordinator, run, worker, local_workers, drills } = a;
            worker::run(WorkerOptions {
                coordinator,
                run,
                worker,
                local_workers,
                cores,
                token: Secret::new(token),
                coordinator_key,
                torch_folder,
                drills,
            })
        }
        Command::Eval(EvalArguments { recipe, run, model, output }) => {
            evaluate::evaluate(&EvaluateOptions { recipe, run, model, output, cores, torch_folder }, &mut stdout)
        }
        Command::Predict(PredictArguments { model, labels, template, anchor, max_length, texts }) => {
            let labels = labels.iter().map(|label| label.trim().to_owned()).collect();
            let options = PredictOptions { model, labels, template, anchor, max_length };
            predict::predict(options, &texts, &mut std::io::stdin().lock(), &mut stdout)
        }
        Command::Export { run, output } => {
            let url = export::export(&run, &output)?;
            writeln!(std::io::stderr(), "exported {url} to {}", output.display()).context("report the export")
        }
        Command::Forward(a) => {
            let files = ForwardFiles { model: &a.model, input: &a.input, output: &a.output };
            let extras = ForwardExtras { gradients: a.gradients, steps: a.steps, learning_rate: a.learning_rate };
            forward::forward(files, placement(&a.placement, torch_folder.as_deref(), false)?, extras)
        }
        Command::BenchCheckpoint { place, params, rounds } => {
            bench_checkpoint::run(&CheckpointBenchOptions { place, num_parameters: params, rounds }, &mut stdout)
        }
        Command::Preflight(PreflightArguments { device, devices, bfloat16 }) => {
            preflight::preflight(&PreflightOptions { device, num_devices: devices, bfloat16, torch_folder }, &mut stdout)
        }
        Command::Checkpoints { command } => checkpoints_command::run(command),
        Command::BenchCollective(BenchCollectiveArguments { ranks, mib, repeat, rank }) => {
            bench_collective::run(&CollectiveBenchOptions { ranks, mib, repeat, rank })
        }
        Command::Bench(a) => writeln!(stdout, "{}", bench(&a, cores, torch_folder.as_deref())?).context("print the figures"),
        Command::BenchRecipe(BenchRecipeArguments { workers, steps, warmup_steps }) => {
            torch::memory::keep_freed_memory();
            let recipe = cloze_recipes::load_text(&std::io::read_to_string(std::io::stdin()).context("read the recipe")?, "the recipe")?;
            let options = RecipeBenchOptions { recipe, workers, steps, warmup_steps, cores, torch_folder };
            let line = bench_recipe::bench_recipe(&options)?;
            writeln!(stdout, "{line}").context("print the figures")
        }
    }
}

fn bench(arguments: &BenchArguments, cores: Option<u32>, torch_folder: Option<&Path>) -> Result<String> {
    torch::memory::keep_freed_memory();
    device::set_threads(arguments.threads, cores, 1);
    let options = BenchOptions {
        shape: serde_json::from_str::<ModelShape>(&arguments.shape).context("read the model's shape")?,
        vocab_size: arguments.vocab_size,
        placement: placement(&arguments.placement, torch_folder, true)?,
        batch_tokens: arguments.batch_tokens,
        steps: arguments.steps,
        warmup_steps: arguments.warmup_steps,
    };
    bench::bench(&arguments.workload, &options)
}

/// Cores that this program may use together with the other workers of its run.
fn cores() -> Result<Option<u32>> {
    let Some(text) = std::env::var_os(device::CORES_VARIABLE) else { return Ok(None) };
    let number = text.to_str().and_then(|text| text.parse().ok()).filter(|&number: &u32| number > 0);
    let wrong = || {
        let failure = Failure::new(FailureKind::Environment, format!("{} is no number of cores", device::CORES_VARIABLE));
        failure.expected("a whole number from 1").found(text.display())
    };
    Ok(Some(number.ok_or_else(wrong)?))
}

fn placement(arguments: &PlacementArguments, torch_folder: Option<&Path>, trainable: bool) -> Result<Placement> {
    let device = match arguments.device.as_str() {
        "cuda" => torch::cuda::open(0, torch_folder)?,
        _ => Device::Cpu,
    };
    Ok(Placement { device, trainable, bfloat16: arguments.bfloat16 })
}
