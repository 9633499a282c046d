//! The checkpoints of one run: where they are, what is there, and what every worker writes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use cloze_cluster::protocol::SavedFile;
use cloze_data::store::{self, ConditionalPut, ObjectInfo, Store};

use super::cache::Cache;
use super::format::NamedTensorOwned;
use super::load::{Unusable, compare_sizes};
use super::manifest::{
    CheckpointState, MANIFEST_FILE, Manifest, folder, is_file_name, is_reserved, key, model_file, optimizer_file, parse_key,
};
use super::pieces::{Piece, encode};
use super::retention::Limits;

/// Time to store one checkpoint where nothing else is said.
const DEFAULT_UPLOAD_TIMEOUT: Duration = Duration::from_mins(10);

/// How checkpoints are kept and stored.
#[derive(Clone, Debug)]
pub struct StorePolicy {
    /// Newest good checkpoints that are kept; at least two are kept in any case.
    pub keep_last: u32,
    /// Checkpoints with the lowest losses that are kept as well.
    pub keep_best: u32,
    /// Checkpoints of steps that are a multiple of this are kept for good.
    pub keep_every_steps: Option<u64>,
    /// Folder on a local disk for a copy of the newest checkpoint.
    pub cache: Option<PathBuf>,
    /// Longest time to store one worker's share.
    pub upload_timeout: Duration,
}

impl Default for StorePolicy {
    fn default() -> Self {
        Self { keep_last: 2, keep_best: 0, keep_every_steps: None, cache: None, upload_timeout: DEFAULT_UPLOAD_TIMEOUT }
    }
}

impl StorePolicy {
    /// What pruning goes by.
    pub(super) fn limits(&self) -> Limits {
        Limits { last: self.keep_last as usize, best: self.keep_best as usize, every_steps: self.keep_every_steps }
    }
}

/// What one worker writes of a checkpoint. The shares of all ranks together are the state, each value once.
#[derive(Clone, Debug)]
pub struct Share {
    /// Rank of the worker.
    pub rank: u32,
    /// Number of workers.
    pub world_size: u32,
    /// Its part of the weights.
    pub model: Vec<Piece>,
    /// Its part of the optimizer's state.
    pub optimizer: Vec<Piece>,
    /// Files that are stored as they are, by name; one worker writes them.
    pub companions: Vec<(String, Bytes)>,
}

/// What a save has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Where the checkpoint is.
    pub url: String,
    /// Size of its files without the manifest.
    pub bytes: u64,
}

/// A checkpoint whose files all agree with its manifest.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The run's state.
    pub state: CheckpointState,
    /// The weights, by name.
    pub model: Vec<NamedTensorOwned>,
    /// The optimizer's state, by name.
    pub optimizer: Vec<NamedTensorOwned>,
    /// Where the checkpoint is.
    pub url: String,
    /// Newer ones that are not usable, newest first, each with its reason.
    pub skipped: Vec<String>,
}

/// The objects of one step; with a manifest or without.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The step.
    pub step: u64,
    /// Size in bytes by file name.
    pub files: BTreeMap<String, u64>,
    /// Changes when the manifest is written again.
    pub(super) manifest_version: String,
}

impl Listed {
    /// Whether there is a manifest, which may be damaged; without one there is no checkpoint.
    pub fn has_manifest(&self) -> bool {
        self.files.contains_key(MANIFEST_FILE)
    }
}

/// The checkpoints of one run.
pub struct CheckpointStore {
    pub(super) store: Store,
    pub(super) policy: StorePolicy,
    pub(super) cache: Option<Cache>,
    memory: Mutex<Memory>,
}

/// What was found out about the store, so that it need not be asked again.
#[derive(Default)]
pub(super) struct Memory {
    /// Steps whose content was found damaged; their sizes alone may look right.
    pub(super) damaged: BTreeSet<u64>,
    /// Manifests that were read, each with its version in the listing.
    pub(super) manifests: BTreeMap<u64, (String, Arc<Manifest>)>,
    /// What the store does with a conditional write.
    pub(super) conditional_put: Option<ConditionalPut>,
}

impl CheckpointStore {
    /// Opens a path or the url of a bucket; nothing is read or created yet. At least two good checkpoints are always kept.
    pub fn open(url: &str, options: &BTreeMap<String, String>, policy: StorePolicy) -> Result<Self> {
        Ok(Self::over(store::open(url, options)?, policy))
    }

    /// The checkpoints in a store that is open already.
    pub(super) fn over(store: Store, policy: StorePolicy) -> Self {
        let cache = policy.cache.clone().map(Cache::new);
        Self { store, policy, cache, memory: Mutex::default() }
    }

    /// Where the checkpoints are, for people.
    pub fn url(&self) -> &str {
        &self.store.display_url
    }

    /// Where the checkpoint of a step is, for people.
    pub fn step_url(&self, step: u64) -> String {
        self.store.url(&folder(step))
    }

    /// Finds out whether the store honours conditional writes; a warning where it does not, and a weaker protocol is used.
    pub fn probe(&self) -> Result<Option<String>> {
        let weakness = match self.conditional_put()? {
            ConditionalPut::Honoured => return Ok(None),
            ConditionalPut::Ignored => "takes conditional writes and ignores the condition",
            ConditionalPut::Unsupported => "has no conditional writes",
        };
        Ok(Some(format!(
            "the store of {} {weakness}: manifests are written after a look that found none, so two runs that save the same step here at \
             the same moment would not be noticed; give every run a `checkpoint.url` of its own",
            self.store.display_url
        )))
    }

