//! What `cloze sweep work` does: the attempts of one element of a batch, at the same time, each from its data to its outcome.
//!
//! Everything here can be done twice. Data and exports that are there are used, a run goes on from its newest state, and an attempt whose
//! outcome is written is over; so an element that a batch system starts again on another node goes on where it was.

mod host;
mod node;
mod results;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, sleep};
use std::time::Duration;

use anyhow::Context as _;
use cloze_cluster::host::host_name;
use cloze_data::manifest::Manifest;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use cloze_recipes::study::Score;
use serde_json::Value;

use self::host::Entry;
use self::node::{Unfit, unfit};
pub(super) use self::results::as_failure;
pub(super) use self::results::run_facts;
use self::results::{RunFacts, metric};
use super::batch::{Assignment, Batch, End, Outcome};
use super::folder::{PlannedTrial, StudyFolder, SweepPlan, read_json};
use super::leave::bind;
use super::share::Part;
use super::steps::{Manners, StopLevel, run};
use super::time::unix_now_s;
use super::waits::{DATA_LOCK_WAIT_S, TRIAL_LOCK_WAIT_S, wait_for_controller, wait_for_lock};
use crate::local::forget_earlier;
use crate::local::signals::{Request, Signals};
use crate::run_folder::{RunPaths, remove_if_there, storage};
use crate::slurm::{has_container, step_on_this_node};
use crate::view::controller_lives;

/// Interval at which signals are looked at, in milliseconds.
const POLL_MS: u64 = 100;

/// How often a run is gone on with in one attempt, where it pauses before the step at which it should: its workers were found under an
/// earlier order.
const MAX_CONTINUATIONS: u32 = 4;

/// Environment variable with the cores that the workers of one run share.
const CORES_VARIABLE: &str = "CLOZE_CORES";

/// Environment variable with the GPUs that a process may see.
const GPUS_VARIABLE: &str = "CUDA_VISIBLE_DEVICES";

/// What `cloze sweep work` was told.
#[derive(Clone, Debug)]
pub struct WorkOptions {
    /// The study folder.
    pub folder: PathBuf,
    /// Number of the batch.
    pub batch: u32,
    /// Element of the batch.
    pub element: u32,
    /// The part of the machine that this element has.
    pub part: Part,
    /// The `cloze` program.
    pub program: PathBuf,
    /// GPUs that this process may see, where somebody has chosen some; otherwise as many as the study's resources say.
    pub gpus: Option<String>,
    /// Cores that this process may use; `None` is all.
    pub cores: Option<u32>,
    /// The host on which a controller has started it, itself or through a remote shell, as the controller calls it.
    pub host: Option<String>,
    /// Whether that host was checked before.
    pub is_checked: bool,
}

