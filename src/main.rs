//! `cloze`: the command line and control plane. It starts in milliseconds and without libtorch; tensor work is done by `cloze-worker`.
//!
//! Exit codes: 0 done, 1 an unforeseen error, 2 wrong usage, and those of `FailureKind` (docs/OPERATIONS.md lists them).

mod cli;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use cloze_launcher::sweep::leave::leave_with_parent;
use cloze_recipes::failure::Failure;

use cli::arguments::{Arguments, Command, DataCommand};
use cli::{
    bench, checkpoints, data, describe, jobs, join, load, plan, preflight, report, reproduce, run, runs, simulate, status, submit, sweep,
    worker_process,
};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    cli::start_logging();
    if let Err(error) = leave_with_parent() {
        tracing::warn!(%error, "this program may outlive the process that has started it");
    }
    match dispatch(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            // Nothing is left to tell where stderr itself is gone.
            drop(writeln!(std::io::stderr(), "error: {}", cli::error_text(&error)));
            ExitCode::from(error.downcast_ref::<Failure>().map_or(1, |failure| failure.kind.exit_code()))
        }
    }
}

fn dispatch(command: Command) -> Result<ExitCode> {
    let mut stdout = std::io::stdout().lock();
    match command {
        Command::Check(arguments) => describe::check(&arguments, &mut stdout),
        Command::Schema(arguments) => describe::schema(&arguments, &mut stdout),
        Command::Data { command: DataCommand::Prepare(arguments) } => data::prepare(&arguments),
        Command::Data { command: DataCommand::Inspect(arguments) } => data::inspect(&arguments, &mut stdout),
        Command::Data { command: DataCommand::Verify(arguments) } => data::verify(&arguments),
        Command::Data { command: DataCommand::Synth(arguments) } => data::synth(&arguments),
        Command::Plan(arguments) => plan::plan(&arguments, &mut stdout),
        Command::Train(arguments) => run::train(&arguments),
        Command::Resume(arguments) => run::resume(&arguments, &mut stdout),
        Command::Join(arguments) => join::join(&arguments),
        Command::Preflight(arguments) => preflight::preflight(&arguments, &mut stdout),
        Command::PreflightAgent => preflight::agent(&mut stdout),
        Command::Submit(arguments) => submit::submit(&arguments, &mut stdout),
        Command::Allocation(arguments) => jobs::allocation(&arguments),
        Command::Cancel(arguments) => jobs::cancel(&arguments),
        Command::Logs(arguments) => jobs::logs(&arguments, &mut stdout),
        Command::Sweep { command } => sweep::sweep(&command, &mut stdout),
        Command::Reproduce(arguments) => reproduce::reproduce(&arguments, &mut stdout),
        Command::Status(arguments) => status::status(&arguments, &mut stdout),
        Command::Watch(arguments) => status::watch(&arguments, &mut stdout),
        Command::Eval(arguments) => worker_process::eval(&arguments),
        Command::Predict(arguments) => worker_process::predict(&arguments),
        Command::Checkpoints { command } => checkpoints::checkpoints(&command),
        Command::Export(arguments) => worker_process::export(&arguments),
        Command::Forward(arguments) => worker_process::forward(&arguments),
        Command::Report(arguments) => report::report(&arguments, &mut stdout),
        Command::Runs(arguments) => runs::runs(&arguments, &mut stdout),
        Command::Diff(arguments) => runs::diff(&arguments, &mut stdout),
        Command::Simulate(arguments) => simulate::simulate(&arguments, &mut stdout),
        Command::BenchCoordinator(arguments) => load::bench_coordinator(&arguments, &mut stdout),
        Command::Bench(arguments) => bench::bench(&arguments, &mut stdout),
    }
}
