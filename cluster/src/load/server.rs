//! The coordinator's side of a load test: a real coordinator that ends when its input does.

use std::io::{BufRead, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tracing::Instrument as _;

use super::worker::{BUILD, RECIPE_HASH};
use crate::coordinator::{Control, Coordinator, CoordinatorOptions, RunEnd};
use crate::journal::Past;
use crate::membership::HangLimits;
use crate::secret::Secret;
use crate::tls::RunKey;

/// Threads of the runtime, as many as the launcher's.
const RUNTIME_THREADS: usize = 2;

/// A worker that is silent for longer is lost. Longer than a recipe's default: a machine that also pretends to be thousands of workers
/// may be late itself, and lateness is what is measured.
const HEARTBEAT_TIMEOUT_S: u64 = 15;

/// Longest time for all workers to join.
const JOIN_TIMEOUT_S: u64 = 180;

/// Limit of every phase; longer than any measurement, as the pretended workers are never stuck.
const HANG_S: u64 = 3600;

/// Events that wait to be thrown away.
const EVENT_MESSAGES: usize = 1024;

/// What ends the coordinator; told to nobody but the workers that are still there.
const OVER: &str = "the load test is over";

/// What the coordinator's process is told. It arrives through the standard input, as arguments show in a list of processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Secrets {
    /// The run's token.
    pub token: Secret,
    /// The coordinator's private key; `None` speaks in clear.
    pub key: Option<RunKey>,
}

impl Secrets {
    /// Draws them for a run with or without TLS.
    pub(super) fn random(tls: bool) -> anyhow::Result<Self> {
        let key = if tls { Some(RunKey::random()?) } else { None };
        Ok(Self { token: Secret::random()?, key })
    }

    /// Writes them as one line, which [`serve`] reads.
    pub(super) fn write(&self, output: &mut dyn Write) -> anyhow::Result<()> {
        let line = serde_json::to_string(self).context("encode the secrets")?;
        writeln!(output, "{line}").context("write the secrets")
    }

    fn read(input: &mut dyn BufRead) -> anyhow::Result<Self> {
        let mut line = String::new();
        input.read_line(&mut line).context("read the secrets")?;
        serde_json::from_str(&line).context("understand the secrets")
    }
}

/// Runs a coordinator for so many workers: reads its secrets as the first line of `input`, writes its address as the only line of
/// `output`, and ends when `input` does. Blocks.
///
/// Fails as a coordinator does when it cannot listen, and with the run's failure when the run fails before that.
pub fn serve(workers: u32, mut input: impl BufRead + Send + 'static, output: &mut dyn Write) -> anyhow::Result<()> {
    let options = options(workers, Secrets::read(&mut input)?);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(RUNTIME_THREADS).thread_name("coordinator").enable_all().build();
    let end = runtime.context("start the coordinator's runtime")?.block_on(async {
        let coordinator = Coordinator::bind(options).await?;
        writeln!(output, "{}", coordinator.address()).and_then(|()| output.flush()).context("say the coordinator's address")?;
        let (sender, mut events) = mpsc::channel(EVENT_MESSAGES);
        let (control, orders) = mpsc::channel(1);
        end_with_input(input, control)?;
        let run = tokio::spawn(coordinator.run(sender, orders).instrument(tracing::info_span!("coordinator")));
        while events.recv().await.is_some() {}
        run.await.context("run the coordinator")?
    })?;
    match end {
        RunEnd::Failed(failure) if failure.what != OVER => Err(failure.into()),
        _ => Ok(()),
    }
}

/// Gives up the run when the input ends. The thread ends with the input, or with the process.
fn end_with_input(mut input: impl BufRead + Send + 'static, control: mpsc::Sender<Control>) -> anyhow::Result<()> {
    let wait = move || {
        // An input that fails has ended as well.
        if let Err(error) = std::io::copy(&mut input, &mut std::io::sink()) {
            tracing::debug!(%error, "the input of the load test failed");
        }
        // A coordinator that has already ended needs no order.
        let _ = control.blocking_send(Control::GiveUp { failure: Failure::new(FailureKind::Run, OVER) });
    };
    std::thread::Builder::new().name("load input".to_owned()).spawn(wait).context("start a thread")?;
    Ok(())
}

fn options(workers: u32, secrets: Secrets) -> CoordinatorOptions {
    let Secrets { token, key } = secrets;
    let hang = Duration::from_secs(HANG_S);
    CoordinatorOptions {
        bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        token,
        key,
        recipe_hash: RECIPE_HASH.to_owned(),
        build: BUILD.to_owned(),
        workers,
        heartbeat_timeout: Duration::from_secs(HEARTBEAT_TIMEOUT_S),
        join_timeout: Duration::from_secs(JOIN_TIMEOUT_S),
        min_workers: None,
        replacement_wait: Duration::ZERO,
        hang: HangLimits { init: hang, data: hang, step: hang, checkpoint: hang },
        exclude_host_after: 0,
        retries_per_step: 0,
        state_is_replicated: true,
        journal: None,
        past: Past::Over { generation: 0, saved_step: 0 },
        told: None,
        until_step: None,
    }
}
