//! `cloze resume --set`: a run goes on, operated otherwise than before.

use anyhow::Result;
use cloze_launcher::RunFolder;
use cloze_recipes::OPERATIONAL_KEYS;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;

/// The run's recipe with these values set. Fails with kind `Mismatch` where that would be another run, and names the values that make it so.
pub fn operated(run: &RunFolder, overrides: &[String]) -> Result<Recipe> {
    let path = run.paths().recipe();
    let recipe = cloze_recipes::load(&path, overrides)?;
    if recipe.hash() == run.info().recipe_hash {
        return Ok(recipe);
    }
    // One that cannot be read alone does not hide another.
    let changes_run =
        |one: &&String| cloze_recipes::load(&path, std::slice::from_ref(one)).is_ok_and(|alone| alone.hash() != run.info().recipe_hash);
    let guilty: Vec<&str> = overrides.iter().filter(changes_run).map(String::as_str).collect();
    let found = if guilty.is_empty() { overrides.join(", ") } else { guilty.join(", ") };
    Err(Failure::new(FailureKind::Mismatch, "a resumed run computes what it was started with")
        .at(path.display())
        .expected(format!("values of these keys alone: {OPERATIONAL_KEYS}"))
        .found(found)
        .hint("start another run for it: `cloze train RECIPE --set KEY=VALUE --run OTHER`")
        .into())
}
