//! Saving, finding and pruning checkpoints in a bucket or a folder.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, anyhow, ensure};
use bytes::Bytes;
use cloze_data::store::{self, Store};
use cloze_recipes::failure::{Failure, FailureKind};
use futures::stream::{self, StreamExt, TryStreamExt};
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, PutMultipartOptions, PutPayload};

use super::format::{NamedTensorOwned, decode, encode};
use super::manifest::{
    CheckpointState, MANIFEST_FILE, MAX_MANIFEST_BYTES, MODEL_FILE, Manifest, ManifestFile, OPTIMIZER_FILE, folder, is_file_name, key,
    parse_key,
};
use super::retention::steps_to_delete;

/// Files are uploaded in parts of this size, and smaller ones in one request; stores want at least 5 MiB.
const PART_BYTES: usize = 16 << 20;
/// Parts of one file under way at a time: 64 MiB, enough to fill a fast link while single requests wait.
const PARTS_IN_FLIGHT: usize = 4;

/// The checkpoints of one run.
pub struct CheckpointStore {
    store: Store,
    keep_last: usize,
    /// Steps whose content was found damaged; their sizes alone may look right.
    damaged: Mutex<BTreeSet<u64>>,
}

/// What a save has written.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// Where the checkpoint is.
    pub url: String,
    /// Size of its files without the manifest.
    pub bytes: u64,
    /// Time the save took, pruning included.
    pub seconds: f64,
}

/// A checkpoint whose files all agree with its manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
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
}

/// Why a checkpoint was not loaded: it is damaged, or the store failed and nothing is known about it.
enum Unusable {
    Damaged(String),
    Store(anyhow::Error),
}

impl CheckpointStore {
    /// Opens a path, `file://` or `s3://` url; nothing is read or created yet. At least two good checkpoints are always kept.
    pub fn open(url: &str, options: &BTreeMap<String, String>, keep_last: u32) -> anyhow::Result<Self> {
        let store = store::open(url, options)?;
        Ok(Self { store, keep_last: keep_last as usize, damaged: Mutex::new(BTreeSet::new()) })
    }

