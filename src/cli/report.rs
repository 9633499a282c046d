//! `cloze report`: what runs came to, beside what a paper says.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use cloze_launcher::report::{ReportFormat, report_folders};

/// Arguments of `cloze report`.
#[derive(Args)]
pub struct ReportArguments {
    /// Run folders, study folders, or both
    #[arg(required = true)]
    pub folders: Vec<PathBuf>,
    /// Folder for report.html, report.md and report.json [default: report/ in a study's folder; nothing is written for runs]
    #[arg(long)]
    pub output: Option<PathBuf>,
    /// What is printed
    #[arg(long, value_enum, default_value_t = FormatName::Table)]
    pub format: FormatName,
}

/// Names of a report's forms.
#[derive(Clone, Copy, ValueEnum)]
pub enum FormatName {
    /// A table for this terminal.
    Table,
    /// Markdown, for documents.
    Markdown,
    /// JSON, for programs.
    Json,
    /// One HTML page that needs nothing else.
    Html,
}

/// Prints a report, and writes it where a folder is known.
pub fn report(arguments: &ReportArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let report = report_folders(&arguments.folders, None)?;
    if let Some(folder) = output_folder(arguments) {
        report.write_all(&folder)?;
        writeln!(std::io::stderr(), "written to {}", folder.display()).context("say where the report is")?;
    }
    let format = match arguments.format {
        FormatName::Table => ReportFormat::Table,
        FormatName::Markdown => ReportFormat::Markdown,
        FormatName::Json => ReportFormat::Json,
        FormatName::Html => ReportFormat::Html,
    };
    stdout.write_all(report.render(format)?.as_bytes()).context("print the report")?;
    Ok(ExitCode::SUCCESS)
}

/// Where the report is written: where it was asked for, else into the only study.
fn output_folder(arguments: &ReportArguments) -> Option<PathBuf> {
    match (&arguments.output, arguments.folders.as_slice()) {
        (Some(folder), _) => Some(folder.clone()),
        (None, [folder]) if folder.join("study.json").is_file() => Some(folder.join("report")),
        _ => None,
    }
}
