//! A worker's life: join -> build -> restore -> train -> leave; a new generation re-enters at build, with the state that it has.

use std::any::Any;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs as _, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use cloze_cluster::client::{Client, JoinOptions};
use cloze_cluster::protocol::{CoordinatorMessage, FailureClass, Unreported, WorkerMessage};
use cloze_cluster::secret::Secret;
use cloze_cluster::tls::PinnedKey;
use cloze_data::dataset::Dataset;
use cloze_data::tokenizer::Tokenizer;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use tch::Device;

use crate::checkpoint::{CheckpointStore, StorePolicy};
use crate::checkpointer::Checkpointer;
use crate::collective::CollectiveError;
use crate::collective::api::CollectiveCause;
use crate::drill::{Drill, Drills};
use crate::generation::{self, Assignment, Belongings};
use crate::restore::Held;
use crate::torch::{cuda, memory};
use crate::train::{EndReason, NotFinite};
use crate::watcher::GenerationOver;

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
    /// Cores that the workers of this run share on this machine; `None` is all.
    pub cores: Option<u32>,
    /// The run's token.
    pub token: Secret,
    /// The key that the coordinator proves to hold; `None` speaks in clear, which a recipe with `cluster.tls` forbids.
    pub coordinator_key: Option<PinnedKey>,
    /// Folder of another `PyTorch`, for its CUDA half.
    pub torch_folder: Option<PathBuf>,
    /// Failures to be practised.
    pub drills: Vec<Drill>,
}

/// What stays the same over all generations.
pub struct Worker {
    /// The recipe of the run.
    pub recipe: Recipe,
    /// The run folder.
    pub run: PathBuf,
    /// This worker's slot.
    pub slot: u32,
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

/// Runs a worker to its end. A failure that is not a broken collective is told to the coordinator, which decides what becomes of the run.
pub fn run(options: WorkerOptions) -> Result<()> {
    memory::keep_freed_memory();
    let recipe = cloze_recipes::load(&options.run.join("recipe.yaml"), &[])?;
    let listener = TcpListener::bind((own_address(&options.coordinator)?, 0)).context("listen for peers")?;
    let client = Arc::new(join(&options, &recipe, &listener)?);
    // They outlive the work, so that a failure is told before a checkpoint in progress is waited for.
    let mut belongings = None;
    let work = || {
        let (worker, drills) = prepare(options, recipe, listener, Arc::clone(&client))?;
        let belongings = belongings.insert(belongings_of(&worker, drills));
        serve(&Arc::new(worker), belongings)
    };
    // tch panics where libtorch fails, for instance for want of memory: that too is a failure with a reason, not a worker that vanished.
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(panicked(panic.as_ref())));
    if let Err(error) = &result
        && let Err(lost) = client.fail(as_failure(error), class_of(error))
    {
        tracing::warn!(error = format!("{lost:#}"), "the coordinator could not be told of the failure");
    }
    result
}

fn panicked(panic: &(dyn Any + Send)) -> anyhow::Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let cause = text.unwrap_or("no message").lines().next().unwrap_or_default();
    let failure = Failure::new(FailureKind::Run, "a worker panicked").because(cause);
    failure.hint("its log in the run folder holds the backtrace").into()
}

/// Whether libtorch's words mean that memory, of the host or of a GPU, ran out.
pub fn is_want_of_memory(text: &str) -> bool {
    let words = ["can't allocate memory", "not enough memory", "out of memory", "CUDA_ERROR_OUT_OF_MEMORY", "_STATUS_ALLOC_FAILED"];
    words.iter().any(|words| text.contains(words))
}

/// Whether libtorch's words mean that a GPU or its driver failed, and not that it was asked for what it cannot do.
fn is_device_failure(text: &str) -> bool {
    const FAILED: [&str; 3] = ["CUDA error", "CUDNN_STATUS_", "CUBLAS_STATUS_"];
    const REFUSED: [&str; 6] = [
        "device-side assert",
        "no kernel image",
        "invalid argument",
        "_STATUS_NOT_SUPPORTED",
        "_STATUS_BAD_PARAM",
        "_STATUS_INVALID_VALUE",
    ];
    FAILED.iter().any(|words| text.contains(words)) && !REFUSED.iter().any(|words| text.contains(words))
}

/// What a worker's error means for the run. An environment that a device cannot be opened in is nobody's accident.
fn class_of(error: &anyhow::Error) -> FailureClass {
    let (text, is_environment) = match error.downcast_ref::<Failure>() {
        Some(failure) => (failure.to_string(), failure.kind == FailureKind::Environment),
        None => (format!("{error:#}"), false),
    };
    let collective = error.downcast_ref::<CollectiveError>().map(|broken| &broken.cause);
    match text.as_str() {
        text if is_want_of_memory(text) => FailureClass::OutOfMemory,
        _ if matches!(collective, Some(CollectiveCause::Device(_))) => FailureClass::Device,
        text if is_device_failure(text) && !is_environment => FailureClass::Device,
        _ => FailureClass::Other,
    }
}

