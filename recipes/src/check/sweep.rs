//! The sweep: keys that may be swept, once each; values that fit together; a bound on the trials.

use serde_json::{Map, Value as Json};

use super::{Context, around};
use crate::raw::{DistributionRaw, MetricRaw, RandomRaw, SweepRaw};
use crate::schema;
use crate::study::{Distribution, EarlyStopping, MAX_TRIALS, Metric, RandomSpace, Score, Space, Sweep};
use crate::tree::shortened;
use crate::validate::knows;

/// Top-level keys that are not of one run, or that the trials' own places and names take the part of.
const NOT_OF_A_RUN: [&str; 8] = ["version", "extends", "name", "profiles", "resources", "sweep", "expected", "seed"];
/// Places that each trial has of its own.
const PLACES: [&str; 3] = ["data.output", "checkpoint.url", "checkpoint.cache"];

/// Values of one key.
type Values = (String, Vec<Json>);

pub(super) fn check(context: &mut Context<'_>, raw: SweepRaw) -> Sweep {
    let mut keys = Keys::default();
    let grid = grid(context, &mut keys, raw.grid);
    let paired = paired(context, &mut keys, raw.paired);
    let list = list(context, &mut keys, raw.list);
    let random = raw.random.map(|raw| random(context, &mut keys, raw));
    let space = Space { grid, paired, list, random };
    check_seeds(context, &raw.seeds);
    check_stage(context, &space);
    let concurrency = raw.concurrency.unwrap_or(raw.pack);
    if raw.pack > concurrency {
        context.mismatch("sweep.pack", raw.pack, format!("at most sweep.concurrency, which is {concurrency}"));
    }
    let metric = match raw.metric {
        Some(raw) => metric(context, &["sweep", "metric"], raw),
        None => default_metric(context),
    };
    let early_stopping = raw.early_stopping.map(|raw| EarlyStopping { first_step: raw.first_step, factor: raw.factor });
    let sweep = Sweep { space, seeds: raw.seeds, concurrency, pack: raw.pack, metric, early_stopping };
    let count = sweep.num_trials();
    if count > MAX_TRIALS {
        context.mismatch("sweep", format!("{count} trials"), format!("at most {MAX_TRIALS}"));
    }
    sweep
}

/// A metric of a task that exists. A loss is of no task.
pub(super) fn metric(context: &mut Context<'_>, keys: &[&str], raw: MetricRaw) -> Metric {
    let tasks = around::task_names(context.root);
    let task_keys = [keys, &["task"]].concat();
    match &raw.task {
        Some(task) if raw.score == Score::Loss => {
            context.mismatch_in(&task_keys, format!("`{}` with `score: loss`", shortened(task)), "no task: the loss is of the training");
        }
        Some(task) if !tasks.contains(&task.as_str()) => {
            let known = if tasks.is_empty() { "`evaluation` has none".to_owned() } else { format!("`{}`", tasks.join("`, `")) };
            context.mismatch_in(&task_keys, format!("`{}`", shortened(task)), format!("a task of `evaluation`: {known}"));
        }
        None if raw.score != Score::Loss && tasks.is_empty() => {
            context.problem_in(keys, "found a score of the tasks, but `evaluation` has none; expected `score: loss`, or tasks");
        }
        _ => {}
    }
    Metric { task: raw.task, score: raw.score }
}

/// The mean accuracy over the tasks, or the loss where there are none.
fn default_metric(context: &Context<'_>) -> Metric {
    let has_tasks = !around::task_names(context.root).is_empty();
    Metric { task: None, score: if has_tasks { Score::Accuracy } else { Score::Loss } }
}

/// The keys met so far, each with what is shown of its place.
#[derive(Default)]
struct Keys {
    met: Vec<String>,
}

impl Keys {
    /// Refuses a key that no sweep may have, and one that is swept elsewhere in the sweep, itself or a part of it.
    fn add(&mut self, context: &mut Context<'_>, place: &[&str], key: &str) {
        let keys = [place, &[key]].concat();
        if let Some(reason) = unswept(key) {
            context.problem_in(&keys, reason);
        } else if let Some(other) = self.met.iter().find(|other| overlap(other, key)) {
            let found = if other == key { "this key a second time in the sweep".to_owned() } else { format!("`{key}` beside `{other}`") };
            context.mismatch_in(&keys, found, "keys that do not overlap");
        }
        self.met.push(key.to_owned());
    }
}

