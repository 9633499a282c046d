//! From a file and overrides to a checked recipe, or to one failure with every problem.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;

use crate::compose::ProfileChoice;
use crate::failure::{Failure, FailureKind};
use crate::problem::Problems;
use crate::recipe::Recipe;
use crate::tree::Origin;
use crate::{check, compose, paths, schema, tree, validate};

/// Reads, composes and checks a recipe, without a profile; see [`load_with_profile`].
pub fn load(path: &Path, overrides: &[String]) -> anyhow::Result<Recipe> {
    load_with_profile(path, overrides, None)
}

/// Reads, composes and checks a recipe.
///
/// `profile` names one of the recipe's profiles, which is laid over the file and its bases. `overrides` are `key.path=value` texts, applied
/// in order after that. In the checked recipe every path is absolute: those of the model, the tokenizer, the sources and the evaluation
/// files start at the folder of the file that states them (at the current folder where an override does), `data.output` and
/// `checkpoint.url` at the current folder. Nothing that a recipe points to is opened, and of the sections around the run only the form is
/// looked at; [`load_study`](crate::load_study()) reads them.
///
/// Fails with a [`Failure`] of kind `Recipe`: at once where a file cannot be read as YAML or has no such profile,
/// else with one line for each problem.
pub fn load_with_profile(path: &Path, overrides: &[String], profile: Option<&str>) -> anyhow::Result<Recipe> {
    let current_folder = std::env::current_dir().context("find the current folder")?;
    let current_folder = paths::canonical_folder(&current_folder)?;
    let mut problems = Problems::default();
    let choice = profile.map(|name| ProfileChoice { name, required: true });
    let root = compose::compose(path, overrides, choice, &current_folder, &mut problems)?;
    validate::validate(&root, &schema::schema(), &mut problems);
    let shown = path.display().to_string();
    check::check(&root, problems, &current_folder).map_err(|problems| problems.into_failure(&shown).into())
}

/// Checks a rendered recipe that is at hand as a text, under the name that messages show; fails as [`load`] does.
pub fn load_text(text: &str, shown: &str) -> anyhow::Result<Recipe> {
    let current_folder = paths::canonical_folder(&std::env::current_dir().context("find the current folder")?)?;
    let origin = Arc::new(Origin::File { shown: shown.to_owned(), folder: current_folder.clone() });
    let root = tree::parse(text, &origin)
        .map_err(|error| Failure::new(FailureKind::Recipe, "cannot read the recipe as YAML").at(error.place).because(error.message))?;
    let mut problems = Problems::default();
    validate::validate(&root, &schema::schema(), &mut problems);
    check::check(&root, problems, &current_folder).map_err(|problems| problems.into_failure(shown).into())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::check_file;
    use crate::recipe::Device;

    const RECIPE: &str = "version: 1
name: demo
model: {preset: tiny, tokenizer: t}
data: {sources: [{url: corpus}], output: out, max_length: 128}
train: {steps: 10, batch_examples: 4, micro_batch_tokens: 256, learning_rate: 1e-3}
";

    /// A temporary folder with one file, its path free of links.
    fn written(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap().join(name);
        std::fs::write(&path, text).unwrap();
        (folder, path)
    }

    fn current_folder() -> PathBuf {
        std::env::current_dir().unwrap().canonicalize().unwrap()
    }

    #[test]
    fn the_problems_of_a_file_are_one_failure() {
        let text = "version: 1
name: demo
model:
  preset: tiny
  tokenizer: tokenizer.json
data:
  sources:
    - url: corpus
  output: prepared
train:
  steps: 10
  lerning_rate: 1e-3
  micro_batch_tokens: 2048
  batch_examples: -3
";
        let (_folder, path) = written("demo.yaml", text);
        let error = load(&path, &[]).unwrap_err();
        let failure = error.downcast_ref::<Failure>().unwrap();
        assert_eq!(failure.kind, FailureKind::Recipe);
        let expected = "2 problems in demo.yaml
demo.yaml:12:3: train.lerning_rate: unknown key; did you mean `learning_rate`?
demo.yaml:14:19: train.batch_examples: found -3, expected an integer from 1 to 1048576";
        assert_eq!(failure.to_string().replace(&format!("{}/", path.parent().unwrap().display()), ""), expected);
    }

    #[test]
    fn a_missing_file_and_broken_yaml_are_failures_with_a_place() {
        let error = load(Path::new("/nowhere/r.yaml"), &[]).unwrap_err();
        assert!(error.to_string().starts_with("cannot read the recipe\n  where: /nowhere/r.yaml\n  cause: "), "{error}");

        let (_folder, path) = written("r.yaml", "version: 1\nname: [a\nmodel: x\n");
        let failure = load(&path, &[]).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.what, "cannot read the recipe as YAML");
        assert!(failure.place.unwrap().starts_with(&format!("{}:", path.display())));
    }

    #[test]
    fn a_short_recipe_is_filled_with_the_defaults() {
        let (_folder, path) = written("r.yaml", RECIPE);
        let text = load(&path, &[]).unwrap().to_yaml();
        let text = text.replace(&path.parent().unwrap().display().to_string(), "/FOLDER");
        assert_eq!(text.replace(&current_folder().display().to_string(), "/CURRENT"), DEFAULTS);
    }

    const DEFAULTS: &str = r#"version: 1
