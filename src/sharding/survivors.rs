//! A state out of the shares that survivors hold: their own, and replicas of those that were lost. Where the workers are others than before, it is
//! shared out anew.
//!
//! Shares that arrive at one step ([`level`]) are dealt out range by range ([`deal`]), so that nobody needs memory for more than a part.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Result, ensure};
use cloze_recipes::recipe::Shard;
use tch::{Device, Kind, Tensor};

use super::layout::{ShardLayout, SharePlace};
use super::state::{CHUNK_FLOATS_MAX, buffers, chunks, keep};
use super::update;
use crate::collective::Collective;
use crate::model::parameters::FlatParameters;
use crate::optim::adamw::AdamW;
use crate::step::{State, loss_sums};
use crate::torch::memory;

/// The sums that lead to the next step. They are kept until the gradients are needed again: who holds them can make the update alone.
#[derive(Debug)]
pub struct Summed {
    /// Steps done before the update.
    pub steps_done: u64,
    /// Norm of the summed gradients, where the update was made: a float32 scalar on the device.
    pub norm: Option<Tensor>,
}

/// The shares of a division that is no more, in host memory.
#[derive(Debug)]
pub struct Shares {
    own: ShardLayout,
    replica: Option<ShardLayout>,
    /// Values and moments; of the whole model where they are not shared out.
    flats: [Tensor; 3],
    are_shared_out: [bool; 3],
    /// Norm of the gradients that led to them.
    norm: Option<(u64, f32)>,
}

impl Shares {
    /// What a state holds; gives back all memory that is not part of it, that of a GPU included.
    pub fn out_of(state: State) -> Result<Self> {
        let norm = known_norm(&state)?;
        let State { model, optimizer, .. } = state;
        let parameters = model.parameters();
        let [values, first, second] = buffers(parameters, &optimizer).map(|buffer| buffer.flat.f_to_device(Device::Cpu));
        let are_shared_out = [parameters.shard() == Shard::Parameters, true, true];
        let (own, replica) = (parameters.layout().clone(), parameters.replica().cloned());
        Ok(Self { own, replica, flats: [values?, first?, second?], are_shared_out, norm })
    }

    /// Whose shares these are.
    pub fn place(&self) -> SharePlace {
        SharePlace::of(&self.own, self.replica.as_ref())
    }

    fn layouts(&self) -> impl Iterator<Item = &ShardLayout> {
        [&self.own].into_iter().chain(&self.replica)
    }

    /// Copies a range of the flat buffer that lies within these shares.
    fn copy_out(&self, buffer: usize, range: &Range<usize>, part: &mut Tensor) -> Result<()> {
        let flat = &self.flats[buffer];
        let place = if self.are_shared_out[buffer] { place_of(self.layouts(), range)? } else { range.clone() };
        Ok(part.f_copy_(&flat.f_narrow(0, place.start as i64, place.len() as i64)?)?)
    }
}

/// What a worker brings to [`level`].
pub enum Brought<'a> {
    /// No share.
    Nothing,
    /// A state, and its steps done.
    State(&'a mut State, &'a mut u64),
    /// Shares of another division.
    Shares(&'a Shares),
}

