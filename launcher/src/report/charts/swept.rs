//! A score against a swept number, such as the auxiliary ratio or the amount of data.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::super::material::{Material, Trial};
use super::super::score;
use super::super::statistics::Summary;
use super::super::svg::{Axis, HEIGHT, Label, Margins, NUM_COLOURS, Plot, label_space};
use super::super::table::{Column, ScoreTable, value_text, varies};
use super::figure::{Figure, Numbers, drawn, id};

/// Keys that are drawn.
const MAX_KEYS: usize = 4;
/// Columns that are drawn against each key.
const MAX_COLUMNS: usize = 6;
/// Data scale is drawn where the most data is this many times the least.
const MIN_SCALE: f64 = 1.5;
/// Keys that say how much is trained on.
const DATA_KEYS: [&str; 5] = ["train.steps", "train.epochs", "data.wanted_total", "data.cap_per_task", "train.batch_examples"];

/// A point: where, our values there, and the paper's.
#[derive(Clone, Debug, Default, PartialEq)]
struct Point {
    x: f64,
    values: Vec<f64>,
    paper: Option<f64>,
}

/// Points of the trials that differ in the swept number only.
#[derive(Clone, Debug, PartialEq)]
struct Series {
    name: String,
    points: Vec<Point>,
}

/// A figure for every swept number and column.
pub fn figures(material: &Material, table: &ScoreTable) -> Vec<Figure> {
    let keys: Vec<&String> = material.keys.iter().filter(|key| distinct(material, key) > 1).take(MAX_KEYS).collect();
    let columns: Vec<(usize, &Column)> = table.columns.iter().enumerate().take(MAX_COLUMNS).collect();
    let mut figures = Vec::new();
    for key in keys {
        for (index, column) in &columns {
            let section = if DATA_KEYS.contains(&key.as_str()) { "Data scale" } else { "Swept values" };
            let axes = (key.as_str(), *column);
            let series = series(material, table, key, *index);
            figures.extend(draw(section, axes, &series, figures.len()));
        }
    }
    figures
}

/// The first column's score against the examples that were trained on, where arms differ in them.
pub fn data_scale(material: &Material, table: &ScoreTable) -> Option<Figure> {
    let column = table.columns.first()?;
    let examples = |index: usize| material.trials[index].run.view().progress.examples as f64;
    let (rows, left_out) = drawn(table, |row| row.trials.iter().any(|trial| examples(trial.index) > 0.0) && row.cells[0].ours.is_some());
    let series: Vec<Series> = rows
        .iter()
        .map(|(_, row)| {
            let seen: Vec<f64> = row.trials.iter().map(|trial| examples(trial.index)).filter(|seen| *seen > 0.0).collect();
            let x = seen.iter().sum::<f64>() / seen.len().max(1) as f64;
            Series { name: row.name.clone(), points: vec![Point { x, values: row.cells[0].values.clone(), paper: row.cells[0].paper }] }
        })
        .collect();
    let all = || series.iter().flat_map(|series| &series.points).map(|point| point.x);
    let (least, most) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    if most < least * MIN_SCALE {
        return None;
    }
    let mut figure = draw("Data scale", ("examples trained on", column), &series, 1000)?;
    figure.caption.push_str(&left_out);
    Some(figure)
}

/// How many numbers a key has; 0 where some value is none.
fn distinct(material: &Material, key: &str) -> usize {
    let numbers: Option<BTreeSet<u64>> =
        material.trials.iter().filter_map(|trial| value(trial, key)).map(|value| value.as_f64().map(f64::to_bits)).collect();
    numbers.map_or(0, |numbers| numbers.len())
}

fn value<'a>(trial: &'a Trial, key: &str) -> Option<&'a Value> {
    let swept = trial.parameters.iter().find(|(swept, _)| swept == key).map(|(_, value)| value);
    swept.or_else(|| trial.run.recipe_value(key)).filter(|value| !value.is_null())
}

/// The trials by what else is swept. Where nobody shares it, as in a paired sweep, all of them are one series, unless two that differ in
/// more than seeds would become one point.
fn series(material: &Material, table: &ScoreTable, key: &str, column: usize) -> Vec<Series> {
    let by_rest = grouped(material, table, key, column, true);
    if by_rest.iter().any(|series| series.points.len() > 1) {
        return by_rest;
    }
    let as_one = grouped(material, table, key, column, false);
    let is_mixed = as_one.iter().map(|series| series.points.len()).sum::<usize>() < by_rest.len();
    if is_mixed { by_rest } else { as_one }
}

fn grouped(material: &Material, table: &ScoreTable, key: &str, column: usize, by_rest: bool) -> Vec<Series> {
    let mut groups: Vec<(String, BTreeMap<u64, Point>)> = Vec::new();
    let metric = &table.columns[column].metric;
    let varying: Vec<&String> = material.keys.iter().filter(|key| varies(material, key)).collect();
    for row in &table.rows {
        for entry in &row.trials {
            let trial = &material.trials[entry.index];
            let Some(x) = value(trial, key).and_then(Value::as_f64) else { continue };
            let name = if by_rest { rest(&varying, trial, key) } else { String::new() };
            let known = groups.iter().position(|(known, _)| *known == name);
            let index = known.unwrap_or_else(|| {
                groups.push((name, BTreeMap::new()));
                groups.len() - 1
            });
            let point = groups[index].1.entry(x.to_bits()).or_insert_with(|| Point { x, ..Point::default() });
            point.values.extend(score::value_of_trial(trial, metric));
            point.paper = point.paper.or(row.cells[column].paper);
        }
    }
    let series = |(name, points): (String, BTreeMap<u64, Point>)| {
        let mut points: Vec<Point> = points.into_values().filter(|point| !point.values.is_empty() || point.paper.is_some()).collect();
        points.sort_by(|one, other| one.x.total_cmp(&other.x));
        Series { name, points }
    };
    groups.into_iter().map(series).filter(|series| !series.points.is_empty()).collect()
}

