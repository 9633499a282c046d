//! What tests of several modules need: a tiny tokenizer, record files of every format, a recipe, shards.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{Int32Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use cloze_recipes::recipe::{
    Auxiliary, CheckpointRecipe, ClusterRecipe, DataRecipe, DataSource, Device, HangRecipe, LossNorm, Masking, ModelRecipe,
    ObjectiveRecipe, Precision, Recipe, ScheduleKind, ScheduleRecipe, Shard, TrainRecipe, Truncation,
};
use parquet::arrow::ArrowWriter;
use serde_json::json;

use crate::dataset::Sample;
use crate::manifest::{Counts, MANIFEST_VERSION, Manifest, ShardEntry, TaskEntry};
use crate::shard::{ShardBuilder, shard_name};

/// The tiny tokenizer's vocabulary; ids are positions. The first six are added tokens, the first five of them special.
pub(crate) const VOCABULARY: [&str; 20] = [
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[PAD]",
    "[MASK]",
    "[unused0]",
    "Answer",
    ":",
    "yes",
    "no",
    "maybe",
    "question",
    "is",
    "it",
    "?",
    "one",
    "two",
    "three",
    "four",
    "five",
];

/// A word-level `tokenizer.json` that splits at white space and punctuation and puts `[CLS]` and `[SEP]` around a text.
pub(crate) fn tokenizer_json() -> String {
    let vocabulary: BTreeMap<&str, usize> = VOCABULARY.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    let added: Vec<_> = VOCABULARY[..6]
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": id < 5})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]},
                               "[SEP]": {"id": "[SEP]", "ids": [2], "tokens": ["[SEP]"]}},
        },
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    })
    .to_string()
}

/// Writes the tiny tokenizer into a folder.
pub(crate) fn tokenizer(folder: &Path) -> PathBuf {
    let path = folder.join("tokenizer.json");
    fs::write(&path, tokenizer_json()).unwrap();
    path
}

/// One jsonl line with the names of the FLAN collection.
pub(crate) fn line(inputs: &str, targets: &str, task: &str, template: &str) -> String {
    json!({"inputs": inputs, "targets": targets, "_task_name": task, "_task_source": "Test", "_template_type": template}).to_string() + "\n"
}

/// A parquet file with the columns `inputs`, `targets`, `_template_idx` and one that is not read.
pub(crate) fn parquet(rows: &[(&str, Option<&str>)]) -> Vec<u8> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("inputs", DataType::Utf8, false),
        Field::new("targets", DataType::Utf8, true),
        Field::new("_template_idx", DataType::Int32, false),
        Field::new("other", DataType::Utf8, false),
    ]));
    let batch = RecordBatch::try_new(
        schema.clone(),
        vec![
            Arc::new(rows.iter().map(|(inputs, _)| Some(*inputs)).collect::<StringArray>()),
            Arc::new(rows.iter().map(|(_, targets)| *targets).collect::<StringArray>()),
            Arc::new((0..rows.len() as i32).map(Some).collect::<Int32Array>()),
            Arc::new(rows.iter().map(|_| Some("x")).collect::<StringArray>()),
        ],
    )
    .unwrap();
    let mut content = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut content, schema, None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    content
}

