//! Subcommands that `cloze-worker` computes: it is started with the same terminal, and its exit code is passed on.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use cloze_launcher::registry::publish_run;
use cloze_recipes::failure::{Failure, FailureKind};

use super::arguments::{DeviceName, EvalArguments, ExportArguments, ForwardArguments, PlacementArguments, PredictArguments};

use super::run_place::{check_run, refuse_study};

/// Environment variable that names another worker binary.
const WORKER_VARIABLE: &str = "CLOZE_WORKER";

/// The dynamic linker's exit code where a library is missing.
const EXIT_CODE_NOT_LOADED: i32 = 127;

/// The worker binary: named by the environment, or beside this program.
pub fn worker_binary() -> Result<PathBuf> {
    let named = std::env::var_os(WORKER_VARIABLE).map(PathBuf::from);
    let path = match named {
        Some(path) => path,
        None => std::env::current_exe().context("find this program")?.with_file_name("cloze-worker"),
    };
    if path.is_file() {
        return Ok(path);
    }
    Err(Failure::new(FailureKind::Environment, "the worker binary is not there")
        .at(path.display())
        .hint(format!("build it with `make build`, or name it in {WORKER_VARIABLE}"))
        .into())
}

/// `cloze eval`
pub fn eval(arguments: &EvalArguments) -> Result<ExitCode> {
    let is_run = arguments.target.is_dir();
    if !arguments.target.exists() && !is_recipe_name(&arguments.target) {
        check_run(&arguments.target)?;
    }
    if is_run {
        refuse_study(&arguments.target, |study| {
            format!(
                "its sweep scores its trials: `cloze sweep report {study}` shows the scores, `cloze eval {study}/runs/TRIAL` computes those of one"
            )
        })?;
        check_run(&arguments.target)?;
    }
    let (recipe_file, output) = if is_run { eval_of_run(arguments)? } else { eval_of_recipe(arguments)? };
    let mut worker = vec![OsString::from("eval"), "--recipe".into(), recipe_file.into(), "--output".into(), output.into()];
    if is_run {
        worker.extend(["--run".into(), arguments.target.clone().into()]);
    }
    if let Some(model) = &arguments.model {
        worker.extend(["--model".into(), model.into()]);
    }
    let code = run(worker)?;
    // Scores of another model, or in another folder, are not those of the run.
    if is_run && code == ExitCode::SUCCESS && arguments.model.is_none() && arguments.output.is_none() {
        tell_bucket(&arguments.target);
    }
    Ok(code)
}

/// Whether somebody who writes this means a recipe file, where nothing is there.
fn is_recipe_name(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml")
}

/// The scores stand in the run's folder already, so a bucket that does not take them is no failure.
fn tell_bucket(run: &Path) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64());
    if let Err(error) = publish_run(run, now) {
        tracing::warn!(error = format!("{error:#}"), "the bucket of the run's checkpoints could not be told its scores");
    }
}

/// Recipe file and output folder of a run's evaluation.
fn eval_of_run(arguments: &EvalArguments) -> Result<(PathBuf, PathBuf)> {
    if !arguments.changes.overrides.is_empty() || arguments.changes.profile.is_some() {
        let failure = Failure::new(FailureKind::Recipe, "`--set` and `--profile` do not change a run");
        return Err(failure.hint("evaluate a recipe file with `--model DIR` instead").into());
    }
    let output = arguments.output.clone().unwrap_or_else(|| arguments.target.join("eval"));
    Ok((arguments.target.join("recipe.yaml"), output))
}

/// The resolved recipe, written into the output folder, and that folder.
fn eval_of_recipe(arguments: &EvalArguments) -> Result<(PathBuf, PathBuf)> {
    let recipe = arguments.changes.load(&arguments.target)?;
    let output = arguments.output.clone().unwrap_or_else(|| Path::new("runs").join(format!("{}-eval", recipe.name)));
    let storage = |error: std::io::Error| {
        Failure::new(FailureKind::Storage, "the output folder cannot be written").at(output.display()).because(error)
    };
    std::fs::create_dir_all(&output).map_err(storage)?;
    let resolved = output.join("recipe.yaml");
    let partial = output.join(format!(".recipe.yaml.{}", std::process::id()));
    std::fs::write(&partial, recipe.to_yaml()).and_then(|()| std::fs::rename(&partial, &resolved)).map_err(storage)?;
    Ok((resolved, output))
}

