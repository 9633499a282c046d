//! The whole state, in and out: what each worker writes into a checkpoint, and how one worker gives the state to all.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Result, ensure};
use cloze_recipes::recipe::Shard;
use tch::{Device, Kind, Tensor};

use super::layout::{ShardLayout, deal};
use crate::checkpoint::{Loaded, NamedTensorOwned};
use crate::collective::Collective;
use crate::model::parameters::{Entry, FlatParameters};
use crate::optim::adamw::AdamW;
use crate::torch::memory;

/// Floats that travel at a time when one worker gives the state to all: 64 MiB, all that a worker needs beside its buffers.
pub(super) const CHUNK_FLOATS_MAX: usize = 16 << 20;

/// In memory, four bytes are one number.
const BYTES_PER_FLOAT: usize = 4;

/// Which of a checkpoint's files a part belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The weights.
    Model,
    /// The optimizer's state.
    Optimizer,
}

/// A part of the state that one worker writes.
#[derive(Debug)]
pub struct SharePart {
    /// Where it belongs.
    pub group: Group,
    /// Name of the tensor that it is a part of.
    pub name: String,
    /// Shape of that tensor.
    pub full_shape: Vec<usize>,
    /// First element, of the flattened tensor.
    pub start: usize,
    /// The elements, flat float32; a view of the live state.
    pub tensor: Tensor,
}

/// One of the three buffers that are the state.
pub(super) struct Buffer<'a> {
    group: Group,
    prefix: &'static str,
    pub(super) flat: &'a Tensor,
    /// Whether `flat` is this worker's shard.
    pub(super) is_shard: bool,
}

/// The parameters' values, and the two moments.
pub(super) fn buffers<'a>(parameters: &'a FlatParameters, optimizer: &'a AdamW) -> [Buffer<'a>; 3] {
    let moments_in_shard = parameters.shard() >= Shard::Optimizer;
    let values_in_shard = parameters.shard() == Shard::Parameters;
    let moment = |prefix, flat| Buffer { group: Group::Optimizer, prefix, flat, is_shard: moments_in_shard };
    [
        Buffer { group: Group::Model, prefix: "", flat: parameters.values(), is_shard: values_in_shard },
        moment("exp_avg.", &optimizer.first_moment),
        moment("exp_avg_sq.", &optimizer.second_moment),
    ]
}

/// This worker's parts of the state. Those of all workers together are the state, each element once.
///
/// What every worker holds is dealt out by tensors; of what is shared out, each worker gives what it owns.
pub fn share(parameters: &FlatParameters, optimizer: &AdamW, rank: usize, world_size: usize) -> Result<Vec<SharePart>> {
    let buffers = buffers(parameters, optimizer);
    let entries = parameters.entries();
    let copied: Vec<_> = buffers.iter().filter(|buffer| !buffer.is_shard).flat_map(|b| entries.iter().map(move |e| (b, e))).collect();
    let lengths: Vec<usize> = copied.iter().map(|(_, entry)| entry.length as usize).collect();
    let mut parts = Vec::new();
    for ((buffer, entry), of) in copied.into_iter().zip(deal(&lengths, world_size)) {
        if of == rank {
            parts.push(part(buffer, entry, 0, buffer.flat.f_narrow(0, entry.offset, entry.length)?));
        }
    }
    for buffer in buffers.iter().filter(|buffer| buffer.is_shard) {
        for entry in entries {
            for (flat, place) in parameters.layout().parts().iter().filter_map(|part| part.within(&range_of(entry))) {
                let tensor = buffer.flat.f_narrow(0, place.start as i64, place.len() as i64)?;
                parts.push(part(buffer, entry, flat.start - entry.offset as usize, tensor));
            }
        }
    }
    Ok(parts)
}

fn part(buffer: &Buffer, entry: &Entry, start: usize, tensor: Tensor) -> SharePart {
    let full_shape = entry.specification.shape.iter().map(|&n| n as usize).collect();
    SharePart { group: buffer.group, name: format!("{}{}", buffer.prefix, entry.specification.name), full_shape, start, tensor }
}

/// The floats of a parameter in the flat buffer.
fn range_of(entry: &Entry) -> Range<usize> {
    entry.offset as usize..(entry.offset + entry.length) as usize
}

