//! The trials of a study: every point of the sweep as a checked run.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;

use super::expand::{Point, points};
use super::stages::{HASH_CHARS, Request};
use super::{EarlyStopping, MAX_TRIALS, Metric, Scope, Score, Space, Stages, Study, Sweep, Trial};
use crate::compose::{PROFILES, ProfileChoice, assign, compose};
use crate::failure::{Failure, FailureKind};
use crate::problem::Problems;
use crate::tree::{Node, Value};
use crate::{paths, schema};

/// Checking stops after this many different problems: no more are listed.
const MAX_PROBLEMS: usize = 50;
/// Sections around the run that a trial has no use for.
const AROUND: [&str; 4] = [PROFILES, "resources", "sweep", "expected"];

impl Study {
    /// Every point of the sweep with every seed, in order, each checked; one run where there is no sweep.
    ///
    /// `folder` is the study's folder: data, exports of earlier stages, and nothing else of a trial lie in it, under content hashes. The
    /// hashes do not depend on `folder`, on names, or on the places that are written to. They do depend on the paths of model, tokenizer,
    /// sources and evaluation files, and not on what the files hold: a study gives the same hashes again where the same files lie at the
    /// same paths. The recipe file is read again.
    ///
    /// Fails with one line for each problem, on two points that are the same run, and on more than [`MAX_TRIALS`].
    pub fn trials(&self, folder: &Path) -> anyhow::Result<Vec<Trial>> {
        trials_of(self, folder)?.map_err(|problems| problems.into_failure(&self.file.display().to_string()).into())
    }
}

/// [`Study::trials`] with the problems apart.
pub(crate) fn trials_of(study: &Study, folder: &Path) -> anyhow::Result<Result<Vec<Trial>, Problems>> {
    let current_folder = std::env::current_dir().context("find the current folder")?;
    let current_folder = paths::canonical_folder(&current_folder)?;
    let folder = paths::resolve(&current_folder, in_utf8(folder)?);
    let mut problems = Problems::default();
    let choice = study.profile.as_deref().map(|name| ProfileChoice { name, required: true });
    let shown = study.file.strip_prefix(&current_folder).unwrap_or(&study.file);
    let mut root = compose(shown, &study.overrides, choice, &current_folder, &mut problems)?;
    if !problems.is_empty() {
        return Ok(Err(problems));
    }
    let one_run = one_run();
    let sweep = study.sweep.as_ref().unwrap_or(&one_run);
    if sweep.num_trials() > MAX_TRIALS {
        problems.push(root.place_at(["sweep"]), "sweep", format!("found {} trials, expected at most {MAX_TRIALS}", sweep.num_trials()));
        return Ok(Err(problems));
    }
    let points = points(sweep, &root);
    let sweep_place = root.place_at(["sweep"]).clone();
    if let Value::Map(entries) = &mut root.value {
        entries.retain(|entry| !AROUND.contains(&entry.key.as_str()));
    }
    let schema = schema::schema();
    let scope = Scope { profile: study.profile.as_deref(), current_folder: &current_folder, folder: &folder, schema: &schema };
    let trials = built(&points, &root, scope, &mut problems);
    if problems.is_empty() {
        for message in repeated(&points, &trials) {
            problems.push(&sweep_place, "sweep", message);
        }
    }
    Ok(if problems.is_empty() { Ok(trials) } else { Err(problems) })
}

/// Each point as a checked run; the problems say at which point they were met first.
fn built(points: &[Point], root: &Node, scope: Scope<'_>, problems: &mut Problems) -> Vec<Trial> {
    let mut stages = Stages::new(scope);
    let mut trials = Vec::with_capacity(points.len());
    for point in points {
        match one(point, root, &mut stages) {
            Ok(trial) => trials.push(trial),
            Err(found) => problems.absorb(found, Some(&format!("in the trial {}", point.shown()))),
        }
        if problems.len() >= MAX_PROBLEMS {
            break;
        }
    }
    trials
}

fn one(point: &Point, root: &Node, stages: &mut Stages<'_>) -> Result<Trial, Problems> {
    let mut root = root.clone();
    let mut problems = Problems::default();
    for change in &point.changes {
        if let Err(message) = assign(&mut root, &change.key, &change.key_place, Node::from_json(&change.value, &change.place)) {
            problems.push(&change.place, &change.key, message);
        }
    }
    let parameters = point.changes.iter().map(|change| (change.key.clone(), change.value.clone())).collect();
    stages.build(root, Request { parameters, seed: point.seed, problems }, &mut Vec::new())
}

/// Points that are the same run, and runs whose names would be the same.
fn repeated(points: &[Point], trials: &[Trial]) -> Vec<String> {
    let mut by_name: BTreeMap<&str, usize> = BTreeMap::new();
    let mut messages = Vec::new();
    for (index, trial) in trials.iter().enumerate() {
        let Some(&earlier) = by_name.get(&trial.hash[..HASH_CHARS]) else {
            by_name.insert(&trial.hash[..HASH_CHARS], index);
            continue;
        };
        let pair = format!("{} and {}", points[earlier].shown(), points[index].shown());
        messages.push(if trials[earlier].hash == trial.hash {
            format!("found the same run twice: {pair}, expected points that differ in what they train")
        } else {
            format!("found two runs whose hashes begin alike: {pair}; put one of them into a sweep of its own")
        });
    }
    messages
}

/// Stands for an absent sweep: one point, the recipe's own seed.
fn one_run() -> Sweep {
    let early_stopping: Option<EarlyStopping> = None;
    let metric = Metric { task: None, score: Score::Loss };
    Sweep { space: Space::default(), seeds: Vec::new(), concurrency: 1, pack: 1, metric, early_stopping }
}

/// A recipe is UTF-8, and the folder becomes a part of one.
fn in_utf8(folder: &Path) -> Result<&str, Failure> {
    folder.to_str().ok_or_else(|| {
        Failure::new(FailureKind::Recipe, "cannot write the folder into a recipe").at(folder.display()).expected("a folder name in UTF-8")
    })
}
