//! One generation of one worker: connect to the peers, agree on a state, train.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use cloze_cluster::client::Client;
use cloze_cluster::protocol::{Phase, StepReport, WorkerMessage};
use cloze_data::batch::{BatchSpec, total_steps};
use cloze_data::mask::TokenFacts;
use cloze_recipes::recipe::Precision;
use tch::{Device, Tensor};

use crate::batch_feed::{BatchFeed, FeedPlan};
use crate::checkpoint::{CheckpointState, Saved};
use crate::checkpointer::{self, Checkpointer, Snapshot};
use crate::collective::local::{Ring, RingOptions};
use crate::collective::{Collective, CollectiveError, is_leader, leader_work};
use crate::model::folder;
use crate::model::modernbert::{ModernBert, Placement};
use crate::optim::adamw::{AdamW, Settings};
use crate::optim::schedule::Schedule;
use crate::torch::memory;
use crate::torch::overlap::Buckets;
use crate::train::{TrainEnd, Trainer, Watcher, train};
use crate::worker::Worker;

/// A worker's place in a generation.
pub struct Assignment {
    /// Number of the generation.
    pub generation: u64,
    /// This worker's rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Collective addresses by rank.
    pub peers: Vec<String>,
    /// Proves membership to the peers.
    pub key: String,
    /// Set when the generation is over.
    pub interrupt: Arc<AtomicBool>,
}

/// Builds, restores and trains; ends with the run or with the generation.
pub fn run(worker: &Worker, assignment: Assignment) -> Result<TrainEnd> {
    let generation = assignment.generation;
    worker.client.progress(generation, 0, Phase::Building);
    let interrupt = Arc::clone(&assignment.interrupt);
    let collective = connect(worker, assignment)?;
    watch_for_abort(&worker.client, generation, Arc::clone(&interrupt), collective.as_ref());
    let total_steps = total_steps(&worker.recipe.train, worker.dataset.num_samples());
    let mut trainer = build(worker, collective, total_steps)?;
    worker.client.progress(generation, 0, Phase::Restoring);
    let steps_done = restore(worker, &mut trainer, generation)?;
    let mut feed = BatchFeed::start(feed_plan(worker, &trainer, steps_done, total_steps))?;
    let mut watcher = RunWatcher::new(worker, &trainer, GenerationFacts { generation, total_steps, interrupt })?;
    worker.client.progress(generation, steps_done, Phase::Training);
    let end = match train(&mut trainer, &mut feed, steps_done, &mut watcher) {
        Ok(end) => end,
        Err(error) if error.is::<CollectiveError>() => {
            // The checkpoint in progress is good, or its failure is what ends the run: both are told before the generation is left.
            watcher.finish()?;
            return Err(error);
        }
        Err(error) => return Err(error),
    };
    // Nobody reports the run as finished before everybody is past the last collective and the last checkpoint is written.
    leader_work(trainer.collective.as_mut(), keep_alive_interval(worker), || watcher.finish())?;
    trainer.collective.barrier()?;
    worker.client.progress(generation, end.steps_done, Phase::Leaving);
    Ok(end)
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
    debug_assert_eq!(options.peers.len(), assignment.world_size);
    Ok(Box::new(Ring::connect(options)?))
}

/// From now on an abort of the coordinator ends the operation in progress at once.
fn watch_for_abort(client: &Client, generation: u64, interrupt: Arc<AtomicBool>, collective: &dyn Collective) {
    let handle = collective.abort_handle();
    client.on_abort(Box::new(move |aborted, reason| {
        if aborted >= generation {
            interrupt.store(true, Ordering::SeqCst);
            handle.abort(reason);
        }
    }));
}

