//! From options to the end of a run.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloze_cluster::host::executable_id_of;
use cloze_cluster::{Coordinator, CoordinatorOptions, Event, HangLimits, Journal, Memory, Past, RunEnd, Secret};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::{HangRecipe, Recipe, Shard};
use tokio::sync::mpsc;
use tracing::Instrument as _;

use super::adoption::{Adoption, AdoptionReason, Legacy, Wanted, decide_adoption};
use super::contact::Credentials;
use super::crew::{Crew, LEAVE_TIMEOUT_S};
use super::drill::Drill;
use super::process::WorkerCommand;
use super::record::ProcessRecord;
use super::restart::RestartLimits;
use super::signals::Signals;
use super::supervisor::{CoordinatorTask, Supervisor, SupervisorLimits, last_signal};
use super::told::{self, last_told};
use crate::dashboard::{Dashboard, DashboardOptions, DashboardOrder};
use crate::hosts::{HostCrew, HostsPlan};
use crate::reporter::{Reporters, TerminalStyle};
use crate::run_folder::{ControlFile, RunFolder, RunPaths, storage};

/// Threads of the launcher's runtime; it only waits and forwards, and the cores belong to the workers.
const RUNTIME_THREADS: usize = 2;

/// Events that wait for the reporters; the coordinator waits where the disk is slower than the run.
const EVENT_MESSAGES: usize = 1024;

/// Most worker processes of one machine; its cores and GPUs are far fewer.
const MAX_LOCAL_WORKERS: u32 = 1024;

/// Orders that wait for the coordinator: at most two for each of 1024 processes that end at once, and one for each signal.
const CONTROL_MESSAGES: usize = 4096;

/// Orders of the dashboard that wait for the loop; somebody clicks them.
const DASHBOARD_ORDERS: usize = 16;

/// Shortest time for workers of an earlier controller to come back before they are killed; longer than the coordinator waits for them.
const COME_BACK_TIMEOUT_S: u64 = 15;

/// Shortest time after which a process that has not joined hangs; where half of `--join-timeout` is longer, that is it. A worker reads its
/// recipe and opens a port before it joins; libraries on a slow disk take most of it.
const JOIN_WITHIN_S: u64 = 60;

/// Beyond the time that the workers of other hosts have to leave, how long their `cloze join` may take to notice and to end.
const HOSTS_EXTRA_S: u64 = 10;

