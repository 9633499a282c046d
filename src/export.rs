//! `cloze export`: a run's newest good checkpoint as a model folder that transformers opens.

use std::path::{Path, PathBuf};

use anyhow::Result;
use bytes::Bytes;
use cloze_data::tokenizer::Tokenizer;
use cloze_recipes::failure::{Failure, FailureKind};
use tch::Device;

use crate::checkpoint::{NamedTensorOwned, atomic_write, hf};
use crate::evaluate::load_newest;
use crate::model::folder;
use crate::model::modernbert::{ModernBert, Placement};

/// Writes the folder; it appears whole or not at all. Returns the url of the checkpoint.
pub fn export(run: &Path, output: &Path) -> Result<String> {
    check_is_free(output)?;
    let recipe = cloze_recipes::load(&run.join("recipe.yaml"), &[])?;
    let tokenizer = Tokenizer::load(&recipe.model.tokenizer)?;
    let placement = Placement { device: Device::Cpu, trainable: false, bfloat16: false };
    let mut model = ModernBert::new(folder::config_of(&recipe.model, &tokenizer)?, placement)?;
    let url = load_newest(&recipe, run, &mut model)?;
    let parameters = model.parameters();
    let weights = parameters.named(parameters.values())?;
    write_folder(output, &weights, &folder::companion_files(model.config(), &tokenizer)?)?;
    Ok(url)
}

/// Refuses a folder that exists: what is in it might be mixed with the model.
pub fn check_is_free(output: &Path) -> Result<(), Failure> {
    if !output.exists() {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Storage, "the output folder exists already")
        .at(output.display())
        .hint("name a new folder, or remove this one"))
}

/// Writes weights and the other files of a model; the folder appears whole or not at all.
pub fn write_folder(output: &Path, weights: &[NamedTensorOwned], companions: &[(String, Bytes)]) -> Result<()> {
    let storage = |what: &str, error: std::io::Error| Failure::new(FailureKind::Storage, what).at(output.display()).because(error);
    check_is_free(output)?;
    let partial = partial_folder(output);
    std::fs::create_dir_all(&partial).map_err(|error| storage("the output folder cannot be made", error))?;
    let written = write(&partial, weights, companions).and_then(|()| {
        Ok(std::fs::rename(&partial, output).map_err(|error| storage("the output folder cannot be moved into place", error))?)
    });
    if written.is_err() {
        // The first error is the one to report; what is left of the attempt is of no use.
        drop(std::fs::remove_dir_all(&partial));
    }
    written
}

fn write(folder: &Path, weights: &[NamedTensorOwned], companions: &[(String, Bytes)]) -> Result<()> {
    hf::write_weights(folder, weights)?;
    companions.iter().try_for_each(|(name, content)| atomic_write(&folder.join(name), content))
}

fn partial_folder(output: &Path) -> PathBuf {
    let name = output.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    output.with_file_name(format!(".{name}.{}", std::process::id()))
}