/// Works on one element; the failure is that of the first attempt made here that has one, and a stop that was asked for. Outcomes are in the
/// study folder either way. Of a batch that was given up nothing is done. Returns the trials whose outcomes an earlier process has told, as
/// one does that a batch system starts again.
pub fn work(options: &WorkOptions) -> anyhow::Result<Vec<String>> {
    let folder = StudyFolder::find(&options.folder)?;
    let plan = folder.plan()?;
    let batch = Batch::read(&folder, options.batch)?;
    let assignments = batch.element(options.element)?;
    if folder.given_up_path(options.batch).exists() {
        tracing::warn!(batch = options.batch, "there is nothing to do: `cloze sweep cancel --mark-only` has given the batch up");
        return Ok(Vec::new());
    }
    let signals = Signals::listen().context("listen to signals")?;
    let stop = StopLevel::default();
    let entry = Entry::new(&folder, &plan, options)?;
    if matches!(entry, Entry::Taken) {
        tracing::warn!(batch = options.batch, "there is nothing to do: another process has the batch, or its controller has taken it back");
        return Ok(Vec::new());
    }
    let entrance = entrance(&folder, &plan)?;
    // A stop that is asked for meanwhile waits until it is over; no trial begins then.
    let unfit = if options.is_checked { None } else { unfit(&options.program, &folder, &plan, assignments)? };
    let workshop =
        Workshop { folder: &folder, plan: &plan, options, stop: &stop, entry: &entry, entrance: &entrance, unfit: unfit.as_ref() };
    heed(&signals, &stop);
    let results: Vec<anyhow::Result<Attempted>> = thread::scope(|scope| {
        let of = assignments.len() as u32;
        let attempts: Vec<_> = (0_u32..)
            .zip(assignments)
            .map(|(place, assignment)| {
                let part = options.part.within(Part { place, of });
                scope.spawn(move || workshop.attempt(assignment, part))
            })
            .collect();
        while attempts.iter().any(|attempt| !attempt.is_finished()) {
            heed(&signals, &stop);
            sleep(Duration::from_millis(POLL_MS));
        }
        attempts
            .into_iter()
            .map(|attempt| attempt.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread of the work panicked"))))
            .collect()
    });
    Ok(told_before(results.into_iter().collect::<anyhow::Result<_>>()?)?)
}

/// The trials whose outcomes were told before; the first failure of the others. A failure that was told is the sweep's to answer.
fn told_before(attempted: Vec<Attempted>) -> Result<Vec<String>, Failure> {
    let (new, told): (Vec<Attempted>, Vec<Attempted>) = attempted.into_iter().partition(|attempted| attempted.is_new);
    match new.into_iter().find_map(|attempted| attempted.outcome.failure) {
        None => Ok(told.into_iter().map(|attempted| attempted.name).collect()),
        Some(failure) => Err(failure),
    }
}

/// The words that bring a program into the container of the job. What works on a trial of several nodes stays outside of it, since it
/// needs the batch system to reach the others; an element of one node is inside as a whole.
fn entrance(folder: &StudyFolder, plan: &SweepPlan) -> Result<Vec<String>, Failure> {
    match &plan.site {
        Some(site) if plan.spans_nodes() && has_container(&plan.resources, site) => step_on_this_node(site, &plan.resources, folder.root()),
        _ => Ok(Vec::new()),
    }
}

/// A first signal asks for the saving of what there is; another SIGTERM, SIGINT or SIGHUP ends everything at once.
fn heed(signals: &Signals, stop: &StopLevel) {
    if signals.take(Request::EarlyStop).is_some() {
        stop.ask();
    }
    if signals.take(Request::Stop).is_some() {
        if stop.is_firmly_asked() {
            stop.force();
        }
        stop.ask_firmly();
    }
}

/// What all attempts of an element share.
#[derive(Clone, Copy)]
struct Workshop<'a> {
    folder: &'a StudyFolder,
    plan: &'a SweepPlan,
    options: &'a WorkOptions,
    stop: &'a StopLevel,
    /// What this element has of its host.
    entry: &'a Entry,
    /// Words before a program that is to run in the container.
    entrance: &'a [String],
    /// Why nothing can be tried on this node.
    unfit: Option<&'a Unfit>,
}

/// One attempt at one trial.
struct Attempt<'a> {
    shop: Workshop<'a>,
    trial: &'a PlannedTrial,
    recipe: Recipe,
    until_step: Option<u64>,
    part: Part,
}

/// An attempt with its outcome.
struct Attempted {
    /// Name of the trial.
    name: String,
    outcome: Outcome,
    /// Whether it was made by this process; otherwise its outcome was there.
    is_new: bool,
}

/// What a trial has come to.
struct Product {
    end: End,
    metric: Option<f64>,
    evaluation: Option<Value>,
}