    /// Writes one worker's share of a checkpoint. Without a manifest that names them the files are no checkpoint.
    ///
    /// Fails when the store fails for longer than its retries, and when not everything is stored within the time limit.
    pub fn save_share(&self, step: u64, share: &Share) -> Result<Vec<SavedFile>> {
        let deadline = Instant::now() + self.policy.upload_timeout;
        ensure!(share.rank < share.world_size, "rank {} is none of {} workers", share.rank, share.world_size);
        let mut files = vec![
            (model_file(share.rank, share.world_size), encode(&share.model).context("write the weights")?),
            (optimizer_file(share.rank, share.world_size), encode(&share.optimizer).context("write the optimizer state")?),
        ];
        for (name, content) in &share.companions {
            let is_free = !is_reserved(name) && files.iter().all(|(other, _)| other != name);
            ensure!(is_file_name(name) && is_free, "`{name}` is no name for a file of a checkpoint, or is taken");
            files.push((name.clone(), vec![content.clone()]));
        }
        let mut saved = Vec::new();
        for (name, pieces) in &files {
            saved.push(self.save_file(step, name, pieces, deadline)?);
            // One worker of a machine is enough to fill a cache; the leader's files are those that it knows to be whole.
            if let Some(cache) = self.cache.as_ref().filter(|_| share.rank == 0) {
                cache.write(step, name, pieces);
            }
        }
        Ok(saved)
    }

    /// Every step that has objects, oldest first, with or without a manifest.
    pub fn list(&self) -> Result<Vec<Listed>> {
        Ok(by_step(store::list(&self.store)?))
    }

    /// The objects of one step.
    pub(super) fn list_step(&self, step: u64) -> Result<Listed> {
        let found = by_step(store::list_below(&self.store, &folder(step))?).into_iter().find(|listed| listed.step == step);
        Ok(found.unwrap_or(Listed { step, files: BTreeMap::new(), manifest_version: String::new() }))
    }

    /// Whether a step's checkpoint is there: its manifest is, and its files have the sizes that it states. Asked by the leader before
    /// all workers save the step.
    ///
    /// A manifest that is not usable is withdrawn: it must not vouch for a mixture of old files and new ones. Fails with kind mismatch
    /// where another run has saved the step.
    pub fn is_saved(&self, step: u64, recipe_hash: &str) -> Result<bool> {
        let listed = self.list_step(step)?;
        if !listed.has_manifest() {
            return Ok(false);
        }
        let found = self.readable_manifest(&listed).and_then(|manifest| {
            let is_ours = manifest.state.recipe_hash == recipe_hash;
            // Another run's manifest is a conflict whatever its files are like by now.
            if is_ours { compare_sizes(&listed, &manifest).map(|()| None) } else { Ok(Some(self.conflict(&manifest, recipe_hash))) }
        });
        match found {
            Ok(Some(conflict)) => Err(conflict.into()),
            Ok(None) if !self.memory().damaged.contains(&step) => Ok(true),
            Ok(None) | Err(Unusable::Damaged(_)) => {
                self.withdraw(step)?;
                Ok(false)
            }
            Err(Unusable::Store(error)) => Err(error),
        }
    }

    /// What the store does with a conditional write; it is tried once.
    pub(super) fn conditional_put(&self) -> Result<ConditionalPut> {
        if let Some(known) = self.memory().conditional_put {
            return Ok(known);
        }
        let found = store::probe_conditional_put(&self.store)?;
        self.memory().conditional_put = Some(found);
        Ok(found)
    }

    /// Deletes a step's manifest, and with it the checkpoint.
    pub(super) fn withdraw(&self, step: u64) -> Result<()> {
        tracing::warn!(checkpoint = self.step_url(step), "unusable checkpoint withdrawn");
        self.memory().manifests.remove(&step);
        store::delete(&self.store, &key(step, MANIFEST_FILE))
    }

    pub(super) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores one file.
    pub(super) fn save_file(&self, step: u64, name: &str, pieces: &[Bytes], deadline: Instant) -> Result<SavedFile> {
        let written = store::put_pieces(&self.store, &key(step, name), pieces, deadline)?;
        Ok(SavedFile { name: name.to_owned(), size: written.size, blake3: written.blake3 })
    }
}

fn by_step(objects: Vec<ObjectInfo>) -> Vec<Listed> {
    let mut steps: BTreeMap<u64, Listed> = BTreeMap::new();
    for object in objects {
        let Some((step, file)) = parse_key(&object.key) else { continue };
        let listed = steps.entry(step).or_insert_with(|| Listed { step, files: BTreeMap::new(), manifest_version: String::new() });
        listed.files.insert(file.to_owned(), object.size);
        if file == MANIFEST_FILE {
            let etag = object.etag.as_deref().unwrap_or_default();
            listed.manifest_version = format!("{} {} {etag}", object.size, object.last_modified_us);
        }
    }
    steps.into_values().collect()
}