fn build(worker: &Worker, collective: Box<dyn Collective>, total_steps: u64) -> Result<Trainer<'_>> {
    let recipe = &worker.recipe;
    let placement = Placement { device: worker.device, trainable: true, bfloat16: recipe.train.precision == Precision::Bfloat16 };
    let model = ModernBert::new(folder::config_of(&recipe.model, &worker.tokenizer)?, placement)?;
    let optimizer = AdamW::new(model.parameters(), Settings::from(&recipe.train));
    let schedule = Schedule::new(&recipe.train.schedule, recipe.train.learning_rate, total_steps);
    let buckets = Buckets::new(&model.parameters().matrix_places(), model.parameters().gradients()?.numel());
    Ok(Trainer { recipe, model, optimizer, schedule, collective, buckets })
}

fn feed_plan(worker: &Worker, trainer: &Trainer, from_step: u64, total_steps: u64) -> FeedPlan {
    let facts = TokenFacts {
        mask_id: worker.tokenizer.mask_id,
        special_ids: worker.tokenizer.special_ids(),
        vocab_size: worker.tokenizer.vocab_size(),
        anchor_id: worker.anchor_id,
    };
    FeedPlan {
        dataset: Arc::clone(&worker.dataset),
        spec: BatchSpec::new(&worker.recipe, facts, worker.dataset.num_samples()),
        from_step,
        total_steps,
        rank: trainer.collective.rank(),
        world_size: trainer.collective.world_size(),
    }
}

/// Brings all workers to one state: the leader reads the newest good checkpoint, or makes first values, and sends them to the others.
/// Returns the steps done.
fn restore(worker: &Worker, trainer: &mut Trainer, generation: u64) -> Result<u64> {
    let mut steps_done = 0;
    let interval = keep_alive_interval(worker);
    if let Some(found) = leader_work(trainer.collective.as_mut(), interval, || worker.store.latest_good())? {
        let (source, skipped) = if let Some(loaded) = found {
            let expected = state_of(worker, trainer, loaded.state.step);
            checkpointer::restore(&loaded, &expected, &mut trainer.model, &trainer.optimizer)?;
            steps_done = loaded.state.step;
            (loaded.url, loaded.skipped)
        } else {
            folder::first_values(&mut trainer.model, &worker.recipe.model, worker.recipe.seed)?;
            ("scratch".to_owned(), Vec::new())
        };
        worker.client.send(&WorkerMessage::Restored { generation, step: steps_done, source, skipped })?;
    }
    let mut header = steps_done.to_le_bytes();
    trainer.collective.broadcast(&mut header, 0)?;
    let steps_done = u64::from_le_bytes(header);
    let flats =
        [trainer.model.parameters().values(), &trainer.optimizer.first_moment, &trainer.optimizer.second_moment].map(Tensor::shallow_clone);
    for flat in flats {
        broadcast_tensor(trainer.collective.as_mut(), flat)?;
    }
    trainer.model.parameters_mut().refresh();
    trainer.optimizer.set_steps_done(steps_done);
    Ok(steps_done)
}

/// Sends a flat tensor of the leader to everybody, through host memory.
fn broadcast_tensor(collective: &mut dyn Collective, mut flat: Tensor) -> Result<()> {
    if collective.world_size() == 1 {
        return Ok(());
    }
    let _guard = tch::no_grad_guard();
    let mut host = flat.to_device(Device::Cpu);
    memory::with_bytes_mut(&mut host, |bytes| collective.broadcast(bytes, 0))??;
    if flat.device() != Device::Cpu {
        flat.f_copy_(&host)?;
    }
    Ok(())
}

/// How often the leader says that its storage work goes on: three times within a collective's timeout.
fn keep_alive_interval(worker: &Worker) -> Duration {
    Duration::from_millis(worker.recipe.cluster.collective_timeout_ms / 3)
}

fn state_of(worker: &Worker, trainer: &Trainer, step: u64) -> CheckpointState {
    CheckpointState {
        step,
        recipe_hash: worker.recipe.hash(),
        data_fingerprint: worker.dataset.manifest().fingerprint(),
        world_size: trainer.collective.world_size() as u32,
        adam_step: step,
    }
}

/// Answers the loop's questions from the coordinator's messages and the recipe; only the leader reports and saves.
struct RunWatcher<'a> {
    worker: &'a Worker,
    facts: GenerationFacts,
    leader: Option<Leader>,
}

