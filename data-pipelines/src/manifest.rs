//! The manifest of a prepared folder: what it was made from, what happened to the records, and which shards hold the samples.
//!
//! It is written last, so that a folder with a manifest is complete.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::Context;
use cloze_recipes::failure::{Failure, FailureKind};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files;
use crate::select::capped_total;

/// Version of the manifest and of the shards; others are refused.
pub const MANIFEST_VERSION: u32 = 1;
/// Name of the manifest in its folder.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Largest manifest that is read; a million tasks and shards take about a quarter of it.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// Everything known about a prepared folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`] of the program that wrote it.
    pub version: u32,
    /// Hash (blake3, hex) of `settings`.
    pub recipe_hash: String,
    /// What the recipe said about the data, by key.
    pub settings: BTreeMap<String, Value>,
    /// Hash of the `tokenizer.json`.
    pub tokenizer_fingerprint: String,
    /// Files that were read, in order.
    pub inputs: Vec<InputEntry>,
    /// What happened to the records.
    pub counts: Counts,
    /// The cap per task that was applied; `None` when all samples were kept.
    pub cap_per_task: Option<u64>,
    /// How many samples fewer than wanted there are; 0 when no total was asked for.
    pub shortfall: u64,
    /// Tasks by name; a sample's task is an index into this list.
    pub tasks: Vec<TaskEntry>,
    /// Samples in all shards.
    pub samples: u64,
    /// Tokens in all shards.
    pub tokens: u64,
    /// Shards in order.
    pub shards: Vec<ShardEntry>,
}

/// One file that was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputEntry {
    /// Path or url.
    pub url: String,
    /// Size in bytes, as stored.
    pub size: u64,
    /// Entity tag or time of the last change.
    pub version: String,
    /// Hash of the stored bytes.
    pub blake3: String,
}

/// What happened to records: each is in exactly one of `held_out`, `held_out_template`, `not_single_token`, `too_long`, `capped`
/// and `kept`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Records in the files.
    pub read: u64,
    /// Dropped because of their task.
    pub held_out: u64,
    /// Dropped because of their template.
    pub held_out_template: u64,
    /// Dropped because the target is not one token in context.
    pub not_single_token: u64,
    /// Dropped because they are longer than allowed.
    pub too_long: u64,
    /// Samples whose text was cut; they go on.
    pub truncated: u64,
    /// Samples left out by the number of tasks, the cap per task, or the share that is wanted of them.
    pub capped: u64,
    /// Samples in the shards.
    pub kept: u64,
}

impl Counts {
    /// Samples before the cap.
    pub fn candidates(&self) -> u64 {
        self.capped + self.kept
    }

    /// Adds the counts of other records.
    pub fn add(&mut self, other: &Self) {
        self.read += other.read;
        self.held_out += other.held_out;
        self.held_out_template += other.held_out_template;
        self.not_single_token += other.not_single_token;
        self.too_long += other.too_long;
        self.truncated += other.truncated;
        self.capped += other.capped;
        self.kept += other.kept;
    }
}

/// One task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskEntry {
    /// Name in the records.
    pub name: String,
    /// Where its first record says that it comes from.
    pub source: Option<String>,
    /// What happened to its records.
    pub counts: Counts,
}

/// One shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Name in the folder.
    pub file: String,
    /// Samples in it.
    pub samples: u64,
    /// Tokens in it.
    pub tokens: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// Hash of the file.
    pub blake3: String,
}

