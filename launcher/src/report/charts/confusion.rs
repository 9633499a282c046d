//! Which labels are taken for which: a matrix for each task and arm, all seeds together.

use std::fmt::Write as _;

use super::super::material::Material;
use super::super::svg::{WIDTH, escaped, fitted, picture};
use super::super::table::{Row, ScoreTable};
use super::figure::{Figure, Numbers, id};

/// Labels of a matrix that can be read.
const MAX_LABELS: usize = 16;
/// Matrices of a report.
const MAX_MATRICES: usize = 24;
/// Arms that each task has a matrix of.
const MAX_ARMS: usize = 4;
/// Space for the names of the right labels.
const LEFT: f64 = 100.0;
/// Space for the names of the predicted labels.
const TOP: f64 = 44.0;
/// Largest side of a cell.
const MAX_CELL: f64 = 64.0;
/// A cell that holds its whole row is this dark, and its number can still be read.
const MAX_OPACITY: f64 = 0.55;

/// A figure for each task and arm.
pub fn figures(material: &Material, table: &ScoreTable) -> Vec<Figure> {
    let mut figures = Vec::new();
    for (task, labels) in tasks(material) {
        let counted = table.rows.iter().filter_map(|row| Some((row, counts(material, row, &task, &labels)?)));
        for (row, counts) in counted.take(MAX_ARMS) {
            if figures.len() < MAX_MATRICES {
                figures.push(figure(&task, &labels, row, &counts, figures.len()));
            }
        }
    }
    figures
}

/// The tasks that have no figure because they have too many labels; `None` where there are none.
pub fn left_out(material: &Material) -> Option<String> {
    let large = tasks_of(material, |num_labels| num_labels > MAX_LABELS);
    let names: Vec<String> = large.iter().map(|(name, labels)| format!("{name} ({} labels)", labels.len())).collect();
    let why = format!("no confusion matrix, since one of more than {MAX_LABELS} labels cannot be read");
    (!names.is_empty()).then(|| format!("{why}: {}", names.join(", ")))
}

fn tasks(material: &Material) -> Vec<(String, Vec<String>)> {
    tasks_of(material, |num_labels| (2..=MAX_LABELS).contains(&num_labels))
}

/// The tasks with so many labels, each once.
fn tasks_of(material: &Material, fits: impl Fn(usize) -> bool) -> Vec<(String, Vec<String>)> {
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    for task in material.trials.iter().filter_map(|trial| trial.run.evaluation.as_ref()).flat_map(|evaluation| &evaluation.tasks) {
        if fits(task.labels.len()) && found.iter().all(|(name, _)| *name != task.name) {
            found.push((task.name.clone(), task.labels.clone()));
        }
    }
    found
}

/// The sum over the row's trials; `None` where none of them has a matrix of these labels.
fn counts(material: &Material, row: &Row, task: &str, labels: &[String]) -> Option<Vec<Vec<u64>>> {
    let size = labels.len();
    let mut sum = vec![vec![0_u64; size]; size];
    let mut any = false;
    for trial in &row.trials {
        let evaluation = material.trials[trial.index].run.evaluation.as_ref();
        let found = evaluation.and_then(|evaluation| evaluation.tasks.iter().find(|found| found.name == task && found.labels == labels));
        let matrix = found.map(|task| &task.scores.confusion);
        let Some(matrix) = matrix.filter(|matrix| matrix.len() == size && matrix.iter().all(|row| row.len() == size)) else { continue };
        any = true;
        for (into, from) in sum.iter_mut().flatten().zip(matrix.iter().flatten()) {
            *into = into.saturating_add(*from);
        }
    }
    any.then_some(sum)
}

/// A file may claim any counts; a sum that is too large is the largest.
fn sum<'a>(counts: impl IntoIterator<Item = &'a u64>) -> u64 {
    counts.into_iter().fold(0, |sum, count| sum.saturating_add(*count))
}

fn figure(task: &str, labels: &[String], row: &Row, counts: &[Vec<u64>], number: usize) -> Figure {
    let cell = ((WIDTH - LEFT - 10.0) / labels.len() as f64).min(MAX_CELL);
    let mut body = format!(
        "<text class=\"start\" x=\"{LEFT}\" y=\"16\">predicted</text><text class=\"end\" x=\"{:.1}\" y=\"16\">right</text>\n",
        LEFT - 8.0
    );
    for (place, label) in labels.iter().enumerate() {
        let middle = LEFT + (place as f64 + 0.5) * cell;
        let _ = writeln!(body, "<text class=\"middle\" x=\"{middle:.1}\" y=\"{:.1}\">{}</text>", TOP - 8.0, escaped(&fitted(label, cell)));
        let y = TOP + (place as f64 + 0.5) * cell + 4.0;
        let _ = writeln!(body, "<text class=\"end\" x=\"{:.1}\" y=\"{y:.1}\">{}</text>", LEFT - 8.0, escaped(&fitted(label, LEFT - 12.0)));
    }
    for (y, line) in counts.iter().enumerate() {
        let total = sum(line);
        for (x, &count) in line.iter().enumerate() {
            let (left, top) = (LEFT + x as f64 * cell, TOP + y as f64 * cell);
            let opacity = if total == 0 { 0.0 } else { count as f64 / total as f64 * MAX_OPACITY };
            let class = if x == y { "cell right" } else { "cell" };
            let title = format!("{} taken for {}: {count} of {total}", labels[y], labels[x]);
            let _ = writeln!(
                body,
                "<rect class=\"{class} c0\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{cell:.1}\" height=\"{cell:.1}\" fill-opacity=\"{opacity:.3}\">\
                 <title>{}</title></rect><text class=\"middle count\" x=\"{:.1}\" y=\"{:.1}\">{count}</text>",
                escaped(&title),
                left + cell / 2.0,
                top + cell / 2.0 + 4.0
            );
        }
    }
    let title = format!("{task}: {}", row.name);
    let right = (0..labels.len()).fold(0, |sum: u64, label| sum.saturating_add(counts[label][label]));
    let all = sum(counts.iter().flatten());
    let description = format!("Confusion matrix of {} labels; {right} of {all} answers are right", labels.len());
    let header = ["right \\ predicted".to_owned()].into_iter().chain(labels.iter().cloned()).collect();
    let rows = labels
        .iter()
        .zip(counts)
        .map(|(label, line)| [label.clone()].into_iter().chain(line.iter().map(u64::to_string)).collect())
        .collect();
    Figure {
        section: "Confusion".to_owned(),
        svg: picture(&id("confusion", number), (&title, &description), TOP + cell * labels.len() as f64 + 8.0, &body),
        title,
        description,
        caption: "Rows by right label, columns by predicted label, all seeds together; a cell is as dark as its share of its row."
            .to_owned(),
        numbers: Numbers { header, rows },
    }
}
