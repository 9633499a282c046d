//! What a preparation depends on, and whether a prepared folder still fits.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use serde_json::{Value, json};

use crate::manifest::{InputEntry, Manifest};
use crate::record::{Input, content_hash};
use crate::shard;

/// Changes whenever the same records would become other parts.
const PART_FORMAT: u32 = 1;

/// The setting that decides which samples a cap keeps.
const SEED: &str = "seed";

/// What a preparation is made from.
pub(super) struct Origin<'a> {
    pub(super) settings: BTreeMap<String, Value>,
    pub(super) tokenizer_fingerprint: &'a str,
    pub(super) inputs: &'a [Input],
}

impl Origin<'_> {
    /// Hash (blake3, hex) of the settings.
    pub(super) fn recipe_hash(&self) -> String {
        blake3::hash(json!(self.settings).to_string().as_bytes()).to_hex().to_string()
    }

    /// The manifest of a folder that fits; `None` for a folder without one.
    ///
    /// Fails when the folder was made from something else, saying what changed, and when shards are missing.
    pub(super) fn find_prepared(&self, folder: &Path) -> anyhow::Result<Option<Manifest>> {
        let Some(manifest) = Manifest::find(folder)? else { return Ok(None) };
        let changes = self.changes(&manifest)?;
        if !changes.is_empty() {
            return Err(Failure::new(FailureKind::Mismatch, "the data in the output folder was prepared from something else")
                .at(folder.display())
                .expected("the recipe, tokenizer and inputs that it was prepared from")
                .found(changes.join("; "))
                .hint("prepare it again with `--force`, or set another `data.output`")
                .into());
        }
        for entry in &manifest.shards {
            let path = folder.join(&entry.file);
            if !fs::metadata(&path).is_ok_and(|metadata| metadata.len() == entry.bytes) {
                return Err(shard::damaged(&path, "is missing or has another size than the manifest says").into());
            }
        }
        Ok(Some(manifest))
    }

    fn changes(&self, manifest: &Manifest) -> anyhow::Result<Vec<String>> {
        let mut changes = setting_changes(&manifest.settings, &self.settings);
        if manifest.tokenizer_fingerprint != self.tokenizer_fingerprint {
            let (old, new) = (&manifest.tokenizer_fingerprint, self.tokenizer_fingerprint);
            changes.push(format!("tokenizer was blake3 {}, is {}", short(old), short(new)));
        }
        self.input_changes(&manifest.inputs, &mut changes)?;
        Ok(changes)
    }

    fn input_changes(&self, old: &[InputEntry], changes: &mut Vec<String>) -> anyhow::Result<()> {
        let num_before = changes.len();
        let before: BTreeMap<&str, &InputEntry> = old.iter().map(|entry| (entry.url.as_str(), entry)).collect();
        let now: BTreeSet<&str> = self.inputs.iter().map(|input| input.url.as_str()).collect();
        let gone = before.keys().filter(|url| !now.contains(*url));
        changes.extend(gone.map(|url| format!("input {url} is gone")));
        for input in self.inputs {
            match before.get(input.url.as_str()) {
                None => changes.push(format!("input {} is new", input.url)),
                Some(entry) => changes.extend(input_change(entry, input)?),
            }
        }
        let same_order = old.iter().map(|entry| &entry.url).eq(self.inputs.iter().map(|input| &input.url));
        if changes.len() == num_before && !same_order {
            changes.push("inputs come in another order or number".to_owned());
        }
        Ok(())
    }
}

