//! The update of what this worker owns or has a replica of, and how the others learn of it.

use std::ops::Range;

use anyhow::Result;
use cloze_recipes::recipe::Shard;
use tch::{Kind, Tensor};

use super::layout::{ShardLayout, ShardPart, SharePlace};
use super::transport;
use crate::collective::Collective;
use crate::model::parameters::FlatParameters;
use crate::optim::adamw::{self, Part};
use crate::torch::memory;

/// The parameters that this worker updates for all.
pub fn parts(parameters: &FlatParameters) -> Result<Vec<Part>> {
    match parameters.shard() {
        Shard::None => adamw::whole(parameters),
        _ => parts_of(parameters, parameters.layout()),
    }
}

/// The parameters that this worker updates because it keeps a replica of them: with the same numbers their owner does the same.
pub fn replica_parts(parameters: &FlatParameters) -> Result<Vec<Part>> {
    parameters.replica().map_or_else(|| Ok(Vec::new()), |replica| parts_of(parameters, replica))
}

fn parts_of(parameters: &FlatParameters, layout: &ShardLayout) -> Result<Vec<Part>> {
    if parameters.shard() == Shard::Parameters { of_shard(parameters, layout) } else { of_segments(parameters, layout) }
}

/// A part for each share: the values lie in the flat buffer, the moments in the shard, the gradients in either.
fn of_segments(parameters: &FlatParameters, layout: &ShardLayout) -> Result<Vec<Part>> {
    let gradients_in_shard = parameters.shard() == Shard::Gradients;
    let part = |part: &ShardPart| -> Result<Part> {
        let length = part.share.len() as i64;
        let first_gradient = if gradients_in_shard { part.place.start } else { part.share.start };
        Ok(Part {
            values: parameters.values().f_narrow(0, part.share.start as i64, length)?,
            gradients: parameters.gradients()?.f_narrow(0, first_gradient as i64, length)?,
            moments: part.place.clone(),
            is_decayed: part.is_decayed,
        })
    };
    layout.parts().iter().filter(|part| !part.share.is_empty()).map(part).collect()
}

/// The two parts of the shard: what has weight decay, and what has none.
fn of_shard(parameters: &FlatParameters, layout: &ShardLayout) -> Result<Vec<Part>> {
    let (decayed, rest) = layout.places();
    let part = |(place, is_decayed): (Range<usize>, bool)| -> Result<Part> {
        let narrow = |flat: &Tensor| flat.f_narrow(0, place.start as i64, place.len() as i64);
        Ok(Part { values: narrow(parameters.values())?, gradients: narrow(parameters.gradients()?)?, moments: place.clone(), is_decayed })
    };
    [(decayed, true), (rest, false)].into_iter().filter(|(place, _)| !place.is_empty()).map(part).collect()
}

/// Brings the summed gradients of the share that is replicated here.
pub fn gather_replica_sums(parameters: &FlatParameters, collective: &mut dyn Collective) -> Result<()> {
    let Some(replica) = parameters.replica() else { return Ok(()) };
    let _guard = tch::no_grad_guard();
    let (layout, gradients) = (parameters.layout(), parameters.gradients()?);
    let distance = SharePlace::of(layout, Some(replica)).replica_distance;
    let narrow = |flat: &Tensor, range: Range<usize>| flat.f_narrow(0, range.start as i64, range.len() as i64);
    let Some(pieces) = parameters.gradient_pieces() else {
        // Outside its own shares the flat buffer holds nothing that is still used.
        for segment in parameters.buckets().segments() {
            transport::gather_share(collective, &narrow(gradients, segment.range.clone())?, distance)?;
        }
        return transport::join(collective, gradients.device());
    };
    for ((piece, own), other) in pieces.iter().zip(layout.parts()).zip(replica.parts()) {
        memory::take(piece)?;
        narrow(piece, own.in_segment())?.f_copy_(&narrow(gradients, own.place.clone())?)?;
        transport::gather_share(collective, piece, distance)?;
        transport::join(collective, gradients.device())?;
        narrow(gradients, other.place.clone())?.f_copy_(&narrow(piece, other.in_segment())?)?;
        memory::give_back(piece)?;
    }
    Ok(())
}

/// Norm of the gradients of all workers. Each adds up the squares of what it owns; the sum over the workers has one order.
pub fn gradient_norm(parameters: &FlatParameters, parts: &[Part], collective: &mut dyn Collective) -> Result<Tensor> {
    if parameters.shard() == Shard::None {
        return adamw::norm_of_all(parameters);
    }
    let _guard = tch::no_grad_guard();
    let norms = parts.iter().map(|part| Ok(part.gradients.f_norm()?)).collect::<Result<Vec<_>>>()?;
    let device = parameters.values().device();
    let squares = if norms.is_empty() {
        Tensor::f_zeros([1], (Kind::Float, device))?
    } else {
        Tensor::f_stack(&norms, 0)?.f_square()?.f_sum(Kind::Float)?.f_view([1])?
    };
    transport::all_reduce(collective, &squares)?;
    transport::join(collective, device)?;
    Ok(squares.f_sqrt()?.f_squeeze()?)
}

/// Gives the updated values to all workers where each holds all of them.
pub fn spread_values(parameters: &FlatParameters, collective: &mut dyn Collective) -> Result<()> {
    if !matches!(parameters.shard(), Shard::Optimizer | Shard::Gradients) {
        return Ok(());
    }
    for segment in parameters.buckets().segments() {
        let values = parameters.values().f_narrow(0, segment.range.start as i64, segment.range.len() as i64)?;
        transport::all_gather(collective, &values)?;
    }
    transport::join(collective, parameters.values().device())
}
