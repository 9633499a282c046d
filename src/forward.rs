//! `cloze forward`: one forward pass over packed documents from a file, so that a converted model can be compared with its original.
//!
//! In: `input_ids` int32 `[T]`, `lengths` int32 `[B]`, optional `labels` int32 `[T]` (-100 is not scored).
//! Out: `logits` float32 `[T, V]`, and `loss` float32 (mean over the labels) where labels were given; on request gradients and a training curve.

use std::path::Path;

use anyhow::{Context, Result};
use cloze_recipes::failure::{Failure, FailureKind};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use tch::{Device, Kind, Tensor};

use crate::checkpoint::{NamedTensorOwned, atomic_write};
use crate::model::folder;
use crate::model::modernbert::{ModernBert, Placement};
use crate::model::packed::{Labelled, NOT_SCORED, PackedInput};
use crate::optim::adamw::{AdamW, LossSums, Settings};
use crate::torch::memory;

/// What is computed beside the logits.
#[derive(Clone, Copy, Debug, Default)]
pub struct ForwardExtras {
    /// Adds `gradient.NAME` of the mean loss for every parameter.
    pub gradients: bool,
    /// Takes this many `AdamW` steps on the pack and adds `losses` `[steps]`, each before its step.
    pub steps: usize,
    /// Learning rate of those steps; weight decay is 0.01, the gradient norm is clipped at 1.
    pub learning_rate: f64,
}

/// The three files of a pass.
#[derive(Clone, Copy, Debug)]
pub struct ForwardFiles<'a> {
    /// Model folder.
    pub model: &'a Path,
    /// Pack to read.
    pub input: &'a Path,
    /// Results to write.
    pub output: &'a Path,
}

/// Reads the input file, runs the model, writes the output file.
pub fn forward(files: ForwardFiles, placement: Placement, extras: ForwardExtras) -> Result<()> {
    let pack = Pack::read(files.input)?;
    let trains = extras.gradients || extras.steps > 0;
    let mut model = folder::load(files.model, Placement { trainable: trains, ..placement })?;
    pack.check_ids(model.config().vocab_size, files.input)?;
    let (logits, loss) = tch::no_grad(|| compute(&model, &pack))?;
    let mut results =
        vec![named("logits", &[pack.ids.len(), model.config().vocab_size as usize], memory::with_bytes(&logits, <[u8]>::to_vec)?)];
    if let Some(loss) = loss {
        results.push(named("loss", &[], loss.to_le_bytes().to_vec()));
    }
    if trains {
        let labels = pack.labels.as_ref().ok_or_else(|| absent("labels", files.input))?;
        results.extend(train(&mut model, &pack, labels, extras)?);
    }
    let views = results.iter().map(|r| Ok((r.name.as_str(), TensorView::new(Dtype::F32, r.shape.clone(), &r.data)?)));
    let file = serialize(views.collect::<Result<Vec<_>>>()?, None)?;
    atomic_write(files.output, &file)
}

/// Gradients of the first step and the losses of all.
fn train(model: &mut ModernBert, pack: &Pack, labels: &[i32], extras: ForwardExtras) -> Result<Vec<NamedTensorOwned>> {
    let device = model.device();
    let input = PackedInput::new(&pack.ids, &pack.lengths, device)?;
    let labelled = Labelled::new(labels, &vec![1.0; labels.len()], device)?;
    let denominator = Tensor::full([] as [i64; 0], labelled.position.numel() as f64, (Kind::Float, device));
    let settings = Settings { betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.01, clip_norm: 1.0 };
    let mut optimizer = AdamW::new(model.parameters(), settings);
    let mut results = Vec::new();
    let mut losses = Vec::new();
    for step in 0..extras.steps.max(1) {
        let _ = tch::no_grad(|| model.parameters().gradients().map(|g| g.shallow_clone().zero_()))?;
        let loss = model.loss_sum(&input, &labelled)?;
        loss.f_backward()?;
        if step == 0 && extras.gradients {
            let mean = tch::no_grad(|| model.parameters().gradients().map(|g| g / &denominator))?;
            let mut gradients = model.parameters().named(&mean)?;
            gradients.iter_mut().for_each(|tensor| tensor.name.insert_str(0, "gradient."));
            results.extend(gradients);
        }
        if extras.steps > 0 {
            let sums = LossSums { loss: loss.detach(), denominator: denominator.shallow_clone() };
            losses.extend(((&sums.loss / &sums.denominator).double_value(&[]) as f32).to_le_bytes());
            let _norm = optimizer.step(model.parameters_mut(), extras.learning_rate, &sums)?;
        }
    }
    if extras.steps > 0 {
        results.push(named("losses", &[extras.steps], losses));
    }
    Ok(results)
}