/// The address of this host on the network that leads to the coordinator, which is where peers reach it too.
fn own_address(coordinator: &str) -> Result<IpAddr> {
    let unknown = |cause: &dyn std::fmt::Display| {
        Failure::new(FailureKind::Environment, "the coordinator's address is not usable")
            .at(coordinator)
            .because(cause)
            .hint("it is `host:port`, as `cloze train --listen` was told")
    };
    let target = coordinator.to_socket_addrs().map_err(|error| unknown(&error))?.next().ok_or_else(|| unknown(&"it names no host"))?;
    let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Connecting a datagram socket sends nothing; it only asks the kernel for the route.
    let route = UdpSocket::bind(SocketAddr::new(any, 0)).and_then(|socket| socket.connect(target).and_then(|()| socket.local_addr()));
    Ok(route.map_err(|error| unknown(&error))?.ip())
}

/// Folder or url of a run's checkpoints.
pub fn checkpoint_url(recipe: &Recipe, run: &Path) -> String {
    recipe.checkpoint.url.clone().unwrap_or_else(|| run.join("checkpoints").display().to_string())
}

/// How long checkpoints of a recipe are kept, and where a copy lies.
pub fn store_policy(recipe: &Recipe) -> StorePolicy {
    let checkpoint = &recipe.checkpoint;
    StorePolicy {
        keep_last: checkpoint.keep_last,
        keep_best: checkpoint.keep_best,
        keep_every_steps: checkpoint.keep_every_steps,
        cache: checkpoint.cache.clone(),
        upload_timeout: Duration::from_secs(checkpoint.upload_timeout_s),
    }
}

fn join(options: &WorkerOptions, recipe: &Recipe, listener: &TcpListener) -> Result<Client> {
    if recipe.cluster.tls && options.coordinator_key.is_none() {
        return Err(Failure::new(FailureKind::Mismatch, "this run speaks TLS, and the worker was given no key of the coordinator")
            .hint("workers are started by `cloze train` or `cloze join`, which give it to them in CLOZE_COORDINATOR_KEY")
            .into());
    }
    Client::join(JoinOptions {
        coordinator: options.coordinator.clone(),
        token: options.token.clone(),
        coordinator_key: options.coordinator_key,
        recipe_hash: recipe.full_hash(),
        build: cloze_cluster::protocol::build_name(),
        executable: executable()?,
        worker: options.worker,
        collective_address: listener.local_addr().context("read the listening address")?.to_string(),
        heartbeat_timeout: Duration::from_millis(recipe.cluster.heartbeat_timeout_ms),
        coordinator_grace: Duration::from_secs(recipe.cluster.coordinator_grace_s),
    })
}

/// What tells this program from others. Another process of the same file would fare no better.
fn executable() -> Result<String, Failure> {
    cloze_cluster::host::executable_id().map_err(|error| {
        Failure::new(FailureKind::Environment, "this cloze-worker cannot be told from others")
            .because(format!("{error:#}"))
            .hint("build it with `make build`, and copy it as it is; `strip` may be used")
    })
}

fn prepare(options: WorkerOptions, recipe: Recipe, listener: TcpListener, client: Arc<Client>) -> Result<(Worker, Drills)> {
    let WorkerOptions { run, worker: slot, local_workers, cores, torch_folder, drills, .. } = options;
    // The slots of one host follow each other, so that their remainders differ.
    let device_index = (slot % local_workers.max(1)) as usize;
    let device = crate::device::open(recipe.train.device, device_index, torch_folder.as_deref())?;
    if recipe.train.deterministic && device.is_cuda() {
        cuda::use_deterministic_algorithms()?;
    }
    crate::device::set_threads(recipe.train.threads, cores, local_workers);
    let dataset = Arc::new(Dataset::open(&recipe.data.output)?);
    let (tokenizer, anchor_id) = Tokenizer::load_with_anchor(&recipe.model.tokenizer, &recipe.model.anchor_token)?;
    dataset.check_tokenizer(&tokenizer)?;
    let url = checkpoint_url(&recipe, &run);
    let store = Arc::new(CheckpointStore::open(&url, &recipe.checkpoint.options, store_policy(&recipe))?);
    let worker = Worker { recipe, run, slot, dataset, tokenizer, anchor_id, store, client, listener, device };
    Ok((worker, Drills::new(drills)))
}

fn belongings_of(worker: &Worker, drills: Drills) -> Belongings {
    let upload_timeout = Duration::from_secs(worker.recipe.checkpoint.upload_timeout_s);
    let checkpointer = Checkpointer::new(Arc::clone(&worker.store), Arc::clone(&worker.client), upload_timeout);
    Belongings { held: Held::default(), checkpointer, drills, unreported: Unreported::default() }
}

