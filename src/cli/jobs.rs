//! What concerns the jobs of a run: `cloze cancel`, `cloze logs`, what `cloze status` says of them, and what a job itself executes.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use cloze_cluster::protocol::build_name;
use cloze_launcher::RunPaths;
use cloze_launcher::slurm::{
    AllocationOptions, JobPaths, Jobs, LogChoice, Slurm, Submission, mark_cancelled, run_in_job, show_logs, unfinished_jobs,
};
use cloze_recipes::failure::{Failure, FailureKind};

use super::run::{open_to_resume, write_last_line};
use super::run_place::{check_run, find_run};

/// Arguments of `cloze cancel`.
#[derive(Args)]
pub struct CancelArguments {
    /// Run folder
    pub run: PathBuf,
    /// Ask no SLURM: leave a mark, so that no job of the run begins any more, and name those that may run in a cluster out of reach
    #[arg(long)]
    pub mark_only: bool,
}

/// Arguments of `cloze logs`.
#[derive(Args)]
pub struct LogsArguments {
    /// Run folder
    pub run: PathBuf,
    /// Go on while the logs grow, until the run is over
    #[arg(long, short)]
    pub follow: bool,
    /// Only the log of this worker
    #[arg(long, value_name = "N")]
    pub worker: Option<u32>,
    /// Only the log of this job, as in `12`
    #[arg(long, value_name = "ID")]
    pub job: Option<String>,
    /// Only what this attempt has written into the log of its job; `cloze status` lists the attempts
    #[arg(long, value_name = "N", conflicts_with_all = ["worker", "job"])]
    pub attempt: Option<u32>,
}

/// Arguments of `cloze allocation`.
#[derive(Args)]
pub struct AllocationArguments {
    /// Run folder
    pub run: PathBuf,
}

/// Cancels all jobs of a run.
pub fn cancel(arguments: &CancelArguments) -> Result<ExitCode> {
    let run = find_run(&arguments.run, |study| format!("`cloze sweep cancel {study}` cancels its trials"))?;
    let paths = JobPaths::of(&run);
    let Some(submission) = Submission::read(&paths)? else {
        return Err(Failure::new(FailureKind::Recipe, "this run has no jobs")
            .at(run.root().display())
            .hint("Ctrl-C in its terminal, or Stop on its dashboard, ends a run without jobs")
            .into());
    };
    if arguments.mark_only {
        return mark_only(&run, &submission);
    }
    let slurm = Slurm::find(submission.slurm()?).map_err(|failure| {
        failure.hint(format!(
            "give the same command on a host of the cluster `{}`; where there is none any more, `cloze cancel {} --mark-only` lets no job \
             of the run begin",
            submission.site.name,
            run.root().display()
        ))
    })?;
    // This refuses where the jobs are out of reach; then the run is not marked, and goes on.
    let mut jobs = Jobs::open_here(&slurm, &run)?;
    // Before a job is cancelled: its successor must find the mark.
    mark_cancelled(&paths)?;
    let living: Vec<_> = jobs.living()?.into_iter().map(|(id, _)| id).collect();
    jobs.cancel(&living)?;
    for name in jobs.open_names() {
        let line = format!("job {name}, whose submission was cut off, was not found; should it begin, it ends at once");
        write_last_line(&mut std::io::stderr(), &line)?;
    }
    let line = match living.as_slice() {
        [] => "no job of this run was left to cancel".to_owned(),
        ids => {
            let shown: Vec<String> = ids.iter().map(ToString::to_string).collect();
            format!("cancelled: {}; `cloze resume {}` goes on with the run", shown.join(", "), run.root().display())
        }
    };
    write_last_line(&mut std::io::stderr(), &line)?;
    Ok(ExitCode::SUCCESS)
}

/// Leaves the mark and names the jobs that somebody else must cancel.
fn mark_only(run: &RunPaths, submission: &Submission) -> Result<ExitCode> {
    let paths = JobPaths::of(run);
    mark_cancelled(&paths)?;
    let place = &submission.site.name;
    for job in unfinished_jobs(&paths)? {
        let line = match job.job {
            Some(id) => format!("warning: job {id} may still be in the queue of the cluster `{place}`; on a host of it: scancel {id}"),
            None => format!(
                "warning: job {0} may still be in the queue of the cluster `{place}`; on a host of it: scancel --name={0}",
                job.name
            ),
        };
        write_last_line(&mut std::io::stderr(), &line)?;
    }
    write_last_line(&mut std::io::stderr(), &format!("marked: no job of the run {} begins any more", run.root().display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the logs of a run.
pub fn logs(arguments: &LogsArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let run = find_run(&arguments.run, |study| {
        format!(
            "`cloze sweep status {study}` names its trials; their logs are in {study}/jobs, and `cloze logs {study}/runs/TRIAL` shows those of a run"
        )
    })?;
    if !run.root().join("logs").is_dir() {
        check_run(run.root())?;
    }
    let choice = LogChoice { worker: arguments.worker, job: arguments.job.clone(), attempt: arguments.attempt, follow: arguments.follow };
    match show_logs(&run, &choice, stdout) {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Err(Failure::new(FailureKind::Input, "there is no such log yet")
            .at(run.root().join("logs").display())
            .hint("a log begins when its job or worker starts; `cloze status` shows what waits")
            .into()),
        // Somebody closed the other end, as `| head` does.
        Err(error) if is_broken_pipe(&error) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(error),
    }
}

/// What the batch script of a job executes on its first node.
pub fn allocation(arguments: &AllocationArguments) -> Result<ExitCode> {
    let paths = RunPaths::find(&arguments.run)?;
    let options = AllocationOptions {
        paths,
        open: &|paths| open_to_resume(paths.root()),
        worker_build: build_name(),
        output: &|| Box::new(std::io::stderr()),
    };
    let outcome = run_in_job(&options)?;
    if let Some(failure) = outcome.failure {
        writeln!(std::io::stderr(), "error: {failure}").context("write to the job's log")?;
    }
    Ok(ExitCode::from(outcome.code))
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
