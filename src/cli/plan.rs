//! `cloze plan`: what a run of a recipe will need, and everything that is wrong before it is started. It needs no GPU and starts nothing.

mod checks;
mod facts;
mod script;
mod text;
mod trials;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use cloze_data::batch::total_steps;
use cloze_launcher::plan::{Check, CheckLevel, DataFacts, PlanFacts, RunPlan, check_memory, check_time};
use cloze_launcher::sweep::folder::StudyFolder;
use cloze_launcher::sweep::graph::Graph;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::Site;
use cloze_recipes::study::Study;
use serde::Serialize;

use super::arguments::RecipeArguments;
use super::run::{RUNS_FOLDER, check_data};
use super::sweep::study_folder;

pub(super) use trials::{refuse_large, refuse_large_trials};

/// Arguments of `cloze plan`.
#[derive(Args)]
pub struct PlanArguments {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArguments,
    /// Cluster file; without, the run is planned for this machine
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<PathBuf>,
    /// Run folder, or study folder where it takes `cloze sweep run`, that the run will be given [default: as those commands choose it]
    #[arg(long, visible_alias = "run", value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// Workers of the run [default: `resources.nodes` times `resources.workers_per_node`]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub workers: Option<u32>,
    /// Tokens that one worker trains on in a second, by `cloze bench RECIPE` [default: from the cluster file]
    #[arg(long, value_name = "TOKENS", value_parser = speed)]
    pub tokens_per_second: Option<f64>,
    /// Look at nothing but this machine: no bucket, no batch system
    #[arg(long)]
    pub offline: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What is printed.
#[derive(Serialize)]
struct Printed {
    /// No check has failed.
    ok: bool,
    /// The numbers; `None` where the model is not known.
    plan: Option<RunPlan>,
    /// Every check.
    checks: Vec<Check>,
    /// The batch script of the run's first job, or of the sweep's first array.
    script: Option<String>,
    /// Of which jobs that is.
    #[serde(skip)]
    script_of: &'static str,
}

/// What is planned.
struct Wanted<'a> {
    study: &'a Study,
    site: &'a Site,
    /// The cluster file, where one was named.
    site_file: Option<&'a Path>,
    workers: u32,
    offline: bool,
    /// The run folder of a single run.
    folder: PathBuf,
    /// The trials, where it takes `cloze sweep run` to start the recipe.
    trials: Option<Trials>,
}

/// The trials of a study, in the folder that `cloze sweep run` will make.
struct Trials {
    folder: StudyFolder,
    graph: Graph,
}

impl<'a> Wanted<'a> {
    /// Of a run in this folder, or in the one that it gets where none is named.
    fn new(study: &'a Study, site: &'a Site, folder: Option<&Path>) -> Result<Self> {
        let workers = study.resources.nodes.saturating_mul(study.resources.workers_per_node);
        let trials = if study.sweep.is_some() || study.after.is_some() {
            let usual = || study_folder(&study.recipe.name, study.profile.as_deref(), Some(site));
            let folder = folder.map_or_else(usual, Path::to_owned);
            let folder = std::path::absolute(folder).context("find the current folder")?;
            Some(Trials { graph: Graph::new(study.trials(&folder)?)?, folder: StudyFolder::new(folder) })
        } else {
            None
        };
        let usual = || site.folder.as_deref().unwrap_or(Path::new("")).join(RUNS_FOLDER).join(&study.recipe.name);
        let folder = folder.map_or_else(usual, Path::to_owned);
        Ok(Self { study, site, site_file: None, workers, offline: false, folder, trials })
    }
}

/// Prints the plan of a study in a folder at a site, whose file may be known, as [`plan`] does.
pub(super) fn plan_study(
    study: &Study,
    site: Option<&Site>,
    (file, folder): (Option<&Path>, &Path),
    stdout: &mut dyn Write,
) -> Result<ExitCode> {
    let local = Site::local();
    let wanted = Wanted { site_file: file, ..Wanted::new(study, site.unwrap_or(&local), Some(folder))? };
    let printed = compute(&wanted, None);
    write!(stdout, "\n{}", text::text(&printed)).context("print the plan")?;
    // What is wrong with each stands right above.
    let checks: Vec<Check> = printed.checks.into_iter().map(|check| Check { found: "see above".to_owned(), ..check }).collect();
    verdict(&study.file, &checks)
}

