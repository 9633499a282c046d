//! `cloze submit`: a run that jobs of a batch system bring to its end; and `cloze resume` for such a run.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use cloze_cluster::protocol::build_name;
use cloze_launcher::plan::{Check, CheckLevel};
use cloze_launcher::run_folder::{read_info, read_recipe};
use cloze_launcher::slurm::{
    JobId, JobPaths, Jobs, Programs, Role, SUBMIT_SETTLED_S, Slurm, Submission, Wanted, unmark_cancelled, view_jobs,
};
use cloze_launcher::view::{EventLog, RunState};
use cloze_launcher::{NewRun, RunFolder, RunPaths};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use cloze_recipes::site::{Site, SiteKind, SlurmSite};
use cloze_recipes::study::{Resources, Study};

use super::arguments::{RecipeArguments, ResumeArguments};
use super::operation::operated;
use super::partition;
use super::plan::refuse;
use super::run::{RUNS_FOLDER, check_data, check_inputs, split, write_last_line};
use super::worker_process::worker_binary;

/// Stands for what only a submission knows, where a script is only shown.
const NOT_YET: &str = "DRY-RUN";

/// Arguments of `cloze submit`.
#[derive(Args)]
pub struct SubmitArguments {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArguments,
    /// Cluster file
    #[arg(long, value_name = "FILE")]
    pub cluster: PathBuf,
    /// Run folder, which all nodes see under the same path [default: runs/ and the recipe's name, in the cluster's folder]
    #[arg(long)]
    pub run: Option<PathBuf>,
    /// Nodes of each job, instead of `resources.nodes`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub nodes: Option<u32>,
    /// Check everything, print the batch script, and submit nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// What is to be submitted, checked.
struct Request {
    recipe: Recipe,
    resources: Resources,
    site: Site,
    slurm: Slurm,
    data_fingerprint: String,
    /// The run folder, absolute.
    folder: PathBuf,
}

/// Submits a run: a job, and a second one that waits for the first to fail.
pub fn submit(arguments: &SubmitArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let request = Request::check(arguments)?;
    if arguments.dry_run {
        request.check_folder()?;
        write!(stdout, "{}", request.preview()?).context("print the batch script")?;
        return Ok(ExitCode::SUCCESS);
    }
    let run = request.open_run()?;
    let paths = JobPaths::of(&run);
    let mut jobs = Jobs::open_here(&request.slurm, &run)?;
    refuse_living(&mut jobs, &run)?;
    let submission = request.submission(&paths)?;
    fs::copy(&arguments.cluster, paths.cluster()).with_context(|| format!("copy the cluster file to {}", paths.cluster().display()))?;
    unmark_cancelled(&paths)?;
    submission.write(&paths)?;
    let job = submit_both(&mut jobs, &submission, &run)?;
    tell(&run, job, stdout)
}

/// Submits a run again that jobs brought this far; `None` for a run without jobs.
pub fn resume(arguments: &ResumeArguments, stdout: &mut dyn Write) -> Result<Option<ExitCode>> {
    let run = RunPaths::find(&arguments.run)?;
    let paths = JobPaths::of(&run);
    let Some(before) = Submission::read(&paths)? else { return Ok(None) };
    if arguments.here {
        refuse_living(&mut Jobs::open_here(&Slurm::find(before.slurm()?)?, &run)?, &run)?;
        return Ok(None);
    }
    if arguments.workers.workers.is_some() || arguments.workers.local.is_some() || !arguments.hosts.hosts.is_empty() {
        return Err(Failure::new(FailureKind::Recipe, "the jobs of this run say how many workers it has, and where")
            .at(run.root().display())
            .hint("`--here` resumes it on this machine instead")
            .into());
    }
    let slurm = Slurm::find(before.slurm()?)?;
    let mut jobs = Jobs::open_here(&slurm, &run)?;
    // What a job would meet at once is found here.
    let info = read_info(&run)?;
    let kept = read_recipe(&run, &info)?;
    let recipe = if arguments.overrides.is_empty() { kept } else { operated(&run, &info, &arguments.overrides)? };
    check_inputs(&recipe)?;
    if let Some(failure) = too_few_workers(&recipe, &before.resources) {
        return Err(failure.at(run.recipe().display()).into());
    }
    let cluster = paths.cluster();
    check_partition(&slurm, partition::Request { resources: &before.resources, site: before.slurm()?, file: Some(&cluster) })?;
    refuse_living(&mut jobs, &run)?;
    if let Some(step) = finished_at(&run)? {
        let line = format!("the run is finished at step {step}: no job is submitted");
        write_last_line(&mut std::io::stderr(), &line)?;
        return Ok(Some(ExitCode::SUCCESS));
    }
    if !arguments.overrides.is_empty() {
        let (folder, _) = RunFolder::open(&arguments.run)?;
        folder.keep_recipe(&recipe)?;
    }
    let survives_node_loss = survives_node_loss(&recipe, &before.resources);
    let cluster = slurm.cluster_name().or(before.cluster);
    let submission = Submission { programs: keep_programs(&paths)?, cluster, survives_node_loss, ..before };
    unmark_cancelled(&paths)?;
    submission.write(&paths)?;
    let job = submit_both(&mut jobs, &submission, &run)?;
    tell(&run, job, stdout).map(Some)
}

/// The last step of a run that has nothing left to do.
pub(super) fn finished_at(run: &RunPaths) -> Result<Option<u64>> {
    if !run.events().exists() {
        return Ok(None);
    }
    let mut log = EventLog::of_run(run.root());
    log.read_new()?;
    let view = log.into_view();
    Ok((view.state == RunState::Finished).then_some(view.progress.step))
}

impl Request {
    /// Checks everything that can be wrong before anything is written.
    fn check(arguments: &SubmitArguments) -> Result<Self> {
        let changes = &arguments.recipe.changes;
        let recipe_file = &arguments.recipe.recipe;
        let mut study = cloze_recipes::load_study(recipe_file, &changes.overrides, changes.profile.as_deref())?;
        refuse_studies(&study)?;
        let site = cloze_recipes::load_site(&arguments.cluster)?;
        let slurm_site = slurm_of(&site)?;
        study.resources.nodes = arguments.nodes.unwrap_or(study.resources.nodes);
        let slurm = Slurm::find(slurm_site);
        let wanted = partition::Request { resources: &study.resources, site: slurm_site, file: Some(&arguments.cluster) };
        let mut checks = wanted.checks(slurm.as_ref());
        let warnings: Vec<Check> = checks.iter().filter(|check| check.level == CheckLevel::Warn).cloned().collect();
        checks.extend(worker_binary().err().map(|error| Check::error("worker binary", &error)));
        checks.extend(too_few_workers(&study.recipe, &study.resources).map(|failure| Check::fail("workers", &failure)));
        refuse(recipe_file, &study, &site, checks)?;
        for warning in warnings {
            let hint = warning.hint.unwrap_or_default();
            write_last_line(&mut std::io::stderr(), &format!("warning: {}; {hint}", warning.found))?;
        }
        let (slurm, dataset) = (slurm?, check_data(&study.recipe)?);
        let Study { recipe, resources, .. } = study;
        let folder = arguments.run.clone().unwrap_or_else(|| {
            let root = site.folder.clone().unwrap_or_default();
            root.join(RUNS_FOLDER).join(&recipe.name)
        });
        let folder = std::path::absolute(&folder).context("find the run folder")?;
        let data_fingerprint = dataset.manifest().fingerprint();
        Ok(Self { recipe, resources, site, slurm, data_fingerprint, folder })
    }