/// Takes the step to `step` where a worker is one behind, with the norm of a worker that has taken it; all workers call this.
///
/// Nobody takes a step before all have begun to sum its norm, and that is the last that is summed. So only the norm may be lacking.
pub fn level(
    brought: Brought,
    (step, old_world_size): (u64, usize),
    learning_rate: impl Fn(u64) -> f64,
    collective: &mut dyn Collective,
) -> Result<()> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let norm = match &brought {
        Brought::Nothing => None,
        Brought::State(state, _) => known_norm(state)?,
        Brought::Shares(shares) => shares.norm,
    };
    let norm = norm.and_then(|(of, norm)| (of == step).then_some(norm));
    let is_behind = match &brought {
        Brought::State(state, steps_done) => {
            let is_of_division = state.place().is_some_and(|place| place.world_size == old_world_size);
            **steps_done + 1 == step && is_of_division && next_is_summed(state, **steps_done)
        }
        Brought::Nothing | Brought::Shares(_) => false,
    };
    // Who knows the norm, and how many lack it.
    let mut told = vec![0.0; world_size + 1];
    told[rank] = f32::from(u8::from(norm.is_some()));
    told[world_size] = f32::from(u8::from(is_behind));
    collective.all_reduce_sum(&mut told)?;
    let Some(root) = told[..world_size].iter().position(|&knows| knows > 0.0).filter(|_| told[world_size] > 0.0) else { return Ok(()) };
    let mut bytes = norm.unwrap_or_default().to_le_bytes();
    collective.broadcast(&mut bytes, root)?;
    if let Brought::State(state, steps_done) = brought
        && is_behind
    {
        take_step(state, f32::from_le_bytes(bytes), learning_rate(*steps_done))?;
        *steps_done += 1;
    }
    Ok(())
}

/// The norm that a state was updated with last, and the steps done since.
fn known_norm(state: &State) -> Result<Option<(u64, f32)>> {
    let Some(Summed { steps_done, norm: Some(norm) }) = &state.summed else { return Ok(None) };
    Ok(Some((steps_done + 1, norm.f_double_value(&[])? as f32)))
}

/// Whether all but the norm is there for the next step.
pub fn next_is_summed(state: &State, steps_done: u64) -> bool {
    state.summed.as_ref().is_some_and(|summed| summed.steps_done == steps_done && summed.norm.is_none())
}

/// The update that was about to be made: the same numbers in the same order as in the others.
fn take_step(state: &mut State, norm: f32, learning_rate: f64) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let parameters = state.model.parameters();
    let norm = Tensor::f_from_slice(&[norm])?.f_squeeze()?.f_to_device(parameters.values().device())?;
    let verdict = state.optimizer.judge(&norm, &loss_sums(&parameters.extras()?)?)?;
    let mut parts = update::parts(parameters)?;
    parts.append(&mut update::replica_parts(parameters)?);
    state.optimizer.update(&parts, &verdict, learning_rate)?;
    if let Some(summed) = &mut state.summed {
        summed.norm = Some(norm);
    }
    Ok(())
}

/// What a worker has of the state before it is dealt out.
#[derive(Clone, Copy)]
pub enum Mine<'a> {
    /// Nothing that is of use.
    Nothing,
    /// What it has to have.
    All,
    /// Shares of another division.
    Shares(&'a Shares),
}

