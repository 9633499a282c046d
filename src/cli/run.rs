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
use cloze_data::store;
use cloze_data::tokenizer::Tokenizer;
use cloze_launcher::sweep::folder::StudyFolder;
use cloze_launcher::view::EventLog;
use cloze_launcher::{
    Drill, LaunchOptions, LaunchPlan, NewRun, RunEnd, RunFolder, TerminalStyle, last_local_workers, last_workers, launch_on_hosts,
};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;

use super::arguments::{ResumeArguments, TrainArguments, WatchArguments, WorkerArguments};
use super::hosts::Hosts;
use super::operation::operated;
use super::run_place::refuse_study;
use super::submit::finished_at;
use super::worker_process::worker_binary;

/// Folder of runs that are given no folder.
pub(super) const RUNS_FOLDER: &str = "runs";

/// A folder below a bucket's prefix that holds nothing; it is listed to see whether the bucket lets us in.
const ACCESS_FOLDER: &str = "access";

/// Starts a new run.
pub fn train(arguments: &TrainArguments) -> Result<ExitCode> {
    let recipe = arguments.recipe.load()?;
    let dataset = check_inputs(&recipe)?;
    for (who, address) in [("coordinator", arguments.watch.listen), ("dashboard", arguments.watch.dashboard.0)] {
        address.map_or(Ok(()), |address| check_port(who, address))?;
    }
    let total = total_steps(&recipe.train, dataset.manifest().epoch_samples(recipe.data.mixing_cap));
    let hosts = Hosts::of(&arguments.hosts, || {
        let changes = &arguments.recipe.changes;
        Ok(cloze_recipes::load_study(&arguments.recipe.recipe, &changes.overrides, changes.profile.as_deref())?.resources)
    })?;
    let slots = Slots::of(&arguments.workers, 1).over(hosts.as_ref(), arguments.watch.listen)?;
    let plan = plan(slots, &arguments.watch, recipe.clone(), total)?;
    check_checkpoint_place(&recipe, plan.local_workers)?;
    let runs = hosts.as_ref().and_then(|hosts| hosts.folder.clone()).unwrap_or_default().join(RUNS_FOLDER);
    let folder = arguments.run.clone().unwrap_or_else(|| runs.join(&recipe.name));
    if let Some(hosts) = &hosts {
        hosts.check_machines(&recipe, &folder)?;
    }
    let (root, name) = split(&folder)?;
    let new = NewRun {
        name: &name,
        recipe: &recipe,
        data_fingerprint: dataset.manifest().fingerprint(),
        command_line: std::env::args().collect(),
        worker_build: build_name(),
    };
    go(RunFolder::create(&root, &new)?, plan, hosts.as_ref(), arguments.watch.quiet)
}

/// Goes on with a run: here, or in jobs where jobs brought it this far.
pub fn resume(arguments: &ResumeArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    refuse_study(&arguments.run, |study| format!("`cloze sweep resume {study}` goes on with its trials"))?;
    if let Some(code) = super::submit::resume(arguments, stdout)? {
        return Ok(code);
    }
    let (run, mut recipe, total) = open_to_resume(&arguments.run)?;
    if !arguments.overrides.is_empty() {
        recipe = operated(run.paths(), run.info(), &arguments.overrides)?;
    }
    if let Some(step) = finished_at(run.paths())?.filter(|&step| step >= total && !arguments.watch.quiet) {
        // Workers look whether its files are whole, and do again what is lost of it.
        write_last_line(&mut std::io::stderr(), &format!("the run is finished at step {step}; its newest checkpoint is looked at"))?;
    }
    tell_if_past(&run, arguments.watch.until_step)?;
    // The run folder does not say how many machines the recipe wanted.
    let hosts = Hosts::of(&arguments.hosts, || {
        let failure = Failure::new(FailureKind::Recipe, "`--cluster` does not say over which hosts a run goes on");
        Err(failure.hint("name them: `--hosts a,b --workers-per-host N`").into())
    })?;
    // Hosts decide it themselves.
    let before = if hosts.is_some() { 1 } else { workers_before(&run, &arguments.workers)? };
    let mut slots = Slots::of(&arguments.workers, before);
    // Workers of `cloze join` that a killed controller has left keep their slots.
    let is_told = arguments.here || arguments.workers.local.is_some() || arguments.workers.workers.is_some();
    if let Some(local) = last_local_workers(run.paths())?.filter(|_| !is_told) {
        slots.local_workers = local.min(slots.workers);
    }
    let slots = slots.over(hosts.as_ref(), arguments.watch.listen)?;
    let plan = plan(slots, &arguments.watch, recipe, total)?;
    go(run, LaunchPlan { resumed: true, changes: arguments.overrides.clone(), ..plan }, hosts.as_ref(), arguments.watch.quiet)
}

