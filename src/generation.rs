//! One generation of one worker: connect to the peers, agree on a state, train.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cloze_cluster::client::Client;
use cloze_cluster::protocol::{Phase, StateSource, Unreported, WorkerMessage};
use cloze_data::batch::{BatchSpec, total_steps};
use cloze_data::mask::TokenFacts;
use cloze_recipes::recipe::{Shard, TrainRecipe};
use tch::Device;

use crate::batch_feed::{BatchFeed, FeedPlan};
use crate::checkpointer::Checkpointer;
use crate::collective::local::{Ring, RingOptions};
use crate::collective::nccl::{Nccl, NcclOptions};
use crate::collective::{AbortHandle, Collective, is_leader};
use crate::drill::Drills;
use crate::optim::schedule::Schedule;
use crate::restore::{Held, Possession, Restored, restore};
use crate::sharding::layout::SharePlace;
use crate::sharding::survivors::replica_distance;
use crate::step::Trainer;
use crate::train::{EndReason, SavePoint, TrainEnd, Watcher as _, train};
use crate::watcher::{GenerationFacts, RunWatcher};
use crate::worker::Worker;

/// The CUDA stream on which libtorch computes unless told otherwise.
const DEFAULT_STREAM: u64 = 0;

/// A worker's place in a generation.
pub struct Assignment {
    /// Number of the generation.
    pub generation: u64,
    /// This worker's rank.
    pub rank: usize,
    /// Slots of the workers, by rank.
    pub members: Vec<u32>,
    /// Collective addresses by rank.
    pub peers: Vec<String>,
    /// Proves membership to the peers.
    pub key: String,
    /// Where the state comes from.
    pub source: StateSource,
    /// Step after which all workers save and leave.
    pub until_step: Option<u64>,
    /// The state in memory is saved, and nothing else is done.
    pub saves_only: bool,
    /// Set when the generation is over.
    pub interrupt: Arc<AtomicBool>,
}

/// What outlives generations in one worker.
pub struct Belongings {
    /// The state, where this worker has one.
    pub held: Held,
    /// The checkpoint in progress.
    pub checkpointer: Checkpointer,
    /// Failures that are still to be practised.
    pub drills: Drills,
    /// Steps since the last one that was due for a report.
    pub unreported: Unreported,
}

/// Builds, restores and trains; ends with the run or with the generation. Whatever happens, a state that is whole is kept.
pub fn run(worker: &Arc<Worker>, assignment: Assignment, belongings: &mut Belongings) -> Result<TrainEnd> {
    let facts = GenerationFacts {
        generation: assignment.generation,
        total_steps: total_steps(&worker.recipe.train, worker.dataset.manifest().epoch_samples(worker.recipe.data.mixing_cap)),
        until_step: assignment.until_step,
        interrupt: Arc::clone(&assignment.interrupt),
    };
    worker.client.progress(facts.generation, belongings.held.steps_done().unwrap_or(0), Phase::Building);
    let (source, members, saves_only) = (assignment.source.clone(), assignment.members.clone(), assignment.saves_only);
    let place = share_place(worker, &assignment);
    let mut collective = connect(worker, assignment)?;
    watch_for_abort(&worker.client, facts.generation, &facts.interrupt, collective.abort_handle());
    // A snapshot of the old generation may still read the buffers that a restore overwrites.
    belongings.checkpointer.wait_for_copy();
    let schedule = Schedule::new(&worker.recipe.train.schedule, worker.recipe.train.learning_rate, facts.total_steps);
    let is_of_shares = matches!(source, StateSource::Shares { .. });
    if let StateSource::Shares { step, world_size } = source {
        belongings.held.level((step, world_size as usize), &schedule, collective.as_mut())?;
    }
    let (state, mut steps_done) = belongings.held.take(worker, place, is_of_shares)?;
    let mut trainer = Trainer::new(&worker.recipe, state, schedule, collective)?;
    let result = restore_and_train(
        worker,
        &mut trainer,
        facts,
        belongings,
        &mut Origin { source, members, saves_only, steps_done: &mut steps_done },
    );
    trainer.log_overlap();
    // The step that the copy waits for does not come any more.
    belongings.checkpointer.wait_for_copy();
    match steps_done {
        Some(steps_done) if trainer.state_is_whole() => belongings.held.put(trainer.into_state(), steps_done),
        _ => {}
    }
    result
}

/// Where a generation's state comes from, and how far it is.
struct Origin<'a> {
    source: StateSource,
    members: Vec<u32>,
    /// It is saved, and nothing else is done.
    saves_only: bool,
    /// Steps done of the state in memory; `None` while it is not whole.
    steps_done: &'a mut Option<u64>,
}

