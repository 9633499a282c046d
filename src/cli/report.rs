//! `cloze report`: what runs came to, beside what a paper says.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use cloze_launcher::report::{ReportFormat, report_folders};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::study::Expected;

use super::expectation::expected_today;

/// Arguments of `cloze report`.
#[derive(Args)]
pub struct ReportArguments {
    /// Run folders, study folders, or both
    #[arg(required = true)]
    pub folders: Vec<PathBuf>,
    /// Folder for report.html, report.md and report.json [default: report/ in a study's folder; nothing is written for runs]
    #[arg(long)]
    pub output: Option<PathBuf>,
    /// Recipe whose `expected:` is compared with, in place of what a study itself expects
    #[arg(long, value_name = "RECIPE")]
    pub expected: Option<PathBuf>,
    /// Profile of that recipe, such as `toy`
    #[arg(long, value_name = "NAME", requires = "expected")]
    pub profile: Option<String>,
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
    let expected = match &arguments.expected {
        Some(recipe) => Some(expected_of(recipe, arguments.profile.as_deref())?),
        None => match arguments.folders.as_slice() {
            [folder] => expected_today(folder)?,
            _ => None,
        },
    };
    let report = report_folders(&arguments.folders, expected)?;
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

fn expected_of(recipe: &Path, profile: Option<&str>) -> Result<Expected> {
    let expected = cloze_recipes::load_study(recipe, &[], profile)?.expected;
    let nothing = || Failure::new(FailureKind::Recipe, "the recipe expects nothing").at(recipe.display()).expected("a section `expected`");
    Ok(expected.ok_or_else(nothing)?)
}

/// Where the report is written: where it was asked for, else into the only study.
fn output_folder(arguments: &ReportArguments) -> Option<PathBuf> {
    match (&arguments.output, arguments.folders.as_slice()) {
        (Some(folder), _) => Some(folder.clone()),
        (None, [folder]) if folder.join("study.json").is_file() => Some(folder.join("report")),
        _ => None,
    }
}
