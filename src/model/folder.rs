//! Model folders in Hugging Face's form: `config.json`, weights as `safetensors`, tokenizer files.

use std::path::Path;

use anyhow::Result;
use bytes::Bytes;
use cloze_data::tokenizer::Tokenizer;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::ModelRecipe;

use super::config::{Config, SpecialTokens};
use super::modernbert::{ModernBert, Placement};
use crate::checkpoint::hf;

/// Largest config or tokenizer file that is read, in bytes.
const SMALL_FILE_BYTES_MAX: u64 = 64 << 20;

/// The vocabulary of a new model is rounded up to a multiple of this, which matrix products like.
const VOCABULARY_MULTIPLE: u32 = 64;

/// Files beside `tokenizer.json` that are copied with it where they exist.
const TOKENIZER_COMPANIONS: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];

/// Loads a model and its weights.
///
/// # Errors
/// [`FailureKind::Input`] where a file is missing, [`FailureKind::Damaged`] where one is broken, [`FailureKind::Mismatch`] for another architecture.
pub fn load(folder: &Path, placement: Placement) -> Result<ModernBert> {
    let config = read_config(folder)?;
    let mut model = ModernBert::new(config, placement)?;
    let weights = hf::read_weights(folder)?;
    model.parameters_mut().load(&weights, &folder.display().to_string())?;
    Ok(model)
}

/// The configuration of the model that a recipe starts from: a folder's, or a new one for the tokenizer's vocabulary.
pub fn config_of(recipe: &ModelRecipe, tokenizer: &Tokenizer) -> Result<Config> {
    if let Some(folder) = &recipe.path {
        let config = read_config(folder)?;
        check_tokenizer(tokenizer, &config, folder)?;
        return Ok(config);
    }
    let shape =
        recipe.shape.as_ref().ok_or_else(|| Failure::new(FailureKind::Recipe, "the recipe names neither a model folder nor a shape"))?;
    let vocab_size = tokenizer.vocab_size().next_multiple_of(VOCABULARY_MULTIPLE);
    Ok(Config::new(shape, vocab_size.into()))
}

/// Fills a zeroed model with the values that a recipe starts from: a folder's weights, or new ones drawn from the seed.
pub fn first_values(model: &mut ModernBert, recipe: &ModelRecipe, seed: u64) -> Result<()> {
    match &recipe.path {
        Some(folder) => model.parameters_mut().load(&hf::read_weights(folder)?, &folder.display().to_string()),
        None => {
            model.parameters_mut().initialise(seed);
            Ok(())
        }
    }
}

/// Reads `config.json` of a folder.
pub fn read_config(folder: &Path) -> Result<Config> {
    let path = folder.join("config.json");
    let text = String::from_utf8_lossy(&read_small(&path)?).into_owned();
    Ok(Config::parse(&text, &path.display().to_string())?)
}

/// Refuses a tokenizer that does not belong to the model: one with more entries, or with other special tokens.
pub fn check_tokenizer(tokenizer: &Tokenizer, config: &Config, place: &Path) -> Result<(), Failure> {
    let mismatch = |expected: String, found: String| {
        Err(Failure::new(FailureKind::Mismatch, "the tokenizer does not belong to the model")
            .at(place.display())
            .expected(expected)
            .found(found)
            .hint(format!("`model.tokenizer` is {}", tokenizer.file_path().display())))
    };
    if i64::from(tokenizer.vocab_size()) > config.vocab_size {
        return mismatch(
            format!("at most {} entries (vocab_size in config.json)", config.vocab_size),
            format!("{} entries", tokenizer.vocab_size()),
        );
    }
    let special = [("cls_token_id", tokenizer.cls_id), ("sep_token_id", tokenizer.sep_id), ("pad_token_id", tokenizer.pad_id)];
    for (key, id) in special {
        let wanted = config.source.get(key).and_then(serde_json::Value::as_u64);
        if let (Some(wanted), Some(id)) = (wanted, id)
            && wanted != u64::from(id)
        {
            return mismatch(format!("{key} {wanted} as in config.json"), format!("{key} {id}"));
        }
    }
    Ok(())
}

/// The files that make a folder of weights a complete model: config and tokenizer, by name.
pub fn companion_files(config: &Config, tokenizer: &Tokenizer) -> Result<Vec<(String, Bytes)>> {
    let special = SpecialTokens { pad: tokenizer.pad_id, cls: tokenizer.cls_id, sep: tokenizer.sep_id };
    let mut files = vec![("config.json".to_owned(), Bytes::from(config.to_json(&special)))];
    files.push(("tokenizer.json".to_owned(), Bytes::copy_from_slice(tokenizer.file_bytes())));
    for name in TOKENIZER_COMPANIONS {
        let path = tokenizer.file_path().with_file_name(name);
        if path.exists() {
            files.push((name.to_owned(), Bytes::from(read_small(&path)?)));
        }
    }
    Ok(files)
}

fn read_small(path: &Path) -> Result<Vec<u8>, Failure> {
    let unreadable = |error: std::io::Error| {
        Failure::new(FailureKind::Input, "a file of the model folder cannot be read")
            .at(path.display())
            .because(error)
            .hint("a model folder holds config.json, model.safetensors and tokenizer.json")
    };
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > SMALL_FILE_BYTES_MAX {
        return Err(Failure::new(FailureKind::Input, "a file of the model folder is too large")
            .at(path.display())
            .expected(format!("at most {SMALL_FILE_BYTES_MAX} bytes"))
            .found(size));
    }
    std::fs::read(path).map_err(unreadable)
}
