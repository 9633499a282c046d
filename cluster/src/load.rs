//! The coordinator under load: one real coordinator in a process of its own, and thousands of workers that this process pretends to be.
//!
//! A pretended worker has a real connection, in clear or by TLS, and says what a real one says: it joins, is ready, and sends a heartbeat
//! a second; the leader reports steps. With every heartbeat goes a question that the coordinator's loop itself answers, so the time to the
//! answer is the time that a heartbeat waits until it counts.
//!
//! | task               | name (tracing span) | on error                  | on stop                         |
//! |--------------------|---------------------|---------------------------|---------------------------------|
//! | a pretended worker | `pretended worker`  | the measurement fails     | closes its connection and ends  |
//! | the coordinator    | its own process     | its connections close     | ends when its input closes      |

mod child;
mod process;
mod server;
mod worker;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use cloze_recipes::failure::{Failure, FailureKind};
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tracing::Instrument as _;

use self::child::{CoordinatorProcess, Target};
pub use self::process::{Placement, prepared_command};
use self::server::Secrets;
pub use self::server::serve;
use self::worker::{Answers, Crowd, Progress, Stage, pretend};

/// Most workers of a load test; their descriptors and loopback addresses are planned for this many.
pub const MAX_WORKERS: u32 = 50_000;

/// Connections that are being made or have not been welcomed yet; more would only wait in the coordinator's backlog.
const CONNECTS_IN_FLIGHT: usize = 512;

/// Longest time until every worker has joined and was told to start.
const GATHER_TIMEOUT_S: u64 = 180;

/// Longest time until the workers have closed their connections after the measurement.
const LEAVE_TIMEOUT_S: u64 = 30;

/// Words of workers that wait for the measuring loop.
const PROGRESS_MESSAGES: usize = 1024;

/// Threads that pretend to be workers.
const RUNTIME_THREADS: usize = 2;

/// What is measured.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Number of workers.
    pub workers: u32,
    /// Whether they speak TLS with the coordinator.
    pub tls: bool,
    /// How long heartbeats are measured once all have started.
    pub measured: Duration,
    /// Program that calls [`serve`] with the standard streams when it is started with `arguments`.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Core to which the coordinator's process is bound, if to one.
    pub coordinator_cpu: Option<usize>,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoadReport {
    /// Number of workers.
    pub workers: u32,
    /// Whether they spoke TLS with the coordinator.
    pub tls: bool,
    /// Core to which the coordinator was bound; null where it could run on any.
    pub coordinator_cpu: Option<usize>,
    /// Seconds from the first connection until every worker was welcome.
    pub joined_s: f64,
    /// Seconds from the first connection until every worker was told to start.
    pub started_s: f64,
    /// Seconds in which heartbeats were measured.
    pub measured_s: f64,
    /// Questions answered in that time, one with each heartbeat.
    pub answers: usize,
    /// Heartbeats that went without a question because the one before was not answered yet.
    pub late: u64,
    /// Median milliseconds from a heartbeat to the answer of the loop.
    pub latency_p50_ms: f64,
    /// 99th percentile of it.
    pub latency_p99_ms: f64,
    /// The longest.
    pub latency_max_ms: f64,
    /// Bytes of memory that the coordinator's process had before the first worker.
    pub resident_before_bytes: u64,
    /// Bytes of memory that it had at the end of the measurement.
    pub resident_after_bytes: u64,
    /// The difference for each worker, in bytes.
    pub resident_bytes_per_worker: f64,
    /// Processor seconds of the coordinator until every worker was told to start.
    pub processor_start_s: f64,
    /// Processor seconds that it used for each second of the measurement; 1 is one whole core.
    pub processor_share: f64,
}

/// Starts a coordinator, lets workers join it and measures. Blocks.
///
/// Fails with kind `Environment` when the process cannot be started or has too few file descriptors, and with kind `Run` when a
/// worker is refused, lost or not told to start in time.
pub fn measure(options: &LoadOptions) -> anyhow::Result<LoadReport> {
    if options.workers == 0 || options.workers > MAX_WORKERS {
        let failure = Failure::new(FailureKind::Recipe, "the number of workers is out of range");
        return Err(failure.expected(format!("1 to {MAX_WORKERS}")).found(options.workers).into());
    }
    process::check_descriptors(options.workers)?;
    let coordinator = CoordinatorProcess::start(options, Secrets::random(options.tls)?)?;
    drive(coordinator.target(), options)
}

