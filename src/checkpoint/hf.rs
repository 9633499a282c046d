//! Weights in a Hugging Face folder: one `model.safetensors`, or shards with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use bytes::Bytes;
use cloze_recipes::failure::{Failure, FailureKind};
use serde::Deserialize;

use super::atomic::atomic_write;
use super::format::{NamedTensorOwned, decode, encode};
use super::manifest::{INDEX_FILE, MODEL_FILE, is_file_name};

/// Largest index that is read, in bytes; one of a model with ten thousand tensors has about one million.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Largest file of weights that is read, in bytes; it is held in memory.
const MAX_WEIGHTS_BYTES: u64 = 64 << 30;

/// Which shard holds which tensor. The file has other fields, which say nothing that the shards do not.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// All tensors of the model in `dir`, sorted by name, as `f32`.
///
/// Fails with kind input when there is no such model or a tensor has an unexpected data type, and with kind damaged when a file
/// is missing, truncated or lacks a tensor that the index promises.
pub fn read_weights(dir: &Path) -> anyhow::Result<Vec<NamedTensorOwned>> {
    let whole = dir.join(MODEL_FILE);
    if whole.is_file() {
        return Ok(read_tensors(&whole)?);
    }
    let index = dir.join(INDEX_FILE);
    if index.is_file() {
        return Ok(read_shards(dir, &index)?);
    }
    Err(Failure::new(FailureKind::Input, "no weights in the model folder")
        .at(dir.display())
        .expected(format!("{MODEL_FILE} or {INDEX_FILE}"))
        .found(found_in(dir))
        .hint("check `model.path`; weights in `pytorch_model.bin` must be saved again as safetensors first")
        .into())
}

/// Writes `model.safetensors` into an existing folder; it appears whole or not at all.
pub fn write_weights(dir: &Path, tensors: &[NamedTensorOwned]) -> anyhow::Result<()> {
    atomic_write(&dir.join(MODEL_FILE), &encode(tensors)?)
}

