//! `cloze sweep`: many runs of one recipe, from a preview to a table.

mod cancel;
mod elsewhere;
mod machines;
mod status;
mod visit;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use cloze_launcher::slurm::Programs;
use cloze_launcher::sweep::controller::{Controller, SweepEnd};
use cloze_launcher::sweep::executor::Executor;
use cloze_launcher::sweep::folder::{StudyFolder, SweepOptions, SweepPlan};
use cloze_launcher::sweep::graph::Graph;
use cloze_launcher::sweep::hosts::{Hosts, HostsOptions};
use cloze_launcher::sweep::local::Local;
use cloze_launcher::sweep::open::OpenStudy;
use cloze_launcher::sweep::outlook::{first_jobs_text, hosts_text};
use cloze_launcher::sweep::queue::{Queue, QueueOptions};
use cloze_launcher::sweep::record::{TrialRecord, TrialState};
use cloze_launcher::sweep::same_data::same_data_texts;
use cloze_launcher::sweep::share::Part;
use cloze_launcher::sweep::talk::{Talk, counts};
use cloze_launcher::sweep::text::{preview_text, status_table};
use cloze_launcher::sweep::work::{WorkOptions, work as work_on};
use cloze_launcher::words::{counted, is_or_are};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::{Site, SiteKind};
use cloze_recipes::study::Study;

use cancel::{CancelArguments, cancel};
use elsewhere::check_site;
use machines::{check_machines, of_hosts, of_queue};
use status::{StatusArguments, status};
use visit::{VisitArguments, visit};

use super::inputs::check_inputs;
use super::plan::refuse_large_trials;
use super::reproduce::report_study;
use super::run::write_last_line;
use super::worker_process::worker_binary;

/// Folder of studies that are given no folder.
pub(super) const STUDIES_FOLDER: &str = "studies";

/// Environment variable with the GPUs that a process may see.
const GPUS_VARIABLE: &str = "CUDA_VISIBLE_DEVICES";

/// Subcommands of `cloze sweep`.
#[derive(Subcommand)]
pub enum SweepCommand {
    /// Run every trial of a recipe's sweep, or go on with those of a study folder
    Run(RunArguments),
    /// Say how the trials of a study are
    Status(StatusArguments),
    /// Go on with a study, after its controller was stopped or killed
    Resume(ResumeArguments),
    /// Try failed trials again, and go on with the study
    Retry(RetryArguments),
    /// Let the trials of a study save and leave, and start no more
    Cancel(CancelArguments),
    /// Write the report of a study, and print its table
    Report(FolderArguments),
    /// Work on one element of a batch; the controller starts it
    #[command(hide = true)]
    Work(WorkArguments),
    /// Begin, stop or look at batches on this host; the controller starts it through a remote shell
    #[command(hide = true)]
    Visit(VisitArguments),
    /// Train one trial over all nodes of its element; what works on the element starts it
    #[command(hide = true)]
    Train(super::trial::TrainTrialArguments),
}

/// Arguments of `cloze sweep run`.
#[derive(Args)]
pub struct RunArguments {
    /// Recipe file
    pub recipe: PathBuf,
    /// What is asked for.
    #[command(flatten)]
    pub wish: WishArguments,
    /// List the trials and what they share, and start nothing
    #[arg(long)]
    pub preview: bool,
}

/// What a study is asked for, shared by `sweep run` and `reproduce`.
#[derive(Args)]
pub struct WishArguments {
    /// Profile of the recipe, such as `toy`
    #[arg(long)]
    pub profile: Option<String>,
    /// Change a value, as in `--set train.learning_rate=1e-4`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Cluster file: where trials run [default: on this machine]
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<PathBuf>,
    /// Study folder [default: studies/ and the recipe's name, in the cluster file's folder]
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// Bucket or folder that holds the trials' records too, so that another machine can go on; `s3://`, `gs://`, `az://`, `file://`
    #[arg(long, value_name = "URL")]
    pub journal: Option<String>,
    /// Print no progress
    #[arg(long, short)]
    pub quiet: bool,
}

