//! What two runs differ in: their recipes key by key, and what came out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cloze_recipes::failure::{Failure, FailureKind};
use serde::Serialize;
use serde_json::Value;

use super::record::RunRecord;
use crate::report::event_sample::Sampling;
use crate::report::loaded_run::LoadedRun;

/// Of an event log its first and its last bytes are read.
const SAMPLING: Sampling = Sampling { max_bytes: 96 << 10, num_blocks: 2 };
/// Percent of a whole.
const PERCENT: f64 = 100.0;

/// What two runs differ in.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The first run.
    pub first: String,
    /// The second run.
    pub second: String,
    /// Keys of the recipe that differ, by name.
    pub recipe: Vec<KeyDifference>,
    /// Numbers that came out, equal ones too.
    pub metrics: Vec<MetricDifference>,
}

/// A key of the recipe; null is a key that one of them lacks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KeyDifference {
    /// The key, such as `train.steps`.
    pub key: String,
    /// Its value in the first.
    pub first: Value,
    /// Its value in the second.
    pub second: Value,
}

/// A number that came out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MetricDifference {
    /// Its name; shares in percent.
    pub name: String,
    /// The first's.
    pub first: Option<f64>,
    /// The second's.
    pub second: Option<f64>,
    /// The second less the first.
    pub delta: Option<f64>,
}

/// Compares two runs, or recipe files.
pub fn compare(first: Side, second: Side) -> Difference {
    Difference {
        recipe: recipe_differences(&first.recipe, &second.recipe),
        metrics: metric_differences(&first.metrics, &second.metrics),
        first: first.name,
        second: second.name,
    }
}

/// Every value of a recipe that is neither map nor list, by its key; keys without a value are left out.
pub fn flattened(recipe: &Value) -> BTreeMap<String, Value> {
    let mut flat = BTreeMap::new();
    flatten(recipe, String::new(), &mut flat);
    flat
}

fn flatten(value: &Value, key: String, flat: &mut BTreeMap<String, Value>) {
    let below = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        Value::Object(map) if !map.is_empty() => map.iter().for_each(|(name, value)| flatten(value, below(name), flat)),
        Value::Array(items) if items.iter().any(|item| item.is_object() || item.is_array()) => {
            items.iter().enumerate().for_each(|(index, value)| flatten(value, below(&index.to_string()), flat));
        }
        Value::Null => {}
        // A list of plain values reads better as one.
        other => drop(flat.insert(key, other.clone())),
    }
}

/// A run, or a recipe file, which has no numbers.
#[derive(Clone, Debug)]
pub struct Side {
    name: String,
    recipe: BTreeMap<String, Value>,
    metrics: Vec<(String, f64)>,
}

impl Side {
    /// A run whose record lies in a bucket.
    pub fn of_record(url: &str, record: RunRecord) -> Self {
        Self { name: url.to_owned(), recipe: record.recipe, metrics: record.numbers }
    }

    /// Reads a run folder or a recipe file. Fails with kind `Input` on a folder that holds no run, and as [`cloze_recipes::load`] on a
    /// recipe file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        if path.is_file() {
            let recipe = serde_json::to_value(cloze_recipes::load(path, &[])?)?;
            return Ok(Self { name, recipe: flattened(&recipe), metrics: Vec::new() });
        }
        let recipe = path.join("recipe.yaml");
        if !recipe.is_file() {
            let failure = Failure::new(FailureKind::Input, "this folder holds no run").at(path.display());
            return Err(failure.expected("recipe.yaml in it").hint("`cloze runs` lists runs").into());
        }
        let recipe = flattened(&cloze_recipes::read_rendered(&recipe)?);
        Ok(Self { name, recipe, metrics: numbers_of(&LoadedRun::read(path, SAMPLING)) })
    }
}

