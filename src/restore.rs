//! How the workers of a new generation come to one state: from the memory of those who have it, from a checkpoint, or from scratch.

use std::sync::Arc;

use anyhow::{Result, bail};
use cloze_cluster::protocol::{Share, StateSource};
use cloze_recipes::recipe::Precision;
use tch::Device;

use crate::checkpoint::{CheckpointState, Loaded, NamedTensorOwned};
use crate::checkpointer::check_belongs;
use crate::collective::{Collective, leader_work};
use crate::generation::keep_alive_interval;
use crate::model::config::Config;
use crate::model::folder;
use crate::model::modernbert::{ModernBert, Placement};
use crate::optim::schedule::Schedule;
use crate::sharding::layout::SharePlace;
use crate::sharding::survivors::{self, Brought, Mine, Shares};
use crate::step::{State, Trainer};
use crate::watcher::state_of;
use crate::worker::Worker;

/// What a worker keeps from one generation to the next.
#[derive(Default)]
pub struct Held(Option<Kept>);

struct Kept {
    what: KeptState,
    steps_done: u64,
}

enum KeptState {
    /// A state, or a share of one, as training needs it.
    State(Box<State>),
    /// Shares among other workers, which are to be shared out anew.
    Shares(Shares),
}

impl Held {
    /// Steps done of the state; `None` where there is none.
    pub fn steps_done(&self) -> Option<u64> {
        self.0.as_ref().map(|kept| kept.steps_done)
    }

    /// Which part of the state it is; `None` where it is the whole, or none.
    pub fn share(&self) -> Option<Share> {
        let Kept { what, steps_done } = self.0.as_ref()?;
        let (place, next_is_summed) = match what {
            KeptState::State(state) => (state.place()?, survivors::next_is_summed(state, *steps_done)),
            KeptState::Shares(shares) => (shares.place(), false),
        };
        let replica_of = place.replica_of().map(|rank| rank as u32);
        Some(Share { rank: place.rank as u32, world_size: place.world_size as u32, replica_of, next_is_summed })
    }

    /// Keeps a state.
    pub fn put(&mut self, state: State, steps_done: u64) {
        self.0 = Some(Kept { what: KeptState::State(Box::new(state)), steps_done });
    }

    /// Before the shares of several workers become a state: takes a step that only others have taken. `division` is the step, and the ranks that
    /// shared it out. All workers call this.
    pub fn level(&mut self, division: (u64, usize), schedule: &Schedule, collective: &mut dyn Collective) -> Result<()> {
        let brought = match &mut self.0 {
            None => Brought::Nothing,
            Some(Kept { what: KeptState::State(state), steps_done }) => Brought::State(state, steps_done),
            Some(Kept { what: KeptState::Shares(shares), .. }) => Brought::Shares(shares),
        };
        survivors::level(brought, division, |steps_done| schedule.learning_rate(steps_done), collective)
    }

    /// The state and its steps, or an empty one that is still to be filled. Shares of another division stay here while they `may_be_needed`.
    pub fn take(&mut self, worker: &Worker, place: SharePlace, may_be_needed: bool) -> Result<(State, Option<u64>)> {
        match self.0.take() {
            Some(Kept { what: KeptState::State(state), steps_done }) if state.place().is_none_or(|own| own == place) => {
                return Ok((*state, Some(steps_done)));
            }
            // Their memory beyond the shares is given back before this one's is taken.
            Some(Kept { what: KeptState::State(state), steps_done }) if may_be_needed => {
                self.0 = Some(Kept { what: KeptState::Shares(Shares::out_of(*state)?), steps_done });
            }
            Some(kept @ Kept { what: KeptState::Shares(_), .. }) if may_be_needed => self.0 = Some(kept),
            _ => {}
        }
        let recipe = &worker.recipe;
        let placement = Placement { device: worker.device, trainable: true, bfloat16: recipe.train.precision == Precision::Bfloat16 };
        let config = folder::config_of(&recipe.model, &worker.tokenizer)?;
        Ok((State::new(&recipe.train, config, placement, place)?, None))
    }

    /// Shares of another division, with their steps done.
    fn shares(&self) -> Option<(&Shares, u64)> {
        match &self.0 {
            Some(Kept { what: KeptState::Shares(shares), steps_done }) => Some((shares, *steps_done)),
            _ => None,
        }
    }
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

/// What a worker has when a restore begins.
pub struct Possession<'a> {
    /// Steps of the state that its trainer has; `None` while that is not whole.
    pub steps_done: &'a mut Option<u64>,
    /// What it has beside that. It is given up when the restore has succeeded.
    pub held: &'a mut Held,
}

/// Brings all workers to one state.
pub fn restore(worker: &Arc<Worker>, trainer: &mut Trainer, source: &StateSource, possession: Possession) -> Result<Restored> {
    let Possession { steps_done, held } = possession;
    let restored = match source {
        StateSource::Peer { rank, step } => from_memory(trainer, *rank as usize, *step, steps_done)?,
        StateSource::Shares { step, world_size } => match from_shares(trainer, (*step, *world_size as usize), held.shares(), steps_done)? {
            Some(restored) => restored,
            None => from_checkpoint(worker, trainer, steps_done)?,
        },
        StateSource::Checkpoint => from_checkpoint(worker, trainer, steps_done)?,
    };
    *steps_done = Some(restored.steps_done);
    held.0 = None;
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

/// Each worker gets its share from those who have it; `None`, for all of them, where one is nowhere all the same.
fn from_shares(
    trainer: &mut Trainer,
    division: (u64, usize),
    held: Option<(&Shares, u64)>,
    steps_done: &mut Option<u64>,
) -> Result<Option<Restored>> {
    let (step, old_world_size) = division;
    let mine = Mine::of(division, *steps_done, held, trainer.collective.world_size());
    if !matches!(mine, Mine::All) {
        *steps_done = None;
    }
    let lost = trainer.deal(mine, old_world_size)?;
    if !lost.is_empty() {
        tracing::warn!(step, old_world_size, ranks = ?lost, "shares of the state are lost after all; a checkpoint is read instead");
        return Ok(None);
    }
    trainer.optimizer.set_steps_done(step);
    Ok(Some(Restored { steps_done: step, source: "memory".to_owned(), skipped: Vec::new(), newest_known_step: step, peer: None }))
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
