//! What the controller of a sweep does next, purely: state and limits in, actions and a reason out.

use std::fmt;

use cloze_recipes::failure::FailureKind;

use super::ladder::{Climber, Ladder};
use super::record::{Rung, TrialState};

/// Bounds of a sweep.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Trials that are out at the same time, at most.
    pub concurrency: usize,
    /// Failed attempts in a row without a new step, after which a trial has failed.
    pub max_fruitless_attempts: u32,
    /// Wait before the second attempt, in seconds; it doubles with each further one.
    pub backoff_s: f64,
    /// Longest wait between two attempts, in seconds.
    pub backoff_max_s: f64,
    /// Stops trials that fall behind.
    pub ladder: Option<Ladder>,
}

/// A trial as decisions see it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrialStatus {
    /// Index of the earlier stage.
    pub parent: Option<usize>,
    /// Whether the ladder may stop it: the sweep asks for it, and nothing starts from it.
    pub climbs: bool,
    /// How far it is.
    pub state: TrialState,
    /// Failed attempts in a row that brought no new step.
    pub fruitless_attempts: u32,
    /// Unix time before which it is not tried again, in seconds.
    pub retry_at: Option<f64>,
    /// Rungs that it has reached.
    pub rungs: Vec<Rung>,
}

/// All trials, earlier stages before those that start from them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SweepState {
    /// The trials.
    pub trials: Vec<TrialStatus>,
    /// Somebody asked for an end: nothing is started any more.
    pub is_draining: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Hand a trial out.
    Start {
        /// The trial.
        trial: usize,
        /// Step at which it pauses; `None` trains to the end.
        until_step: Option<u64>,
    },
    /// Mark a trial as failed, since its earlier stage did.
    FailWithParent {
        /// The trial.
        trial: usize,
        /// The earlier stage.
        parent: usize,
    },
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reason {
    /// There is room for trials that can start.
    Starting,
    /// As many trials are out as may be.
    AllOut,
    /// Trials wait for those that are out: for their stage, or for others of their rung.
    WaitingForOthers,
    /// Trials wait for their next attempt.
    WaitingToRetry {
        /// Unix time of the first, in seconds.
        at: f64,
    },
    /// An end was asked for, and trials are still out.
    Draining,
    /// Nothing is out, and nothing is left to start.
    Over,
}

impl Reason {
    /// Whether the controller can leave.
    pub fn is_over(self) -> bool {
        self == Self::Over
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting => f.write_str("there is room for the next trials"),
            Self::AllOut => f.write_str("as many trials are out as may be"),
            Self::WaitingForOthers => f.write_str("the rest waits for the trials that are out"),
            Self::WaitingToRetry { .. } => f.write_str("failed trials wait for their next attempt"),
            Self::Draining => f.write_str("the trials that are out save and leave"),
            Self::Over => f.write_str("nothing is left to do"),
        }
    }
}

/// What is to be done now, and why nothing more.
pub fn decide(now: f64, state: &SweepState, limits: &Limits) -> (Vec<Action>, Reason) {
    let num_out = state.trials.iter().filter(|trial| trial.state == TrialState::Training).count();
    if state.is_draining {
        return (Vec::new(), if num_out == 0 { Reason::Over } else { Reason::Draining });
    }
    let orphans = orphans(state);
    if !orphans.is_empty() {
        return (orphans, Reason::Starting);
    }
    let mut startable = startable(now, state, limits);
    let next_retry = next_retry(now, state, limits);
    let closed = num_out == 0 && startable.is_empty() && next_retry.is_none();
    let mut wanted = promoted(state, limits, closed);
    wanted.append(&mut startable);
    let room = limits.concurrency.saturating_sub(num_out);
    let num_wanted = wanted.len();
    let starts: Vec<Action> =
        wanted.into_iter().take(room).map(|trial| Action::Start { trial, until_step: goal(&state.trials[trial], limits) }).collect();
    let reason = match next_retry {
        _ if !starts.is_empty() => Reason::Starting,
        _ if num_wanted > 0 => Reason::AllOut,
        _ if num_out > 0 => Reason::WaitingForOthers,
        Some(at) => Reason::WaitingToRetry { at },
        None => Reason::Over,
    };
    (starts, reason)
}