/// The other swept values of a trial, as far as trials differ in them.
fn rest(varying: &[&String], trial: &Trial, key: &str) -> String {
    let others = trial.parameters.iter().filter(|(swept, _)| swept != key && varying.contains(&swept));
    others.map(|(key, value)| format!("{}={}", key.rsplit('.').next().unwrap_or(key), value_text(value))).collect::<Vec<_>>().join(", ")
}

/// `None` where there is no more than one point.
fn draw(section: &str, (key, column): (&str, &Column), all: &[Series], number: usize) -> Option<Figure> {
    let shown = &all[..all.len().min(NUM_COLOURS)];
    let points = || shown.iter().flat_map(|series| &series.points);
    if points().filter(|point| !point.values.is_empty()).count() < 2 {
        return None;
    }
    let reach = |point: &Point| {
        let ours =
            Summary::of(&point.values).map(|ours| [ours.mean - ours.deviation.unwrap_or(0.0), ours.mean + ours.deviation.unwrap_or(0.0)]);
        ours.into_iter().flatten().chain(point.paper).collect::<Vec<f64>>()
    };
    let x = Axis::around(key, points().map(|point| point.x));
    let y = Axis::around(&score::axis_name(&column.metric), points().flat_map(reach));
    // A line that is alone needs no name, and the paper's is told by its dashes.
    let right = if shown.len() > 1 { label_space(shown.iter().map(|series| series.name.as_str())) } else { Margins::default().right };
    let mut plot = Plot::new(x, y, Margins { right, ..Margins::default() }, HEIGHT);
    let mut labels = Vec::new();
    for (index, series) in shown.iter().enumerate() {
        labels.extend(draw_series(&mut plot, index, series, column));
    }
    if shown.len() > 1 {
        plot.labels(&labels);
    }
    let title = format!("{} by {key}", column.name);
    let description = format!("{} against {key}, {} points", score::name_of(&column.metric), points().count());
    let hidden = all.len() - shown.len();
    let left_out = if hidden > 0 { format!(" {hidden} more series are not drawn.") } else { String::new() };
    let paper = if points().any(|point| point.paper.is_some()) { " Hollow marks on a dashed line are the paper's." } else { "" };
    Some(Figure {
        section: section.to_owned(),
        svg: plot.finish(&id("swept", number), &title, &description),
        title,
        description,
        caption: format!("Mean over seeds; bars are one sample standard deviation, and missing where there is one seed.{paper}{left_out}"),
        numbers: numbers(all, key, column),
    })
}

/// Line, bars and marks of a series; its label.
fn draw_series(plot: &mut Plot, index: usize, series: &Series, column: &Column) -> Option<Label> {
    let decimals = score::decimals(column.metric.score);
    let paper: Vec<(f64, f64)> = series.points.iter().filter_map(|point| Some((point.x, point.paper?))).collect();
    plot.line(&paper, index, "paper");
    for &point in &paper {
        plot.mark(point, index, "paper", &format!("paper: {:.decimals$} at {}", point.1, point.0));
    }
    let ours: Vec<(f64, Summary)> = series.points.iter().filter_map(|point| Some((point.x, Summary::of(&point.values)?))).collect();
    plot.line(&ours.iter().map(|(x, ours)| (*x, ours.mean)).collect::<Vec<_>>(), index, "mean");
    for (x, ours) in &ours {
        if let Some(deviation) = ours.deviation {
            plot.error_bar(*x, (ours.mean - deviation, ours.mean + deviation), index);
        }
        plot.mark((*x, ours.mean), index, "", &format!("{}: {:.decimals$} at {x}, {} seeds", series.name, ours.mean, ours.count));
    }
    ours.last().map(|(_, ours)| Label { text: series.name.clone(), value: ours.mean, series: index })
}

fn numbers(all: &[Series], key: &str, column: &Column) -> Numbers {
    let decimals = score::decimals(column.metric.score);
    let text = |number: Option<f64>| number.map_or_else(|| "-".to_owned(), |number| format!("{number:.decimals$}"));
    let row = |name: &str, point: &Point| {
        let ours = Summary::of(&point.values);
        vec![
            name.to_owned(),
            point.x.to_string(),
            text(ours.map(|ours| ours.mean)),
            text(ours.and_then(|ours| ours.deviation)),
            point.values.len().to_string(),
            text(point.paper),
        ]
    };
    let header = ["series", key, "mean", "deviation", "seeds", "paper"].into_iter().map(str::to_owned).collect();
    Numbers { header, rows: all.iter().flat_map(|series| series.points.iter().map(|point| row(&series.name, point))).collect() }
}