impl<'a> Mine<'a> {
    /// Of the state of a step that `old_world_size` ranks shared out. `kept` is the step of what is in place for the new world, `given` are shares
    /// of another division with their step.
    pub fn of((step, old_world_size): (u64, usize), kept: Option<u64>, given: Option<(&'a Shares, u64)>, world_size: usize) -> Self {
        match given {
            Some((shares, of)) if of == step && shares.place().world_size == old_world_size => Self::Shares(shares),
            None if kept == Some(step) && world_size == old_world_size => Self::All,
            _ => Self::Nothing,
        }
    }
}

/// Gives every worker its shares of a state that `old_world_size` ranks have shared out; all workers call this. Where shares are nowhere it
/// returns their ranks, on all workers, and has changed nothing.
///
/// The state of a worker is garbage while this is under way, except that of one which has [`Mine::All`].
pub fn deal(
    parameters: &mut FlatParameters,
    optimizer: &AdamW,
    collective: &mut dyn Collective,
    mine: Mine,
    old_world_size: usize,
) -> Result<Vec<usize>> {
    let _guard = tch::no_grad_guard();
    let register = Register::agree(parameters, collective, mine, old_world_size)?;
    let holders = match register.holders() {
        Ok(holders) => holders,
        Err(lost) => return Ok(lost),
    };
    let segments = parameters.buckets().segments();
    let longest = segments.iter().map(|segment| segment.range.len()).max().unwrap_or(0);
    let chunk = Tensor::f_zeros([longest.min(CHUNK_FLOATS_MAX) as i64], (Kind::Float, Device::Cpu))?;
    for (index, buffer) in buffers(parameters, optimizer).into_iter().enumerate() {
        for &old_rank in &register.wanted(parameters) {
            let layout = ShardLayout::new(segments, old_rank, old_world_size);
            for range in layout.parts().iter().flat_map(|part| chunks(&part.share)) {
                let mut part = chunk.f_narrow(0, 0, range.len() as i64)?;
                if collective.rank() == holders[old_rank] {
                    match mine {
                        Mine::Nothing => unreachable!("a worker without shares registers none"),
                        Mine::Shares(shares) => shares.copy_out(index, &range, &mut part)?,
                        Mine::All => {
                            let place = if buffer.is_shard { place_of(parameters.layouts(), &range)? } else { range.clone() };
                            part.f_copy_(&buffer.flat.f_narrow(0, place.start as i64, place.len() as i64)?)?;
                        }
                    }
                }
                memory::with_bytes_mut(&mut part, |bytes| collective.broadcast(bytes, holders[old_rank]))??;
                if !matches!(mine, Mine::All) {
                    keep(&buffer, parameters, &part, &range)?;
                }
            }
        }
    }
    // Where a generation broke between an update and this, each has its own values only.
    update::spread_values(parameters, collective)?;
    parameters.refresh();
    // Nobody gives up what it brought before all have got theirs, unless this very operation breaks: then some workers are divided as before and
    // some anew, and the coordinator goes on with the division that is whole, if one is.
    collective.barrier()?;
    Ok(Vec::new())
}

/// Where a range lies that is part of one of these shares.
fn place_of<'a>(layouts: impl Iterator<Item = &'a ShardLayout>, range: &Range<usize>) -> Result<Range<usize>> {
    let found = layouts.flat_map(ShardLayout::parts).find_map(|part| part.within(range));
    let found = found.filter(|(flat, _)| flat == range).map(|(_, place)| place);
    ensure!(found.is_some(), "values {} to {} are not among the shares of this worker", range.start, range.end);
    Ok(found.unwrap_or_default())
}

/// Who holds what, as all workers know it.
struct Register {
    old_world_size: usize,
    /// For each rank: the old rank whose shares it owns plus 1, the one whose replica it has plus 1, and whether it has all. 0 is none.
    entries: Vec<[usize; 3]>,
}

impl Register {
    fn agree(parameters: &FlatParameters, collective: &mut dyn Collective, mine: Mine, old_world_size: usize) -> Result<Self> {
        let (rank, world_size) = (collective.rank(), collective.world_size());
        let (own, replica) = match mine {
            Mine::Nothing => (None, None),
            Mine::Shares(shares) => (Some(&shares.own), shares.replica.as_ref()),
            Mine::All => (Some(parameters.layout()), parameters.replica()),
        };
        let place = |layout: Option<&ShardLayout>| layout.map_or(0, |layout| layout.rank_of().0 + 1);
        let mut table = vec![0.0; 3 * world_size];
        table[3 * rank..3 * (rank + 1)].copy_from_slice(&[place(own) as f32, place(replica) as f32, f32::from(matches!(mine, Mine::All))]);
        collective.all_reduce_sum(&mut table)?;
        let entries = table.chunks_exact(3).map(|entry| [entry[0], entry[1], entry[2]].map(|number| number as usize)).collect();
        Ok(Self { old_world_size, entries })
    }

