//! Whether the sweep has the arms that are expected of it: a value that no trial takes leaves a row of the table empty.

use std::sync::Arc;

use serde_json::Value as Json;

use super::{Expected, RowSource, Trial};
use crate::problem::Problems;
use crate::tree::{self, Node, Origin, shortened};
use crate::validate::nearest;

/// Values that are listed of one key.
const MAX_LISTED: usize = 20;
/// How the keys of an earlier stage begin; they are in no recipe but the stage's.
const OF_STAGE: &str = "after.";

/// Reports every row whose arm no trial belongs to. A report matches in the same way: a value is the trial's own, or else its recipe's.
pub(crate) fn check_arms(expected: &Expected, trials: &[Trial], root: &Node, problems: &mut Problems) {
    for (index, row) in expected.rows.iter().enumerate() {
        let (name, arm) = match &row.ours {
            RowSource::Quoted => continue,
            RowSource::Arm(arm) => ("arm", arm),
            RowSource::BestOf(arm) => ("best_of", arm),
        };
        let has_all = |trial: &Trial| arm.iter().all(|(key, wanted)| takes(trial, key, wanted));
        if trials.iter().any(has_all) {
            continue;
        }
        let number = index.to_string();
        let keys = ["expected", "rows", &number, name];
        let untaken: Vec<&(String, Json)> =
            arm.iter().filter(|(key, wanted)| !trials.iter().any(|trial| takes(trial, key, wanted))).collect();
        for (key, wanted) in &untaken {
            let place = root.place_at(keys.into_iter().chain([key.as_str()]));
            problems.push(place, &format!("{}.{key}", keys.join(".")), untaken_text(key, wanted, trials));
        }
        if untaken.is_empty() {
            let message = "found values that no trial has together, expected those of one point of the sweep";
            problems.push(root.place_at(keys), &keys.join("."), message);
        }
    }
}

fn untaken_text(key: &str, wanted: &Json, trials: &[Trial]) -> String {
    let mut taken: Vec<String> = Vec::new();
    for value in trials.iter().flat_map(|trial| &trial.parameters).filter(|(swept, _)| swept == key).map(|(_, value)| text_of(value)) {
        if !taken.contains(&value) {
            taken.push(value);
        }
    }
    let stated = text_of(wanted);
    let meant = nearest(&stated, taken.iter().map(String::as_str)).filter(|_| wanted.is_string());
    let meant = meant.map_or_else(String::new, |meant| format!("; did you mean `{meant}`?"));
    let more = if taken.len() > MAX_LISTED { format!(" and {} more", taken.len() - MAX_LISTED) } else { String::new() };
    let listed: Vec<&str> = taken.iter().take(MAX_LISTED).map(String::as_str).collect();
    format!("found `{stated}`, expected a value that the sweep takes: `{}`{more}{meant}", listed.join("`, `"))
}

fn takes(trial: &Trial, key: &str, wanted: &Json) -> bool {
    match trial.parameters.iter().find(|(swept, _)| swept == key) {
        Some((_, value)) => is_equal(value, wanted),
        None if key.starts_with(OF_STAGE) => false,
        None => is_equal(&recipe_value(trial, key), wanted),
    }
}

/// The value of a key that the trial's point leaves as it is; `null` where the recipe has none.
fn recipe_value(trial: &Trial, key: &str) -> Json {
    let origin = Arc::new(Origin::File { shown: trial.recipe.name.clone(), folder: std::path::PathBuf::new() });
    let recipe = tree::parse(&trial.recipe.to_yaml(), &origin).map_or(Json::Null, |root| root.json());
    recipe.pointer(&format!("/{}", key.replace('.', "/"))).cloned().unwrap_or(Json::Null)
}

/// Numbers are compared as such: 1 and 1.0 are the same.
fn is_equal(one: &Json, other: &Json) -> bool {
    match (one.as_f64(), other.as_f64()) {
        (Some(one), Some(other)) => (one - other).abs() == 0.0,
        _ => one == other,
    }
}

/// A value as a user writes it.
fn text_of(value: &Json) -> String {
    shortened(&value.as_str().map_or_else(|| value.to_string(), str::to_owned))
}
