//! `cloze eval`: scores a model on a recipe's evaluation tasks; table on stdout, JSON and Markdown in a folder.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cloze_data::tokenizer::Tokenizer;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::{Precision, Recipe};
use tch::Device;

use crate::checkpoint::{CheckpointStore, StorePolicy, atomic_write};
use crate::eval::report::Report;
use crate::eval::task::{self, Scorer};
use crate::model::folder;
use crate::model::modernbert::{ModernBert, Placement};
use crate::worker::checkpoint_url;

/// What is evaluated.
#[derive(Debug)]
pub struct EvaluateOptions {
    /// The recipe with the tasks.
    pub recipe: PathBuf,
    /// Run whose newest good checkpoint is scored; without run and model it is the model that the recipe starts from.
    pub run: Option<PathBuf>,
    /// Model folder to score instead.
    pub model: Option<PathBuf>,
    /// Folder for `eval.json` and `eval.md`.
    pub output: PathBuf,
    /// Cores that this program may use; `None` is all.
    pub cores: Option<u32>,
    /// Folder of another `PyTorch`, for its CUDA half.
    pub torch_folder: Option<PathBuf>,
}

/// Scores every task and writes the results.
pub fn evaluate(options: &EvaluateOptions, stdout: &mut dyn Write) -> Result<()> {
    let recipe = cloze_recipes::load(&options.recipe, &[])?;
    if recipe.evaluation.is_empty() {
        return Err(Failure::new(FailureKind::Recipe, "the recipe has no evaluation tasks")
            .at(options.recipe.display())
            .hint("add `evaluation:` with at least one task")
            .into());
    }
    let device = crate::device::open(recipe.train.device, 0, options.torch_folder.as_deref())?;
    crate::device::set_threads(recipe.train.threads, options.cores, 1);
    let placement =
        Placement { device, trainable: false, bfloat16: recipe.train.precision == Precision::Bfloat16 && device != Device::Cpu };
    let tokenizer = match &options.model {
        Some(model) => Tokenizer::load_with_anchor(model, &recipe.model.anchor_token)?.0,
        None => Tokenizer::load_with_anchor(&recipe.model.tokenizer, &recipe.model.anchor_token)?.0,
    };
    let (model, source) = load(options, &recipe, &tokenizer, placement)?;
    let scorer = Scorer { model: &model, tokenizer: &tokenizer, anchor: &recipe.model.anchor_token };
    let mut results = Vec::new();
    for wanted in &recipe.evaluation {
        tracing::info!(task = wanted.name, "scoring");
        results.push(task::run(&scorer, wanted).with_context(|| format!("score task {}", wanted.name))?);
    }
    let report = Report::new(source, recipe.name.clone(), recipe.hash(), results);
    std::fs::create_dir_all(&options.output).map_err(|error| {
        Failure::new(FailureKind::Storage, "the output folder cannot be made").at(options.output.display()).because(error)
    })?;
    atomic_write(&options.output.join("eval.json"), report.json()?.as_bytes())?;
    atomic_write(&options.output.join("eval.md"), report.markdown().as_bytes())?;
    writeln!(stdout, "{}", report.table()).context("print the table")
}

/// The model to score, and where it came from.
fn load(options: &EvaluateOptions, recipe: &Recipe, tokenizer: &Tokenizer, placement: Placement) -> Result<(ModernBert, String)> {
    if let Some(path) = &options.model {
        let model = folder::load(path, placement)?;
        folder::check_tokenizer(tokenizer, model.config(), path)?;
        return Ok((model, path.display().to_string()));
    }
    let mut model = ModernBert::new(folder::config_of(&recipe.model, tokenizer)?, placement)?;
    match &options.run {
        Some(run) => {
            let url = load_newest(recipe, run, &mut model)?;
            Ok((model, url))
        }
        None => {
            folder::first_values(&mut model, &recipe.model, recipe.seed)?;
            Ok((model, "untuned: the model that the recipe starts from".to_owned()))
        }
    }
}

/// Loads a run's newest good checkpoint; returns its url.
pub fn load_newest(recipe: &Recipe, run: &Path, model: &mut ModernBert) -> Result<String> {
    let url = checkpoint_url(recipe, run);
    let store = CheckpointStore::open(&url, &recipe.checkpoint.options, StorePolicy::default())?;
    let Some(loaded) = store.latest_good()? else {
        return Err(Failure::new(FailureKind::Input, "the run has no checkpoint yet")
            .at(&url)
            .hint("let it run until its first checkpoint")
            .into());
    };
    for skipped in &loaded.skipped {
        tracing::warn!(checkpoint = skipped, "damaged checkpoint passed over");
    }
    model.parameters_mut().load(&loaded.model, &loaded.url)?;
    Ok(loaded.url)
}