/// Where a coordinator listens unless told otherwise: on loopback, at a free port.
const DEFAULT_BIND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// What a run needs.
pub struct LaunchOptions {
    /// The run's folder, locked by this process.
    pub run: RunFolder,
    /// What is to be done.
    pub plan: LaunchPlan,
    /// Where progress is shown; usually standard error.
    pub output: Box<dyn Write + Send>,
    /// How it is shown.
    pub style: TerminalStyle,
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct LaunchPlan {
    /// The run's checked recipe.
    pub recipe: Recipe,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Slots of the run.
    pub workers: u32,
    /// Slots whose processes are started on this machine, from 0; the others are waited for.
    pub local_workers: u32,
    /// The worker binary.
    pub worker_binary: PathBuf,
    /// The build that the worker binary states when it joins.
    pub worker_build: String,
    /// Where the coordinator listens; port 0 takes a free one. `None` is loopback, or for a resumed run where its last controller
    /// listened.
    pub bind: Option<SocketAddr>,
    /// Longest time in which all workers must join, at the start and after a loss. A worker joins before it builds anything.
    pub join_timeout: Duration,
    /// The run was started before; workers of a controller that was killed are taken over.
    pub resumed: bool,
    /// Where the dashboard listens; `None` switches it off.
    pub dashboard: Option<SocketAddr>,
    /// Failures on purpose, to see the recovery.
    pub drills: Vec<Drill>,
    /// Step after which the run is left, with its state saved; `None` goes on to the end.
    pub until_step: Option<u64>,
    /// What is set anew in the recipe of a resumed run, as `key=value`.
    pub changes: Vec<String>,
}

/// How a run over hosts has ended.
#[derive(Debug)]
pub struct HostsEnd {
    /// The run.
    pub end: RunEnd,
    /// The host by whose loss it failed.
    pub lost_host: Option<String>,
}

/// Runs to the end: starts coordinator and workers, replaces workers within the recipe's budget, reports. Blocks.
///
/// SIGINT, SIGTERM, SIGHUP and SIGUSR2 ask the workers to save and leave; a second signal, or `checkpoint.stop_timeout_s`, ends them
/// at once. SIGUSR1 asks them to save and go on. After that the signals do nothing any more in this process. A run that failed is
/// `Ok(RunEnd::Failed)`; an error is a failure of the launcher itself: the worker binary cannot be started, or workers of an earlier
/// controller may live on another host (`Environment`), the run folder cannot be written (`Storage`), its journal cannot be read
/// (`Damaged`).
pub fn launch(options: LaunchOptions) -> anyhow::Result<RunEnd> {
    Ok(launch_on_hosts(options, HostsPlan::default())?.end)
}

/// The same over other hosts, on each of which `cloze join` is kept alive until the run ends. A host that cannot be reached ends the
/// run, unless enough others are left for `cluster.min_workers`.
pub fn launch_on_hosts(options: LaunchOptions, hosts: HostsPlan) -> anyhow::Result<HostsEnd> {
    let LaunchOptions { run, plan, output, style } = options;
    plan.check()?;
    // Before anything is written: what cannot begin leaves a run that others may still work on as it is.
    let mut inheritance = Inheritance::find(&run, &plan)?;
    // The workers read it there.
    run.keep_recipe(&plan.recipe)?;
    let started = Instant::now();
    let terminal = crate::reporter::terminal(output, style, plan.recipe.train.log_every_steps);
    let mut reporters = Reporters::open(&run, terminal)?;
    reporters.write(Event::RunStarted {
        name: run.info().name.clone(),
        recipe_hash: run.info().recipe_hash.clone(),
        workers: plan.workers,
        min_workers: plan.recipe.cluster.min_workers,
        steps: plan.total_steps,
    })?;
    if !plan.changes.is_empty() {
        reporters.write(Event::RecipeChanged { changes: plan.changes.clone() })?;
    }
    if let Some(message) = unusable_cache(&plan) {
        reporters.write(Event::Warning { message })?;
    }
    let signals = Signals::listen().context("listen to signals")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(RUNTIME_THREADS).thread_name("launcher").enable_all().build();
    let runtime = runtime.context("start the launcher's runtime")?;
    runtime.block_on(async {
        let mut hosts = HostCrew::new(hosts);
        // With an error the workers of the earlier controller live on, so it is not told as the end of the run.
        let taken_over = take_over(&run, &plan, &mut inheritance, &mut reporters).await?;
        let outcome = async {
            let opened = match taken_over {
                Some(opened) => opened,
                None => open_anew(&run, &plan, inheritance, &mut reporters).await?,
            };
            Box::pin(control(&run, &plan, opened, (&mut reporters, &mut hosts), &signals)).await
        };
        let outcome = outcome.await;
        let end = report_end(&mut reporters, outcome, started.elapsed());
        // They read of the end in the event log.
        dismiss_hosts(&mut hosts, &mut reporters, &signals).await;
        reporters.close().await;
        let end = end?;
        Ok(HostsEnd { lost_host: hosts.lost_host(&end), end })
    })
}

/// Why the workers of this machine will keep no copies of checkpoints, where they are to; a run does well without.
fn unusable_cache(plan: &LaunchPlan) -> Option<String> {
    let folder = plan.recipe.checkpoint.cache.as_ref().filter(|_| plan.local_workers > 0)?;
    let probe = folder.join(format!(".probe-{}", std::process::id()));
    let tried = fs::create_dir_all(folder).and_then(|()| fs::write(&probe, "")).and_then(|()| fs::remove_file(&probe));
    let shown = folder.display();
    tried.err().map(|error| format!("`checkpoint.cache` cannot be used, so a restart fetches checkpoints from the store: {shown}: {error}"))
}

impl LaunchPlan {
    /// Refuses what cannot be done, with kind `Recipe`.
    pub fn check(&self) -> Result<(), Failure> {
        let wrong =
            |what: &str, expected: String, found: String| Err(Failure::new(FailureKind::Recipe, what).expected(expected).found(found));
        if self.local_workers > self.workers {
            let expected = format!("at most {}, the number of all workers", self.workers);
            return wrong("more workers are to be started here than the run has", expected, self.local_workers.to_string());
        }
        if self.local_workers > MAX_LOCAL_WORKERS {
            let expected = format!("at most {MAX_LOCAL_WORKERS} on one machine (`--local`)");
            return wrong("too many workers are to be started here", expected, self.local_workers.to_string());
        }
        if let Some(min_workers) = self.recipe.cluster.min_workers.filter(|&min_workers| min_workers > self.workers) {
            let expected = format!("at least {min_workers} workers (`cluster.min_workers`)");
            return wrong("the run has fewer workers than its recipe needs", expected, self.workers.to_string());
        }
        if let Some(bind) = self.bind.filter(|bind| bind.ip().is_unspecified()) {
            let expected = "an address of this machine that its workers can reach".to_owned();
            return wrong("the coordinator needs an address that names this machine", expected, bind.to_string());
        }
        self.drills.iter().try_for_each(|drill| drill.check(self.local_workers, self.total_steps))
    }

