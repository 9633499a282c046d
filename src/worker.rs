//! A worker's life: join -> build -> restore -> train -> leave; a new generation re-enters at build.

use std::any::Any;
use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use cloze_cluster::client::{Client, JoinOptions};
use cloze_cluster::protocol::{CoordinatorMessage, WorkerMessage};
use cloze_cluster::secret::Secret;
use cloze_data::dataset::Dataset;
use cloze_data::tokenizer::Tokenizer;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use tch::Device;

use crate::checkpoint::CheckpointStore;
use crate::collective::CollectiveError;
use crate::generation::{self, Assignment};
use crate::torch::memory;

/// A worker that hears nothing for this long between generations looks again; the client notices a lost coordinator by itself.
const IDLE_WAIT: Duration = Duration::from_secs(10);

/// How the launcher starts a worker.
#[derive(Debug)]
pub struct WorkerOptions {
    /// `host:port` of the coordinator.
    pub coordinator: String,
    /// Run folder; its recipe.yaml is the recipe.
    pub run: PathBuf,
    /// This worker's slot.
    pub worker: u32,
    /// Number of workers on this machine, which share its cores.
    pub local_workers: u32,
    /// The run's token.
    pub token: String,
    /// Folder of another `PyTorch`, for its CUDA half.
    pub torch_folder: Option<PathBuf>,
}

/// What stays the same over all generations.
pub struct Worker {
    /// The recipe of the run.
    pub recipe: Recipe,
    /// The prepared data.
    pub dataset: Arc<Dataset>,
    /// The recipe's tokenizer.
    pub tokenizer: Tokenizer,
    /// Id of the anchor token.
    pub anchor_id: u32,
    /// Checkpoints of the run.
    pub store: Arc<CheckpointStore>,
    /// The coordinator.
    pub client: Arc<Client>,
    /// Where peers connect to.
    pub listener: TcpListener,
    /// Device of the tensors.
    pub device: Device,
}

/// Runs a worker to its end. A failure that is not a broken collective is told to the coordinator, which ends the run.
pub fn run(options: &WorkerOptions) -> Result<()> {
    memory::keep_freed_memory();
    let recipe = cloze_recipes::load(&options.run.join("recipe.yaml"), &[])?;
    let listener = TcpListener::bind("127.0.0.1:0").context("listen for peers")?;
    let client = Arc::new(join(options, &recipe, &listener)?);
    let work = || prepare(options, recipe, listener, Arc::clone(&client)).and_then(|worker| serve(&worker));
    // tch panics where libtorch fails, for instance for want of memory: that too is a failure with a reason, not a worker that vanished.
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(panicked(panic.as_ref())));
    if let Err(error) = &result
        && let Err(lost) = client.fail(as_failure(error))
    {
        tracing::warn!(error = format!("{lost:#}"), "the coordinator could not be told of the failure");
    }
    result
}

fn panicked(panic: &(dyn Any + Send)) -> anyhow::Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let cause = text.unwrap_or("no message").lines().next().unwrap_or_default();
    Failure::new(FailureKind::Run, "a worker panicked").because(cause).hint("its log in the run folder holds the backtrace").into()
}

/// Folder or url of a run's checkpoints.
pub fn checkpoint_url(recipe: &Recipe, run: &Path) -> String {
    recipe.checkpoint.url.clone().unwrap_or_else(|| run.join("checkpoints").display().to_string())
}

/// The build that coordinator and workers must share.
pub fn build_name() -> String {
    format!("cloze {} (protocol {})", env!("CARGO_PKG_VERSION"), cloze_cluster::protocol::PROTOCOL_VERSION)
}

fn join(options: &WorkerOptions, recipe: &Recipe, listener: &TcpListener) -> Result<Client> {
    Client::join(JoinOptions {
        coordinator: options.coordinator.clone(),
        token: Secret::new(options.token.clone()),
        recipe_hash: recipe.hash(),
        build: build_name(),
        worker: options.worker,
        collective_address: listener.local_addr().context("read the listening address")?.to_string(),
        heartbeat_timeout: Duration::from_millis(recipe.cluster.heartbeat_timeout_ms),
    })
}

fn prepare(options: &WorkerOptions, recipe: Recipe, listener: TcpListener, client: Arc<Client>) -> Result<Worker> {
    let device = crate::device::open(recipe.train.device, options.worker as usize, options.torch_folder.as_deref())?;
    crate::device::set_threads(recipe.train.threads, options.local_workers);
    let dataset = Arc::new(Dataset::open(&recipe.data.output)?);
    let (tokenizer, anchor_id) = Tokenizer::load_with_anchor(&recipe.model.tokenizer, &recipe.model.anchor_token)?;
    dataset.check_tokenizer(&tokenizer)?;
    let url = checkpoint_url(&recipe, &options.run);
    let store = Arc::new(CheckpointStore::open(&url, &recipe.checkpoint.options, recipe.checkpoint.keep_last)?);
    Ok(Worker { recipe, dataset, tokenizer, anchor_id, store, client, listener, device })
}

/// Takes part in generations until the run is over.
fn serve(worker: &Worker) -> Result<()> {
    loop {
        match worker.client.next(IDLE_WAIT)? {
            Some(CoordinatorMessage::Start { generation, rank, world_size, peers, collective_key }) => {
                let interrupt = Arc::new(AtomicBool::new(false));
                let assignment = Assignment {
                    generation,
                    rank: rank as usize,
                    world_size: world_size as usize,
                    peers,
                    key: collective_key.expose().to_owned(),
                    interrupt: Arc::clone(&interrupt),
                };
                worker.client.on_abort(Box::new(move |aborted, _reason| {
                    if aborted >= generation {
                        interrupt.store(true, Ordering::SeqCst);
                    }
                }));
                match generation::run(worker, assignment) {
                    Ok(end) => return worker.client.finish(generation, end.steps_done, end.stopped),
                    Err(error) => break_or_fail(worker, generation, error)?,
                }
            }
            Some(CoordinatorMessage::Stop { .. }) => return Ok(()),
            Some(CoordinatorMessage::Refused { failure }) => return Err(failure.into()),
            Some(CoordinatorMessage::Welcome {} | CoordinatorMessage::Abort { .. }) | None => {}
        }
    }
}

/// A broken collective is told and survived; anything else ends the worker.
fn break_or_fail(worker: &Worker, generation: u64, error: anyhow::Error) -> Result<()> {
    let Some(broken) = error.downcast_ref::<CollectiveError>() else { return Err(error) };
    tracing::info!(generation, reason = %broken, "generation broken");
    worker.client.send(&WorkerMessage::Broken { generation, reason: broken.to_string() })
}

/// The failure inside an error, or one made of its causes.
pub fn as_failure(error: &anyhow::Error) -> Failure {
    match error.downcast_ref::<Failure>() {
        Some(failure) => failure.clone(),
        None => Failure::new(FailureKind::Run, format!("{error:#}")),
    }
}
