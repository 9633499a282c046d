//! Whether a study that is there fits another cluster file: what `cloze sweep run` checks of a new one, of what has yet to run.

use std::collections::BTreeMap;

use anyhow::Result;
use cloze_launcher::sweep::folder::{PlannedTrial, StudyInfo};
use cloze_launcher::sweep::graph::{Graph, Node};
use cloze_launcher::sweep::open::OpenStudy;
use cloze_launcher::sweep::record::TrialState;
use cloze_recipes::check_kept_job_time;
use cloze_recipes::site::Site;
use cloze_recipes::study::{Space, Study, Sweep, Trial};

use crate::cli::plan::refuse_large;

/// Fails with kind `Recipe` where jobs of this site would have no time to begin, or trials that are not done have too little memory there.
pub(super) fn check_site(opened: &OpenStudy, site: &Site) -> Result<()> {
    let folder = opened.journal.folder();
    check_kept_job_time(&opened.plan.resources, site, &folder.plan_path())?;
    let graph = open_trials(opened)?;
    let Some(first) = graph.nodes.first() else { return Ok(()) };
    refuse_large(&study(opened, folder.info()?, &first.trial), &graph, Some(site))
}

/// The trials that are not done, as their recipes in the study folder state them.
fn open_trials(opened: &OpenStudy) -> Result<Graph> {
    let (folder, plan) = (opened.journal.folder(), &opened.plan);
    let mut trials: Vec<Trial> = Vec::with_capacity(plan.trials.len());
    for planned in &plan.trials {
        trials.push(Trial {
            parameters: planned.parameters.clone().into_iter().collect(),
            recipe: cloze_recipes::load(&folder.recipe_path(&planned.hash), &[])?,
            hash: planned.hash.clone(),
            data_hash: planned.data_hash.clone(),
            data_seed: planned.data_seed,
            parent: planned.parent.and_then(|parent| trials.get(parent).cloned()).map(Box::new),
        });
    }
    let states: BTreeMap<&str, TrialState> = opened.records.iter().map(|record| (record.hash.as_str(), record.state)).collect();
    let is_open = |trial: &Trial| states.get(trial.hash.as_str()).is_none_or(|state| *state != TrialState::Done);
    let of_plan = trials.into_iter().zip(&plan.trials).filter(|(trial, _)| is_open(trial));
    let node = |(trial, planned): (Trial, &PlannedTrial)| Node { trial, wanted: planned.wanted, is_stage: planned.is_stage, parent: None };
    Ok(Graph { nodes: of_plan.map(node).collect() })
}

/// The study as far as its machines go; its own recipe file may be gone or changed.
fn study(opened: &OpenStudy, info: StudyInfo, first: &Trial) -> Study {
    let plan = &opened.plan;
    Study {
        file: opened.journal.folder().root().to_owned(),
        recipe: first.recipe.clone(),
        resources: plan.resources.clone(),
        after: None,
        sweep: Some(Sweep {
            space: Space::default(),
            seeds: Vec::new(),
            concurrency: plan.concurrency,
            pack: plan.pack,
            metric: plan.metric.clone(),
            early_stopping: None,
        }),
        expected: None,
        profile: info.profile,
        overrides: info.overrides,
    }
}
