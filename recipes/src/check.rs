//! From the raw types to the checked recipe: what two values together, or a value's text, can break.
//!
//! A section is checked when its form is right, so that one failure shows as many problems as can be told at once.

mod around;
mod data;
mod evaluation;
mod expected;
mod job;
mod model;
mod operation;
mod site;
mod sweep;
mod template;
mod train;

pub(crate) use around::Around;
pub(crate) use site::preflight;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Value as Json, json};

use crate::paths;
use crate::problem::Problems;
use crate::raw::{CheckpointRaw, ClusterRaw, DataRaw, EvaluationRaw, ModelRaw, ObjectiveRaw, TrainRaw, defaults};
use crate::recipe::{Auxiliary, ClusterRecipe, DataRecipe, ModelRecipe, ObjectiveRecipe, Recipe, TrainRecipe};
use crate::site::Site;
use crate::tree::{Node, Value};

/// Longest name of a run or a task, in characters: it becomes a folder or a file.
const MAX_NAME_CHARS: usize = 100;

/// Checks the composed tree; `problems` holds what the schema found. Fails if anything is wrong.
pub(crate) fn check(root: &Node, problems: Problems, current_folder: &Path) -> Result<Recipe, Problems> {
    let mut context = Context { root, problems, current_folder, prefix: "" };
    let recipe = checked_run(&mut context);
    finished(context, recipe)
}

/// Checks the composed tree with what stands around the run.
pub(crate) fn check_study(root: &Node, problems: Problems, current_folder: &Path) -> Result<(Recipe, Around), Problems> {
    let mut context = Context { root, problems, current_folder, prefix: "" };
    let recipe = checked_run(&mut context);
    let around = around::check(&mut context);
    finished(context, recipe.zip(around))
}

/// Checks a cluster file.
pub(crate) fn check_site(root: &Node, problems: Problems, current_folder: &Path) -> Result<Site, Problems> {
    let mut context = Context { root, problems, current_folder, prefix: "" };
    if !context.problems.is_empty() {
        return Err(context.problems);
    }
    let site = match serde_json::from_value(root.json()) {
        Ok(raw) => Some(site::check(&mut context, raw)),
        Err(error) => {
            context.problem("", error.to_string());
            None
        }
    };
    finished(context, site)
}

/// What was checked, if nothing is wrong.
fn finished<T>(context: Context<'_>, checked: Option<T>) -> Result<T, Problems> {
    match checked {
        Some(checked) if context.problems.is_empty() => Ok(checked),
        _ => Err(context.problems),
    }
}

/// Checks the sections that one run obeys; `None` where one of them cannot be read.
fn checked_run(context: &mut Context<'_>) -> Option<Recipe> {
    let raw = RawSections::read(context);

    if let Some(name) = &raw.name {
        context.name("name", name);
    }
    let model = raw.model.map(|section| model::check(context, section));
    let data = raw.data.map(|section| data::check(context, section));
    let train = raw.train.as_ref().map(|section| train::check(context, section));
    let objective = raw.objective.as_ref().map(checked_objective);
    let checkpoint = raw.checkpoint.map(|section| operation::checkpoint(context, section));
    let cluster = raw.cluster.as_ref().map(ClusterRecipe::from);
    let max_length = data.as_ref().map_or_else(defaults::max_length, |data| data.max_length);
    let evaluation = raw.evaluation.map(|tasks| evaluation::check(context, tasks, max_length));
    check_lengths(context, model.as_ref(), data.as_ref(), train.as_ref());

    Some(Recipe {
        version: raw.version?,
        name: raw.name?,
        seed: raw.seed?,
        model: model?,
        data: data?,
        objective: objective?,
        train: train?,
        checkpoint: checkpoint?,
        cluster: cluster?,
        evaluation: evaluation?,
    })
}

/// The sections whose form is right.
struct RawSections {
    version: Option<u32>,
    name: Option<String>,
    seed: Option<u64>,
    model: Option<ModelRaw>,
    data: Option<DataRaw>,
    objective: Option<ObjectiveRaw>,
    train: Option<TrainRaw>,
    checkpoint: Option<CheckpointRaw>,
    cluster: Option<ClusterRaw>,
    evaluation: Option<Vec<EvaluationRaw>>,
}

