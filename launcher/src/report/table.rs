//! The table: the paper's rows with ours beside them, then the arms that the paper lacks.

use std::collections::BTreeSet;
use std::path::PathBuf;

use cloze_recipes::study::{Expected, ExpectedColumn, ExpectedOrder, ExpectedRow, Metric, RowSource, Score};
use serde::Serialize;
use serde_json::{Map, Value};

use super::material::{Material, Trial};
use super::verdict::{Cell, Order, OrderRow, Terms, judge, judge_order};
use super::{best_of, score};

/// Longest value in the name of an arm, in characters.
const MAX_VALUE_CHARS: usize = 32;
/// How the keys of an earlier stage begin.
const OF_STAGE: &str = "after.";

/// A table of scores.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ScoreTable {
    /// Its columns.
    pub columns: Vec<Column>,
    /// Its rows.
    pub rows: Vec<Row>,
}

/// A column: one score.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Column {
    /// Its heading.
    pub name: String,
    /// What stands in it; shares in percent.
    pub metric: Metric,
    /// How far our mean may be from the paper's value.
    pub tolerance: Option<f64>,
}

/// A row: an arm over its seeds, or one that is only quoted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Its heading.
    pub name: String,
    /// Keys of the recipe and the values that they have in its trials.
    pub parameters: Map<String, Value>,
    /// Whether the paper has this row.
    pub in_paper: bool,
    /// Whether the paper's row is quoted and none of ours belongs to it.
    pub quoted: bool,
    /// Whether the paper's row is the best of its points, and not all of them together.
    pub is_best_of: bool,
    /// Points of the sweep that belong to the row; more than one where the paper's row leaves keys open.
    pub num_points: usize,
    /// Its trials.
    pub trials: Vec<TrialEntry>,
    /// One for each column.
    pub cells: Vec<Cell>,
}

/// A trial of a row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrialEntry {
    /// Its number among the report's trials.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// Its hash.
    pub hash: String,
    /// Its seed.
    pub seed: Option<u64>,
    /// How far it is, in a word.
    pub state: String,
    /// Why it failed.
    pub failure: Option<String>,
    /// Steps done.
    pub step: u64,
    /// Its run folder.
    pub folder: PathBuf,
    /// Hours of all its workers.
    pub worker_hours: f64,
}

/// Trials that differ in their seed only.
#[derive(Clone, Debug, PartialEq)]
pub struct Arm {
    /// What tells it from the others.
    pub name: String,
    /// Its place in the sweep.
    pub parameters: Vec<(String, Value)>,
    /// Numbers of its trials.
    pub trials: Vec<usize>,
}

/// The arms, in the order of the trials.
pub fn arms(material: &Material) -> Vec<Arm> {
    let mut arms: Vec<Arm> = Vec::new();
    for (index, trial) in material.trials.iter().enumerate() {
        let known = arms
            .iter_mut()
            .find(|arm| !trial.stands_alone && !material.trials[arm.trials[0]].stands_alone && arm.parameters == trial.parameters);
        match known {
            Some(arm) => arm.trials.push(index),
            None => arms.push(Arm { name: arm_name(material, trial), parameters: trial.parameters.clone(), trials: vec![index] }),
        }
    }
    arms
}

/// The columns where no paper says any: what trials are compared by, every task's accuracy, their mean, and the loss.
pub fn own_columns(material: &Material) -> Vec<Column> {
    let mut tasks: Vec<&str> = Vec::new();
    for task in material.trials.iter().filter_map(|trial| trial.run.evaluation.as_ref()).flat_map(|evaluation| &evaluation.tasks) {
        if !tasks.contains(&task.name.as_str()) {
            tasks.push(&task.name);
        }
    }
    let mut metrics: Vec<Metric> = material.metric.iter().cloned().collect();
    metrics.extend(tasks.iter().map(|task| Metric { task: Some((*task).to_owned()), score: Score::Accuracy }));
    if tasks.len() != 1 {
        metrics.push(Metric { task: None, score: Score::Accuracy });
    }
    metrics.push(Metric { task: None, score: Score::Loss });
    let mut columns: Vec<Column> = Vec::new();
    for metric in metrics {
        if columns.iter().all(|column| column.metric != metric) {
            columns.push(Column { name: score::name_of(&metric), metric, tolerance: None });
        }
    }
    columns
}