fn named(name: &str, shape: &[usize], data: Vec<u8>) -> NamedTensorOwned {
    NamedTensorOwned { name: name.to_owned(), shape: shape.to_vec(), data: data.into() }
}

/// Documents of an input file.
struct Pack {
    ids: Vec<i32>,
    lengths: Vec<i32>,
    labels: Option<Vec<i32>>,
}

fn compute(model: &ModernBert, pack: &Pack) -> Result<(Tensor, Option<f32>)> {
    let input = PackedInput::new(&pack.ids, &pack.lengths, model.device())?;
    let logits_tv = model.logits(&model.hidden(&input)?)?.to_device(Device::Cpu).contiguous();
    let Some(labels) = &pack.labels else { return Ok((logits_tv, None)) };
    let labelled = Labelled::new(labels, &vec![1.0; labels.len()], Device::Cpu)?;
    let scored_nv = logits_tv.index_select(0, &labelled.position).log_softmax(-1, Kind::Float);
    let loss = -scored_nv.gather(1, &labelled.targets.token.unsqueeze(1), false).mean(Kind::Float);
    Ok((logits_tv, Some(loss.double_value(&[]) as f32)))
}

impl Pack {
    fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path)
            .map_err(|error| Failure::new(FailureKind::Input, "the input file cannot be read").at(path.display()).because(error))?;
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|error| Failure::new(FailureKind::Input, "the input is not a safetensors file").at(path.display()).because(error))?;
        let pack = Self {
            ids: integers(&tensors, "input_ids", path)?.with_context(|| absent("input_ids", path))?,
            lengths: integers(&tensors, "lengths", path)?.with_context(|| absent("lengths", path))?,
            labels: integers(&tensors, "labels", path)?,
        };
        let total: i64 = pack.lengths.iter().map(|&n| i64::from(n)).sum();
        if total != pack.ids.len() as i64 || pack.lengths.iter().any(|&n| n < 1) || pack.ids.is_empty() {
            return Err(wrong(
                path,
                "positive lengths that add up to the number of input_ids",
                &format!("{} ids, lengths adding up to {total}", pack.ids.len()),
            ));
        }
        if let Some(labels) = &pack.labels
            && (labels.len() != pack.ids.len() || labels.iter().all(|&label| label == NOT_SCORED))
        {
            return Err(wrong(path, "one label for each of input_ids, at least one of them not -100", &format!("{} labels", labels.len())));
        }
        Ok(pack)
    }

    fn check_ids(&self, vocab_size: i64, path: &Path) -> Result<()> {
        let labels = self.labels.iter().flatten().filter(|&&label| label != NOT_SCORED);
        match self.ids.iter().chain(labels).find(|&&id| i64::from(id) < 0 || i64::from(id) >= vocab_size) {
            Some(id) => Err(wrong(path, &format!("token ids from 0 to {}", vocab_size - 1), &id.to_string())),
            None => Ok(()),
        }
    }
}

fn integers(tensors: &SafeTensors, name: &str, path: &Path) -> Result<Option<Vec<i32>>> {
    let Ok(view) = tensors.tensor(name) else { return Ok(None) };
    if view.dtype() != Dtype::I32 || view.shape().len() != 1 {
        return Err(wrong(path, &format!("`{name}` as int32 with one dimension"), &format!("{:?} {:?}", view.dtype(), view.shape())));
    }
    Ok(Some(view.data().as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect()))
}

fn absent(name: &str, path: &Path) -> Failure {
    Failure::new(FailureKind::Input, format!("`{name}` is missing in the input file")).at(path.display())
}

fn wrong(path: &Path, expected: &str, found: &str) -> anyhow::Error {
    Failure::new(FailureKind::Input, "the input file does not fit together").at(path.display()).expected(expected).found(found).into()
}
