//! The manifest of a checkpoint, and how its objects are named.

use std::collections::BTreeSet;
use std::fmt::Display;

use cloze_cluster::protocol::SavedFile;
use cloze_recipes::failure::{Failure, FailureKind};
use serde::{Deserialize, Serialize};

/// Version of the manifest and of the files it names. Version 1 had one file of weights and one of the optimizer's state, whatever
/// the number of workers.
const FORMAT_VERSION: u32 = 2;
/// Oldest version that is read.
const OLDEST_FORMAT_VERSION: u32 = 1;
/// Largest manifest that is read, in bytes; one of a thousand workers has about four hundred thousand.
pub const MAX_MANIFEST_BYTES: u64 = 16 << 20;
/// Written last, deleted first: without it the other files are no checkpoint.
pub const MANIFEST_FILE: &str = "manifest.json";
/// The weights, where they are one file.
pub const MODEL_FILE: &str = "model.safetensors";
/// The optimizer's state, where it is one file.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// Says which file holds which tensor, where the weights are several files.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// What a run needs besides tensors to go on exactly where it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointState {
    /// Optimizer steps done; the next step has this index.
    pub step: u64,
    /// Hash of the recipe that the run follows.
    pub recipe_hash: String,
    /// Fingerprint of the prepared data.
    pub data_fingerprint: String,
    /// Number of workers at the time of the save.
    pub world_size: u32,
    /// Steps that the optimizer's moments have seen.
    pub adam_step: u64,
    /// Training loss of the step, where it was known.
    #[serde(default)]
    pub loss: Option<f64>,
    /// Saved by time, between the regular steps; such a checkpoint is kept only while it is among the newest.
    #[serde(default)]
    pub temporary: bool,
    /// What was sharded over the workers: `none`, `optimizer`, `gradients` or `parameters`.
    #[serde(default = "unsharded")]
    pub shard: String,
}

fn unsharded() -> String {
    "none".to_owned()
}

/// The content of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format.
    pub format_version: u32,
    /// Step of the checkpoint, as in its folder's name.
    pub step: u64,
    /// Every other file of the folder.
    pub files: Vec<ManifestFile>,
    /// The run's state.
    pub state: CheckpointState,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    /// Name inside the checkpoint's folder.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3 hash of the content, 64 hexadecimal digits.
    pub blake3: String,
}

impl From<SavedFile> for ManifestFile {
    fn from(file: SavedFile) -> Self {
        Self { name: file.name, size: file.size, blake3: file.blake3 }
    }
}

/// Why a manifest is of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// It is damaged, or says what cannot be; the reason, to show.
    Damaged(String),
    /// A newer program wrote it, in a format of this version.
    Newer(u32),
}

impl From<String> for Flaw {
    fn from(reason: String) -> Self {
        Self::Damaged(reason)
    }
}

/// What a user is told where a checkpoint lies that a newer program wrote.
pub fn newer_failure(place: impl Display, format_version: u32) -> Failure {
    Failure::new(FailureKind::Mismatch, "a newer version of cloze has written this checkpoint")
        .at(place)
        .expected(format!("format version {OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}"))
        .found(format!("format version {format_version}"))
        .hint("use that version, or another `checkpoint.url`")
}

/// The only field that all versions of the format have.
#[derive(Deserialize)]
struct VersionOnly {
    format_version: u32,
}

impl Manifest {
    /// The manifest of a checkpoint that consists of `files`.
    pub fn new(state: CheckpointState, files: Vec<ManifestFile>) -> Self {
        Self { format_version: FORMAT_VERSION, step: state.step, files, state }
    }

