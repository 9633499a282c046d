//! The loop: waits for a worker's word, an order of the launcher or the clock, and lets the roster decide.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tracing::Instrument as _;

use super::admission::Identity;
use super::connection::{Door, Input};
use super::reception::Reception;
use super::roster::Roster;
use crate::event::Event;
use crate::journal::{Journal, Past};
use crate::membership::{HangLimits, Limits};
use crate::protocol::Held;
use crate::secret::Secret;
use crate::tls::RunKey;

/// Words of workers that wait for the loop.
const INPUT_MESSAGES: usize = 4096;

/// Connections that the operating system keeps until they are accepted. A thousand machines may call at the same moment; where the
/// system allows fewer, later ones are tried again by the callers' systems.
const BACKLOG_CONNECTIONS: u32 = 4096;

/// The clock is looked at every twentieth of the heartbeat timeout, within these bounds in milliseconds.
const TICK_MS: (u64, u64) = (10, 250);

/// Time in which a closed connection can explain a broken collective; connections of a dead process close within milliseconds.
const BLAME_GRACE_MS: u64 = 300;

/// Generations in a row that may break without a lost worker and without a step.
const MAX_FRUITLESS_GENERATIONS: u32 = 3;

/// How long the members of a generation may take to come back to a new coordinator. They try five times a second.
const ADOPT_TIMEOUT_S: u64 = 10;

/// What a coordinator needs to know.
#[derive(Clone, Debug)]
pub struct CoordinatorOptions {
    /// Address to listen on; loopback and port 0 for workers of this machine.
    pub bind: SocketAddr,
    /// The run's token.
    pub token: Secret,
    /// Key with which connections are secured; others are refused then. `None` speaks in clear.
    pub key: Option<RunKey>,
    /// Hash of the run's recipe.
    pub recipe_hash: String,
    /// Build of the worker binary.
    pub build: String,
    /// Number of worker slots.
    pub workers: u32,
    /// A worker that has not been heard of for longer than this is lost.
    pub heartbeat_timeout: Duration,
    /// Longest time in which all slots must be filled, at the start and after a loss.
    pub join_timeout: Duration,
    /// Fewest workers with which the run goes on; `None` waits until all slots are filled.
    pub min_workers: Option<u32>,
    /// With `min_workers`, how long absent workers are waited for before the run goes on without them.
    pub replacement_wait: Duration,
    /// A worker that makes no progress for longer than this is stuck.
    pub hang: HangLimits,
    /// Failures of workers on one host after which the host is used no more; 0 never excludes one.
    pub exclude_host_after: u32,
    /// How often one step may be tried again after a loss that is not finite or a want of memory.
    pub retries_per_step: u32,
    /// Whether every worker holds the whole state.
    pub state_is_replicated: bool,
    /// Where to write down what a successor must know; `None` writes nothing.
    pub journal: Option<PathBuf>,
    /// What came before: a generation that may run is taken over.
    pub past: Past,
    /// The last step of which an earlier coordinator told, and its generation: reports up to it are not told again.
    pub told: Option<Held>,
    /// Step after which the workers of every generation that starts from now on save and leave; `None` goes on to the end.
    pub until_step: Option<u64>,
}

/// An order of the launcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Ask the workers to save and leave.
    Stop {
        /// Who asked.
        reason: String,
    },
    /// Ask the workers to save a checkpoint and go on.
    Save {
        /// Who asked.
        reason: String,
    },
    /// A worker process is gone.
    WorkerExited {
        /// Its slot.
        worker: u32,
        /// Its process id. The slot may have another process by now: orders and words of workers come in by two ways.
        process_id: u32,
        /// Exit code or signal, such as `SIGKILL` or `exit code 1`.
        status: String,
    },
    /// Nobody will start another process for a slot that is empty; where the run may go on with fewer, it need not wait for it.
    NoReplacement {
        /// The slot.
        worker: u32,
    },
    /// End the run with a failure.
    GiveUp {
        /// Why.
        failure: Failure,
    },
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// All steps are done and saved.
    Finished {
        /// Steps done.
        step: u64,
    },
    /// The run was asked to stop.
    Stopped {
        /// Steps done at the saved state.
        step: u64,
    },
    /// The run failed.
    Failed(Failure),
}

/// A coordinator that listens and has not started yet.
#[derive(Debug)]
pub struct Coordinator {
    options: CoordinatorOptions,
    journal: Option<Journal>,
    listener: TcpListener,
    address: SocketAddr,
    /// How connections are secured, where they are.
    security: Option<Arc<ServerConfig>>,
}

impl Coordinator {
    /// Starts to listen and opens the journal. Fails with kind `Environment` when the address is taken or not this machine's, with kind
    /// `Damaged` when its key is none, and as [`Journal::open`] does.
    pub async fn bind(options: CoordinatorOptions) -> anyhow::Result<Self> {
        let security = options.key.as_ref().map(RunKey::server_config).transpose()?;
        let listener = listen(options.bind).map_err(|error| {
            Failure::new(FailureKind::Environment, "the coordinator cannot listen")
                .at(options.bind)
                .because(error)
                .hint("choose another address, or port 0 for any free port")
        })?;
        let address = listener.local_addr().context("read the coordinator's address")?;
        let journal = match options.journal.clone() {
            Some(path) => {
                let open = spawn_blocking(move || Journal::open(&path, options.past));
                Some(open.await.context("open the journal")??)
            }
            None => None,
        };
        Ok(Self { options, journal, listener, address, security })
    }

