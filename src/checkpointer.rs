//! Between tensors and checkpoints: a thread copies this worker's share of the state while the next step computes, and stores it
//! while the steps after that go on.
//!
//! The copy may last until parameters and moments are about to change; only if it is not done by then does the loop wait for it.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use cloze_cluster::client::{Client, SharesError};
use cloze_cluster::protocol::{Phase, SavedFile, WorkerMessage};
use cloze_recipes::failure::{Failure, FailureKind};
use tch::Device;

use crate::checkpoint::{CheckpointState, CheckpointStore, Copies, Loaded, Piece, Share};
use crate::collective::{Collective, leader_work};
use crate::step::{Group, SharePart};
use crate::torch::memory;

/// Checkpoints in a row that may fail before the run ends: an outage may pass, a place that takes nothing will not.
const FAILED_SAVES_MAX: u32 = 3;

/// How often workers that wait for each other's writers look at them.
const WRITER_POLL: Duration = Duration::from_millis(5);

/// Longest list of one worker's files, in bytes; each file takes about 150.
const LIST_BYTES_MAX: u64 = 1 << 20;

/// What is written, and on whose behalf.
pub struct SaveOrder {
    /// Where the run stands.
    pub state: CheckpointState,
    /// Generation that saves.
    pub generation: u64,
    /// This worker's rank.
    pub rank: u32,
    /// This worker's share of the state.
    pub parts: Vec<SharePart>,
    /// The files that make a checkpoint a complete model folder; the leader's part.
    pub companions: Vec<(String, Bytes)>,
    /// The workers leave after it: they complete it together, with [`Checkpointer::finish_together`].
    pub is_last: bool,
}

/// A share of a last checkpoint that is stored and not yet part of a manifest.
struct LastShare {
    state: CheckpointState,
    generation: u64,
    files: Vec<SavedFile>,
    started: Instant,
}

/// Writes one checkpoint at a time; outlives generations, so that a slow store holds up no recovery.
pub struct Checkpointer {
    store: Arc<CheckpointStore>,
    client: Arc<Client>,
    copies: Copies,
    upload_timeout: Duration,
    writing: Option<Writing>,
    failed_in_a_row: u32,
    newest_known_step: u64,
}

/// A save in progress.
struct Writing {
    step: u64,
    generation: u64,
    /// Closed when the copy is complete.
    copied: Option<Receiver<()>>,
    /// Tells the writer how long the loop stood still.
    blocked: Option<Sender<f64>>,
    blocked_s: f64,
    thread: JoinHandle<Result<Option<LastShare>>>,
}

impl Checkpointer {
    /// A writer to a store, which tells the coordinator what it wrote.
    pub fn new(store: Arc<CheckpointStore>, client: Arc<Client>, upload_timeout: Duration) -> Self {
        Self { store, client, copies: Copies::default(), upload_timeout, writing: None, failed_in_a_row: 0, newest_known_step: 0 }
    }

    /// Whether a write is in progress, or its result not yet taken.
    pub fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    /// Takes the result of a write that is over.
    ///
    /// # Errors
    /// The failure of a write, when there were too many in a row.
    pub fn take_finished(&mut self) -> Result<()> {
        if self.writing.as_ref().is_some_and(|writing| writing.thread.is_finished()) { self.take_result() } else { Ok(()) }
    }

    /// The store may hold checkpoints up to this step, from before this process.
    pub fn set_newest_known_step(&mut self, step: u64) {
        self.newest_known_step = self.newest_known_step.max(step);
    }

    /// Whether the store may already hold this checkpoint, because the step was done before.
    pub fn may_be_saved(&self, step: u64) -> bool {
        step <= self.newest_known_step
    }

    /// Takes memory for copies of this share in the background: the first copy would otherwise last longer than the later ones.
    pub fn prepare(&self, parts: &[SharePart]) {
        let sizes: Vec<usize> = parts.iter().map(|part| part.tensor.numel() * size_of::<f32>()).collect();
        if let Err(error) = self.copies.prepare(&sizes) {
            tracing::warn!(%error, "memory for copies cannot be prepared; the first checkpoint takes it itself");
        }
    }

    /// Starts a save; the one before must be over.
    pub fn start(&mut self, order: SaveOrder) -> Result<()> {
        ensure!(self.writing.is_none(), "a checkpoint is still being written");
        let started = Instant::now();
        let (copy_done, copied) = channel();
        let (blocked, blocked_told) = channel();
        let (step, generation) = (order.state.step, order.generation);
        let writer = Writer {
            store: Arc::clone(&self.store),
            client: Arc::clone(&self.client),
            copies: self.copies.clone(),
            started,
            deadline: started + self.upload_timeout,
            blocked: blocked_told,
        };
        // Tensors on a GPU are copied here: behind the work that is queued, and before any that changes them.
        let on_host = order.parts.iter().all(|part| part.tensor.device() == Device::Cpu);
        let order = if on_host { order } else { to_host(order)? };
        let write = move || writer.write(order, copy_done);
        let thread =
            std::thread::Builder::new().name("checkpoint-writer".to_owned()).spawn(write).context("start the checkpoint writer")?;
        let blocked_s = started.elapsed().as_secs_f64();
        self.writing = Some(Writing { step, generation, copied: Some(copied), blocked: Some(blocked), blocked_s, thread });
        Ok(())
    }

