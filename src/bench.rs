//! Replays a fixed workload file and prints tokens per second as one JSON line.
//!
//! The file holds `input_ids` and `labels` int32 `[T]` and `offsets` int64 `[examples + 1]`, so that any trainer can be timed on the same tokens.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::ModelShape;
use safetensors::SafeTensors;
use serde_json::json;
use tch::{Device, Tensor};

use crate::model::config::Config;
use crate::model::modernbert::{ModernBert, Placement};
use crate::model::packed::{Labelled, NOT_SCORED, PackedInput};
use crate::optim::adamw::{AdamW, LossSums, Settings};
use crate::torch::cuda;

/// What is timed.
#[derive(Debug)]
pub struct BenchOptions {
    /// Shape of the model, from scratch.
    pub shape: ModelShape,
    /// Rows of its embedding.
    pub vocab_size: i64,
    /// Device and precision.
    pub placement: Placement,
    /// Real tokens of one step, at most.
    pub batch_tokens: usize,
    /// Timed steps.
    pub steps: usize,
    /// Steps before the clock starts.
    pub warmup_steps: usize,
}

/// Examples of a workload file.
struct Workload {
    ids: Vec<i32>,
    labels: Vec<i32>,
    offsets: Vec<usize>,
}

/// Times training steps on a workload file; returns the JSON line.
pub fn bench(path: &Path, options: &BenchOptions) -> Result<String> {
    let workload = Workload::read(path)?;
    let batches = workload.batches(options.batch_tokens);
    let mut model = ModernBert::new(Config::new(&options.shape, options.vocab_size), options.placement)?;
    model.parameters_mut().initialise(0);
    model.parameters_mut().refresh();
    let settings = Settings { betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.01, clip_norm: 1.0 };
    let mut optimizer = AdamW::new(model.parameters(), settings);
    let mut clock = Instant::now();
    let (mut tokens, mut examples) = (0, 0);
    let mut loss = Tensor::from(0.0);
    for step in 0..options.warmup_steps + options.steps {
        if step == options.warmup_steps {
            cuda::synchronize(options.placement.device)?;
            (clock, tokens, examples) = (Instant::now(), 0, 0);
        }
        let batch = &batches[step % batches.len()];
        loss = train_step(&mut model, &mut optimizer, &workload, batch)?;
        tokens += batch.iter().map(|&example| workload.length(example)).sum::<usize>();
        examples += batch.len();
    }
    cuda::synchronize(options.placement.device)?;
    let seconds = clock.elapsed().as_secs_f64();
    Ok(report(&model, options, &Measured { seconds, tokens, examples, loss: loss.double_value(&[]) }))
}

/// One optimizer step on some examples; the mean loss stays on the device.
fn train_step(model: &mut ModernBert, optimizer: &mut AdamW, workload: &Workload, batch: &[usize]) -> Result<Tensor> {
    let (ids, lengths, labels) = workload.pack(batch);
    let device = model.device();
    let input = PackedInput::new(&ids, &lengths, device)?;
    let labelled = Labelled::new(&labels, &vec![1.0; labels.len()], device)?;
    let denominator = Tensor::full([] as [i64; 0], labelled.position.numel() as f64, (tch::Kind::Float, device));
    let _ = tch::no_grad(|| model.parameters().gradients().map(|g| g.shallow_clone().zero_()))?;
    let loss = model.loss_sum(&input, &labelled)?;
    loss.f_backward()?;
    let sums = LossSums { loss: loss.detach(), denominator };
    let _norm = optimizer.step(model.parameters_mut(), 1e-4, &sums)?;
    Ok(sums.loss / sums.denominator)
}

struct Measured {
    seconds: f64,
    tokens: usize,
    examples: usize,
    loss: f64,
}

fn report(model: &ModernBert, options: &BenchOptions, measured: &Measured) -> String {
    let parameters = model.parameters().num_parameters();
    // The usual estimate: 6 operations a parameter and token, the embedding table left out.
    let operations_per_token = 6.0 * (parameters - options.vocab_size * i64::from(options.shape.hidden_size)) as f64;
    let rate = measured.tokens as f64 / measured.seconds;
    let device = if options.placement.device == Device::Cpu { "cpu" } else { "cuda" };
    json!({
        "trainer": "cloze", "parameters": parameters, "device": device,
        "dtype": if options.placement.bfloat16 { "bf16" } else { "fp32" },
        "batch_tokens": options.batch_tokens, "steps": options.steps, "seconds": (measured.seconds * 1e3).round() / 1e3,
        "tokens_per_s": rate.round(), "examples_per_s": (measured.examples as f64 / measured.seconds * 10.0).round() / 10.0,
        "step_ms": (measured.seconds / options.steps as f64 * 1e5).round() / 100.0,
        "tflops": (operations_per_token * rate / 1e9).round() / 1e3, "loss": (measured.loss * 1e4).round() / 1e4,
    })
    .to_string()
}

impl Workload {
    fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path)
            .map_err(|error| Failure::new(FailureKind::Input, "the workload file cannot be read").at(path.display()).because(error))?;
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|error| Failure::new(FailureKind::Damaged, "the workload file is not valid").at(path.display()).because(error))?;
        let data = |name: &str| {
            let missing = |error| {
                Failure::new(FailureKind::Damaged, "the workload file is not valid")
                    .at(path.display())
                    .expected(format!("a tensor `{name}`"))
                    .because(error)
            };
            tensors.tensor(name).map(|t| t.data().to_vec()).map_err(missing)
        };
        let integers = |bytes: Vec<u8>| bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect::<Vec<_>>();
        let offsets: Vec<usize> = data("offsets")?.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as usize).collect();
        let workload = Self { ids: integers(data("input_ids")?), labels: integers(data("labels")?), offsets };
        if workload.offsets.windows(2).any(|w| w[0] >= w[1])
            || workload.offsets.last() != Some(&workload.ids.len())
            || workload.ids.len() != workload.labels.len()
        {
            return Err(Failure::new(FailureKind::Damaged, "offsets, input_ids and labels of the workload do not fit together")
                .at(path.display())
                .into());
        }
        Ok(workload)
    }

    fn length(&self, example: usize) -> usize {
        self.offsets[example + 1] - self.offsets[example]
    }

    /// Examples in their order, cut into batches of at most `batch_tokens`.
    fn batches(&self, batch_tokens: usize) -> Vec<Vec<usize>> {
        let mut batches = vec![Vec::new()];
        let mut tokens = 0;
        for example in 0..self.offsets.len() - 1 {
            let length = self.length(example);
            if tokens + length > batch_tokens && tokens > 0 {
                batches.push(Vec::new());
                tokens = 0;
            }
            tokens += length;
            if let Some(last) = batches.last_mut() {
                last.push(example);
            }
        }
        batches
    }

    /// Tokens, lengths and labels of some examples; a batch without labels scores its first token.
    fn pack(&self, batch: &[usize]) -> (Vec<i32>, Vec<i32>, Vec<i32>) {
        let range = |example: usize| self.offsets[example]..self.offsets[example + 1];
        let ids = batch.iter().flat_map(|&e| self.ids[range(e)].iter().copied()).collect();
        let mut labels: Vec<i32> = batch.iter().flat_map(|&e| self.labels[range(e)].iter().copied()).collect();
        if labels.iter().all(|&label| label == NOT_SCORED) {
            labels[0] = 0;
        }
        (ids, batch.iter().map(|&e| self.length(e) as i32).collect(), labels)
    }
}