/// Why the key cannot be swept.
fn unswept(key: &str) -> Option<String> {
    let mut run_key = key;
    while let Some(rest) = run_key.strip_prefix("after.") {
        run_key = rest;
    }
    let top = run_key.split('.').next().unwrap_or("");
    let of_stage = run_key.len() < key.len();
    match (top, run_key) {
        ("seed", "seed") if of_stage => None,
        ("seed", _) => Some("seeds are stated in `sweep.seeds`".to_owned()),
        ("set", _) if of_stage => Some("a key of the earlier stage follows `after.` directly, as in `after.train.steps`".to_owned()),
        ("after", _) => Some("found the section, expected one of its keys, such as `after.recipe`".to_owned()),
        _ if NOT_OF_A_RUN.contains(&top) => Some(format!("`{top}` is not a part of a run that a sweep can change")),
        _ if PLACES.contains(&run_key) => Some("each trial has a place of its own; the sweep cannot change it".to_owned()),
        _ => None,
    }
}

/// Whether a recipe, or that of an earlier stage, has all of these keys.
pub(super) fn are_known(keys: &[&str]) -> bool {
    let schema = schema::schema();
    let is_known = |key: &&str| {
        let mut run_key = *key;
        while let Some(rest) = run_key.strip_prefix("after.").filter(|rest| *rest != "recipe") {
            run_key = rest;
        }
        knows(&schema, run_key)
    };
    keys.iter().all(is_known)
}

/// Whether the keys are the same or one is a part of the other.
fn overlap(one: &str, other: &str) -> bool {
    let (short, long) = if one.len() <= other.len() { (one, other) } else { (other, one) };
    long.strip_prefix(short).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The lists of a map, in order; keys that are unset with `null` are left out.
fn lists(map: Map<String, Json>) -> Vec<Values> {
    let lists = map.into_iter().filter_map(|(key, value)| match value {
        Json::Array(values) => Some((key, values)),
        _ => None,
    });
    lists.collect()
}

fn grid(context: &mut Context<'_>, keys: &mut Keys, raw: Map<String, Json>) -> Vec<Values> {
    let grid = lists(raw);
    for (key, values) in &grid {
        keys.add(context, &["sweep", "grid"], key);
        if values.is_empty() {
            context.mismatch_in(&["sweep", "grid", key], "an empty list", "at least one value");
        }
    }
    grid
}

fn paired(context: &mut Context<'_>, keys: &mut Keys, raw: Vec<Map<String, Json>>) -> Vec<Vec<Values>> {
    let groups: Vec<Vec<Values>> = raw.into_iter().map(lists).collect();
    for (index, group) in groups.iter().enumerate() {
        let number = index.to_string();
        let place = ["sweep", "paired", number.as_str()];
        let Some((first, first_values)) = group.first() else {
            context.mismatch_in(&place, "a group without keys", "keys with lists of values");
            continue;
        };
        for (key, values) in group {
            keys.add(context, &place, key);
            if values.is_empty() || values.len() != first_values.len() {
                let expected = format!("as many as `{first}` has, which is {}, and at least one", first_values.len());
                context.mismatch_in(&[&place[..], &[key]].concat(), format!("{} values", values.len()), expected);
            }
        }
    }
    groups
}

/// Arms may share keys with each other, but not with the rest of the sweep.
fn list(context: &mut Context<'_>, keys: &mut Keys, raw: Vec<Map<String, Json>>) -> Vec<Vec<(String, Json)>> {
    let before = keys.met.len();
    let mut added: Vec<String> = Vec::new();
    for (index, arm) in raw.iter().enumerate() {
        let mut own = Keys { met: keys.met[..before].to_vec() };
        for key in arm.keys() {
            own.add(context, &["sweep", "list", &index.to_string()], key);
        }
        added.extend(own.met.into_iter().skip(before));
    }
    keys.met.extend(added);
    raw.into_iter().map(|arm| arm.into_iter().collect()).collect()
}

fn random(context: &mut Context<'_>, keys: &mut Keys, raw: RandomRaw) -> RandomSpace {
    let place = ["sweep", "random", "keys"];
    if raw.keys.is_empty() {
        context.mismatch_in(&place, "no keys", "at least one key to draw");
    }
    let mut drawn = Vec::new();
    for (key, value) in raw.keys {
        keys.add(context, &place, &key);
        let inner = [&place[..], &[key.as_str()]].concat();
        match serde_json::from_value::<DistributionRaw>(value) {
            Ok(stated) => drawn.extend(distribution(context, &inner, stated).map(|distribution| (key.clone(), distribution))),
            Err(error) => context.problem_in(&inner, error.to_string()),
        }
    }
    RandomSpace { samples: raw.samples, seed: raw.seed, keys: drawn }
}

fn distribution(context: &mut Context<'_>, keys: &[&str], raw: DistributionRaw) -> Option<Distribution> {
    let ordered = |context: &mut Context<'_>, low: f64, high: f64| {
        if low > high {
            context.mismatch_in(keys, format!("{low} before {high}"), "the smaller number first");
        }
    };
    match (raw.choice, raw.uniform, raw.log_uniform, raw.integer) {
        (Some(values), None, None, None) => Some(Distribution::Choice(values)),
        (None, Some([low, high]), None, None) => {
            ordered(context, low, high);
            Some(Distribution::Uniform(low, high))
        }
        (None, None, Some([low, high]), None) => {
            ordered(context, low, high);
            if low <= 0.0 {
                context.mismatch_in(keys, low, "numbers above 0, whose logarithm is drawn");
            }
            Some(Distribution::LogUniform(low, high))
        }
        (None, None, None, Some([low, high])) => {
            ordered(context, low as f64, high as f64);
            Some(Distribution::Integer(low, high))
        }
        _ => {
            context.problem_in(keys, "expected exactly one of `choice`, `uniform`, `log_uniform` and `integer`");
            None
        }
    }
}

