//! One run of a study from a composed tree: its earlier stage, its content hash, and its places in the study's folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

use super::Trial;
use crate::compose::{AFTER, ProfileChoice, assign, compose};
use crate::problem::Problems;
use crate::raw::defaults;
use crate::recipe::{ModelRecipe, Recipe};
use crate::tree::{Node, Place, Scalar, Value};
use crate::{check, paths, validate};

/// Most stages before a run.
const MAX_STAGES: usize = 8;
/// Characters of a hash in a trial's name.
pub(super) const HASH_CHARS: usize = 8;
/// Characters of the recipe's name in a trial's name: with a dash and the hash at most the 100 that a name may have.
const MAX_NAME_CHARS: usize = 91;

/// What the runs of one study share.
#[derive(Clone, Copy)]
pub(crate) struct Scope<'run> {
    /// The profile that was asked for.
    pub(crate) profile: Option<&'run str>,
    /// Folder that relative outputs and overrides start from, canonical.
    pub(crate) current_folder: &'run Path,
    /// The study's folder, absolute and in UTF-8.
    pub(crate) folder: &'run Path,
    /// Schema of a recipe.
    pub(crate) schema: &'run Json,
}

/// A run to be built, apart from its tree.
pub(super) struct Request {
    pub(super) parameters: Vec<(String, Json)>,
    /// Takes the place of the recipe's own seed.
    pub(super) seed: Option<u64>,
    /// What is known to be wrong.
    pub(super) problems: Problems,
}

/// Builds runs; an earlier stage that several have is built once.
pub(crate) struct Stages<'run> {
    scope: Scope<'run>,
    /// Earlier stages by file and changes; `None` is one that is wrong, whose problems were told when it was built.
    known: BTreeMap<String, Option<Trial>>,
}

impl<'run> Stages<'run> {
    /// Knows no stage yet.
    pub(crate) fn new(scope: Scope<'run>) -> Self {
        Self { scope, known: BTreeMap::new() }
    }

    /// The earlier stage that the tree names, if it names one.
    pub(crate) fn parent_of(&mut self, root: &Node) -> Result<Option<Trial>, Problems> {
        self.parent(root, &mut Vec::new())
    }

    /// Checks and builds one run. `chain` holds the stages that wait for this one.
    pub(super) fn build(&mut self, mut root: Node, request: Request, chain: &mut Vec<String>) -> Result<Trial, Problems> {
        let Request { parameters, seed, mut problems } = request;
        let (parent, stage_problems) = match self.parent(&root, chain) {
            Ok(parent) => (parent, None),
            Err(problems) => (None, Some(problems)),
        };
        if parent.is_some() || stage_problems.is_some() {
            start_from_export(&mut root, parent.as_ref(), self.scope.folder);
        }
        validate::validate(&root, self.scope.schema, &mut problems);
        let checked = check::check(&root, problems, self.scope.current_folder);
        match (checked, stage_problems) {
            (Ok(recipe), None) => Ok(self.finished(recipe, parent, (parameters, seed))),
            (Ok(_), Some(problems)) | (Err(problems), None) => Err(problems),
            (Err(mut problems), Some(stage)) => {
                problems.absorb(stage, None);
                Err(problems)
            }
        }
    }

    fn parent(&mut self, root: &Node, chain: &mut Vec<String>) -> Result<Option<Trial>, Problems> {
        let Some(stage) = StageFile::of(root, self.scope.current_folder) else { return Ok(None) };
        let identity = stage.identity();
        if let Some(known) = self.known.get(&identity) {
            return known.clone().map(Some).ok_or_else(Problems::default);
        }
        if chain.contains(&identity) || chain.len() >= MAX_STAGES {
            let message = if chain.contains(&identity) {
                format!("found {} a second time, expected stages that do not come after each other in a circle", stage.shown.display())
            } else {
                format!("found more than {MAX_STAGES} stages before this run")
            };
            let mut problems = Problems::default();
            problems.push(&stage.place, "after.recipe", message);
            return Err(problems);
        }
        chain.push(identity.clone());
        let built = self.build_stage(&stage, chain);
        chain.pop();
        self.known.insert(identity, built.as_ref().ok().cloned());
        built.map(Some)
    }

