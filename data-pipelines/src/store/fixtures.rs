//! A store for tests.

use std::collections::BTreeMap;

use super::{ObjectInfo, Store, head, open, put};

/// A folder with one object, which is called so, as a store.
pub fn with_object(content: &[u8]) -> (tempfile::TempDir, Store, ObjectInfo) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().display().to_string(), &BTreeMap::new()).unwrap();
    put(&store, "object", content.to_vec()).unwrap();
    let info = head(&store, "object").unwrap();
    (folder, store, info)
}