    fn supervisor_limits(&self) -> SupervisorLimits {
        let Recipe { cluster, checkpoint, .. } = &self.recipe;
        let restart = RestartLimits { max_restarts: cluster.max_restarts, min_workers: cluster.min_workers };
        SupervisorLimits { restart, stop_timeout: Duration::from_secs(checkpoint.stop_timeout_s) }
    }

    /// Time for workers of an earlier controller to come back. One that saves before it leaves, since its own wait was over, may take
    /// as long as a stop.
    fn come_back_timeout(&self) -> Duration {
        let stop_timeout = Duration::from_secs(self.recipe.checkpoint.stop_timeout_s);
        stop_timeout.min(self.join_timeout).max(Duration::from_secs(COME_BACK_TIMEOUT_S))
    }

    fn coordinator_options(&self, run: &RunFolder, bind: SocketAddr, credentials: &Credentials, past: Past) -> CoordinatorOptions {
        let cluster = &self.recipe.cluster;
        CoordinatorOptions {
            bind,
            token: credentials.token.clone(),
            key: credentials.key.clone(),
            recipe_hash: self.recipe.full_hash(),
            build: self.worker_build.clone(),
            workers: self.workers,
            heartbeat_timeout: Duration::from_millis(cluster.heartbeat_timeout_ms),
            join_timeout: self.join_timeout,
            min_workers: cluster.min_workers,
            replacement_wait: Duration::from_secs(cluster.replacement_wait_s),
            hang: hang_limits(&cluster.hang),
            exclude_host_after: cluster.exclude_host_after,
            retries_per_step: cluster.retries_per_step,
            state_is_replicated: self.recipe.train.shard == Shard::None,
            journal: Some(run.paths().journal()),
            past,
            told: None,
            until_step: self.until_step,
        }
    }
}

fn hang_limits(hang: &HangRecipe) -> HangLimits {
    let [init, data, step, checkpoint] = [hang.init_s, hang.data_s, hang.step_s, hang.checkpoint_s].map(Duration::from_secs);
    HangLimits { init, data, step, checkpoint }
}

/// What an earlier controller left, and what becomes of it.
struct Inheritance {
    legacy: Legacy,
    adoption: Adoption,
    reason: AdoptionReason,
}

impl Inheritance {
    /// Looks and decides. Fails with kind `Environment` when the run may not begin here, and with `Damaged` when the journal or the
    /// control file that it would go on with is not whole.
    fn find(run: &RunFolder, plan: &LaunchPlan) -> anyhow::Result<Self> {
        let legacy = if plan.resumed { Legacy::find(run.paths())? } else { Legacy::default() };
        let recipe_hash = plan.recipe.full_hash();
        let wanted = Wanted { workers: plan.workers, local_workers: plan.local_workers, recipe_hash: &recipe_hash, bind: plan.bind };
        let (adoption, reason) = decide_adoption(&legacy, &wanted);
        tracing::debug!(?adoption, %reason, "looked for workers of an earlier controller");
        if adoption == Adoption::Refuse {
            return Err(legacy.refusal(run.paths()).into());
        }
        if adoption == Adoption::TakeOver {
            Journal::read(&run.paths().journal())?;
            legacy.control.as_ref().map(|control| Credentials::of(control, plan.recipe.cluster.tls)).transpose()?;
        }
        Ok(Self { legacy, adoption, reason })
    }
}

/// What is open before the workers come.
struct Opened {
    coordinator: Coordinator,
    credentials: Credentials,
    /// Living processes that are taken over.
    living: Vec<ProcessRecord>,
}

/// Controls the run until it ends. `control.json` is there from the moment in which workers can come, until the end.
async fn control(
    run: &RunFolder,
    plan: &LaunchPlan,
    opened: Opened,
    (reporters, hosts): (&mut Reporters, &mut HostCrew),
    signals: &Signals,
) -> anyhow::Result<RunEnd> {
    let (order_sender, orders) = mpsc::channel(DASHBOARD_ORDERS);
    let dashboard = open_dashboard(plan.dashboard, &opened.credentials.token, order_sender).await?;
    let url = dashboard.as_ref().map(Dashboard::url);
    if let Some(dashboard) = dashboard {
        reporters.attach(dashboard)?;
    }
    let (address, token, tls) = (opened.coordinator.address(), opened.credentials.token.clone(), opened.credentials.kept()?);
    ControlFile { address, token, tls, dashboard: url.clone(), process_id: std::process::id(), local_workers: Some(plan.local_workers) }
        .write(run.paths())?;
    let outcome = async {
        if let Some(url) = url {
            reporters.write(Event::DashboardListening { url })?;
        }
        let (crew, coordinator) = muster(run, plan, opened)?;
        let mut supervisor = Supervisor::new(crew, plan.supervisor_limits(), reporters, signals);
        supervisor.practise(&plan.drills);
        supervisor.reach_out(hosts);
        supervisor.run(coordinator, orders).await
    };
    let outcome = outcome.await;
    let removed = ControlFile::remove(run.paths());
    // How the run ended matters more than a file that stayed behind.
    let end = outcome?;
    removed?;
    Ok(end)
}

/// Waits for `cloze join` on the other hosts to end, unless somebody signals meanwhile.
async fn dismiss_hosts(hosts: &mut HostCrew, reporters: &mut Reporters, signals: &Signals) {
    // Where nobody reads what is shown, the end matters all the same.
    let show = |line: &str| drop(reporters.say(line));
    let late = tokio::select! {
        biased;
        late = hosts.end(Duration::from_secs(LEAVE_TIMEOUT_S + HOSTS_EXTRA_S), show) => late,
        _ = last_signal(signals, 1) => hosts.end(Duration::ZERO, |_| {}).await,
    };
    if !late.is_empty() {
        let line = format!("warning: these hosts were left before they were done: {}; `cloze join` ends there by itself", late.join(", "));
        drop(reporters.say(&line));
    }
}

/// Starts the coordinator, and gathers the processes that live already.
fn muster(run: &RunFolder, plan: &LaunchPlan, opened: Opened) -> anyhow::Result<(Crew, CoordinatorTask)> {
    let Opened { coordinator, credentials, living } = opened;
    let command = WorkerCommand {
        binary: plan.worker_binary.clone(),
        paths: run.paths().clone(),
        contact: credentials.contact(coordinator.address())?,
        slots: plan.workers,
        local_workers: plan.local_workers,
        recipe_hash: plan.recipe.full_hash(),
        by_join: false,
        join_within: (plan.join_timeout / 2).max(Duration::from_secs(JOIN_WITHIN_S)),
    };
    let mut crew = Crew::new(command, 0..plan.local_workers);
    let deadline = tokio::time::Instant::now() + plan.come_back_timeout();
    for record in living {
        crew.find(record, Some(deadline));
    }
    crew.practise(&plan.drills);
    Ok((crew, start(coordinator)))
}

/// Opens the coordinator where an earlier controller's workers look for it, if they can be taken over. `None` is another decision:
/// that its address is taken, where another one does as well.
async fn take_over(
    run: &RunFolder,
    plan: &LaunchPlan,
    inheritance: &mut Inheritance,
    reporters: &mut Reporters,
) -> anyhow::Result<Option<Opened>> {
    let Inheritance { legacy, adoption, reason } = inheritance;
    let Some(control) = legacy.control.as_ref().filter(|_| *adoption == Adoption::TakeOver) else { return Ok(None) };
    let credentials = Credentials::of(control, plan.recipe.cluster.tls)?;
    let path = run.paths().events();
    let told = last_told(&path).map_err(|error| storage("read what was told of the run", &path, &error))?;
    // Without a journal it is not known who was in the generation; its workers come back all the same and start another.
    let past = if run.paths().journal().exists() {
        Past::MayRun
    } else {
        Past::Over { generation: told.map_or(0, |told| told.generation), saved_step: 0 }
    };
    let options = CoordinatorOptions { told, ..plan.coordinator_options(run, control.address, &credentials, past) };
    match Coordinator::bind(options).await {
        Ok(coordinator) => {
            let living = std::mem::take(&mut legacy.living);
            let seconds = plan.come_back_timeout().as_secs();
            if is_exchanged(&plan.worker_binary, &living) {
                let message = "cloze-worker is not the one that the living workers run, so none of them can be replaced; stop the run, which \
                               saves, and resume it";
                reporters.write(Event::Warning { message: message.to_owned() })?;
            }
            if !living.is_empty() && seconds > COME_BACK_TIMEOUT_S {
                let message = format!(
                    "the workers of the earlier controller ({}) have {seconds} s to come back before they are killed",
                    living.len()
                );
                reporters.write(Event::Warning { message })?;
            }
            Ok(Some(Opened { coordinator, credentials, living }))
        }
        // The port was not asked for, so another one does as well. Anything but the address is no reason to give the workers up.
        Err(error) if is_of_the_machine(&error) && plan.bind.is_none_or(|bind| bind.port() == 0) => {
            let message = format!("the coordinator listens at another address than before: {error:#}");
            reporters.write(Event::Warning { message })?;
            (*adoption, *reason) = (Adoption::Replace, AdoptionReason::AddressTaken);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Whether living workers are another executable than those that would replace them. Where that cannot be told, as of a script, they are not.
fn is_exchanged(binary: &Path, living: &[ProcessRecord]) -> bool {
    let Ok(own) = executable_id_of(binary) else { return false };
    let theirs = living.iter().filter_map(|record| executable_id_of(Path::new(&format!("/proc/{}/exe", record.process_id))).ok());
    theirs.into_iter().any(|id| id != own)
}

fn is_of_the_machine(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Failure>().is_some_and(|failure| failure.kind == FailureKind::Environment)
}

/// Opens the coordinator where the plan says; workers that cannot be taken over are killed first.
async fn open_anew(run: &RunFolder, plan: &LaunchPlan, inheritance: Inheritance, reporters: &mut Reporters) -> anyhow::Result<Opened> {
    let Inheritance { mut legacy, adoption, reason } = inheritance;
    if adoption == Adoption::Replace && !legacy.living.is_empty() {
        let lost = "what no checkpoint has is lost with them";
        let message = format!("the workers of the earlier controller ({}) are killed, and {lost}: {reason}", legacy.living.len());
        reporters.write(Event::Warning { message })?;
        legacy.end_living().await?;
    }
    let bind =
        plan.bind.or_else(|| legacy.control.as_ref().map(|control| SocketAddr::new(control.address.ip(), 0))).unwrap_or(DEFAULT_BIND);
    let credentials = Credentials::fresh(plan.recipe.cluster.tls)?;
    let past = if plan.resumed { what_is_over(run.paths(), reporters)? } else { Past::Over { generation: 0, saved_step: 0 } };
    let coordinator = Coordinator::bind(plan.coordinator_options(run, bind, &credentials, past)).await?;
    Ok(Opened { coordinator, credentials, living: Vec::new() })
}

/// The past of a run whose workers are not taken over, by its journal and by the end of its events.
fn what_is_over(paths: &RunPaths, reporters: &mut Reporters) -> anyhow::Result<Past> {
    let path = paths.events();
    let told = told::last_generation(&path).map_err(|error| storage("read what was told of the run", &path, &error))?;
    let noted = match Journal::read(&paths.journal()) {
        Ok(memory) => memory,
        Err(failure) if failure.kind == FailureKind::Damaged => {
            let found = failure.found.unwrap_or_default();
            let message =
                format!("{} is damaged ({found}); it is begun anew, since no worker of the run lives here", paths.journal().display());
            reporters.write(Event::Warning { message })?;
            Memory::default()
        }
        Err(failure) => return Err(failure.into()),
    };
    Ok(Past::Over { generation: noted.generation.max(told), saved_step: noted.saved_step })
}

async fn open_dashboard(
    bind: Option<SocketAddr>,
    token: &Secret,
    orders: mpsc::Sender<DashboardOrder>,
) -> anyhow::Result<Option<Dashboard>> {
    let Some(bind) = bind else { return Ok(None) };
    Dashboard::start(DashboardOptions { bind, token: token.clone() }, orders).await.map(Some)
}

fn start(coordinator: Coordinator) -> CoordinatorTask {
    let (sender, events) = mpsc::channel(EVENT_MESSAGES);
    let (control, orders) = mpsc::channel(CONTROL_MESSAGES);
    let end = tokio::spawn(coordinator.run(sender, orders).instrument(tracing::info_span!("coordinator")));
    CoordinatorTask { end, events, control }
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
mod tests;