/// Arguments of `cloze sweep resume`.
#[derive(Args)]
pub struct ResumeArguments {
    /// Study folder
    pub folder: PathBuf,
    /// Cluster file that takes the place of the one that the study was started with
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<PathBuf>,
    /// Bucket with the study's records; brings the study into a folder that does not have it
    #[arg(long, value_name = "URL")]
    pub journal: Option<String>,
    /// Print no progress
    #[arg(long, short)]
    pub quiet: bool,
}

/// Arguments of `cloze sweep retry`.
#[derive(Args)]
pub struct RetryArguments {
    /// Study folder
    pub folder: PathBuf,
    /// Names or hashes of failed trials [default: all that failed]
    pub trials: Vec<String>,
    /// Try all failed trials again
    #[arg(long, conflicts_with = "trials")]
    pub failed: bool,
    /// Cluster file that takes the place of the one that the study was started with
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<PathBuf>,
    /// Print no progress
    #[arg(long, short)]
    pub quiet: bool,
}

/// Arguments of `cloze sweep report`.
#[derive(Args)]
pub struct FolderArguments {
    /// Study folder
    pub folder: PathBuf,
}

/// Arguments of `cloze sweep work`.
#[derive(Args)]
pub struct WorkArguments {
    /// Study folder
    pub folder: PathBuf,
    /// Number of the batch
    #[arg(long)]
    pub batch: u32,
    /// Element of the batch [default: that of the array job that this is]
    #[arg(long)]
    pub element: Option<u32>,
    /// Place among the elements of this machine
    #[arg(long, default_value_t = 0)]
    pub place: u32,
    /// Number of elements that share this machine
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub of: u32,
    /// Cores that it may use
    #[arg(long)]
    pub cores: Option<u32>,
    /// This host, as the controller that has started this or has visited the host calls it
    #[arg(long)]
    pub host: Option<String>,
    /// The host was checked before
    #[arg(long)]
    pub checked: bool,
}

