//! Opens a folder or a bucket from a url and options.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use cloze_recipes::failure::{Failure, FailureKind};
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use url::Url;

use super::cloud::{Cloud, open_bucket};

/// A folder or a bucket prefix.
#[derive(Clone, Debug)]
pub struct Store {
    /// The store that holds the objects.
    pub object_store: Arc<dyn ObjectStore>,
    /// Every key is below this path; it can also name a single object.
    pub prefix: ObjectPath,
    /// Where this is, for people: a path or `s3://bucket/prefix`, without a slash at the end.
    pub display_url: String,
    pub(super) kind: StoreKind,
}

/// What stands behind a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoreKind {
    /// Files of this machine.
    Folder,
    /// A bucket.
    Bucket(Cloud),
    /// Something that the caller brought.
    Other,
}

impl Store {
    /// A store over any [`ObjectStore`], for instance one in memory; `display_url` is what people are told.
    pub fn over(object_store: Arc<dyn ObjectStore>, prefix: ObjectPath, display_url: impl Into<String>) -> Self {
        Self { object_store, prefix, display_url: display_url.into(), kind: StoreKind::Other }
    }

    /// Full path of a key; the empty key is the prefix itself. A key with `.`, `..` or empty parts is a failure.
    pub fn path(&self, key: &str) -> Result<ObjectPath, Failure> {
        if key.is_empty() {
            return Ok(self.prefix.clone());
        }
        let full = if self.prefix.as_ref().is_empty() { key.to_owned() } else { format!("{}/{key}", self.prefix) };
        ObjectPath::parse(full)
            .map_err(|error| Failure::new(FailureKind::Storage, "not a usable object name").at(self.url(key)).because(error))
    }

    /// Where a key is, for people.
    pub fn url(&self, key: &str) -> String {
        if key.is_empty() { self.display_url.clone() } else { format!("{}/{key}", self.display_url) }
    }

    /// Whether the objects are files of this machine; then [`Store::url`] is their path.
    pub fn is_local(&self) -> bool {
        self.kind == StoreKind::Folder
    }
}

/// Opens a plain path, `file:///path`, `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`; nothing is read or
/// created yet.
///
/// A bucket takes its settings from the environment (`AWS_*`, `GOOGLE_*`, `AZURE_*`) and then from `options` by their usual names
/// (`endpoint`, `region`, `allow_http`). Fails on an unknown scheme or option, and on secrets in `options`.
pub fn open(url: &str, options: &BTreeMap<String, String>) -> anyhow::Result<Store> {
    match Url::parse(url) {
        Ok(parsed) if parsed.scheme() == "file" => {
            let path = parsed.to_file_path().map_err(|()| bad_url(url, "a path of this machine", "write `file:///absolute/path`"))?;
            open_local(&path)
        }
        Ok(parsed) if url.contains("://") => match Cloud::of_scheme(parsed.scheme()) {
            Some(cloud) => open_bucket(cloud, url, &parsed, options),
            None => {
                let hint = format!("`{}://` is not supported; copy the data to one that is", parsed.scheme());
                Err(bad_url(url, "a path, `file://`, `s3://`, `gs://` or `az://`", &hint).into())
            }
        },
        _ => open_local(Path::new(url)),
    }
}

fn open_local(path: &Path) -> anyhow::Result<Store> {
    let absolute =
        std::path::absolute(path).map_err(|error| bad_url(&path.display().to_string(), "a path", "check the path").because(error))?;
    let absolute = without_dots(&absolute);
    let prefix = ObjectPath::from_absolute_path(&absolute)
        .map_err(|error| bad_url(&absolute.display().to_string(), "a path in UTF-8", "rename it").because(error))?;
    Ok(Store {
        object_store: Arc::new(LocalFileSystem::new().with_fsync(true)),
        prefix,
        display_url: absolute.display().to_string(),
        kind: StoreKind::Folder,
    })
}

/// Resolves `.` and `..` by name, since object paths have neither.
fn without_dots(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}

pub(super) fn bad_url(url: &str, expected: &str, hint: &str) -> Failure {
    Failure::new(FailureKind::Recipe, "not a usable location").at(url).expected(expected).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_paths_name_the_same_folder() {
        let cases = ["file:///data/a%20b", "/data/a b", "/data/x/../a b", "/data/./a b/"];
        for url in cases {
            let store = open(url, &BTreeMap::new()).unwrap();
            assert_eq!(store.display_url.trim_end_matches('/'), "/data/a b", "{url}");
            assert_eq!(store.path("k.jsonl").unwrap().as_ref(), "data/a b/k.jsonl", "{url}");
            assert!(store.is_local());
        }
    }

    #[test]
    fn unusable_locations_are_recipe_failures() {
        for url in ["ftp://bucket/x", "file://host/x", "s3:///x", "gs:///x"] {
            let failure = open(url, &BTreeMap::new()).unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Recipe, "not a usable location"), "{url}");
        }
    }

    #[test]
    fn keys_cannot_leave_the_prefix() {
        let store = open("/data", &BTreeMap::new()).unwrap();
        assert!(store.path("../other").is_err());
        assert_eq!(store.path("").unwrap(), store.prefix);
    }
}
