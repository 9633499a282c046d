//! What the training loop asks of the world and tells it: stops, reports, checkpoints.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use bytes::Bytes;
use cloze_cluster::protocol::{Phase, StepReport, Unreported, WorkerMessage};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Shard;

use crate::audit::Audit;
use crate::batch_feed::StepBatch;
use crate::checkpoint::CheckpointState;
use crate::checkpointer::{Checkpointer, SaveOrder};
use crate::collective::{Collective, is_leader, leader_work};
use crate::generation::{keep_alive_interval, must_save_to_regroup};
use crate::model::folder;
use crate::step::{Asks, Trainer};
use crate::train::{SavePoint, Watcher};
use crate::worker::Worker;

/// What a generation's end is decided by.
pub struct GenerationFacts {
    /// Its number.
    pub generation: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Step after which all workers save and leave; all members were told the same.
    pub until_step: Option<u64>,
    /// Set when it is over.
    pub interrupt: Arc<AtomicBool>,
}

/// The generation has ended while no collective operation could notice.
#[derive(Debug, thiserror::Error)]
#[error("the generation is over")]
pub struct GenerationOver;

/// Answers the loop's questions from the coordinator's messages and the recipe; every worker saves its share, only the leader reports.
pub struct RunWatcher<'a> {
    worker: &'a Worker,
    facts: GenerationFacts,
    checkpointer: &'a mut Checkpointer,
    /// Every worker counts, since any of them may lead the next generation.
    unreported: &'a mut Unreported,
    is_leader: bool,
    companions: Vec<(String, Bytes)>,
    audit: Option<Audit>,
    last_save: Instant,
    save_asked: bool,
}

impl<'a> RunWatcher<'a> {
    /// The watcher of one generation.
    pub fn new(
        worker: &'a Worker,
        trainer: &Trainer,
        facts: GenerationFacts,
        checkpointer: &'a mut Checkpointer,
        unreported: &'a mut Unreported,
    ) -> Result<Self> {
        checkpointer.prepare(&trainer.share()?);
        let is_leader = is_leader(trainer.collective.as_ref());
        let companions = if is_leader { folder::companion_files(trainer.model.config(), &worker.tokenizer)? } else { Vec::new() };
        let audit = if worker.recipe.train.audit_samples { Some(Audit::open(&audit_path(worker), facts.generation)?) } else { None };
        Ok(Self { worker, facts, checkpointer, unreported, is_leader, companions, audit, last_save: Instant::now(), save_asked: false })
    }

    /// Completes the last checkpoint together with the other workers.
    pub fn finish(&mut self, collective: &mut dyn Collective) -> Result<()> {
        self.checkpointer.finish_together(collective, keep_alive_interval(self.worker))
    }

    /// Whether the time for a checkpoint between the regular points has come; the leader's clock decides for all.
    fn is_save_time(&self) -> bool {
        let every = self.worker.recipe.checkpoint.every_seconds.map(Duration::from_secs);
        self.is_leader && every.is_some_and(|every| self.last_save.elapsed() >= every)
    }

    /// Agrees with the other workers whether all of them can save now.
    fn can_all_save(&mut self, trainer: &mut Trainer, point: SavePoint) -> Result<bool> {
        if point.is_last {
            self.checkpointer.settle_together(trainer.collective.as_mut())?;
        }
        self.checkpointer.take_finished()?;
        let is_in_doubt = self.is_leader && self.checkpointer.may_be_saved(point.steps_done);
        let mut reasons = [f32::from(u8::from(self.checkpointer.is_writing())), f32::from(u8::from(is_in_doubt))];
        trainer.collective.all_reduce_sum(&mut reasons)?;
        if reasons[0] > 0.0 {
            // Waiting here would hold up all workers; the state is saved at the next point instead.
            if self.is_leader {
                tracing::warn!(step = point.steps_done, "checkpoint skipped: the one before is still being written");
            }
            return Ok(false);
        }
        if reasons[1] > 0.0 { self.is_missing(trainer, point) } else { Ok(true) }
    }

    /// Whether the store lacks the checkpoint of a step that may have been saved before; the leader asks it, and tells the others.
    fn is_missing(&mut self, trainer: &mut Trainer, point: SavePoint) -> Result<bool> {
        let (store, recipe_hash) = (Arc::clone(&self.worker.store), self.worker.recipe.hash());
        let ask = move || match store.is_saved(point.steps_done, &recipe_hash) {
            Ok(is_saved) => Ok(!is_saved),
            Err(error) if error.downcast_ref::<Failure>().is_some_and(|failure| failure.kind == FailureKind::Mismatch) => Err(error),
            Err(error) => {
                // A save would meet the same outage, which only the last one may not.
                tracing::warn!(step = point.steps_done, error = format!("{error:#}"), "checkpoint skipped: the store does not answer");
                if point.is_last { Err(error) } else { Ok(false) }
            }
        };
        let is_missing = leader_work(trainer.collective.as_mut(), keep_alive_interval(self.worker), ask)?;
        let mut told = [f32::from(u8::from(is_missing == Some(true)))];
        trainer.collective.all_reduce_sum(&mut told)?;
        Ok(told[0] > 0.0)
    }

