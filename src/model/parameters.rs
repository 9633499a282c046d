//! Parameters in one flat float32 buffer, gradients in another: one optimizer call, one norm, one all-reduce, one copy for a checkpoint.
//!
//! Matrices come first (they have weight decay), then norms and biases. Behind the gradients lie a few extra numbers that are summed over the
//! workers together with them.

use anyhow::{Context, Result, ensure};
use cloze_recipes::failure::{Failure, FailureKind};
use tch::{Device, Kind, Tensor, no_grad};

use crate::checkpoint::NamedTensorOwned;
use crate::torch::memory;
use crate::torch::ops::Parameter;
use crate::torch::overlap::Place;

/// Every parameter begins at a multiple of this many floats (256 bytes), so that vector loads and matrix products are aligned.
const ALIGNMENT: i64 = 64;

/// Numbers behind the gradients that travel with them.
pub const NUM_EXTRAS: i64 = 8;

/// Standard deviation and shape of one parameter.
#[derive(Clone, Debug)]
pub struct Specification {
    /// Name in a Hugging Face file.
    pub name: String,
    /// Shape in a Hugging Face file.
    pub shape: Vec<i64>,
    /// First value.
    pub init: Init,
}

/// First value of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Truncated normal with this standard deviation, cut at two of them.
    Normal(f64),
    /// All ones.
    Ones,
    /// All zeros.
    Zeros,
}

#[derive(Clone, Debug)]
struct Entry {
    specification: Specification,
    offset: i64,
    length: i64,
}

/// All parameters of a model.
#[derive(Debug)]
pub struct FlatParameters {
    entries: Vec<Entry>,
    decayed_length: i64,
    values: Tensor,
    compute: Option<Tensor>,
    gradients: Option<Tensor>,
}