/// Refuses prepared data whose recipe said something else about it: what was held out, cut or filtered must be what the run states.
///
/// The seed may differ, so that runs with several seeds share their data.
///
/// # Errors
/// [`FailureKind::Mismatch`] that names every setting with both values.
pub fn check_prepared(recipe: &Recipe, manifest: &Manifest) -> Result<(), Failure> {
    let without_seed = |mut settings: BTreeMap<String, Value>| {
        settings.remove(SEED);
        settings
    };
    let changes = setting_changes(&without_seed(manifest.settings.clone()), &without_seed(settings(recipe)));
    if changes.is_empty() {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Mismatch, "the data was prepared by another recipe")
        .at(recipe.data.output.display())
        .expected("the settings that it was prepared with")
        .found(changes.join("; "))
        .hint("prepare it again (`cloze data prepare RECIPE --force`), or set another `data.output`"))
}

fn setting_changes(old: &BTreeMap<String, Value>, new: &BTreeMap<String, Value>) -> Vec<String> {
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let value = |settings: &BTreeMap<String, Value>, key: &String| settings.get(key).cloned().unwrap_or(Value::Null);
    let pairs = keys.into_iter().map(|key| (key, value(old, key), value(new, key)));
    pairs.filter(|(_, old, new)| old != new).map(|(key, old, new)| format!("{key} was {old}, is {new}")).collect()
}

/// Says how an input changed. One of the same size with a new date is read, since copying a file changes its date.
fn input_change(entry: &InputEntry, input: &Input) -> anyhow::Result<Option<String>> {
    if entry.size != input.info.size {
        return Ok(Some(format!("input {} had {} bytes, has {}", input.url, entry.size, input.info.size)));
    }
    if entry.version == input.version() {
        return Ok(None);
    }
    let now = content_hash(input)?;
    Ok((now != entry.blake3).then(|| format!("input {} was blake3 {}, is {}", input.url, short(&entry.blake3), short(&now))))
}

/// Enough of a hash to tell two apart.
fn short(hash: &str) -> &str {
    hash.get(..16).unwrap_or(hash)
}

/// All settings that decide what is in the shards.
pub(super) fn settings(recipe: &Recipe) -> BTreeMap<String, Value> {
    let mut settings = sample_settings(recipe);
    settings.insert(SEED.to_owned(), json!(recipe.seed));
    settings.insert("data.cap_per_task".to_owned(), json!(recipe.data.cap_per_task));
    settings.insert("data.wanted_total".to_owned(), json!(recipe.data.wanted_total));
    let tasks: Vec<&Option<String>> = recipe.data.sources.iter().map(|source| &source.task).collect();
    settings.insert("data.sources.task".to_owned(), json!(tasks));
    // Keys that came later are there only where they change something, so that what was prepared before still fits.
    if let Some(max_tasks) = recipe.data.max_tasks {
        settings.insert("data.max_tasks".to_owned(), json!(max_tasks));
    }
    if recipe.data.fraction < 1.0 {
        settings.insert("data.fraction".to_owned(), json!(recipe.data.fraction));
    }
    settings
}

/// Name of the part of an input: a hash of everything that the part depends on.
pub(super) fn part_key(recipe: &Recipe, tokenizer_fingerprint: &str, input: &Input) -> String {
    let identity = json!([
        PART_FORMAT,
        sample_settings(recipe),
        tokenizer_fingerprint,
        input.url,
        input.info.size,
        input.info.etag,
        input.info.last_modified_us,
        input.default_task,
    ]);
    blake3::hash(identity.to_string().as_bytes()).to_hex().to_string()
}

/// The settings that decide what becomes of one record.
fn sample_settings(recipe: &Recipe) -> BTreeMap<String, Value> {
    let data = &recipe.data;
    let settings = [
        ("model.anchor_token", json!(recipe.model.anchor_token)),
        ("data.hold_out", json!(data.hold_out)),
        ("data.hold_out_templates", json!(data.hold_out_templates)),
        ("data.max_length", json!(data.max_length)),
        ("data.truncate", json!(data.truncate)),
        ("data.template", json!(data.template)),
    ];
    let only = (!data.only.is_empty()).then(|| ("data.only", json!(data.only)));
    settings.into_iter().chain(only).map(|(key, value)| (key.to_owned(), value)).collect()
}
