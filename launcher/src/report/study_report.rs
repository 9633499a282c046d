//! The report of a study, or of single runs: put together once, shown in four forms.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cloze_recipes::study::Expected;
use serde::Serialize;

use super::charts::{self, Figure};
use super::material::Material;
use super::table::{self, ScoreTable};
use super::verdict::Order;
use super::{page, text};
use crate::run_folder::{READABLE, storage, write_whole};

/// Version of the JSON.
const FORMAT_VERSION: u32 = 1;

/// A form of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReportFormat {
    /// For a terminal.
    Table,
    /// For documents.
    Markdown,
    /// For programs.
    Json,
    /// One page for a browser, which needs nothing else.
    Html,
}

/// A report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StudyReport {
    /// Version of this form.
    pub format_version: u32,
    /// Name of the study, or of the runs.
    pub name: String,
    /// The recipe file.
    pub file: Option<PathBuf>,
    /// Its profile.
    pub profile: Option<String>,
    /// Hash of the study; empty for single runs.
    pub hash: String,
    /// Unix time at which the study was made, in seconds.
    pub created: Option<f64>,
    /// The study folders, as they were named; none for single runs.
    #[serde(skip)]
    pub studies: Vec<PathBuf>,
    /// Paper and table that ours are compared with.
    pub source: Option<String>,
    /// Number of trials.
    pub num_trials: usize,
    /// How many trials are in each state.
    pub states: Vec<(String, usize)>,
    /// Number of their earlier stages.
    pub num_stages: usize,
    /// Hours of all workers of all trials and stages.
    pub worker_hours: f64,
    /// What of it the stages took.
    pub stage_worker_hours: f64,
    /// The same of GPUs.
    pub gpu_hours: f64,
    /// The paper's table with ours beside it; without a paper, all arms and all scores.
    pub table: ScoreTable,
    /// What became of the orders that must come out.
    pub orders: Vec<Order>,
    /// All arms and all scores, where `table` has the paper's columns only.
    pub all_scores: Option<ScoreTable>,
    /// What the paper's section of the recipe remarks.
    pub remark: Option<String>,
    /// What could not be read, or must be known of the numbers.
    pub notes: Vec<String>,
    /// Plots with their numbers.
    pub figures: Vec<Figure>,
}

/// Reports on a study folder. Fails with kind `Input` where there is none.
pub fn report_study(folder: &Path) -> anyhow::Result<StudyReport> {
    report_folders(&[folder.to_path_buf()], None)
}

/// Reports on run folders and study folders together; `expected` takes the place of what a study expects. Fails with kind `Input` on a
/// folder that is neither.
pub fn report_folders(folders: &[PathBuf], expected: Option<Expected>) -> anyhow::Result<StudyReport> {
    let mut material = Material::read(folders)?;
    if let Some(expected) = expected {
        // Single runs have no swept keys: what tells the paper's rows apart stands in for them.
        if material.keys.is_empty() {
            let keys: std::collections::BTreeSet<&String> =
                expected.rows.iter().flat_map(|row| row.ours.values()).map(|(key, _)| key).collect();
            material.keys = keys.into_iter().cloned().collect();
        }
        material.expected = Some(expected);
    }
    Ok(StudyReport::of(material))
}

impl StudyReport {
    /// Puts a report together.
    pub(super) fn of(mut material: Material) -> Self {
        let arms = table::arms(&material);
        let expected = material.expected.take();
        let own = table::own_table(&material, &arms);
        let (table, all_scores) = match &expected {
            Some(expected) => (table::paper_table(&material, &arms, expected), Some(own)),
            None => (own, None),
        };
        let orders = expected.as_ref().map_or_else(Vec::new, |expected| table::orders(&material, &table, &expected.orders));
        let figures = charts::figures(&material, &table);
        let mut notes = std::mem::take(&mut material.notes);
        notes.extend(sampling_note(&material));
        notes.extend(charts::left_out(&material));
        let all = || material.trials.iter().chain(&material.stages);
        Self {
            format_version: FORMAT_VERSION,
            num_trials: material.trials.len(),
            states: states(&material),
            num_stages: material.stages.len(),
            worker_hours: all().map(|trial| trial.run.worker_hours()).sum(),
            stage_worker_hours: material.stages.iter().map(|stage| stage.run.worker_hours()).sum(),
            gpu_hours: all().map(|trial| trial.run.gpu_hours()).sum(),
            name: material.name,
            file: material.file,
            profile: material.profile,
            hash: material.hash,
            created: material.created,
            studies: material.studies,
            source: expected.as_ref().map(|expected| expected.source.clone()),
            remark: expected.and_then(|expected| expected.note),
            table,
            orders,
            all_scores,
            notes,
            figures,
        }
    }

    /// The report for a terminal.
    pub fn table(&self) -> String {
        text::terminal(self)
    }

    /// The report for documents.
    pub fn markdown(&self) -> String {
        text::markdown(self)
    }

    /// The report for programs.
    pub fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self).context("write the report as JSON")? + "\n")
    }

    /// The report as one page.
    pub fn html(&self) -> String {
        page::html(self)
    }

    /// The report in some form.
    pub fn render(&self, format: ReportFormat) -> anyhow::Result<String> {
        match format {
            ReportFormat::Table => Ok(self.table()),
            ReportFormat::Markdown => Ok(self.markdown()),
            ReportFormat::Json => self.json(),
            ReportFormat::Html => Ok(self.html()),
        }
    }

    /// Writes `report.html`, `report.md` and `report.json` into a folder, which is made. Fails with kind `Storage`.
    pub fn write_all(&self, folder: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(folder).map_err(|error| storage("make the report's folder", folder, &error))?;
        let files = [("report.json", ReportFormat::Json), ("report.md", ReportFormat::Markdown), ("report.html", ReportFormat::Html)];
        for (name, format) in files {
            write_whole(&folder.join(name), self.render(format)?.as_bytes(), READABLE)?;
        }
        Ok(())
    }
}

fn states(material: &Material) -> Vec<(String, usize)> {
    let mut states: Vec<(String, usize)> = Vec::new();
    for trial in &material.trials {
        match states.iter_mut().find(|(known, _)| *known == trial.state) {
            Some((_, count)) => *count += 1,
            None => states.push((trial.state.clone(), 1)),
        }
    }
    states
}

fn sampling_note(material: &Material) -> Option<String> {
    let sampled = material.trials.iter().chain(&material.stages).filter(|trial| trial.run.events.left_out_bytes > 0).count();
    (sampled > 0).then(|| {
        format!(
            "event logs too long to be read whole: {sampled}. Their curves are made of evenly spread parts, and their cost counts pauses \
             between two controllers as work"
        )
    })
}
