//! Parameters in one flat float32 buffer, gradients in another: one optimizer call, one norm, one all-reduce, one copy for a checkpoint.
//!
//! Matrices come first (they have weight decay), then norms and biases. Behind the gradients lie a few extra numbers that are summed over the
//! workers together with them. Where the workers share gradients or parameters out, the buffers hold this worker's shard, and what a pass
//! computes with lies in pieces that come and go.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Shard;
use tch::{Device, Kind, Tensor, no_grad};

use super::modernbert::Placement;
use super::pieces::{Pieces, Shape};
use crate::checkpoint::NamedTensorOwned;
use crate::sharding::buckets::{BUCKET_FLOATS_MIN, Buckets, Place};
use crate::sharding::layout::ShardLayout;
use crate::torch::memory;
use crate::torch::ops::Parameter;

/// Every parameter begins at a multiple of this many floats (256 bytes), so that vector loads and matrix products are aligned.
const ALIGNMENT: i64 = 64;

/// Numbers behind the gradients that travel with them.
pub const NUM_EXTRAS: i64 = 8;

/// Held while libtorch's generator of random numbers is seeded and drawn from.
static GENERATOR: Mutex<()> = Mutex::new(());

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

/// One parameter and its place in the flat buffer.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Name, shape and first value.
    pub specification: Specification,
    /// First float.
    pub offset: i64,
    /// Floats without the padding behind them.
    pub length: i64,
}

/// What of a model one worker holds.
#[derive(Clone, Copy, Debug)]
pub struct Division {
    /// What is shared out.
    pub shard: Shard,
    /// This worker.
    pub rank: usize,
    /// All workers.
    pub world_size: usize,
    /// How many ranks before this one is the one whose share is replicated here, round the world; 0 for none.
    pub replica_distance: usize,
    /// Smallest bucket of the exchange.
    pub bucket_floats_min: usize,
}

impl Division {
    /// One worker that holds everything.
    pub const WHOLE: Self = Self { shard: Shard::None, rank: 0, world_size: 1, replica_distance: 0, bucket_floats_min: BUCKET_FLOATS_MIN };
}

/// All parameters of a model, or one worker's shard of them.
#[derive(Debug)]
pub struct FlatParameters {
    entries: Vec<Entry>,
    length: i64,
    decayed_length: i64,
    shard: Shard,
    buckets: Buckets,
    layout: ShardLayout,
    replica: Option<ShardLayout>,
    values: Tensor,
    compute: Option<Tensor>,
    gradients: Option<Tensor>,
    value_pieces: Option<Pieces>,
    gradient_pieces: Option<Pieces>,
}

impl FlatParameters {
    /// Zeroed parameters of these shapes.
    pub fn zeros(specifications: Vec<Specification>, placement: Placement, division: &Division) -> Result<Self> {
        let (entries, length, decayed_length) = place(specifications);
        let buckets = Buckets::new(&matrix_places(&entries, decayed_length), length as usize, division.bucket_floats_min);
        let shard = division.shard;
        let (rank, world_size) = if shard == Shard::None { (0, 1) } else { (division.rank, division.world_size) };
        let layout = ShardLayout::new(buckets.segments(), rank, world_size);
        let replica_of = (rank + world_size - division.replica_distance % world_size) % world_size;
        let replica = (replica_of != rank).then(|| layout.behind(buckets.segments(), replica_of));
        let shard_floats = (layout.num_floats() + replica.as_ref().map_or(0, ShardLayout::num_floats)) as i64;
        let pieces = |kind| {
            let ranges: Vec<_> = buckets.segments().iter().map(|segment| segment.range.clone()).collect();
            Pieces::new(&ranges, &shapes(&entries), (kind, placement.device))
        };
        let kind = if placement.bfloat16 { Kind::BFloat16 } else { Kind::Float };
        let value_pieces = if shard == Shard::Parameters { Some(pieces(kind)?) } else { None };
        let gradient_pieces = if placement.trainable && shard >= Shard::Gradients { Some(pieces(Kind::Float)?) } else { None };
        let held = |is_shared_out: bool| if is_shared_out { shard_floats } else { length };
        let float = (Kind::Float, placement.device);
        let values = Tensor::f_zeros([held(value_pieces.is_some())], float)?;
        let gradients =
            if placement.trainable { Some(Tensor::f_zeros([held(gradient_pieces.is_some()) + NUM_EXTRAS], float)?) } else { None };
        let compute = if placement.bfloat16 && value_pieces.is_none() { Some(values.f_to_kind(Kind::BFloat16)?) } else { None };
        Ok(Self {
            entries,
            length,
            decayed_length,
            shard,
            buckets,
            layout,
            replica,
            values,
            compute,
            gradients,
            value_pieces,
            gradient_pieces,
        })
    }

