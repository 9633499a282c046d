//! From options to the end of a run.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloze_cluster::{Coordinator, CoordinatorOptions, Event, RunEnd, Secret};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use tokio::sync::mpsc;
use tracing::Instrument as _;

use super::process::WorkerCommand;
use super::signals::Signals;
use super::supervisor::{CoordinatorTask, Supervisor};
use crate::reporter::{Reporters, TerminalStyle};
use crate::run_folder::RunFolder;

/// Threads of the launcher's runtime; it only waits and forwards, and the cores belong to the workers.
const RUNTIME_THREADS: usize = 2;

/// Longest time in which all workers must join, at the start and after a loss. A worker joins before it builds anything.
const JOIN_TIMEOUT_S: u64 = 90;

/// Events that wait for the reporters; the coordinator waits where the disk is slower than the run.
const EVENT_MESSAGES: usize = 1024;

/// Orders that wait for the coordinator; one for each exit and signal.
const CONTROL_MESSAGES: usize = 256;

/// What a run needs.
pub struct LaunchOptions {
    /// The run's folder, locked by this process.
    pub run: RunFolder,
    /// Its checked recipe.
    pub recipe: Recipe,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Number of worker processes.
    pub workers: u32,
    /// The worker binary.
    pub worker_binary: PathBuf,
    /// The build that the worker binary states when it joins.
    pub worker_build: String,
    /// Where the coordinator listens; port 0 takes a free one. Loopback unless told otherwise.
    pub bind: SocketAddr,
    /// Where progress is shown; usually standard error.
    pub output: Box<dyn Write + Send>,
    /// How it is shown.
    pub style: TerminalStyle,
    /// A worker that is killed on purpose, to see the recovery.
    pub fault: Option<PlannedFault>,
}

/// A drill: the worker's process gets SIGKILL once, when this step is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedFault {
    /// Slot of the worker.
    pub worker: u32,
    /// Steps done; the first report of this step or a later one counts.
    pub step: u64,
}

/// Runs to the end: starts coordinator and workers, replaces workers within the recipe's budget, reports. Blocks.
///
/// SIGINT and SIGTERM ask the workers to save and leave; a second signal, or two minutes, ends them at once. After that the two
/// signals do nothing any more in this process. A run that failed is `Ok(RunEnd::Failed)`; an error is a failure of the
/// launcher itself: the worker binary cannot be started (`Environment`), the run folder cannot be written (`Storage`).
pub fn launch(options: LaunchOptions) -> anyhow::Result<RunEnd> {
    let LaunchOptions { run, recipe, total_steps, workers, worker_binary, worker_build, bind, output, style, fault } = options;
    if let Some(fault) = fault.filter(|fault| fault.worker >= workers) {
        return Err(Failure::new(FailureKind::Recipe, "the worker to be killed does not exist")
            .expected(format!("a worker below {workers}"))
            .found(fault.worker)
            .into());
    }
    let started = Instant::now();
    let terminal = crate::reporter::terminal(output, style, &run, recipe.train.log_every_steps);
    let mut reporters = Reporters::open(&run, terminal)?;
    let (name, recipe_hash) = (run.info().name.clone(), run.info().recipe_hash.clone());
    reporters.write(Event::RunStarted { name, recipe_hash: recipe_hash.clone(), workers, steps: total_steps })?;
    let signals = Signals::listen().context("listen to SIGINT and SIGTERM")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(RUNTIME_THREADS).thread_name("launcher").enable_all().build();
    let runtime = runtime.context("start the launcher's runtime")?;

    let token = Secret::random()?;
    let coordinator_options = CoordinatorOptions {
        bind,
        token: token.clone(),
        recipe_hash,
        build: worker_build,
        workers,
        heartbeat_timeout: Duration::from_millis(recipe.cluster.heartbeat_timeout_ms),
        join_timeout: Duration::from_secs(JOIN_TIMEOUT_S),
    };
    let outcome = runtime.block_on(async {
        let (coordinator, address) = start_coordinator(coordinator_options).await?;
        let command = WorkerCommand { binary: &worker_binary, run: &run, coordinator: address, token: &token, local_workers: workers };
        let mut supervisor = Supervisor::new(command, recipe.cluster.max_restarts, fault, &mut reporters);
        supervisor.run(coordinator, &signals).await
    });
    report_end(&mut reporters, outcome, started.elapsed())
}

async fn start_coordinator(options: CoordinatorOptions) -> anyhow::Result<(CoordinatorTask, SocketAddr)> {
    let coordinator = Coordinator::bind(options).await?;
    let address = coordinator.address();
    let (sender, events) = mpsc::channel(EVENT_MESSAGES);
    let (control, orders) = mpsc::channel(CONTROL_MESSAGES);
    let end = tokio::spawn(coordinator.run(sender, orders).instrument(tracing::info_span!("coordinator")));
    Ok((CoordinatorTask { end, events, control }, address))
}

