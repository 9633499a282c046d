//! The jobs of a run, as `cloze status` shows them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use cloze_recipes::failure::Failure;
use serde::Serialize;

use super::client::Slurm;
use super::job::{JobId, JobState, State};
use super::journal::{self, AttemptEvent, JobRecord, Role};
use super::paths::JobPaths;
use super::submission::{Submission, moved_to};
use super::verdict::Decision;
use crate::run_folder::RunPaths;

/// One job.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobView {
    /// Its name.
    pub name: String,
    /// Its number, once that is known.
    pub job: Option<JobId>,
    /// Why there is one.
    pub role: Role,
    /// What SLURM says of it; `None` where it has forgotten the job or could not be asked.
    pub state: Option<JobState>,
    /// Whether its submission was refused or came to nothing.
    pub is_dropped: bool,
    /// Its attempts, oldest first.
    pub attempts: Vec<AttemptView>,
}

/// One attempt of a job.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AttemptView {
    /// Its number over the whole run.
    pub attempt: u32,
    /// Its nodes.
    pub nodes: Vec<String>,
    /// What followed; `None` while it runs, and after it was killed.
    pub decision: Option<Decision>,
    /// Why.
    pub reason: Option<String>,
}

/// The jobs of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobsView {
    /// The jobs, oldest first.
    pub jobs: Vec<JobView>,
    /// Why SLURM could not be asked.
    pub unasked: Option<Failure>,
    /// Whether `cloze cancel` was called.
    pub is_cancelled: bool,
}

/// What is known of a run's jobs; `None` for a run without any. Where SLURM cannot be asked, what the run's folder says is shown.
pub fn view_jobs(run: &RunPaths) -> anyhow::Result<Option<JobsView>> {
    let paths = JobPaths::of(run);
    let Some(submission) = Submission::read(&paths)? else { return Ok(None) };
    let records = journal::jobs(journal::read(&paths.jobs())?);
    let attempts: Vec<AttemptEvent> = journal::read(&paths.attempts())?;
    let ids: Vec<JobId> = records.iter().filter_map(JobRecord::id_here).collect();
    let asked = submission.slurm().and_then(Slurm::find).and_then(|slurm| {
        match moved_to(&slurm, &submission, &records, &attempts)? {
            // All are over, in a cluster that nobody can ask from here.
            Some(_) => Ok(BTreeMap::new()),
            None => slurm.states(&ids),
        }
    });
    let (states, unasked) = match asked {
        Ok(states) => (states, None),
        Err(failure) => (BTreeMap::new(), Some(failure)),
    };
    let jobs = records.into_iter().map(|record| view_job(record, |job| states.get(&job).cloned(), &attempts)).collect();
    Ok(Some(JobsView { jobs, unasked, is_cancelled: paths.cancelled().exists() }))
}

fn view_job(record: JobRecord, state_of: impl Fn(JobId) -> Option<JobState>, events: &[AttemptEvent]) -> JobView {
    let mut attempts: Vec<AttemptView> = Vec::new();
    for event in events {
        match event {
            AttemptEvent::Started { attempt, job, nodes, .. } if record.job == Some(*job) => {
                attempts.push(AttemptView { attempt: *attempt, nodes: nodes.clone(), decision: None, reason: None });
            }
            AttemptEvent::Ended { attempt, decision, reason, .. } => {
                if let Some(view) = attempts.iter_mut().find(|view| view.attempt == *attempt) {
                    (view.decision, view.reason) = (Some(decision.clone()), Some(reason.clone()));
                }
            }
            AttemptEvent::Started { .. } => {}
        }
    }
    let state = record.id_here().and_then(state_of);
    JobView { name: record.name, job: record.job, role: record.role, state, is_dropped: record.is_dropped, attempts }
}