/// A table of all arms, without a paper.
pub fn own_table(material: &Material, arms: &[Arm]) -> ScoreTable {
    let columns = own_columns(material);
    let rows = arms.iter().map(|arm| own_row(material, arm, &columns, false)).collect();
    ScoreTable { columns, rows }
}

/// The paper's table with ours beside it.
pub fn paper_table(material: &Material, arms: &[Arm], expected: &Expected) -> ScoreTable {
    let columns: Vec<Column> = expected.columns.iter().map(column).collect();
    let rows = expected.rows.iter().map(|wanted| paper_row(material, arms, &columns, (wanted, expected.reference_only)));
    let mut rows: Vec<Row> = rows.collect();
    // The best of several stands above them, and does not take their place.
    let used: BTreeSet<usize> =
        rows.iter().filter(|row| !row.is_best_of).flat_map(|row| row.trials.iter().map(|trial| trial.index)).collect();
    let others = arms.iter().filter(|arm| arm.trials.iter().all(|index| !used.contains(index)));
    rows.extend(others.map(|arm| own_row(material, arm, &columns, expected.reference_only)));
    ScoreTable { columns, rows }
}

fn paper_row(material: &Material, arms: &[Arm], columns: &[Column], (wanted, reference_only): (&ExpectedRow, bool)) -> Row {
    let keys = wanted.ours.values();
    let (quoted, is_best_of) = (wanted.ours == RowSource::Quoted, matches!(wanted.ours, RowSource::BestOf(_)));
    let is_ours = |arm: &&Arm| !quoted && arm.trials.iter().all(|&index| matches(&material.trials[index], keys));
    let ours: Vec<&Arm> = arms.iter().filter(is_ours).collect();
    let trials: Vec<usize> = ours.iter().flat_map(|arm| arm.trials.iter().copied()).collect();
    let values: Vec<Option<f64>> = columns.iter().map(|column| wanted.values.get(&column.name).copied()).collect();
    let paper = Paper { values: &values, reference_only, quoted, candidates: if is_best_of { &ours } else { &[] } };
    Row {
        name: wanted.name.clone(),
        parameters: keys.iter().cloned().collect(),
        in_paper: true,
        quoted,
        is_best_of,
        num_points: ours.len(),
        cells: cells(material, &trials, columns, &paper),
        trials: entries(material, &trials),
    }
}

/// What became of the orders that must come out.
pub fn orders(material: &Material, table: &ScoreTable, wanted: &[ExpectedOrder]) -> Vec<Order> {
    let order = |wanted: &ExpectedOrder| {
        let index = table.columns.iter().position(|column| column.name == wanted.column)?;
        let metric = &table.columns[index].metric;
        let kind = metric.score;
        let has_score = |trial: usize| score::value_of_trial(&material.trials[trial], metric).is_some();
        let values = |name: &String| {
            let row = table.rows.iter().find(|row| row.in_paper && row.name == *name);
            // A best that another trial may still beat decides nothing.
            let row = row.filter(|row| !row.is_best_of || row.trials.iter().all(|trial| has_score(trial.index)));
            row.map_or_else(Vec::new, |row| row.cells[index].values.clone())
        };
        let row = |name: &String| OrderRow { name: name.clone(), values: values(name) };
        let groups: Vec<Vec<OrderRow>> = wanted.groups.iter().map(|rows| rows.iter().map(row).collect()).collect();
        Some(judge_order(&wanted.column, &groups, score::more_is_better(kind), score::decimals(kind)))
    };
    wanted.iter().filter_map(order).collect()
}

