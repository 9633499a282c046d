//! What a run leaves beside its checkpoints in a bucket: all that its folder knows of it, so that a listing of a prefix knows it too.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use cloze_data::store::{self, Store};
use cloze_recipes::failure::{Failure, FailureKind};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::difference::numbers_of;
use super::entry::{RunEntry, SAMPLING, entry_of};
use crate::report::loaded_run::LoadedRun;

/// Name of the object, in the folder of the checkpoints.
pub const RECORD_FILE: &str = "run-record.json";

/// Form of the object; another one is not read.
const VERSION: u32 = 1;

/// Largest record, in bytes. The longest part is the recipe, of which no more than this is read anywhere.
const MAX_RECORD_BYTES: u64 = 4 << 20;

/// A run as it was when it was last told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    version: u32,
    /// Unix time of the telling, in seconds.
    pub told: f64,
    /// What a listing says.
    pub entry: RunEntry,
    /// The recipe, key by key.
    pub recipe: BTreeMap<String, Value>,
    /// What came out, by name.
    pub numbers: Vec<(String, f64)>,
}

/// What the records of all versions have.
#[derive(Deserialize)]
struct Head {
    version: u32,
}

/// A bucket that a run's checkpoints lie in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordPlace {
    url: String,
    options: BTreeMap<String, String>,
}

impl RecordPlace {
    /// The place of a run's record; `None` where its checkpoints lie in a folder, whose run has no need of one.
    pub fn of_recipe(recipe: &Value) -> Option<Self> {
        let url = recipe.pointer("/checkpoint/url")?.as_str()?;
        if !url.contains("://") || url.starts_with("file://") {
            return None;
        }
        let options = recipe.pointer("/checkpoint/options").and_then(Value::as_object);
        let pairs = options.into_iter().flatten().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())));
        Some(Self { url: url.to_owned(), options: pairs.collect() })
    }
}

/// Tells how a run folder's run is, at `now` in Unix seconds. Fails as the store does.
pub fn publish(folder: &Path, place: &RecordPlace, now: f64) -> anyhow::Result<()> {
    let store = store::open(&place.url, &place.options)?;
    let run = LoadedRun::read(folder, SAMPLING);
    let entry = entry_of(&run);
    let record = RunRecord { version: VERSION, told: now, recipe: entry.recipe.clone(), entry, numbers: finite(numbers_of(&run)) };
    store::put(&store, RECORD_FILE, serde_json::to_vec_pretty(&record).context("serialise the record of a run")?)
}

/// JSON has no other numbers.
fn finite(numbers: Vec<(String, f64)>) -> Vec<(String, f64)> {
    numbers.into_iter().filter(|(_, value)| value.is_finite()).collect()
}

/// The same where the folder's own recipe says whether there is a bucket; whether one was told.
pub fn publish_run(folder: &Path, now: f64) -> anyhow::Result<bool> {
    let recipe = cloze_recipes::read_rendered(&folder.join("recipe.yaml"))?;
    match RecordPlace::of_recipe(&recipe) {
        Some(place) => publish(folder, &place, now).map(|()| true),
        None => Ok(false),
    }
}

impl RunRecord {
    /// Reads the record below a store's prefix; an empty folder is the prefix itself. Fails as the store does, and with kind `Damaged`
    /// where it is no record of this version.
    pub fn read(store: &Store, folder: &str) -> anyhow::Result<Self> {
        let key = if folder.is_empty() { RECORD_FILE.to_owned() } else { format!("{folder}/{RECORD_FILE}") };
        let bytes = store::read_all(store, &key, MAX_RECORD_BYTES)?;
        let damaged = |what: &str| Failure::new(FailureKind::Damaged, what).at(store.url(&key));
        let unreadable = |error: serde_json::Error| damaged("the record of a run cannot be read").because(error);
        let Head { version } = serde_json::from_slice(&bytes).map_err(unreadable)?;
        if version != VERSION {
            let failure = damaged("the record of a run is of another version of cloze").expected(VERSION).found(version);
            return Err(failure.hint("use the version that trained it, or a newer one").into());
        }
        let mut record: Self = serde_json::from_slice(&bytes).map_err(unreadable)?;
        record.entry.recipe.clone_from(&record.recipe);
        record.entry.told = Some(record.told);
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::fixtures::run_folder;

    #[test]
    fn only_a_bucket_needs_a_record() {
        let of = |checkpoint: Value| RecordPlace::of_recipe(&json!({ "checkpoint": checkpoint }));
        for checkpoint in [json!({}), json!({"url": null}), json!({"url": "/a"}), json!({"url": "file:///a"})] {
            assert_eq!(of(checkpoint.clone()), None, "{checkpoint}");
        }
        let options = BTreeMap::from([("region".to_owned(), "eu".to_owned())]);
        let place = RecordPlace { url: "s3://b/x".to_owned(), options };
        assert_eq!(of(json!({"url": "s3://b/x", "options": {"region": "eu"}})), Some(place));
    }

    #[test]
    fn a_record_tells_what_the_folder_knows() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("one");
        run_folder(&run, 7, Some(0.25));
        let bucket = root.path().join("bucket").display().to_string();
        let place = RecordPlace { url: bucket.clone(), options: BTreeMap::new() };
        publish(&run, &place, 5.0).unwrap();
        let store = store::open(&bucket, &BTreeMap::new()).unwrap();
        let record = RunRecord::read(&store, "").unwrap();
        let (entries, _) = super::super::entries(std::slice::from_ref(&run));
        assert_eq!(record.entry, RunEntry { told: Some(5.0), ..entries[0].clone() });
        assert_eq!((record.entry.state.as_str(), &record.recipe["seed"]), ("finished", &json!(7)));
        assert_eq!((json!(record.entry.metrics["mmlu"]), json!(record.numbers[0])), (json!(25.0), json!(["mmlu accuracy", 25.0])));

        let text = std::fs::read_to_string(root.path().join("bucket/run-record.json")).unwrap();
        for (text, what) in [
            (
                text.replace("\"version\": 1", "\"version\": 2").replace("\"told\"", "\"said\""),
                "the record of a run is of another version of cloze",
            ),
            ("{".to_owned(), "the record of a run cannot be read"),
        ] {
            std::fs::write(root.path().join("bucket/run-record.json"), text).unwrap();
            let failure = RunRecord::read(&store, "").unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Damaged, what));
        }
        assert!(!publish_run(&run, 5.0).unwrap(), "the run has no bucket");
    }
}
