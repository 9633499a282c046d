//! Tries places for checkpoints without leaving anything behind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use cloze_cluster::Secret;
use cloze_data::store::{self, Store};

/// What a write to a place showed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TriedPlace {
    /// How far the store's clock is ahead of this machine's, in seconds.
    pub clock_skew_s: f64,
}

/// Opens a place. Of a folder that does not exist yet, the folder above it that does, so that trying makes no folder.
pub fn open_place(url: &str, options: &BTreeMap<String, String>) -> Result<Store> {
    let store = store::open(url, options)?;
    if !store.is_local() {
        return Ok(store);
    }
    let folder = existing_above(Path::new(&store.display_url));
    store::open(&folder.display().to_string(), &BTreeMap::new())
}

/// Writes a small object, asks when it was written, and deletes it.
pub fn try_place(store: &Store) -> Result<TriedPlace> {
    let key = format!("probe-{}", &Secret::random()?.expose()[..32]);
    let before = now_s()?;
    let written = store::put(store, &key, b"probe".to_vec()).and_then(|()| store::head(store, &key));
    let after = now_s()?;
    let deleted = store::delete(store, &key);
    let modified_s = written?.last_modified_us as f64 / 1e6;
    deleted?;
    Ok(TriedPlace { clock_skew_s: skew_s(modified_s, before, after) })
}

/// How far a time lies outside of an interval. A store cuts its times to whole seconds.
fn skew_s(time: f64, before: f64, after: f64) -> f64 {
    let before = before.floor();
    if time < before {
        time - before
    } else if time > after {
        time - after
    } else {
        0.0
    }
}

fn now_s() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH).context("read the time of day")?.as_secs_f64())
}

/// The folder itself or the nearest one above it that exists.
fn existing_above(folder: &Path) -> PathBuf {
    folder.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trying_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("runs/new/checkpoints").display().to_string();
        let tried = try_place(&open_place(&place, &BTreeMap::new()).unwrap()).unwrap();
        assert!(tried.clock_skew_s.abs() < 1.0);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_time_within_the_write_is_no_skew() {
        let cases = [(10.0, 10.4, 11.0, 0.0), (10.7, 10.4, 11.0, 0.0), (9.0, 10.4, 11.0, -1.0), (13.0, 10.4, 11.0, 2.0)];
        for (time, before, after, expected) in cases {
            assert!((skew_s(time, before, after) - expected).abs() < 1e-9, "{time}");
        }
    }
}