/// `cloze predict`
pub fn predict(arguments: &PredictArguments) -> Result<ExitCode> {
    let mut worker = vec![OsString::from("predict"), "--model".into(), arguments.model.clone().into()];
    worker.extend(["--template".into(), arguments.template.clone().into(), "--anchor".into(), arguments.anchor.clone().into()]);
    worker.extend(["--max-length".into(), arguments.max_length.to_string().into()]);
    if let Some(labels) = &arguments.labels {
        worker.extend(["--labels".into(), labels.into()]);
    }
    worker.push("--".into());
    worker.extend(arguments.texts.iter().map(Into::into));
    run(worker)
}

/// `cloze export`
pub fn export(arguments: &ExportArguments) -> Result<ExitCode> {
    refuse_study(&arguments.run, |study| format!("`cloze sweep status {study}` names its trials; export {study}/runs/TRIAL"))?;
    check_run(&arguments.run)?;
    run(vec!["export".into(), arguments.run.clone().into(), arguments.output.clone().into()])
}

/// `cloze forward`
pub fn forward(arguments: &ForwardArguments) -> Result<ExitCode> {
    let mut worker = vec![OsString::from("forward"), "--model".into(), arguments.model.clone().into()];
    worker.extend(["--input".into(), arguments.input.clone().into(), "--output".into(), arguments.output.clone().into()]);
    if arguments.gradients {
        worker.push("--gradients".into());
    }
    worker.extend(["--steps".into(), arguments.steps.to_string().into()]);
    worker.extend(["--learning-rate".into(), arguments.learning_rate.to_string().into()]);
    worker.extend(placement(&arguments.placement));
    run(worker)
}

/// The worker's flags of a device and precision.
pub(super) fn placement(arguments: &PlacementArguments) -> Vec<OsString> {
    let device = match arguments.device {
        DeviceName::Cpu => "cpu",
        DeviceName::Cuda => "cuda",
    };
    let mut flags = vec!["--device".into(), device.into()];
    if arguments.bfloat16 {
        flags.push("--bfloat16".into());
    }
    flags
}

/// Starts the worker on this terminal, waits for it and passes its exit code on.
pub(super) fn run(arguments: Vec<OsString>) -> Result<ExitCode> {
    let binary = worker_binary()?;
    let status = Command::new(&binary).args(arguments).status().map_err(|error| not_started(&binary, &error))?;
    exit_code(&binary, status)
}

/// Starts the worker with a text as its input, and waits for it; its exit code, and what it printed.
pub(super) fn run_with_input(arguments: &[OsString], input: &str) -> Result<(ExitCode, String)> {
    let binary = worker_binary()?;
    let started = Command::new(&binary).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = started.map_err(|error| not_started(&binary, &error))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A worker that ends before it has read everything says why itself.
        drop(stdin.write_all(input.as_bytes()));
    }
    let output = child.wait_with_output().context("wait for the worker")?;
    Ok((exit_code(&binary, output.status)?, String::from_utf8_lossy(&output.stdout).into_owned()))
}

fn not_started(binary: &Path, error: &std::io::Error) -> Failure {
    Failure::new(FailureKind::Environment, "the worker could not be started").at(binary.display()).because(error)
}

fn exit_code(binary: &Path, status: ExitStatus) -> Result<ExitCode> {
    match status.code() {
        Some(EXIT_CODE_NOT_LOADED) => {
            Err(Failure::new(FailureKind::Environment, "the worker could not be loaded; the line above names the library")
                .at(binary.display())
                .hint("run `make setup` and build again: libtorch has moved or is gone")
                .into())
        }
        Some(code) => Ok(ExitCode::from(code.clamp(0, 255) as u8)),
        None => Err(Failure::new(FailureKind::Run, "the worker was killed").at(binary.display()).found(status).into()),
    }
}