impl Workshop<'_> {
    /// Makes an attempt, unless its outcome is there, and writes the outcome.
    fn attempt(self, assignment: &Assignment, part: Part) -> anyhow::Result<Attempted> {
        let Assignment { trial, attempt, until_step } = assignment;
        let planned = self.plan.trials.iter().find(|planned| planned.hash == *trial).ok_or_else(|| {
            Failure::new(FailureKind::Mismatch, "the batch names a trial that the study does not have")
                .at(self.folder.root().display())
                .found(trial)
        })?;
        // Nobody else works on it, such as the same element on a node that is being given up.
        let _lock = wait_for_lock(&self.folder.trial_lock_path(trial), "works on this trial", TRIAL_LOCK_WAIT_S, self.stop)?;
        if let Some(outcome) = Outcome::read(self.folder, trial, *attempt)? {
            return Ok(Attempted { name: planned.name.clone(), outcome, is_new: false });
        }
        let recipe = cloze_recipes::load(&self.folder.recipe_path(trial), &[])?;
        let attempt_of = Attempt { shop: self, trial: planned, recipe, until_step: *until_step, part };
        let (result, bad_nodes) = match self.unfit {
            Some(unfit) => (Err(unfit.failure.clone().into()), unfit.bad_nodes.clone()),
            None => (attempt_of.go(), attempt_of.take_bad_nodes()?),
        };
        self.clear(&attempt_of.run_path())?;
        let facts = attempt_of.run_facts()?;
        let outcome = |end, metric, evaluation, failure| Outcome {
            trial: trial.clone(),
            attempt: *attempt,
            end,
            step: facts.saved_step,
            metric,
            evaluation,
            failure,
            bad_nodes,
            host: host_name(),
            finished: unix_now_s(),
        };
        let outcome = match result {
            Ok(Product { end, metric, evaluation }) => outcome(end, metric, evaluation, None),
            Err(error) => {
                let end = if facts.is_finished { End::FailedAfterTraining } else { End::FailedInTraining };
                outcome(end, None, None, Some(as_failure(&error)))
            }
        };
        outcome.write(self.folder)?;
        Ok(Attempted { name: planned.name.clone(), outcome, is_new: true })
    }

    /// Ends and forgets what an attempt has left behind, as far as this element answers for it.
    fn clear(self, run_path: &Path) -> anyhow::Result<()> {
        self.entry.clear()?;
        // A run that an earlier attempt's controller still has, which may be saving, is not this one's to end.
        let is_its_own = matches!(self.entry, Entry::Claimed(_))
            && !controller_lives(run_path).with_context(|| format!("look at the lock of {}", run_path.display()))?;
        if is_its_own { forget(run_path) } else { Ok(()) }
    }
}