fn column(expected: &ExpectedColumn) -> Column {
    Column { name: expected.name.clone(), metric: expected.metric.clone(), tolerance: expected.tolerance }
}

fn own_row(material: &Material, arm: &Arm, columns: &[Column], reference_only: bool) -> Row {
    let values = vec![None; columns.len()];
    Row {
        name: arm.name.clone(),
        parameters: arm.parameters.iter().cloned().collect(),
        in_paper: false,
        quoted: false,
        is_best_of: false,
        num_points: 1,
        cells: cells(material, &arm.trials, columns, &Paper { values: &values, reference_only, quoted: false, candidates: &[] }),
        trials: entries(material, &arm.trials),
    }
}

/// A row of the paper.
struct Paper<'a> {
    values: &'a [Option<f64>],
    reference_only: bool,
    quoted: bool,
    /// The arms of which the row is the best.
    candidates: &'a [&'a Arm],
}

fn cells(material: &Material, trials: &[usize], columns: &[Column], paper: &Paper<'_>) -> Vec<Cell> {
    let absence = if paper.quoted { "quoted; no trial of ours belongs to this row".to_owned() } else { absence(material, trials) };
    let cell = |(column, value): (&Column, &Option<f64>)| {
        let (tolerance, decimals) = (column.tolerance, score::decimals(column.metric.score));
        let reference_only = paper.reference_only;
        let terms = Terms { paper: *value, tolerance, reference_only, absence: &absence, decimals };
        if !paper.candidates.is_empty() {
            return best_of::cell(material, paper.candidates, column, &terms);
        }
        let ours = trials.iter().filter_map(|&index| score::value_of_trial(&material.trials[index], &column.metric)).collect();
        judge(ours, &terms)
    };
    columns.iter().zip(paper.values).map(cell).collect()
}

/// What is the matter where no trial has a value.
fn absence(material: &Material, trials: &[usize]) -> String {
    if trials.is_empty() {
        return "no trial of ours belongs to this row".to_owned();
    }
    let mut states: Vec<(&str, usize)> = Vec::new();
    for state in trials.iter().map(|&index| material.trials[index].state.as_str()) {
        match states.iter_mut().find(|(known, _)| *known == state) {
            Some((_, count)) => *count += 1,
            None => states.push((state, 1)),
        }
    }
    let states: Vec<String> = states.into_iter().map(|(state, count)| format!("{count} {}", state.replace('_', " "))).collect();
    format!("no trial has this score yet: {}", states.join(", "))
}

fn entries(material: &Material, trials: &[usize]) -> Vec<TrialEntry> {
    let entry = |&index: &usize| {
        let trial = &material.trials[index];
        TrialEntry {
            index,
            name: trial.run.name.clone(),
            hash: trial.hash.clone(),
            seed: trial.seed,
            state: trial.state.clone(),
            failure: trial.failure.clone(),
            step: trial.run.view().progress.step,
            folder: trial.run.folder.clone(),
            worker_hours: trial.run.worker_hours(),
        }
    };
    trials.iter().map(entry).collect()
}

/// Whether a trial has these values: as a swept key, or else in its recipe. The keys of an earlier stage are in no recipe but the
/// stage's, so that one counts only where it was swept in the trial: `after.recipe: null` is a trial that leaves the stage out, and not
/// every trial that says nothing of it.
fn matches(trial: &Trial, keys: &[(String, Value)]) -> bool {
    keys.iter().all(|(key, wanted)| {
        let swept = trial.parameters.iter().find(|(swept, _)| swept == key).map(|(_, value)| value);
        if key.starts_with(OF_STAGE) {
            return swept.is_some_and(|found| is_equal(found, wanted));
        }
        let found = swept.or_else(|| trial.run.recipe_value(key)).unwrap_or(&Value::Null);
        is_equal(found, wanted)
    })
}

