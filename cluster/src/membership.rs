//! The decision about membership, pure: a clock reading, a state and limits in; a decision and its reason out.
//!
//! A worker's rank is its slot: rank 1 is worker 1 in every generation, since a generation starts only when all slots are
//! filled. That keeps messages readable and logs comparable.

use std::fmt;
use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};

/// Bounds of membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A worker that has not been heard of for longer than this is lost.
    pub heartbeat_timeout: Duration,
    /// Longest time in which all slots must be filled, at the start and after a loss.
    pub join_timeout: Duration,
    /// After a broken collective, how long the coordinator waits for a lost connection that explains it.
    pub blame_grace: Duration,
    /// Generations in a row that may break without a lost worker and without one step before the run is given up.
    pub max_fruitless_generations: u32,
}

/// Everything that the decision depends on. Times count from the coordinator's start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// What the workers do together.
    pub stage: Stage,
    /// The workers by slot.
    pub workers: Vec<Worker>,
    /// The first report that the running generation's collective failed.
    pub broken: Option<Broken>,
    /// Generations in a row that broke without a lost worker and without a step.
    pub fruitless_generations: u32,
    /// Who asked for a stop.
    pub stop: Option<String>,
    /// A failure that ends the run.
    pub failure: Option<Failure>,
    /// Steps done at the newest saved or restored state.
    pub saved_step: u64,
}

impl State {
    /// The state before anybody has joined.
    pub fn new(num_workers: u32) -> Self {
        Self {
            stage: Stage::Gathering { since: Duration::ZERO },
            workers: (0..num_workers).map(|_| Worker::Absent { cause: "has not joined yet".to_owned() }).collect(),
            broken: None,
            fruitless_generations: 0,
            stop: None,
            failure: None,
            saved_step: 0,
        }
    }

    /// Slots that nobody fills.
    pub fn missing(&self) -> Vec<u32> {
        self.slots_where(|worker| !matches!(worker, Worker::Present { .. }))
    }

    fn slots_where(&self, wanted: impl Fn(&Worker) -> bool) -> Vec<u32> {
        (0_u32..).zip(&self.workers).filter(|(_, worker)| wanted(worker)).map(|(slot, _)| slot).collect()
    }
}

/// What the workers do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The slots are being filled.
    Gathering {
        /// When that began.
        since: Duration,
    },
    /// A generation runs.
    Running {
        /// Its number.
        generation: u64,
    },
}

/// One slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Worker {
    /// Nobody is connected.
    Absent {
        /// Why.
        cause: String,
    },
    /// A worker is connected.
    Present {
        /// When it was last heard of.
        heard: Duration,
    },
    /// The worker finished the run and left.
    Finished {
        /// Steps done.
        step: u64,
        /// Whether a stop was asked for before the last step.
        stopped: bool,
    },
}

/// A report that the collective failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Who reported it first.
    pub worker: u32,
    /// What it saw.
    pub cause: String,
    /// When.
    pub at: Duration,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Wait,
    /// Start the next generation.
    Start,
    /// Declare a silent worker lost and close its connection.
    Lose {
        /// Its slot.
        worker: u32,
    },
    /// End the running generation and gather the workers again.
    Abort,
    /// The run is over as wanted.
    Finish {
        /// Steps done at the final, saved state.
        step: u64,
        /// Whether a stop ended it before the last step.
        stopped: bool,
    },
    /// The run is over with a failure.
    Fail {
        /// Why.
        failure: Failure,
    },
}

/// Why a decision was made; serves events, logs and tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Slots are still empty, or their workers have not been heard of since the last generation ended.
    Waiting {
        /// The empty slots.
        missing: Vec<u32>,
    },
    /// The generation runs.
    Training,
    /// All slots are filled.
    AllJoined {
        /// Number of workers.
        workers: u32,
    },
    /// A worker said nothing for too long.
    MissedHeartbeat {
        /// Its slot.
        worker: u32,
        /// How long it has been silent.
        silent: Duration,
    },
    /// A worker of the generation is gone.
    Lost {
        /// Its slot and rank.
        worker: u32,
        /// How it was noticed.
        cause: String,
    },
    /// The collective failed while all workers live.
    Broken {
        /// Who reported it first.
        worker: u32,
        /// What it saw.
        cause: String,
    },
    /// Slots stayed empty for too long.
    JoinTimeout {
        /// The empty slots.
        missing: Vec<u32>,
    },
    /// Too many generations broke without a step.
    Fruitless,
    /// A stop was asked for.
    StopRequested {
        /// Who asked.
        by: String,
    },
    /// The workers are done.
    AllFinished,
    /// A worker or the launcher reported a failure that ends the run.
    Failed,
}