/// The same records in each format, with file names.
pub(crate) fn every_format(rows: &[(String, &str)]) -> [(&'static str, Vec<u8>); 4] {
    let text: String = rows.iter().map(|(inputs, targets)| json!({"inputs": inputs, "targets": targets}).to_string() + "\n").collect();
    let table: Vec<_> = rows.iter().map(|(inputs, targets)| (inputs.as_str(), Some(*targets))).collect();
    [
        ("plain.jsonl", text.clone().into_bytes()),
        ("zipped.jsonl.gz", gzip(text.as_bytes())),
        ("packed.jsonl.zst", zstd::encode_all(text.as_bytes(), 3).unwrap()),
        ("table.parquet", parquet(&table)),
    ]
}

/// Compresses with gzip.
pub(crate) fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// A recipe that prepares `sources` into `output` with the tokenizer at `tokenizer`; no hold-out, no cap, 64 tokens.
pub(crate) fn recipe(tokenizer: &Path, output: &Path, sources: &[&Path]) -> Recipe {
    let sources = sources.iter().map(|path| DataSource { url: path.display().to_string(), task: None, options: BTreeMap::new() }).collect();
    Recipe {
        version: 1,
        name: "test".into(),
        seed: 7,
        model: ModelRecipe { path: None, tokenizer: tokenizer.to_path_buf(), shape: None, anchor_token: "[unused0]".into() },
        data: DataRecipe {
            sources,
            output: output.to_path_buf(),
            only: Vec::new(),
            hold_out: Vec::new(),
            max_tasks: None,
            cap_per_task: None,
            wanted_total: None,
            fraction: 1.0,
            mixing_cap: None,
            max_length: 64,
            truncate: Truncation::PromptKeepAnswer,
            template: "{inputs}\nAnswer: {anchor} {target}".into(),
            hold_out_templates: Vec::new(),
        },
        objective: ObjectiveRecipe {
            auxiliary: Auxiliary::DummyMlm,
            auxiliary_ratio: 0.2,
            mask_probability: 0.3,
            masking: Masking::AllMask,
            loss_norm: LossNorm::TokenMean,
        },
        train: train(),
        checkpoint: CheckpointRecipe {
            url: None,
            options: BTreeMap::new(),
            every_steps: 10,
            every_seconds: None,
            keep_last: 2,
            keep_best: 0,
            keep_every_steps: None,
            cache: None,
            upload_timeout_s: 600,
            stop_timeout_s: 120,
        },
        cluster: ClusterRecipe {
            max_restarts: 1,
            heartbeat_timeout_ms: 2_000,
            collective_timeout_ms: 10_000,
            min_workers: None,
            replacement_wait_s: 30,
            coordinator_grace_s: 60,
            hang: HangRecipe { init_s: 600, data_s: 300, step_s: 300, checkpoint_s: 600 },
            exclude_host_after: 0,
            retries_per_step: 1,
            tls: false,
        },
        evaluation: Vec::new(),
    }
}

fn train() -> TrainRecipe {
    TrainRecipe {
        steps: Some(10),
        epochs: None,
        batch_examples: 4,
        micro_batch_tokens: 256,
        learning_rate: 1e-3,
        betas: [0.9, 0.999],
        epsilon: 1e-8,
        weight_decay: 0.0,
        clip_norm: 1.0,
        schedule: ScheduleRecipe {
            kind: ScheduleKind::Linear,
            warmup_steps: None,
            warmup_ratio: None,
            end_ratio: 0.0,
            power: 1.0,
            decay_ratio: 0.1,
        },
        device: Device::Cpu,
        precision: Precision::Float32,
        threads: 1,
        log_every_steps: 1,
        shard: Shard::None,
        replicate_shards: false,
        audit_samples: false,
        deterministic: false,
    }
}

/// Writes samples as shards with a manifest, as preparation would.
pub(crate) fn shards(folder: &Path, shards: &[&[Sample]]) -> Manifest {
    let mut entries: Vec<ShardEntry> = Vec::new();
    for (index, samples) in shards.iter().enumerate() {
        let mut builder = ShardBuilder::default();
        samples.iter().for_each(|sample| builder.push(sample).unwrap());
        entries.push(builder.write(folder, &shard_name(index)).unwrap());
    }
    let num_tasks = shards.iter().flat_map(|samples| samples.iter()).map(|sample| sample.task + 1).max().unwrap_or(0);
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        recipe_hash: "recipe".into(),
        settings: BTreeMap::new(),
        tokenizer_fingerprint: "tokenizer".into(),
        inputs: Vec::new(),
        counts: Counts::default(),
        cap_per_task: None,
        shortfall: 0,
        tasks: (0..num_tasks).map(|task| TaskEntry { name: format!("task{task}"), source: None, counts: Counts::default() }).collect(),
        samples: entries.iter().map(|entry| entry.samples).sum(),
        tokens: entries.iter().map(|entry| entry.tokens).sum(),
        shards: entries,
    };
    manifest.save(folder).unwrap();
    manifest
}