    /// Returns when the state may change: when the copy of a save in progress is complete.
    pub fn wait_for_copy(&mut self) {
        let Some(writing) = &mut self.writing else { return };
        let Some(copied) = writing.copied.take() else { return };
        let started = Instant::now();
        // The writer sends nothing; the channel closes with the copy, or with the writer.
        let _closed = copied.recv();
        writing.blocked_s += started.elapsed().as_secs_f64();
        if let Some(blocked) = writing.blocked.take() {
            // A writer that has failed needs no time.
            let _ = blocked.send(writing.blocked_s);
        }
    }

    /// Waits until no worker writes any more. A failure of such a write does not matter: another one follows at once.
    pub fn settle_together(&mut self, collective: &mut dyn Collective) -> Result<()> {
        self.wait_for_copy();
        self.failed_in_a_row = 0;
        self.wait_together(collective)?;
        self.take_result()
    }

    /// Completes the last checkpoint, if one was started: waits for all shares, brings their lists to the leader, and lets it commit. It may
    /// not fail. The coordinator is not needed for it, so that workers that have lost it can save and leave.
    pub fn finish_together(&mut self, collective: &mut dyn Collective, interval: Duration) -> Result<()> {
        self.wait_for_copy();
        self.wait_together(collective)?;
        let share = match self.writing.take() {
            Some(Writing { thread, .. }) => thread.join().map_err(|_| anyhow!("the checkpoint writer panicked"))?,
            None => Ok(None),
        };
        let mut failed = [f32::from(u8::from(share.is_err()))];
        collective.all_reduce_sum(&mut failed)?;
        let share = share.context("save the last checkpoint")?;
        if failed[0] > 0.0 {
            // The worker that failed says why and leaves; this operation ends when it does.
            collective.barrier()?;
        }
        let Some(LastShare { state, generation, files, started }) = share else { return Ok(()) };
        let files = gather_lists(collective, &files)?;
        let (step, store) = (state.step, Arc::clone(&self.store));
        let saved = leader_work(collective, interval, move || store.commit(&state, files))?;
        let Some(saved) = saved else { return Ok(()) };
        let seconds = started.elapsed().as_secs_f64();
        let message = WorkerMessage::CheckpointSaved { generation, step, url: saved.url, bytes: saved.bytes, seconds, blocked_s: seconds };
        self.client.send(&message)
    }

    /// Returns when the writers of all workers have ended. The operations in between show every worker that the others live.
    fn wait_together(&self, collective: &mut dyn Collective) -> Result<()> {
        loop {
            let is_writing = self.writing.as_ref().is_some_and(|writing| !writing.thread.is_finished());
            if let Some(Writing { generation, step, .. }) = &self.writing {
                self.client.progress(*generation, *step, Phase::Saving);
            }
            let mut num_writing = [f32::from(u8::from(is_writing))];
            collective.all_reduce_sum(&mut num_writing)?;
            if num_writing[0] == 0.0 {
                return Ok(());
            }
            std::thread::sleep(WRITER_POLL);
        }
    }

    fn take_result(&mut self) -> Result<()> {
        let Some(writing) = self.writing.take() else { return Ok(()) };
        let Writing { step, generation, thread, .. } = writing;
        let result = thread.join().map_err(|_| anyhow!("the checkpoint writer panicked"))?;
        let Err(error) = result else {
            self.failed_in_a_row = 0;
            return Ok(());
        };
        // A generation that ends in the middle of a save says nothing about the store.
        let is_over = matches!(error.downcast_ref::<SharesError>(), Some(SharesError::Over(_)));
        self.failed_in_a_row += u32::from(!is_over);
        tracing::warn!(step, error = format!("{error:#}"), "checkpoint given up");
        if self.failed_in_a_row >= FAILED_SAVES_MAX || is_conflict(&error) {
            return Err(error.context(format!("save the checkpoint of step {step}")));
        }
        let reason =
            error.downcast_ref::<Failure>().map_or_else(|| format!("{error:#}"), |failure| failure.to_string().replace("\n  ", ", "));
        self.client.send(&WorkerMessage::CheckpointFailed { generation, step, reason })
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        self.copies.trim();
        self.wait_for_copy();
        if let Err(error) = self.take_result() {
            tracing::warn!(error = format!("{error:#}"), "the last checkpoint of a worker could not be saved");
        }
    }
}