/// Decides what to do at `now`, counted from the coordinator's start.
pub fn decide(now: Duration, state: &State, limits: &Limits) -> (Decision, Reason) {
    if let Some(failure) = &state.failure {
        return (Decision::Fail { failure: failure.clone() }, Reason::Failed);
    }
    if let Some((worker, silent)) = first_silent(now, state, limits) {
        return (Decision::Lose { worker }, Reason::MissedHeartbeat { worker, silent });
    }
    match state.stage {
        Stage::Running { .. } => decide_running(now, state, limits),
        Stage::Gathering { since } => decide_gathering(now, since, state, limits),
    }
}

fn decide_running(now: Duration, state: &State, limits: &Limits) -> (Decision, Reason) {
    if let Some((step, stopped)) = first_finished(state) {
        // A Finished message proves that the result is saved, so a worker that vanishes after it no longer matters.
        let still_there = state.workers.iter().any(|worker| matches!(worker, Worker::Present { .. }));
        return if still_there { (Decision::Wait, Reason::Training) } else { (Decision::Finish { step, stopped }, Reason::AllFinished) };
    }
    for (slot, worker) in (0_u32..).zip(&state.workers) {
        if let Worker::Absent { cause } = worker {
            return (Decision::Abort, Reason::Lost { worker: slot, cause: cause.clone() });
        }
    }
    match &state.broken {
        // A peer that died is the usual cause; its closed connection is about to be noticed and names the culprit.
        Some(broken) if now >= broken.at + limits.blame_grace => {
            (Decision::Abort, Reason::Broken { worker: broken.worker, cause: broken.cause.clone() })
        }
        _ => (Decision::Wait, Reason::Training),
    }
}

fn decide_gathering(now: Duration, since: Duration, state: &State, limits: &Limits) -> (Decision, Reason) {
    // The proof can arrive after the generation was aborted because of another worker.
    if let Some((step, stopped)) = first_finished(state) {
        return (Decision::Finish { step, stopped }, Reason::AllFinished);
    }
    if let Some(by) = &state.stop {
        return (Decision::Finish { step: state.saved_step, stopped: true }, Reason::StopRequested { by: by.clone() });
    }
    if state.fruitless_generations > limits.max_fruitless_generations {
        return (Decision::Fail { failure: fruitless_failure(state) }, Reason::Fruitless);
    }
    // Only a sign of life after the last generation's end counts: a worker that hangs in the old collective would
    // otherwise be taken into the next generation.
    let ready = |worker: &Worker| matches!(worker, Worker::Present { heard } if *heard >= since);
    if state.workers.iter().all(ready) {
        return (Decision::Start, Reason::AllJoined { workers: state.workers.len() as u32 });
    }
    let missing = state.missing();
    if now > since + limits.join_timeout {
        let failure = join_timeout_failure(state, &missing, limits);
        return (Decision::Fail { failure }, Reason::JoinTimeout { missing });
    }
    (Decision::Wait, Reason::Waiting { missing })
}

fn first_silent(now: Duration, state: &State, limits: &Limits) -> Option<(u32, Duration)> {
    (0_u32..).zip(&state.workers).find_map(|(slot, worker)| match worker {
        Worker::Present { heard } => {
            let silent = now.saturating_sub(*heard);
            (silent > limits.heartbeat_timeout).then_some((slot, silent))
        }
        Worker::Absent { .. } | Worker::Finished { .. } => None,
    })
}

/// The furthest finished worker's step, and whether any of them was stopped.
fn first_finished(state: &State) -> Option<(u64, bool)> {
    let finished = state.workers.iter().filter_map(|worker| match worker {
        Worker::Finished { step, stopped } => Some((*step, *stopped)),
        Worker::Absent { .. } | Worker::Present { .. } => None,
    });
    finished.reduce(|left, right| (left.0.max(right.0), left.1 || right.1))
}

fn join_timeout_failure(state: &State, missing: &[u32], limits: &Limits) -> Failure {
    let causes: Vec<String> = missing
        .iter()
        .filter_map(|&slot| match state.workers.get(slot as usize) {
            Some(Worker::Absent { cause }) => Some(format!("worker {slot}: {cause}")),
            _ => None,
        })
        .collect();
    let num_workers = state.workers.len();
    Failure::new(FailureKind::Run, format!("{} did not join in time", workers_text(missing)))
        .expected(format!("{num_workers} workers within {:.1} s", limits.join_timeout.as_secs_f64()))
        .found(format!("{} workers", num_workers - missing.len()))
        .because(causes.join("; "))
        .hint("the workers' own words are in the run folder under logs/")
}