impl Attempt<'_> {
    /// Data, training, scores, export.
    fn go(&self) -> anyhow::Result<Product> {
        self.prepare_data()?;
        let facts = self.train()?;
        let end = if facts.is_finished { End::Done } else { End::Paused };
        let evaluation = if self.is_scored(end) { self.evaluate()? } else { None };
        if end == End::Done && self.trial.is_stage {
            self.export()?;
        }
        let metric = metric(&self.shop.plan.metric, evaluation.as_ref(), facts.loss);
        Ok(Product { end, metric, evaluation })
    }

    /// Prepares the data where nobody has; whoever comes second waits for the first.
    fn prepare_data(&self) -> anyhow::Result<()> {
        let output = &self.recipe.data.output;
        if Manifest::find(output)?.is_some() {
            return Ok(());
        }
        let path = self.shop.folder.root().join("data").join(format!("{}.lock", self.trial.data_hash));
        let _lock = wait_for_lock(&path, "prepares the same data", DATA_LOCK_WAIT_S, self.shop.stop)?;
        if Manifest::find(output)?.is_some() {
            return Ok(());
        }
        let mut command = self.program(&["data", "prepare"]);
        // Trials of several seeds share their data, so the seed of the one that comes first must not decide what is in it.
        command.arg(self.shop.folder.recipe_path(&self.trial.hash)).args(["--set", &format!("seed={}", self.trial.data_seed)]);
        self.run(command, Manners::Ends)
    }

    /// Trains to the end, or to the step at which the trial is to pause.
    fn train(&self) -> anyhow::Result<RunFacts> {
        let run_path = self.run_path();
        let mut facts = self.run_facts()?;
        for _ in 0..MAX_CONTINUATIONS {
            if facts.is_finished || self.until_step.is_some_and(|until_step| facts.saved_step >= until_step) {
                return Ok(facts);
            }
            // One that an earlier attempt has left behind still has the run, and its steps count.
            wait_for_controller(&run_path, self.shop.stop)?;
            forget_ended(self.shop.plan, &run_path)?;
            let command = self.training(&run_path);
            self.run(command, Manners::Saves)?;
            facts = self.run_facts()?;
        }
        if facts.is_finished || self.until_step.is_some_and(|until_step| facts.saved_step >= until_step) {
            return Ok(facts);
        }
        Err(Failure::new(FailureKind::Run, "the run ends well and does not get to its step")
            .at(run_path.display())
            .found(format!("step {}", facts.saved_step))
            .into())
    }

    /// What trains: a controller on this node, or one that has workers on all nodes of this element.
    fn training(&self, run_path: &Path) -> Command {
        let mut command = if self.shop.plan.spans_nodes() {
            let mut command = Command::new(&self.shop.options.program);
            command.args(["sweep", "train"]).arg(self.shop.folder.root()).args(["--trial", &self.trial.hash]);
            self.confine(&mut command);
            command
        } else {
            self.training_here(run_path)
        };
        if let Some(until_step) = self.until_step {
            command.args(["--until-step", &until_step.to_string()]);
        }
        command
    }

    fn training_here(&self, run_path: &Path) -> Command {
        let is_there = run_path.join("run.json").is_file();
        let mut command = self.program(&[if is_there { "resume" } else { "train" }]);
        if is_there {
            command.arg(run_path);
        } else {
            command.arg(self.shop.folder.recipe_path(&self.trial.hash)).arg("--run").arg(run_path);
        }
        command.args(["--workers", &self.shop.plan.resources.workers_per_node.to_string(), "--quiet", "--dashboard", "off"]);
        command
    }

    /// At a rung only what the metric needs is computed; an earlier stage that nobody asks for is not scored.
    fn is_scored(&self, end: End) -> bool {
        let is_needed = end == End::Done || self.shop.plan.metric.score != Score::Loss;
        self.trial.wanted && is_needed && !self.recipe.evaluation.is_empty()
    }

    fn evaluate(&self) -> anyhow::Result<Option<Value>> {
        let mut command = self.program(&["eval"]);
        command.arg(self.run_path());
        self.run(command, Manners::Ends)?;
        let path = self.run_path().join("eval").join("eval.json");
        let missing = || Failure::new(FailureKind::Input, "the scores of a trial are not there").at(path.display());
        Ok(Some(read_json(&path)?.ok_or_else(missing)?))
    }

    /// Exports the model under its final name last, so that a folder of that name is whole.
    fn export(&self) -> anyhow::Result<()> {
        let path = self.shop.folder.model_path(&self.trial.hash);
        if path.exists() {
            return Ok(());
        }
        let partial = path.with_extension("partial");
        if partial.exists() {
            std::fs::remove_dir_all(&partial).with_context(|| format!("remove {}", partial.display()))?;
        }
        let mut command = self.program(&["export"]);
        command.arg(self.run_path()).arg("--output").arg(&partial);
        self.run(command, Manners::Ends)?;
        std::fs::rename(&partial, &path).with_context(|| format!("give {} its name", path.display()))
    }

    /// What this process starts on this machine does not outlive it; elsewhere the batch system or the next visit ends all of it.
    fn run(&self, mut command: Command, manners: Manners) -> anyhow::Result<()> {
        if !self.shop.plan.ends_whole() {
            bind(&mut command);
        }
        run(command, &self.shop.folder.log_path(&self.recipe.name), manners, self.shop.stop)
    }

    /// A subcommand of this program, in its part of the machine and, where this process is outside of it, in the container.
    fn program(&self, subcommand: &[&str]) -> Command {
        let mut words = self.shop.entrance.iter().map(OsStr::new).chain([self.shop.options.program.as_os_str()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).args(subcommand);
        self.confine(&mut command);
        command
    }

    /// Tells a program which part of the machine is its own.
    fn confine(&self, command: &mut Command) {
        let WorkOptions { gpus, cores, .. } = self.shop.options;
        let resources = &self.shop.plan.resources;
        let all_cores = thread::available_parallelism().map_or(1, usize::from) as u32;
        let all_cores = cores.map_or(all_cores, |cores| cores.min(all_cores));
        if self.part.of > 1 || cores.is_some() {
            command.env(CORES_VARIABLE, self.part.cores(all_cores).to_string());
        }
        if resources.gpus_per_node > 0 && self.part.of > 1 {
            let seen: Vec<String> = match gpus {
                Some(list) => list.split(',').filter(|gpu| !gpu.is_empty()).map(str::to_owned).collect(),
                None => (0..resources.gpus_per_node).map(|gpu| gpu.to_string()).collect(),
            };
            command.env(GPUS_VARIABLE, self.part.gpus(&seen, resources.workers_per_node).join(","));
        }
    }

    fn run_path(&self) -> PathBuf {
        self.shop.folder.run_path(&self.recipe.name)
    }

    fn run_facts(&self) -> Result<RunFacts, Failure> {
        run_facts(&self.run_path())
    }

    /// The nodes that training has found to be bad, told once.
    fn take_bad_nodes(&self) -> anyhow::Result<Vec<String>> {
        let path = self.shop.folder.bad_nodes_path(&self.trial.hash);
        let bad_nodes = read_json(&path)?.unwrap_or_default();
        remove_if_there(&path).map_err(|error| storage("remove a file", &path, &error))?;
        Ok(bad_nodes)
    }
}

