//! The leader's part of a save: what makes the shares of all workers a checkpoint.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};
use bytes::Bytes;
use cloze_cluster::protocol::SavedFile;
use cloze_data::store::{self, ConditionalPut};
use cloze_recipes::failure::{Failure, FailureKind};
use serde_json::json;

use super::load::{Unusable, compare_sizes};
use super::manifest::{CheckpointState, INDEX_FILE, MANIFEST_FILE, Manifest, ManifestFile, key};
use super::pieces::{header_end, summary};
use super::store::{CheckpointStore, Saved};

/// Attempts to put a manifest: an answer may be lost, or a useless manifest be in the way.
const MANIFEST_ATTEMPTS: u32 = 3;
/// Bytes that are read of a file of weights to learn its tensors' names; most headers are shorter.
const HEADER_GUESS_BYTES: u64 = 64 << 10;

impl CheckpointStore {
    /// Makes the files of all workers the checkpoint of a step, and then deletes what is no longer needed.
    ///
    /// Every file must be in the store in its size. The manifest is put on the condition that there is none; one that says the same
    /// counts as ours. Fails with kind mismatch when another run has saved the step. A failed commit leaves no manifest of its own; a
    /// failed deletion is only logged, because the next commit tries again.
    pub fn commit(&self, state: &CheckpointState, files: Vec<SavedFile>) -> Result<Saved> {
        let deadline = Instant::now() + self.policy.upload_timeout;
        let mut manifest = Manifest::new(state.clone(), files.into_iter().map(ManifestFile::from).collect());
        manifest.check().map_err(|reason| self.incomplete(&manifest, reason))?;
        self.confirm(&manifest)?;
        if let Some(index) = self.save_index(&manifest, deadline)? {
            manifest.files.push(index);
        }
        manifest.files.sort();
        self.put_manifest(&manifest, deadline)?;
        self.memory().damaged.remove(&state.step);
        if let Some(cache) = &self.cache {
            cache.keep_only(state.step);
        }
        if let Err(error) = self.prune_now(false, Some(&state.recipe_hash)) {
            tracing::warn!(step = state.step, error = format!("{error:#}"), "old checkpoints could not be deleted");
        }
        Ok(Saved { url: self.step_url(state.step), bytes: manifest.bytes() })
    }

    /// Compares every file with the store's listing.
    fn confirm(&self, manifest: &Manifest) -> Result<()> {
        let listed = self.list_step(manifest.step)?;
        for file in &manifest.files {
            let reason = match listed.files.get(&file.name) {
                Some(size) if *size == file.size => continue,
                Some(size) => format!("{} has {size} bytes, its writer says {}", file.name, file.size),
                None => format!("{} is missing", file.name),
            };
            return Err(self.incomplete(manifest, reason).into());
        }
        Ok(())
    }

    fn incomplete(&self, manifest: &Manifest, reason: String) -> Failure {
        Failure::new(FailureKind::Storage, "the files of the workers do not make a checkpoint")
            .at(self.step_url(manifest.step))
            .expected(format!("the files of {} workers in the sizes that they wrote", manifest.state.world_size))
            .found(reason)
            .hint("a worker may have stopped while it wrote, or something else deletes objects there")
    }

    /// Writes the index that makes several files of weights one Hugging Face model, where they hold whole tensors.
    fn save_index(&self, manifest: &Manifest, deadline: Instant) -> Result<Option<ManifestFile>> {
        let names = manifest.model_names();
        if names.len() == 1 {
            return Ok(None);
        }
        let (mut weight_map, mut total_size) = (BTreeMap::new(), 0);
        for file in names {
            let header = self.header(manifest.step, &file)?;
            let found = summary(&header).with_context(|| format!("read the header of {file}"))?;
            if !found.is_whole {
                return Ok(None);
            }
            total_size += found.bytes;
            weight_map.extend(found.names.into_iter().map(|name| (name, file.clone())));
        }
        let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
        let content = Bytes::from(serde_json::to_vec_pretty(&index).context("write the index of the weights")?);
        Ok(Some(self.save_file(manifest.step, INDEX_FILE, &[content], deadline)?.into()))
    }

