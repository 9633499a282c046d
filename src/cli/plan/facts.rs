//! What is known of a run before it starts: its model, its machines, its sweep.

use std::path::Path;

use anyhow::Result;
use cloze_data::tokenizer::Tokenizer;
use cloze_launcher::plan::{DataFacts, MachineFacts, PlanFacts, TrialFacts};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::raw::Preset;
use cloze_recipes::recipe::{Device, ModelRecipe, ModelShape};
use cloze_recipes::site::SiteKind;
use serde::Deserialize;

use super::{PlanArguments, Wanted};

/// The vocabulary of a new model is rounded up to a multiple of this.
const VOCABULARY_MULTIPLE: u32 = 64;

/// Largest config.json that is read, in bytes; real ones have a few thousand.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Everything that the numbers are computed from.
pub(super) fn facts(
    wanted: &Wanted<'_>,
    arguments: &PlanArguments,
    (shape, vocab): (ModelShape, u64),
    data: DataFacts,
) -> Result<PlanFacts> {
    let study = wanted.study;
    let trials = match &study.sweep {
        Some(sweep) => Some(TrialFacts {
            trials: study.trials(Path::new("study"))?.len() as u64,
            concurrency: sweep.concurrency,
            pack: sweep.pack,
            stops_early: sweep.early_stopping.is_some(),
        }),
        None => None,
    };
    Ok(PlanFacts {
        recipe: study.recipe.clone(),
        shape,
        vocab,
        nodes: study.resources.nodes,
        workers: wanted.workers,
        data,
        machine: machine(wanted, arguments),
        trials,
    })
}

fn machine(wanted: &Wanted<'_>, arguments: &PlanArguments) -> MachineFacts {
    let resources = &wanted.study.resources;
    let per_node = u64::from(wanted.workers.div_ceil(resources.nodes.max(1)).max(1));
    let worker_memory_mib = match wanted.study.recipe.train.device {
        Device::Cuda => wanted.site.gpu_memory_mib,
        Device::Cpu => {
            let is_here = wanted.site.kind == SiteKind::Local;
            let node_mib = resources.memory_per_node_mib.or_else(|| if is_here { memory_of_this_machine_mib() } else { None });
            node_mib.map(|mib| mib / per_node)
        }
    };
    let mut facts = MachineFacts {
        worker_memory_mib,
        tokens_per_second: arguments.tokens_per_second.or(wanted.site.tokens_per_second),
        time_limit_minutes: resources.time_limit_minutes,
        ..MachineFacts::default()
    };
    if let SiteKind::Slurm(slurm) = &wanted.site.kind {
        facts.time_limit_minutes = resources.time_limit_minutes.or(slurm.time_limit_minutes);
        (facts.warning_s, facts.max_jobs) = (slurm.warning_s, Some(slurm.max_jobs));
    }
    facts
}

/// `MemTotal:       16384 kB`
fn memory_of_this_machine_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? / 1024)
}

/// Extents of a model and rows of its embedding.
pub(super) fn model_sizes(model: &ModelRecipe) -> Result<(ModelShape, u64)> {
    match (&model.path, &model.shape) {
        (Some(folder), _) => Ok(model_in(folder)?),
        (None, Some(shape)) => {
            let tokenizer = Tokenizer::load(&model.tokenizer)?;
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

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn this_machine_has_memory() {
        assert!(memory_of_this_machine_mib().unwrap() > 100);
    }
}
