//! One attempt at a run over all nodes of the job around this process: pre-flight, workers on every node, and what warns of the job's end.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use cloze_cluster::RunEnd;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;

use super::allocation::AllocationOptions;
use super::client::Slurm;
use super::machines::{Machines, step};
use super::preflight::check_nodes;
use super::submission::Submission;
use super::watch::{PreemptionWatch, Warnings};
use crate::local::{HostsEnd, LaunchOptions, LaunchPlan, forget_earlier, launch_on_hosts};
use crate::reporter::TerminalStyle;
use crate::run_folder::RunFolder;

/// Longest wait for the run folder's lock, in seconds: a controller on another node may still be leaving, and a shared file system takes
/// up to some minutes to free the lock of a node that died.
const RUN_LOCK_WAIT_S: u64 = 180;

/// Longest wait for the workers of all nodes, in seconds; containers are unpacked in it.
const JOIN_TIMEOUT_S: u64 = 300;

/// What an attempt is made with.
pub(super) struct Attempt<'a> {
    /// The run.
    pub options: &'a AllocationOptions<'a>,
    /// Site, machines and programs.
    pub submission: &'a Submission,
    /// The batch system.
    pub slurm: &'a Arc<Slurm>,
    /// The nodes of the job.
    pub machines: &'a Machines,
    /// What the job has heard of its end.
    pub warnings: &'a Warnings,
    /// Step at which the run is left, with its state saved; `None` goes on to the end.
    pub until_step: Option<u64>,
    /// Whether the log is to hold no line for each step.
    pub is_quiet: bool,
}

/// What an attempt has come to.
pub(super) struct Attempted {
    /// How it ended.
    pub end: RunEnd,
    /// Nodes that are to blame for that.
    pub bad_nodes: Vec<String>,
}

impl Attempt<'_> {
    /// Up to the end of the run or of this job's part of it. Whatever goes wrong is a failure of the attempt.
    pub fn go(&self) -> Attempted {
        let mut bad_nodes = Vec::new();
        let end = self.run(&mut bad_nodes).unwrap_or_else(|error| {
            RunEnd::Failed(
                error
                    .downcast::<Failure>()
                    .unwrap_or_else(|error| Failure::new(FailureKind::Run, "the attempt failed").because(format!("{error:#}"))),
            )
        });
        Attempted { end, bad_nodes }
    }

    fn run(&self, bad_nodes: &mut Vec<String>) -> anyhow::Result<RunEnd> {
        let Self { submission, machines, slurm, .. } = self;
        let paths = &self.options.paths;
        submission.programs.check()?;
        if submission.site.preflight.enabled {
            let verdict = check_nodes(&machines.preflight(slurm, submission, paths), None)?;
            if !verdict.ok {
                let reasons: Vec<String> = verdict.bad_nodes.iter().map(|bad| format!("{}: {}", bad.node, bad.reason)).collect();
                bad_nodes.extend(verdict.bad_nodes.into_iter().map(|bad| bad.node));
                return Ok(RunEnd::Failed(
                    Failure::new(FailureKind::Environment, "nodes of the job cannot be used").because(reasons.join("\n    ")),
                ));
            }
        }
        if self.warnings.seen().is_some() {
            return Ok(RunEnd::Stopped { step: 0 });
        }
        let (run, recipe, total_steps) = self.open_run()?;
        // The batch system has ended all processes of the attempts before; only what they wrote down is left.
        forget_earlier(run.paths())?;
        let plan = LaunchPlan {
            recipe,
            total_steps,
            workers: submission.workers(),
            local_workers: Machines::local_workers(submission),
            worker_binary: submission.programs.worker.clone(),
            worker_build: self.options.worker_build.clone(),
            bind: machines.listen()?,
            join_timeout: Duration::from_secs(JOIN_TIMEOUT_S),
            resumed: paths.events().exists() || paths.journal().exists(),
            dashboard: Some(([127, 0, 0, 1], 0).into()),
            drills: Vec::new(),
            until_step: self.until_step,
            changes: Vec::new(),
        };
        let step = step(slurm, submission, paths.root(), machines.nodes.first().map(String::as_str));
        let step: Vec<String> = step.into_iter().filter(|word| !word.starts_with("--container-")).collect();
        let _watch = PreemptionWatch::start(Arc::clone(slurm), machines.job, &step, self.warnings)?;
        let style = TerminalStyle { interactive: false, color: false, quiet: self.is_quiet };
        let options = LaunchOptions { run, plan, output: (self.options.output)(), style };
        let HostsEnd { end, lost_host } = launch_on_hosts(options, machines.hosts(slurm, submission, paths))?;
        bad_nodes.extend(lost_host);
        Ok(end)
    }

    /// Opens the run, once an earlier controller on another node has let go of it.
    fn open_run(&self) -> anyhow::Result<(RunFolder, Recipe, u64)> {
        let deadline = Instant::now() + Duration::from_secs(RUN_LOCK_WAIT_S);
        loop {
            match (self.options.open)(&self.options.paths) {
                Err(error) if is_locked(&error) && Instant::now() < deadline && self.warnings.seen().is_none() => {
                    sleep(Duration::from_secs(1));
                }
                // Of kind `Storage` it puts the job back: the lock may be that of a node that died, and is free later.
                Err(error) if is_locked(&error) && self.warnings.seen().is_none() => {
                    return Err(Failure::new(FailureKind::Storage, format!("the run is still locked after {RUN_LOCK_WAIT_S} s"))
                        .because(one_line(&error))
                        .into());
                }
                result => return result,
            }
        }
    }
}

/// Whether another controller holds the run folder.
fn is_locked(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Failure>().is_some_and(|failure| failure.kind == FailureKind::Run)
}

/// An error for a log, in which each thing is one line.
pub(super) fn one_line(error: &anyhow::Error) -> String {
    let text = error.downcast_ref::<Failure>().map_or_else(|| format!("{error:#}"), Failure::to_string);
    text.split('\n').map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
}