fn fruitless_failure(state: &State) -> Failure {
    Failure::new(FailureKind::Run, "the workers cannot exchange gradients")
        .expected("a generation that completes a step")
        .found(format!("{} generations in a row broke while all workers lived", state.fruitless_generations))
        .hint("look for `generation_aborted` in events.jsonl; a firewall between the workers or a collective timeout that is too short are usual")
}

/// `worker 1`, or `workers 1, 3`.
fn workers_text(slots: &[u32]) -> String {
    let list = slots.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    if slots.len() == 1 { format!("worker {list}") } else { format!("workers {list}") }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting { missing } if missing.is_empty() => f.write_str("waiting for signs of life"),
            Self::Waiting { missing } => write!(f, "waiting for {}", workers_text(missing)),
            Self::Training => f.write_str("training"),
            Self::AllJoined { workers: 1 } => f.write_str("the worker is there"),
            Self::AllJoined { workers } => write!(f, "all {workers} workers are there"),
            Self::MissedHeartbeat { silent, .. } => write!(f, "no heartbeat for {:.1} s", silent.as_secs_f64()),
            Self::Lost { worker, cause } => write!(f, "worker {worker} (rank {worker}) lost: {cause}"),
            Self::Broken { worker, cause } => write!(f, "the collective broke, as worker {worker} (rank {worker}) reports: {cause}"),
            Self::JoinTimeout { missing } => write!(f, "{} did not join in time", workers_text(missing)),
            Self::Fruitless => f.write_str("too many generations broke without a step"),
            Self::StopRequested { by } => write!(f, "stop requested: {by}"),
            Self::AllFinished => f.write_str("all workers are done"),
            Self::Failed => f.write_str("the run failed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock that the test sets; seconds since the coordinator's start.
    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn limits() -> Limits {
        Limits { heartbeat_timeout: at(5.0), join_timeout: at(30.0), blame_grace: at(0.5), max_fruitless_generations: 3 }
    }

    fn present(heard: f64) -> Worker {
        Worker::Present { heard: at(heard) }
    }

    fn absent(cause: &str) -> Worker {
        Worker::Absent { cause: cause.to_owned() }
    }

    fn gathering(since: f64, workers: Vec<Worker>) -> State {
        State { stage: Stage::Gathering { since: at(since) }, workers, ..State::new(0) }
    }

    fn running(workers: Vec<Worker>) -> State {
        State { stage: Stage::Running { generation: 1 }, workers, ..State::new(0) }
    }

    #[test]
    fn gathering_table() {
        let cases = [
            ("nobody yet", 1.0, State::new(2), Decision::Wait, "waiting for workers 0, 1"),
            ("one of two", 1.0, gathering(0.0, vec![present(0.5), absent("x")]), Decision::Wait, "waiting for worker 1"),
            ("all joined", 1.0, gathering(0.0, vec![present(0.5), present(1.0)]), Decision::Start, "all 2 workers are there"),
            ("a world of one", 1.0, gathering(0.0, vec![present(0.5)]), Decision::Start, "the worker is there"),
            (
                "survivor not heard of since the abort",
                21.0,
                gathering(20.0, vec![present(19.0), present(20.5)]),
                Decision::Wait,
                "waiting for signs of life",
            ),
            (
                "replacement joined and survivor heard of",
                21.0,
                gathering(20.0, vec![present(20.0), present(20.9)]),
                Decision::Start,
                "all 2 workers are there",
            ),
            (
                "heartbeat missed",
                10.0,
                gathering(0.0, vec![present(4.9), absent("x")]),
                Decision::Lose { worker: 0 },
                "no heartbeat for 5.1 s",
            ),
            ("heartbeat just in time", 10.0, gathering(0.0, vec![present(5.0), absent("x")]), Decision::Wait, "waiting for worker 1"),
            ("join timeout not yet", 30.0, gathering(0.0, vec![present(29.0), absent("x")]), Decision::Wait, "waiting for worker 1"),
        ];
        for (name, now, state, decision, reason) in cases {
            let (found, why) = decide(at(now), &state, &limits());
            assert_eq!((found, why.to_string().as_str()), (decision, reason), "{name}");
        }
    }

    #[test]
    fn running_table() {
        let finished = Worker::Finished { step: 300, stopped: false };
        let stopped = Worker::Finished { step: 120, stopped: true };
        let cases = [
            ("all well", 9.0, running(vec![present(8.0), present(8.5)]), Decision::Wait, "training"),
            (
                "one lost",
                9.0,
                running(vec![present(8.0), absent("connection closed")]),
                Decision::Abort,
                "worker 1 (rank 1) lost: connection closed",
            ),
            ("one silent", 14.0, running(vec![present(13.0), present(8.5)]), Decision::Lose { worker: 1 }, "no heartbeat for 5.5 s"),
            ("one of two finished", 9.0, running(vec![finished.clone(), present(8.0)]), Decision::Wait, "training"),
            (
                "all finished",
                9.0,
                running(vec![finished.clone(), finished.clone()]),
                Decision::Finish { step: 300, stopped: false },
                "all workers are done",
            ),
            (
                "one vanished after the other finished",
                9.0,
                running(vec![finished, absent("connection closed")]),
                Decision::Finish { step: 300, stopped: false },
                "all workers are done",
            ),
            (
                "stopped",
                9.0,
                running(vec![stopped.clone(), stopped]),
                Decision::Finish { step: 120, stopped: true },
                "all workers are done",
            ),
        ];
        for (name, now, state, decision, reason) in cases {
            let (found, why) = decide(at(now), &state, &limits());
            assert_eq!((found, why.to_string().as_str()), (decision, reason), "{name}");
        }
    }

    #[test]
    fn a_broken_collective_waits_for_the_culprit() {
        let broken = Broken { worker: 0, cause: "receive from rank 1".to_owned(), at: at(9.0) };
        let alive = State { broken: Some(broken), ..running(vec![present(9.0), present(8.9)]) };
        assert_eq!(decide(at(9.4), &alive, &limits()).0, Decision::Wait);
        let (decision, reason) = decide(at(9.5), &alive, &limits());
        assert_eq!(decision, Decision::Abort);
        assert_eq!(reason.to_string(), "the collective broke, as worker 0 (rank 0) reports: receive from rank 1");

        let explained = State { workers: vec![present(9.0), absent("connection closed")], ..alive };
        let (decision, reason) = decide(at(9.1), &explained, &limits());
        assert_eq!((decision, reason), (Decision::Abort, Reason::Lost { worker: 1, cause: "connection closed".to_owned() }));
    }

    #[test]
    fn a_proof_of_the_result_counts_after_an_abort() {
        let state = gathering(9.0, vec![Worker::Finished { step: 300, stopped: false }, absent("connection closed"), present(9.0)]);
        assert_eq!(decide(at(9.1), &state, &limits()), (Decision::Finish { step: 300, stopped: false }, Reason::AllFinished));
    }

    #[test]
    fn waiting_for_workers_ends() {
        let state = gathering(10.0, vec![present(40.0), absent("exited with code 5")]);
        let (decision, reason) = decide(at(40.1), &state, &limits());
        assert_eq!(reason, Reason::JoinTimeout { missing: vec![1] });
        let Decision::Fail { failure } = decision else { panic!("{decision:?}") };
        assert_eq!(failure.what, "worker 1 did not join in time");
        assert_eq!(failure.cause.as_deref(), Some("worker 1: exited with code 5"));
        assert_eq!(failure.found.as_deref(), Some("1 workers"));
    }

    #[test]
    fn breaking_without_end_ends() {
        let mut state = gathering(1.0, vec![present(2.0), present(2.0)]);
        state.fruitless_generations = 3;
        assert_eq!(decide(at(2.0), &state, &limits()).0, Decision::Start);
        state.fruitless_generations = 4;
        assert!(matches!(decide(at(2.0), &state, &limits()), (Decision::Fail { .. }, Reason::Fruitless)));
    }

    #[test]
    fn a_stop_ends_a_wait_at_the_saved_step() {
        let stop = Some("SIGINT".to_owned());
        let waiting = State { stop: stop.clone(), saved_step: 50, ..gathering(0.0, vec![present(0.5), absent("x")]) };
        let (decision, reason) = decide(at(1.0), &waiting, &limits());
        assert_eq!((decision, reason.to_string().as_str()), (Decision::Finish { step: 50, stopped: true }, "stop requested: SIGINT"));
        let training = State { stop, ..running(vec![present(0.5)]) };
        assert_eq!(decide(at(1.0), &training, &limits()).0, Decision::Wait, "workers stop on their own");
    }

    #[test]
    fn a_reported_failure_ends_the_run_at_once() {
        let failure = Failure::new(FailureKind::Run, "loss is not finite");
        let state = State { failure: Some(failure.clone()), ..running(vec![present(0.0)]) };
        assert_eq!(decide(at(100.0), &state, &limits()), (Decision::Fail { failure }, Reason::Failed));
    }
}
