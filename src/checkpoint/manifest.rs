//! The manifest of a checkpoint, and how its objects are named.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Version of the manifest and of the files it names.
const FORMAT_VERSION: u32 = 1;
/// Largest manifest that is read, in bytes; a real one has a few hundred.
pub const MAX_MANIFEST_BYTES: u64 = 16 << 20;
/// Written last, deleted first: without it the other files are no checkpoint.
pub const MANIFEST_FILE: &str = "manifest.json";
/// The weights.
pub const MODEL_FILE: &str = "model.safetensors";
/// The optimizer's state.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// What a run needs besides tensors to go on exactly where it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
}

/// The content of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    /// Name inside the checkpoint's folder.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3 hash of the content, 64 hexadecimal digits.
    pub blake3: String,
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
    pub fn parse(bytes: &[u8], step: u64) -> Result<Self, String> {
        let unreadable = |error: serde_json::Error| format!("{MANIFEST_FILE} is not readable: {error}");
        let VersionOnly { format_version } = serde_json::from_slice(bytes).map_err(unreadable)?;
        if format_version != FORMAT_VERSION {
            return Err(format!("{MANIFEST_FILE} has format version {format_version}, this program reads {FORMAT_VERSION}"));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(unreadable)?;
        if manifest.step != step || manifest.state.step != step {
            return Err(format!("{MANIFEST_FILE} is of step {} (state {})", manifest.step, manifest.state.step));
        }
        let mut names = BTreeSet::new();
        if let Some(file) = manifest.files.iter().find(|file| !is_file_name(&file.name) || !names.insert(file.name.as_str())) {
            return Err(format!("{MANIFEST_FILE} names `{}`, which is no file name or occurs twice", file.name));
        }
        match [MODEL_FILE, OPTIMIZER_FILE].into_iter().find(|name| !names.contains(name)) {
            Some(name) => Err(format!("{MANIFEST_FILE} does not name {name}")),
            None => Ok(manifest),
        }
    }
}

/// Whether a name can stand for a file next to a manifest: one visible part, and not the manifest itself.
pub fn is_file_name(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && !name.starts_with('.') && name.chars().all(is_plain) && name != MANIFEST_FILE
}

/// The folder of a step. Twelve digits sort by name as they do by number.
pub fn folder(step: u64) -> String {
    format!("step-{step:012}")
}

/// The key of a checkpoint's file below the store's prefix.
pub fn key(step: u64, file: &str) -> String {
    format!("{}/{file}", folder(step))
}

/// The step and the file that a key names; `None` for everything that [`key`] does not make.
pub fn parse_key(key: &str) -> Option<(u64, &str)> {
    let (name, file) = key.split_once('/')?;
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (folder(step) == name && (is_file_name(file) || file == MANIFEST_FILE)).then_some((step, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(step: u64, names: &[&str]) -> Manifest {
        let state = CheckpointState { step, recipe_hash: "r".to_owned(), data_fingerprint: "d".to_owned(), world_size: 2, adam_step: step };
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
        let manifest = manifest(7, &[MODEL_FILE, OPTIMIZER_FILE, "config.json"]);
        assert_eq!(Manifest::parse(&serde_json::to_vec(&manifest).unwrap(), 7), Ok(manifest));
    }

    #[test]
    fn every_flaw_is_a_reason() {
        let text = |manifest: &Manifest| serde_json::to_string(manifest).unwrap();
        let good = manifest(7, &[MODEL_FILE, OPTIMIZER_FILE]);
        let cases = [
            ("garbage".to_owned(), "not readable"),
            (text(&good)[..40].to_owned(), "not readable"),
            (text(&good).replace("\"step\":7", "\"stop\":7"), "not readable"),
            (text(&manifest(8, &[MODEL_FILE, OPTIMIZER_FILE])), "is of step 8"),
            (text(&manifest(7, &[MODEL_FILE])), "does not name optimizer.safetensors"),
            (text(&manifest(7, &[MODEL_FILE, OPTIMIZER_FILE, MODEL_FILE])), "occurs twice"),
            (text(&manifest(7, &[MODEL_FILE, OPTIMIZER_FILE, "../x"])), "no file name"),
            ("{\"format_version\":9,\"new\":1}".to_owned(), "format version 9"),
        ];
        for (bytes, reason) in cases {
            let error = Manifest::parse(bytes.as_bytes(), 7).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
