//! `cloze runs` and `cloze diff`: all runs below some folders or in a bucket, and what two of them differ in.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use cloze_launcher::registry::{DEFAULT_ROOTS, RunEntry, Side, compare, difference_text, entries, entry_text, find_runs, list_text};
use cloze_launcher::view::RunState;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::nearest;
use serde_json::json;

use super::bucket_runs;

/// Arguments of `cloze runs`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct RunsArguments {
    /// What to do; without, runs are listed.
    #[command(subcommand)]
    pub command: Option<RunsCommand>,
    /// Which runs are listed.
    #[command(flatten)]
    pub list: ListRunsArguments,
}

/// Subcommands of `cloze runs`.
#[derive(Subcommand)]
pub enum RunsCommand {
    /// List runs
    Ls(ListRunsArguments),
    /// Show everything that is known of a run
    Show(ShowRunArguments),
}

/// Arguments of `cloze runs ls`.
#[derive(Args)]
pub struct ListRunsArguments {
    /// Folder of runs or of studies, or of both as a cluster file names it, or url of a bucket with checkpoints; may be repeated [default: runs/ and studies/]
    #[arg(long = "root", value_name = "FOLDER_OR_URL")]
    pub roots: Vec<String>,
    /// Only runs in whose name, place, hash, state, study, tasks or recipe (as `key=value`) this occurs
    #[arg(long, value_name = "TEXT")]
    pub search: Option<String>,
    /// Only runs in this state, such as `finished`, `failed` or `interrupted`
    #[arg(long, value_name = "STATE")]
    pub state: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Option of the object store, as in a recipe's `checkpoint.options`; may be repeated
    #[arg(long = "option", value_name = "KEY=VALUE")]
    pub options: Vec<String>,
}

/// Arguments of `cloze runs show`.
#[derive(Args)]
pub struct ShowRunArguments {
    /// Run folder, or url of its checkpoints in a bucket
    pub run: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Option of the object store, as in a recipe's `checkpoint.options`; may be repeated
    #[arg(long = "option", value_name = "KEY=VALUE")]
    pub options: Vec<String>,
}

/// Arguments of `cloze diff`.
#[derive(Args)]
pub struct DiffArguments {
    /// Run folder, url of a run's checkpoints in a bucket, or recipe file
    pub first: PathBuf,
    /// The other one
    pub second: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Option of the object store, as in a recipe's `checkpoint.options`; may be repeated
    #[arg(long = "option", value_name = "KEY=VALUE")]
    pub options: Vec<String>,
}

/// Lists runs, or shows one.
pub fn runs(arguments: &RunsArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    match &arguments.command {
        None => list(&arguments.list, stdout),
        Some(RunsCommand::Ls(arguments)) => list(arguments, stdout),
        Some(RunsCommand::Show(arguments)) => show(arguments, stdout),
    }
}

/// Compares two runs.
pub fn diff(arguments: &DiffArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let difference = compare(side(&arguments.first, &arguments.options)?, side(&arguments.second, &arguments.options)?);
    let text = if arguments.json { pretty(&difference)? } else { difference_text(&difference) };
    stdout.write_all(text.as_bytes()).context("print the difference")?;
    Ok(ExitCode::SUCCESS)
}

/// A run in a bucket, a run folder or a recipe file.
fn side(place: &Path, options: &[String]) -> Result<Side> {
    match url_of(place) {
        Some(url) => Ok(Side::of_record(url, bucket_runs::record(url, options)?)),
        None => Side::read(place),
    }
}

fn url_of(place: &Path) -> Option<&str> {
    place.to_str().filter(|text| text.contains("://"))
}