/// The jobs as lines of text.
pub fn jobs_text(view: &JobsView) -> String {
    // Writing to a String cannot fail.
    let mut text = String::new();
    if let Some(failure) = &view.unasked {
        let _ = writeln!(text, "jobs as the run's folder knows them; SLURM could not be asked: {}", failure.what);
    }
    if view.is_cancelled {
        text += "cancelled by `cloze cancel`\n";
    }
    for job in &view.jobs {
        text += &job_line(job);
        let runs = job.state.as_ref().is_some_and(|state| state.state == State::Running);
        for (place, attempt) in job.attempts.iter().enumerate() {
            let end = match (&attempt.decision, &attempt.reason) {
                (Some(decision), Some(reason)) => format!("{reason}; {decision}"),
                _ if runs && place + 1 == job.attempts.len() => "runs".to_owned(),
                _ => "no word of its end".to_owned(),
            };
            let _ = writeln!(text, "  attempt {} on {}: {end}", attempt.attempt, attempt.nodes.join(", "));
        }
    }
    text
}

fn job_line(job: &JobView) -> String {
    let number = match (job.job, job.is_dropped) {
        (Some(id), _) => format!("job {id}"),
        (None, true) => format!("no job {}", job.name),
        (None, false) => format!("job {}, whose submission was cut off", job.name),
    };
    let role = match job.role {
        Role::Asked => String::new(),
        Role::Successor { of } => format!(", if {of} fails"),
        Role::Replacement { of } => format!(", in the place of {of}"),
    };
    let Some(state) = &job.state else { return format!("{number}{role}\n") };
    let mut parts = vec![state.state.to_string()];
    parts.extend(state.exit.filter(|exit| (exit.code, exit.signal) != (0, 0)).map(|exit| exit.to_string()));
    parts.extend(state.elapsed_s.filter(|&seconds| seconds > 0).map(|seconds| format!("{seconds} s")));
    parts.extend(Some(&state.nodes).filter(|nodes| !nodes.is_empty()).cloned());
    parts.extend(state.reason.clone());
    format!("{number}{role}: {}\n", parts.join(" · "))
}

#[cfg(test)]
mod tests {
    use super::super::job::ExitStatus;
    use super::*;

    fn record(name: &str, job: Option<u64>, role: Role) -> JobRecord {
        let job = job.map(JobId::whole);
        JobRecord { name: name.to_owned(), role, exclude: Vec::new(), job, is_dropped: false, is_cancelled: false, is_elsewhere: false }
    }

    #[test]
    fn jobs_read_well() {
        let job = JobId::whole(7);
        let failed = JobState {
            exit: Some(ExitStatus { code: 9, signal: 0 }),
            elapsed_s: Some(61),
            nodes: "n[1-2]".to_owned(),
            ..JobState::new(State::Failed)
        };
        let waiting = JobState { reason: Some("Dependency".to_owned()), ..JobState::new(State::Pending) };
        let started = |attempt| AttemptEvent::Started {
            time: 1.0,
            attempt,
            job,
            name: String::new(),
            requeues: 0,
            nodes: vec!["n1".to_owned(), "n2".to_owned()],
        };
        let ended = AttemptEvent::Ended {
            time: 2.0,
            attempt: 1,
            job,
            decision: Decision::Requeue,
            reason: "the time limit is near".to_owned(),
            elapsed_s: 60,
            bad_nodes: Vec::new(),
            failure: None,
        };
        let attempts = [started(1), ended, started(2)];
        let states = |id: JobId| if id == job { Some(failed.clone()) } else { Some(waiting.clone()) };
        let records =
            [record("a", Some(7), Role::Asked), record("b", Some(8), Role::Successor { of: job }), record("c", None, Role::Asked)];
        let jobs = records.into_iter().map(|record| view_job(record, states, &attempts)).collect();
        assert_eq!(
            jobs_text(&JobsView { jobs, unasked: None, is_cancelled: true }),
            "cancelled by `cloze cancel`\n\
             job 7: failed · exit code 9 · 61 s · n[1-2]\n  \
             attempt 1 on n1, n2: the time limit is near; the job goes back into the queue\n  \
             attempt 2 on n1, n2: no word of its end\n\
             job 8, if 7 fails: pending · Dependency\n\
             job c, whose submission was cut off\n"
        );
    }
}
