//! `cloze check` and `cloze schema`.

use std::fmt::Write as _;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use cloze_recipes::CheckedFile;
use cloze_recipes::site::{Site, SiteKind};
use cloze_recipes::study::Study;

use super::arguments::{CheckArguments, SchemaArguments};

/// Checks a recipe with all its profiles and trials, and a cluster file; prints what is right, or the resolved recipe.
pub fn check(arguments: &CheckArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let mut text = String::new();
    let mut checked_site = None;
    if let Some(file) = &arguments.cluster {
        let site = cloze_recipes::load_site(file)?;
        if !arguments.resolved {
            text.push_str(&site_text(file, &site));
        }
        checked_site = Some(site);
    }
    if let Some(recipe) = &arguments.recipe {
        let changes = &arguments.changes;
        let checked = cloze_recipes::check_file(recipe, &changes.overrides, changes.profile.as_deref())?;
        if let Some(site) = &checked_site {
            check_job_times(&checked, site)?;
        }
        text.push_str(&if arguments.resolved { checked.study.recipe.to_yaml() } else { recipe_text(recipe, &checked) });
    }
    stdout.write_all(text.as_bytes()).context("print the recipe")?;
    Ok(ExitCode::SUCCESS)
}

/// The time limit of the recipe, under every profile that was checked, at this site.
fn check_job_times(checked: &CheckedFile, site: &Site) -> Result<()> {
    let Study { file, overrides, .. } = &checked.study;
    cloze_recipes::check_job_time(&checked.study, site)?;
    for (profile, _) in &checked.profiles {
        cloze_recipes::check_job_time(&cloze_recipes::load_study(file, overrides, Some(profile))?, site)?;
    }
    Ok(())
}

/// Prints the JSON Schema.
pub fn schema(arguments: &SchemaArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let text = if arguments.cluster { cloze_recipes::site_schema_json() } else { cloze_recipes::schema_json() };
    writeln!(stdout, "{text}").context("print the schema")?;
    Ok(ExitCode::SUCCESS)
}

/// What stands around the run first, so that the last word is the hash.
fn recipe_text(file: &Path, checked: &CheckedFile) -> String {
    let CheckedFile { study, trials, profiles } = checked;
    let mut text = String::new();
    let shown = file.display();
    if study.sweep.is_some() {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{shown}: {} right", counted(trials.len(), "trial is", "trials are"));
    }
    for (name, count) in profiles {
        let _ = writeln!(text, "{shown}: profile `{name}` is right, {}", counted(*count, "trial", "trials"));
    }
    let _ = writeln!(text, "{shown}: recipe `{}` is right, hash {}", study.recipe.name, study.recipe.hash());
    text
}

fn site_text(file: &Path, site: &Site) -> String {
    let kind = match &site.kind {
        SiteKind::Local => "this machine".to_owned(),
        SiteKind::Ssh(ssh) => counted(ssh.hosts.len(), "host", "hosts"),
        SiteKind::Slurm(slurm) => {
            slurm.partition.as_ref().map_or_else(|| "SLURM".to_owned(), |partition| format!("SLURM, partition {partition}"))
        }
    };
    format!("{}: cluster `{}` is right, {kind}\n", file.display(), site.name)
}

fn counted(count: usize, one: &str, several: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { several })
}
