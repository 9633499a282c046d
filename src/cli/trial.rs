//! `cloze sweep train`: the training of one trial over all nodes of its element. `cloze sweep work` starts it.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use cloze_cluster::protocol::build_name;
use cloze_launcher::slurm::{AllocationOptions, Programs, TrialNodes, TrialNodesEnd, run_over_nodes};
use cloze_launcher::sweep::folder::StudyFolder;
use cloze_launcher::{NewRun, RunEnd, RunFolder, RunPaths};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;

use super::run::{check_inputs, open_to_resume, split};
use super::worker_process::worker_binary;

/// Arguments of `cloze sweep train`.
#[derive(Args)]
pub struct TrainTrialArguments {
    /// Study folder
    pub folder: PathBuf,
    /// Hash of the trial
    #[arg(long)]
    pub trial: String,
    /// Step after which the run is left, with its state saved [default: the last one]
    #[arg(long)]
    pub until_step: Option<u64>,
}

/// Trains a trial to its end, to the step at which it is to pause, or to the end of the job.
pub fn train(arguments: &TrainTrialArguments) -> Result<ExitCode> {
    let folder = StudyFolder::find(&arguments.folder)?;
    let plan = folder.plan()?;
    let site = plan.site.ok_or_else(|| {
        Failure::new(FailureKind::Recipe, "the trials of this study run on one machine each")
            .at(folder.root().display())
            .hint("`cloze sweep run --cluster FILE` runs them as jobs of a cluster")
    })?;
    let recipe = cloze_recipes::load(&folder.recipe_path(&arguments.trial), &[])?;
    let paths = open_run(&folder.run_path(&recipe.name), &recipe)?;
    let programs = Programs::found_at(std::env::current_exe().context("find this program")?, worker_binary()?)?;
    let options = AllocationOptions {
        paths,
        open: &|paths| open_to_resume(paths.root()),
        worker_build: build_name(),
        output: &|| Box::new(std::io::stderr()),
    };
    let trial = TrialNodes { site, resources: plan.resources, programs, until_step: arguments.until_step };
    let TrialNodesEnd { end, bad_nodes } = run_over_nodes(&options, trial)?;
    StudyFolder::write_json(&folder.bad_nodes_path(&arguments.trial), &bad_nodes)?;
    outcome(end, arguments.until_step, &options.paths)
}

/// The run folder, made where it is not there. Its lock is let go of; whoever works on the trial has a lock of its own.
fn open_run(path: &Path, recipe: &Recipe) -> Result<RunPaths> {
    if path.join("run.json").is_file() {
        return Ok(RunPaths::find(path)?);
    }
    let dataset = check_inputs(recipe)?;
    let (root, name) = split(path)?;
    let new = NewRun {
        name: &name,
        recipe,
        data_fingerprint: dataset.manifest().fingerprint(),
        command_line: std::env::args().collect(),
        worker_build: build_name(),
    };
    Ok(RunFolder::create(&root, &new)?.paths().clone())
}

fn outcome(end: RunEnd, until_step: Option<u64>, run: &RunPaths) -> Result<ExitCode> {
    let shown = run.root().display();
    let line = match end {
        RunEnd::Finished { step } => format!("all {step} steps are done"),
        RunEnd::Stopped { step } if until_step.is_some_and(|until_step| step >= until_step) => format!("step {step} is saved"),
        // The attempt was told to leave before its workers came.
        RunEnd::Stopped { step: 0 } => {
            return Err(Failure::new(FailureKind::Interrupted, "stopped before it began; what was saved is kept").at(shown).into());
        }
        RunEnd::Stopped { step } => {
            return Err(Failure::new(FailureKind::Interrupted, format!("stopped; step {step} is saved")).at(shown).into());
        }
        RunEnd::Failed(failure) => return Err(failure.into()),
    };
    writeln!(std::io::stderr(), "{line}; run folder: {shown}").context("write to the trial's log")?;
    Ok(ExitCode::SUCCESS)
}
