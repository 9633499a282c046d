//! A recipe, machines and a worker for the tests of this crate.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use cloze_recipes::recipe::{
    Auxiliary, CheckpointRecipe, ClusterRecipe, DataRecipe, DataSource, Device, HangRecipe, LossNorm, Masking, ModelRecipe, ModelShape,
    ObjectiveRecipe, Precision, Recipe, ScheduleKind, ScheduleRecipe, Shard, TrainRecipe, Truncation,
};
use cloze_recipes::study::Resources;

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
        checkpoint: checkpoint(),
        cluster: cluster(),
        evaluation: Vec::new(),
    }
}

/// One node with one worker, of which nothing else is said.
pub(crate) fn resources() -> Resources {
    Resources {
        nodes: 1,
        workers_per_node: 1,
        gpus_per_node: 0,
        cpus_per_worker: None,
        memory_per_node_mib: None,
        time_limit_minutes: None,
        container: None,
        modules: Vec::new(),
        environment: BTreeMap::new(),
        setup: Vec::new(),
    }
}

/// Writes a worker in the shell's language into a folder. A shell of its own writes the file: while this program has one open to
/// write, a process that another test starts at the same moment would inherit it, and the file could not be executed.
pub(crate) fn script(folder: &Path, commands: &str) -> PathBuf {
    let path = folder.join("worker.sh");
    let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod 755 "$0""#;
    assert!(Command::new("/bin/sh").args(["-c", write]).arg(&path).arg(commands).status().unwrap().success());
    path
}

fn checkpoint() -> CheckpointRecipe {
    CheckpointRecipe {
        url: None,
        options: BTreeMap::new(),
        every_steps: 50,
        every_seconds: None,
        keep_last: 2,
        keep_best: 0,
        keep_every_steps: None,
        cache: None,
        upload_timeout_s: 60,
        stop_timeout_s: 30,
    }
}

fn cluster() -> ClusterRecipe {
    ClusterRecipe {
        max_restarts: 2,
        heartbeat_timeout_ms: 1_500,
        collective_timeout_ms: 5_000,
        min_workers: None,
        replacement_wait_s: 30,
        coordinator_grace_s: 60,
        hang: HangRecipe { init_s: 60, data_s: 30, step_s: 30, checkpoint_s: 60 },
        exclude_host_after: 0,
        retries_per_step: 1,
        tls: false,
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
        only: Vec::new(),
        hold_out: Vec::new(),
        max_tasks: None,
        cap_per_task: None,
        wanted_total: None,
        fraction: 1.0,
        mixing_cap: None,
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
        shard: Shard::None,
        replicate_shards: false,
        audit_samples: false,
        deterministic: false,
    }
}
