//! `cloze export`: a run's newest good checkpoint as a model folder that transformers opens.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cloze_data::tokenizer::Tokenizer;
use cloze_recipes::failure::{Failure, FailureKind};
use tch::Device;

use crate::checkpoint::{atomic_write, hf};
use crate::evaluate::load_newest;
use crate::model::folder;
use crate::model::modernbert::{ModernBert, Placement};

/// Writes the folder; it appears whole or not at all. Returns the url of the checkpoint.
pub fn export(run: &Path, output: &Path) -> Result<String> {
    let storage = |what: &str, error: std::io::Error| Failure::new(FailureKind::Storage, what).at(output.display()).because(error);
    if output.exists() {
        return Err(Failure::new(FailureKind::Storage, "the output folder exists already")
            .at(output.display())
            .hint("name a new folder, or remove this one")
            .into());
    }
    let recipe = cloze_recipes::load(&run.join("recipe.yaml"), &[])?;
    let tokenizer = Tokenizer::load(&recipe.model.tokenizer)?;
    let placement = Placement { device: Device::Cpu, trainable: false, bfloat16: false };
    let mut model = ModernBert::new(folder::config_of(&recipe.model, &tokenizer)?, placement)?;
    let url = load_newest(&recipe, run, &mut model)?;
    let partial = partial_folder(output);
    std::fs::create_dir_all(&partial).map_err(|error| storage("the output folder cannot be made", error))?;
    let written = write(&partial, &model, &tokenizer).and_then(|()| {
        Ok(std::fs::rename(&partial, output).map_err(|error| storage("the output folder cannot be moved into place", error))?)
    });
    if written.is_err() {
        // The first error is the one to report; what is left of the attempt is of no use.
        drop(std::fs::remove_dir_all(&partial));
    }
    written.map(|()| url)
}

fn write(folder: &Path, model: &ModernBert, tokenizer: &Tokenizer) -> Result<()> {
    let parameters = model.parameters();
    hf::write_weights(folder, &parameters.named(parameters.values())?)?;
    for (name, content) in folder::companion_files(model.config(), tokenizer)? {
        atomic_write(&folder.join(name), &content)?;
    }
    Ok(())
}

fn partial_folder(output: &Path) -> PathBuf {
    let name = output.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    output.with_file_name(format!(".{name}.{}", std::process::id()))
}