fn list(arguments: &ListRunsArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let state = arguments.state.as_deref().map(checked_state).transpose()?;
    let (urls, folders): (Vec<&String>, Vec<&String>) = arguments.roots.iter().partition(|root| root.contains("://"));
    let roots = if arguments.roots.is_empty() { default_roots()? } else { folders.into_iter().map(PathBuf::from).collect() };
    let (mut runs, notes) = entries(&find_runs(&roots)?);
    for url in urls {
        runs.extend(bucket_runs::entries(url, &arguments.options)?);
    }
    runs.retain(|run| state.as_ref().is_none_or(|state| run.state == *state));
    runs.retain(|run| arguments.search.as_ref().is_none_or(|text| run.contains(text)));
    for note in notes {
        writeln!(std::io::stderr(), "warning: {note}").context("report a study")?;
    }
    let text = if arguments.json { pretty(&json!({ "runs": runs }))? } else { list_text(&runs, now()?) };
    stdout.write_all(text.as_bytes()).context("print the runs")?;
    Ok(ExitCode::SUCCESS)
}

fn show(arguments: &ShowRunArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let entry = match url_of(&arguments.run) {
        Some(url) => RunEntry { place: url.to_owned(), ..bucket_runs::record(url, &arguments.options)?.entry },
        None => entry_in(&arguments.run)?,
    };
    let text = if arguments.json {
        let mut shown = serde_json::to_value(&entry).context("write the run as JSON")?;
        shown["recipe"] = json!(entry.recipe);
        pretty(&shown)?
    } else {
        entry_text(&entry, now()?)
    };
    stdout.write_all(text.as_bytes()).context("print the run")?;
    Ok(ExitCode::SUCCESS)
}

fn entry_in(folder: &PathBuf) -> Result<RunEntry> {
    let [run] = &find_runs(std::slice::from_ref(folder))?[..] else { return Err(no_run(folder).into()) };
    let (runs, _) = entries(std::slice::from_ref(run));
    Ok(runs.into_iter().next().filter(|_| run == folder).ok_or_else(|| no_run(folder))?)
}

/// The state of a name that may have `_` or `-` for its blanks.
fn checked_state(stated: &str) -> Result<String, Failure> {
    let plain = stated.to_lowercase().replace(['_', '-'], " ");
    let known: Vec<&str> =
        RunState::ALL.iter().map(|state| state.name()).chain(RunEntry::OTHER_STATES).chain([bucket_runs::STATE]).collect();
    if known.contains(&plain.as_str()) {
        return Ok(plain);
    }
    let failure = Failure::new(FailureKind::Recipe, "there is no such state of a run").at("--state").found(stated);
    let failure = failure.expected(format!("one of {}", known.join(", ")));
    Err(match nearest(&plain, known.into_iter()) {
        Some(meant) => failure.hint(format!("did you mean `{meant}`?")),
        None => failure,
    })
}

/// Those of the usual folders that are there.
fn default_roots() -> Result<Vec<PathBuf>, Failure> {
    let roots: Vec<PathBuf> = DEFAULT_ROOTS.iter().map(PathBuf::from).filter(|root| root.is_dir()).collect();
    if roots.is_empty() {
        return Err(Failure::new(FailureKind::Input, "there are no runs here")
            .expected("a folder runs/ or studies/ in the current folder")
            .hint("name another one with `--root`"));
    }
    Ok(roots)
}

fn no_run(place: &Path) -> Failure {
    Failure::new(FailureKind::Input, "this folder holds no run").at(place.display()).hint("`cloze runs` lists runs")
}

fn pretty(value: &impl serde::Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(value).context("write JSON")? + "\n")
}

fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH).context("read the time of day")?.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_no_run_has_is_refused_with_those_that_there_are() {
        for (stated, state) in [("finished", "finished"), ("not_started", "not started"), ("Not-Started", "not started")] {
            assert_eq!(checked_state(stated).unwrap(), state);
        }
        let failure = checked_state("finish").unwrap_err();
        assert_eq!((failure.kind, failure.hint.as_deref()), (FailureKind::Recipe, Some("did you mean `finished`?")));
        let failure = checked_state("dancing-all-night").unwrap_err();
        let all = "one of starting, training, recovering, regrouping, stopped, finished, failed, interrupted, not started, in a bucket";
        assert_eq!((failure.expected.as_deref(), failure.hint), (Some(all), None));
    }
}