/// Prints numbers, script and checks. A check that failed decides the exit code; one of the recipe comes before all others.
pub fn plan(arguments: &PlanArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let changes = &arguments.recipe.changes;
    let study = cloze_recipes::load_study(&arguments.recipe.recipe, &changes.overrides, changes.profile.as_deref())?;
    let site = arguments.cluster.as_deref().map_or_else(|| Ok(Site::local()), cloze_recipes::load_site)?;
    let mut wanted = Wanted::new(&study, &site, arguments.folder.as_deref())?;
    wanted.offline = arguments.offline;
    wanted.site_file = arguments.cluster.as_deref();
    wanted.workers = arguments.workers.unwrap_or(wanted.workers);
    let printed = compute(&wanted, arguments.tokens_per_second);
    if arguments.json {
        writeln!(stdout, "{}", serde_json::to_string_pretty(&printed).context("encode the plan")?)
    } else {
        write!(stdout, "{}", text::text(&printed))
    }
    .context("print the plan")?;
    verdict(&arguments.recipe.recipe, &printed.checks)
}

/// Tokens a second; of none, or of no end, there is no time.
fn speed(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "expected a number".to_owned())?;
    if number.is_finite() && number > 0.0 { Ok(number) } else { Err("expected a number above 0".to_owned()) }
}

fn compute(wanted: &Wanted<'_>, tokens_per_second: Option<f64>) -> Printed {
    let mut checks = Vec::new();
    let model = checks::model(wanted, &mut checks);
    let data = checks::data(wanted, &mut checks);
    checks::evaluation(wanted, &mut checks);
    checks::places(wanted, &mut checks);
    checks::machines(wanted, &mut checks);
    checks.extend(job_time(wanted));
    let plan = model.map(|model| {
        let facts = facts::facts(wanted, tokens_per_second, model, data);
        let plan = RunPlan::new(&facts, steps(&facts));
        checks.push(check_memory(&facts, &plan.memory));
        checks.extend(wanted.trials.iter().flat_map(|trials| trials::memory_of_others(wanted, &trials.graph)));
        checks.push(check_time(&plan, &facts.machine));
        plan
    });
    let script = script::checked_script(wanted, &mut checks);
    let ok = checks.iter().all(|check| check.level != CheckLevel::Fail);
    let script_of = if wanted.trials.is_some() { "the first array of jobs" } else { "the first job" };
    Printed { ok, plan, checks, script, script_of }
}

/// Refuses a run, before it is submitted, that would not start: by its model, its prepared data, its memory and these checks, all told at
/// once.
pub(super) fn refuse(recipe: &Path, study: &Study, site: &Site, mut checks: Vec<Check>) -> Result<()> {
    let wanted = Wanted { offline: true, ..Wanted::new(study, site, None)? };
    checks.extend(job_time(&wanted));
    let model = checks::model(&wanted, &mut checks);
    if let Err(error) = check_data(&study.recipe) {
        checks.push(Check::error("prepared data", &error));
    }
    if let Some(model) = model {
        let facts = facts::facts(&wanted, None, model, DataFacts::Unknown);
        checks.push(check_memory(&facts, &RunPlan::new(&facts, steps(&facts)).memory));
    }
    // Model and data may both say that the tokenizer cannot be read.
    let mut told: Vec<Check> = Vec::new();
    for check in checks {
        if told.iter().all(|earlier| earlier.found != check.found) {
            told.push(check);
        }
    }
    verdict(recipe, &told).map(drop)
}

/// What is wrong with the time limit of the recipe at this site.
fn job_time(wanted: &Wanted<'_>) -> Option<Check> {
    let error = cloze_recipes::check_job_time(wanted.study, wanted.site).err()?;
    Some(Check::error("time limit", &error))
}

/// Steps of the run, where the recipe or prepared data says so.
fn steps(facts: &PlanFacts) -> Option<u64> {
    match (facts.data, facts.recipe.train.steps) {
        (DataFacts::Prepared { epoch_samples, .. }, _) => Some(total_steps(&facts.recipe.train, epoch_samples)),
        (_, steps) => steps,
    }
}

fn verdict(recipe: &Path, checks: &[Check]) -> Result<ExitCode> {
    let failed: Vec<&Check> = checks.iter().filter(|check| check.level == CheckLevel::Fail).collect();
    let kinds = || failed.iter().filter_map(|check| check.kind);
    let Some(kind) = kinds().find(|kind| *kind == FailureKind::Recipe).or_else(|| kinds().next()) else {
        return Ok(ExitCode::SUCCESS);
    };
    let names = failed.iter().map(|check| format!("{}: {}", check.name, check.found)).collect::<Vec<_>>().join("\n    ");
    let failure = Failure::new(kind, format!("{} of {} checks failed", failed.len(), checks.len())).at(recipe.display()).because(names);
    let hint = failed.iter().find(|check| check.kind == Some(kind)).and_then(|check| check.hint.clone());
    Err(hint.map_or(failure.clone(), |hint| failure.hint(hint)).into())
}
