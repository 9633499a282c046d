//! `cloze plan`: what a run of a recipe will need, and everything that is wrong before it is started. It needs no GPU and starts nothing.

mod checks;
mod facts;
mod script;
mod text;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use cloze_data::batch::total_steps;
use cloze_launcher::plan::{Check, CheckLevel, DataFacts, PlanFacts, RunPlan, check_memory, check_time};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::Site;
use cloze_recipes::study::Study;
use serde::Serialize;

use super::arguments::RecipeArguments;

/// Arguments of `cloze plan`.
#[derive(Args)]
pub struct PlanArguments {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArguments,
    /// Cluster file; without, the run is planned for this machine
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<PathBuf>,
    /// Workers of the run [default: `resources.nodes` times `resources.workers_per_node`]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub workers: Option<u32>,
    /// Tokens that one worker trains on in a second, by `cloze bench` [default: from the cluster file]
    #[arg(long, value_name = "TOKENS")]
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
    /// The batch script of the run's first job.
    script: Option<String>,
}

/// What is planned.
struct Wanted<'a> {
    study: &'a Study,
    site: &'a Site,
    workers: u32,
    offline: bool,
}

/// Prints numbers, script and checks. A check that failed decides the exit code; one of the recipe comes before all others.
pub fn plan(arguments: &PlanArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let changes = &arguments.recipe.changes;
    let study = cloze_recipes::load_study(&arguments.recipe.recipe, &changes.overrides, changes.profile.as_deref())?;
    let site = arguments.cluster.as_deref().map_or_else(|| Ok(Site::local()), cloze_recipes::load_site)?;
    let workers = arguments.workers.unwrap_or_else(|| study.resources.nodes.saturating_mul(study.resources.workers_per_node));
    let wanted = Wanted { study: &study, site: &site, workers, offline: arguments.offline };
    let printed = compute(&wanted, arguments)?;
    if arguments.json {
        writeln!(stdout, "{}", serde_json::to_string_pretty(&printed).context("encode the plan")?)
    } else {
        write!(stdout, "{}", text::text(&printed))
    }
    .context("print the plan")?;
    verdict(&arguments.recipe.recipe, &printed.checks)
}

fn compute(wanted: &Wanted<'_>, arguments: &PlanArguments) -> Result<Printed> {
    let mut checks = Vec::new();
    let model = checks::model(wanted.study, &mut checks)?;
    let data = checks::data(wanted, &mut checks);
    checks::places(wanted, &mut checks);
    checks::machines(wanted, &mut checks);
    let plan = match model {
        Some((shape, vocab)) => {
            let facts = facts::facts(wanted, arguments, (shape, vocab), data)?;
            let plan = RunPlan::new(&facts, steps(&facts));
            checks.push(check_memory(&facts, &plan.memory));
            checks.push(check_time(&plan, &facts.machine));
            Some(plan)
        }
        None => None,
    };
    let script = match script::script(wanted) {
        Ok(script) => script,
        Err(error) => {
            checks.push(Check::error("batch script", &error));
            None
        }
    };
    let ok = checks.iter().all(|check| check.level != CheckLevel::Fail);
    Ok(Printed { ok, plan, checks, script })
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