/// Trials whose earlier stage has failed.
fn orphans(state: &SweepState) -> Vec<Action> {
    let orphan = |(trial, status): (usize, &TrialStatus)| {
        let parent = status.parent?;
        let is_open = matches!(status.state, TrialState::Waiting | TrialState::StoppedEarly);
        let is_orphan = is_open && state.trials[parent].state == TrialState::Failed;
        is_orphan.then_some(Action::FailWithParent { trial, parent })
    };
    state.trials.iter().enumerate().filter_map(orphan).collect()
}

fn has_its_stage(state: &SweepState, status: &TrialStatus) -> bool {
    status.parent.is_none_or(|parent| state.trials[parent].state == TrialState::Done)
}

/// Whether a trial waits for its next attempt. A time farther off than any wait is that of another host's clock, whose controller was the
/// one before, and is not waited for.
fn is_waited_for(now: f64, at: f64, limits: &Limits) -> bool {
    at > now && at <= now + limits.backoff_max_s
}

fn startable(now: f64, state: &SweepState, limits: &Limits) -> Vec<usize> {
    let is_startable = |status: &TrialStatus| {
        let is_open = matches!(status.state, TrialState::Waiting | TrialState::Trained);
        is_open && status.retry_at.is_none_or(|at| !is_waited_for(now, at, limits)) && has_its_stage(state, status)
    };
    (0..state.trials.len()).filter(|&trial| is_startable(&state.trials[trial])).collect()
}

fn next_retry(now: f64, state: &SweepState, limits: &Limits) -> Option<f64> {
    let waiting = state.trials.iter().filter(|status| matches!(status.state, TrialState::Waiting | TrialState::Trained));
    waiting.filter_map(|status| status.retry_at).filter(|&at| is_waited_for(now, at, limits)).min_by(f64::total_cmp)
}

fn promoted(state: &SweepState, limits: &Limits, closed: bool) -> Vec<usize> {
    let Some(ladder) = &limits.ladder else { return Vec::new() };
    let climbers: Vec<Climber<'_>> = state
        .trials
        .iter()
        .map(|status| Climber {
            // One that failed leaves its place to the next.
            rungs: if status.climbs && status.state != TrialState::Failed { &status.rungs } else { &[] },
            is_waiting: status.state == TrialState::StoppedEarly,
        })
        .collect();
    // A trial that has ended above the last rung that it reached leaves nothing to be closed.
    let has_winner = state.trials.iter().any(|status| status.climbs && status.state == TrialState::Done);
    ladder.promotable(&climbers, closed && !has_winner)
}

/// Step at which a trial pauses next.
fn goal(status: &TrialStatus, limits: &Limits) -> Option<u64> {
    let ladder = limits.ladder.as_ref().filter(|_| status.climbs)?;
    Some(ladder.step(status.rungs.len()))
}

/// How an attempt has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailedAttempt {
    /// The kind of its failure.
    pub kind: FailureKind,
    /// Whether it saved a newer step than the attempts before it.
    pub made_progress: bool,
    /// Failed attempts in a row without a new step, before this one.
    pub fruitless_before: u32,
}

/// What becomes of a trial after a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    /// It is tried again from this Unix time on, in seconds.
    Retry {
        /// The time.
        at: f64,
        /// Failed attempts in a row without a new step.
        fruitless: u32,
    },
    /// It has failed.
    Fail,
}

/// Whether another attempt can help: what a machine, a store or a stop did may pass, what a recipe or its data says will not.
pub fn is_transient(kind: FailureKind) -> bool {
    match kind {
        FailureKind::Environment | FailureKind::Storage | FailureKind::Run | FailureKind::Interrupted => true,
        FailureKind::Recipe | FailureKind::Input | FailureKind::Damaged | FailureKind::Mismatch => false,
    }
}

