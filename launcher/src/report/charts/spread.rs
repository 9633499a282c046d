//! How far the files of a task (its subtasks, or its prompts) lie apart: a strip of dots for each arm.

use std::collections::BTreeMap;

use super::super::material::Material;
use super::super::svg::{Axis, Margins, Plot};
use super::super::table::{Row, ScoreTable};
use super::figure::{Figure, Numbers, drawn, id};

/// Tasks that are drawn.
const MAX_TASKS: usize = 6;
/// Height of one strip with its name.
const STRIP_HEIGHT: f64 = 48.0;
/// Files that stand in the numbers.
const MAX_FILES: usize = 200;
/// Dots lie on this many lines, so that equal values do not hide each other.
const NUM_LINES: usize = 5;

/// A figure for each task with several files.
pub fn figures(material: &Material, table: &ScoreTable) -> Vec<Figure> {
    tasks(material).iter().enumerate().filter_map(|(number, task)| figure(material, table, task, number)).collect()
}

/// The tasks with more than one file, in order.
fn tasks(material: &Material) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for task in material.trials.iter().filter_map(|trial| trial.run.evaluation.as_ref()).flat_map(|evaluation| &evaluation.tasks) {
        if task.files.len() > 1 && !names.contains(&task.name) && names.len() < MAX_TASKS {
            names.push(task.name.clone());
        }
    }
    names
}

fn figure(material: &Material, table: &ScoreTable, task: &str, number: usize) -> Option<Figure> {
    let (rows, left_out) = drawn(table, |row| !files(material, row, task).is_empty());
    let strips: Vec<(usize, &Row, BTreeMap<String, f64>)> =
        rows.into_iter().map(|(series, row)| (series, row, files(material, row, task))).collect();
    if strips.is_empty() {
        return None;
    }
    let count = strips.len() as f64;
    let x = Axis::around("accuracy, %", strips.iter().flat_map(|(_, _, files)| files.values().copied()));
    let margins = Margins { left: 14.0, ..Margins::default() };
    let mut plot = Plot::of_rows(x, count, margins, count * STRIP_HEIGHT + margins.top + margins.bottom);
    for (place, (series, row, files)) in strips.iter().enumerate() {
        let middle = count - place as f64 - 0.7;
        draw_strip(&mut plot, *series, middle, files);
        plot.name_row(count - place as f64 - 0.22, *series, &row.name);
    }
    let title = format!("Spread over the files of {task}");
    let description = format!("A strip of dots for each of {} arms: the accuracy on every file of {task}", strips.len());
    Some(Figure {
        section: "Prompt spread".to_owned(),
        svg: plot.finish(&id("spread", number), &title, &description),
        title,
        description,
        caption: format!("A dot is a file (a subtask, or a prompt), its mean over seeds; the upright stroke is the median.{left_out}"),
        numbers: numbers(&strips),
    })
}

fn draw_strip(plot: &mut Plot, series: usize, middle: f64, files: &BTreeMap<String, f64>) {
    for (place, (file, value)) in files.iter().enumerate() {
        let line = (place % NUM_LINES) as f64 / (NUM_LINES - 1) as f64 - 0.5;
        plot.dot((*value, middle + line * 0.3), series, &format!("{file}: {value:.2}"));
    }
    let median = median(files.values().copied());
    plot.rule((median, middle - 0.28), (median, middle + 0.28), "median");
}

/// Accuracy in percent by file, over the row's seeds.
fn files(material: &Material, row: &Row, task: &str) -> BTreeMap<String, f64> {
    let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for trial in &row.trials {
        let evaluation = material.trials[trial.index].run.evaluation.as_ref();
        let found = evaluation.and_then(|evaluation| evaluation.tasks.iter().find(|found| found.name == task));
        for file in found.into_iter().flat_map(|task| &task.files).filter(|file| file.scores.accuracy.is_finite()) {
            let (sum, count) = sums.entry(file.file.clone()).or_default();
            *sum += file.scores.accuracy * 100.0;
            *count += 1.0;
        }
    }
    sums.into_iter().map(|(file, (sum, count))| (file, sum / count)).collect()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length.is_multiple_of(2) => f64::midpoint(sorted[middle - 1], sorted[middle]),
        _ => sorted[middle],
    }
}

fn numbers(strips: &[(usize, &Row, BTreeMap<String, f64>)]) -> Numbers {
    let header: Vec<String> = ["file".to_owned()].into_iter().chain(strips.iter().map(|(_, row, _)| row.name.clone())).collect();
    let mut names: Vec<&String> = strips.iter().flat_map(|(_, _, files)| files.keys()).collect();
    names.sort();
    names.dedup();
    let text = |value: Option<&f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
    let row = |name: &&String| [(*name).clone()].into_iter().chain(strips.iter().map(|(_, _, files)| text(files.get(*name)))).collect();
    let medians =
        ["median".to_owned()].into_iter().chain(strips.iter().map(|(_, _, files)| format!("{:.2}", median(files.values().copied()))));
    let rows = [medians.collect()].into_iter().chain(names.iter().take(MAX_FILES).map(row)).collect();
    Numbers { header, rows }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Some(median([3.0, 1.0, 2.0].into_iter())), Some(2.0));
        assert_eq!(Some(median([4.0, 1.0].into_iter())), Some(2.5));
        assert!(median([].into_iter()).is_nan());
    }
}