fn report_end(reporters: &mut Reporters, outcome: anyhow::Result<RunEnd>, elapsed: Duration) -> anyhow::Result<RunEnd> {
    match outcome {
        Ok(end) => {
            reporters.write(match &end {
                RunEnd::Finished { step } => Event::RunFinished { step: *step, seconds: elapsed.as_secs_f64() },
                RunEnd::Stopped { step } => Event::RunStopped { step: *step },
                RunEnd::Failed(failure) => Event::RunFailed { failure: failure.clone() },
            })?;
            Ok(end)
        }
        Err(error) => {
            let failure = match error.downcast_ref::<Failure>() {
                Some(failure) => failure.clone(),
                None => Failure::new(FailureKind::Run, "the launcher failed").because(format!("{error:#}")),
            };
            // Where the reporters are what failed, this fails again, and the first error is the one to tell.
            if let Err(second) = reporters.write(Event::RunFailed { failure }) {
                tracing::debug!(error = format!("{second:#}"), "the end of the run could not be recorded");
            }
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use cloze_cluster::Recorded;

    use super::*;
    use crate::run_folder::NewRun;
    use crate::sample::recipe;

    fn options(root: &Path, worker_binary: &str) -> LaunchOptions {
        let recipe = recipe();
        let new = NewRun {
            name: "run",
            recipe: &recipe,
            data_fingerprint: String::new(),
            command_line: Vec::new(),
            worker_build: "build".to_owned(),
        };
        let run = RunFolder::create(root, &new).unwrap();
        LaunchOptions {
            run,
            recipe,
            total_steps: 10,
            workers: 1,
            worker_binary: PathBuf::from(worker_binary),
            worker_build: "build".to_owned(),
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            output: Box::new(std::io::sink()),
            style: TerminalStyle::default(),
            fault: None,
        }
    }

    fn events(root: &Path) -> Vec<Event> {
        let text = std::fs::read_to_string(root.join("run").join("events.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str::<Recorded>(line).unwrap().event).collect()
    }

    #[test]
    fn a_worker_that_always_fails_is_restarted_within_the_budget() {
        let root = tempfile::tempdir().unwrap();
        // A shell that is given a worker's arguments complains that there is no script `train`.
        let end = launch(options(root.path(), "/bin/sh")).unwrap();
        let RunEnd::Failed(failure) = end else { panic!("{end:?}") };
        assert_eq!(failure.kind, FailureKind::Run);
        assert!(failure.what.starts_with("worker 0 (rank 0) ended with exit code "), "{failure}");
        assert!(failure.what.ends_with("all 2 replacements of this run are used (`cluster.max_restarts`)"), "{failure}");
        assert!(failure.cause.as_ref().unwrap().contains("train"), "its last words: {failure}");
        let events = events(root.path());
        let restarts: Vec<(u32, u32)> = events
            .iter()
            .filter_map(|event| match event {
                Event::WorkerRestarted { attempt, budget_left, .. } => Some((*attempt, *budget_left)),
                _ => None,
            })
            .collect();
        assert_eq!(restarts, [(1, 1), (2, 0)]);
        assert_eq!(events.iter().filter(|event| matches!(event, Event::WorkerStarted { .. })).count(), 3);
        assert_eq!(events.last(), Some(&Event::RunFailed { failure }));
        let log = std::fs::read_to_string(root.path().join("run").join("logs").join("worker-0.log")).unwrap();
        assert_eq!(log.lines().filter(|line| line.starts_with("== worker 0, process ")).count(), 3);
    }

    #[test]
    fn a_missing_binary_is_the_machines_fault() {
        let root = tempfile::tempdir().unwrap();
        let error = launch(options(root.path(), "/nowhere/cloze-worker")).unwrap_err();
        let failure = error.downcast::<Failure>().unwrap();
        assert_eq!((failure.kind, failure.place.as_deref()), (FailureKind::Environment, Some("/nowhere/cloze-worker")));
        assert_eq!(events(root.path()).last(), Some(&Event::RunFailed { failure }));
    }

    #[test]
    fn a_drill_needs_an_existing_worker() {
        let root = tempfile::tempdir().unwrap();
        let options = LaunchOptions { fault: Some(PlannedFault { worker: 1, step: 5 }), ..options(root.path(), "/bin/sh") };
        let failure = launch(options).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!((failure.kind, failure.expected.as_deref()), (FailureKind::Recipe, Some("a worker below 1")));
    }
}