/// Decides about a trial after a failed attempt.
pub fn after_failure(now: f64, attempt: FailedAttempt, limits: &Limits) -> Fate {
    if !is_transient(attempt.kind) {
        return Fate::Fail;
    }
    let fruitless = if attempt.made_progress { 0 } else { attempt.fruitless_before + 1 };
    if fruitless >= limits.max_fruitless_attempts {
        return Fate::Fail;
    }
    // A stop that saved something, as at a job's time limit, is no fault.
    let exempt = attempt.kind == FailureKind::Interrupted && attempt.made_progress;
    let doublings = fruitless.saturating_sub(1).min(31);
    let wait_s = if exempt { 0.0 } else { (limits.backoff_s * f64::from(1_u32 << doublings)).min(limits.backoff_max_s) };
    Fate::Retry { at: now + wait_s, fruitless }
}

#[cfg(test)]
mod tests {
    use TrialState::{Done, Failed, StoppedEarly, Training, Waiting};

    use super::*;

    fn limits() -> Limits {
        Limits { concurrency: 2, max_fruitless_attempts: 3, backoff_s: 2.0, backoff_max_s: 60.0, ladder: None }
    }

    fn status(state: TrialState) -> TrialStatus {
        TrialStatus { climbs: true, state, ..TrialStatus::default() }
    }

    fn state(trials: Vec<TrialStatus>) -> SweepState {
        SweepState { trials, is_draining: false }
    }

    fn start(trial: usize) -> Action {
        Action::Start { trial, until_step: None }
    }

    #[test]
    fn trials_start_while_there_is_room() {
        let cases = [
            ("empty", vec![], vec![], Reason::Over),
            ("three wait", vec![Waiting, Waiting, Waiting], vec![start(0), start(1)], Reason::Starting),
            ("one is out", vec![Training, Waiting, Waiting], vec![start(1)], Reason::Starting),
            ("two are out", vec![Training, Training, Waiting], vec![], Reason::AllOut),
            ("the last is out", vec![Done, Training, Failed], vec![], Reason::WaitingForOthers),
            ("all ended", vec![Done, Failed, StoppedEarly], vec![], Reason::Over),
        ];
        for (name, states, actions, reason) in cases {
            let trials = states.into_iter().map(status).collect();
            assert_eq!(decide(0.0, &state(trials), &limits()), (actions, reason), "{name}");
        }
    }

    #[test]
    fn a_stage_comes_first_and_is_shared() {
        let after = |state| TrialStatus { parent: Some(0), ..status(state) };
        let stage = |state| TrialStatus { climbs: false, ..status(state) };
        let of = |first, second, third| state(vec![stage(first), after(second), after(third)]);
        assert_eq!(decide(0.0, &of(Waiting, Waiting, Waiting), &limits()), (vec![start(0)], Reason::Starting));
        assert_eq!(decide(0.0, &of(Training, Waiting, Waiting), &limits()), (vec![], Reason::WaitingForOthers));
        assert_eq!(decide(0.0, &of(Done, Waiting, Waiting), &limits()), (vec![start(1), start(2)], Reason::Starting));
        let failing = [1, 2].map(|trial| Action::FailWithParent { trial, parent: 0 }).to_vec();
        assert_eq!(decide(0.0, &of(Failed, Waiting, Waiting), &limits()), (failing, Reason::Starting));
        assert_eq!(decide(0.0, &of(Failed, Failed, Done), &limits()), (vec![], Reason::Over));
    }

    #[test]
    fn a_failed_attempt_is_waited_for() {
        let trials = vec![status(Done), TrialStatus { retry_at: Some(9.0), ..status(Waiting) }];
        assert_eq!(decide(8.0, &state(trials.clone()), &limits()), (vec![], Reason::WaitingToRetry { at: 9.0 }));
        assert_eq!(decide(9.0, &state(trials), &limits()), (vec![start(1)], Reason::Starting));
        // An hour ahead, by the clock of the host on which the controller was before.
        let ahead = vec![TrialStatus { retry_at: Some(3609.0), ..status(Waiting) }];
        assert_eq!(decide(8.0, &state(ahead), &limits()), (vec![start(0)], Reason::Starting));
    }