/// Lets workers join a coordinator and measures it.
fn drive(target: &Target, options: &LoadOptions) -> anyhow::Result<LoadReport> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(RUNTIME_THREADS).thread_name("load").enable_all().build();
    runtime.context("start the runtime of the load")?.block_on(drive_async(target, options))
}

async fn drive_async(target: &Target, options: &LoadOptions) -> anyhow::Result<LoadReport> {
    let resident_before_bytes = process::resident_bytes(target.process_id)?;
    let (progress, mut heard) = mpsc::channel(PROGRESS_MESSAGES);
    let (stage, watched) = watch::channel(Stage::Gathering);
    let crowd = Arc::new(Crowd {
        address: target.address,
        token: target.secrets.token.clone(),
        security: security(target)?,
        num_workers: options.workers,
        connecting: Semaphore::new(CONNECTS_IN_FLIGHT),
        progress,
        stage: watched,
        answers: Answers::default(),
    });
    let mut tasks = JoinSet::new();
    let began = Instant::now();
    for worker in 0..options.workers {
        tasks.spawn(pretend(worker, Arc::clone(&crowd)).instrument(tracing::info_span!("pretended worker", worker)));
    }
    let gathered = timeout(Duration::from_secs(GATHER_TIMEOUT_S), gather(&mut heard, options.workers, began)).await;
    let Ok(gathered) = gathered else { return Err(too_slow(options.workers).into()) };
    let (joined, started) = gathered?;

    let processor_start_s = process::processor_seconds(target.process_id)?;
    stage.send_replace(Stage::Measuring);
    let measuring = Instant::now();
    tokio::select! {
        () = sleep(options.measured) => {}
        lost = failed(&mut heard) => return Err(lost),
    }
    let measured_s = measuring.elapsed().as_secs_f64();
    let processor_s = process::processor_seconds(target.process_id)? - processor_start_s;
    let resident_after_bytes = process::resident_bytes(target.process_id)?;
    // Those who see others leave before they are told themselves have failed, which nobody needs to hear any more.
    drop(heard);
    stage.send_replace(Stage::Over);
    let left = async { while tasks.join_next().await.is_some() {} };
    timeout(Duration::from_secs(LEAVE_TIMEOUT_S), left).await.context("wait for the workers to leave")?;

    let (latencies_us, late) = crowd.answers.take();
    if latencies_us.is_empty() {
        return Err(Failure::new(FailureKind::Run, "no heartbeat was answered").hint("measure for some seconds at least").into());
    }
    let latency_ms = |share: f64| f64::from(quantile(&latencies_us, share)) / 1000.0;
    Ok(LoadReport {
        workers: options.workers,
        tls: target.secrets.key.is_some(),
        coordinator_cpu: options.coordinator_cpu,
        joined_s: joined.as_secs_f64(),
        started_s: started.as_secs_f64(),
        measured_s,
        answers: latencies_us.len(),
        late,
        latency_p50_ms: latency_ms(0.5),
        latency_p99_ms: latency_ms(0.99),
        latency_max_ms: latency_ms(1.0),
        resident_before_bytes,
        resident_after_bytes,
        resident_bytes_per_worker: (resident_after_bytes as f64 - resident_before_bytes as f64) / f64::from(options.workers),
        processor_start_s,
        processor_share: processor_s / measured_s,
    })
}

/// Secures the workers' connections where the coordinator has a key.
fn security(target: &Target) -> anyhow::Result<Option<TlsConnector>> {
    let Some(key) = &target.secrets.key else { return Ok(None) };
    Ok(Some(TlsConnector::from(key.pinned()?.client_config()?)))
}

fn too_slow(workers: u32) -> Failure {
    Failure::new(FailureKind::Run, "the workers did not all start in time")
        .expected(format!("{workers} workers within {GATHER_TIMEOUT_S} s"))
        .hint("try fewer workers, and look at what else runs on this machine")
}