impl FlatParameters {
    /// Zeroed parameters of these shapes on a device; `trainable` ones have a gradient buffer.
    pub fn zeros(specifications: Vec<Specification>, device: Device, trainable: bool) -> Self {
        let (matrices, rest): (Vec<_>, Vec<_>) = specifications.into_iter().partition(|s| s.shape.len() > 1);
        let mut entries = Vec::new();
        let mut offset = 0;
        let mut decayed_length = 0;
        for (is_matrix, group) in [(true, matrices), (false, rest)] {
            for specification in group {
                let length = specification.shape.iter().product::<i64>();
                entries.push(Entry { specification, offset, length });
                offset += (length + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
            }
            if is_matrix {
                decayed_length = offset;
            }
        }
        let values = Tensor::zeros([offset], (Kind::Float, device));
        let gradients = trainable.then(|| Tensor::zeros([offset + NUM_EXTRAS], (Kind::Float, device)));
        Self { entries, decayed_length, values, compute: None, gradients }
    }

    /// Draws first values; the same seed gives the same model everywhere.
    pub fn initialise(&mut self, seed: u64) {
        let _guard = tch::no_grad_guard();
        for (index, entry) in self.entries.iter().enumerate() {
            let mut view = self.values.narrow(0, entry.offset, entry.length);
            match entry.specification.init {
                Init::Ones => drop(view.fill_(1.0)),
                Init::Zeros => drop(view.zero_()),
                Init::Normal(deviation) => {
                    tch::manual_seed((seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ index as u64) as i64);
                    // A uniform number between the cumulative normal at -2 and +2 becomes a normal one between -2 and +2 deviations.
                    let bound = 0.954_499_736_103_642;
                    let uniform = Tensor::empty([entry.length], (Kind::Float, Device::Cpu)).uniform_(-bound, bound);
                    let normal = (uniform.erfinv() * (deviation * std::f64::consts::SQRT_2)).clamp(-2.0 * deviation, 2.0 * deviation);
                    view.copy_(&normal);
                }
            }
        }
        self.refresh();
    }

    /// Computes in bfloat16 from a copy of the float32 values.
    pub fn compute_in_bfloat16(&mut self) {
        self.compute = Some(self.values.to_kind(Kind::BFloat16));
    }

    /// Brings the compute copy up to date after the values changed.
    pub fn refresh(&mut self) {
        if let Some(compute) = &mut self.compute {
            no_grad(|| compute.copy_(&self.values));
        }
    }

    /// The parameter of a name.
    pub fn parameter(&self, name: &str) -> Result<Parameter> {
        let entry = self.entries.iter().find(|e| e.specification.name == name).with_context(|| format!("find parameter {name}"))?;
        let view = |flat: &Tensor| flat.narrow(0, entry.offset, entry.length).view(entry.specification.shape.as_slice());
        Ok(Parameter { value: view(self.compute.as_ref().unwrap_or(&self.values)), gradient: self.gradients.as_ref().map(view) })
    }

    /// Number of parameters, without the padding between them.
    pub fn num_parameters(&self) -> i64 {
        self.entries.iter().map(|e| e.length).sum()
    }

    /// All values, `[P]`.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// All gradients and the extras behind them, `[P + NUM_EXTRAS]`.
    pub fn gradients(&self) -> Result<&Tensor> {
        self.gradients.as_ref().context("use the gradients of a model that is not trained")
    }

    /// The part of `[P]` that has weight decay lies before this offset.
    pub fn decayed_length(&self) -> i64 {
        self.decayed_length
    }

    /// Where the matrices lie in the flat buffer, in the order of the forward pass, each up to the next one.
    pub fn matrix_places(&self) -> Vec<Place> {
        let matrices: Vec<&Entry> = self.entries.iter().filter(|e| e.offset < self.decayed_length).collect();
        let ends = matrices.iter().skip(1).map(|e| e.offset).chain([self.decayed_length]);
        matrices.iter().zip(ends).map(|(e, end)| Place { offset: e.offset as usize, length: (end - e.offset) as usize }).collect()
    }

    /// Copies tensors by name into a flat buffer of this layout; every parameter must be there in its shape.
    pub fn load_into(&self, flat: &Tensor, tensors: &[NamedTensorOwned], place: &str) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for entry in &self.entries {
            let name = &entry.specification.name;
            let found =
                tensors.iter().find(|t| &t.name == name).ok_or_else(|| wrong_tensor(place, name, "a tensor of this name", "none"))?;
            let shape: Vec<i64> = found.shape.iter().map(|&n| n as i64).collect();
            if shape != entry.specification.shape {
                return Err(wrong_tensor(place, name, &format!("{:?}", entry.specification.shape), &format!("{shape:?}")).into());
            }
            let source = Tensor::f_from_data_size(&found.data, &shape, Kind::Float)?;
            flat.narrow(0, entry.offset, entry.length).copy_(&source.view([-1]));
        }
        Ok(())
    }

    /// Copies tensors by name into the values.
    pub fn load(&mut self, tensors: &[NamedTensorOwned], place: &str) -> Result<()> {
        self.load_into(&self.values, tensors, place)?;
        self.refresh();
        Ok(())
    }

    /// Copies a flat buffer of this layout out by name.
    pub fn named(&self, flat: &Tensor) -> Result<Vec<NamedTensorOwned>> {
        ensure!(flat.numel() as i64 >= self.values.numel() as i64, "a flat buffer of {} numbers does not fit the layout", flat.numel());
        let host = flat.to_device(Device::Cpu);
        self.entries
            .iter()
            .map(|entry| {
                let shape = entry.specification.shape.iter().map(|&n| n as usize).collect();
                let data = memory::with_bytes(&host.narrow(0, entry.offset, entry.length), |bytes| bytes.to_vec().into())?;
                Ok(NamedTensorOwned { name: entry.specification.name.clone(), shape, data })
            })
            .collect()
    }
}

fn wrong_tensor(place: &str, name: &str, expected: &str, found: &str) -> Failure {
    Failure::new(FailureKind::Damaged, format!("tensor `{name}` does not fit the model"))
        .at(place)
        .expected(expected)
        .found(found)
        .hint("config.json and the weights must come from the same model")
}