    #[test]
    fn a_drained_sweep_starts_nothing() {
        let of = |states: [TrialState; 2]| SweepState { trials: states.map(status).to_vec(), is_draining: true };
        assert_eq!(decide(0.0, &of([Waiting, Training]), &limits()), (vec![], Reason::Draining));
        assert_eq!(decide(0.0, &of([Waiting, Waiting]), &limits()), (vec![], Reason::Over));
    }

    #[test]
    fn kinds_decide_whether_another_attempt_helps() {
        let fate =
            |kind, made_progress, fruitless_before| after_failure(10.0, FailedAttempt { kind, made_progress, fruitless_before }, &limits());
        let retry = |at, fruitless| Fate::Retry { at, fruitless };
        for kind in [FailureKind::Recipe, FailureKind::Input, FailureKind::Damaged, FailureKind::Mismatch] {
            assert_eq!(fate(kind, true, 0), Fate::Fail, "{kind:?}");
        }
        for kind in [FailureKind::Environment, FailureKind::Storage, FailureKind::Run] {
            assert_eq!([0, 1, 2].map(|before| fate(kind, false, before)), [retry(12.0, 1), retry(14.0, 2), Fate::Fail], "{kind:?}");
            // New steps begin the count anew, and the wait stays.
            assert_eq!(fate(kind, true, 2), retry(12.0, 0), "{kind:?}");
        }
        // A job's time limit is no fault as long as its steps were saved.
        assert_eq!(fate(FailureKind::Interrupted, true, 2), retry(10.0, 0));
        assert_eq!(fate(FailureKind::Interrupted, false, 2), Fate::Fail);
        let patient = Limits { max_fruitless_attempts: 100, ..limits() };
        let late = FailedAttempt { kind: FailureKind::Run, made_progress: false, fruitless_before: 60 };
        assert_eq!(after_failure(0.0, late, &patient), retry(60.0, 61));
    }

    /// Plays a whole sweep in which an earlier trial is better, and returns how many steps each has done at the end.
    fn play(num_trials: usize, ladder: Ladder, total_steps: u64) -> Vec<u64> {
        let limits = Limits { concurrency: 3, ladder: Some(ladder), ..limits() };
        let mut state = state(vec![status(Waiting); num_trials]);
        let mut steps = vec![0; num_trials];
        for _ in 0..1000 {
            let (actions, reason) = decide(0.0, &state, &limits);
            if reason.is_over() {
                return steps;
            }
            for action in actions {
                let Action::Start { trial, until_step } = action else { panic!("{action:?}") };
                let status = &mut state.trials[trial];
                let goal = until_step.unwrap().min(total_steps);
                assert!(goal > steps[trial], "trial {trial} starts where it is");
                steps[trial] = goal;
                if goal == total_steps {
                    status.state = Done;
                } else {
                    status.state = StoppedEarly;
                    status.rungs.push(Rung { step: goal, metric: Some(-(trial as f64)) });
                }
            }
        }
        panic!("the sweep does not end");
    }

    #[test]
    fn a_sweep_with_early_stopping_ends_with_a_winner() {
        let ladder = Ladder { first_step: 10, factor: 3, more_is_better: true };
        // Nine trials to the first rung, and the best of them to the end.
        let steps = play(9, ladder, 90);
        assert_eq!(steps[0], 90);
        assert_eq!(steps.iter().filter(|&&steps| steps == 10).count(), 6, "{steps:?}");
        assert_eq!(steps.iter().filter(|&&steps| steps > 30).count(), 1, "{steps:?}");
        // Fewer than a factor of them: one ends all the same.
        assert_eq!(play(2, ladder, 90), [90, 10]);
        // Shorter than the first rung: there is nothing to stop.
        assert_eq!(play(4, ladder, 10), [10; 4]);
    }
}