name: demo
seed: 42
model:
  path: null
  tokenizer: /FOLDER/t
  shape:
    hidden_size: 128
    intermediate_size: 192
    num_hidden_layers: 4
    num_attention_heads: 4
    global_attn_every_n_layers: 3
    local_attention: 128
    global_rope_theta: 160000.0
    local_rope_theta: 10000.0
    max_position_embeddings: 8192
  anchor_token: "[unused0]"
data:
  sources:
    - url: /FOLDER/corpus
      task: null
      options: {}
  output: /CURRENT/out
  hold_out: []
  cap_per_task: null
  wanted_total: null
  max_length: 128
  truncate: prompt_keep_answer
  template: "{inputs}\nAnswer: {anchor} {target}"
  hold_out_templates: []
objective:
  auxiliary: dummy_mlm
  auxiliary_ratio: 0.2
  mask_probability: 0.3
  masking: all_mask
  loss_norm: token_mean
train:
  steps: 10
  epochs: null
  batch_examples: 4
  micro_batch_tokens: 256
  learning_rate: 0.001
  betas:
    - 0.9
    - 0.999
  epsilon: 1e-8
  weight_decay: 0.01
  clip_norm: 1.0
  schedule:
    kind: linear
    warmup_steps: null
    warmup_ratio: 0.05
    end_ratio: 0.0
    power: 1.0
    decay_ratio: 0.1
  device: cpu
  precision: float32
  threads: 0
  log_every_steps: 1
  shard: none
  audit_samples: false
checkpoint:
  url: null
  options: {}
  every_steps: 500
  every_seconds: null
  keep_last: 2
  keep_best: 0
  keep_every_steps: null
  cache: null
  upload_timeout_s: 600
  stop_timeout_s: 120
cluster:
  max_restarts: 3
  heartbeat_timeout_ms: 2000
  collective_timeout_ms: 60000
  min_workers: null
  replacement_wait_s: 30
  coordinator_grace_s: 60
  hang:
    init_s: 600
    data_s: 300
    step_s: 300
    checkpoint_s: 600
  exclude_host_after: 0
  retries_per_step: 1
