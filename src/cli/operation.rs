//! `cloze resume --set`: how a run is operated changes, and not what it computes.

use anyhow::Result;
use cloze_launcher::RunPaths;
use cloze_launcher::run_folder::RunInfo;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use cloze_recipes::{OPERATIONAL_KEYS, is_operational};

/// The run's recipe with these values set. Fails with kind `Mismatch` where that would be another run, and names the values that make it
/// so.
pub fn operated(paths: &RunPaths, info: &RunInfo, overrides: &[String]) -> Result<Recipe> {
    let path = paths.recipe();
    let recipe = cloze_recipes::load(&path, overrides)?;
    let key = |change: &str| change.split_once('=').map_or_else(String::new, |(key, _)| key.trim().to_owned());
    let foreign: Vec<&str> = overrides.iter().map(String::as_str).filter(|change| !is_operational(&key(change))).collect();
    if foreign.is_empty() && recipe.hash() == info.recipe_hash {
        return Ok(recipe);
    }
    let found = if foreign.is_empty() { overrides.join(", ") } else { foreign.join(", ") };
    Err(Failure::new(FailureKind::Mismatch, "a resumed run computes what it was started with")
        .at(path.display())
        .expected(format!("values of these keys alone: {OPERATIONAL_KEYS}"))
        .found(found)
        .hint("start another run for it: `cloze train RECIPE --set KEY=VALUE --run OTHER`")
        .into())
}