/// Takes part in generations until the run is over.
fn serve(worker: &Arc<Worker>, belongings: &mut Belongings) -> Result<()> {
    worker.client.ready(0, None)?;
    let mut is_asked_to_stop = false;
    loop {
        match worker.client.next(IDLE_WAIT)? {
            Some(CoordinatorMessage::Start { generation, rank, members, peers, collective_key, source, until_step, saves_only }) => {
                let interrupt = Arc::new(AtomicBool::new(false));
                let (rank, key) = (rank as usize, collective_key.expose().to_owned());
                let interrupted = Arc::clone(&interrupt);
                let assignment =
                    Assignment { generation, rank, members, peers, key, source, until_step, saves_only, interrupt: interrupted };
                worker.client.on_abort(Box::new(move |aborted, _reason| {
                    if aborted >= generation {
                        interrupt.store(true, Ordering::SeqCst);
                    }
                }));
                match generation::run(worker, assignment, belongings) {
                    Ok(end) if end.reason == EndReason::Regrouped => {}
                    Ok(end) => return worker.client.finish(generation, end.steps_done, end.reason == EndReason::Stopped),
                    Err(error) => survive(worker, generation, error)?,
                }
                worker.client.ready_with(generation, belongings.held.steps_done(), belongings.held.share())?;
            }
            // A state in memory may be newer than the newest checkpoint. Its holder waits to be told to save it, or a second time to stop.
            Some(CoordinatorMessage::Stop { .. }) if belongings.held.steps_done().is_none() || is_asked_to_stop => return Ok(()),
            Some(CoordinatorMessage::Stop { .. }) => is_asked_to_stop = true,
            Some(CoordinatorMessage::Refused { failure }) => return Err(failure.into()),
            Some(_) | None => {}
        }
    }
}

/// A broken collective and a loss that is not finite are told and survived; anything else ends the worker.
fn survive(worker: &Worker, generation: u64, error: anyhow::Error) -> Result<()> {
    if let Some(broken) = error.downcast_ref::<CollectiveError>() {
        if let CollectiveCause::Unavailable(cause) = &broken.cause {
            // No other generation would find what this machine lacks.
            return Err(Failure::new(FailureKind::Environment, "the GPUs of the workers cannot be connected")
                .because(cause)
                .hint("NCCL comes with PyTorch's CUDA wheels; name their environment in CLOZE_TORCH, or set `train.device: cpu`")
                .into());
        }
        if matches!(broken.cause, CollectiveCause::Device(_)) {
            // The state on the device is lost with it, and a new process may find the device in order.
            return Err(error);
        }
        tracing::info!(generation, reason = %broken, "generation broken");
        return worker.client.send(&WorkerMessage::Broken { generation, reason: broken.to_string() });
    }
    if error.is::<GenerationOver>() {
        return Ok(());
    }
    if let Some(NotFinite { failure, step, is_culprit, .. }) = error.downcast_ref::<NotFinite>() {
        tracing::warn!(generation, step, is_culprit, "the loss is not finite");
        return worker.client.send(&WorkerMessage::Failed {
            failure: failure.clone(),
            class: FailureClass::NotFinite,
            generation,
            step: *step,
            culprit: *is_culprit,
        });
    }
    Err(error)
}

/// The failure inside an error, or one made of its causes.
pub fn as_failure(error: &anyhow::Error) -> Failure {
    match error.downcast_ref::<Failure>() {
        Some(failure) => failure.clone(),
        None => {
            let text = format!("{error:#}");
            // libtorch puts the stack of its own code behind the first line; that belongs into the log.
            tracing::error!(error = text, "the worker failed");
            Failure::new(FailureKind::Run, text.lines().next().unwrap_or_default())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::api::Operation;

    #[test]
    fn the_class_of_a_failure_follows_its_words() {
        let environment = Failure::new(FailureKind::Environment, "the GPU cannot be used").because("CUDA error: no device");
        let full = Failure::new(FailureKind::Run, "step 7 failed").because("CUDA error: out of memory");
        for (error, class) in [
            (anyhow::anyhow!("CUDA out of memory. Tried to allocate 2 GiB").context("step 7"), FailureClass::OutOfMemory),
            (full.into(), FailureClass::OutOfMemory),
            (anyhow::anyhow!("CUDA error: uncorrectable ECC error encountered").context("step 7"), FailureClass::Device),
            (anyhow::anyhow!("cuBLAS: CUBLAS_STATUS_EXECUTION_FAILED"), FailureClass::Device),
            (anyhow::anyhow!("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED"), FailureClass::OutOfMemory),
            (anyhow::anyhow!("CUDA error: device-side assert triggered"), FailureClass::Other),
            (environment.into(), FailureClass::Other),
            (anyhow::anyhow!("the shards are damaged"), FailureClass::Other),
        ] {
            assert_eq!(class_of(&error), class, "{error:#}");
        }
        let cause = CollectiveCause::Device("the CUDA driver failed to run an operation: CUDA_ERROR_ILLEGAL_ADDRESS".to_owned());
        let (operation, rank, generation, step) = (Operation::AllReduce, 1, 2, 3);
        let broken = CollectiveError { operation, rank, peer: None, generation, step, cause };
        assert_eq!(class_of(&broken.into()), FailureClass::Device);
    }
}