    /// Writes a checkpoint and then deletes what is no longer needed.
    ///
    /// `extra_files` are stored as they are under their names. A failed save leaves no manifest, and so no checkpoint; a failed
    /// deletion is only logged, because the next save tries again.
    pub fn save(
        &self,
        state: &CheckpointState,
        model: &[NamedTensorOwned],
        optimizer: &[NamedTensorOwned],
        extra_files: &[(String, Bytes)],
    ) -> anyhow::Result<Saved> {
        let started = Instant::now();
        let mut files = vec![
            (MODEL_FILE.to_owned(), encode(model).context("write the weights")?),
            (OPTIMIZER_FILE.to_owned(), encode(optimizer).context("write the optimizer state")?),
        ];
        for (name, content) in extra_files {
            let is_free = files.iter().all(|(other, _)| other != name);
            ensure!(is_file_name(name) && is_free, "`{name}` is no name for a file of a checkpoint, or is taken");
            files.push((name.clone(), content.clone()));
        }
        // A manifest from before must not vouch for a mixture of old and new files.
        store::delete(&self.store, &key(state.step, MANIFEST_FILE))?;
        let entries = files.iter().map(|(name, content)| self.upload(state.step, name, content)).collect::<anyhow::Result<Vec<_>>>()?;
        let manifest = serde_json::to_vec_pretty(&Manifest::new(state.clone(), entries)).context("write the manifest")?;
        store::put(&self.store, &key(state.step, MANIFEST_FILE), manifest)?;
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner).remove(&state.step);
        if let Err(error) = self.prune() {
            tracing::warn!(step = state.step, error = format!("{error:#}"), "old checkpoints could not be deleted");
        }
        Ok(Saved {
            url: self.store.url(&folder(state.step)),
            bytes: files.iter().map(|(_, content)| content.len() as u64).sum(),
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// The newest checkpoint whose files all agree with its manifest; `None` where no save was ever completed.
    ///
    /// Fails when there are checkpoints but none is usable, and when the store does not answer: an outage must not look like
    /// damage, or a run would silently go back in time.
    pub fn latest_good(&self) -> anyhow::Result<Option<Loaded>> {
        let mut skipped = Vec::new();
        let mut num_with_manifest = 0;
        for listed in self.list()?.iter().rev() {
            num_with_manifest += usize::from(listed.files.contains_key(MANIFEST_FILE));
            match self.load(listed) {
                Ok(loaded) => return Ok(Some(Loaded { skipped, ..loaded })),
                Err(Unusable::Store(error)) => return Err(error),
                Err(Unusable::Damaged(reason)) => {
                    self.damaged.lock().unwrap_or_else(PoisonError::into_inner).insert(listed.step);
                    skipped.push(format!("{}: {reason}", self.store.url(&folder(listed.step))));
                }
            }
        }
        if num_with_manifest == 0 {
            return Ok(None);
        }
        Err(Failure::new(FailureKind::Damaged, "no checkpoint is usable")
            .at(&self.store.display_url)
            .expected("at least one whose files agree with its manifest")
            .found(skipped.join("; "))
            .hint("bring the files back from a copy, or move the folder away to start from scratch")
            .into())
    }

    /// Every step that has objects, oldest first, with or without a manifest.
    pub fn list(&self) -> anyhow::Result<Vec<Listed>> {
        let mut steps: BTreeMap<u64, BTreeMap<String, u64>> = BTreeMap::new();
        for object in store::list(&self.store)? {
            if let Some((step, file)) = parse_key(&object.key) {
                steps.entry(step).or_default().insert(file.to_owned(), object.size);
            }
        }
        Ok(steps.into_iter().map(|(step, files)| Listed { step, files }).collect())
    }

    /// Stores one file and hashes the same bytes meanwhile.
    fn upload(&self, step: u64, name: &str, content: &Bytes) -> anyhow::Result<ManifestFile> {
        let hash = thread::scope(|scope| {
            let hasher = thread::Builder::new().name("checkpoint-hash".to_owned()).spawn_scoped(scope, || blake3::hash(content));
            let hasher = hasher.context("start a thread to hash a checkpoint")?;
            self.put(&key(step, name), content)?;
            hasher.join().map_err(|_| anyhow!("hashing {name} panicked"))
        })?;
        Ok(ManifestFile { name: name.to_owned(), size: content.len() as u64, blake3: hash.to_hex().to_string() })
    }

    /// Writes an object that appears whole or not at all.
    fn put(&self, key: &str, content: &Bytes) -> anyhow::Result<()> {
        if content.len() <= PART_BYTES {
            return store::put(&self.store, key, content.clone());
        }
        let path = self.store.path(key)?;
        let started = Instant::now();
        let result = store::block_on(put_parts(self.store.object_store.as_ref(), &path, content))?;
        result.map_err(|error| store::explain(&self.store, "write object", key, started, &error))?;
        Ok(())
    }

    /// Reads and verifies one checkpoint.
    fn load(&self, listed: &Listed) -> Result<Loaded, Unusable> {
        let manifest = self.read_manifest(listed)?;
        let mut contents = BTreeMap::new();
        for file in &manifest.files {
            let content = self.read(&key(listed.step, &file.name), file.size)?;
            let hash = blake3::hash(&content).to_hex();
            if hash.as_str() != file.blake3 {
                return Err(Unusable::Damaged(format!("{} has BLAKE3 hash {hash}, the manifest says {}", file.name, file.blake3)));
            }
            contents.insert(file.name.as_str(), content);
        }
        let tensors = |name: &str| {
            let content = contents.get(name).ok_or_else(|| Unusable::Damaged(format!("{name} is missing")))?;
            decode(content).map_err(|error| Unusable::Damaged(format!("{name} is not readable: {error:#}")))
        };
        let (model, optimizer) = (tensors(MODEL_FILE)?, tensors(OPTIMIZER_FILE)?);
        Ok(Loaded { state: manifest.state, model, optimizer, url: self.store.url(&folder(listed.step)), skipped: Vec::new() })
    }

    /// Reads a manifest and compares it with the listing, which costs no more than its own few bytes.
    fn read_manifest(&self, listed: &Listed) -> Result<Manifest, Unusable> {
        let Some(size) = listed.files.get(MANIFEST_FILE) else {
            return Err(Unusable::Damaged(format!("{MANIFEST_FILE} is missing: the save was not completed")));
        };
        if *size > MAX_MANIFEST_BYTES {
            return Err(Unusable::Damaged(format!("{MANIFEST_FILE} has {size} bytes, more than {MAX_MANIFEST_BYTES}")));
        }
        let bytes = self.read(&key(listed.step, MANIFEST_FILE), *size)?;
        let manifest = Manifest::parse(&bytes, listed.step).map_err(Unusable::Damaged)?;
        for file in &manifest.files {
            match listed.files.get(&file.name) {
                Some(size) if *size == file.size => {}
                Some(size) => {
                    return Err(Unusable::Damaged(format!("{} has {size} bytes, the manifest says {}", file.name, file.size)));
                }
                None => return Err(Unusable::Damaged(format!("{} is missing", file.name))),
            }
        }
        Ok(manifest)
    }

    /// Reads an object of a known size. One that has gone or grown since it was listed is damage, any other failure is the store's.
    fn read(&self, key: &str, size: u64) -> Result<Bytes, Unusable> {
        store::read_all(&self.store, key, size).map_err(|error| match error.downcast_ref::<Failure>() {
            Some(failure) if failure.kind == FailureKind::Input => Unusable::Damaged(failure.to_string().replace("\n  ", ", ")),
            _ => Unusable::Store(error),
        })
    }

    /// Deletes what is no longer needed, oldest first; of each checkpoint the manifest first.
    fn prune(&self) -> anyhow::Result<()> {
        let listed = self.list()?;
        let mut good = BTreeSet::new();
        for listed in &listed {
            match self.read_manifest(listed) {
                Ok(_) => good.insert(listed.step),
                Err(Unusable::Damaged(_)) => false,
                Err(Unusable::Store(error)) => return Err(error),
            };
        }
        let damaged = self.damaged.lock().unwrap_or_else(PoisonError::into_inner).clone();
        good.retain(|step| !damaged.contains(step));
        let steps: BTreeSet<u64> = listed.iter().map(|listed| listed.step).collect();
        let to_delete: BTreeSet<u64> = steps_to_delete(&steps, &good, self.keep_last).into_iter().collect();
        for listed in listed.iter().filter(|listed| to_delete.contains(&listed.step)) {
            self.delete(listed)?;
        }
        Ok(())
    }

    fn delete(&self, listed: &Listed) -> anyhow::Result<()> {
        let others = listed.files.keys().map(String::as_str).filter(|name| *name != MANIFEST_FILE);
        for name in std::iter::once(MANIFEST_FILE).chain(others) {
            store::delete(&self.store, &key(listed.step, name))?;
        }
        if self.store.is_local() {
            // Buckets have no folders. A folder that still holds something else stays, and that is no error.
            drop(std::fs::remove_dir(self.store.url(&folder(listed.step))));
        }
        Ok(())
    }
}

/// Uploads slices of `content` side by side; the object appears once all are there, and a failed upload is withdrawn.
async fn put_parts(object_store: &dyn ObjectStore, path: &ObjectPath, content: &Bytes) -> object_store::Result<()> {
    let mut upload = object_store.put_multipart_opts(path, PutMultipartOptions::default()).await?;
    let starts = (0..content.len()).step_by(PART_BYTES);
    let slices = starts.map(|start| content.slice(start..content.len().min(start + PART_BYTES)));
    let uploads: Vec<_> = slices.map(|slice| upload.put_part(PutPayload::from(slice))).collect();
    let sent = stream::iter(uploads).buffer_unordered(PARTS_IN_FLIGHT).try_for_each(|()| std::future::ready(Ok(()))).await;
    let result = match sent {
        Ok(()) => upload.complete().await.map(|_| ()),
        Err(error) => Err(error),
    };
    if result.is_err() {
        // The first error says more than one of the clean-up; leftover parts are invisible and expire by the bucket's rules.
        drop(upload.abort().await);
    }
    result
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use tempfile::TempDir;

    use super::*;

    struct Fixture {
        folder: TempDir,
        checkpoints: CheckpointStore,
    }

    impl Fixture {
        /// A store with checkpoints of the given steps.
        fn new(keep_last: u32, steps: &[u64]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let url = folder.path().join("checkpoints").display().to_string();
            let fixture = Self { checkpoints: CheckpointStore::open(&url, &BTreeMap::new(), keep_last).unwrap(), folder };
            for step in steps {
                fixture.save(*step);
            }
            fixture
        }

        fn save(&self, step: u64) -> Saved {
            let model = [NamedTensorOwned { name: "w".to_owned(), shape: vec![2, 3], data: values(step).into() }];
            let optimizer = [NamedTensorOwned { name: "w.m".to_owned(), shape: vec![6], data: values(step + 1).into() }];
            let extra = [("config.json".to_owned(), Bytes::from_static(b"{}"))];
            self.checkpoints.save(&state(step), &model, &optimizer, &extra).unwrap()
        }

        fn path(&self, step: u64, file: &str) -> PathBuf {
            self.folder.path().join("checkpoints").join(key(step, file))
        }

        fn steps(&self) -> Vec<u64> {
            self.checkpoints.list().unwrap().into_iter().map(|listed| listed.step).collect()
        }

        fn latest(&self) -> Loaded {
            self.checkpoints.latest_good().unwrap().unwrap()
        }
    }

    fn state(step: u64) -> CheckpointState {
        CheckpointState { step, recipe_hash: "recipe".to_owned(), data_fingerprint: "data".to_owned(), world_size: 4, adam_step: step + 9 }
    }

    fn values(seed: u64) -> Vec<u8> {
        (0..6u64).flat_map(|index| ((seed * 6 + index) as f32).sqrt().to_le_bytes()).collect()
    }

    fn flip_last_byte(path: &Path) {
        let mut bytes = fs::read(path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path, bytes).unwrap();
    }

    fn truncate(path: &Path) {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
    }

    #[test]
    fn a_checkpoint_comes_back_bit_by_bit() {
        let fixture = Fixture::new(2, &[]);
        assert_eq!(fixture.checkpoints.latest_good().unwrap(), None);
        let saved = fixture.save(5);
        let loaded = fixture.latest();
        assert_eq!((loaded.state, loaded.url, loaded.skipped), (state(5), saved.url, Vec::new()));
        assert_eq!((loaded.model[0].name.as_str(), loaded.model[0].shape.as_slice()), ("w", [2, 3].as_slice()));
        assert_eq!(loaded.model[0].data, values(5));
        assert_eq!(loaded.optimizer[0].data, values(6));
        let sizes = [MODEL_FILE, OPTIMIZER_FILE, "config.json"].map(|file| fs::metadata(fixture.path(5, file)).unwrap().len());
        assert_eq!(saved.bytes, sizes.iter().sum::<u64>());
    }

    #[test]
    fn a_large_file_goes_up_in_parts() {
        let fixture = Fixture::new(2, &[]);
        let len = (2 * PART_BYTES + 4096) / 4 * 4;
        let weights: Bytes = (0..len).map(|index| (index / 7) as u8).collect();
        let model = [NamedTensorOwned { name: "w".to_owned(), shape: vec![len / 4], data: weights.clone() }];
        fixture.checkpoints.save(&state(1), &model, &[], &[]).unwrap();
        assert!(fixture.latest().model[0].data == weights);
    }

    #[test]
    fn a_damaged_newest_checkpoint_gives_way_to_its_predecessor() {
        type Damage = fn(&Fixture);
        let cases: [(Damage, &str); 8] = [
            (|f| flip_last_byte(&f.path(9, MODEL_FILE)), "model.safetensors has BLAKE3 hash"),
            (|f| flip_last_byte(&f.path(9, "config.json")), "config.json has BLAKE3 hash"),
            (|f| truncate(&f.path(9, OPTIMIZER_FILE)), "the manifest says"),
            (|f| fs::remove_file(f.path(9, MODEL_FILE)).unwrap(), "model.safetensors is missing"),
            (|f| fs::remove_file(f.path(9, MANIFEST_FILE)).unwrap(), "manifest.json is missing"),
            (|f| fs::write(f.path(9, MANIFEST_FILE), "garbage").unwrap(), "manifest.json is not readable"),
            (|f| truncate(&f.path(9, MANIFEST_FILE)), "manifest.json is not readable"),
            (|f| fs::write(f.path(9, MANIFEST_FILE), fs::read(f.path(5, MANIFEST_FILE)).unwrap()).unwrap(), "manifest.json is of step 5"),
        ];
        for (damage, reason) in cases {
            let fixture = Fixture::new(2, &[5, 9]);
            damage(&fixture);
            let loaded = fixture.latest();
            assert_eq!((loaded.state.step, loaded.skipped.len()), (5, 1), "{reason}");
            assert!(loaded.skipped[0].contains(reason) && loaded.skipped[0].contains("step-000000000009"), "{}", loaded.skipped[0]);
        }
    }

    #[test]
    fn nothing_usable_is_a_failure_that_lists_everything() {
        let fixture = Fixture::new(2, &[5, 9]);
        flip_last_byte(&fixture.path(5, MODEL_FILE));
        truncate(&fixture.path(9, MODEL_FILE));
        let failure = fixture.checkpoints.latest_good().unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.kind, FailureKind::Damaged);
        let found = failure.found.unwrap();
        assert!(found.contains("step-000000000005: model.safetensors has BLAKE3") && found.contains("step-000000000009: model"), "{found}");
    }

    #[test]
    fn old_checkpoints_are_pruned_whole() {
        let fixture = Fixture::new(2, &[1, 2, 3, 4]);
        assert_eq!(fixture.steps(), [3, 4]);
        assert!(!fixture.path(2, "").exists());
        assert_eq!(Fixture::new(0, &[1, 2, 3]).steps(), [2, 3]);
    }

    #[test]
    fn a_damaged_checkpoint_does_not_count_as_kept() {
        let fixture = Fixture::new(2, &[1, 2]);
        flip_last_byte(&fixture.path(2, MODEL_FILE));
        assert_eq!(fixture.latest().state.step, 1);
        fixture.save(3);
        assert_eq!(fixture.steps(), [1, 3]);
        fixture.save(4);
        assert_eq!(fixture.steps(), [3, 4]);
    }

    #[test]
    fn an_interrupted_save_is_invisible_and_goes_once_it_is_old() {
        let fixture = Fixture::new(2, &[]);
        for step in [1, 3] {
            fs::create_dir_all(fixture.path(step, "")).unwrap();
            fs::write(fixture.path(step, MODEL_FILE), "half of it").unwrap();
        }
        assert_eq!(fixture.checkpoints.latest_good().unwrap(), None);
        fixture.save(2);
        assert_eq!(fixture.steps(), [2, 3]);
        assert_eq!(fixture.latest().state.step, 2);
        fixture.save(4);
        assert_eq!(fixture.steps(), [2, 4]);
    }

    #[test]
    fn a_step_can_be_saved_again() {
        let fixture = Fixture::new(2, &[1, 2]);
        flip_last_byte(&fixture.path(2, MODEL_FILE));
        assert_eq!(fixture.latest().state.step, 1);
        fixture.save(2);
        assert_eq!((fixture.latest().state.step, fixture.steps()), (2, vec![1, 2]));
    }

    #[test]
    fn a_reserved_or_foreign_name_is_no_extra_file() {
        let fixture = Fixture::new(2, &[]);
        for name in [MANIFEST_FILE, MODEL_FILE, "../escape", ".hidden", ""] {
            let extra = [(name.to_owned(), Bytes::new())];
            assert!(fixture.checkpoints.save(&state(1), &[], &[], &extra).is_err(), "{name}");
        }
        assert!(fixture.steps().is_empty());
    }
}
