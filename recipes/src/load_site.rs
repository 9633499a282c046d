//! From a cluster file to a checked site.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;

use crate::problem::Problems;
use crate::raw::PreflightRaw;
use crate::site::{Site, SiteKind};
use crate::{check, compose, paths, schema, validate};

/// Reads and checks a cluster file.
///
/// Paths in it start at its folder. Fails with a [`Failure`](crate::failure::Failure) of kind `Recipe`: at once where the file cannot be
/// read as YAML, else with one line for each problem.
pub fn load_site(path: &Path) -> anyhow::Result<Site> {
    let current_folder = std::env::current_dir().context("find the current folder")?;
    let current_folder = paths::canonical_folder(&current_folder)?;
    let root = compose::read_alone(path, "cluster file")?;
    let mut problems = Problems::default();
    validate::validate(&root, &schema::site_schema(), &mut problems);
    check::check_site(&root, problems, &current_folder).map_err(|problems| problems.into_failure(&path.display().to_string()).into())
}

/// Where a cluster file states a key, as `FILE:LINE:COLUMN: KEY`; `None` where the file cannot be read any more.
pub fn place_in_site(path: &Path, key: &str) -> Option<String> {
    let root = compose::read_alone(path, "cluster file").ok()?;
    Some(format!("{}: {key}", root.place_of(key)))
}

impl Site {
    /// This machine, as it is used without a cluster file.
    pub fn local() -> Self {
        Self {
            name: "local".to_owned(),
            kind: SiteKind::Local,
            folder: None,
            container: None,
            modules: Vec::new(),
            environment: BTreeMap::new(),
            setup: Vec::new(),
            preflight: check::preflight(&PreflightRaw::default()),
            gpu_memory_mib: None,
            tokens_per_second: None,
        }
    }
}

#[cfg(test)]
mod tests;