impl RawSections {
    fn read(context: &mut Context<'_>) -> Self {
        Self {
            version: context.section("version", Json::Null),
            name: context.section("name", Json::Null),
            seed: context.section("seed", defaults::seed().into()),
            model: context.section("model", json!({})),
            data: context.section("data", json!({})),
            objective: context.section("objective", json!({})),
            train: context.section("train", json!({})),
            checkpoint: context.section("checkpoint", json!({})),
            cluster: context.section("cluster", json!({})),
            evaluation: context.section("evaluation", json!([])),
        }
    }
}

/// Without an auxiliary objective no example takes it, whatever the ratio says.
fn checked_objective(raw: &ObjectiveRaw) -> ObjectiveRecipe {
    ObjectiveRecipe {
        auxiliary: raw.auxiliary,
        auxiliary_ratio: if raw.auxiliary == Auxiliary::None { 0.0 } else { raw.auxiliary_ratio },
        mask_probability: raw.mask_probability,
        masking: raw.masking,
        loss_norm: raw.loss_norm,
    }
}

/// A sample must fit into a micro batch and into the positions of the model.
fn check_lengths(context: &mut Context<'_>, model: Option<&ModelRecipe>, data: Option<&DataRecipe>, train: Option<&TrainRecipe>) {
    let Some(data) = data else { return };
    let max_length = data.max_length;
    if let Some(train) = train
        && train.micro_batch_tokens < max_length
    {
        let expected = format!("at least data.max_length, which is {max_length}");
        context.mismatch("train.micro_batch_tokens", train.micro_batch_tokens, expected);
    }
    if let Some(shape) = model.and_then(|model| model.shape.as_ref())
        && shape.max_position_embeddings < max_length
    {
        let expected = format!("at most the model's max_position_embeddings, which is {}", shape.max_position_embeddings);
        context.mismatch("data.max_length", max_length, expected);
    }
}

/// Puts the keys that are `null` back where a path of keys leads, in every item of a list on the way.
fn restore_nulls(node: &Node, value: &mut Json, keys: &[&str]) {
    if let (Value::List(nodes), Json::Array(items)) = (&node.value, &mut *value) {
        nodes.iter().zip(items).for_each(|(node, item)| restore_nulls(node, item, keys));
        return;
    }
    match keys.split_first() {
        None => *value = node.json_with_nulls(),
        Some((key, rest)) => {
            if let (Some(inner), Some(slot)) = (node.get(key), value.get_mut(*key)) {
                restore_nulls(inner, slot, rest);
            }
        }
    }
}

/// What the checks of all sections share.
struct Context<'run> {
    root: &'run Node,
    problems: Problems,
    current_folder: &'run Path,
    /// Section that the keys of `problem_in` and its like are below; empty is none.
    prefix: &'static str,
}

