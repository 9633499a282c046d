//! What stands around a run: resources, the earlier stage, and what is handed on to the sweep and the expectation.

use serde_json::Value as Json;

use super::{Context, expected, job, sweep};
use crate::compose::PROFILES;
use crate::paths;
use crate::raw::{AfterRaw, ResourcesRaw};
use crate::study::{After, Expected, Resources, Sweep};
use crate::tree::{Node, Scalar, Value};

/// What stands around a run, checked.
pub(crate) struct Around {
    pub(crate) resources: Resources,
    pub(crate) after: Option<After>,
    pub(crate) sweep: Option<Sweep>,
    pub(crate) expected: Option<Expected>,
}

/// Checks the sections around the run; `None` where the form of one of them is wrong.
pub(super) fn check(context: &mut Context<'_>) -> Option<Around> {
    check_profile_names(context);
    let resources = context.section("resources", Json::Object(serde_json::Map::new()));
    let resources = resources.map(|raw| checked_resources(context, raw));
    let after = context.section_with("after", AFTER_NULLS).map(|raw: Option<AfterRaw>| raw.and_then(|raw| checked_after(context, raw)));
    let sweep = context.section_with("sweep", SWEEP_NULLS).map(|raw: Option<_>| raw.map(|raw| sweep::check(context, raw)));
    let swept = sweep.as_ref().ok().map(|sweep| sweep.as_ref().map_or_else(Vec::new, Sweep::keys));
    // A swept key that no recipe has is told with its trials; the expectation is not to blame for naming the right one.
    let swept = swept.filter(|keys| sweep::are_known(keys));
    let expected = context.section_with("expected", EXPECTED_NULLS);
    let expected = expected.map(|raw: Option<_>| raw.map(|raw| expected::check(context, raw, swept.as_deref())));
    Some(Around { resources: resources?, after: after.ok()?, sweep: sweep.ok()?, expected: expected.ok()? })
}

/// Where `null` is a value and does not leave the key out: in what is to be changed in a recipe.
const AFTER_NULLS: &[&str] = &["set"];
const SWEEP_NULLS: &[&str] = &["grid", "paired", "list"];
const EXPECTED_NULLS: &[&str] = &["rows.arm", "rows.best_of"];

/// Names of the evaluation tasks, whether or not that section is right.
pub(super) fn task_names(root: &Node) -> Vec<&str> {
    let Some(Value::List(tasks)) = root.get("evaluation").map(|node| &node.value) else { return Vec::new() };
    let names = tasks.iter().filter_map(|task| task.get("name"));
    names.filter_map(text_of).collect()
}

pub(super) fn text_of(node: &Node) -> Option<&str> {
    match &node.value {
        Value::Scalar(Scalar::Text(text)) => Some(text),
        _ => None,
    }
}

fn check_profile_names(context: &mut Context<'_>) {
    for name in crate::compose::profile_names(context.root) {
        context.name_in(&[PROFILES, name], name);
    }
}

fn checked_resources(context: &mut Context<'_>, raw: ResourcesRaw) -> Resources {
    let uses_gpus = context.root.get("train").and_then(|train| train.get("device")).and_then(text_of) == Some("cuda");
    let gpus_per_node = raw.gpus_per_node.unwrap_or(if uses_gpus { raw.workers_per_node } else { 0 });
    if uses_gpus && gpus_per_node < raw.workers_per_node {
        let wanted = format!("at least resources.workers_per_node, which is {}: a worker takes a GPU of its own", raw.workers_per_node);
        context.mismatch("resources.gpus_per_node", gpus_per_node, wanted);
    }
    context.prefix = "resources";
    job::modules(context, &raw.modules);
    job::environment(context, &raw.environment);
    job::setup(context, &raw.setup);
    let container = raw.container.map(|raw| job::container(context, raw));
    context.prefix = "";
    Resources {
        nodes: raw.nodes,
        workers_per_node: raw.workers_per_node,
        gpus_per_node,
        cpus_per_worker: raw.cpus_per_worker,
        memory_per_node_mib: raw.memory_per_node_mib,
        time_limit_minutes: raw.time_limit_minutes,
        container,
        modules: raw.modules,
        environment: raw.environment,
        setup: raw.setup,
    }
}

/// Without a recipe there is no earlier stage, whatever is changed in it; a sweep may name one.
fn checked_after(context: &mut Context<'_>, raw: AfterRaw) -> Option<After> {
    let stated = raw.recipe?;
    let folder = context.root.place_of("after.recipe").folder();
    if stated.contains("://") {
        context.mismatch("after.recipe", format!("`{stated}`"), "a path on this machine, without a scheme");
    }
    let overrides = raw.set.iter().map(|(key, value)| format!("{key}={value}")).collect();
    Some(After { recipe: paths::resolve(folder, &stated), overrides })
}
