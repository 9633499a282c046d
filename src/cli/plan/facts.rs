//! What is known of a run before it starts: its model, its machines, its sweep.

use std::path::Path;

use anyhow::Result;
use cloze_data::tokenizer::Tokenizer;
use cloze_launcher::plan::{DataFacts, MachineFacts, PlanFacts, TrialFacts};
use cloze_launcher::sweep::hosts::places_of_host;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::raw::Preset;
use cloze_recipes::recipe::{Device, ModelRecipe, ModelShape};
use cloze_recipes::site::SiteKind;
use serde::Deserialize;

use super::Wanted;

/// The vocabulary of a new model is rounded up to a multiple of this.
const VOCABULARY_MULTIPLE: u32 = 64;

/// Largest config.json that is read, in bytes; real ones have a few thousand.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Most rows of an embedding. Known vocabularies have fewer than a million; what is computed from more could leave 64 bits.
const VOCABULARY_MAX: u64 = 16 << 20;

/// Everything that the numbers are computed from.
pub(super) fn facts(wanted: &Wanted<'_>, tokens_per_second: Option<f64>, (shape, vocab): (ModelShape, u64), data: DataFacts) -> PlanFacts {
    let study = wanted.study;
    let trials = study.sweep.as_ref().zip(wanted.trials.as_ref()).map(|(sweep, trials)| TrialFacts {
        trials: trials.graph.wanted().count() as u64,
        concurrency: sweep.concurrency,
        pack: sweep.pack,
        stops_early: sweep.early_stopping.is_some(),
    });
    PlanFacts {
        recipe: study.recipe.clone(),
        shape,
        vocab,
        nodes: study.resources.nodes,
        workers: wanted.workers,
        data,
        machine: machine(wanted, tokens_per_second),
        trials,
    }
}

fn machine(wanted: &Wanted<'_>, tokens_per_second: Option<f64>) -> MachineFacts {
    let resources = &wanted.study.resources;
    let of_one_run = wanted.workers.div_ceil(resources.nodes.max(1)).max(1);
    // Packed trials share a node of the cluster, and so do those of one host; each starts workers of its own.
    let pack = match (&wanted.study.sweep, &wanted.site.kind) {
        (Some(sweep), SiteKind::Slurm(_)) => sweep.pack.max(1),
        (Some(sweep), SiteKind::Ssh(ssh)) => places_of_host(sweep.concurrency, ssh.hosts.len()),
        _ => 1,
    };
    let (per_node, per_gpu) = crowd(of_one_run, pack, resources.gpus_per_node);
    let worker_memory_mib = match wanted.study.recipe.train.device {
        Device::Cuda => wanted.site.gpu_memory_mib.map(|mib| mib / per_gpu),
        Device::Cpu => {
            let is_here = wanted.site.kind == SiteKind::Local;
            let node_mib = resources.memory_per_node_mib.or_else(|| if is_here { memory_of_this_machine_mib() } else { None });
            node_mib.map(|mib| mib / per_node)
        }
    };
    let mut facts = MachineFacts {
        worker_memory_mib,
        tokens_per_second: tokens_per_second.or(wanted.site.tokens_per_second),
        time_limit_minutes: resources.time_limit_minutes,
        ..MachineFacts::default()
    };
    if let SiteKind::Slurm(slurm) = &wanted.site.kind {
        facts.time_limit_minutes = resources.time_limit_minutes.or(slurm.time_limit_minutes);
        (facts.warning_s, facts.max_jobs) = (slurm.warning_s, Some(slurm.max_jobs));
    }
    facts
}

/// Workers on one node, and on one of its GPUs. A worker of a run that has its node alone has its GPU alone too.
fn crowd(of_one_run: u32, pack: u32, gpus_per_node: u32) -> (u64, u64) {
    let per_node = u64::from(of_one_run) * u64::from(pack);
    let per_gpu = if pack > 1 { per_node.div_ceil(gpus_per_node.max(1).into()) } else { 1 };
    (per_node, per_gpu)
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
    check_sizes(&config).map_err(|failure| failure.at(path.display()))?;
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

/// Whether the sizes are in the ranges that a recipe's own shape may have, so that no number of the plan leaves its type.
fn check_sizes(config: &ConfigSizes) -> Result<(), Failure> {
    let damaged = |key: &str, value: u64, expected: String| {
        Failure::new(FailureKind::Damaged, format!("config.json is not valid: `{key}`")).expected(expected).found(value)
    };
    let ranges = [
        ("vocab_size", config.vocab_size, 1, VOCABULARY_MAX),
        ("hidden_size", config.hidden_size.into(), 8, 65_536),
        ("intermediate_size", config.intermediate_size.into(), 8, 262_144),
        ("num_hidden_layers", config.num_hidden_layers.into(), 1, 1024),
        ("num_attention_heads", config.num_attention_heads.into(), 1, 1024),
        ("max_position_embeddings", config.max_position_embeddings.map_or(8, u64::from), 8, 1_048_576),
    ];
    for (key, value, least, most) in ranges {
        if !(least..=most).contains(&value) {
            return Err(damaged(key, value, format!("{least} to {most}")));
        }
    }
    if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
        let expected = format!("a divisor of hidden_size, which is {}", config.hidden_size);
        return Err(damaged("num_attention_heads", config.num_attention_heads.into(), expected));
    }
    Ok(())
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
    fn sizes_that_no_model_has_are_damage() {
        let folder = tempfile::tempdir().unwrap();
        let sizes =
            [("vocab_size", 100), ("hidden_size", 64), ("intermediate_size", 96), ("num_hidden_layers", 2), ("num_attention_heads", 2)];
        let cases: [(&str, u64); 8] = [
            ("vocab_size", 0),
            ("vocab_size", u64::MAX),
            ("hidden_size", 0),
            ("intermediate_size", 4_294_967_295),
            ("num_hidden_layers", 1025),
            ("num_attention_heads", 0),
            ("num_attention_heads", 3),
            ("max_position_embeddings", 2_000_000),
        ];
        for (key, value) in cases {
            let mut config: serde_json::Map<String, serde_json::Value> =
                sizes.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
            config.insert(key.to_owned(), value.into());
            std::fs::write(folder.path().join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
            let failure = model_in(folder.path()).unwrap_err();
            assert_eq!(failure.kind, FailureKind::Damaged);
            assert!(failure.what.contains(key) && failure.found == Some(value.to_string()), "{failure:?}");
        }
    }

    #[test]
    fn packed_trials_share_a_node_and_its_gpus() {
        // Four trials of one worker on a GPU, of two workers on four GPUs, and one trial alone.
        let found = [crowd(1, 4, 1), crowd(2, 4, 4), crowd(4, 1, 4), crowd(2, 3, 0)];
        assert_eq!(found, [(4, 4), (8, 2), (4, 1), (6, 6)]);
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(memory_of_this_machine_mib().unwrap() > 100);
    }
}
