//! Finding, reading and verifying checkpoints.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Result, anyhow};
use bytes::Bytes;
use cloze_data::store;
use cloze_recipes::failure::{Failure, FailureKind};

use super::format::NamedTensorOwned;
use super::manifest::{Flaw, MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, ManifestFile, folder, key, newer_failure};
use super::pieces::{decode_pieces, merge};
use super::store::{CheckpointStore, Listed, Loaded};

/// Files of a checkpoint that are read side by side, each in up to four parts of 8 MiB: enough to fill a fast link, and few enough for a
/// small machine.
const FILES_IN_FLIGHT: usize = 4;

/// Why a checkpoint was not loaded: it is damaged, or the store failed and nothing is known about it.
pub(super) enum Unusable {
    /// The reason, to show.
    Damaged(String),
    /// The store's failure, or that of a program that is too old for what lies there.
    Store(anyhow::Error),
}

/// Contents of files, by name.
type Contents = BTreeMap<String, Bytes>;

impl CheckpointStore {
    /// The newest checkpoint whose files all agree with its manifest; `None` where no save was ever completed.
    ///
    /// Fails when there are checkpoints but none is usable, and when the store does not answer: an outage must not look like
    /// damage, or a run would silently go back in time.
    pub fn latest_good(&self) -> Result<Option<Loaded>> {
        let mut skipped = Vec::new();
        let mut num_with_manifest = 0;
        for listed in self.list()?.iter().rev() {
            num_with_manifest += usize::from(listed.has_manifest());
            match self.load(listed) {
                Ok(loaded) => return Ok(Some(Loaded { skipped, ..loaded })),
                Err(Unusable::Store(error)) => return Err(error),
                Err(Unusable::Damaged(reason)) => {
                    self.memory().damaged.insert(listed.step);
                    skipped.push(format!("{}: {reason}", self.step_url(listed.step)));
                }
            }
        }
        if num_with_manifest == 0 {
            return Ok(None);
        }
        Err(Failure::new(FailureKind::Damaged, "no checkpoint is usable")
            .at(self.url())
            .expected("at least one whose files agree with its manifest")
            .found(skipped.join("; "))
            .hint("bring the files back from a copy, or move the folder away to start from scratch")
            .into())
    }

    /// The checkpoint of one step. Fails with kind input where there is none, and with kind damaged where it is not usable.
    pub fn load_step(&self, step: u64) -> Result<Loaded> {
        let listed = self.existing(step)?;
        self.load(&listed).map_err(|unusable| self.as_failure(step, unusable))
    }

    /// The files of a step without tensors, such as the tokenizer's, by name.
    pub fn companions(&self, step: u64) -> Result<Vec<(String, Bytes)>> {
        let listed = self.existing(step)?;
        let read = || -> Result<Vec<(String, Bytes)>, Unusable> {
            let manifest = self.manifest(&listed)?;
            let contents = self.contents(step, &manifest.companions())?;
            Ok(contents.into_iter().collect())
        };
        read().map_err(|unusable| self.as_failure(step, unusable))
    }

    /// Reads and verifies one checkpoint.
    fn load(&self, listed: &Listed) -> Result<Loaded, Unusable> {
        let manifest = self.manifest(listed)?;
        let contents = self.contents(listed.step, &manifest.files.iter().collect::<Vec<_>>())?;
        let loaded = Loaded {
            state: manifest.state.clone(),
            model: tensors(&contents, &manifest.model_names())?,
            optimizer: tensors(&contents, &manifest.optimizer_names())?,
            url: self.step_url(listed.step),
            skipped: Vec::new(),
        };
        if let Some(cache) = &self.cache {
            cache.keep_only(listed.step);
        }
        Ok(loaded)
    }

    /// A step's manifest, compared with the listing, which costs no more than its own few bytes.
    pub(super) fn manifest(&self, listed: &Listed) -> Result<Arc<Manifest>, Unusable> {
        let manifest = self.readable_manifest(listed)?;
        compare_sizes(listed, &manifest)?;
        Ok(manifest)
    }

    /// A step's manifest, whatever its files are like.
    pub(super) fn readable_manifest(&self, listed: &Listed) -> Result<Arc<Manifest>, Unusable> {
        let Some(size) = listed.files.get(MANIFEST_FILE) else {
            return Err(Unusable::Damaged(format!("{MANIFEST_FILE} is missing: the save was not completed")));
        };
        if *size > MAX_MANIFEST_BYTES {
            return Err(Unusable::Damaged(format!("{MANIFEST_FILE} has {size} bytes, more than {MAX_MANIFEST_BYTES}")));
        }
        self.read_manifest(listed, *size)
    }

    /// Reads a manifest, or remembers it where it has not been written again since: a run that keeps a thousand checkpoints must not
    /// read a thousand manifests after every save.
    fn read_manifest(&self, listed: &Listed, size: u64) -> Result<Arc<Manifest>, Unusable> {
        if let Some((version, manifest)) = self.memory().manifests.get(&listed.step)
            && *version == listed.manifest_version
        {
            return Ok(Arc::clone(manifest));
        }
        let (bytes, _) = self.read(&key(listed.step, MANIFEST_FILE), size)?;
        let manifest = Manifest::parse(&bytes, listed.step).map_err(|flaw| match flaw {
            Flaw::Damaged(reason) => Unusable::Damaged(reason),
            // It must be neither passed over nor withdrawn: it is good, and newer than what this program would go on from.
            Flaw::Newer(format_version) => Unusable::Store(newer_failure(self.step_url(listed.step), format_version).into()),
        })?;
        let manifest = Arc::new(manifest);
        self.memory().manifests.insert(listed.step, (listed.manifest_version.clone(), Arc::clone(&manifest)));
        Ok(manifest)
    }