    /// The script as it would be; names and hashes that only a submission knows are left open.
    fn preview(&self) -> Result<String> {
        let paths = RunPaths::new(self.folder.clone());
        let bin = JobPaths::of(&paths).programs().join(NOT_YET);
        let programs = Programs { cloze: bin.join("cloze"), worker: bin.join("cloze-worker"), hash: String::new() };
        let submission = Submission { key: NOT_YET.to_owned(), ..self.with_programs(programs)? };
        let name = split(&self.folder)?.1;
        let wanted = Wanted { name: submission.job_name(&name, 1), role: Role::Asked, exclude: Vec::new() };
        Ok(submission.script(&paths, &wanted, self.slurm.version())?)
    }

    /// Fails where the run's folder is not free for this run, as [`Request::open_run`] and [`refuse_living`] do, and makes nothing.
    fn check_folder(&self) -> Result<()> {
        let Err(error) = RunFolder::check_free(&self.folder) else { return Ok(()) };
        let run = self.never_started().ok_or(error)?;
        let Some(view) = view_jobs(&run)? else { return Ok(()) };
        if let Some(failure) = view.unasked {
            return Err(failure.into());
        }
        let states = view.jobs.iter().filter_map(|job| Some((job.job?, job.state.as_ref()?.state)));
        let living: Vec<String> = states.filter(|(_, state)| !state.is_end()).map(|(job, state)| format!("job {job}, {state}")).collect();
        if living.is_empty() { Ok(()) } else { Err(has_living(&run, &living).into()) }
    }

