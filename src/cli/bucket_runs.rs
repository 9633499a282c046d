//! The runs below a bucket's prefix: what each has left beside its checkpoints, or, of one that has left nothing, what the checkpoints
//! tell: hash, step and loss, and no scores, cost or parents.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use cloze_data::store::{self, ObjectInfo, Store};
use cloze_launcher::registry::{CheckpointCount, RECORD_FILE, RunEntry, RunRecord};
use cloze_recipes::failure::{Failure, FailureKind};
use serde::Deserialize;

/// Largest manifest that is read, in bytes; one of a thousand workers has about four hundred thousand.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;
/// Name of a manifest, which makes the files beside it a checkpoint.
const MANIFEST_FILE: &str = "manifest.json";
/// State of a run of which only checkpoints are known.
pub(super) const STATE: &str = "in a bucket";

/// What is read of a manifest.
#[derive(Deserialize)]
struct Manifest {
    state: State,
}

/// What is read of a run's state.
#[derive(Deserialize)]
struct State {
    recipe_hash: String,
    #[serde(default)]
    loss: Option<f64>,
}

/// One entry for each folder below a url that holds checkpoints or a run's record. Fails as the store does, and with kind `Recipe` on an option that is
/// not `key=value`.
pub fn entries(url: &str, options: &[String]) -> Result<Vec<RunEntry>> {
    let store = store::open(url, &parsed(options)?)?;
    let objects = store::list(&store)?;
    let recorded: BTreeSet<&str> = objects.iter().filter_map(|object| folder_of_record(&object.key)).collect();
    let runs = by_run(&objects).into_iter();
    Ok(runs.map(|(run, steps)| entry(&store, &run, &steps, recorded.contains(run.as_str()))).collect())
}

/// The record of the run whose checkpoints lie at a url. Fails as the store does, and with kind `Input` where there is none.
pub fn record(url: &str, options: &[String]) -> Result<RunRecord> {
    let store = store::open(url, &parsed(options)?)?;
    if store::size_of(&store, RECORD_FILE)?.is_none() {
        let failure = Failure::new(FailureKind::Input, "this place holds no record of a run").at(&store.display_url);
        return Err(failure.expected(format!("{RECORD_FILE} beside its checkpoints")).hint("`cloze runs --root URL` lists runs").into());
    }
    RunRecord::read(&store, "")
}

/// The steps of the complete checkpoints of each folder with a run, rising.
fn by_run(objects: &[ObjectInfo]) -> BTreeMap<String, Vec<u64>> {
    let mut runs: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for object in objects {
        if let Some((run, step)) = checkpoint_of(&object.key) {
            runs.entry(run.to_owned()).or_default().push(step);
        } else if let Some(run) = folder_of_record(&object.key) {
            runs.entry(run.to_owned()).or_default();
        }
    }
    runs.values_mut().for_each(|steps| steps.sort_unstable());
    runs
}

/// Folder and step of a manifest's key.
fn checkpoint_of(key: &str) -> Option<(&str, u64)> {
    let folder = key.strip_suffix(MANIFEST_FILE)?.strip_suffix('/')?;
    let (run, name) = folder.rsplit_once('/').unwrap_or(("", folder));
    Some((run, name.strip_prefix("step-")?.parse().ok()?))
}

/// Folder of a record's key.
fn folder_of_record(key: &str) -> Option<&str> {
    let folder = key.strip_suffix(RECORD_FILE)?;
    if folder.is_empty() { Some(folder) } else { folder.strip_suffix('/') }
}

fn entry(store: &Store, run: &str, steps: &[u64], is_recorded: bool) -> RunEntry {
    let place = if run.is_empty() { store.url("").trim_end_matches('/').to_owned() } else { store.url(run) };
    // Checkpoints usually lie in `NAME/checkpoints`.
    let name = place.trim_end_matches("/checkpoints").rsplit('/').next().unwrap_or_default().to_owned();
    let newest = steps.last().copied();
    let checkpoints = CheckpointCount { count: steps.len() as u64, newest_step: newest, place: place.clone() };
    let mut notes = Vec::new();
    if is_recorded {
        match RunRecord::read(store, run) {
            Ok(record) => return RunEntry { place, checkpoints, ..record.entry },
            Err(error) => notes.push(format!("{error:#}; passed over").replace('\n', ";")),
        }
    }
    let mut entry = RunEntry { name, place, state: STATE.to_owned(), step: newest.unwrap_or(0), checkpoints, notes, ..RunEntry::default() };
    if newest.is_none() {
        return entry;
    }
    let folder = format!("step-{:012}", entry.step);
    let key = if run.is_empty() { format!("{folder}/{MANIFEST_FILE}") } else { format!("{run}/{folder}/{MANIFEST_FILE}") };
    match read(store, &key) {
        Ok(manifest) => (entry.recipe_hash, entry.loss) = (manifest.state.recipe_hash, manifest.state.loss),
        Err(error) => entry.notes.push(format!("{}: {error:#}; passed over", store.url(&key)).replace('\n', ";")),
    }
    entry
}

fn read(store: &Store, key: &str) -> Result<Manifest> {
    Ok(serde_json::from_slice(&store::read_all(store, key, MAX_MANIFEST_BYTES)?)?)
}

fn parsed(options: &[String]) -> Result<BTreeMap<String, String>, Failure> {
    let pair = |option: &String| {
        let found = option.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
        found.ok_or_else(|| Failure::new(FailureKind::Recipe, "an option is no `key=value`").found(option))
    };
    options.iter().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_are_told_by_their_manifests() {
        let keys = ["a/checkpoints/step-000000000010/manifest.json", "step-000000000007/manifest.json"];
        assert_eq!(keys.map(checkpoint_of), [Some(("a/checkpoints", 10)), Some(("", 7))]);
        let records = ["a/checkpoints/run-record.json", "run-record.json", "a/other.json", "a/x-run-record.json"];
        assert_eq!(records.map(folder_of_record), [Some("a/checkpoints"), Some(""), None, None]);
        let others = ["a/step-x/manifest.json", "a/step-000000000010/model.safetensors", "manifest.json", "a/eval/manifest.json"];
        assert_eq!(others.map(checkpoint_of), [None; 4]);
    }

    #[test]
    fn a_folder_of_checkpoints_is_read_like_a_bucket() {
        let root = tempfile::tempdir().unwrap();
        for (run, step, text) in
            [("one", 5, r#"{"state":{"recipe_hash":"old"}}"#), ("one", 10, r#"{"state":{"recipe_hash":"0f","loss":1.5}}"#), ("two", 3, "{")]
        {
            let folder = root.path().join(run).join("checkpoints").join(format!("step-{step:012}"));
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(MANIFEST_FILE), text).unwrap();
        }
        let found = entries(&format!("file://{}", root.path().display()), &[]).unwrap();
        let names: Vec<(&str, &str, u64, Option<f64>)> =
            found.iter().map(|run| (run.name.as_str(), run.recipe_hash.as_str(), run.checkpoints.count, run.loss)).collect();
        assert_eq!(names, [("one", "0f", 2, Some(1.5)), ("two", "", 1, None)]);
        assert!(found[1].notes[0].contains("step-000000000003/manifest.json"), "{:?}", found[1].notes);
        assert!(entries("file:///nowhere", &["x".to_owned()]).is_err());
    }
}
