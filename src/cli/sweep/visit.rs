//! `cloze sweep visit`: what a controller has done on this host, by one short command through a remote shell.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use cloze_launcher::sweep::folder::StudyFolder;
use cloze_launcher::sweep::visit::{Orders, Start, visit as carry_out};

/// Arguments of `cloze sweep visit`.
#[derive(Args)]
pub struct VisitArguments {
    /// Study folder
    pub folder: PathBuf,
    /// This host, as the controller calls it
    #[arg(long)]
    pub host: String,
    /// What the lock of the study must say [default: nothing is changed, only looked at]
    #[arg(long, required_unless_present = "look")]
    pub controller: Option<String>,
    /// Batch to begin, its place, and the number of places
    #[arg(long = "start", value_name = "BATCH:PLACE:OF", requires = "controller")]
    pub starts: Vec<Start>,
    /// Batch to look at
    #[arg(long = "look", value_name = "BATCH")]
    pub looks: Vec<u32>,
    /// Batch that is to save and leave
    #[arg(long = "stop", value_name = "BATCH", requires = "controller")]
    pub stops: Vec<u32>,
    /// Batch of which nothing may be left
    #[arg(long = "end", value_name = "BATCH", requires = "controller")]
    pub ends: Vec<u32>,
    /// The host was checked before
    #[arg(long)]
    pub checked: bool,
}

/// Does it, and prints the report as one line.
pub(super) fn visit(arguments: &VisitArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let folder = StudyFolder::find(&arguments.folder)?;
    let orders = Orders {
        host: arguments.host.clone(),
        controller: arguments.controller.clone(),
        starts: arguments.starts.clone(),
        looks: arguments.looks.clone(),
        stops: arguments.stops.clone(),
        ends: arguments.ends.clone(),
        is_checked: arguments.checked,
    };
    let program = std::env::current_exe().context("find this program")?;
    let report = carry_out(&folder, program, &orders)?;
    writeln!(stdout, "{}", report.line()?).context("print the report")?;
    Ok(ExitCode::SUCCESS)
}