    /// Makes the run's folder. One whose submission came to nothing before serves as well, if it is of the same recipe and data.
    fn open_run(&self) -> Result<RunPaths> {
        let (root, name) = split(&self.folder)?;
        let new = NewRun {
            name: &name,
            recipe: &self.recipe,
            data_fingerprint: self.data_fingerprint.clone(),
            command_line: std::env::args().collect(),
            worker_build: build_name(),
        };
        match RunFolder::create(&root, &new) {
            // The lock is let go of: the job may start before this command is done.
            Ok(run) => Ok(run.paths().clone()),
            Err(error) => self.never_started().ok_or(error),
        }
    }

    /// The folder, if it holds this very run and no worker has ever been started for it.
    fn never_started(&self) -> Option<RunPaths> {
        let paths = RunPaths::find(&self.folder).ok()?;
        let info = read_info(&paths).ok()?;
        let is_same =
            read_recipe(&paths, &info).ok()?.full_hash() == self.recipe.full_hash() && info.data_fingerprint == self.data_fingerprint;
        (is_same && !paths.events().exists()).then_some(paths)
    }

    /// What the jobs of the run will have in common, with the programs of today. The names of its jobs keep their key.
    fn submission(&self, paths: &JobPaths) -> Result<Submission> {
        let new = self.with_programs(keep_programs(paths)?)?;
        Ok(match Submission::read(paths)? {
            Some(before) => Submission { key: before.key, ..new },
            None => new,
        })
    }

