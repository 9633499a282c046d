//! `cloze train` and `cloze resume`: a run folder, a coordinator and workers on this machine.

use std::io::{IsTerminal, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use cloze_data::batch::total_steps;
use cloze_data::dataset::Dataset;
use cloze_data::prepare::check_prepared;
use cloze_data::tokenizer::Tokenizer;
use cloze_launcher::{LaunchOptions, NewRun, PlannedFault, RunEnd, RunFolder, TerminalStyle, launch};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;

use super::arguments::{ResumeArguments, TrainArguments, WatchArguments};
use super::worker_process::worker_binary;

/// Folder of runs that are given no folder.
const RUNS_FOLDER: &str = "runs";

/// Starts a new run.
pub fn train(arguments: &TrainArguments) -> Result<ExitCode> {
    let recipe = cloze_recipes::load(&arguments.recipe.recipe, &arguments.recipe.overrides)?;
    check_model_folder(&recipe)?;
    let dataset = Dataset::open(&recipe.data.output)?;
    check_has_samples(&dataset, &recipe)?;
    check_prepared(&recipe, dataset.manifest())?;
    dataset.check_tokenizer(&Tokenizer::load(&recipe.model.tokenizer)?)?;
    check_port(arguments.watch.listen)?;
    let fault = arguments.watch.kill_worker.as_deref().map(|text| parse_fault(text, arguments.workers)).transpose()?;
    let binary = worker_binary()?;
    let folder = arguments.run.clone().unwrap_or_else(|| Path::new(RUNS_FOLDER).join(&recipe.name));
    let (root, name) = split(&folder)?;
    let new = NewRun {
        name: &name,
        recipe: &recipe,
        data_fingerprint: dataset.manifest().fingerprint(),
        command_line: std::env::args().collect(),
        worker_build: build_name(),
    };
    let total = total_steps(&recipe.train, dataset.num_samples());
    check_fault_step(fault, total)?;
    let run = RunFolder::create(&root, &new)?;
    go(Start { run, recipe, total, workers: arguments.workers, binary, fault }, &arguments.watch)
}

/// Goes on with a run.
pub fn resume(arguments: &ResumeArguments) -> Result<ExitCode> {
    let fault = arguments.watch.kill_worker.as_deref().map(|text| parse_fault(text, arguments.workers)).transpose()?;
    let (run, recipe) = RunFolder::open(&arguments.run)?;
    let dataset = Dataset::open(&recipe.data.output)?;
    let (expected, found) = (&run.info().data_fingerprint, dataset.manifest().fingerprint());
    if *expected != found {
        return Err(Failure::new(FailureKind::Mismatch, "the prepared data changed since the run began")
            .at(recipe.data.output.display())
            .expected(format!("fingerprint {expected}"))
            .found(found)
            .hint("bring the old data back, or start a new run")
            .into());
    }
    let total = total_steps(&recipe.train, dataset.num_samples());
    go(Start { run, recipe, total, workers: arguments.workers, binary: worker_binary()?, fault }, &arguments.watch)
}

struct Start {
    run: RunFolder,
    recipe: Recipe,
    total: u64,
    workers: u32,
    binary: PathBuf,
    fault: Option<PlannedFault>,
}

/// Launches, and says what to do next.
fn go(start: Start, watch: &WatchArguments) -> Result<ExitCode> {
    let run_path = start.run.path().to_owned();
    let end = launch(LaunchOptions {
        run: start.run,
        recipe: start.recipe,
        total_steps: start.total,
        workers: start.workers,
        worker_binary: start.binary,
        worker_build: build_name(),
        bind: watch.listen,
        output: Box::new(std::io::stderr()),
        style: terminal_style(watch.quiet),
        fault: start.fault,
    })?;
    let shown = run_path.display().to_string();
    match end {
        RunEnd::Finished { .. } => {
            let next = format!(
                "run folder: {shown}\nnext: cloze eval {shown}, cloze export {shown} --output DIR, tensorboard --logdir {shown}/tensorboard"
            );
            writeln!(std::io::stderr(), "{next}").context("report the end")?;
            Ok(ExitCode::SUCCESS)
        }
        RunEnd::Stopped { step } => {
            let what = if step == 0 {
                "stopped before anything was saved or restored".to_owned()
            } else {
                format!("stopped; step {step} is saved")
            };
            let failure = Failure::new(FailureKind::Interrupted, what).at(&shown);
            Err(failure.hint(format!("go on with: cloze resume {shown} --workers {}", start.workers)).into())
        }
        RunEnd::Failed(failure) => Err(failure.into()),
    }
}

/// Colour and a rewriting line are for terminals; `NO_COLOR` switches colour off.
fn terminal_style(quiet: bool) -> TerminalStyle {
    let interactive = std::io::stderr().is_terminal();
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    TerminalStyle { interactive, color: interactive && !no_color, quiet }
}

/// The build that this program expects of its workers; both are built together.
fn build_name() -> String {
    format!("cloze {} (protocol {})", env!("CARGO_PKG_VERSION"), cloze_cluster::protocol::PROTOCOL_VERSION)
}

fn check_has_samples(dataset: &Dataset, recipe: &Recipe) -> Result<(), Failure> {
    if dataset.num_samples() > 0 {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Input, "the prepared data holds no samples")
        .at(recipe.data.output.display())
        .hint("look at the counts in its manifest.json: the filters dropped every record"))
}

/// Finds a taken port before a run folder is made.
fn check_port(address: SocketAddr) -> Result<(), Failure> {
    TcpListener::bind(address).map(drop).map_err(|error| {
        Failure::new(FailureKind::Environment, "the coordinator cannot listen there")
            .at(address)
            .because(error)
            .hint("name another address with --listen; port 0 takes a free one")
    })
}

/// Reads `N@STEP`, with N below the number of workers.
fn parse_fault(text: &str, workers: u32) -> Result<PlannedFault, Failure> {
    let parse = |(worker, step): (&str, &str)| Some(PlannedFault { worker: worker.parse().ok()?, step: step.parse().ok()? });
    text.split_once('@').and_then(parse).filter(|fault| fault.worker < workers).ok_or_else(|| {
        let expected = format!("N@STEP, such as 0@60, with N below {workers}");
        Failure::new(FailureKind::Recipe, "`--kill-worker` names no worker and step").expected(expected).found(text)
    })
}

fn check_model_folder(recipe: &Recipe) -> Result<(), Failure> {
    match recipe.model.path.as_ref().filter(|path| !path.join("config.json").is_file()) {
        None => Ok(()),
        Some(path) => Err(Failure::new(FailureKind::Input, "`model.path` is no model folder")
            .at(path.display())
            .expected("a folder with config.json, model.safetensors and tokenizer.json")),
    }
}

fn check_fault_step(fault: Option<PlannedFault>, total: u64) -> Result<(), Failure> {
    match fault.filter(|fault| fault.step >= total) {
        None => Ok(()),
        Some(fault) => Err(Failure::new(FailureKind::Recipe, "`--kill-worker` names a step that the run does not reach")
            .expected(format!("a step below {total}"))
            .found(fault.step)),
    }
}

fn split(folder: &Path) -> Result<(PathBuf, String)> {
    let name = folder.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    let name = name.ok_or_else(|| Failure::new(FailureKind::Recipe, "the run folder has no name").at(folder.display()))?;
    Ok((folder.parent().map_or_else(PathBuf::new, Path::to_owned), name))
}
