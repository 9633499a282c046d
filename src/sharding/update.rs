//! The update of what this worker owns, and how the others learn of it.

use anyhow::Result;
use cloze_recipes::recipe::Shard;
use tch::{Kind, Tensor};

use super::layout::ShardPart;
use super::transport;
use crate::collective::Collective;
use crate::model::parameters::FlatParameters;
use crate::optim::adamw::{self, Part};

/// The parameters that this worker updates.
pub fn parts(parameters: &FlatParameters) -> Result<Vec<Part>> {
    match parameters.shard() {
        Shard::None => adamw::whole(parameters),
        Shard::Optimizer | Shard::Gradients => own_segments(parameters),
        Shard::Parameters => own_shard(parameters),
    }
}

/// A part for each share: the values lie in the flat buffer, the moments in the shard, the gradients in either.
fn own_segments(parameters: &FlatParameters) -> Result<Vec<Part>> {
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
    parameters.layout().parts().iter().filter(|part| !part.share.is_empty()).map(part).collect()
}

/// The two parts of the shard: what has weight decay, and what has none.
fn own_shard(parameters: &FlatParameters) -> Result<Vec<Part>> {
    let layout = parameters.layout();
    let (decayed, all) = (layout.num_decayed(), layout.num_floats());
    let part = |(start, end, is_decayed): (usize, usize, bool)| -> Result<Part> {
        let narrow = |flat: &Tensor| flat.f_narrow(0, start as i64, (end - start) as i64);
        Ok(Part { values: narrow(parameters.values())?, gradients: narrow(parameters.gradients()?)?, moments: start..end, is_decayed })
    };
    [(0, decayed, true), (decayed, all, false)].into_iter().filter(|(start, end, _)| start < end).map(part).collect()
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