fn restore_and_train(
    worker: &Arc<Worker>,
    trainer: &mut Trainer,
    facts: GenerationFacts,
    belongings: &mut Belongings,
    origin: &mut Origin,
) -> Result<TrainEnd> {
    let (generation, total_steps) = (facts.generation, facts.total_steps);
    let started = Instant::now();
    worker.client.progress(generation, origin.steps_done.unwrap_or(0), Phase::Restoring);
    let possession = Possession { steps_done: &mut *origin.steps_done, held: &mut belongings.held };
    let restored = restore(worker, trainer, &origin.source, possession)?;
    let mut steps_done = restored.steps_done;
    belongings.checkpointer.set_newest_known_step(restored.newest_known_step);
    if is_leader(trainer.collective.as_ref()) {
        let Restored { source, skipped, .. } = restored.named(&origin.members);
        let seconds = started.elapsed().as_secs_f64();
        worker.client.send(&WorkerMessage::Restored { generation, step: steps_done, source, skipped, seconds })?;
    }
    let plan = feed_plan(worker, trainer, steps_done, total_steps);
    let Belongings { checkpointer, drills, unreported, .. } = belongings;
    let mut watcher = RunWatcher::new(worker, trainer, facts, checkpointer, unreported)?;
    let result = if origin.saves_only {
        save_only(trainer, &mut watcher, steps_done, total_steps)
    } else {
        train(trainer, &mut BatchFeed::start(plan)?, &mut watcher, drills, &mut steps_done)
    };
    *origin.steps_done = if loses_state(result.as_ref()) { None } else { Some(steps_done) };
    let end = result?;
    // Nobody reports the run as finished before everybody is past the last collective and the last checkpoint is written.
    if end.reason != EndReason::Regrouped || must_save_to_regroup(&worker.recipe.train) {
        watcher.finish(trainer.collective.as_mut())?;
    }
    trainer.collective.barrier()?;
    if end.reason != EndReason::Regrouped {
        worker.client.progress(generation, end.steps_done, Phase::Leaving);
    }
    Ok(end)
}

/// Saves the state that a stop would lose.
fn save_only(trainer: &mut Trainer, watcher: &mut RunWatcher, steps_done: u64, total_steps: u64) -> Result<TrainEnd> {
    watcher.save(trainer, SavePoint { steps_done, is_last: true, is_temporary: false, loss: f64::NAN })?;
    let reason = if steps_done == total_steps { EndReason::Complete } else { EndReason::Stopped };
    Ok(TrainEnd { steps_done, reason })
}

/// Whether an error came after the state had gone past the step that it belongs to.
fn loses_state(result: Result<&TrainEnd, &anyhow::Error>) -> bool {
    let error = result.err().and_then(|error| error.downcast_ref::<crate::train::NotFinite>());
    error.is_some_and(|error| !error.state_is_whole)
}

/// Whether the state is saved before the workers regroup: one that is lost meanwhile would take its share with it.
pub fn must_save_to_regroup(train: &TrainRecipe) -> bool {
    train.shard != Shard::None && !train.replicate_shards
}

/// Which share this worker has in a generation, and of whose it keeps a replica.
fn share_place(worker: &Worker, assignment: &Assignment) -> SharePlace {
    let (rank, world_size) = (assignment.rank, assignment.peers.len());
    let replica_distance = if worker.recipe.train.replicate_shards { replica_distance(&assignment.peers) } else { 0 };
    SharePlace { rank, world_size, replica_distance }
}

fn connect(worker: &Worker, assignment: Assignment) -> Result<Box<dyn Collective>> {
    let options = RingOptions {
        listener: worker.listener.try_clone().context("share the listening socket")?,
        rank: assignment.rank,
        peers: assignment.peers,
        key: assignment.key,
        generation: assignment.generation,
        timeout: Duration::from_millis(worker.recipe.cluster.collective_timeout_ms),
        interrupt: assignment.interrupt,
    };
    let (generation, timeout, interrupt) = (options.generation, options.timeout, Arc::clone(&options.interrupt));
    let ring = Ring::connect(options)?;
    let mut collective: Box<dyn Collective> = match worker.device {
        Device::Cuda(device) if ring.world_size() > 1 => {
            // The ring carries NCCL's identifier, and must not be waited for longer than the generation lives.
            watch_for_abort(&worker.client, generation, &interrupt, ring.abort_handle());
            Box::new(Nccl::connect(NcclOptions { ring, device, compute_stream: DEFAULT_STREAM, timeout, interrupt })?)
        }
        _ => Box::new(ring),
    };
    let client = Arc::clone(&worker.client);
    collective.set_wait_observer(Arc::new(move |is_waiting| client.set_waiting(is_waiting)));
    Ok(collective)
}

/// From now on an abort of the coordinator ends the operation in progress at once.
fn watch_for_abort(client: &Client, generation: u64, interrupt: &Arc<AtomicBool>, handle: AbortHandle) {
    let interrupt = Arc::clone(interrupt);
    client.on_abort(Box::new(move |aborted, reason| {
        if aborted >= generation {
            interrupt.store(true, Ordering::SeqCst);
            handle.abort(reason);
        }
    }));
}

fn feed_plan(worker: &Worker, trainer: &Trainer, from_step: u64, total_steps: u64) -> FeedPlan {
    let facts = TokenFacts::of(&worker.tokenizer, worker.anchor_id);
    FeedPlan {
        dataset: Arc::clone(&worker.dataset),
        spec: BatchSpec::new(&worker.recipe, facts, &*worker.dataset),
        from_step,
        total_steps,
        rank: trainer.collective.rank(),
        world_size: trainer.collective.world_size(),
    }
}

/// How often the leader says that its storage work goes on: three times within a collective's timeout.
pub fn keep_alive_interval(worker: &Worker) -> Duration {
    Duration::from_millis(worker.recipe.cluster.collective_timeout_ms / 3)
}