/// `cloze sweep`
pub fn sweep(command: &SweepCommand, stdout: &mut dyn Write) -> Result<ExitCode> {
    match command {
        SweepCommand::Run(arguments) => start(arguments, stdout),
        SweepCommand::Status(arguments) => status(arguments, stdout),
        SweepCommand::Resume(arguments) => finish(&resume(arguments)?, stdout),
        SweepCommand::Retry(arguments) => {
            let mut study = reopen(&arguments.folder, None, arguments.cluster.as_deref())?;
            let num_reset = study.retry(&arguments.trials)?;
            let line = format!("{} {} tried again", counted(num_reset, "trial"), is_or_are(num_reset));
            write_last_line(&mut std::io::stderr(), &line)?;
            finish(&drive(study, arguments.quiet)?, stdout)
        }
        SweepCommand::Cancel(arguments) => cancel(arguments),
        SweepCommand::Report(arguments) => {
            let folder = StudyFolder::find(&arguments.folder)?;
            report_study(folder.root(), stdout)?;
            // What is left of a study is reported as well.
            if folder.plan_path().is_file() {
                tell_same_data(&folder, &status::records(&folder, &folder.plan()?)?)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        SweepCommand::Work(arguments) => work(arguments),
        SweepCommand::Visit(arguments) => visit(arguments, stdout),
        SweepCommand::Train(arguments) => super::trial::train(arguments),
    }
}

fn resume(arguments: &ResumeArguments) -> Result<Driven> {
    let journal = arguments.journal.as_deref().map(absolute_url).transpose()?;
    drive(reopen(&arguments.folder, journal.as_deref(), arguments.cluster.as_deref())?, arguments.quiet)
}

/// Opens a study to go on with it, with another cluster file where one is named. Nothing of it changes before all is checked.
fn reopen(folder: &Path, journal: Option<&str>, cluster: Option<&Path>) -> Result<OpenStudy> {
    let site = cluster.map(cloze_recipes::load_site).transpose()?;
    let mut study = OpenStudy::open(folder, journal, site.as_ref())?;
    if let Some(site) = &site {
        check_site(&study, site)?;
    }
    let wanted = site.as_ref().or(study.plan.site.as_ref());
    let name = check_machines(&study.plan.resources, study.plan.pack, (wanted, cluster))?;
    study.check_in(name.as_deref())?;
    if let Some(site) = site {
        study.move_to(site)?;
    }
    study.settle_in(name.as_deref())?;
    Ok(study)
}

fn start(arguments: &RunArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let wish = &arguments.wish;
    let study = wish.study(&arguments.recipe)?;
    let site = wish.site()?;
    let folder = wish.folder_of(&study.recipe.name, site.as_ref());
    if arguments.preview {
        preview(&study, &folder, site.as_ref(), stdout)?;
        return Ok(ExitCode::SUCCESS);
    }
    finish(&run_study(&study, &folder, site, wish)?, stdout)
}

/// What a sweep has come to, and where.
pub(super) struct Driven {
    end: SweepEnd,
    plan: SweepPlan,
    /// The study folder.
    pub folder: PathBuf,
}

/// Runs a study to its end, or goes on with it.
pub(super) fn run_study(study: &Study, folder: &Path, site: Option<Site>, wish: &WishArguments) -> Result<Driven> {
    check_inputs(study, folder)?;
    if let Some(site) = &site {
        cloze_recipes::check_job_time(study, site)?;
    }
    refuse_large_trials(study, folder, site.as_ref())?;
    let pack = study.sweep.as_ref().map_or(1, |sweep| sweep.pack);
    let cluster = check_machines(&study.resources, pack, (site.as_ref(), wish.cluster.as_deref()))?;
    let options = SweepOptions { site, journal: wish.journal.as_deref().map(absolute_url).transpose()?, cluster };
    drive(OpenStudy::create(study, folder, options)?, wish.quiet)
}

/// A journal's place by a name that holds in every folder.
fn absolute_url(url: &str) -> Result<String> {
    if url.contains("://") {
        return Ok(url.to_owned());
    }
    Ok(std::path::absolute(url).context("find the current folder")?.display().to_string())
}

fn drive(study: OpenStudy, quiet: bool) -> Result<Driven> {
    let (plan, folder) = (study.plan.clone(), study.journal.folder().root().to_owned());
    let end = controller(study, quiet)?.run()?;
    Ok(Driven { end, plan, folder })
}

fn controller(study: OpenStudy, quiet: bool) -> Result<Controller> {
    let program = std::env::current_exe().context("find this program")?;
    let folder = study.journal.folder().clone();
    let executor = match of_queue(study.plan.site.as_ref()) {
        Some(site) => {
            let queue = Queue::new(QueueOptions {
                info: folder.info()?,
                // Jobs may start days later, when the programs have been built anew.
                program: Programs::keep_in(&folder.programs_path(), &program, &worker_binary()?)?.cloze,
                folder,
                resources: study.plan.resources.clone(),
                site: site.clone(),
                concurrency: (study.plan.concurrency, study.plan.pack),
            })?;
            Executor::Queue(Box::new(queue))
        }
        None => match of_hosts(study.plan.site.as_ref()) {
            Some(site) => {
                let (resources, concurrency) = (study.plan.resources.clone(), study.plan.concurrency);
                Executor::Hosts(Box::new(Hosts::new(HostsOptions { folder, program, resources, concurrency }, site)?))
            }
            None => Executor::Local(Local::new(folder, program, study.plan.concurrency)),
        },
    };
    controller_over(study, executor, quiet)
}

fn controller_over(study: OpenStudy, executor: Executor, quiet: bool) -> Result<Controller> {
    let interactive = std::io::stderr().is_terminal();
    Controller::new(study, executor, Talk::new(Box::new(std::io::stderr()), interactive, quiet))
}

/// The table, and how the sweep ended as an exit code.
fn finish(driven: &Driven, stdout: &mut dyn Write) -> Result<ExitCode> {
    driven.check()?;
    let table = status_table(&driven.plan, &driven.end.records, true, &BTreeMap::new());
    write!(stdout, "{table}").context("print the table")?;
    let shown = driven.folder.display();
    write_last_line(&mut std::io::stderr(), &format!("{}; study folder: {shown}", counts(&driven.end.records, true)))?;
    driven.warn()?;
    driven.check_trials()?;
    Ok(ExitCode::SUCCESS)
}

/// Warns of trials that cannot differ, as nobody knew before their data was prepared.
fn tell_same_data(folder: &StudyFolder, records: &[TrialRecord]) -> Result<()> {
    same_data_texts(folder, records).iter().try_for_each(|text| write_last_line(&mut std::io::stderr(), &format!("warning: {text}")))
}

impl Driven {
    /// Warns of what the outcome is to be read with.
    pub(super) fn warn(&self) -> Result<()> {
        tell_same_data(&StudyFolder::new(self.folder.clone()), &self.end.records)
    }

    /// Fails with kind `Interrupted` where somebody asked for an end.
    pub(super) fn check(&self) -> Result<(), Failure> {
        if !self.end.is_interrupted {
            return Ok(());
        }
        let shown = self.folder.display().to_string();
        let what = format!("the sweep was left: {}", counts(&self.end.records, false));
        Err(Failure::new(FailureKind::Interrupted, what).at(&shown).hint(format!("go on with: cloze sweep resume {shown}")))
    }

    /// Fails with kind `Run` where trials have failed.
    pub(super) fn check_trials(&self) -> Result<(), Failure> {
        let failed: Vec<&TrialRecord> = self.end.records.iter().filter(|record| record.state == TrialState::Failed).collect();
        let Some(first) = failed.first() else { return Ok(()) };
        let shown = self.folder.display().to_string();
        let what = format!("{} of {} trials failed", failed.len(), self.end.records.len());
        let cause = first.failure.as_ref().map_or_else(String::new, |failure| format!("{}: {}", first.name, failure.what));
        Err(Failure::new(FailureKind::Run, what)
            .at(&shown)
            .because(cause)
            .hint(format!("look at {shown}/jobs/{}.log; `cloze sweep retry {shown}` tries them again", first.name)))
    }
}

impl WishArguments {
    /// The study of a recipe file, with the profile and the changes that were asked for.
    pub(super) fn study(&self, recipe: &Path) -> Result<Study> {
        cloze_recipes::load_study(recipe, &self.overrides, self.profile.as_deref())
    }

    /// The site of the cluster file.
    pub(super) fn site(&self) -> Result<Option<Site>> {
        self.cluster.as_deref().map(cloze_recipes::load_site).transpose()
    }

    /// The study folder: what was asked for, or one by the name of the study and the profile.
    pub(super) fn folder_of(&self, name: &str, site: Option<&Site>) -> PathBuf {
        self.folder.clone().unwrap_or_else(|| study_folder(name, self.profile.as_deref(), site))
    }
}

/// The folder of a study that is given none: by the name of the study and the profile, in the site's folder.
pub(super) fn study_folder(name: &str, profile: Option<&str>, site: Option<&Site>) -> PathBuf {
    let profile = profile.map_or_else(String::new, |profile| format!("-{profile}"));
    let root = site.and_then(|site| site.folder.clone()).unwrap_or_default();
    root.join(STUDIES_FOLDER).join(format!("{name}{profile}"))
}

/// Prints the trials of a study, what they share, and the jobs that they become first at this site.
pub(super) fn preview(study: &Study, folder: &Path, site: Option<&Site>, stdout: &mut dyn Write) -> Result<()> {
    let root = std::path::absolute(folder).context("find the current folder")?;
    let graph = Graph::new(study.trials(&root)?)?;
    let plan = SweepPlan::new(study, &graph, SweepOptions::default());
    write!(stdout, "{}", preview_text(&graph, &plan)).context("print the preview")?;
    let at_first = match site.map(|site| &site.kind) {
        Some(SiteKind::Slurm(_)) => first_jobs_text(&plan),
        Some(SiteKind::Ssh(ssh)) => hosts_text(&plan, ssh),
        Some(SiteKind::Local) | None => return Ok(()),
    };
    writeln!(stdout, "{at_first}").context("print the preview")
}

fn work(arguments: &WorkArguments) -> Result<ExitCode> {
    let element = match arguments.element {
        Some(element) => element,
        None => cloze_launcher::slurm::array_element()?,
    };
    let told = work_on(&WorkOptions {
        folder: arguments.folder.clone(),
        batch: arguments.batch,
        element,
        part: Part { place: arguments.place, of: arguments.of },
        program: std::env::current_exe().context("find this program")?,
        gpus: std::env::var(GPUS_VARIABLE).ok(),
        cores: arguments.cores,
        host: arguments.host.clone(),
        is_checked: arguments.checked,
    })?;
    for name in told {
        let line = format!("nothing is left to do here: the outcome of {name} is told already, and the sweep goes on with it");
        write_last_line(&mut std::io::stderr(), &line)?;
    }
    Ok(ExitCode::SUCCESS)
}