/// Numbers are compared as such: 0 and 0.0 are the same.
fn is_equal(one: &Value, other: &Value) -> bool {
    match (one.as_f64(), other.as_f64()) {
        (Some(one), Some(other)) => one.total_cmp(&other).is_eq() || (one - other).abs() == 0.0,
        _ => one == other,
    }
}

fn arm_name(material: &Material, trial: &Trial) -> String {
    if trial.stands_alone {
        return trial.run.name.clone();
    }
    if trial.parameters.is_empty() {
        return if material.name.is_empty() { "all seeds".to_owned() } else { material.name.clone() };
    }
    let varying: Vec<&(String, Value)> = trial.parameters.iter().filter(|(key, _)| varies(material, key)).collect();
    let shown = if varying.is_empty() { trial.parameters.iter().collect() } else { varying };
    let names = shown.into_iter().map(|(key, value)| format!("{}={}", short_key(trial, key), value_name(material, key, value)));
    names.collect::<Vec<_>>().join(", ")
}

/// A swept value for people; whole, where shortened it would read like another one of its key.
fn value_name(material: &Material, key: &str, value: &Value) -> String {
    let short = value_text(value);
    let others = material.trials.iter().flat_map(|trial| &trial.parameters).filter(|(other, found)| other == key && found != value);
    if others.into_iter().any(|(_, found)| value_text(found) == short) {
        return value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    }
    short
}

/// Whether trials differ in a swept key.
pub fn varies(material: &Material, key: &str) -> bool {
    let value = |trial: &Trial| trial.parameters.iter().find(|(swept, _)| swept == key).map(|(_, value)| value.clone());
    let mut values = material.trials.iter().filter(|trial| !trial.stands_alone).map(value);
    let first = values.next();
    values.any(|value| Some(&value) != first.as_ref())
}

/// The last part of a key, where no other swept key ends in the same.
fn short_key<'a>(trial: &Trial, key: &'a str) -> &'a str {
    let last = |key: &str| key.rsplit('.').next().map(str::to_owned);
    let is_alone = trial.parameters.iter().filter(|(other, _)| last(other) == last(key)).count() == 1;
    if is_alone { key.rsplit('.').next().unwrap_or(key) } else { key }
}

/// A value for people: text without quotes, of a path only its end, nothing longer than a name may be.
pub fn value_text(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned(),
        other => other.to_string(),
    };
    if text.chars().count() <= MAX_VALUE_CHARS {
        return text;
    }
    text.chars().take(MAX_VALUE_CHARS - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_row_without_a_stage_takes_only_the_trial_that_leaves_it_out() {
        let trial = |key: &str, value: Value| Trial { parameters: vec![(key.to_owned(), value)], ..Trial::default() };
        let (none, three) = (trial("after.recipe", Value::Null), trial("after.data.max_tasks", json!(3)));
        let keys = |key: &str, value: Value| vec![(key.to_owned(), value)];
        let no_stage = keys("after.recipe", Value::Null);
        assert!(matches(&none, &no_stage) && !matches(&three, &no_stage));
        let of_three = keys("after.data.max_tasks", json!(3.0));
        assert!(matches(&three, &of_three) && !matches(&none, &of_three));
        // A key of the run itself that neither the trial nor its recipe has is `null`.
        assert!(matches(&three, &keys("data.max_tasks", Value::Null)));
    }

    #[test]
    fn values_that_would_read_alike_are_shown_whole() {
        let trial = |url: &str| Trial { parameters: vec![("data.url".to_owned(), json!(url))], ..Trial::default() };
        let name = |urls: &[&str]| {
            let material = Material { trials: urls.iter().map(|url| trial(url)).collect(), ..Material::default() };
            arm_name(&material, &material.trials[0])
        };
        assert_eq!(name(&["/a/train", "/b/test", "/a/train"]), "url=train");
        assert_eq!(name(&["/a/train", "/b/train"]), "url=/a/train");
    }
}
