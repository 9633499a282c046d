//! A run of a base model on four workers, for the tests of the plan.

use cloze_recipes::raw::Preset;

use super::facts::{DataFacts, MachineFacts, PlanFacts};

/// What is known of it.
pub(super) fn facts() -> PlanFacts {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recipe.yaml");
    let text = "version: 1
name: plan
model: {preset: base, tokenizer: t}
data: {sources: [{url: corpus}], output: out, max_length: 128}
train: {steps: 1000, batch_examples: 100, micro_batch_tokens: 8192, learning_rate: 1e-3}
checkpoint: {every_steps: 300, keep_last: 3}
";
    std::fs::write(&path, text).unwrap();
    PlanFacts {
        recipe: cloze_recipes::load(&path, &[]).unwrap(),
        shape: Preset::Base.shape(),
        vocab: 50_368,
        nodes: 2,
        workers: 4,
        data: DataFacts::Unknown,
        machine: MachineFacts::default(),
        trials: None,
    }
}