impl Context<'_> {
    /// The section, if the schema found nothing wrong in it; `absent` stands for one that is not there.
    fn section<T: DeserializeOwned>(&mut self, name: &str, absent: Json) -> Option<T> {
        let value = self.root.get(name).map_or(absent, Node::json);
        self.read_section(name, value)
    }

    /// An optional section, or an error where its form is wrong. At and below the keys of `nulls`, dotted and through lists, `null` is a value and does not unset a key.
    fn section_with<T: DeserializeOwned>(&mut self, name: &str, nulls: &[&str]) -> Result<Option<T>, ()> {
        let Some(node) = self.root.get(name) else { return Ok(None) };
        let mut value = node.json();
        for path in nulls {
            let keys: Vec<&str> = path.split('.').collect();
            restore_nulls(node, &mut value, &keys);
        }
        self.read_section(name, value).map(Some).ok_or(())
    }

    fn read_section<T: DeserializeOwned>(&mut self, name: &str, value: Json) -> Option<T> {
        if self.problems.touches(name) {
            return None;
        }
        match serde_json::from_value(value) {
            Ok(section) => Some(section),
            Err(error) => {
                // A required section may be absent because its key is misspelt, which is reported already.
                if self.problems.is_empty() {
                    self.problem(name, error.to_string());
                }
                None
            }
        }
    }

    /// Reports a problem at a dotted key path.
    fn problem(&mut self, path: &str, message: impl Into<String>) {
        self.problems.push(self.root.place_of(path), path, message);
    }

    /// Reports that one thing was found and another expected.
    fn mismatch(&mut self, path: &str, found: impl fmt::Display, expected: impl fmt::Display) {
        self.problem(path, format!("found {found}, expected {expected}"));
    }

    /// Reports a problem at keys that may have dots in themselves.
    fn problem_in(&mut self, keys: &[&str], message: impl Into<String>) {
        let own = (!self.prefix.is_empty()).then_some(self.prefix);
        let all = || own.into_iter().chain(keys.iter().copied());
        let path = all().collect::<Vec<_>>().join(".");
        self.problems.push(self.root.place_at(all()), &path, message);
    }

    /// [`Self::mismatch`] at keys that may have dots in themselves.
    fn mismatch_in(&mut self, keys: &[&str], found: impl fmt::Display, expected: impl fmt::Display) {
        self.problem_in(keys, format!("found {found}, expected {expected}"));
    }

    /// Checks a name that becomes a folder or a file.
    fn name(&mut self, path: &str, name: &str) {
        self.name_in(&path.split('.').collect::<Vec<_>>(), name);
    }

    /// [`Self::name`] at keys that may have dots in themselves.
    fn name_in(&mut self, keys: &[&str], name: &str) {
        let allowed = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
        if !name.chars().all(allowed) || name.starts_with('.') || name.len() > MAX_NAME_CHARS {
            let expected = format!("at most {MAX_NAME_CHARS} letters, digits, `-`, `_` and `.`, the first not `.`");
            self.mismatch_in(keys, format!("`{}`", crate::tree::shortened(name)), expected);
        }
    }

    /// A local path, absolute: relative to the folder of whoever states the value at `path`.
    fn path(&mut self, path: &str, stated: &str) -> PathBuf {
        let folder = self.root.place_of(path).folder();
        self.path_in(path, stated, folder)
    }

    /// A local path, absolute: relative to `folder`.
    fn path_in(&mut self, path: &str, stated: &str, folder: &Path) -> PathBuf {
        if stated.contains("://") {
            self.mismatch(path, format!("`{stated}`"), "a path on this machine, without a scheme");
        }
        paths::resolve(folder, stated)
    }

    /// Refuses secrets among an object store's options: a recipe is printed, hashed and copied into run folders.
    fn no_secrets(&mut self, path: &str, options: &BTreeMap<String, String>) {
        for name in options.keys() {
            let plain = name.to_ascii_lowercase();
            if ["secret", "token", "customer_key", "password"].iter().any(|word| plain.contains(word)) {
                self.problem(&format!("{path}.{name}"), "a secret does not belong into a recipe; set it in the environment (`AWS_…`)");
            }
        }
    }

    /// A URL whose scheme is known, or a path made absolute in `folder`.
    fn url(&mut self, path: &str, stated: &str, folder: &Path) -> String {
        let Some((scheme, rest)) = stated.split_once("://") else {
            // The folder is UTF-8 and so is the stated path: nothing is lost.
            return paths::resolve(folder, stated).to_string_lossy().into_owned();
        };
        let known = match scheme {
            "file" => rest.starts_with('/'),
            "s3" | "gs" | "az" => !rest.is_empty() && !rest.starts_with('/'),
            _ => false,
        };
        if !known {
            self.mismatch(path, format!("`{stated}`"), "`file:///path`, `s3://bucket/prefix`, `gs://…`, `az://…` or a path");
        }
        stated.to_owned()
    }

    /// Checks that each text compiles as a regular expression.
    fn regexes(&mut self, path: &str, patterns: &[String]) {
        for (index, pattern) in patterns.iter().enumerate() {
            if let Err(error) = regex::Regex::new(pattern) {
                // The error draws the pattern over several lines; the last one says what is wrong.
                let error = error.to_string();
                let reason = error.lines().last().unwrap_or("").trim_start_matches("error: ");
                self.mismatch(&format!("{path}.{index}"), format!("`{pattern}`"), format!("a regular expression ({reason})"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::failure::Failure;
    use crate::load;
    use crate::recipe::Recipe;

    const RECIPE: &str = "version: 1
name: demo
model: {preset: tiny, tokenizer: t}
data: {sources: [{url: corpus}], output: out, max_length: 128}
train: {steps: 10, batch_examples: 4, micro_batch_tokens: 256, learning_rate: 1e-3}
";

    fn loaded(overrides: &[&str]) -> anyhow::Result<Recipe> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.yaml");
        std::fs::write(&path, RECIPE).unwrap();
        load(&path, &overrides.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
    }

    /// The lines below the headline.
    fn problems(overrides: &[&str]) -> Vec<String> {
        let error = loaded(overrides).unwrap_err();
        error.downcast_ref::<Failure>().unwrap().what.lines().skip(1).map(str::to_owned).collect()
    }

    #[test]
    fn each_contradiction_has_its_words() {
        let evaluation = "evaluation=[{name: e, files: [f], labels: [{value: a}, {value: b, words: [a]}]}]";
        let two_tasks =
            "evaluation=[{name: e, files: [f], labels: [{value: a}, {value: b}]}, {name: e, files: [f], labels: [{value: a}, {value: b}]}]";
        let table = [
            ("name=a b", "name: found `a b`, expected at most 100 letters, digits, `-`, `_` and `.`, the first not `.`"),
            ("model.path=m", "found `path` together with `preset` or `shape`, expected one source; unset the other with `null`"),
            ("model.preset=", "model: found neither `path` nor `preset`, expected one source of the model"),
            ("model.tokenizer=", "model: found no `tokenizer`, expected the folder with tokenizer.json: only a `path` brings its own"),
            ("model.tokenizer=s3://b/t", "model.tokenizer: found `s3://b/t`, expected a path on this machine, without a scheme"),
            ("model.shape.num_attention_heads=3", "found 3, expected a divisor of hidden_size, which is 128"),
            ("model.shape.num_attention_heads=128", "found 128, which makes heads of width 1, expected an even head width"),
            ("model.shape.local_attention=5", "found 5, expected an even number: half of it lies on each side"),
            ("model.shape.max_position_embeddings=64", "found 128, expected at most the model's max_position_embeddings, which is 64"),
            ("data.only=[\"(\"]", "data.only.0: found `(`, expected a regular expression (unclosed group)"),
            ("data.fraction=0", "data.fraction: found 0, expected a number above 0 and at most 1"),
            ("data.max_tasks=0", "data.max_tasks: found 0, expected an integer of at least 1"),
            ("data.hold_out=[\"(\"]", "data.hold_out.0: found `(`, expected a regular expression (unclosed group)"),
            ("data.template=\"{inputs} {anchor}\"", "data.template: found `{target}` 0 times, expected it once"),
            ("data.template=\"{inputs} {target}\"", "data.template: found `{anchor}` 0 times, expected it once"),
            ("data.template=\"{anchor} {target}\"", "data.template: found no `{inputs}`, expected it at least once"),
            (
                "data.template=\"{inputs} {x} {anchor} {target}\"",
                "data.template: found `{x}`, expected `{inputs}`, `{anchor}` or `{target}`",
            ),
            (
                "data.template=\"{inputs} {target} {anchor}\"",
                "data.template: found `{target}` before `{anchor}`, expected the anchor first",
            ),
            ("data.template=\"{anchor} {inputs} {target}\"", "data.template: found `{inputs}` after `{anchor}`, expected the inputs first"),
            (
                "checkpoint.options={aws_secret_access_key: x}",
                "checkpoint.options.aws_secret_access_key: a secret does not belong into a recipe; set it in the environment (`AWS_…`)",
            ),
            (
                "data.sources.0.url=ftp://b",
                "data.sources.0.url: found `ftp://b`, expected `file:///path`, `s3://bucket/prefix`, `gs://…`, `az://…` or a path",
            ),
            (
                "checkpoint.url=s3://",
                "checkpoint.url: found `s3://`, expected `file:///path`, `s3://bucket/prefix`, `gs://…`, `az://…` or a path",
            ),
            (
                "checkpoint.keep_every_steps=750",
                "checkpoint.keep_every_steps: found 750, expected a multiple of checkpoint.every_steps, which is 500",
            ),
            ("train.epochs=1", "found both `steps` and `epochs`, expected exactly one of them; unset the other with `null`"),
            ("train.steps=", "train: found neither `steps` nor `epochs`, expected exactly one of them"),
            ("train.betas=[0.9, 1]", "train.betas.1: found 1, expected a number of at least 0 and below 1"),
            ("train.micro_batch_tokens=64", "found 64, expected at least data.max_length, which is 128"),
            ("train.precision=bfloat16", "found `bfloat16` with `device: cpu`, expected `float32` on a cpu, or `device: cuda`"),
            ("train.schedule.warmup_steps=11", "found 11, expected at most train.steps, which is 10"),
            ("train.schedule={kind: wsd, decay_ratio: 1}", "found 1 after a warm-up of 0.05, expected both together at most 1"),
            (evaluation, "evaluation.0.labels.1.words: found `a`, which already stands for `a`, expected words of one label only"),
            (two_tasks, "evaluation.1.name: found `e` a second time, expected names that differ"),
        ];
        for (text, expected) in table {
            let found = problems(&[text]);
            assert_eq!(found.len(), 1, "{text}: {found:?}");
            assert!(found[0].ends_with(expected), "{text}: {}", found[0]);
        }
    }

    #[test]
    fn two_ways_to_say_one_thing_are_refused() {
        let table = [
            ("data={cap_per_task: 3, wanted_total: 4}", "data.wanted_total: found both `cap_per_task` and `wanted_total`"),
            (
                "train.schedule={warmup_steps: 3, warmup_ratio: 0.1}",
                "train.schedule.warmup_ratio: found both `warmup_steps` and `warmup_ratio`",
            ),
        ];
        for (text, expected) in table {
            let found = problems(&[text]);
            assert!(found.len() == 1 && found[0].contains(expected), "{text}: {found:?}");
        }
    }

    #[test]
    fn csv_columns_bound_the_prompt_and_the_answer() {
        let task = "{name: e, files: [f], columns: [q, a], labels: [{value: x}, {value: y}]}";
        let found = problems(&[&format!("evaluation=[{task}]")]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].ends_with("template: found `{inputs}`, expected `{anchor}`, `{mask}` or one of the columns q, a"), "{}", found[0]);
        assert!(found[1].ends_with("answer_column: found `targets`, expected one of the columns q, a"), "{}", found[1]);
    }

    #[test]
    fn sections_of_right_form_are_checked_beside_wrong_ones() {
        let found = problems(&["train.lerning_rate=1", "data.cap_per_task=1", "data.wanted_total=1"]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("--set train.lerning_rate=1: train.lerning_rate: unknown key"), "{}", found[0]);
        assert!(found[1].starts_with("--set data.wanted_total=1: data.wanted_total: found both"), "{}", found[1]);
    }

    #[test]
    fn a_misspelt_section_is_one_problem() {
        let found = problems(&["train=", "trian={steps: 1}"]);
        assert_eq!(found, ["--set trian={steps: 1}: trian: unknown key; did you mean `train`?"]);
    }

    #[test]
    fn what_is_stated_replaces_the_default() {
        let schedule = loaded(&["train.schedule.warmup_steps=3"]).unwrap().train.schedule;
        assert_eq!((schedule.warmup_steps, schedule.warmup_ratio), (Some(3), None));
        let objective = loaded(&["objective.auxiliary=none"]).unwrap().objective;
        assert!(objective.auxiliary_ratio.abs() < f64::EPSILON, "no auxiliary objective, no share of it");
        let shape = loaded(&["model.shape.num_hidden_layers=2"]).unwrap().model.shape.unwrap();
        assert_eq!((shape.num_hidden_layers, shape.hidden_size), (2, 128));
        let task = "evaluation=[{name: e, files: [f], labels: [{value: a}, {value: b, words: [c, d]}]}]";
        let task = loaded(&[task]).unwrap().evaluation.remove(0);
        assert_eq!(task.max_length, 128, "the length of the training data");
        assert_eq!((task.labels[0].words.join(" "), task.labels[1].words.join(" ")), ("a".to_owned(), "c d".to_owned()));
    }
}
