//! Deleting what is no longer needed.

use std::collections::BTreeMap;

use anyhow::Result;
use cloze_data::store;

use super::load::Unusable;
use super::manifest::{MANIFEST_FILE, folder, is_reserved, key};
use super::retention::{Facts, Verdict, decide};
use super::store::{CheckpointStore, Listed};

impl CheckpointStore {
    /// Applies the policy to what is there, or with `dry_run` only says what would be done; every step with its verdict, oldest first.
    ///
    /// Of each checkpoint the manifest goes first. A deletion that fails is logged, and the others go on.
    pub fn prune_now(&self, dry_run: bool) -> Result<Vec<(u64, Verdict)>> {
        let listed = self.list()?;
        let mut facts = BTreeMap::new();
        for listed in &listed {
            facts.insert(listed.step, self.facts(listed)?);
        }
        let verdicts = decide(&facts, &self.policy.limits());
        if !dry_run {
            for listed in &listed {
                let is_deleted = verdicts.get(&listed.step).is_some_and(|verdict| verdict.is_deletion());
                let is_good = facts.get(&listed.step).is_some_and(|facts| facts.is_good);
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

    fn facts(&self, listed: &Listed) -> Result<Facts> {
        match self.manifest(listed) {
            Ok(manifest) => {
                let is_good = !self.memory().damaged.contains(&listed.step);
                Ok(Facts { is_good, is_temporary: manifest.state.temporary, loss: manifest.state.loss })
            }
            Err(Unusable::Damaged(_)) => Ok(Facts { is_good: false, is_temporary: false, loss: None }),
            Err(Unusable::Store(error)) => Err(error),
        }
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