    /// The address that workers connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Runs until the run ends. Fails when nobody reads the events any more, and with kind `Storage` when the journal cannot be written.
    /// Dropping the future is like a crash: connections close without a word, and workers wait for a successor.
    pub async fn run(self, events: mpsc::Sender<Event>, mut control: mpsc::Receiver<Control>) -> anyhow::Result<RunEnd> {
        let Self { options, journal, listener, security, .. } = self;
        let started = Instant::now();
        let (sender, mut inputs) = mpsc::channel(INPUT_MESSAGES);
        let reception = ReceptionTask::start(listener, door(&options, security, sender));
        let mut roster = Roster::new(options.workers, limits(&options), journal)?;
        if let Some(last) = options.told {
            roster.has_told(last);
        }
        let mut tick = clock(options.heartbeat_timeout / 20, TICK_MS);
        let mut pulse = clock(options.heartbeat_timeout / 2, (TICK_MS.0, u64::MAX));
        let mut last_pass = started.elapsed();
        let end = loop {
            let woken = tokio::select! {
                Some(order) = control.recv() => Woken::Order(order),
                Some(input) = inputs.recv() => Woken::Input(input),
                _ = pulse.tick() => Woken::Pulse,
                _ = tick.tick() => Woken::Tick,
            };
            // A process that was stopped itself, or whose reporters were slow, has heard nothing meanwhile: that is nobody's silence. It
            // is told before anything that was said meanwhile, such as that a worker hung up.
            let now = started.elapsed();
            roster.excuse_silence(now, now.saturating_sub(last_pass));
            last_pass = now;
            let is_time = matches!(woken, Woken::Tick);
            match woken {
                Woken::Order(order) => roster.control(order),
                Woken::Input(input) => apply(&mut roster, input, started),
                Woken::Pulse => roster.pulse(),
                Woken::Tick => {}
            }
            // What was said before now must be heard before silence is judged.
            for _ in 0..INPUT_MESSAGES {
                let Ok(input) = inputs.try_recv() else { break };
                apply(&mut roster, input, started);
            }
            // Most words are heartbeats, which change nothing that the clock does not bring up by itself. Silence is judged by the clock
            // of this pass: one that stands still in its middle is found out by the next.
            let end = if roster.take_change() || is_time { roster.settle(now)? } else { None };
            if let Some(end) = &end {
                roster.farewell(end)?;
            }
            for event in roster.take_events() {
                events.send(event).await.context("send an event to the reporters")?;
            }
            roster.release_departing();
            roster.note_progress(started.elapsed())?;
            if let Some(end) = end {
                break end;
            }
        };
        // Dropping the roster drops every outbox; the connections write what is queued and close.
        drop((roster, inputs));
        reception.close().await;
        Ok(end)
    }
}

/// What the loop has waited for.
enum Woken {
    Order(Control),
    Input(Input),
    Pulse,
    Tick,
}

/// The task that accepts connections; it ends with this value.
struct ReceptionTask {
    task: JoinSet<()>,
    quit: oneshot::Sender<()>,
}

impl ReceptionTask {
    fn start(listener: TcpListener, door: Door) -> Self {
        let (quit, quitting) = oneshot::channel();
        let mut task = JoinSet::new();
        let reception = Reception::new(listener, door);
        task.spawn(reception.run(quitting).instrument(tracing::info_span!("coordinator reception")));
        Self { task, quit }
    }

    /// Lets the connections write their last messages, then ends them.
    async fn close(self) {
        let Self { mut task, quit } = self;
        // Where the task is gone already, there is nothing left to end.
        let _ = quit.send(());
        while let Some(ended) = task.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "the task that accepts connections failed");
            }
        }
    }
}

fn door(options: &CoordinatorOptions, security: Option<Arc<ServerConfig>>, inputs: mpsc::Sender<Input>) -> Door {
    let identity = Identity { token: options.token.clone(), recipe_hash: options.recipe_hash.clone(), build: options.build.clone() };
    Door { identity, security: security.map(TlsAcceptor::from), inputs }
}

fn listen(bind: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if bind.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A successor takes the address while connections of its predecessor are still being forgotten.
    socket.set_reuseaddr(true)?;
    socket.bind(bind)?;
    socket.listen(BACKLOG_CONNECTIONS)
}

fn apply(roster: &mut Roster, input: Input, started: Instant) {
    match input {
        Input::Joined { connection, join, at, outbox } => roster.join(connection, join, at.duration_since(started), outbox),
        Input::Message { connection, worker, at, message } => roster.message(connection, worker, at.duration_since(started), message),
        Input::Exited(report) => roster.exited_elsewhere(report),
        Input::Closed { connection, worker, reason } => roster.closed(connection, worker, started.elapsed(), &reason),
    }
}

fn limits(options: &CoordinatorOptions) -> Limits {
    Limits {
        heartbeat_timeout: options.heartbeat_timeout,
        join_timeout: options.join_timeout,
        blame_grace: Duration::from_millis(BLAME_GRACE_MS),
        max_fruitless_generations: MAX_FRUITLESS_GENERATIONS,
        min_workers: options.min_workers,
        replacement_wait: options.replacement_wait,
        hang: options.hang.clone(),
        retries_per_step: options.retries_per_step,
        exclude_host_after: options.exclude_host_after,
        state_is_replicated: options.state_is_replicated,
        until_step: options.until_step,
        adopt_timeout: Duration::from_secs(ADOPT_TIMEOUT_S),
    }
}

/// Ticks with a period, which is kept within bounds in milliseconds.
fn clock(period: Duration, (shortest_ms, longest_ms): (u64, u64)) -> Interval {
    let mut tick = interval(period.clamp(Duration::from_millis(shortest_ms), Duration::from_millis(longest_ms)));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick
}

#[cfg(test)]
mod tests;