    fn build_stage(&mut self, stage: &StageFile<'_>, chain: &mut Vec<String>) -> Result<Trial, Problems> {
        let mut problems = Problems::default();
        let choice = self.scope.profile.map(|name| ProfileChoice { name, required: false });
        let mut root = match compose(&stage.shown, &[], choice, self.scope.current_folder, &mut problems) {
            Ok(root) => root,
            Err(error) => {
                let message = format!("the earlier stage cannot be read: {}", error.to_string().replace('\n', ";"));
                problems.push(&stage.place, "after.recipe", message);
                return Err(problems);
            }
        };
        let mut parameters = Vec::new();
        for entry in stage.set {
            if let Err(message) = assign(&mut root, &entry.key, &entry.place, entry.node.clone()) {
                problems.push(&entry.place, &format!("after.set.{}", entry.key), message);
            }
            parameters.push((entry.key.clone(), entry.node.json_with_nulls()));
        }
        let built = self.build(root, Request { parameters, seed: None, problems }, chain);
        built.map_err(|problems| {
            let mut noted = Problems::default();
            noted.absorb(problems, Some(&format!("in the earlier stage {}", stage.shown.display())));
            noted
        })
    }

    fn finished(&self, mut recipe: Recipe, parent: Option<Trial>, (parameters, seed): (Vec<(String, Json)>, Option<u64>)) -> Trial {
        let is_capped = recipe.data.cap_per_task.is_some() || recipe.data.wanted_total.is_some();
        // Without a cap every sample is kept, whatever the seed: then all recipes prepare alike.
        let data_seed = if is_capped { recipe.seed } else { defaults::seed() };
        recipe.seed = seed.unwrap_or(recipe.seed);
        let data_hash = hash_of(&data_content(&recipe, data_seed));
        let hash = hash_of(&content(&recipe, &data_hash, parent.as_ref()));
        settle(&mut recipe, self.scope.folder, &hash, &data_hash);
        Trial { parameters, recipe, hash, data_hash, data_seed, parent: parent.map(Box::new) }
    }
}

/// Lets a recipe that states no model start from what its earlier stage itself started from: the sizes are those of the export.
pub(crate) fn start_as_stage(root: &mut Node, parent: Option<&Trial>, folder: &Path) {
    let has_source = root.get("model").is_some_and(|model| ["path", "preset", "shape"].iter().any(|key| model.get(key).is_some()));
    if has_source {
        return;
    }
    let Some(parent) = parent else { return start_from_export(root, None, folder) };
    let mut first = parent;
    while let Some(earlier) = &first.parent {
        first = earlier;
    }
    let ModelRecipe { path, shape, .. } = &first.recipe.model;
    let (key, value) = match (path, shape) {
        (Some(path), _) => ("model.path", json!(path)),
        (None, shape) => ("model.shape", json!(shape)),
    };
    put(root, key, &value);
    put_tokenizer(root, &parent.recipe.model.tokenizer);
}

/// Lets the run start from the export of its earlier stage; `None` stands for one that is wrong.
fn start_from_export(root: &mut Node, parent: Option<&Trial>, folder: &Path) {
    let export = folder.join("models").join(parent.map_or("", |parent| &parent.hash));
    put(root, "model.path", &json!(export));
    put(root, "model.preset", &Json::Null);
    put(root, "model.shape", &Json::Null);
    let tokenizer = parent.map_or(export.as_path(), |parent| &parent.recipe.model.tokenizer);
    put_tokenizer(root, tokenizer);
}

