//! How the workers of a new generation come to one state: from the memory of those who have it, from a checkpoint, or from scratch.

use std::sync::Arc;

use anyhow::{Result, bail};
use cloze_cluster::protocol::{Share, StateSource};
use cloze_recipes::recipe::{Precision, Shard};
use tch::Device;

use crate::checkpoint::{CheckpointState, Loaded, NamedTensorOwned};
use crate::checkpointer::check_belongs;
use crate::collective::{Collective, leader_work};
use crate::generation::keep_alive_interval;
use crate::model::config::Config;
use crate::model::folder;
use crate::model::modernbert::{ModernBert, Placement};
use crate::step::{State, Trainer};
use crate::watcher::state_of;
use crate::worker::Worker;

/// The state that a worker keeps from one generation to the next.
#[derive(Default)]
pub struct Held(Option<(State, u64)>);

impl Held {
    /// Steps done of the state; `None` where there is none.
    pub fn steps_done(&self) -> Option<u64> {
        self.0.as_ref().map(|(_, steps_done)| *steps_done)
    }

    /// Which part of the state it is; `None` where it is the whole, or none.
    pub fn share(&self) -> Option<Share> {
        self.0.as_ref().and_then(|(state, _)| share_of(state))
    }

    /// Keeps a state.
    pub fn put(&mut self, state: State, steps_done: u64) {
        self.0 = Some((state, steps_done));
    }

    /// The state and its steps, or an empty one that is still to be filled.
    pub fn take(&mut self, worker: &Worker, collective: &dyn Collective) -> Result<(State, Option<u64>)> {
        let place = Share { rank: collective.rank() as u32, world_size: collective.world_size() as u32 };
        // A share of another place is of no use, and gives its memory back before this one's is taken.
        if let Some((state, steps_done)) = self.0.take().filter(|(state, _)| share_of(state).is_none_or(|share| share == place)) {
            return Ok((state, Some(steps_done)));
        }
        let recipe = &worker.recipe;
        let placement = Placement { device: worker.device, trainable: true, bfloat16: recipe.train.precision == Precision::Bfloat16 };
        let config = folder::config_of(&recipe.model, &worker.tokenizer)?;
        Ok((State::new(&recipe.train, config, placement, collective)?, None))
    }
}

/// Which part of the state this is, where it is shared out.
fn share_of(state: &State) -> Option<Share> {
    let parameters = state.model.parameters();
    let (rank, world_size) = parameters.layout().rank_of();
    (parameters.shard() != Shard::None).then_some(Share { rank: rank as u32, world_size: world_size as u32 })
}

/// What a restore came to.
pub struct Restored {
    /// Steps done of the state.
    pub steps_done: u64,
    /// Where it came from, for people.
    pub source: String,
    /// Newer checkpoints that were passed over, each with its reason.
    pub skipped: Vec<String>,
    /// The store may hold checkpoints up to this step.
    pub newest_known_step: u64,
    peer: Option<usize>,
}

impl Restored {
    /// Says whose memory the state came from by the worker's slot.
    pub fn named(mut self, members: &[u32]) -> Self {
        if let Some(slot) = self.peer.and_then(|rank| members.get(rank)) {
            self.source = format!("memory of worker {slot}");
        }
        self
    }
}

/// Brings all workers to one state. `held` is the steps of the state in this worker's memory; it is `None` while that is not whole.
pub fn restore(worker: &Arc<Worker>, trainer: &mut Trainer, source: &StateSource, held: &mut Option<u64>) -> Result<Restored> {
    let restored = match source {
        StateSource::Peer { rank, step } => from_memory(trainer, *rank as usize, *step, held)?,
        StateSource::Shares { step } => match from_shares(trainer, *step, *held)? {
            Some(restored) => restored,
            None => from_checkpoint(worker, trainer, held)?,
        },
        StateSource::Checkpoint => from_checkpoint(worker, trainer, held)?,
    };
    *held = Some(restored.steps_done);
    Ok(restored)
}

