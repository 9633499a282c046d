//! Whether every trial of a study fits into the memory of its machines, as the plan of a single run says it of one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use cloze_launcher::plan::{Check, CheckLevel, DataFacts, RunPlan, check_memory};
use cloze_launcher::sweep::graph::Graph;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::{ModelRecipe, ModelShape};
use cloze_recipes::site::{Site, SiteKind};
use cloze_recipes::study::{Study, Trial};

use super::facts::{facts, model_sizes};
use super::{Wanted, steps};

/// Trials that are named one by one.
const MAX_NAMED: usize = 20;

/// Extents of a model and rows of its embedding; `None` where they cannot be read.
type Sizes = Option<(ModelShape, u64)>;

/// What the sizes of a model depend on: its folder, its shape, its tokenizer.
type Identity = (Option<PathBuf>, String, PathBuf);

/// Refuses a study, before anything of it is made, that has trials for which the machines have too little memory; all of them are named.
/// Fails with kind `Recipe`.
pub(in crate::cli) fn refuse_large_trials(study: &Study, folder: &Path, site: Option<&Site>) -> Result<()> {
    let root = std::path::absolute(folder).context("find the current folder")?;
    refuse_large(study, &Graph::new(study.trials(&root)?)?, site)
}

/// As [`refuse_large_trials`], of those of these trials that have yet to run, and of the machines of a study that is there.
pub(in crate::cli) fn refuse_large(study: &Study, graph: &Graph, site: Option<&Site>) -> Result<()> {
    let local = Site::local();
    let site = site.unwrap_or(&local);
    let mut study = study.clone();
    if site.kind == SiteKind::Local {
        // A trial on this machine has no other nodes, whatever its recipe says.
        study.resources.nodes = 1;
    }
    let too_large = too_large(&study, site, graph);
    let Some((_, first)) = too_large.first() else { return Ok(()) };
    let mut lines: Vec<String> =
        too_large.iter().take(MAX_NAMED).map(|(trial, check)| format!("{}: {}", shown(trial), check.found)).collect();
    if too_large.len() > MAX_NAMED {
        lines.push(format!("and {} more", too_large.len() - MAX_NAMED));
    }
    let what = format!("{} of {} trials and earlier stages need more memory than there is", too_large.len(), graph.nodes.len());
    let failure = Failure::new(FailureKind::Recipe, what).at(study.file.display()).because(format!("\n    {}", lines.join("\n    ")));
    let hint = first.hint.as_ref().map_or_else(String::new, |hint| format!("of the first one, {hint}"));
    Err(failure.hint(hint).into())
}

/// The checks that fail of all trials but the first that the sweep asks for, whose numbers the plan shows.
pub(super) fn memory_of_others(wanted: &Wanted<'_>, graph: &Graph) -> Vec<Check> {
    let mut found = too_large(wanted.study, wanted.site, graph);
    let first = graph.wanted().next().map(|node| node.trial.hash.as_str());
    found.retain(|(trial, _)| Some(trial.hash.as_str()) != first);
    let named = found.into_iter().map(|(trial, check)| Check { found: format!("{}: {}", shown(trial), check.found), ..check });
    named.collect()
}

/// The trials that do not fit, and why. One whose model cannot be read says so when it is tried.
fn too_large<'a>(study: &Study, site: &Site, graph: &'a Graph) -> Vec<(&'a Trial, Check)> {
    let mut known: BTreeMap<Identity, Sizes> = BTreeMap::new();
    let mut found = Vec::new();
    for trial in graph.nodes.iter().map(|node| &node.trial) {
        let model = first_model(trial);
        let sizes = known.entry(identity(model)).or_insert_with(|| model_sizes(model).ok());
        let Some(sizes) = sizes.clone() else { continue };
        let of_trial = Study { recipe: trial.recipe.clone(), ..study.clone() };
        let workers = study.resources.nodes.saturating_mul(study.resources.workers_per_node);
        let wanted = Wanted { study: &of_trial, site, site_file: None, workers, offline: true, folder: PathBuf::new(), trials: None };
        let facts = facts(&wanted, None, sizes, DataFacts::Unknown);
        let check = check_memory(&facts, &RunPlan::new(&facts, steps(&facts)).memory);
        if check.level == CheckLevel::Fail {
            found.push((trial, check));
        }
    }
    found
}

/// The model that the first stage of a trial starts from: an export has its extents.
fn first_model(trial: &Trial) -> &ModelRecipe {
    let mut first = trial;
    while let Some(parent) = &first.parent {
        first = parent;
    }
    &first.recipe.model
}

fn identity(model: &ModelRecipe) -> Identity {
    (model.path.clone(), format!("{:?}", model.shape), model.tokenizer.clone())
}

/// A trial by what tells it from the others.
fn shown(trial: &Trial) -> String {
    let values: Vec<String> = trial.parameters.iter().map(|(key, value)| format!("{key}={value}")).collect();
    [trial.recipe.name.clone()].into_iter().chain(values).collect::<Vec<_>>().join(" ")
}