/// The tensors of all shards that the index names.
fn read_shards(dir: &Path, index: &Path) -> Result<Vec<NamedTensorOwned>, Failure> {
    let bytes = read_file(index, MAX_INDEX_BYTES)?;
    let Index { weight_map } = serde_json::from_slice(&bytes)
        .map_err(|error| Failure::new(FailureKind::Damaged, "index of the weights is not readable").at(index.display()).because(error))?;
    let files: BTreeSet<&String> = weight_map.values().collect();
    let mut tensors = Vec::with_capacity(weight_map.len());
    for file in files {
        if !is_file_name(file) {
            return Err(Failure::new(FailureKind::Damaged, "index of the weights names a file outside its folder")
                .at(index.display())
                .expected("plain file names")
                .found(file));
        }
        let path = dir.join(file);
        let mut shard: BTreeMap<String, NamedTensorOwned> =
            read_tensors(&path)?.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        for (name, _) in weight_map.iter().filter(|(_, holder)| *holder == file) {
            tensors.push(shard.remove(name).ok_or_else(|| {
                Failure::new(FailureKind::Damaged, "shard lacks a tensor that the index promises")
                    .at(path.display())
                    .expected(name)
                    .hint("download the model again; its files do not belong together")
            })?);
        }
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

fn read_tensors(path: &Path) -> Result<Vec<NamedTensorOwned>, Failure> {
    let bytes = read_file(path, MAX_WEIGHTS_BYTES)?;
    decode(&bytes).map_err(|error| {
        // A header that fits the bytes but holds something else is the user's choice of model, not damage.
        let is_sound = error.downcast_ref::<safetensors::SafeTensorError>().is_none();
        let (kind, what, hint) = if is_sound {
            (FailureKind::Input, "weights are of a kind that cannot be read", "save the model with float32, float16 or bfloat16 weights")
        } else {
            (FailureKind::Damaged, "weights are damaged or truncated", "download or copy the file again")
        };
        Failure::new(kind, what).at(path.display()).because(format!("{error:#}")).hint(hint)
    })
}

/// Reads a whole file of at most `max_bytes`.
fn read_file(path: &Path, max_bytes: u64) -> Result<Bytes, Failure> {
    let failure = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Failure::new(FailureKind::Damaged, "file of the model is missing")
            .at(path.display())
            .hint("download or copy the model again; the download may have been interrupted"),
        _ => Failure::new(FailureKind::Storage, "failed to read a file of the model").at(path.display()).because(error),
    };
    let file = File::open(path).map_err(failure)?;
    let size = file.metadata().map_err(failure)?.len();
    if size > max_bytes {
        return Err(Failure::new(FailureKind::Input, "file of the model is too large")
            .at(path.display())
            .expected(format!("at most {max_bytes} bytes"))
            .found(format!("{size} bytes")));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    file.take(max_bytes).read_to_end(&mut bytes).map_err(failure)?;
    Ok(bytes.into())
}

/// What a folder holds instead, in a few words.
fn found_in(dir: &Path) -> String {
    const MAX_NAMES: usize = 8;
    let Ok(entries) = fs::read_dir(dir) else { return "no folder that can be read".to_owned() };
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    match names.len() {
        0 => "an empty folder".to_owned(),
        len if len > MAX_NAMES => format!("{} and {} more", names[..MAX_NAMES].join(", "), len - MAX_NAMES),
        _ => names.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;

    fn bytes_of(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn write(dir: &Path, file: &str, tensors: &[(&str, Dtype, &[u8])]) {
        let views = tensors.iter().map(|(name, dtype, data)| {
            let shape = vec![data.len() * 8 / dtype.bitsize()];
            (*name, TensorView::new(*dtype, shape, data).unwrap())
        });
        fs::write(dir.join(file), safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn failure(dir: &Path) -> Failure {
        read_weights(dir).unwrap_err().downcast().unwrap()
    }

    #[test]
    fn one_file_of_mixed_types_is_read_as_float32() {
        let dir = tempfile::tempdir().unwrap();
        let single = bytes_of(&[1.5, -3.0]);
        // -2.0 and 0.5 in half precision; 1.0 in bfloat16.
        write(
            dir.path(),
            MODEL_FILE,
            &[("h", Dtype::F16, &[0x00, 0xc0, 0x00, 0x38]), ("b", Dtype::BF16, &[0x80, 0x3f]), ("s", Dtype::F32, &single)],
        );
        let read = read_weights(dir.path()).unwrap();
        let expected = [("b", bytes_of(&[1.0])), ("h", bytes_of(&[-2.0, 0.5])), ("s", single)];
        assert_eq!(read.len(), expected.len());
        for (tensor, (name, data)) in read.iter().zip(expected) {
            assert_eq!((tensor.name.as_str(), tensor.shape.as_slice()), (name, [data.len() / 4].as_slice()));
            assert_eq!(tensor.data, data);
        }
    }

    #[test]
    fn shards_are_put_together() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "a.safetensors", &[("x", Dtype::F32, &[1, 0, 0, 0]), ("unlisted", Dtype::F32, &[0; 4])]);
        write(dir.path(), "b.safetensors", &[("w", Dtype::F32, &[2, 0, 0, 0])]);
        let index = |map: &str| fs::write(dir.path().join(INDEX_FILE), format!("{{\"metadata\":{{}},\"weight_map\":{map}}}")).unwrap();
        index("{\"x\":\"a.safetensors\",\"w\":\"b.safetensors\"}");
        let names: Vec<_> = read_weights(dir.path()).unwrap().into_iter().map(|tensor| tensor.name).collect();
        assert_eq!(names, ["w", "x"]);
        for (map, what) in [
            ("{\"x\":\"b.safetensors\"}", "shard lacks a tensor that the index promises"),
            ("{\"x\":\"c.safetensors\"}", "file of the model is missing"),
            ("{\"x\":\"../a.safetensors\"}", "index of the weights names a file outside its folder"),
            ("7", "index of the weights is not readable"),
        ] {
            index(map);
            let failure = failure(dir.path());
            assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Damaged, what));
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = [NamedTensorOwned { name: "a.b".to_owned(), shape: vec![1, 2], data: bytes_of(&[0.1, f32::NAN]).into() }];
        write_weights(dir.path(), &tensors).unwrap();
        assert_eq!(read_weights(dir.path()).unwrap(), tensors);
        let failure: Failure = write_weights(&dir.path().join("none"), &[]).unwrap_err().downcast().unwrap();
        assert_eq!(failure.kind, FailureKind::Storage);
    }

    #[test]
    fn every_flaw_has_its_kind() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
        let none = failure(dir.path());
        assert_eq!((none.kind, none.found.as_deref()), (FailureKind::Input, Some("pytorch_model.bin")));
        write(dir.path(), MODEL_FILE, &[("position_ids", Dtype::I64, &[0; 8])]);
        assert_eq!(failure(dir.path()).kind, FailureKind::Input);
        write(dir.path(), MODEL_FILE, &[("w", Dtype::F32, &[0; 8])]);
        let path = dir.path().join(MODEL_FILE);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        assert_eq!(failure(dir.path()).kind, FailureKind::Damaged);
    }
}