/// Another run writes to the same place: that does not pass.
fn is_conflict(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Failure>().is_some_and(|failure| failure.kind == FailureKind::Mismatch)
}

/// What the writing thread needs.
struct Writer {
    store: Arc<CheckpointStore>,
    client: Arc<Client>,
    copies: Copies,
    started: Instant,
    deadline: Instant,
    blocked: Receiver<f64>,
}

impl Writer {
    fn write(self, order: SaveOrder, copy_done: Sender<()>) -> Result<Option<LastShare>> {
        let SaveOrder { state, generation, rank, parts, companions, is_last } = order;
        let step = state.step;
        let share = copy(&self.copies, parts, (rank, state.world_size), companions);
        drop(copy_done);
        let mut files = match share.and_then(|share| self.store.save_share(step, &share)) {
            Ok(files) => files,
            Err(error) => {
                // An empty list tells the leader that there is nothing to wait for.
                if rank > 0 && !is_last {
                    self.client.send(&WorkerMessage::ShareSaved { generation, step, files: Vec::new() })?;
                }
                return Err(error);
            }
        };
        if is_last {
            return Ok(Some(LastShare { state, generation, files, started: self.started }));
        }
        if rank > 0 {
            self.client.send(&WorkerMessage::ShareSaved { generation, step, files })?;
            return Ok(None);
        }
        files.extend(self.other_files(generation, &state)?);
        let saved = self.store.commit(&state, files)?;
        let message = WorkerMessage::CheckpointSaved {
            generation,
            step,
            url: saved.url,
            bytes: saved.bytes,
            seconds: self.started.elapsed().as_secs_f64(),
            blocked_s: self.blocked.recv().unwrap_or_default(),
        };
        self.client.send(&message)?;
        Ok(None)
    }

    fn other_files(&self, generation: u64, state: &CheckpointState) -> Result<Vec<SavedFile>> {
        if state.world_size == 1 {
            return Ok(Vec::new());
        }
        Ok(self.client.wait_shares(generation, state.step, state.world_size, self.deadline)?)
    }
}

/// Brings the lists of all ranks to all of them.
fn gather_lists(collective: &mut dyn Collective, own: &[SavedFile]) -> Result<Vec<SavedFile>> {
    let mut all = Vec::new();
    for rank in 0..collective.world_size() {
        let is_own = rank == collective.rank();
        let mut bytes = if is_own { serde_json::to_vec(own).context("serialise the list of a share")? } else { Vec::new() };
        let mut length = (bytes.len() as u64).to_le_bytes();
        collective.broadcast(&mut length, rank)?;
        let length = u64::from_le_bytes(length);
        ensure!(length <= LIST_BYTES_MAX, "rank {rank} announces a list of {length} bytes, more than {LIST_BYTES_MAX}");
        bytes.resize(length as usize, 0);
        collective.broadcast(&mut bytes, rank)?;
        let files: Vec<SavedFile> = serde_json::from_slice(&bytes).with_context(|| format!("read the list of rank {rank}"))?;
        all.extend(files);
    }
    Ok(all)
}

/// Copies the share out of the live tensors.
fn copy(copies: &Copies, parts: Vec<SharePart>, (rank, world_size): (u32, u32), companions: Vec<(String, Bytes)>) -> Result<Share> {
    let (mut model, mut optimizer) = (Vec::new(), Vec::new());
    for part in parts {
        let data = memory::with_bytes(&part.tensor, |bytes| copies.copy(bytes))?;
        let piece = Piece { name: part.name, full_shape: part.full_shape, start: part.start, data };
        match part.group {
            Group::Model => model.push(piece),
            Group::Optimizer => optimizer.push(piece),
        }
    }
    copies.trim();
    Ok(Share { rank, world_size, model, optimizer, companions })
}

fn to_host(mut order: SaveOrder) -> Result<SaveOrder> {
    for part in &mut order.parts {
        part.tensor = part.tensor.f_to_device(Device::Cpu)?;
    }
    Ok(order)
}

/// Refuses a checkpoint of another recipe or of other data.
///
/// # Errors
/// [`FailureKind::Mismatch`] with both values.
pub fn check_belongs(loaded: &Loaded, expected: &CheckpointState) -> Result<()> {
    check_same("recipe", &expected.recipe_hash, &loaded.state.recipe_hash, &loaded.url)?;
    check_same("number of optimizer steps", &loaded.state.step.to_string(), &loaded.state.adam_step.to_string(), &loaded.url)?;
    check_same("prepared data", &expected.data_fingerprint, &loaded.state.data_fingerprint, &loaded.url)?;
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