    fn with_programs(&self, programs: Programs) -> Result<Submission> {
        let survives = survives_node_loss(&self.recipe, &self.resources);
        let new = Submission::new(self.site.clone(), self.resources.clone(), programs, survives)?;
        Ok(Submission { cluster: self.slurm.cluster_name(), ..new })
    }
}

/// Whether SLURM lets a job go on that has lost one of its nodes.
fn survives_node_loss(recipe: &Recipe, resources: &Resources) -> bool {
    recipe.cluster.min_workers.is_some() && resources.nodes > 1
}

fn keep_programs(paths: &JobPaths) -> Result<Programs> {
    let cloze = std::env::current_exe().context("find this program")?;
    Programs::keep(paths, &cloze, &worker_binary()?)
}

/// The job, and the one that goes on if it fails. Without the second the run is submitted all the same.
fn submit_both(jobs: &mut Jobs<'_>, submission: &Submission, run: &RunPaths) -> Result<JobId> {
    let name = read_info(run)?.name;
    let job = jobs.submit(submission, &name, Role::Asked, &[])?;
    if submission.slurm()?.max_jobs > 1
        && let Err(error) = jobs.submit(submission, &name, Role::Successor { of: job }, &[])
    {
        let line = format!("warning: no job waits for job {job} to fail: {}", super::error_text(&error));
        write_last_line(&mut std::io::stderr(), &line)?;
    }
    Ok(job)
}

fn tell(run: &RunPaths, job: JobId, stdout: &mut dyn Write) -> Result<ExitCode> {
    let shown = run.root().display();
    let line =
        format!("job {job} is submitted; run folder: {shown}\nnext: cloze status {shown}, cloze logs {shown} -f, cloze cancel {shown}");
    write_last_line(&mut std::io::stderr(), &line)?;
    writeln!(stdout, "{job}").context("print the job")?;
    Ok(ExitCode::SUCCESS)
}

fn slurm_of(site: &Site) -> Result<&SlurmSite, Failure> {
    match &site.kind {
        SiteKind::Slurm(slurm) => Ok(slurm),
        SiteKind::Local | SiteKind::Ssh(_) => Err(Failure::new(FailureKind::Recipe, "this cluster has no batch system")
            .at(&site.name)
            .expected("`kind: slurm` in the cluster file")
            .hint("`cloze train` runs the recipe on this machine, and with `--hosts` on others")),
    }
}

/// A recipe of many runs, or of a run after another one, is no single run.
fn refuse_studies(study: &Study) -> Result<(), Failure> {
    let what = match (&study.sweep, &study.after) {
        (Some(_), _) => "this recipe is a sweep of many runs",
        (None, Some(_)) => "this recipe starts from an earlier stage",
        (None, None) => return Ok(()),
    };
    Err(Failure::new(FailureKind::Recipe, what).at(study.file.display()).hint("`cloze sweep run` submits all runs that it needs"))
}

fn too_few_workers(recipe: &Recipe, resources: &Resources) -> Option<Failure> {
    let Resources { nodes, workers_per_node, .. } = *resources;
    let workers = nodes.saturating_mul(workers_per_node);
    let min_workers = recipe.cluster.min_workers.filter(|&min_workers| min_workers > workers)?;
    let failure = Failure::new(FailureKind::Recipe, "the run has fewer workers than its recipe needs");
    let failure = failure.expected(format!("at least {min_workers} workers (`cluster.min_workers`)"));
    Some(failure.found(format!("{workers}, on {nodes} nodes (`resources`)")))
}

/// Refuses what the partition cannot give, and says what it cannot give at present.
pub(super) fn check_partition(slurm: &Slurm, request: partition::Request<'_>) -> Result<()> {
    if let Some(shortage) = request.refuse_misfits(slurm)? {
        write_last_line(&mut std::io::stderr(), &format!("warning: {shortage}"))?;
    }
    Ok(())
}

/// A run has one job at a time, and one that waits for it. What an earlier submission has left open is settled first.
fn refuse_living(jobs: &mut Jobs<'_>, run: &RunPaths) -> Result<()> {
    for name in jobs.open_names() {
        let line = format!("job {name}, whose submission was cut off, is looked for, for up to {SUBMIT_SETTLED_S} s");
        write_last_line(&mut std::io::stderr(), &line)?;
    }
    jobs.settle()?;
    let living = jobs.living()?;
    if living.is_empty() {
        return Ok(());
    }
    let shown: Vec<String> = living.iter().map(|(id, job)| format!("job {id}, {}", job.state)).collect();
    Err(has_living(run, &shown).into())
}

fn has_living(run: &RunPaths, shown: &[String]) -> Failure {
    let folder: &Path = run.root();
    Failure::new(FailureKind::Run, "this run has jobs that are not over")
        .at(folder.display())
        .found(shown.join("; "))
        .hint(format!("`cloze status {0}` shows them, `cloze cancel {0}` cancels them", folder.display()))
}