    /// Reads and verifies files, several at a time.
    fn contents(&self, step: u64, files: &[&ManifestFile]) -> Result<Contents, Unusable> {
        let mut contents = Contents::new();
        for some in files.chunks(FILES_IN_FLIGHT) {
            let read: Vec<Result<Bytes, Unusable>> = thread::scope(|scope| {
                let named = || thread::Builder::new().name("checkpoint-reader".to_owned());
                let readers: Vec<_> = some.iter().map(|file| named().spawn_scoped(scope, move || self.content(step, file))).collect();
                readers.into_iter().map(joined).collect()
            });
            for (file, content) in some.iter().zip(read) {
                contents.insert(file.name.clone(), content?);
            }
        }
        Ok(contents)
    }

    /// One verified file, from the cache or the store.
    fn content(&self, step: u64, file: &ManifestFile) -> Result<Bytes, Unusable> {
        if let Some(content) = self.cache.as_ref().and_then(|cache| cache.read(step, file)) {
            return Ok(content);
        }
        let content = self.stored_content(step, file)?;
        if let Some(cache) = &self.cache {
            cache.write(step, &file.name, std::slice::from_ref(&content));
        }
        Ok(content)
    }

    /// One verified file from the store.
    pub(super) fn stored_content(&self, step: u64, file: &ManifestFile) -> Result<Bytes, Unusable> {
        let (content, hash) = self.read(&key(step, &file.name), file.size)?;
        if hash == file.blake3 {
            return Ok(content);
        }
        Err(Unusable::Damaged(format!("{} has BLAKE3 hash {hash}, the manifest says {}", file.name, file.blake3)))
    }

    /// Reads an object of a known size. One that has gone or grown since it was listed is damage, any other failure is the store's.
    fn read(&self, key: &str, size: u64) -> Result<(Bytes, String), Unusable> {
        store::read_hashed(&self.store, key, size).map_err(|error| match error.downcast_ref::<Failure>() {
            Some(failure) if failure.kind == FailureKind::Input => Unusable::Damaged(failure.to_string().replace("\n  ", ", ")),
            _ => Unusable::Store(error),
        })
    }

    /// The objects of a step that has some.
    pub(super) fn existing(&self, step: u64) -> Result<Listed> {
        let listed = self.list_step(step)?;
        if !listed.files.is_empty() {
            return Ok(listed);
        }
        let steps = self.list()?.iter().map(|listed| listed.step.to_string()).collect::<Vec<_>>().join(", ");
        Err(Failure::new(FailureKind::Input, "there is no checkpoint of this step")
            .at(self.store.url(&folder(step)))
            .found(if steps.is_empty() { "no checkpoint at all".to_owned() } else { format!("steps {steps}") })
            .into())
    }

    fn as_failure(&self, step: u64, unusable: Unusable) -> anyhow::Error {
        match unusable {
            Unusable::Store(error) => error,
            Unusable::Damaged(reason) => {
                Failure::new(FailureKind::Damaged, "the checkpoint is not usable").at(self.step_url(step)).found(reason).into()
            }
        }
    }
}

fn joined(reader: io::Result<ScopedJoinHandle<'_, Result<Bytes, Unusable>>>) -> Result<Bytes, Unusable> {
    let reader = reader.map_err(|error| Unusable::Store(anyhow::Error::new(error).context("start a thread to read a checkpoint")))?;
    reader.join().unwrap_or_else(|_| Err(Unusable::Store(anyhow!("reading a file of a checkpoint panicked"))))
}

/// Compares the files that a manifest names with the listing.
pub(super) fn compare_sizes(listed: &Listed, manifest: &Manifest) -> Result<(), Unusable> {
    manifest.files.iter().try_for_each(|file| compare_size(listed, file))
}

/// Compares one file with the listing.
pub(super) fn compare_size(listed: &Listed, file: &ManifestFile) -> Result<(), Unusable> {
    match listed.files.get(&file.name) {
        Some(size) if *size == file.size => Ok(()),
        Some(size) => Err(Unusable::Damaged(format!("{} has {size} bytes, the manifest says {}", file.name, file.size))),
        None => Err(Unusable::Damaged(format!("{} is missing", file.name))),
    }
}

/// The whole tensors that some files hold between them.
pub(super) fn tensors(contents: &Contents, names: &[String]) -> Result<Vec<NamedTensorOwned>, Unusable> {
    let mut pieces = Vec::new();
    for name in names {
        let content = contents.get(name).ok_or_else(|| Unusable::Damaged(format!("{name} is missing")))?;
        pieces.extend(decode_pieces(content).map_err(|error| Unusable::Damaged(format!("{name} is not readable: {error:#}")))?);
    }
    merge(pieces).map_err(Unusable::Damaged)
}
