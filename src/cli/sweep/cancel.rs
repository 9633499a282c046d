//! `cloze sweep cancel`: by the live controller, in its place, or without the batch system that has what is out.

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use cloze_launcher::sweep::executor::Executor;
use cloze_launcher::sweep::folder::StudyFolder;
use cloze_launcher::sweep::lock::FileLock;
use cloze_launcher::sweep::open::OpenStudy;
use cloze_launcher::sweep::outlook::is_over;
use cloze_launcher::sweep::unreached::Unreached;
use cloze_launcher::words::{counted, is_or_are};
use cloze_recipes::failure::{Failure, FailureKind};

use super::machines::{cluster_name, of_hosts, of_queue};
use super::status::{now, records};
use super::{controller, controller_over};
use crate::cli::run::write_last_line;

/// Longest wait for the controller to leave, in seconds; its trials save first.
const CANCEL_WAIT_S: u64 = 600;

/// Interval at which the end of the controller is looked for.
const CANCEL_POLL_MS: u64 = 200;

/// Arguments of `cloze sweep cancel`.
#[derive(Args)]
pub struct CancelArguments {
    /// Study folder
    pub folder: PathBuf,
    /// Ask neither SLURM nor hosts: give up what is out in a cluster that cannot be reached, so that none of it begins any more, and name
    /// its jobs
    #[arg(long)]
    pub mark_only: bool,
}

/// Asks the live controller, or does it in its place.
pub(super) fn cancel(arguments: &CancelArguments) -> Result<ExitCode> {
    let folder = StudyFolder::find(&arguments.folder)?;
    let was_there = if let Some(holder) = FileLock::holder(&folder.lock_path())? {
        ask(&folder, &holder)?;
        true
    } else {
        let study = OpenStudy::open(folder.root(), None, None)?;
        let num_out = study.num_out();
        if arguments.mark_only {
            give_up(study)?;
        } else {
            take_off(study)?;
        }
        num_out > 0
    };
    let plan = folder.plan()?;
    let is_over = is_over(now()?, &plan, &records(&folder, &plan)?);
    write_last_line(&mut std::io::stderr(), &last_line(was_there, is_over, &folder.root().display().to_string()))?;
    Ok(ExitCode::SUCCESS)
}

/// What has become of a study, and what is left to do.
fn last_line(was_there: bool, is_over: bool, shown: &str) -> String {
    match (was_there, is_over) {
        (true, true) => format!("nothing is left to do; the table is that of: cloze sweep report {shown}"),
        (true, false) => format!("cancelled; go on with: cloze sweep resume {shown}"),
        (false, true) => "there is nothing to cancel: the study is over".to_owned(),
        (false, false) => format!("there is nothing to cancel: no trial is out; go on with: cloze sweep resume {shown}"),
    }
}

/// Asks a live controller and waits until it has left.
fn ask(folder: &StudyFolder, holder: &str) -> Result<()> {
    std::fs::write(folder.cancel_path(), "").with_context(|| format!("write {}", folder.cancel_path().display()))?;
    write_last_line(&mut std::io::stderr(), &format!("asked {holder}; its trials save and leave"))?;
    let deadline = Instant::now() + Duration::from_secs(CANCEL_WAIT_S);
    while FileLock::holder(&folder.lock_path())?.is_some() {
        if Instant::now() >= deadline {
            let failure = Failure::new(FailureKind::Run, "the controller does not leave").at(folder.root().display());
            return Err(failure.found(holder).into());
        }
        sleep(Duration::from_millis(CANCEL_POLL_MS));
    }
    Ok(())
}

/// Takes what is out off its machines, in the place of a controller. Where nothing is out, nobody has to be asked.
fn take_off(study: OpenStudy) -> Result<()> {
    if study.num_out() == 0 {
        return Ok(());
    }
    let cluster = cluster_name(&study.plan).map_err(|error| out_of_reach(error, &study))?;
    study.settle_in(cluster.as_deref())?;
    controller(study, false)?.cancel()?;
    Ok(())
}

/// Gives up what is out in a cluster that is not asked.
fn give_up(study: OpenStudy) -> Result<()> {
    let folder = study.journal.folder().clone();
    let is_queue = of_queue(study.plan.site.as_ref()).is_some();
    if !is_queue && of_hosts(study.plan.site.as_ref()).is_none() {
        return Err(Failure::new(FailureKind::Recipe, "the trials of this study are in no cluster")
            .at(folder.root().display())
            .hint("`cloze sweep cancel` without `--mark-only` ends them")
            .into());
    }
    let info = folder.info()?;
    let executor = Executor::Unreached(Box::new(Unreached::new(folder, info, study.place(), is_queue)));
    controller_over(study, executor, false)?.cancel()?;
    Ok(())
}

/// The failure of whoever finds no batch system here, where trials are out in one.
fn out_of_reach(error: anyhow::Error, study: &OpenStudy) -> anyhow::Error {
    match error.downcast::<Failure>() {
        Ok(failure) if failure.kind == FailureKind::Environment => {
            let (num_out, place, shown) = (study.num_out(), study.place(), study.journal.folder().root().display());
            failure
                .expected(format!("a host of {place}, where {} {} out", counted(num_out, "trial"), is_or_are(num_out)))
                .found("none; nothing was cancelled or changed")
                .hint(format!(
                    "give the same command on such a host; where there is none any more, `cloze sweep cancel {shown} --mark-only` gives up \
                     what is out there and names its jobs"
                ))
                .into()
        }
        Ok(failure) => failure.into(),
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_there_is_cancelled_and_only_what_is_not_over_goes_on() {
        for (was_there, is_over) in [(true, true), (true, false), (false, true), (false, false)] {
            let line = last_line(was_there, is_over, "/s");
            let words = ["cancelled", "nothing to cancel", "cloze sweep resume /s"].map(|word| line.contains(word));
            assert_eq!(words, [was_there && !is_over, !was_there, !is_over], "{line}");
        }
    }
}