/// Says that a run has gone beyond the step after which it is to be left. No error: a rung of a sweep may be tried again.
fn tell_if_past(run: &RunFolder, until_step: Option<u64>) -> Result<()> {
    let Some(until_step) = until_step.filter(|_| run.paths().events().exists()) else { return Ok(()) };
    let mut log = EventLog::of_run(run.path());
    log.read_new()?;
    let step = log.into_view().progress.step;
    if step > until_step {
        let line = format!("warning: the run is at step {step} already, so nothing is trained (`--until-step {until_step}`)");
        write_last_line(&mut std::io::stderr(), &line)?;
    }
    Ok(())
}

/// The workers that a resumed run has, where nothing else is said. Fails where nothing tells of them.
fn workers_before(run: &RunFolder, asked: &WorkerArguments) -> Result<u32> {
    match (asked.workers, last_workers(run.paths())?) {
        (Some(workers), _) | (None, Some(workers)) => Ok(workers),
        (None, None) => Err(Failure::new(FailureKind::Input, "the event log names no start of the run, so its workers are not known")
            .at(run.paths().events().display())
            .hint("say how many it is to have: `--workers N`")
            .into()),
    }
}

/// Opens what a run reads, and checks that it belongs together.
pub(super) fn check_inputs(recipe: &Recipe) -> Result<Dataset> {
    check_model_folder(recipe)?;
    check_data(recipe)
}

/// Opens the prepared data, and checks that it is of this recipe and this tokenizer.
pub(super) fn check_data(recipe: &Recipe) -> Result<Dataset> {
    let dataset = Dataset::open(&recipe.data.output)?;
    check_has_samples(&dataset, recipe)?;
    check_prepared(recipe, dataset.manifest())?;
    dataset.check_tokenizer(&Tokenizer::load(&recipe.model.tokenizer)?)?;
    Ok(dataset)
}

/// Opens a run that was started before, with its recipe and the steps of the whole run. Its data must be what it was.
pub(super) fn open_to_resume(folder: &Path) -> Result<(RunFolder, Recipe, u64)> {
    let (run, recipe) = RunFolder::open(folder)?;
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
    let total = total_steps(&recipe.train, dataset.manifest().epoch_samples(recipe.data.mixing_cap));
    Ok((run, recipe, total))
}

/// How many workers there are to be.
#[derive(Clone, Copy)]
struct Slots {
    workers: u32,
    local_workers: u32,
    join_timeout: Duration,
    /// Where the coordinator listens, where the hosts decide it.
    listen: Option<SocketAddr>,
}

impl Slots {
    /// What was asked for; without a number of workers this many.
    fn of(arguments: &WorkerArguments, workers: u32) -> Self {
        let workers = arguments.workers.unwrap_or(workers);
        let local_workers = arguments.local.unwrap_or(workers);
        Self { workers, local_workers, join_timeout: Duration::from_secs(arguments.join_timeout), listen: None }
    }

    /// Those of the hosts, where hosts were named.
    fn over(self, hosts: Option<&Hosts>, listen: Option<SocketAddr>) -> Result<Self, Failure> {
        let Some(hosts) = hosts else { return Ok(self) };
        let listen = if listen.is_some() { listen } else { hosts.listen()? };
        Ok(Self { workers: hosts.workers, local_workers: hosts.local_workers, listen, ..self })
    }
}

