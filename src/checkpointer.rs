//! Between tensors and checkpoints: a snapshot is taken while the loop stands still, and written while it goes on.

use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use cloze_recipes::failure::{Failure, FailureKind};

use crate::checkpoint::{CheckpointState, CheckpointStore, Loaded, NamedTensorOwned, Saved};
use crate::model::modernbert::ModernBert;
use crate::optim::adamw::AdamW;

const FIRST_MOMENT: &str = "exp_avg.";
const SECOND_MOMENT: &str = "exp_avg_sq.";

/// State of a run on the host, ready to be written.
pub struct Snapshot {
    /// Where the run stands.
    pub state: CheckpointState,
    model: Vec<NamedTensorOwned>,
    optimizer: Vec<NamedTensorOwned>,
    companions: Vec<(String, Bytes)>,
}

/// Writes snapshots one at a time on a thread of its own; used by the leader only.
pub struct Checkpointer {
    store: Arc<CheckpointStore>,
    writing: Option<(u64, JoinHandle<Result<Saved>>)>,
}

impl Snapshot {
    /// Copies the state to the host. `companions` are the files that make the checkpoint a complete model folder.
    pub fn take(state: CheckpointState, model: &ModernBert, optimizer: &AdamW, companions: &[(String, Bytes)]) -> Result<Self> {
        let parameters = model.parameters();
        let moment = |prefix: &str, flat| -> Result<Vec<NamedTensorOwned>> {
            let mut tensors = parameters.named(flat)?;
            tensors.iter_mut().for_each(|tensor| tensor.name.insert_str(0, prefix));
            Ok(tensors)
        };
        let mut moments = moment(FIRST_MOMENT, &optimizer.first_moment)?;
        moments.extend(moment(SECOND_MOMENT, &optimizer.second_moment)?);
        Ok(Self { state, model: parameters.named(parameters.values())?, optimizer: moments, companions: companions.to_vec() })
    }
}

impl Checkpointer {
    /// A writer to a store.
    pub fn new(store: Arc<CheckpointStore>) -> Self {
        Self { store, writing: None }
    }

    /// Whether a write is in progress, or its result not yet taken.
    pub fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    /// Starts writing a snapshot; the result of the one before must have been taken.
    pub fn start(&mut self, snapshot: Snapshot) -> Result<()> {
        ensure!(!self.is_writing(), "a checkpoint is still being written");
        let store = Arc::clone(&self.store);
        let step = snapshot.state.step;
        let write = move || store.save(&snapshot.state, &snapshot.model, &snapshot.optimizer, &snapshot.companions);
        let thread =
            std::thread::Builder::new().name("checkpoint-writer".to_owned()).spawn(write).context("start the checkpoint writer")?;
        self.writing = Some((step, thread));
        Ok(())
    }

    /// The result of a write that is over, without waiting for one that is not.
    pub fn poll(&mut self) -> Result<Option<(u64, Saved)>> {
        if self.writing.as_ref().is_some_and(|(_, thread)| thread.is_finished()) { self.finish() } else { Ok(None) }
    }

    /// Waits for the write in progress; `None` where there is none.
    pub fn finish(&mut self) -> Result<Option<(u64, Saved)>> {
        let Some((step, thread)) = self.writing.take() else { return Ok(None) };
        let saved = thread.join().map_err(|_| anyhow!("the checkpoint writer panicked"))?;
        Ok(Some((step, saved.with_context(|| format!("save the checkpoint of step {step}"))?)))
    }
}

impl Drop for Checkpointer {
    /// A write outlives no generation: the next one must not find a half of it, or write beside it.
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::warn!(error = format!("{error:#}"), "the checkpoint of a broken generation could not be saved");
        }
    }
}

/// Copies a loaded checkpoint into model and optimizer.
///
/// # Errors
/// [`FailureKind::Mismatch`] for a checkpoint of another recipe or other data, [`FailureKind::Damaged`] for tensors that do not fit.
pub fn restore(loaded: &Loaded, expected: &CheckpointState, model: &mut ModernBert, optimizer: &AdamW) -> Result<()> {
    check_same("recipe", &expected.recipe_hash, &loaded.state.recipe_hash, &loaded.url)?;
    check_same("number of optimizer steps", &loaded.state.step.to_string(), &loaded.state.adam_step.to_string(), &loaded.url)?;
    check_same("prepared data", &expected.data_fingerprint, &loaded.state.data_fingerprint, &loaded.url)?;
    model.parameters_mut().load(&loaded.model, &loaded.url)?;
    for (prefix, flat) in [(FIRST_MOMENT, &optimizer.first_moment), (SECOND_MOMENT, &optimizer.second_moment)] {
        let tensors: Vec<NamedTensorOwned> = loaded
            .optimizer
            .iter()
            .filter_map(|tensor| {
                let name = tensor.name.strip_prefix(prefix)?.to_owned();
                Some(NamedTensorOwned { name, shape: tensor.shape.clone(), data: tensor.data.clone() })
            })
            .collect();
        model.parameters().load_into(flat, &tensors, &loaded.url)?;
    }
    Ok(())
}

fn check_same(what: &str, expected: &str, found: &str, place: &str) -> Result<(), Failure> {
    if expected == found {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Mismatch, format!("the checkpoint belongs to another {what}"))
        .at(place)
        .expected(expected)
        .found(found)
        .hint("give this run a `checkpoint.url` of its own, or move the old checkpoints away"))
}
