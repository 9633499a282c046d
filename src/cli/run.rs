//! `cloze train` and `cloze resume`: a run folder, a coordinator and workers on this machine.

use std::io::{ErrorKind, IsTerminal, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use cloze_cluster::protocol::build_name;
use cloze_data::batch::total_steps;
use cloze_data::dataset::Dataset;
use cloze_data::prepare::check_prepared;
use cloze_data::tokenizer::Tokenizer;
use cloze_launcher::{Drill, LaunchOptions, LaunchPlan, NewRun, RunEnd, RunFolder, TerminalStyle, last_workers, launch};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;

use super::arguments::{ResumeArguments, TrainArguments, WatchArguments, WorkerArguments};
use super::worker_process::worker_binary;

/// Folder of runs that are given no folder.
const RUNS_FOLDER: &str = "runs";

/// Starts a new run.
pub fn train(arguments: &TrainArguments) -> Result<ExitCode> {
    let recipe = arguments.recipe.load()?;
    check_model_folder(&recipe)?;
    let dataset = Dataset::open(&recipe.data.output)?;
    check_has_samples(&dataset, &recipe)?;
    check_prepared(&recipe, dataset.manifest())?;
    dataset.check_tokenizer(&Tokenizer::load(&recipe.model.tokenizer)?)?;
    for (who, address) in [("coordinator", arguments.watch.listen), ("dashboard", arguments.watch.dashboard.0)] {
        address.map_or(Ok(()), |address| check_port(who, address))?;
    }
    let total = total_steps(&recipe.train, dataset.num_samples());
    let plan = plan(Slots::of(&arguments.workers, 1), &arguments.watch, recipe.clone(), total)?;
    let folder = arguments.run.clone().unwrap_or_else(|| Path::new(RUNS_FOLDER).join(&recipe.name));
    let (root, name) = split(&folder)?;
    let new = NewRun {
        name: &name,
        recipe: &recipe,
        data_fingerprint: dataset.manifest().fingerprint(),
        command_line: std::env::args().collect(),
        worker_build: build_name(),
    };
    go(RunFolder::create(&root, &new)?, plan, arguments.watch.quiet)
}

/// Goes on with a run.
pub fn resume(arguments: &ResumeArguments) -> Result<ExitCode> {
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
    let before = last_workers(run.paths())?.unwrap_or(1);
    let plan = plan(Slots::of(&arguments.workers, before), &arguments.watch, recipe, total)?;
    go(run, LaunchPlan { resumed: true, ..plan }, arguments.watch.quiet)
}

/// How many workers there are to be.
#[derive(Clone, Copy)]
struct Slots {
    workers: u32,
    local_workers: u32,
    join_timeout: Duration,
}

impl Slots {
    /// What was asked for; without a number of workers this many.
    fn of(arguments: &WorkerArguments, workers: u32) -> Self {
        let workers = arguments.workers.unwrap_or(workers);
        let local_workers = arguments.local.unwrap_or(workers);
        Self { workers, local_workers, join_timeout: Duration::from_secs(arguments.join_timeout) }
    }
}

/// What is to be done, of a new run.
fn plan(slots: Slots, watch: &WatchArguments, recipe: Recipe, total_steps: u64) -> Result<LaunchPlan> {
    let Slots { workers, local_workers, join_timeout } = slots;
    let plan = LaunchPlan {
        recipe,
        total_steps,
        workers,
        local_workers,
        worker_binary: worker_binary()?,
        worker_build: build_name(),
        bind: watch.listen,
        join_timeout,
        resumed: false,
        dashboard: watch.dashboard.0,
        drills: drills(watch)?,
    };
    // Before a run folder is made; the launcher checks again, for callers that are not this one.
    plan.check()?;
    Ok(plan)
}

/// The drills of both arguments.
fn drills(watch: &WatchArguments) -> Result<Vec<Drill>, Failure> {
    let killed = watch.killed_workers.iter().map(|place| format!("kill:{place}"));
    watch.drills.iter().cloned().chain(killed).map(|text| text.parse()).collect()
}

/// Launches, and says what to do next.
fn go(run: RunFolder, plan: LaunchPlan, quiet: bool) -> Result<ExitCode> {
    let run_path = run.path().to_owned();
    let elsewhere = plan.local_workers < plan.workers;
    let again = if elsewhere { format!(" --local {}", plan.local_workers) } else { String::new() };
    let again = format!("cloze resume {} --workers {}{again}", run_path.display(), plan.workers);
    let end = launch(LaunchOptions { run, plan, output: Box::new(std::io::stderr()), style: terminal_style(quiet) })?;
    let shown = run_path.display().to_string();
    match end {
        RunEnd::Finished { .. } => {
            let next = format!(
                "run folder: {shown}\nnext: cloze eval {shown}, cloze export {shown} --output DIR, tensorboard --logdir {shown}/tensorboard"
            );
            write_last_line(&mut std::io::stderr(), &next)?;
            Ok(ExitCode::SUCCESS)
        }
        RunEnd::Stopped { step } => {
            let what = if step == 0 {
                "stopped before anything was saved or restored".to_owned()
            } else {
                format!("stopped; step {step} is saved")
            };
            let failure = Failure::new(FailureKind::Interrupted, what).at(&shown);
            Err(failure.hint(format!("go on with: {again}")).into())
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

/// Tells what a command has done. Where somebody has closed the other end, as `| head` does, the work is done all the same.
pub(super) fn write_last_line(output: &mut impl Write, line: &str) -> Result<()> {
    match writeln!(output, "{line}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("report the end"),
    }
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
fn check_port(who: &str, address: SocketAddr) -> Result<(), Failure> {
    TcpListener::bind(address).map(drop).map_err(|error| {
        Failure::new(FailureKind::Environment, format!("the {who} cannot listen there"))
            .at(address)
            .because(error)
            .hint("name another address; port 0 takes a free one")
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

fn split(folder: &Path) -> Result<(PathBuf, String)> {
    let name = folder.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    let name = name.ok_or_else(|| Failure::new(FailureKind::Recipe, "the run folder has no name").at(folder.display()))?;
    Ok((folder.parent().map_or_else(PathBuf::new, Path::to_owned), name))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// An output that fails in one way.
    struct Broken(ErrorKind);

    impl Write for Broken {
        fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_closed_output_does_not_undo_the_work() {
        let mut screen = Vec::new();
        write_last_line(&mut screen, "done").unwrap();
        assert_eq!(screen, b"done\n");
        write_last_line(&mut Broken(ErrorKind::BrokenPipe), "done").unwrap();
        assert!(write_last_line(&mut Broken(ErrorKind::StorageFull), "done").is_err());
    }
}