/// What came out of a run, by name; shares in percent.
pub(super) fn numbers_of(run: &LoadedRun) -> Vec<(String, f64)> {
    let mut metrics = Vec::new();
    if let Some(evaluation) = &run.evaluation {
        for task in &evaluation.tasks {
            metrics.push((format!("{} accuracy", task.name), task.scores.accuracy * PERCENT));
            metrics.push((format!("{} macro-F1", task.name), task.scores.macro_f1 * PERCENT));
        }
        metrics.push(("mean accuracy".to_owned(), evaluation.mean_accuracy * PERCENT));
        metrics.push(("mean macro-F1".to_owned(), evaluation.mean_macro_f1 * PERCENT));
    }
    let progress = &run.view().progress;
    metrics.extend(progress.loss.map(|loss| ("loss".to_owned(), loss)));
    metrics.push(("step".to_owned(), progress.step as f64));
    metrics.push(("worker-hours".to_owned(), run.worker_hours()));
    metrics
}

fn recipe_differences(one: &BTreeMap<String, Value>, other: &BTreeMap<String, Value>) -> Vec<KeyDifference> {
    let keys: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    let value = |side: &BTreeMap<String, Value>, key: &String| side.get(key).cloned().unwrap_or(Value::Null);
    let pairs = keys.into_iter().map(|key| KeyDifference { key: key.clone(), first: value(one, key), second: value(other, key) });
    pairs.filter(|pair| !is_equal(&pair.first, &pair.second)).collect()
}

fn is_equal(one: &Value, other: &Value) -> bool {
    match (one.as_f64(), other.as_f64()) {
        (Some(one), Some(other)) => (one - other).abs() == 0.0,
        _ => one == other,
    }
}

fn metric_differences(one: &[(String, f64)], other: &[(String, f64)]) -> Vec<MetricDifference> {
    let value = |side: &[(String, f64)], name: &str| side.iter().find(|(known, _)| known == name).map(|(_, value)| *value);
    let mut names: Vec<&String> = one.iter().map(|(name, _)| name).collect();
    names.extend(other.iter().map(|(name, _)| name).filter(|name| value(one, name).is_none()));
    let difference = |name: &String| {
        let (first, second) = (value(one, name), value(other, name));
        MetricDifference { name: name.clone(), first, second, delta: first.zip(second).map(|(first, second)| second - first) }
    };
    names.into_iter().map(difference).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn recipes_key_by_key() {
        let one = json!({"a": 1, "b": {"c": [1, 2], "d": null, "e": "x"}, "t": [{"n": "p"}, {"n": "q"}], "same": 0});
        let other = json!({"a": 2, "b": {"c": [1, 3], "d": true}, "t": [{"n": "p"}, {"n": "r"}], "same": 0.0});
        let found = recipe_differences(&flattened(&one), &flattened(&other));
        let found: Vec<(&str, Value, Value)> =
            found.iter().map(|pair| (pair.key.as_str(), pair.first.clone(), pair.second.clone())).collect();
        let expected = [
            ("a", json!(1), json!(2)),
            ("b.c", json!([1, 2]), json!([1, 3])),
            ("b.d", Value::Null, json!(true)),
            ("b.e", json!("x"), Value::Null),
            ("t.1.n", json!("q"), json!("r")),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn numbers_that_one_side_lacks_have_no_difference() {
        let side = |pairs: &[(&str, f64)]| pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect::<Vec<_>>();
        let found = metric_differences(&side(&[("loss", 2.0), ("old", 1.0)]), &side(&[("loss", 1.5), ("new", 3.0)]));
        let found: Vec<(&str, Option<f64>)> = found.iter().map(|metric| (metric.name.as_str(), metric.delta)).collect();
        assert_eq!(found, [("loss", Some(-0.5)), ("old", None), ("new", None)]);
    }

    #[test]
    fn a_folder_without_a_run_is_a_failure() {
        let folder = tempfile::tempdir().unwrap();
        let error = Side::read(folder.path()).unwrap_err();
        assert_eq!(error.downcast_ref::<Failure>().unwrap().kind, FailureKind::Input);
    }
}