/// The tokenizer of the earlier stage, unless the recipe states one.
fn put_tokenizer(root: &mut Node, tokenizer: &Path) {
    if root.get("model").and_then(|model| model.get("tokenizer")).is_none() {
        put(root, "model.tokenizer", &json!(tokenizer));
    }
}

fn put(root: &mut Node, key: &str, value: &Json) {
    let place = root.place_of("model").clone();
    // It fails where `model` is no map, which the schema reports.
    let _ = assign(root, key, &place, Node::from_json(value, &place));
}

/// What prepared data depends on: all of `data` but its place, the tokenizer and the anchor, and the seed where samples are capped.
fn data_content(recipe: &Recipe, data_seed: u64) -> Json {
    let mut data = json!(recipe.data);
    remove(&mut data, &["output"]);
    json!({"data": data, "tokenizer": recipe.model.tokenizer, "anchor": recipe.model.anchor_token, "seed": data_seed})
}

/// What a run computes from: its recipe without name and places, its data, its earlier stage.
fn content(recipe: &Recipe, data_hash: &str, parent: Option<&Trial>) -> Json {
    let mut value = json!(recipe);
    remove(&mut value, &["name"]);
    remove(&mut value["data"], &["output"]);
    remove(&mut value["checkpoint"], &["url", "options", "cache"]);
    if parent.is_some() {
        remove(&mut value["model"], &["path"]);
    }
    json!({"recipe": value, "data": data_hash, "parent": parent.map(|parent| &parent.hash)})
}

fn remove(value: &mut Json, keys: &[&str]) {
    if let Json::Object(map) = value {
        keys.iter().for_each(|key| drop(map.remove(*key)));
    }
}

fn hash_of(value: &Json) -> String {
    let mut value = value.clone();
    value.sort_all_objects();
    blake3::hash(value.to_string().as_bytes()).to_hex().to_string()
}

/// Gives the run its name and the places that are its own.
fn settle(recipe: &mut Recipe, folder: &Path, hash: &str, data_hash: &str) {
    let stem: String = recipe.name.chars().take(MAX_NAME_CHARS).collect();
    recipe.name = format!("{stem}-{}", &hash[..HASH_CHARS]);
    recipe.data.output = folder.join("data").join(data_hash);
    recipe.checkpoint.url = recipe.checkpoint.url.as_ref().map(|url| format!("{}/{}", url.trim_end_matches('/'), recipe.name));
    recipe.checkpoint.cache = recipe.checkpoint.cache.as_ref().map(|cache| cache.join(&recipe.name));
}

/// An earlier stage as a tree names it.
struct StageFile<'tree> {
    /// Absolute.
    file: PathBuf,
    /// As messages show it: relative where it lies below the current folder.
    shown: PathBuf,
    /// Of the file's name.
    place: Place,
    /// What is changed in it.
    set: &'tree [crate::tree::Entry],
}

impl<'tree> StageFile<'tree> {
    /// `None` where the tree names no stage, or not in the form that the schema asks for.
    fn of(root: &'tree Node, current_folder: &Path) -> Option<Self> {
        let after = root.get(AFTER)?;
        let recipe = after.get("recipe")?;
        let Value::Scalar(Scalar::Text(stated)) = &recipe.value else { return None };
        let file = paths::resolve(recipe.place.folder(), stated);
        let shown = file.strip_prefix(current_folder).unwrap_or(&file).to_path_buf();
        let set = match after.get("set").map(|set| &set.value) {
            Some(Value::Map(entries)) => entries.as_slice(),
            _ => &[],
        };
        Some(Self { file, shown, place: recipe.place.clone(), set })
    }

    /// The same for the same run: the file, its changes, and the folders that paths in the changes start from.
    fn identity(&self) -> String {
        let file = self.file.canonicalize().unwrap_or_else(|_| self.file.clone());
        let set = self.set.iter().map(|entry| json!([entry.key, entry.node.json_with_nulls(), entry.node.place.folder()]));
        json!([file.to_string_lossy(), set.collect::<Vec<_>>()]).to_string()
    }
}