/// What is to be done, of a new run.
fn plan(slots: Slots, watch: &WatchArguments, recipe: Recipe, total_steps: u64) -> Result<LaunchPlan> {
    let Slots { workers, local_workers, join_timeout, listen } = slots;
    let plan = LaunchPlan {
        recipe,
        total_steps,
        workers,
        local_workers,
        worker_binary: worker_binary()?,
        worker_build: build_name(),
        bind: watch.listen.or(listen),
        join_timeout,
        resumed: false,
        dashboard: watch.dashboard.0,
        drills: drills(watch)?,
        until_step: watch.until_step,
        changes: Vec::new(),
    };
    if let Some(until_step) = watch.until_step.filter(|&until_step| until_step > total_steps) {
        // No error: the last rung of a sweep may lie beyond the end.
        let line = format!("warning: the run has {total_steps} steps, so it goes on to its end (`--until-step {until_step}`)");
        write_last_line(&mut std::io::stderr(), &line)?;
    }
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
fn go(run: RunFolder, plan: LaunchPlan, hosts: Option<&Hosts>, quiet: bool) -> Result<ExitCode> {
    let run_path = run.path().to_owned();
    let until_step = plan.until_step;
    let elsewhere = plan.local_workers < plan.workers;
    let again = match hosts {
        Some(_) if elsewhere => " with the same hosts and `--workers-per-host`".to_owned(),
        None if elsewhere => format!(" --workers {} --local {}", plan.workers, plan.local_workers),
        _ => format!(" --workers {}", plan.workers),
    };
    let again = going_on(&run_path, &again);
    let others = hosts.map(|hosts| hosts.plan(&run_path)).transpose()?.unwrap_or_default();
    let options = LaunchOptions { run, plan, output: Box::new(std::io::stderr()), style: terminal_style(quiet) };
    let end = launch_on_hosts(options, others)?.end;
    let shown = run_path.display().to_string();
    match end {
        RunEnd::Finished { .. } => {
            let next = format!(
                "run folder: {shown}\nnext: cloze eval {shown}, cloze export {shown} --output DIR, tensorboard --logdir {shown}/tensorboard"
            );
            write_last_line(&mut std::io::stderr(), &next)?;
            Ok(ExitCode::SUCCESS)
        }
        RunEnd::Stopped { step } if until_step.is_some_and(|until_step| step >= until_step) => {
            write_last_line(&mut std::io::stderr(), &format!("run folder: {shown}\nstep {step} is saved; {again}"))?;
            Ok(ExitCode::SUCCESS)
        }
        RunEnd::Stopped { step } => {
            let what = if step == 0 {
                "stopped before anything was saved or restored".to_owned()
            } else {
                format!("stopped; step {step} is saved")
            };
            let failure = Failure::new(FailureKind::Interrupted, what).at(&shown);
            Err(failure.hint(again).into())
        }
        RunEnd::Failed(failure) => Err(failure.into()),
    }
}

/// What goes on with a run that was left, itself with these arguments where it is no trial.
fn going_on(run: &Path, arguments: &str) -> String {
    match StudyFolder::of_run(run) {
        None => format!("go on with: cloze resume {}{arguments}", run.display()),
        Some(study) => {
            format!("its sweep goes on with it; where no controller lives any more, by: cloze sweep resume {}", study.root().display())
        }
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

/// Finds settings that do not open a bucket, and credentials that it does not take, before a run folder is made. Where no worker is
/// started here, this host may lack the credentials.
fn check_checkpoint_place(recipe: &Recipe, local_workers: u32) -> Result<()> {
    let Some(url) = &recipe.checkpoint.url else { return Ok(()) };
    let place = store::open(url, &recipe.checkpoint.options)?;
    if !place.is_local() && local_workers > 0 {
        store::list_below(&place, ACCESS_FOLDER)?;
    }
    Ok(())
}

/// The folder above a run folder, and its name.
pub(super) fn split(folder: &Path) -> Result<(PathBuf, String)> {
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
    fn a_trial_is_gone_on_with_by_its_sweep() {
        let root = tempfile::tempdir().unwrap();
        let (study, run) = (root.path().display(), root.path().join("runs/demo-a"));
        let alone = format!("go on with: cloze resume {} --workers 2", run.display());
        assert_eq!(going_on(&run, " --workers 2"), alone, "no study is there");
        std::fs::write(root.path().join("sweep.json"), "{}").unwrap();
        let swept = format!("its sweep goes on with it; where no controller lives any more, by: cloze sweep resume {study}");
        assert_eq!(going_on(&run, " --workers 2"), swept);
        let elsewhere = root.path().join("other/demo-a");
        assert!(going_on(&elsewhere, "").starts_with("go on with: cloze resume "), "only a study's own runs are its trials");
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
