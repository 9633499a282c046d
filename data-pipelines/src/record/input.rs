//! Which files the sources of a recipe name.

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::DataSource;

use crate::store::{self, ObjectInfo, Store};

/// How a record file is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON object a line.
    Jsonl,
    /// The same, gzip.
    JsonlGzip,
    /// The same, zstandard.
    JsonlZstd,
    /// Parquet.
    Parquet,
}

/// Formats by the end of the name, as they are tried.
const SUFFIXES: [(&str, Format); 4] =
    [(".jsonl", Format::Jsonl), (".jsonl.gz", Format::JsonlGzip), (".jsonl.zst", Format::JsonlZstd), (".parquet", Format::Parquet)];

/// One record file.
#[derive(Clone, Debug)]
pub struct Input {
    /// Where it is.
    pub store: Store,
    /// What the store says about it; the key is below the store's prefix.
    pub info: ObjectInfo,
    /// Where it is, for people and for the manifest.
    pub url: String,
    /// How it is stored.
    pub format: Format,
    /// Task of records that name none: the source's, else the name of the file.
    pub default_task: String,
}

impl Input {
    /// What tells two states of the file apart without reading it: entity tag or time of the last change.
    pub fn version(&self) -> String {
        match &self.info.etag {
            // The entity tags of local files contain the inode, which a copy does not keep.
            Some(etag) if !self.store.is_local() => format!("etag {etag}"),
            _ => format!("modified {}", self.info.last_modified_us),
        }
    }
}

/// The record files of all sources: sources in the given order, the files of a folder by name.
///
/// Fails when a source is missing, holds no record file, or names a file of another format.
pub fn list_inputs(sources: &[DataSource]) -> anyhow::Result<Vec<Input>> {
    let mut inputs = Vec::new();
    for source in sources {
        let store = store::open(&source.url, &source.options)?;
        let found = match single_file(&store)? {
            Some(info) => vec![info],
            None => store::list(&store)?,
        };
        let before = inputs.len();
        inputs.extend(found.into_iter().filter_map(|info| input(source, &store, info)));
        if inputs.len() == before {
            return Err(Failure::new(FailureKind::Input, "source has no record files")
                .at(&store.display_url)
                .expected("a file or a folder of files named `*.jsonl`, `*.jsonl.gz`, `*.jsonl.zst` or `*.parquet`")
                .found("no such file")
                .hint("check `data.sources` in the recipe")
                .into());
        }
    }
    Ok(inputs)
}

/// The source itself, where it is one object and not a folder.
fn single_file(store: &Store) -> anyhow::Result<Option<ObjectInfo>> {
    if store.prefix.as_ref().is_empty() {
        return Ok(None);
    }
    match store::head(store, "") {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.downcast_ref::<Failure>().is_some_and(|failure| failure.kind == FailureKind::Input) => Ok(None),
        Err(error) => Err(error),
    }
}

fn input(source: &DataSource, store: &Store, info: ObjectInfo) -> Option<Input> {
    let url = store.url(&info.key);
    let name = url.rsplit('/').next().unwrap_or_default();
    let (suffix, format) = SUFFIXES.iter().find(|(suffix, _)| name.ends_with(suffix))?;
    let default_task = source.task.clone().unwrap_or_else(|| name[..name.len() - suffix.len()].to_owned());
    Some(Input { store: store.clone(), info, format: *format, default_task, url })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::Path;

    use super::*;

    fn source(path: &Path, task: Option<&str>) -> DataSource {
        DataSource { url: path.display().to_string(), task: task.map(str::to_owned), options: BTreeMap::new() }
    }

    #[test]
    fn a_folder_means_its_record_files_in_order_of_name() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        for name in ["b.jsonl.gz", "a.parquet", "sub/c.jsonl", "d.jsonl.zst", "readme.md", "e.json"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        let inputs = list_inputs(&[source(folder.path(), None), source(&folder.path().join("sub/c.jsonl"), Some("own"))]).unwrap();
        let found: Vec<_> = inputs.iter().map(|input| (input.default_task.as_str(), input.format)).collect();
        let expected =
            [("a", Format::Parquet), ("b", Format::JsonlGzip), ("d", Format::JsonlZstd), ("c", Format::Jsonl), ("own", Format::Jsonl)];
        assert_eq!(found, expected);
        assert_eq!(inputs[3].url, inputs[4].url);
        assert!(inputs[0].version().starts_with("modified "));
    }

    #[test]
    fn a_missing_source_and_a_folder_without_records_are_input_failures() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("notes.txt"), "x").unwrap();
        for path in [folder.path().join("none"), folder.path().to_path_buf(), folder.path().join("notes.txt")] {
            let failure = list_inputs(&[source(&path, None)]).unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!(failure.kind, FailureKind::Input);
            assert_eq!(failure.place, Some(path.display().to_string()));
        }
    }
}