/// What a generation's end is decided by.
struct GenerationFacts {
    generation: u64,
    total_steps: u64,
    interrupt: Arc<AtomicBool>,
}

struct Leader {
    checkpointer: Checkpointer,
    companions: Vec<(String, Bytes)>,
    /// Taken while another one was being written.
    pending: Option<Snapshot>,
}

impl Leader {
    fn start_pending(&mut self) -> Result<()> {
        match self.pending.take() {
            Some(snapshot) => self.checkpointer.start(snapshot),
            None => Ok(()),
        }
    }
}

impl<'a> RunWatcher<'a> {
    fn new(worker: &'a Worker, trainer: &Trainer, facts: GenerationFacts) -> Result<Self> {
        let leader = if is_leader(trainer.collective.as_ref()) {
            let companions = folder::companion_files(trainer.model.config(), &worker.tokenizer)?;
            Some(Leader { checkpointer: Checkpointer::new(Arc::clone(&worker.store)), companions, pending: None })
        } else {
            None
        };
        Ok(Self { worker, facts, leader })
    }

    /// Waits for the checkpoint in progress, and writes the last one where it had to wait for that.
    fn finish(&mut self) -> Result<()> {
        for _ in 0..2 {
            let Some(leader) = &mut self.leader else { return Ok(()) };
            let saved = leader.checkpointer.finish()?;
            leader.start_pending()?;
            if let Some(saved) = saved {
                self.announce(saved)?;
            }
        }
        Ok(())
    }

    fn announce(&self, (step, saved): (u64, Saved)) -> Result<()> {
        let message = WorkerMessage::CheckpointSaved {
            generation: self.facts.generation,
            step,
            url: saved.url,
            bytes: saved.bytes,
            seconds: saved.seconds,
        };
        self.worker.client.send(&message)
    }
}

impl Watcher for RunWatcher<'_> {
    fn stop_requested(&self) -> bool {
        self.worker.client.stop_requested().is_some()
    }

    fn step_done(&mut self, report: &StepReport) -> Result<()> {
        // In a world of one no collective ends with the generation; without this, a worker whose controller is gone would go on.
        ensure!(!self.facts.interrupt.load(Ordering::SeqCst), "the generation is over or the coordinator is gone");
        self.worker.client.progress(self.facts.generation, report.step, Phase::Training);
        let is_logged = report.step.is_multiple_of(self.worker.recipe.train.log_every_steps) || report.step == self.facts.total_steps;
        if let Some(saved) = self.leader.as_mut().map(|leader| leader.checkpointer.poll()).transpose()?.flatten() {
            self.announce(saved)?;
        }
        if self.leader.is_some() && is_logged {
            self.worker.client.send(&WorkerMessage::Step { generation: self.facts.generation, report: report.clone() })?;
        }
        Ok(())
    }

    fn save_due(&self, steps_done: u64, is_last: bool) -> bool {
        is_last || steps_done.is_multiple_of(self.worker.recipe.checkpoint.every_steps)
    }

    fn save(&mut self, trainer: &Trainer, steps_done: u64, is_last: bool) -> Result<()> {
        let Some(leader) = &mut self.leader else { return Ok(()) };
        let saved = leader.checkpointer.poll()?;
        if leader.checkpointer.is_writing() && !is_last {
            // Waiting here would hold up all workers; the state is saved at the next point instead.
            tracing::warn!(step = steps_done, "checkpoint skipped: the one before is still being written");
        } else {
            self.worker.client.progress(self.facts.generation, steps_done, Phase::Saving);
            let state = state_of(self.worker, trainer, steps_done);
            leader.pending = Some(Snapshot::take(state, &trainer.model, &trainer.optimizer, &leader.companions)?);
            if !leader.checkpointer.is_writing() {
                leader.start_pending()?;
            }
        }
        match saved {
            Some(saved) => self.announce(saved),
            None => Ok(()),
        }
    }
}