/// Waits until all workers were told to start; returns when all had joined and when all had started.
async fn gather(heard: &mut mpsc::Receiver<Progress>, workers: u32, began: Instant) -> anyhow::Result<(Duration, Duration)> {
    let (mut num_joined, mut num_started, mut joined) = (0, 0, Duration::ZERO);
    while num_started < workers {
        match heard.recv().await {
            Some(Progress::Joined) => {
                num_joined += 1;
                if num_joined == workers {
                    joined = began.elapsed();
                }
            }
            Some(Progress::Started) => num_started += 1,
            Some(Progress::Failed(error)) => return Err(error),
            None => bail!("all pretended workers ended"),
        }
    }
    Ok((joined, began.elapsed()))
}

/// Waits until a worker fails.
async fn failed(heard: &mut mpsc::Receiver<Progress>) -> anyhow::Error {
    loop {
        match heard.recv().await {
            Some(Progress::Failed(error)) => return error,
            Some(Progress::Joined | Progress::Started) => {}
            None => return anyhow::anyhow!("all pretended workers ended"),
        }
    }
}

/// The value below which this share of the sorted values lies, the value itself included.
fn quantile(sorted: &[u32], share: f64) -> u32 {
    let position = (share * sorted.len() as f64).ceil() as usize;
    sorted[position.clamp(1, sorted.len()) - 1]
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};

    use super::*;
    use crate::secret::Secret;
    use crate::tls::RunKey;

    #[test]
    fn quantiles_are_values_that_occur() {
        let hundred: Vec<u32> = (1..=100).collect();
        for (share, expected) in [(0.0, 1), (0.5, 50), (0.99, 99), (0.995, 100), (1.0, 100)] {
            assert_eq!(quantile(&hundred, share), expected, "{share}");
        }
        assert_eq!(quantile(&[7], 0.5), 7);
    }

    /// Measures a coordinator with some secrets under workers that bring others. It runs on a thread here and in a process of its own
    /// otherwise; it is told and tells through pipes either way.
    fn measured(workers: u32, held: &Secrets, brought: Secrets) -> anyhow::Result<LoadReport> {
        let (input, mut to_server) = std::io::pipe().unwrap();
        let (from_server, mut output) = std::io::pipe().unwrap();
        let server = std::thread::spawn(move || serve(workers, BufReader::new(input), &mut output));
        held.write(&mut to_server).unwrap();
        let mut line = String::new();
        BufReader::new(from_server).read_line(&mut line).unwrap();
        let target = Target { address: line.trim().parse().unwrap(), process_id: std::process::id(), secrets: brought };
        let options = LoadOptions {
            workers,
            tls: target.secrets.key.is_some(),
            measured: Duration::from_millis(2_500),
            program: PathBuf::new(),
            arguments: Vec::new(),
            coordinator_cpu: None,
        };
        let report = drive(&target, &options);
        drop(to_server);
        server.join().unwrap().unwrap();
        report
    }

    #[test]
    fn workers_join_start_and_are_answered() {
        for tls in [false, true] {
            let secrets = Secrets::random(tls).unwrap();
            let report = measured(64, &secrets, secrets.clone()).unwrap();
            assert_eq!((report.workers, report.tls), (64, tls));
            assert!(report.answers > 0, "each worker asks once a second: {report:?}");
            assert!(report.joined_s <= report.started_s);
            assert!(report.latency_p50_ms <= report.latency_p99_ms && report.latency_p99_ms <= report.latency_max_ms);
        }
    }

    #[test]
    fn a_worker_with_a_wrong_token_or_key_fails_the_measurement() {
        for tls in [false, true] {
            let held = Secrets::random(tls).unwrap();
            let brought = Secrets { token: Secret::new("other"), ..held.clone() };
            let failure = measured(2, &held, brought).unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!(failure.what, "the coordinator does not know this token");
        }
        let held = Secrets::random(true).unwrap();
        let shown = held.key.as_ref().unwrap().pinned().unwrap().to_string();
        let brought = Secrets { key: Some(RunKey::random().unwrap()), ..held.clone() };
        let error = format!("{:#}", measured(2, &held, brought).unwrap_err());
        assert!(error.contains("agree on TLS as worker") && error.contains(&shown), "{error}");
    }
}