    /// The rank that gives each share: an owner, or who has a replica. Several may have one: where a generation broke while shares were dealt
    /// out, or where somebody comes back. An error with the ranks whose shares are nowhere.
    fn holders(&self) -> Result<Vec<usize>, Vec<usize>> {
        let has = |kind: usize, old_rank: usize| self.entries.iter().position(|entry| entry[kind] == old_rank + 1);
        let holders: Vec<Option<usize>> = (0..self.old_world_size).map(|old_rank| has(0, old_rank).or_else(|| has(1, old_rank))).collect();
        let lost: Vec<usize> = (0..self.old_world_size).filter(|&old_rank| holders[old_rank].is_none()).collect();
        if lost.is_empty() { Ok(holders.into_iter().flatten().collect()) } else { Err(lost) }
    }

    /// The old ranks of whose shares somebody lacks one.
    fn wanted(&self, parameters: &FlatParameters) -> Vec<usize> {
        let has_all = |entry: &[usize; 3]| entry[2] > 0;
        if !self.entries.iter().any(has_all) {
            return (0..self.old_world_size).collect();
        }
        // Who has all is divided as before, and so are the others.
        let place = SharePlace::of(parameters.layout(), parameters.replica());
        let lacking = (0..place.world_size).filter(|&rank| !has_all(&self.entries[rank]));
        let of = |rank: usize| [Some(rank), SharePlace { rank, ..place }.replica_of()];
        let mut wanted: Vec<usize> = lacking.flat_map(of).flatten().collect();
        wanted.sort_unstable();
        wanted.dedup();
        wanted
    }
}

/// How many ranks before a worker the one is whose share it replicates: the nearest for which as many workers as possible have theirs on another
/// host, so that a host takes as few shares with it as can be. `addresses` are the ranks' `host:port`.
pub fn replica_distance<'a>(addresses: &'a [String]) -> usize {
    let host_of = |address: &'a str| address.rsplit_once(':').map_or(address, |(host, _)| host);
    let mut numbers = HashMap::new();
    let hosts: Vec<usize> = addresses
        .iter()
        .map(|address| {
            let next = numbers.len();
            *numbers.entry(host_of(address)).or_insert(next)
        })
        .collect();
    let world_size = hosts.len();
    let apart = |distance: usize| (0..world_size).filter(|rank| hosts[*rank] != hosts[(rank + world_size - distance) % world_size]).count();
    let all_apart = (1..world_size).find(|&distance| apart(distance) == world_size);
    all_apart.or_else(|| (1..world_size).max_by_key(|&distance| (apart(distance), Reverse(distance)))).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_that_two_workers_have_is_given_by_one_of_them() {
        let register = |entries: &[[usize; 3]], old_world_size| Register { old_world_size, entries: entries.to_vec() };
        // One came back with what another one has owned since.
        let twice = register(&[[1, 3, 0], [2, 1, 0], [2, 1, 0], [3, 2, 0]], 3);
        assert_eq!(twice.holders(), Ok(vec![0, 1, 3]));
        // Two replicas of a share whose owner is lost, and one that has nothing.
        let replicas = register(&[[0, 0, 0], [2, 1, 0], [2, 1, 0], [3, 2, 0]], 3);
        assert_eq!(replicas.holders(), Ok(vec![1, 1, 3]));
        assert_eq!(register(&[[1, 0, 0], [0, 0, 0]], 3).holders(), Err(vec![1, 2]));
    }

    #[test]
    fn a_replica_is_kept_on_another_host_where_there_is_one() {
        for (hosts, expected) in [
            ("a", 0),
            ("a a", 1),
            ("a b", 1),
            ("a a b b", 2),
            ("a a a b b b", 3),
            ("a a b b c c", 2),
            // Only one worker of the first host can have its share elsewhere.
            ("a a a b", 1),
        ] {
            let addresses: Vec<String> = hosts.split(' ').enumerate().map(|(rank, host)| format!("{host}:{rank}")).collect();
            assert_eq!(replica_distance(&addresses), expected, "{hosts}");
        }
        assert_eq!(replica_distance(&["[::1]:7".to_owned(), "[::1]:8".to_owned(), "[::2]:7".to_owned()]), 1);
    }
}