    fn order(&self, trainer: &Trainer, point: SavePoint) -> Result<SaveOrder> {
        Ok(SaveOrder {
            state: CheckpointState {
                loss: point.loss.is_finite().then_some(point.loss),
                temporary: point.is_temporary,
                ..state_of(self.worker, trainer, point.steps_done)
            },
            generation: self.facts.generation,
            rank: trainer.collective.rank() as u32,
            parts: trainer.share()?,
            companions: self.companions.clone(),
            is_last: point.is_last,
        })
    }
}

impl Watcher for RunWatcher<'_> {
    fn batch_awaited(&mut self, steps_done: u64) -> Result<()> {
        // In a world of one no collective ends with the generation; without this, such a worker would go on.
        if self.facts.interrupt.load(Ordering::SeqCst) {
            return Err(GenerationOver.into());
        }
        self.worker.client.progress(self.facts.generation, steps_done, Phase::Waiting);
        Ok(())
    }

    fn is_far_enough(&self, steps_done: u64) -> bool {
        steps_done < self.facts.total_steps && self.facts.until_step.is_some_and(|until_step| steps_done >= until_step)
    }

    fn asks(&mut self, steps_done: u64) -> Asks {
        let client = &self.worker.client;
        client.progress(self.facts.generation, steps_done, Phase::Training);
        // One worker's wish is enough, and the leader hears of every order.
        let is_ordered = client.take_save_request().is_some();
        self.save_asked |= self.is_leader && (is_ordered || self.is_save_time());
        Asks {
            // The wishes of this step count at its end.
            stop: client.stop_requested().is_some() || self.facts.until_step.is_some_and(|until_step| steps_done + 1 >= until_step),
            regroup: client.regroup_requested(self.facts.generation).is_some(),
            save: self.save_asked && !self.checkpointer.is_writing(),
        }
    }

    fn before_update(&mut self) -> Result<()> {
        self.checkpointer.wait_for_copy();
        Ok(())
    }

    fn step_done(&mut self, batch: &StepBatch, report: &StepReport) -> Result<()> {
        if let Some(audit) = &mut self.audit {
            audit.write(batch)?;
        }
        self.worker.client.progress(self.facts.generation, report.step, Phase::Training);
        self.checkpointer.take_finished()?;
        let is_logged = report.step.is_multiple_of(self.worker.recipe.train.log_every_steps) || report.step == self.facts.total_steps;
        if !is_logged {
            self.unreported.add(report);
            return Ok(());
        }
        let before = std::mem::take(self.unreported);
        if self.is_leader {
            let report = StepReport { before, ..report.clone() };
            self.worker.client.send(&WorkerMessage::Step { generation: self.facts.generation, report })?;
        }
        Ok(())
    }

    fn must_save_to_regroup(&self) -> bool {
        must_save_to_regroup(&self.worker.recipe.train)
    }

    fn save_due(&self, steps_done: u64) -> bool {
        steps_done.is_multiple_of(self.worker.recipe.checkpoint.every_steps)
    }

    fn save(&mut self, trainer: &mut Trainer, point: SavePoint) -> Result<()> {
        self.worker.client.progress(self.facts.generation, point.steps_done, Phase::Saving);
        if self.can_all_save(trainer, point)? {
            self.checkpointer.start(self.order(trainer, point)?)?;
            self.last_save = Instant::now();
            self.save_asked = false;
        }
        Ok(())
    }
}

/// What a checkpoint says of the run at a step.
pub fn state_of(worker: &Worker, trainer: &Trainer, step: u64) -> CheckpointState {
    CheckpointState {
        step,
        recipe_hash: worker.recipe.hash(),
        data_fingerprint: worker.dataset.manifest().fingerprint(),
        world_size: trainer.collective.world_size() as u32,
        adam_step: step,
        loss: None,
        temporary: false,
        shard: shard_name(worker),
    }
}

fn shard_name(worker: &Worker) -> String {
    match worker.recipe.train.shard {
        Shard::None => "none",
        Shard::Optimizer => "optimizer",
        Shard::Gradients => "gradients",
        Shard::Parameters => "parameters",
    }
    .to_owned()
}

fn audit_path(worker: &Worker) -> PathBuf {
    worker.run.join("audit").join(format!("worker-{}.jsonl", worker.slot))
}
