//! `cloze plan`: what a run of a recipe will need, without starting anything.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use cloze_data::batch::total_steps;
use cloze_data::manifest::Manifest;
use cloze_data::tokenizer::Tokenizer;
use cloze_launcher::plan::{MemoryPlan, memory, parameters};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::raw::Preset;
use cloze_recipes::recipe::{ModelShape, Recipe};
use comfy_table::{CellAlignment, Table, presets};
use serde::Deserialize;

use super::arguments::RecipeArguments;

/// The vocabulary of a new model is rounded up to a multiple of this.
const VOCABULARY_MULTIPLE: u32 = 64;

/// Largest config.json that is read, in bytes; real ones have a few thousand.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Arguments of `cloze plan`.
#[derive(Args)]
pub struct PlanArguments {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArguments,
    /// Workers of the run
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub workers: u32,
}

/// Prints parameters, steps, tokens of a step, and the memory of one worker.
pub fn plan(arguments: &PlanArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let recipe = arguments.recipe.load()?;
    let (shape, vocab) = model_of(&recipe)?;
    let data = Manifest::find(&recipe.data.output)?;
    let memory = memory(&shape, vocab, &recipe.train, arguments.workers);
    let facts = facts(&recipe, parameters(&shape, vocab), data.as_ref(), arguments.workers);
    write!(stdout, "{}", text(&facts, &memory)).context("print the plan")?;
    Ok(ExitCode::SUCCESS)
}

/// Extents of the model and rows of its embedding.
fn model_of(recipe: &Recipe) -> Result<(ModelShape, u64)> {
    match (&recipe.model.path, &recipe.model.shape) {
        (Some(folder), _) => Ok(model_in(folder)?),
        (None, Some(shape)) => {
            let tokenizer = Tokenizer::load(&recipe.model.tokenizer)?;
            Ok((shape.clone(), tokenizer.vocab_size().next_multiple_of(VOCABULARY_MULTIPLE).into()))
        }
        (None, None) => Err(Failure::new(FailureKind::Recipe, "the recipe names neither a model folder nor a shape").into()),
    }
}

/// The part of a model folder's config.json that decides about memory.
#[derive(Deserialize)]
struct ConfigSizes {
    vocab_size: u64,
    hidden_size: u32,
    intermediate_size: u32,
    num_hidden_layers: u32,
    num_attention_heads: u32,
    max_position_embeddings: Option<u32>,
}

fn model_in(folder: &Path) -> Result<(ModelShape, u64), Failure> {
    let path = folder.join("config.json");
    let unreadable = |error: std::io::Error| {
        Failure::new(FailureKind::Input, "a file of the model folder cannot be read").at(path.display()).because(error)
    };
    let size = std::fs::metadata(&path).map_err(unreadable)?.len();
    if size > CONFIG_BYTES_MAX {
        return Err(Failure::new(FailureKind::Input, "config.json is too large")
            .at(path.display())
            .expected(format!("at most {CONFIG_BYTES_MAX} bytes"))
            .found(size));
    }
    let bytes = std::fs::read(&path).map_err(unreadable)?;
    let config: ConfigSizes = serde_json::from_slice(&bytes)
        .map_err(|error| Failure::new(FailureKind::Damaged, "config.json is not valid").at(path.display()).because(error))?;
    let defaults = Preset::Base.shape();
    let shape = ModelShape {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        max_position_embeddings: config.max_position_embeddings.unwrap_or(defaults.max_position_embeddings),
        ..defaults
    };
    Ok((shape, config.vocab_size))
}

/// What is known of the run, by name.
fn facts(recipe: &Recipe, parameters: u64, data: Option<&Manifest>, workers: u32) -> Vec<(&'static str, String)> {
    let steps = match (data, recipe.train.steps) {
        (Some(data), _) => grouped(total_steps(&recipe.train, data.samples)),
        (None, Some(steps)) => grouped(steps),
        (None, None) => "known when the data is prepared".to_owned(),
    };
    let examples = u64::from(recipe.train.batch_examples);
    let tokens = match data.filter(|data| data.samples > 0) {
        Some(data) => format!("about {}", grouped((data.tokens as f64 / data.samples as f64 * examples as f64).round() as u64)),
        None => format!("at most {}", grouped(examples * u64::from(recipe.data.max_length))),
    };
    vec![
        ("recipe", format!("{}, hash {}", recipe.name, recipe.hash())),
        ("parameters", grouped(parameters)),
        ("steps", steps),
        ("examples of a step", grouped(examples)),
        ("tokens of a step", tokens),
        ("workers", grouped(workers.into())),
    ]
}

fn text(facts: &[(&'static str, String)], memory: &MemoryPlan) -> String {
    let lines: String = facts.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["memory of a worker", "MiB"]);
    for (name, bytes) in memory.parts.iter().copied().chain([("total", memory.total)]) {
        table.add_row([name.to_owned(), mebibytes(bytes)]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{lines}\n{table}\n")
}

/// Rounded up, so that what needs memory never shows as zero.
fn mebibytes(bytes: u64) -> String {
    grouped(bytes.div_ceil(1 << 20))
}

/// A number with its digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1 000"), (12_345_678, "12 345 678")] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn the_plan_is_read_at_a_glance() {
        let memory = MemoryPlan { parts: vec![("parameters", 4 << 20), ("activations", 1)], total: (4 << 20) + 1 };
        let expected = "\
parameters: 149 014 272
steps: 10

| memory of a worker | MiB |
|--------------------|-----|
| parameters         |   4 |
| activations        |   1 |
| total              |   5 |
";
        assert_eq!(text(&[("parameters", grouped(149_014_272)), ("steps", grouped(10))], &memory), expected);
    }

    #[test]
    fn the_sizes_of_a_model_folder_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let config = r#"{"vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
            "num_attention_heads": 12, "model_type": "modernbert"}"#;
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        let (shape, vocab) = model_in(folder.path()).unwrap();
        assert_eq!((shape, vocab), (Preset::Base.shape(), 50_368));
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert_eq!(model_in(folder.path()).unwrap_err().kind, FailureKind::Damaged);
    }
}
