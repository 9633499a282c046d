//! `cloze sweep status`: how the trials of a study are, from its files, and from the batch system or the hosts that have what is out.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Args;
use cloze_launcher::plan::duration;
use cloze_launcher::sweep::folder::{PlannedTrial, StudyFolder, SweepPlan};
use cloze_launcher::sweep::journal::read_records;
use cloze_launcher::sweep::lease::LeaseState;
use cloze_launcher::sweep::lock::{FileLock, last_holder};
use cloze_launcher::sweep::lost::{OutState, add_lost, add_told, queued};
use cloze_launcher::sweep::outlook::{is_over, newest_step, saved_step};
use cloze_launcher::sweep::record::{TrialRecord, TrialState};
use cloze_launcher::sweep::talk::counts_with_outs;
use cloze_launcher::sweep::text::status_table;
use serde::Serialize;
use serde_json::json;

/// Trials that are gone of which each is named with its reason.
const MAX_NAMED: usize = 20;

/// Arguments of `cloze sweep status`.
#[derive(Args)]
pub struct StatusArguments {
    /// Study folder
    pub folder: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Who controls a study.
#[derive(Debug, Serialize)]
struct Control {
    /// The controller that lives on a host whose locks are seen here: `process 7 of host`.
    controller: Option<String>,
    /// The newest controller in this folder.
    last_controller: Option<String>,
    /// Unix time at which that one began, in seconds.
    last_controller_began: Option<f64>,
    /// Unix time of the newest change of a trial's record that is known here, in seconds; controllers alone change them.
    last_change: Option<f64>,
    /// The lease of the study's journal in a bucket; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<LeaseState>,
    /// Why nobody could look at the lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    lease_unknown: Option<String>,
}

/// Prints how the trials are.
pub(super) fn status(arguments: &StatusArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let folder = StudyFolder::find(&arguments.folder)?;
    let (info, plan, now) = (folder.info()?, folder.plan()?, now()?);
    let mut records = records(&folder, &plan)?;
    let is_over = is_over(now, &plan, &records);
    let control = Control::of(&folder, &plan, (&records, now))?;
    let mut outs = queued(&folder, &plan, &records);
    let add = if control.may_live() { add_told } else { add_lost };
    let unasked = add(&folder, &plan, &records, &mut outs);
    for record in records.iter_mut().filter(|record| record.state == TrialState::Training) {
        record.step = record.step.max(step_of(&folder.run_path(&record.name), outs.get(&record.hash)));
    }
    if arguments.json {
        let trials: Vec<_> = records.iter().map(|record| TrialRecord { evaluation: None, ..record.clone() }).collect();
        let of = |is: fn(&OutState) -> bool| outs.iter().filter(|(_, out)| is(out)).map(|(hash, _)| hash).collect::<Vec<_>>();
        let gone: BTreeMap<&String, &String> =
            outs.iter().filter_map(|(hash, out)| if let OutState::Gone(how) = out { Some((hash, how)) } else { None }).collect();
        let text = json!({
            "name": info.name, "hash": info.hash, "controller": control.controller, "control": control, "over": is_over,
            "running": of(|out| *out == OutState::Running), "queued": of(OutState::waits), "ended": of(|out| *out == OutState::Ended), "gone": gone, "unasked": unasked, "trials": trials,
        });
        serde_json::to_writer_pretty(&mut *stdout, &text).context("print the status")?;
        writeln!(stdout).context("print the status")?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = status_table(&plan, &records, is_over, &outs);
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{}; {}", counts_with_outs(&records, is_over, &outs), control.text(now));
    let whom = if plan.hosts().is_some() { "a host" } else { "the batch system" };
    let doubt = if control.may_live() { "only wait in the queue" } else { "be gone" };
    if let Some(failure) = unasked {
        let _ = writeln!(text, "what is out may {doubt}: {whom} could not be asked ({})", failure.what);
    }
    text += &lost_text(&folder, &records, &outs);
    stdout.write_all(text.as_bytes()).context("print the status")?;
    Ok(ExitCode::SUCCESS)
}

/// The records of all trials, in the plan's order.
pub(super) fn records(folder: &StudyFolder, plan: &SweepPlan) -> Result<Vec<TrialRecord>> {
    let mut known = read_records(folder, plan)?;
    let of = |trial: &PlannedTrial| known.remove(&trial.hash).unwrap_or_else(|| TrialRecord::new(trial, plan.parent_hash(trial)));
    Ok(plan.trials.iter().map(of).collect())
}

/// Step of a trial that is out. Its record knows the newest saved one; what runs is further, and what waits goes on from what is saved.
fn step_of(run: &Path, out: Option<&OutState>) -> u64 {
    if out.is_some_and(OutState::waits) { saved_step(run) } else { newest_step(run) }
}

/// What is to be said of trials that are gone, and of those whose outcomes wait.
fn lost_text(folder: &StudyFolder, records: &[TrialRecord], outs: &BTreeMap<String, OutState>) -> String {
    let mut lines = Vec::new();
    let gone = records.iter().filter_map(|record| match outs.get(&record.hash) {
        Some(OutState::Gone(how)) => Some(format!("{} is gone: {how}", record.name)),
        _ => None,
    });
    let gone: Vec<String> = gone.collect();
    lines.extend(gone.iter().take(MAX_NAMED).cloned());
    if gone.len() > MAX_NAMED {
        lines.push(format!("and {} more", gone.len() - MAX_NAMED));
    }
    if outs.values().any(|out| matches!(out, OutState::Gone(_) | OutState::Ended)) {
        lines.push(format!("`cloze sweep resume {}` takes in what has ended, and goes on with the rest", folder.root().display()));
    }
    lines.into_iter().map(|line| line + "\n").collect()
}

impl Control {
    fn of(folder: &StudyFolder, plan: &SweepPlan, (records, now): (&[TrialRecord], f64)) -> Result<Self> {
        let controller = FileLock::holder(&folder.lock_path())?;
        let last = last_holder(&folder.lock_path())?;
        let began = last.as_ref().and_then(|(_, taken)| Some(taken.duration_since(UNIX_EPOCH).ok()?.as_secs_f64()));
        let looked = plan.journal.as_deref().map(|url| LeaseState::look(url, now));
        let (lease, lease_unknown) = match looked {
            None => (None, None),
            Some(Ok(state)) => (Some(state), None),
            Some(Err(error)) => (None, Some(format!("{error:#}").lines().next().unwrap_or_default().to_owned())),
        };
        let last_controller = last.map(|(holder, _)| holder);
        let last_change = records.iter().map(|record| record.updated).filter(|&updated| updated > 0.0).max_by(f64::total_cmp);
        Ok(Self { controller, last_controller, last_controller_began: began, last_change, lease, lease_unknown })
    }

    /// Whether a controller lives, or may live where nobody here can see it.
    fn may_live(&self) -> bool {
        self.controller.is_some() || self.lease_unknown.is_some() || self.lease.as_ref().is_some_and(LeaseState::may_live)
    }

    fn text(&self, now: f64) -> String {
        let ago = self.last_controller_began.map(|began| duration((now - began).max(0.0)));
        let wrote = self.last_change.filter(|&changed| self.last_controller_began.is_some_and(|began| changed >= began));
        let wrote = wrote.map_or_else(String::new, |changed| format!(" and wrote last {} ago", duration((now - changed).max(0.0))));
        let lock = match (&self.controller, &self.last_controller, ago) {
            (Some(holder), _, Some(ago)) => format!("controlled by {holder}, for {ago}"),
            (Some(holder), _, None) => format!("controlled by {holder}"),
            (None, Some(holder), Some(ago)) => format!("no controller lives here; the last one, {holder}, began {ago} ago{wrote}"),
            (None, ..) => "no controller lives here".to_owned(),
        };
        let lease = match (&self.lease, &self.lease_unknown) {
            (Some(state), _) => format!("; {state}"),
            (None, Some(reason)) => format!("; nobody knows who has the lease ({reason})"),
            (None, None) => String::new(),
        };
        lock + &lease
    }
}

/// Unix time, in seconds.
pub(super) fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH).context("read the time of day")?.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_controls_a_study_is_told_with_the_time() {
        let control = |controller: Option<&str>, last: Option<&str>, lease, unknown: Option<&str>| Control {
            controller: controller.map(str::to_owned),
            last_controller: last.map(str::to_owned),
            last_controller_began: last.map(|_| 1000.0),
            last_change: None,
            lease,
            lease_unknown: unknown.map(str::to_owned),
        };
        let over = || Some(LeaseState::Over { holder: "process 7 of a".to_owned(), renewed_s_ago: 400 });
        let held = || Some(LeaseState::Held { holder: "process 9 of b".to_owned(), renewed_s_ago: 3 });
        let lives = "controlled by process 7 of a, for 1 min 5 s";
        let died = "no controller lives here; the last one, process 7 of a, began 1 min 5 s ago";
        let cases = [
            (control(None, None, None, None), false, "no controller lives here".to_owned()),
            (control(Some("process 7 of a"), Some("process 7 of a"), None, None), true, lives.to_owned()),
            (control(None, Some("process 7 of a"), None, None), false, died.to_owned()),
            (
                control(None, Some("process 7 of a"), over(), None),
                false,
                format!("{died}; the lease of process 7 of a is over, since it was renewed 400 s ago and holds 300 s"),
            ),
            (control(None, None, held(), None), true, "no controller lives here; process 9 of b has the lease, renewed 3 s ago".to_owned()),
            (
                control(None, None, None, Some("no answer")),
                true,
                "no controller lives here; nobody knows who has the lease (no answer)".to_owned(),
            ),
        ];
        let wrote = |changed| Control { last_change: Some(changed), ..control(None, Some("process 7 of a"), None, None) };
        assert_eq!(wrote(1060.0).text(1065.0), format!("{died} and wrote last 5 s ago"));
        assert_eq!(wrote(900.0).text(1065.0), died, "that was one before it");
        for (control, may_live, text) in cases {
            assert_eq!((control.may_live(), control.text(1065.0)), (may_live, text));
        }
    }
}