/// Forgets the workers of an earlier attempt in a batch system or on a host, where all that it started, on whatever node, has ended before
/// this one began. On this machine nobody has ended them, and the next controller takes them over.
fn forget_ended(plan: &SweepPlan, run_path: &Path) -> anyhow::Result<()> {
    if plan.ends_whole() { forget(run_path) } else { Ok(()) }
}

fn forget(run_path: &Path) -> anyhow::Result<()> {
    if run_path.join("run.json").is_file() {
        forget_earlier(&RunPaths::find(run_path)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{plan, site};
    use super::super::steps::interrupted;
    use super::*;

    fn attempted(name: &str, failure: Option<Failure>, is_new: bool) -> Attempted {
        let outcome = Outcome {
            trial: name.to_owned(),
            attempt: 1,
            end: if failure.is_some() { End::FailedInTraining } else { End::Done },
            step: 144,
            metric: None,
            evaluation: None,
            failure,
            bad_nodes: Vec::new(),
            host: "n1".to_owned(),
            finished: 0.0,
        };
        Attempted { name: name.to_owned(), outcome, is_new }
    }

    #[test]
    fn an_element_that_begins_again_fails_only_with_what_it_does_itself() {
        let stopped = |is_new| attempted("stopped", Some(interrupted()), is_new);
        assert_eq!(told_before(vec![stopped(false), attempted("done", None, true)]), Ok(vec!["stopped".to_owned()]));
        assert_eq!(told_before(vec![attempted("done", None, false), stopped(true)]), Err(interrupted()));
    }

    #[test]
    fn only_what_has_surely_ended_is_forgotten() {
        for (lines, is_kept) in [("kind: local", true), ("kind: slurm", false), ("kind: ssh\nssh: {hosts: [a]}", false)] {
            let folder = tempfile::tempdir().unwrap();
            let control = folder.path().join("control.json");
            for path in [&control, &folder.path().join("run.json")] {
                std::fs::write(path, "{}").unwrap();
            }
            forget_ended(&SweepPlan { site: Some(site("mine", lines)), ..plan(Vec::new()) }, folder.path()).unwrap();
            assert_eq!(control.is_file(), is_kept, "{lines}");
        }
    }
}
