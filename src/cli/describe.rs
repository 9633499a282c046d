//! `cloze check` and `cloze schema`.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};

use super::arguments::CheckArguments;

/// Checks a recipe; prints its hash, or the resolved recipe.
pub fn check(arguments: &CheckArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let recipe = cloze_recipes::load(&arguments.recipe.recipe, &arguments.recipe.overrides)?;
    let text = if arguments.resolved {
        recipe.to_yaml()
    } else {
        format!("{}: recipe `{}` is right, hash {}\n", arguments.recipe.recipe.display(), recipe.name, recipe.hash())
    };
    stdout.write_all(text.as_bytes()).context("print the recipe")?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the JSON Schema.
pub fn schema(stdout: &mut dyn Write) -> Result<ExitCode> {
    writeln!(stdout, "{}", cloze_recipes::schema_json()).context("print the schema")?;
    Ok(ExitCode::SUCCESS)
}
