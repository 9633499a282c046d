//! Trials whose recipes state different data and whose prepared data is the same all the same, as where `data.max_tasks` takes the same tasks
//! of several lists. Hashes of recipes cannot tell; what was prepared can.

use std::collections::{BTreeMap, BTreeSet};

use cloze_data::manifest::Manifest;
use serde_json::{Map, Value};

use super::folder::StudyFolder;
use super::record::TrialRecord;
use super::short::ShortValues;

/// How the keys of the data begin.
const OF_DATA: &str = "data.";

/// Most points that a sentence names.
const MAX_NAMED: usize = 8;

/// What is to be said of the data of a study, as far as it is prepared in this folder: one sentence for each set of points that differ in
/// their data only, and whose samples are the same.
pub fn same_data_texts(folder: &StudyFolder, records: &[TrialRecord]) -> Vec<String> {
    let hashes: BTreeSet<&String> = records.iter().filter(|record| record.wanted).map(|record| &record.data_hash).collect();
    let samples = |hash: &String| match Manifest::find(&folder.data_path(hash)) {
        Ok(manifest) => manifest.map(|manifest| manifest.shards.into_iter().map(|shard| shard.blake3).collect()),
        Err(error) => {
            tracing::warn!(%error, "it is not known whether trials have the same data");
            None
        }
    };
    let samples = hashes.into_iter().filter_map(|hash| Some((hash.clone(), samples(hash)?))).collect();
    texts(records, &samples)
}

/// The sentences, from the hashes of the shards by the hash of what they are prepared from.
fn texts(records: &[TrialRecord], samples: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut groups: BTreeMap<(String, &Vec<String>), Vec<&TrialRecord>> = BTreeMap::new();
    for record in records.iter().filter(|record| record.wanted) {
        let Some(shards) = samples.get(&record.data_hash) else { continue };
        let rest: Vec<_> = record.parameters.iter().filter(|(key, _)| !key.starts_with(OF_DATA)).collect();
        groups.entry((format!("{rest:?}"), shards)).or_default().push(record);
    }
    let values = ShortValues::of(records.iter().flat_map(|record| &record.parameters));
    let is_told = |group: &&Vec<&TrialRecord>| group.iter().any(|record| record.data_hash != group[0].data_hash);
    let texts = groups.values().filter(is_told).map(|group| text(group, &values));
    // Points that differ in other keys as well say the same once more.
    let mut seen = BTreeSet::new();
    texts.filter(|text| seen.insert(text.clone())).collect()
}

fn text(group: &[&TrialRecord], values: &ShortValues) -> String {
    let differs = |key: &str| group.iter().any(|record| record.parameters.get(key) != group[0].parameters.get(key));
    let mut points: Vec<String> = Vec::new();
    for record in group {
        let point = point(&record.parameters, differs, values);
        if !points.contains(&point) {
            points.push(point);
        }
    }
    let num_more = points.len().saturating_sub(MAX_NAMED);
    points.truncate(MAX_NAMED);
    let more = if num_more > 0 { format!("; and {num_more} more") } else { String::new() };
    format!("these have the same data, sample for sample, so that it makes no difference between them: {}{more}", points.join("; "))
}

/// The keys of a point in which it differs from others; all of them are keys of the data.
fn point(parameters: &Map<String, Value>, differs: impl Fn(&str) -> bool, values: &ShortValues) -> String {
    let shown = parameters.iter().filter(|(key, _)| differs(key)).map(|(key, value)| format!("{key}={}", values.text(key, value)));
    shown.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::fixtures::trial;
    use super::*;

    fn record(hash: &str, (data_hash, num_tasks): (&str, usize), learning_rate: f64, seed: u64) -> TrialRecord {
        let tasks: Vec<String> = (0..num_tasks).map(|number| format!("^task_{number}")).collect();
        let parameters = json!({"data.only": tasks, "train.learning_rate": learning_rate}).as_object().unwrap().clone();
        TrialRecord { parameters, seed, data_hash: data_hash.to_owned(), ..TrialRecord::new(&trial(hash), None) }
    }

    #[test]
    fn points_that_differ_in_nothing_are_named_once() {
        let mut records = Vec::new();
        for (rate, seed) in [(0.1, 1), (0.1, 2), (0.2, 1)] {
            for data in [("few", 1), ("some", 20), ("many", 30)] {
                records.push(record("h", data, rate, seed));
            }
        }
        let samples = |of: [(&str, &str); 3]| of.map(|(hash, shard)| (hash.to_owned(), vec![shard.to_owned()])).into();
        let same = texts(&records, &samples([("few", "s1"), ("some", "s2"), ("many", "s2")]));
        let expected = "these have the same data, sample for sample, so that it makes no difference between them: \
            data.only=[\"^task_0\",\"^task_1\",+18]; data.only=[\"^task_0\",\"^task_1\",+28]";
        assert_eq!(same, [expected]);
        assert!(texts(&records, &samples([("few", "s1"), ("some", "s2"), ("many", "s3")])).is_empty());
        let seeds = [record("a", ("some", 20), 0.1, 1), record("b", ("some", 20), 0.1, 2)];
        assert!(texts(&seeds, &samples([("few", "s1"), ("some", "s2"), ("many", "s2")])).is_empty(), "seeds share their data");
        let others = [record("a", ("some", 20), 0.1, 1), record("b", ("many", 30), 0.2, 1)];
        assert!(texts(&others, &samples([("few", "s1"), ("some", "s2"), ("many", "s2")])).is_empty(), "these differ in the rate");
    }

    #[test]
    fn data_that_is_not_here_is_not_compared() {
        let root = tempfile::tempdir().unwrap();
        let folder = StudyFolder::new(root.path().to_owned());
        let records = [record("a", ("some", 20), 0.1, 1), record("b", ("many", 30), 0.1, 1)];
        assert!(same_data_texts(&folder, &records).is_empty());
        for hash in ["some", "many"] {
            let place = folder.data_path(hash);
            std::fs::create_dir_all(&place).unwrap();
            manifest(hash).save(&place).unwrap();
        }
        assert_eq!(same_data_texts(&folder, &records).len(), 1);
    }

    /// Of two recipes, with the same shard.
    fn manifest(recipe_hash: &str) -> Manifest {
        Manifest {
            version: cloze_data::manifest::MANIFEST_VERSION,
            recipe_hash: recipe_hash.to_owned(),
            settings: BTreeMap::new(),
            tokenizer_fingerprint: String::new(),
            inputs: Vec::new(),
            counts: cloze_data::manifest::Counts::default(),
            cap_per_task: None,
            shortfall: 0,
            tasks: Vec::new(),
            samples: 2,
            tokens: 9,
            shards: vec![cloze_data::manifest::ShardEntry { file: "s".into(), samples: 2, tokens: 9, bytes: 99, blake3: "b".into() }],
        }
    }
}
