//! A recipe for the tests of this crate.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cloze_recipes::recipe::{
    Auxiliary, CheckpointRecipe, ClusterRecipe, DataRecipe, DataSource, Device, LossNorm, Masking, ModelRecipe, ModelShape,
    ObjectiveRecipe, Precision, Recipe, ScheduleKind, ScheduleRecipe, TrainRecipe, Truncation,
};

/// A small recipe; none of its paths exist.
pub(crate) fn recipe() -> Recipe {
    Recipe {
        version: 1,
        name: "sample".to_owned(),
        seed: 1,
        model: ModelRecipe {
            path: None,
            tokenizer: PathBuf::from("/nowhere/tokenizer.json"),
            shape: Some(shape()),
            anchor_token: "[unused0]".to_owned(),
        },
        data: data(),
        objective: ObjectiveRecipe {
            auxiliary: Auxiliary::None,
            auxiliary_ratio: 0.0,
            mask_probability: 0.15,
            masking: Masking::AllMask,
            loss_norm: LossNorm::TokenMean,
        },
        train: train(),
        checkpoint: CheckpointRecipe { url: None, options: BTreeMap::new(), every_steps: 50, keep_last: 2 },
        cluster: ClusterRecipe { max_restarts: 2, heartbeat_timeout_ms: 1_500, collective_timeout_ms: 5_000 },
        evaluation: Vec::new(),
    }
}

fn shape() -> ModelShape {
    ModelShape {
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        global_attn_every_n_layers: 3,
        local_attention: 128,
        global_rope_theta: 160_000.0,
        local_rope_theta: 10_000.0,
        max_position_embeddings: 512,
    }
}

fn data() -> DataRecipe {
    DataRecipe {
        sources: vec![DataSource { url: "/nowhere/train".to_owned(), task: None, options: BTreeMap::new() }],
        output: PathBuf::from("/nowhere/data"),
        hold_out: Vec::new(),
        cap_per_task: None,
        wanted_total: None,
        max_length: 128,
        truncate: Truncation::Drop,
        template: "{inputs}{anchor}{target}".to_owned(),
        hold_out_templates: Vec::new(),
    }
}

fn train() -> TrainRecipe {
    TrainRecipe {
        steps: Some(100),
        epochs: None,
        batch_examples: 8,
        micro_batch_tokens: 1024,
        learning_rate: 1e-3,
        betas: [0.9, 0.98],
        epsilon: 1e-6,
        weight_decay: 0.0,
        clip_norm: 1.0,
        schedule: ScheduleRecipe {
            kind: ScheduleKind::Constant,
            warmup_steps: None,
            warmup_ratio: Some(0.06),
            end_ratio: 0.0,
            power: 1.0,
            decay_ratio: 0.1,
        },
        device: Device::Cpu,
        precision: Precision::Float32,
        threads: 1,
        log_every_steps: 10,
    }
}
