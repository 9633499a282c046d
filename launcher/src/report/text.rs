//! A report as text: for a terminal, and as Markdown for documents.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use super::score;
use super::study_report::StudyReport;
use super::table::{Column, Row, ScoreTable};
use super::verdict::{Cell, Verdict};
use crate::words::counted;

/// Notes that are shown; the JSON has all of them.
pub const MAX_NOTES: usize = 20;
/// What stands where there is no value.
pub const NO_VALUE: &str = "-";

/// The report for a terminal.
pub fn terminal(report: &StudyReport) -> String {
    let mut text = format!("{}\n", heading(report));
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([String::new()].into_iter().chain(report.table.columns.iter().map(column_heading)));
    for row in &report.table.rows {
        let cells = row.cells.iter().zip(&report.table.columns).map(|(cell, column)| terminal_cell(cell, column));
        table.add_row([row_name(row)].into_iter().chain(cells));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let _ = writeln!(text, "{table}\n{}", legend(report));
    if let Some(line) = unfinished(report) {
        let _ = writeln!(text, "{line}");
    }
    for order in &report.orders {
        let _ = writeln!(text, "\norder in {}: {}", order.column, order.verdict.name());
        for step in &order.steps {
            let _ = writeln!(text, "  {}: {}", step.verdict.name(), step.reason);
        }
    }
    if let Some(remark) = &report.remark {
        let _ = writeln!(text, "\n{remark}");
    }
    for note in shown_notes(report) {
        let _ = writeln!(text, "\nnote: {note}");
    }
    plain(&text)
}

/// The report as Markdown.
pub fn markdown(report: &StudyReport) -> String {
    let mut text = format!("# {}\n\n", escaped(&report.name));
    for line in facts(report) {
        let _ = writeln!(text, "- {}", escaped(&line));
    }
    let _ = write!(text, "\n{}\n{}\n", markdown_table(&report.table), escaped(&legend(report)));
    let verdicts: Vec<String> = report.table.rows.iter().flat_map(|row| reasons(row, &report.table.columns)).collect();
    if !verdicts.is_empty() {
        let _ = write!(text, "\n## Verdicts\n\n{}\n", verdicts.join("\n"));
    }
    if !report.orders.is_empty() {
        text.push_str("\n## Orders\n\n");
        for order in &report.orders {
            let _ = writeln!(text, "- {}: **{}**", escaped(&order.column), order.verdict.name());
            for step in &order.steps {
                let _ = writeln!(text, "  - {}: {}", step.verdict.name(), escaped(&step.reason));
            }
        }
    }
    if let Some(all) = &report.all_scores {
        let _ = write!(text, "\n## All scores\n\n{}", markdown_table(all));
    }
    if let Some(remark) = &report.remark {
        let _ = write!(text, "\n{}\n", escaped(remark));
    }
    let notes: Vec<String> = shown_notes(report).map(|note| format!("- {}", escaped(&note))).collect();
    if !notes.is_empty() {
        let _ = write!(text, "\n## Notes\n\n{}\n", notes.join("\n"));
    }
    text
}

/// What a reader must know of the report, a sentence each.
pub fn facts(report: &StudyReport) -> Vec<String> {
    let mut facts = Vec::new();
    if let Some(source) = &report.source {
        facts.push(format!("Compared with: {source}"));
    }
    if let Some(file) = &report.file {
        let profile = report.profile.as_ref().map_or_else(String::new, |profile| format!(", profile {profile}"));
        facts.push(format!("Recipe: {}{profile}", file.display()));
    }
    if !report.hash.is_empty() {
        facts.push(format!("Hash of the study: {}", report.hash));
    }
    let states: Vec<String> = report.states.iter().map(|(state, count)| format!("{count} {}", state.replace('_', " "))).collect();
    facts.push(format!("Trials: {} ({})", report.num_trials, states.join(", ")));
    let gpus = if report.gpu_hours > 0.0 { format!(", {} GPU-hours", hours(report.gpu_hours)) } else { String::new() };
    let stage_hours = hours(report.stage_worker_hours);
    let stages = match report.num_stages {
        0 => String::new(),
        1 => format!("; {stage_hours} of the worker-hours are of 1 earlier stage, which is no arm"),
        count => format!("; {stage_hours} of the worker-hours are of {count} earlier stages, which are no arms"),
    };
    facts.push(format!("Cost: {} worker-hours{gpus}{stages}", hours(report.worker_hours)));
    facts
}

/// How to read the table.
pub fn legend(report: &StudyReport) -> String {
    let ours = "Ours: mean ± sample standard deviation over seeds (number of seeds); accuracy and F1 in percent.";
    if report.source.is_none() {
        return ours.to_owned();
    }
    let single = report.table.rows.iter().flat_map(|row| &row.cells).any(|cell| cell.ours.is_some_and(|ours| ours.count == 1));
    let single = if single { " Where there is one seed, nothing is known of the spread." } else { "" };
    format!("{ours} Verdicts compare our mean with the paper's value and the column's tolerance.{single}")
}

/// How many trials have failed or have not ended, and the command that says which; `None` where all have ended well. One that early
/// stopping has left behind is where it should be.
pub fn unfinished(report: &StudyReport) -> Option<String> {
    let count = |names: &[&str]| report.states.iter().filter(|(state, _)| names.contains(&state.as_str())).map(|(_, count)| count).sum();
    let failed: usize = count(&["failed"]);
    let open = report.num_trials.saturating_sub(failed + count(&["done", "finished", "stopped_early"]));
    let what = match (failed, open) {
        (0, 0) => return None,
        (0, open) => format!("{open} not finished"),
        (failed, 0) => format!("{failed} failed"),
        (failed, open) => format!("{failed} failed, {open} not finished"),
    };
    let commands: Vec<String> = report.studies.iter().map(|folder| format!("`cloze sweep status {}`", folder.display())).collect();
    let commands = if commands.is_empty() { "`cloze status RUN`".to_owned() } else { commands.join(", ") };
    Some(format!("Of {}: {what}; {commands} shows them.", counted(report.num_trials, "trial")))
}

/// The first notes, and how many there are more.
pub fn shown_notes(report: &StudyReport) -> impl Iterator<Item = String> {
    let hidden = report.notes.len().saturating_sub(MAX_NOTES);
    let more = (hidden > 0).then(|| format!("and {hidden} more notes, which report.json has"));
    report.notes.iter().take(MAX_NOTES).cloned().chain(more)
}

/// Heading of a row, with what is particular about it.
pub fn row_name(row: &Row) -> String {
    match (row.quoted, row.num_points) {
        (true, _) => format!("{} (quoted)", row.name),
        (false, points) if row.is_best_of => format!("{} (of {points} points)", row.name),
        (false, points) if points > 1 => format!("{} ({points} points)", row.name),
        _ => row.name.clone(),
    }
}

/// Our value: mean, deviation and number of seeds.
pub fn ours_text(cell: &Cell, column: &Column) -> String {
    let decimals = score::decimals(column.metric.score);
    let Some(ours) = cell.ours else { return NO_VALUE.to_owned() };
    let deviation = ours.deviation.map_or_else(String::new, |deviation| format!(" ± {deviation:.decimals$}"));
    format!("{:.decimals$}{deviation} ({})", ours.mean, ours.count)
}

/// The interval of 95 % confidence.
pub fn interval_text(cell: &Cell, column: &Column) -> String {
    let decimals = score::decimals(column.metric.score);
    let interval = cell.ours.and_then(|ours| ours.interval());
    interval.map_or_else(|| NO_VALUE.to_owned(), |(low, high)| format!("{low:.decimals$} to {high:.decimals$}"))
}

/// A number of a column, with a sign where it is a difference.
pub fn number_text(number: Option<f64>, column: &Column, is_difference: bool) -> String {
    let decimals = score::decimals(column.metric.score);
    match number {
        None => NO_VALUE.to_owned(),
        Some(number) if is_difference => format!("{number:+.decimals$}"),
        Some(number) => format!("{number:.decimals$}"),
    }
}

/// Hours with two digits that count.
pub fn hours(hours: f64) -> String {
    if hours >= 10.0 { format!("{hours:.0}") } else { format!("{hours:.2}") }
}

/// Whether the paper has anything in a table.
pub fn has_paper(table: &ScoreTable) -> bool {
    table.rows.iter().any(|row| row.in_paper)
}

fn heading(report: &StudyReport) -> String {
    let source = report.source.as_ref().map_or_else(String::new, |source| format!(", beside {source}"));
    let profile = report.profile.as_ref().map_or_else(String::new, |profile| format!(", profile {profile}"));
    format!("{}{profile}{source}: {}", report.name, counted(report.num_trials, "trial"))
}

fn column_heading(column: &Column) -> String {
    match column.tolerance {
        Some(tolerance) => format!("{} (± {tolerance})", column.name),
        None => column.name.clone(),
    }
}

/// Ours, and below it the paper's value with difference and verdict.
fn terminal_cell(cell: &Cell, column: &Column) -> String {
    let ours = ours_text(cell, column);
    if cell.paper.is_none() {
        return ours;
    }
    let mut second = format!("paper {}", number_text(cell.paper, column, false));
    if cell.delta.is_some() {
        let _ = write!(second, ", {}", number_text(cell.delta, column, true));
    }
    if cell.verdict != Verdict::NoVerdict {
        let _ = write!(second, " {}", cell.verdict.name());
    }
    let chosen = cell.chosen.as_ref().map_or_else(String::new, |arm| format!("\nof {arm}"));
    format!("{ours}\n{second}{chosen}")
}

fn markdown_table(scores: &ScoreTable) -> String {
    let with_paper = has_paper(scores);
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let mut header = vec![String::new()];
    for column in &scores.columns {
        let name = escaped(&column.name);
        if with_paper {
            header.extend([
                format!("{name}, paper"),
                format!("{name}, ours"),
                "95 % interval".to_owned(),
                "delta".to_owned(),
                "verdict".to_owned(),
            ]);
        } else {
            header.push(name);
        }
    }
    table.set_header(header);
    for row in &scores.rows {
        let mut cells = vec![escaped(&row_name(row))];
        for (cell, column) in row.cells.iter().zip(&scores.columns) {
            let ours = ours_text(cell, column);
            if with_paper {
                let [paper, delta] = [number_text(cell.paper, column, false), number_text(cell.delta, column, true)];
                cells.extend([paper, ours, interval_text(cell, column), delta, cell.verdict.name().to_owned()]);
            } else {
                cells.push(ours);
            }
        }
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{table}\n")
}

/// Why the paper's row got its verdicts, as a list.
fn reasons(row: &Row, columns: &[Column]) -> Vec<String> {
    if !row.in_paper || row.quoted {
        return Vec::new();
    }
    let judged = row.cells.iter().zip(columns).filter(|(cell, _)| cell.paper.is_some());
    judged
        .map(|(cell, column)| {
            let (row, column) = (escaped(&row.name), escaped(&column.name));
            format!("- {row}, {column}: **{}**: {}", cell.verdict.name(), escaped(&full_reason(cell)))
        })
        .collect()
}

/// Why a cell got its verdict, and whose value it is.
pub fn full_reason(cell: &Cell) -> String {
    match &cell.chosen {
        None => cell.reason.clone(),
        Some(arm) => format!("{arm}: {}", cell.reason),
    }
}

/// Text that Markdown shows as it is.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in plain(text).chars() {
        match character {
            '\n' => safe.push(' '),
            '|' | '*' | '`' | '<' | '[' | '\\' => safe.extend(['\\', character]),
            other => safe.push(other),
        }
    }
    safe
}

/// Without control characters other than line ends: a name may hold anything, and a terminal would obey it.
fn plain(text: &str) -> String {
    text.chars().map(|character| if character.is_control() && character != '\n' { ' ' } else { character }).collect()
}