    /// Draws first values; the same seed gives the same model everywhere.
    pub fn initialise(&mut self, seed: u64) {
        let _guard = tch::no_grad_guard();
        // There is one generator for the whole process; two threads at a time would mix their draws.
        let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// Brings the compute copy up to date after the values changed.
    pub fn refresh(&mut self) {
        if let Some(compute) = &mut self.compute {
            no_grad(|| compute.copy_(&self.values));
        }
    }

    /// The parameter of a name.
    pub fn parameter(&self, name: &str) -> Result<Parameter> {
        let index = self.entries.iter().position(|e| e.specification.name == name).with_context(|| format!("find parameter {name}"))?;
        let entry = &self.entries[index];
        let view = |flat: &Tensor| flat.narrow(0, entry.offset, entry.length).view(entry.specification.shape.as_slice());
        let value = match &self.value_pieces {
            Some(pieces) => pieces.view(index),
            None => view(self.compute.as_ref().unwrap_or(&self.values)),
        };
        let gradient = match &self.gradient_pieces {
            Some(pieces) => Some(pieces.view(index)),
            None => self.gradients.as_ref().map(view),
        };
        Ok(Parameter { value, gradient })
    }

    /// Number of parameters, without the padding between them.
    pub fn num_parameters(&self) -> i64 {
        self.entries.iter().map(|e| e.length).sum()
    }

    /// Every parameter with its place.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Floats of the flat buffer P, padding included.
    pub fn length(&self) -> i64 {
        self.length
    }

    /// What the workers share out.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// How the flat buffer is cut for the exchange.
    pub fn buckets(&self) -> &Buckets {
        &self.buckets
    }

    /// This worker's shares of the flat buffer; all of it where nothing is shared out.
    pub fn layout(&self) -> &ShardLayout {
        &self.layout
    }

    /// Another worker's shares, where a replica of them is kept: where they lie behind this worker's own.
    pub fn replica(&self) -> Option<&ShardLayout> {
        self.replica.as_ref()
    }

    /// All shares that this worker keeps.
    pub fn layouts(&self) -> impl Iterator<Item = &ShardLayout> {
        [&self.layout].into_iter().chain(&self.replica)
    }

    /// Floats S of this worker's shard, a replica included.
    pub fn shard_floats(&self) -> usize {
        self.layouts().map(ShardLayout::num_floats).sum()
    }

    /// All values `[P]`; this worker's shard `[S]` where parameters are shared out.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// All gradients and the extras behind them, `[P + NUM_EXTRAS]`; the sums of this worker's shard `[S + NUM_EXTRAS]` where gradients are
    /// shared out.
    pub fn gradients(&self) -> Result<&Tensor> {
        self.gradients.as_ref().context("use the gradients of a model that is not trained")
    }

    /// The numbers that are summed with the gradients, `[NUM_EXTRAS]`.
    pub fn extras(&self) -> Result<Tensor> {
        let gradients = self.gradients()?;
        Ok(gradients.f_narrow(0, gradients.numel() as i64 - NUM_EXTRAS, NUM_EXTRAS)?)
    }

    /// What a pass reads the values from, segment by segment, where parameters are shared out.
    pub fn value_pieces(&self) -> Option<Vec<Tensor>> {
        self.value_pieces.as_ref().map(Pieces::all)
    }

    /// What a pass adds gradients to, segment by segment, where gradients are shared out.
    pub fn gradient_pieces(&self) -> Option<Vec<Tensor>> {
        self.gradient_pieces.as_ref().map(Pieces::all)
    }

    /// The part of `[P]` that has weight decay lies before this offset.
    pub fn decayed_length(&self) -> i64 {
        self.decayed_length
    }

    /// Refuses tensors that do not have every parameter, under its name behind `prefix`, in its shape.
    pub fn check(&self, tensors: &[NamedTensorOwned], prefix: &str, place: &str) -> Result<(), Failure> {
        self.entries.iter().try_for_each(|entry| find(tensors, entry, prefix, place).map(drop))
    }

    /// Copies tensors by name into a flat buffer of this layout; every parameter must be there in its shape.
    pub fn load_into(&self, flat: &Tensor, tensors: &[NamedTensorOwned], place: &str) -> Result<()> {
        ensure!(flat.numel() as i64 >= self.length, "a flat buffer of {} numbers does not fit the layout", flat.numel());
        let _guard = tch::no_grad_guard();
        for entry in &self.entries {
            let found = find(tensors, entry, "", place)?;
            let source = Tensor::f_from_data_size(&found.data, &entry.specification.shape, Kind::Float)?;
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
        ensure!(flat.numel() as i64 >= self.length, "a flat buffer of {} numbers does not fit the layout", flat.numel());
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

/// Places parameters one behind the other, matrices first; with the length of all and of the matrices.
fn place(specifications: Vec<Specification>) -> (Vec<Entry>, i64, i64) {
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
    (entries, offset, decayed_length)
}

/// Where the matrices lie in the flat buffer, in the order of the forward pass, each up to the next one.
fn matrix_places(entries: &[Entry], decayed_length: i64) -> Vec<Place> {
    let matrices: Vec<&Entry> = entries.iter().filter(|e| e.offset < decayed_length).collect();
    let ends = matrices.iter().skip(1).map(|e| e.offset).chain([decayed_length]);
    matrices.iter().zip(ends).map(|(e, end)| Place { offset: e.offset as usize, length: (end - e.offset) as usize }).collect()
}

fn shapes(entries: &[Entry]) -> Vec<Shape<'_>> {
    let all = entries.iter();
    all.map(|e| Shape { offset: e.offset as usize, length: e.length as usize, extents: &e.specification.shape }).collect()
}

/// The tensor of a parameter, in its shape.
fn find<'a>(tensors: &'a [NamedTensorOwned], entry: &Entry, prefix: &str, place: &str) -> Result<&'a NamedTensorOwned, Failure> {
    let Specification { name, shape, .. } = &entry.specification;
    let is_wanted = |tensor: &&NamedTensorOwned| tensor.name.strip_prefix(prefix) == Some(name.as_str());
    let name = format!("{prefix}{name}");
    let found = tensors.iter().find(is_wanted).ok_or_else(|| wrong_tensor(place, &name, "a tensor of this name", "none"))?;
    let extents: Vec<i64> = found.shape.iter().map(|&n| n as i64).collect();
    if extents != *shape {
        return Err(wrong_tensor(place, &name, &format!("{shape:?}"), &format!("{extents:?}")));
    }
    Ok(found)
}

fn wrong_tensor(place: &str, name: &str, expected: &str, found: &str) -> Failure {
    Failure::new(FailureKind::Damaged, format!("tensor `{name}` does not fit the model"))
        .at(place)
        .expected(expected)
        .found(found)
        .hint("config.json and the weights must come from the same model")
}