    /// The header of a file of tensors, with the length that precedes it.
    fn header(&self, step: u64, file: &str) -> Result<Bytes> {
        let key = key(step, file);
        let start = store::read_range(&self.store, &key, 0..HEADER_GUESS_BYTES)?;
        let end = header_end(&start).with_context(|| format!("read the header of {file}"))?;
        if end <= start.len() as u64 {
            return Ok(start.slice(..end as usize));
        }
        store::read_range(&self.store, &key, 0..end)
    }

    fn put_manifest(&self, manifest: &Manifest, deadline: Instant) -> Result<()> {
        let content = Bytes::from(serde_json::to_vec_pretty(manifest).context("write the manifest")?);
        let mut last_error = None;
        for _ in 0..MANIFEST_ATTEMPTS {
            match self.create_manifest(manifest.step, &content) {
                Ok(true) => return Ok(()),
                Ok(false) if self.settle(manifest)? => return Ok(()),
                Ok(false) => {}
                Err(error) if Instant::now() >= deadline => return Err(error),
                // The answer may be all that was lost; the next attempt finds out.
                Err(error) => last_error = Some(error),
            }
        }
        Err(last_error.unwrap_or_else(|| self.incomplete(manifest, format!("{MANIFEST_FILE} comes back whenever it is withdrawn")).into()))
    }

    /// Puts the manifest where there is none; false where there is one.
    fn create_manifest(&self, step: u64, content: &Bytes) -> Result<bool> {
        let key = key(step, MANIFEST_FILE);
        if self.conditional_put()? == ConditionalPut::Honoured {
            return store::put_if_absent(&self.store, &key, content.clone());
        }
        if store::size_of(&self.store, &key)?.is_some() {
            return Ok(false);
        }
        store::put(&self.store, &key, content.clone()).map(|()| true)
    }

    /// Decides on a manifest that is there already: true where the step counts as saved, false where it was useless and is withdrawn.
    fn settle(&self, ours: &Manifest) -> Result<bool> {
        let step = ours.step;
        self.memory().manifests.remove(&step);
        let listed = self.list_step(step)?;
        if !listed.has_manifest() {
            return Ok(false);
        }
        let theirs = match self.readable_manifest(&listed) {
            Ok(theirs) => theirs,
            Err(Unusable::Store(error)) => return Err(error),
            Err(Unusable::Damaged(_)) => return self.withdraw(step).map(|()| false),
        };
        // Another run's manifest is a conflict whatever its files are like by now.
        if theirs.state.recipe_hash != ours.state.recipe_hash {
            return Err(self.conflict(&theirs, &ours.state.recipe_hash).into());
        }
        // What it names may have been overwritten by the files of this save, or have been damaged before.
        let is_same = theirs.shares() == ours.shares();
        let to_read: &[ManifestFile] = if is_same { &[] } else { &theirs.files };
        let read = |()| to_read.iter().try_for_each(|file| self.stored_content(step, file).map(|_| ()));
        match compare_sizes(&listed, &theirs).and_then(read) {
            Ok(()) if is_same => return Ok(true),
            Ok(()) => {}
            Err(Unusable::Store(error)) => return Err(error),
            Err(Unusable::Damaged(_)) => return self.withdraw(step).map(|()| false),
        }
        if theirs.state.world_size != ours.state.world_size {
            // An earlier membership of this run has completed the step after all; its state is as good.
            tracing::warn!(step, world_size = theirs.state.world_size, "checkpoint of this step was completed by other workers");
            return Ok(true);
        }
        Err(self.conflict(&theirs, &ours.state.recipe_hash).into())
    }

    /// Two runs write to one place.
    pub(super) fn conflict(&self, theirs: &Manifest, recipe_hash: &str) -> Failure {
        let said = |recipe_hash: &str, what: &str| format!("{what} of recipe {recipe_hash}");
        Failure::new(FailureKind::Mismatch, "another run saves its checkpoints here")
            .at(self.step_url(theirs.step))
            .expected(said(recipe_hash, "no checkpoint of this step, or the one"))
            .found(said(&theirs.state.recipe_hash, "another one"))
            .hint("give every run a `checkpoint.url` of its own")
    }
}
