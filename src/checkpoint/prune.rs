//! Deleting what is no longer needed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::Result;
use cloze_data::store;
use cloze_recipes::failure::{Failure, FailureKind};

use super::load::{Unusable, compare_sizes};
use super::manifest::{MANIFEST_FILE, Manifest, folder, is_reserved, key};
use super::retention::{Facts, Owner, Verdict, decide};
use super::store::{CheckpointStore, Listed};

impl CheckpointStore {
    /// Applies the policy to the checkpoints of the recipe with this hash, or with `dry_run` only says what would be done; every step
    /// with its verdict, oldest first. Without a hash the recipe is that of all checkpoints; fails with kind mismatch where they have
    /// several.
    ///
    /// Of each checkpoint the manifest goes first. A deletion that fails is logged, and the others go on.
    pub fn prune_now(&self, dry_run: bool, recipe_hash: Option<&str>) -> Result<Vec<(u64, Verdict)>> {
        let listed = self.list()?;
        let mut manifests = BTreeMap::new();
        for listed in &listed {
            manifests.insert(listed.step, self.found_manifest(listed)?);
        }
        let hashes: BTreeSet<&str> = manifests.values().flatten().map(|manifest| manifest.state.recipe_hash.as_str()).collect();
        let owner = match recipe_hash {
            Some(recipe_hash) => recipe_hash,
            None if hashes.len() > 1 => return Err(self.several_runs(&hashes).into()),
            None => hashes.first().copied().unwrap_or_default(),
        };
        let facts_of = |listed: &Listed| (listed.step, self.facts(listed, manifests.get(&listed.step).and_then(Option::as_deref), owner));
        let facts: BTreeMap<u64, Facts> = listed.iter().map(facts_of).collect();
        let verdicts = decide(&facts, &self.policy.limits());
        if !dry_run {
            for listed in &listed {
                let is_deleted = verdicts.get(&listed.step).is_some_and(|verdict| verdict.is_deletion());
                let is_good = facts.get(&listed.step).is_some_and(|facts| facts.is_good && facts.owner == Owner::Ours);
                let done = match (is_deleted, is_good) {
                    (true, _) => self.delete(listed),
                    (false, true) => self.tidy(listed),
                    (false, false) => Ok(()),
                };
                if let Err(error) = done {
                    tracing::warn!(checkpoint = self.step_url(listed.step), error = format!("{error:#}"), "deletion failed");
                }
            }
        }
        Ok(verdicts.into_iter().collect())
    }

    /// A step's manifest, whatever its files are like; `None` where there is none that can be read.
    fn found_manifest(&self, listed: &Listed) -> Result<Option<Arc<Manifest>>> {
        match self.readable_manifest(listed) {
            Ok(manifest) => Ok(Some(manifest)),
            Err(Unusable::Damaged(_)) => Ok(None),
            Err(Unusable::Store(error)) => Err(error),
        }
    }

    fn facts(&self, listed: &Listed, manifest: Option<&Manifest>, recipe_hash: &str) -> Facts {
        let Some(manifest) = manifest else { return Facts { owner: Owner::Unknown, is_good: false, is_temporary: false, loss: None } };
        let owner = if manifest.state.recipe_hash == recipe_hash { Owner::Ours } else { Owner::Other };
        let is_good = compare_sizes(listed, manifest).is_ok() && !self.memory().damaged.contains(&listed.step);
        Facts { owner, is_good, is_temporary: manifest.state.temporary, loss: manifest.state.loss }
    }

    fn several_runs(&self, hashes: &BTreeSet<&str>) -> Failure {
        Failure::new(FailureKind::Mismatch, "several runs have checkpoints here")
            .at(self.url())
            .expected("the checkpoints of one recipe")
            .found(format!("those of {}", hashes.iter().copied().collect::<Vec<_>>().join(", ")))
            .hint("name the run folder whose checkpoints are to be deleted")
    }

    fn delete(&self, listed: &Listed) -> Result<()> {
        let others = listed.files.keys().map(String::as_str).filter(|name| *name != MANIFEST_FILE);
        for name in std::iter::once(MANIFEST_FILE).chain(others) {
            store::delete(&self.store, &key(listed.step, name))?;
        }
        let mut memory = self.memory();
        memory.manifests.remove(&listed.step);
        memory.damaged.remove(&listed.step);
        drop(memory);
        store::remove_leftovers(&self.store, &folder(listed.step))?;
        if self.store.is_local() {
            // Buckets have no folders. A folder that still holds something else stays, and that is no error.
            drop(std::fs::remove_dir(self.step_url(listed.step)));
        }
        Ok(())
    }

    /// Removes what earlier attempts to save a step have left beside its checkpoint: files of another number of workers, and files
    /// whose writers were killed.
    fn tidy(&self, listed: &Listed) -> Result<()> {
        let Ok(manifest) = self.manifest(listed) else { return Ok(()) };
        let is_named = |name: &str| manifest.files.iter().any(|file| file.name == name);
        for name in listed.files.keys().filter(|name| is_reserved(name) && !is_named(name)) {
            store::delete(&self.store, &key(listed.step, name))?;
        }
        store::remove_leftovers(&self.store, &folder(listed.step))
    }
}
