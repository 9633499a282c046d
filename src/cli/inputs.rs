//! Files that a study reads: whether they are there is asked before anything is written or queued.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use cloze_recipes::study::{Study, Trial};

/// Missing files that are named one by one.
const MAX_NAMED: usize = 20;

/// Fails with kind `Input` where a tokenizer, a model, a source or an evaluation file of any trial is not on this machine's disks.
pub(super) fn check_inputs(study: &Study, folder: &Path) -> Result<()> {
    let mut missing = BTreeSet::new();
    for trial in study.trials(folder)? {
        collect(&trial, &mut missing);
    }
    if missing.is_empty() {
        return Ok(());
    }
    let named: Vec<String> = missing.iter().take(MAX_NAMED).map(|path| path.display().to_string()).collect();
    let more = missing.len() - named.len();
    let more = if more > 0 { format!("\n    and {more} more") } else { String::new() };
    let failure = Failure::new(
        FailureKind::Input,
        if missing.len() == 1 {
            "1 file that the trials read is missing".to_owned()
        } else {
            format!("{} files that the trials read are missing", missing.len())
        },
    )
    .at(study.file.display())
    .found(format!("nothing at\n    {}{more}", named.join("\n    ")));
    let is_toy = missing.iter().any(|path| path.components().any(|part| part.as_os_str() == "toy"));
    let hint = if is_toy { "`bash scripts/toy-data.sh` makes the data of the toy profiles" } else { "correct the paths in the recipe" };
    Err(failure.hint(hint).into())
}

/// What is missing of a trial and of the stages before it.
fn collect(trial: &Trial, missing: &mut BTreeSet<PathBuf>) {
    missing.extend(read_by(&trial.recipe, trial.parent.is_some()).into_iter().filter(|path| !path.exists()));
    if let Some(parent) = &trial.parent {
        collect(parent, missing);
    }
}

/// The model of a trial with an earlier stage is made by it, and a tokenizer beside that model too.
fn read_by(recipe: &Recipe, has_stage: bool) -> Vec<PathBuf> {
    let model = recipe.model.path.iter().filter(|_| !has_stage).cloned();
    let made = |path: &Path| has_stage && recipe.model.path.as_ref().is_some_and(|model| path.starts_with(model));
    let tokenizer = Some(recipe.model.tokenizer.clone()).filter(|path| !made(path));
    let local = |url: &String| if url.contains("://") { url.strip_prefix("file://").map(PathBuf::from) } else { Some(PathBuf::from(url)) };
    let sources = recipe.data.sources.iter().filter_map(|source| local(&source.url));
    let evaluation = recipe.evaluation.iter().flat_map(|task| task.files.iter().cloned());
    model.chain(tokenizer).chain(sources).chain(evaluation).collect()
}