fn check_seeds(context: &mut Context<'_>, seeds: &[u64]) {
    for (index, seed) in seeds.iter().enumerate() {
        if seeds[..index].contains(seed) {
            context.mismatch(&format!("sweep.seeds.{index}"), format!("{seed} a second time"), "seeds that differ");
        }
    }
}

/// A change of an earlier stage needs one.
fn check_stage(context: &mut Context<'_>, space: &Space) {
    let keys = space.keys();
    let named = context.root.get("after").and_then(|after| after.get("recipe")).is_some() || keys.contains(&"after.recipe");
    if let Some(key) = keys.iter().find(|key| key.starts_with("after.")).filter(|_| !named) {
        context.problem("sweep", format!("found `{key}`, but there is no earlier stage; name its recipe in `after.recipe`"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_no_sweep_may_have() {
        let allowed = ["train.steps", "after.recipe", "after.train.steps", "after.seed", "after.after.recipe", "data.sources.0.url"];
        for key in allowed {
            assert_eq!(unswept(key), None, "{key}");
        }
        let refused = [
            "seed",
            "name",
            "sweep.pack",
            "after",
            "after.set",
            "after.set.x",
            "after.name",
            "data.output",
            "after.data.output",
            "extends",
        ];
        for key in refused {
            assert!(unswept(key).is_some(), "{key}");
        }
    }

    #[test]
    fn keys_that_a_recipe_has() {
        for key in ["train.steps", "after.recipe", "after.train.steps", "after.after.seed", "data.sources.0.url", "train.schedule"] {
            assert!(are_known(&[key]), "{key}");
        }
        for key in ["train.stepz", "after.train.stepz", "data.sources.x.url", "train.steps.x", "trian"] {
            assert!(!are_known(&["train.steps", key]), "{key}");
        }
    }

    #[test]
    fn keys_overlap_when_one_is_a_part_of_the_other() {
        let table =
            [("train", "train.steps", true), ("train.steps", "train.steps", true), ("train.step", "train.steps", false), ("a", "b", false)];
        for (one, other, expected) in table {
            assert_eq!((overlap(one, other), overlap(other, one)), (expected, expected), "{one} {other}");
        }
    }
}