    /// Reads and checks the manifest found in the folder of `step`; the error is a reason to show.
    pub fn parse(bytes: &[u8], step: u64) -> Result<Self, Flaw> {
        let unreadable = |error: serde_json::Error| format!("{MANIFEST_FILE} is not readable: {error}");
        let VersionOnly { format_version } = serde_json::from_slice(bytes).map_err(unreadable)?;
        if format_version > FORMAT_VERSION {
            return Err(Flaw::Newer(format_version));
        }
        if format_version < OLDEST_FORMAT_VERSION {
            return Err(Flaw::Damaged(format!("{MANIFEST_FILE} has format version {format_version}, which there never was")));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(unreadable)?;
        if manifest.step != step || manifest.state.step != step {
            return Err(Flaw::Damaged(format!("{MANIFEST_FILE} is of step {} (state {})", manifest.step, manifest.state.step)));
        }
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks that the files are named as they must be and that no worker's share is missing; the error is a reason to show.
    pub fn check(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        if let Some(file) = self.files.iter().find(|file| !is_file_name(&file.name) || !names.insert(file.name.as_str())) {
            return Err(format!("{MANIFEST_FILE} names `{}`, which is no file name or occurs twice", file.name));
        }
        let missing = self.share_names().find(|name| !names.contains(name.as_str()));
        missing.map_or(Ok(()), |name| Err(format!("{MANIFEST_FILE} does not name {name}")))
    }

    /// Number of files that the weights, and the optimizer's state, are divided into.
    fn num_shares(&self) -> u32 {
        if self.format_version == OLDEST_FORMAT_VERSION { 1 } else { self.state.world_size.max(1) }
    }

    fn share_names(&self) -> impl Iterator<Item = String> {
        let world_size = self.num_shares();
        (0..world_size).flat_map(move |rank| [model_file(rank, world_size), optimizer_file(rank, world_size)])
    }

    /// Names of the files with the weights, by rank.
    pub fn model_names(&self) -> Vec<String> {
        let world_size = self.num_shares();
        (0..world_size).map(|rank| model_file(rank, world_size)).collect()
    }

    /// Names of the files with the optimizer's state, by rank.
    pub fn optimizer_names(&self) -> Vec<String> {
        let world_size = self.num_shares();
        (0..world_size).map(|rank| optimizer_file(rank, world_size)).collect()
    }

    /// The files with tensors, sorted by name.
    pub fn shares(&self) -> Vec<&ManifestFile> {
        let names: BTreeSet<String> = self.share_names().collect();
        let mut shares: Vec<&ManifestFile> = self.files.iter().filter(|file| names.contains(&file.name)).collect();
        shares.sort();
        shares
    }

    /// The files without tensors that make the checkpoint a model folder, such as the tokenizer's.
    pub fn companions(&self) -> Vec<&ManifestFile> {
        self.files.iter().filter(|file| !is_reserved(&file.name)).collect()
    }

    /// Size of all files in bytes.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}

/// Whether a name can stand for a file next to a manifest: one visible part, and not the manifest itself.
pub fn is_file_name(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && !name.starts_with('.') && name.chars().all(is_plain) && name != MANIFEST_FILE
}

/// Whether a name belongs to the format: tensors, of any number of workers, or their index.
pub fn is_reserved(name: &str) -> bool {
    let is_share = |stem: &str| name.starts_with(stem) && name.ends_with(".safetensors");
    is_share("model") || is_share("optimizer") || name == INDEX_FILE
}

/// The file with a rank's part of the weights, named as in Hugging Face folders.
pub fn model_file(rank: u32, world_size: u32) -> String {
    share_file("model", MODEL_FILE, rank, world_size)
}

/// The file with a rank's part of the optimizer's state.
pub fn optimizer_file(rank: u32, world_size: u32) -> String {
    share_file("optimizer", OPTIMIZER_FILE, rank, world_size)
}

fn share_file(stem: &str, only: &str, rank: u32, world_size: u32) -> String {
    if world_size == 1 { only.to_owned() } else { format!("{stem}-{:05}-of-{world_size:05}.safetensors", rank + 1) }
}

/// The folder of a step. Twelve digits sort by name as they do by number.
pub fn folder(step: u64) -> String {
    format!("step-{step:012}")
}

/// The step of a folder's name; `None` for every name that [`folder`] does not make.
pub fn step_of_folder(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (folder(step) == name).then_some(step)
}

/// The key of a checkpoint's file below the store's prefix.
pub fn key(step: u64, file: &str) -> String {
    format!("{}/{file}", folder(step))
}

/// The step and the file that a key names; `None` for everything that [`key`] does not make.
pub fn parse_key(key: &str) -> Option<(u64, &str)> {
    let (name, file) = key.split_once('/')?;
    let step = step_of_folder(name)?;
    (is_file_name(file) || file == MANIFEST_FILE).then_some((step, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(step: u64, world_size: u32, names: &[&str]) -> Manifest {
        let state = CheckpointState {
            step,
            recipe_hash: "r".to_owned(),
            data_fingerprint: "d".to_owned(),
            world_size,
            adam_step: step,
            loss: Some(0.25),
            temporary: true,
            shard: "optimizer".to_owned(),
        };
        let file = |name: &&str| ManifestFile { name: (*name).to_owned(), size: 1, blake3: "0".repeat(64) };
        Manifest::new(state, names.iter().map(file).collect())
    }

    #[test]
    fn keys_parse_back_and_nothing_else_does() {
        for (step, file) in [(0, MODEL_FILE), (12, MANIFEST_FILE), (1_234_567_890_123, "config.json")] {
            assert_eq!(parse_key(&key(step, file)), Some((step, file)));
        }
        for other in
            ["", "step-1/a", "step-000000000001", "step-000000000001/a/b", "step-+00000000001/a", "old/step-000000000001/a", "run.json"]
        {
            assert_eq!(parse_key(other), None, "{other}");
        }
    }

    #[test]
    fn a_manifest_parses_back() {
        let two = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let optimizer = ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"];
        let manifests = [
            manifest(7, 1, &[MODEL_FILE, OPTIMIZER_FILE, "config.json"]),
            manifest(7, 2, &[optimizer[1], "vocab.txt", two[1], two[0], optimizer[0], INDEX_FILE]),
        ];
        for manifest in manifests {
            assert_eq!(Manifest::parse(&serde_json::to_vec(&manifest).unwrap(), 7), Ok(manifest.clone()));
            assert_eq!(manifest.companions().len(), 1);
            assert_eq!(manifest.shares().len(), 2 * manifest.state.world_size as usize);
        }
        assert_eq!((model_file(1, 2), optimizer_file(0, 2)), (two[1].to_owned(), optimizer[0].to_owned()));
    }

    #[test]
    fn a_manifest_of_the_first_version_is_read() {
        let text = r#"{"format_version":1,"step":7,"files":[{"name":"model.safetensors","size":1,"blake3":"0"},
            {"name":"optimizer.safetensors","size":1,"blake3":"0"}],
            "state":{"step":7,"recipe_hash":"r","data_fingerprint":"d","world_size":4,"adam_step":7}}"#;
        let manifest = Manifest::parse(text.as_bytes(), 7).unwrap();
        assert_eq!((manifest.state.loss, manifest.state.temporary, manifest.state.shard.as_str()), (None, false, "none"));
        assert_eq!((manifest.model_names(), manifest.optimizer_names()), (vec![MODEL_FILE.to_owned()], vec![OPTIMIZER_FILE.to_owned()]));
    }

    #[test]
    fn every_flaw_is_a_reason() {
        let text = |manifest: &Manifest| serde_json::to_string(manifest).unwrap();
        let good = manifest(7, 1, &[MODEL_FILE, OPTIMIZER_FILE]);
        let cases = [
            ("garbage".to_owned(), "not readable"),
            (text(&good)[..40].to_owned(), "not readable"),
            (text(&good).replace("\"step\":7", "\"stop\":7"), "not readable"),
            (text(&manifest(8, 1, &[MODEL_FILE, OPTIMIZER_FILE])), "is of step 8"),
            (text(&manifest(7, 1, &[MODEL_FILE])), "does not name optimizer.safetensors"),
            (text(&manifest(7, 2, &[MODEL_FILE, OPTIMIZER_FILE])), "does not name model-00001-of-00002.safetensors"),
            (text(&manifest(7, u32::MAX, &[MODEL_FILE, OPTIMIZER_FILE])), "does not name model-00001-of-"),
            (text(&manifest(7, 1, &[MODEL_FILE, OPTIMIZER_FILE, MODEL_FILE])), "occurs twice"),
            (text(&manifest(7, 1, &[MODEL_FILE, OPTIMIZER_FILE, "../x"])), "no file name"),
            ("{\"format_version\":0,\"old\":1}".to_owned(), "format version 0"),
        ];
        for (bytes, reason) in cases {
            let Err(Flaw::Damaged(error)) = Manifest::parse(bytes.as_bytes(), 7) else { panic!("damaged: {bytes}") };
            assert!(error.contains(reason), "{error}");
        }
        assert_eq!(Manifest::parse(b"{\"format_version\":9,\"new\":1}", 7), Err(Flaw::Newer(9)));
    }
}