/// Sends the state of one worker to all, unless all of them have it: replicas are equal bit by bit.
fn from_memory(trainer: &mut Trainer, rank: usize, step: u64, held: &mut Option<u64>) -> Result<Restored> {
    if trainer.collective.rank() == rank && *held != Some(step) {
        bail!("the coordinator takes this worker's state for that of step {step}, it is that of {held:?}");
    }
    let mut missing = [f32::from(u8::from(*held != Some(step)))];
    trainer.collective.all_reduce_sum(&mut missing)?;
    let mut restored = Restored { steps_done: step, source: "memory".to_owned(), skipped: Vec::new(), newest_known_step: step, peer: None };
    if missing[0] > 0.0 {
        // The sender's state stays whole whatever happens to the others.
        if trainer.collective.rank() != rank {
            *held = None;
        }
        trainer.distribute(None, rank)?;
        trainer.optimizer.set_steps_done(step);
        restored.peer = Some(rank);
    }
    Ok(restored)
}

/// Each worker has its share already; `None`, for all of them, where one lacks it all the same.
fn from_shares(trainer: &mut Trainer, step: u64, held: Option<u64>) -> Result<Option<Restored>> {
    let mut missing = [f32::from(u8::from(held != Some(step)))];
    trainer.collective.all_reduce_sum(&mut missing)?;
    let restored = Restored { steps_done: step, source: "memory".to_owned(), skipped: Vec::new(), newest_known_step: step, peer: None };
    Ok((missing[0] == 0.0).then_some(restored))
}

/// The leader reads the newest good checkpoint, or makes first values, and sends them to the others.
fn from_checkpoint(worker: &Arc<Worker>, trainer: &mut Trainer, held: &mut Option<u64>) -> Result<Restored> {
    *held = None;
    let interval = keep_alive_interval(worker);
    let (reader, expected) = (Arc::clone(worker), state_of(worker, trainer, 0));
    let config = trainer.model.config().clone();
    let read = move || read_state(&reader, expected, config);
    let found = leader_work(trainer.collective.as_mut(), interval, read)?;
    let mut header = [0_u8; 16];
    let mut restored = Restored { steps_done: 0, source: String::new(), skipped: Vec::new(), newest_known_step: 0, peer: None };
    if let Some((newest_known_step, loaded)) = &found {
        header[..8].copy_from_slice(&loaded.state.step.to_le_bytes());
        header[8..].copy_from_slice(&newest_known_step.to_le_bytes());
        restored.source.clone_from(&loaded.url);
        restored.skipped.clone_from(&loaded.skipped);
    }
    trainer.collective.broadcast(&mut header, 0)?;
    let number = |start: usize| header[start..start + 8].iter().rev().fold(0_u64, |value, byte| (value << 8) | u64::from(*byte));
    (restored.steps_done, restored.newest_known_step) = (number(0), number(8));
    trainer.distribute(found.as_ref().map(|(_, loaded)| loaded), 0)?;
    trainer.optimizer.set_steps_done(restored.steps_done);
    Ok(restored)
}

/// The newest step that the store knows of, and the state to begin with.
fn read_state(worker: &Worker, expected: CheckpointState, config: Config) -> Result<(u64, Loaded)> {
    if let Some(warning) = worker.store.probe()? {
        tracing::warn!(warning, "the store's conditional writes cannot be relied on");
    }
    let found = worker.store.latest_good()?;
    let newest = worker.store.list()?.last().map_or(0, |listed| listed.step);
    let loaded = match found {
        Some(loaded) => {
            check_belongs(&loaded, &expected)?;
            loaded
        }
        None => first_state(worker, expected, config)?,
    };
    Ok((newest, loaded))
}

/// The state before the first step, in the form of a checkpoint: first values, and moments of zero.
fn first_state(worker: &Worker, state: CheckpointState, config: Config) -> Result<Loaded> {
    let placement = Placement { device: Device::Cpu, trainable: false, bfloat16: false };
    let mut model = ModernBert::new(config, placement)?;
    folder::first_values(&mut model, &worker.recipe.model, worker.recipe.seed)?;
    let parameters = model.parameters();
    let values = parameters.named(parameters.values())?;
    let moments = ["exp_avg.", "exp_avg_sq."].iter().flat_map(|prefix| values.iter().map(move |value| (*prefix, value)));
    let optimizer = moments.map(|(prefix, value)| NamedTensorOwned {
        name: format!("{prefix}{}", value.name),
        shape: value.shape.clone(),
        data: vec![0; value.data.len()].into(),
    });
    let optimizer = optimizer.collect();
    Ok(Loaded { state, model: values, optimizer, url: "scratch".to_owned(), skipped: Vec::new() })
}