evaluation: []
"#;

    #[test]
    fn paths_start_where_they_are_stated() {
        let (_folder, path) = written("r.yaml", RECIPE);
        let folder = path.parent().unwrap();
        let overrides = ["model.tokenizer=here/t", "checkpoint.url=saved", "data.sources.0.url=s3://bucket/corpus"];
        let recipe = load(&path, &overrides.map(str::to_owned)).unwrap();
        assert_eq!(recipe.model.tokenizer, current_folder().join("here/t"), "an override starts at the current folder");
        assert_eq!(recipe.data.output, current_folder().join("out"), "outputs start at the current folder");
        assert_eq!(recipe.checkpoint.url, Some(current_folder().join("saved").display().to_string()));
        assert_eq!(recipe.data.sources[0].url, "s3://bucket/corpus");
        let recipe = load(&path, &[]).unwrap();
        assert_eq!(recipe.data.sources[0].url, folder.join("corpus").display().to_string());
    }

    #[test]
    fn the_hash_follows_the_meaning() {
        let (_folder, path) = written("r.yaml", RECIPE);
        let hash = |overrides: &[&str]| {
            let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
            load(&path, &overrides).unwrap().hash()
        };
        assert_eq!(hash(&[]).len(), 64);
        assert_eq!(hash(&[]), hash(&["seed=42", "train.clip_norm=1"]), "a default spelled out means the same");
        assert_ne!(hash(&[]), hash(&["seed=43"]));
        assert_ne!(hash(&[]), hash(&["train.learning_rate=2e-3"]));
    }

    /// Keys that came after the hash of recipes: the value that leaves everything as it was, and another one.
    const LATER_KEYS: [(&str, &str, &str); 5] = [
        ("data.only", "[]", "[a]"),
        ("data.max_tasks", "null", "3"),
        ("data.fraction", "1.0", "0.5"),
        ("data.mixing_cap", "null", "5"),
        ("train.deterministic", "false", "true"),
    ];

    #[test]
    fn a_key_that_came_later_changes_the_hash_only_where_it_is_set() {
        // Its paths are absolute, so its hash is the same everywhere.
        let text =
            RECIPE.replace("tokenizer: t", "tokenizer: /t").replace("url: corpus", "url: /corpus").replace("output: out", "output: /out");
        let (_folder, path) = written("r.yaml", &text);
        let hash = |key: &str, value: &str| load(&path, &[format!("{key}={value}")]).unwrap().hash();
        assert_eq!(load(&path, &[]).unwrap().hash(), HASH_BEFORE_LATER_KEYS);
        for (key, default, other) in LATER_KEYS {
            assert_eq!(hash(key, default), HASH_BEFORE_LATER_KEYS, "{key}={default}");
            assert_ne!(hash(key, other), HASH_BEFORE_LATER_KEYS, "{key}={other}");
        }
    }

    /// Every key that says how a run is operated, and a value that is not its default.
    const OPERATION: [(&str, &str); 25] = [
        ("train.shard", "parameters"),
        ("train.threads", "3"),
        ("train.log_every_steps", "7"),
        ("train.audit_samples", "true"),
        ("checkpoint.every_steps", "7"),
        ("checkpoint.every_seconds", "7"),
        ("checkpoint.keep_last", "7"),
        ("checkpoint.keep_best", "7"),
        ("checkpoint.keep_every_steps", "1000"),
        ("checkpoint.cache", "/cache"),
        ("checkpoint.upload_timeout_s", "7"),
        ("checkpoint.stop_timeout_s", "7"),
        ("cluster.max_restarts", "7"),
        ("cluster.heartbeat_timeout_ms", "700"),
        ("cluster.collective_timeout_ms", "7000"),
        ("cluster.min_workers", "1"),
        ("cluster.replacement_wait_s", "7"),
        ("cluster.coordinator_grace_s", "7"),
        ("cluster.hang.init_s", "7"),
        ("cluster.hang.data_s", "7"),
        ("cluster.hang.step_s", "7"),
        ("cluster.hang.checkpoint_s", "7"),
        ("cluster.exclude_host_after", "7"),
        ("cluster.retries_per_step", "7"),
        ("cluster.tls", "true"),
    ];

    #[test]
    fn how_a_run_is_operated_is_no_part_of_what_its_recipe_means() {
        let (_folder, path) = written("r.yaml", RECIPE);
        let of = |changes: &[String]| load(&path, changes).unwrap();
        let plain = of(&[]);
        assert_eq!(plain.hash(), plain.full_hash(), "hashes of before stay where nothing is set");
        for (key, value) in OPERATION {
            let changed = of(&[format!("{key}={value}")]);
            assert_eq!(changed.hash(), plain.hash(), "{key}");
            assert_ne!(changed.full_hash(), plain.full_hash(), "{key}");
            assert!(crate::is_operational(key), "{key}");
        }
        // There are no shards to replicate without one of the others.
        let replicated = of(&["train.shard=optimizer".to_owned(), "train.replicate_shards=true".to_owned()]);
        assert_eq!(replicated.hash(), plain.hash());
        assert_ne!(replicated.full_hash(), of(&["train.shard=optimizer".to_owned()]).full_hash());
        assert!(crate::is_operational("train.replicate_shards"));
        // Its checkpoints are not to be found elsewhere.
        for place in ["checkpoint.url=/other", "checkpoint.options={endpoint: e}"] {
            assert_ne!(of(&[place.to_owned()]).hash(), plain.hash(), "{place}");
        }
        // Those of other runs, and those that are of no run.
        for key in ["checkpoint.url", "checkpoint.options.endpoint", "train.steps", "train", "seed", "resources.nodes", "sweep", ""] {
            assert!(!crate::is_operational(key), "{key}");
        }
    }

    /// Hash of that recipe by a build that knew none of the later keys. Runs and studies of then go on only as long as it stays.
    const HASH_BEFORE_LATER_KEYS: &str = "0364488f33e1b02aec6331cdcce1a4548a3743c8e6e08ac69750467f92e5a733";

    /// The recipe files of this repository.
    fn shipped() -> Vec<PathBuf> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut files = Vec::new();
        for folder in ["demo", "flan", "its-all-in-the-mask", "related"] {
            for entry in std::fs::read_dir(root.join(folder)).unwrap() {
                files.push(entry.unwrap().path());
            }
        }
        files.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
        files.sort();
        files
    }

    #[test]
    fn shipped_recipes_load_and_read_back_from_their_own_text() {
        let files = shipped();
        assert_eq!(files.len(), 28, "{files:?}");
        for file in files {
            // Whole, since the model of a run after an earlier stage is that stage's.
            let recipe = crate::load_study(&file, &[], None).unwrap().recipe;
            let (_folder, path) = written("copy.yaml", &recipe.to_yaml());
            let copy = load(&path, &[]).unwrap();
            assert_eq!(copy, recipe, "{}", file.display());
            assert_eq!(load_text(&recipe.to_yaml(), "r").unwrap(), recipe, "{}", file.display());
            assert_eq!(copy.hash(), recipe.hash(), "{}", file.display());
        }
    }

    #[test]
    fn shipped_recipes_are_right_in_every_profile_and_every_trial() {
        for file in shipped() {
            let checked = check_file(&file, &[], None).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            let profiles: Vec<&str> = checked.profiles.iter().map(|(name, _)| name.as_str()).collect();
            let is_demo = file.parent().is_some_and(|folder| folder.ends_with("demo"));
            assert_eq!(profiles, if is_demo { vec![] } else { vec!["toy"] }, "{}", file.display());
            let toy = if is_demo { checked.study } else { crate::load_study(&file, &[], Some("toy")).unwrap() };
            assert_eq!((toy.recipe.train.device, toy.resources.gpus_per_node), (Device::Cpu, 0), "{}", file.display());
            assert!(is_demo || toy.recipe.data.sources.iter().all(|source| source.url.contains("/data/toy/")), "{}", file.display());
        }
    }

    #[test]
    fn the_tables_have_the_arms_of_the_paper() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let table = [
            ("its-all-in-the-mask/table1.yaml", 9, 9),
            ("its-all-in-the-mask/ratio.yaml", 27, 9),
            ("its-all-in-the-mask/table2.yaml", 1, 1),
            ("its-all-in-the-mask/table3-20ng.yaml", 9, 4),
            ("its-all-in-the-mask/table4.yaml", 6, 2),
            ("flan/held-out.yaml", 18, 6),
            ("flan/clusters.yaml", 21, 7),
            ("flan/clusters-15-tasks.yaml", 21, 7),
            ("flan/tasks-per-cluster.yaml", 12, 4),
            ("flan/mixing.yaml", 12, 4),
            ("related/muppet-tasks.yaml", 21, 3),
            ("related/quick-learners.yaml", 18, 6),
            ("related/zeroprompt-tasks.yaml", 24, 4),
            ("related/order-matters.yaml", 12, 3),
        ];
        for (file, trials, toy) in table {
            let checked = check_file(&root.join(file), &[], None).unwrap();
            assert_eq!((checked.trials.len(), checked.profiles[0].1), (trials, toy), "{file}");
        }
    }

    #[test]
    fn the_paper_variants_differ_only_in_the_objective() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("its-all-in-the-mask");
        let base = load(&folder.join("atp80_dummy20.yaml"), &[]).unwrap();
        for name in ["atp100", "atp80_mlm20"] {
            let mut variant = load(&folder.join(format!("{name}.yaml")), &[]).unwrap();
            assert_ne!(variant.objective, base.objective);
            assert!(variant.name.ends_with(name), "{}", variant.name);
            variant.objective = base.objective.clone();
            variant.name.clone_from(&base.name);
            assert_eq!(variant, base, "{name}");
        }
    }
}