impl Manifest {
    /// Reads the manifest of a folder; `None` when there is none. Fails when it is damaged or of another version.
    pub fn find(folder: &Path) -> anyhow::Result<Option<Self>> {
        let path = folder.join(MANIFEST_FILE);
        let too_large = fs::metadata(&path).is_ok_and(|file| file.len() > FILE_BYTES_MAX);
        if too_large {
            return Err(damaged(&path, format!("it has more than {FILE_BYTES_MAX} bytes")).into());
        }
        let content = match fs::read(&path) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(files::disk_failure("read manifest", &path, &error).into()),
        };
        // The version comes first, so that a newer manifest is not reported as damaged.
        let value: Value = serde_json::from_slice(&content).map_err(|error| damaged(&path, &error))?;
        let version = value.get("version").and_then(Value::as_u64).unwrap_or(0);
        if version != u64::from(MANIFEST_VERSION) {
            return Err(Failure::new(FailureKind::Mismatch, "prepared data is of another version")
                .at(path.display())
                .expected(format!("version {MANIFEST_VERSION}"))
                .found(format!("version {version}"))
                .hint("prepare it again: `cloze data prepare RECIPE --force`")
                .into());
        }
        let manifest: Self = serde_json::from_value(value).map_err(|error| damaged(&path, &error))?;
        let is_plain = |name: &str| !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\']);
        match manifest.shards.iter().find(|shard| !is_plain(&shard.file)) {
            Some(shard) => Err(damaged(&path, format!("`{}` is no name for a shard", shard.file)).into()),
            None => Ok(Some(manifest)),
        }
    }

    /// Reads the manifest of a folder. Fails when there is none, or when it is damaged or of another version.
    pub fn load(folder: &Path) -> anyhow::Result<Self> {
        Self::find(folder)?.ok_or_else(|| {
            Failure::new(FailureKind::Input, "data is not prepared")
                .at(folder.display())
                .expected(format!("a folder with a {MANIFEST_FILE}"))
                .hint("run `cloze data prepare RECIPE` first; an interrupted preparation goes on where it stopped")
                .into()
        })
    }

    /// Writes the manifest into a folder; it appears whole or not at all.
    pub fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let mut content = serde_json::to_vec_pretty(self).context("encode the manifest")?;
        content.push(b'\n');
        files::write_whole(&folder.join(MANIFEST_FILE), &content)?;
        Ok(())
    }

    /// Samples of one epoch of a run whose recipe has this `data.mixing_cap`.
    pub fn epoch_samples(&self, mixing_cap: Option<u64>) -> u64 {
        let Some(cap) = mixing_cap else { return self.samples };
        let counts: Vec<u64> = self.tasks.iter().map(|task| task.counts.kept).collect();
        capped_total(&counts, cap)
    }

    /// Hash (blake3, hex) over what a run sees: samples in their order, tasks, tokenizer. The same wherever the files came from.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        add(&self.version.to_string());
        add(&self.tokenizer_fingerprint);
        self.tasks.iter().for_each(|task| add(&task.name));
        self.shards.iter().for_each(|shard| add(&shard.blake3));
        hasher.finalize().to_hex().to_string()
    }
}

fn damaged(path: &Path, error: impl fmt::Display) -> Failure {
    Failure::new(FailureKind::Damaged, "manifest of the prepared data is damaged")
        .at(path.display())
        .because(error)
        .hint("prepare the data again: `cloze data prepare RECIPE --force`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let counts = Counts { read: 3, capped: 1, kept: 2, ..Counts::default() };
        Manifest {
            version: MANIFEST_VERSION,
            recipe_hash: "r".into(),
            settings: BTreeMap::from([("seed".to_owned(), Value::from(7))]),
            tokenizer_fingerprint: "t".into(),
            inputs: vec![InputEntry { url: "/a".into(), size: 1, version: "modified 1".into(), blake3: "i".into() }],
            counts,
            cap_per_task: Some(2),
            shortfall: 0,
            tasks: vec![TaskEntry { name: "task".into(), source: None, counts }],
            samples: 2,
            tokens: 9,
            shards: vec![ShardEntry { file: "s".into(), samples: 2, tokens: 9, bytes: 99, blake3: "b".into() }],
        }
    }

    #[test]
    fn a_saved_manifest_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        manifest().save(folder.path()).unwrap();
        assert_eq!(Manifest::load(folder.path()).unwrap(), manifest());
    }

    #[test]
    fn missing_damaged_and_newer_manifests_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let kind = || Manifest::load(folder.path()).unwrap_err().downcast::<Failure>().unwrap().kind;
        assert_eq!(kind(), FailureKind::Input);
        assert_eq!(Manifest::find(folder.path()).unwrap(), None);
        fs::write(folder.path().join(MANIFEST_FILE), "{\"version\": 1, \"recip").unwrap();
        assert_eq!(kind(), FailureKind::Damaged);
        fs::write(folder.path().join(MANIFEST_FILE), "{\"version\": 2, \"new\": 0}").unwrap();
        assert_eq!(kind(), FailureKind::Mismatch);
    }

    #[test]
    fn an_epoch_takes_all_samples_or_some_of_each_task() {
        let manifest = manifest();
        assert_eq!([None, Some(1), Some(5)].map(|cap| manifest.epoch_samples(cap)), [2, 1, 2]);
    }

    #[test]
    fn the_fingerprint_depends_on_content_only() {
        let original = manifest();
        let mut moved = manifest();
        moved.inputs[0].url = "s3://bucket/a".into();
        assert_eq!(moved.fingerprint(), original.fingerprint());
        let mut other = manifest();
        other.shards[0].blake3 = "c".into();
        assert_ne!(other.fingerprint(), original.fingerprint());
    }
}
