//! `cloze checkpoints`: look at, verify, compare, delete and export checkpoints. `cloze-worker` does it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::worker_process;

/// What to do with checkpoints.
#[derive(Subcommand)]
pub enum CheckpointsCommand {
    /// List the checkpoints of a run
    Ls(ListArguments),
    /// Read every file and compare it with what was saved; exit code 7 where something is damaged
    Verify(VerifyArguments),
    /// Say which tensors of two checkpoints differ, and by how much
    Diff(DiffArguments),
    /// Delete checkpoints that are no longer needed
    Prune(PruneArguments),
    /// Write a checkpoint as a Hugging Face model folder
    Export(ExportStepArguments),
}

/// Settings of an object store.
#[derive(Args)]
pub struct StoreArguments {
    /// Option of the object store, as in a recipe's `checkpoint.options`; may be repeated
    #[arg(long = "option", value_name = "KEY=VALUE")]
    pub options: Vec<String>,
}

/// Arguments of `cloze checkpoints ls`.
#[derive(Args)]
pub struct ListArguments {
    /// Run folder, or path or url of checkpoints
    pub target: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The object store.
    #[command(flatten)]
    pub store: StoreArguments,
}

/// Arguments of `cloze checkpoints verify`.
#[derive(Args)]
pub struct VerifyArguments {
    /// Run folder, or path or url of checkpoints; `@STEP` behind it means one of them
    pub target: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The object store.
    #[command(flatten)]
    pub store: StoreArguments,
}

/// Arguments of `cloze checkpoints diff`.
#[derive(Args)]
pub struct DiffArguments {
    /// Run folder, or path or url of checkpoints; `@STEP` behind it means that one, otherwise the newest good one
    pub first: String,
    /// The other one, named in the same way
    pub second: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The object store.
    #[command(flatten)]
    pub store: StoreArguments,
}

/// Arguments of `cloze checkpoints prune`.
#[derive(Args)]
pub struct PruneArguments {
    /// Run folder, whose recipe says what is kept, or path or url of checkpoints
    pub target: String,
    /// Keep this many newest good checkpoints, never fewer than two
    #[arg(long, value_name = "COUNT")]
    pub keep_last: Option<u32>,
    /// Keep this many checkpoints with the lowest training loss as well
    #[arg(long, value_name = "COUNT")]
    pub keep_best: Option<u32>,
    /// Keep every checkpoint of a step that is a multiple of this
    #[arg(long, value_name = "STEPS")]
    pub keep_every_steps: Option<u64>,
    /// Only say what would be deleted
    #[arg(long)]
    pub dry_run: bool,
    /// The object store.
    #[command(flatten)]
    pub store: StoreArguments,
}

/// Arguments of `cloze checkpoints export`.
#[derive(Args)]
pub struct ExportStepArguments {
    /// Run folder, or path or url of checkpoints; `@STEP` behind it means that one, otherwise the newest good one
    pub target: String,
    /// Folder to write; must not exist
    #[arg(long)]
    pub output: PathBuf,
    /// The object store.
    #[command(flatten)]
    pub store: StoreArguments,
}

/// `cloze checkpoints`
pub fn checkpoints(command: &CheckpointsCommand) -> Result<ExitCode> {
    worker_process::run(worker_arguments(command))
}

/// The same command for the worker's command line.
fn worker_arguments(command: &CheckpointsCommand) -> Vec<OsString> {
    let (name, mut words, store): (&str, Vec<OsString>, &StoreArguments) = match command {
        CheckpointsCommand::Ls(a) => ("ls", [vec![(&a.target).into()], flag("--json", a.json)].concat(), &a.store),
        CheckpointsCommand::Verify(a) => ("verify", [vec![(&a.target).into()], flag("--json", a.json)].concat(), &a.store),
        CheckpointsCommand::Diff(a) => ("diff", [vec![(&a.first).into(), (&a.second).into()], flag("--json", a.json)].concat(), &a.store),
        CheckpointsCommand::Prune(a) => ("prune", prune_words(a), &a.store),
        CheckpointsCommand::Export(a) => ("export", vec![(&a.target).into(), "--output".into(), (&a.output).into()], &a.store),
    };
    words.extend(store.options.iter().flat_map(|option| [OsString::from("--option"), option.into()]));
    ["checkpoints", name].into_iter().map(OsString::from).chain(words).collect()
}

fn prune_words(arguments: &PruneArguments) -> Vec<OsString> {
    let numbers = [
        ("--keep-last", arguments.keep_last.map(u64::from)),
        ("--keep-best", arguments.keep_best.map(u64::from)),
        ("--keep-every-steps", arguments.keep_every_steps),
    ];
    let mut words = vec![OsString::from(&arguments.target)];
    for (name, number) in numbers {
        words.extend(number.into_iter().flat_map(|number| [OsString::from(name), number.to_string().into()]));
    }
    words.extend(flag("--dry-run", arguments.dry_run));
    words
}

fn flag(name: &str, is_set: bool) -> Vec<OsString> {
    if is_set { vec![name.into()] } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        command: CheckpointsCommand,
    }

    #[test]
    fn every_argument_reaches_the_worker() {
        let lines = [
            "checkpoints ls runs/a",
            "checkpoints ls s3://bucket/a --json --option region=x --option endpoint=https://e",
            "checkpoints verify runs/a@70 --json --option region=x",
            "checkpoints diff runs/a@7 runs/b --json --option region=x",
            "checkpoints prune runs/a --keep-last 3 --keep-best 1 --keep-every-steps 100 --dry-run --option region=x",
            "checkpoints prune runs/a",
            "checkpoints export runs/a@7 --output model --option region=x",
        ];
        for line in lines {
            let parsed = Line::try_parse_from(line.split(' ')).unwrap();
            let words = worker_arguments(&parsed.command).join(OsStr::new(" "));
            assert_eq!(words.to_str(), Some(line));
        }
    }
}