/// Gives the state to all workers, which all call this. The root takes it from a checkpoint, or, where it has none, from its own memory.
///
/// The state of a worker is garbage while this is under way, except that of a root that gives its own.
pub fn distribute(
    parameters: &mut FlatParameters,
    optimizer: &AdamW,
    collective: &mut dyn Collective,
    loaded: Option<&Loaded>,
    root: usize,
) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let is_root = collective.rank() == root;
    ensure!(is_root || loaded.is_none(), "only the root brings a checkpoint");
    let is_replicated = parameters.shard() == Shard::None;
    ensure!(!is_root || loaded.is_some() || is_replicated, "a worker that holds a shard of the state cannot give the whole of it");
    if let Some(loaded) = loaded {
        parameters.check(&loaded.model, "", &loaded.url)?;
        parameters.check(&loaded.optimizer, "exp_avg.", &loaded.url)?;
        parameters.check(&loaded.optimizer, "exp_avg_sq.", &loaded.url)?;
    }
    let longest = parameters.buckets().segments().iter().map(|segment| segment.range.len()).max().unwrap_or(0);
    let chunk = Tensor::f_zeros([longest.min(CHUNK_FLOATS_MAX) as i64], (Kind::Float, Device::Cpu))?;
    for buffer in buffers(parameters, optimizer) {
        let source = loaded.map(|loaded| by_name(&buffer, loaded));
        for range in parameters.buckets().segments().iter().flat_map(|segment| chunks(&segment.range)) {
            let mut part = chunk.f_narrow(0, 0, range.len() as i64)?;
            match &source {
                Some(source) => fill(&mut part, &range, parameters.entries(), source)?,
                None if is_root => part.f_copy_(&buffer.flat.f_narrow(0, range.start as i64, range.len() as i64)?)?,
                None => {}
            }
            memory::with_bytes_mut(&mut part, |bytes| collective.broadcast(bytes, root))??;
            // A root that gives its own state has it already.
            if !is_root || loaded.is_some() {
                keep(&buffer, parameters, &part, &range)?;
            }
        }
    }
    parameters.refresh();
    Ok(())
}

/// A checkpoint's tensors of one buffer, by the names of the parameters.
fn by_name<'a>(buffer: &Buffer, loaded: &'a Loaded) -> HashMap<&'a str, &'a NamedTensorOwned> {
    let tensors = match buffer.group {
        Group::Model => &loaded.model,
        Group::Optimizer => &loaded.optimizer,
    };
    tensors.iter().filter_map(|tensor| Some((tensor.name.strip_prefix(buffer.prefix)?, tensor))).collect()
}

/// A range in pieces that travel at a time.
pub(super) fn chunks(range: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = range.end;
    range.clone().step_by(CHUNK_FLOATS_MAX).map(move |start| start..end.min(start + CHUNK_FLOATS_MAX))
}

/// Copies a range of the flat buffer out of named tensors; zeros lie between them.
fn fill(part: &mut Tensor, range: &Range<usize>, entries: &[Entry], source: &HashMap<&str, &NamedTensorOwned>) -> Result<()> {
    memory::with_bytes_mut(part, |bytes| {
        bytes.fill(0);
        for entry in entries {
            let (start, end) = (range_of(entry).start.max(range.start), range_of(entry).end.min(range.end));
            let Some(tensor) = source.get(entry.specification.name.as_str()).filter(|_| start < end) else { continue };
            let within = |base: usize| (start - base) * BYTES_PER_FLOAT..(end - base) * BYTES_PER_FLOAT;
            bytes[within(range.start)].copy_from_slice(&tensor.data[within(range_of(entry).start)]);
        }
    })
}

/// Copies what this worker holds of a range of the flat buffer.
pub(super) fn keep(buffer: &Buffer, parameters: &FlatParameters, part: &Tensor, range: &Range<usize>) -> Result<()> {
    let copy = |flat: Range<usize>, place: Range<usize>| -> Result<()> {
        let source = part.f_narrow(0, (flat.start - range.start) as i64, flat.len() as i64)?;
        Ok(buffer.flat.f_narrow(0, place.start as i64, place.len() as i64)?.f_copy_(&source)?)
    };
    if !buffer.is_shard {
        return copy(range.clone(), range.clone());
    }
    let parts = parameters.layouts().flat_map(ShardLayout::parts);
    parts.filter_map(|part| part.within(range)).try_for_each(|(flat, place)| copy(flat, place))
}
