//! A finished run as a test of the model: its events give costs and failures, the simulation gives a wall time, and the run has one.
//!
//! Costs are means over a run: seconds of a step, of a save, and of an interruption by its cause. They may come from another run than
//! the one that is predicted; then nothing of the predicted run is used but its length, its checkpoints and when it was interrupted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use cloze_cluster::{Event, Recorded};
use cloze_recipes::failure::{Failure, FailureKind};

use super::costs::{
    AllReduce, CheckpointCosts, ClassCosts, Costs, FailureCosts, LinkCosts, Loses, NetworkCosts, RecoveryCosts, RunLength, StepCosts,
};
use super::engine::{Case, Outcome, ScheduledFailure, simulate_schedule};
use super::mechanisms::Mechanisms;

/// Cause of an interruption that no lost worker explains.
const BROKEN: &str = "collective";

/// Cause of an interruption that lets a worker in.
const REGROUP: &str = "regroup";

/// What a run's events say about its time.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// Seconds from the start of the run to its end.
    pub wall_s: f64,
    /// Seconds until the first step began.
    pub startup_s: f64,
    /// Steps between the first state and the last.
    pub steps: u64,
    /// Mean seconds of a step.
    pub step_s: f64,
    /// Steps from one checkpoint to the next; `None` where only the last one was saved.
    pub every_steps: Option<u64>,
    /// Mean seconds that training stood still for a checkpoint.
    pub blocked_s: f64,
    /// Mean seconds from the begin of a save to its manifest.
    pub save_s: f64,
    /// What interrupted the run.
    pub interruptions: Vec<Interruption>,
}

/// One interruption.
#[derive(Clone, Debug, PartialEq)]
pub struct Interruption {
    /// Steps done at it, counted from the first state.
    pub step: u64,
    /// Class of the failure.
    pub class: String,
    /// Seconds from the last step to the end of the generation.
    pub noticed_s: f64,
    /// Seconds from there to the begin of the next step.
    pub recovery_s: f64,
    /// Whether the state came from a worker's memory.
    pub from_memory: bool,
}

/// A predicted wall time beside the measured one.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// What the simulation says, in seconds.
    pub predicted_s: f64,
    /// What the run took, in seconds.
    pub measured_s: f64,
    /// The simulated run.
    pub outcome: Outcome,
}

impl Prediction {
    /// How far the prediction is off, as a share of the measured time; negative where it is too short.
    pub fn error(&self) -> f64 {
        self.predicted_s / self.measured_s - 1.0
    }
}

/// Reads the events of a run folder. A line that its writer has not finished is passed over, as long as it is the last one.
///
/// Fails with kind `Input` when there are no events, and with kind `Damaged` when a line is none.
pub fn read_events(run: &Path) -> Result<Vec<Recorded>, Failure> {
    let path = run.join("events.jsonl");
    let unreadable = |error: std::io::Error| {
        Failure::new(FailureKind::Input, "the events of the run cannot be read").at(path.display()).because(error).hint("name a run folder")
    };
    let mut reader = BufReader::new(File::open(&path).map_err(unreadable)?);
    let (mut events, mut line, mut number) = (Vec::new(), String::new(), 0_u64);
    loop {
        line.clear();
        number += 1;
        if reader.read_line(&mut line).map_err(unreadable)? == 0 || !line.ends_with('\n') {
            return Ok(events);
        }
        let event = serde_json::from_str(&line).map_err(|error| {
            let place = format!("{}:{number}", path.display());
            Failure::new(FailureKind::Damaged, "an event of the run is not understood").at(place).because(error)
        })?;
        events.push(event);
    }
}

/// What the events of a run say; of a run that was resumed, those since it was resumed the last time.
///
/// Fails with kind `Input` when the run has not ended as it should, or did no step.
pub fn observe(events: &[Recorded]) -> Result<Observed, Failure> {
    let start = events.iter().rposition(|recorded| matches!(recorded.event, Event::RunStarted { .. })).unwrap_or(0);
    let before = events[..start].iter().rev().find_map(|recorded| match &recorded.event {
        Event::Step { report, .. } => Some(report.step),
        _ => None,
    });
    let mut notes = Notes { step_before: before.unwrap_or(0), ..Notes::default() };
    for recorded in &events[start..] {
        notes.take(recorded);
    }
    notes.observed()
}

/// Predicts the wall time of a run from the costs of a run, which may be the same.
///
/// Fails with kind `Input` when the run was interrupted in a way of which `costs` has no example.
pub fn predict(costs: &Observed, run: &Observed) -> Result<Prediction, Failure> {
    let classes = classes(&costs.interruptions);
    let mut schedule = Vec::new();
    for interruption in &run.interruptions {
        let class = classes.iter().position(|class| class.name == interruption.class).ok_or_else(|| {
            Failure::new(FailureKind::Input, "the run with the costs has no such failure")
                .expected(format!("a failure of class {}", interruption.class))
                .hint("take the costs from a run that was interrupted in the same ways")
        })?;
        schedule.push(ScheduledFailure { step: interruption.step, class, from_memory: interruption.from_memory });
    }
    let simulated = replay_costs(costs, run, classes);
    let case = Case { gpus: 1, mechanisms: Mechanisms { elastic: false, ..Mechanisms::all() } };
    let outcome = simulate_schedule(&simulated, &case, &schedule)?;
    // The last save has nothing behind it that could hide its upload.
    let predicted_s = outcome.wall_s + (costs.save_s - costs.blocked_s).max(0.0);
    Ok(Prediction { predicted_s, measured_s: run.wall_s, outcome })
}

/// The mean interruption of each class. What an interruption takes stands in one number, from the last step to the next.
fn classes(interruptions: &[Interruption]) -> Vec<ClassCosts> {
    let mut by_class: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for interruption in interruptions {
        by_class.entry(&interruption.class).or_default().push(interruption.noticed_s + interruption.recovery_s);
    }
    let of_class = |(name, seconds): (&str, Vec<f64>)| {
        let mean_s = mean(&seconds);
        let share = seconds.len() as f64 / interruptions.len() as f64;
        ClassCosts { name: name.to_owned(), share, loses: Loses::Nothing, detected_s: mean_s, undetected_s: mean_s }
    };
    by_class.into_iter().map(of_class).collect()
}

/// Costs with every second in a measured number and none in the model's own formulas.
fn replay_costs(costs: &Observed, run: &Observed, classes: Vec<ClassCosts>) -> Costs {
    let link = LinkCosts { latency_s: 0.0, bytes_per_s: 1.0 };
    Costs {
        gpus: vec![1],
        gpus_per_node: 1,
        run: RunLength { steps: run.steps, startup_s: costs.startup_s },
        step: StepCosts { compute_s: costs.step_s, jitter: 0.0, gradient_bytes: 0.0, hidden_share: 0.0 },
        network: NetworkCosts { all_reduce: AllReduce::Ring, inside: link.clone(), between: link },
        checkpoint: CheckpointCosts {
            every_s: None,
            every_steps: Some(run.every_steps.unwrap_or(run.steps)),
            bytes: 0.0,
            snapshot_s: costs.blocked_s,
            node_bytes_per_s: 1.0,
            store_bytes_per_s: 1.0,
        },
        failures: FailureCosts { gpu_mtbf_hours: None, classes },
        recovery: RecoveryCosts {
            abort_s: 0.0,
            regroup_s: 0.0,
            regroup_s_per_gpu: 0.0,
            process_start_s: 0.0,
            node_replacement_s: 0.0,
            requeue_s: 0.0,
            spare_nodes: 0,
            min_nodes_share: 1.0,
        },
        coordinator: None,
    }
}

/// What is kept of the events while they are read.
#[derive(Default)]
struct Notes {
    started: Option<f64>,
    ended: Option<f64>,
    /// The last step that was told before.
    step_before: u64,
    /// Steps done at the state that the run, and at the one that its newest generation started from.
    first_state: Option<u64>,
    state: u64,
    from_memory: bool,
    /// Time and number of the first and of the last reported step.
    first_step: Option<(f64, u64)>,
    last_step: Option<(f64, u64)>,
    step_seconds: Vec<f64>,
    saved_steps: Vec<u64>,
    blocked_seconds: Vec<f64>,
    save_seconds: Vec<f64>,
    /// Class of the newest lost worker since the last step.
    lost: Option<String>,
    open: Option<Open>,
    closed: Vec<(Open, Resumed)>,
}

/// An interruption that has begun.
struct Open {
    at: f64,
    /// Steps done.
    step: u64,
    class: String,
    /// Time and number of the last step before it.
    last_step: Option<(f64, u64)>,
}

/// The first step after an interruption.
struct Resumed {
    at: f64,
    step: u64,
    /// Steps done at the state that it went on from.
    state: u64,
    from_memory: bool,
}

impl Notes {
    fn take(&mut self, recorded: &Recorded) {
        let time = recorded.time;
        match &recorded.event {
            Event::RunStarted { .. } => self.started = Some(time),
            Event::RunFinished { .. } | Event::RunStopped { .. } => self.ended = Some(time),
            Event::Restored { step, source, .. } => {
                self.first_state.get_or_insert(*step);
                self.state = *step;
                self.from_memory = source.starts_with("memory");
            }
            // Workers that trained on without a controller restore nothing.
            Event::CoordinatorRestarted { adopted: true, .. } => self.first_state = self.first_state.or(Some(self.step_before)),
            Event::Step { report, .. } => self.step(time, report.step, report.seconds),
            Event::CheckpointSaved { step, seconds, blocked_s, .. } => {
                self.saved_steps.push(*step);
                self.save_seconds.push(*seconds);
                self.blocked_seconds.push(*blocked_s);
            }
            Event::WorkerLost { class, .. } => {
                let name = serde_json::to_value(class).ok().and_then(|value| value.as_str().map(str::to_owned));
                self.lost = Some(name.unwrap_or_else(|| BROKEN.to_owned()));
            }
            Event::GenerationAborted { step, .. } => {
                let class = self.lost.take().unwrap_or_else(|| BROKEN.to_owned());
                self.interrupted(time, *step, class);
            }
            Event::GenerationRegrouped { step, .. } => self.interrupted(time, *step, REGROUP.to_owned()),
            _ => {}
        }
    }

    fn step(&mut self, at: f64, step: u64, seconds: f64) {
        if let Some(open) = self.open.take() {
            self.closed.push((open, Resumed { at, step, state: self.state, from_memory: self.from_memory }));
        }
        self.lost = None;
        self.first_step.get_or_insert((at, step));
        self.last_step = Some((at, step));
        self.step_seconds.push(seconds);
    }

    /// A generation is over. One that ends before its first step prolongs the interruption in which it began.
    fn interrupted(&mut self, at: f64, step: u64, class: String) {
        let last_step = self.last_step;
        self.open.get_or_insert(Open { at, step, class, last_step });
    }

    fn observed(self) -> Result<Observed, Failure> {
        let unfit = |what: &str| Failure::new(FailureKind::Input, what).hint("name a run that finished, or was stopped");
        let (Some(started), Some(ended)) = (self.started, self.ended) else { return Err(unfit("the run has not ended")) };
        let (Some(first), Some(last), Some(first_state)) = (self.first_step, self.last_step, self.first_state) else {
            return Err(unfit("the run did no step"));
        };
        let step_s = mean(&self.step_seconds);
        // Not every step has to be reported: those before a reported one took the mean time.
        let begin_s = |(at, step): (f64, u64), state: u64| at - step.saturating_sub(state) as f64 * step_s;
        let interruptions = self.closed.into_iter().map(|(open, resumed)| {
            let last = open.last_step.unwrap_or((open.at, open.step));
            Interruption {
                step: open.step.saturating_sub(first_state),
                class: open.class,
                noticed_s: (open.at - last.0 - open.step.saturating_sub(last.1) as f64 * step_s).max(0.0),
                recovery_s: (begin_s((resumed.at, resumed.step), resumed.state) - open.at).max(0.0),
                from_memory: resumed.from_memory,
            }
        });
        Ok(Observed {
            wall_s: ended - started,
            startup_s: (begin_s(first, first_state) - started).max(0.0),
            steps: last.1.saturating_sub(first_state).max(1),
            step_s,
            every_steps: spacing(first_state, last.1, &self.saved_steps),
            blocked_s: mean(&self.blocked_seconds),
            save_s: mean(&self.save_seconds),
            interruptions: interruptions.collect(),
        })
    }
}

/// The median number of steps from one checkpoint to the next; the last step is saved in any case and says nothing.
fn spacing(first: u64, last: u64, saved: &[u64]) -> Option<u64> {
    let mut steps: Vec<u64> = saved.iter().copied().filter(|step| *step > first && *step < last).collect();
    steps.sort_unstable();
    steps.dedup();
    let before = std::iter::once(first).chain(steps.iter().copied());
    let mut gaps: Vec<u64> = before.zip(&steps).map(|(earlier, later)| later - earlier).collect();
    gaps.sort_unstable();
    gaps.get(gaps.len() / 2).copied()
}

/// The mean; 0 of nothing.
fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of an event log, as a run writes them; the fields that are not looked at have whatever value.
    fn events(lines: &[serde_json::Value]) -> Vec<Recorded> {
        lines.iter().map(|line| serde_json::from_value(line.clone()).unwrap()).collect()
    }

    fn step(time: f64, generation: u64, step: u64) -> serde_json::Value {
        serde_json::json!({
            "time": time, "event": "step", "generation": generation, "step": step, "loss": 1.0, "learning_rate": 0.1, "gradient_norm": 1.0,
            "examples": 8, "tokens": 64, "labels": 8, "seconds": 2.0, "examples_per_s": 4.0, "tokens_per_s": 32.0,
        })
    }

    fn saved(time: f64, step: u64) -> serde_json::Value {
        serde_json::json!({
            "time": time, "event": "checkpoint_saved", "step": step, "url": "u", "bytes": 9, "seconds": 1.5, "blocked_s": 0.5,
        })
    }

    fn restored(time: f64, generation: u64, step: u64, source: &str) -> serde_json::Value {
        serde_json::json!({
            "time": time, "event": "restored", "generation": generation, "step": step, "source": source, "skipped": [], "seconds": 0.1,
        })
    }

    fn started(time: f64) -> serde_json::Value {
        serde_json::json!({
            "time": time, "event": "run_started", "name": "n", "recipe_hash": "h", "workers": 2, "min_workers": null, "steps": 10,
        })
    }

    /// Ten steps of two seconds from 105 on, a checkpoint after every fourth, and a worker lost in the seventh.
    fn run() -> Vec<serde_json::Value> {
        let mut lines = vec![started(100.0), restored(104.0, 1, 0, "scratch")];
        lines.extend((1..=4).map(|number| step(105.0 + 2.0 * number as f64, 1, number)));
        lines.push(saved(115.0, 4));
        lines.extend((5..=6).map(|number| step(105.5 + 2.0 * number as f64, 1, number)));
        lines.push(serde_json::json!({
            "time": 118.5, "event": "worker_lost", "worker": 1, "rank": 1, "host": "a", "class": "connection_closed", "reason": "r",
        }));
        lines.push(serde_json::json!({"time": 118.5, "event": "generation_aborted", "generation": 1, "reason": "r", "step": 6}));
        lines.push(restored(121.0, 2, 6, "memory of worker 0"));
        lines.extend((7..=8).map(|number| step(121.5 + 2.0 * (number - 6) as f64, 2, number)));
        lines.push(saved(127.0, 8));
        lines.extend((9..=10).map(|number| step(122.0 + 2.0 * (number - 6) as f64, 2, number)));
        lines.push(saved(131.5, 10));
        lines.push(serde_json::json!({"time": 131.5, "event": "run_finished", "step": 10, "seconds": 31.5}));
        lines
    }

    #[test]
    fn the_events_of_a_run_say_where_its_time_went() {
        let observed = observe(&events(&run())).unwrap();
        let interruption =
            Interruption { step: 6, class: "connection_closed".to_owned(), noticed_s: 1.0, recovery_s: 3.0, from_memory: true };
        let expected = Observed {
            wall_s: 31.5,
            startup_s: 5.0,
            steps: 10,
            step_s: 2.0,
            every_steps: Some(4),
            blocked_s: 0.5,
            save_s: 1.5,
            interruptions: vec![interruption],
        };
        assert_eq!(observed, expected);
    }

    #[test]
    fn a_run_predicts_itself() {
        let observed = observe(&events(&run())).unwrap();
        let prediction = predict(&observed, &observed).unwrap();
        // 5 s to the first step, 20 s of steps, three times 0.5 s blocked, 4 s of interruption, and 1 s of the last upload.
        assert!((prediction.predicted_s - 31.5).abs() < 1e-9, "{prediction:?}");
        assert!(prediction.error().abs() < 1e-9);
        assert_eq!((prediction.outcome.failures, prediction.outcome.steps_lost), (1, 0));
    }

    #[test]
    fn costs_of_another_run_predict_a_longer_one() {
        let costs = observe(&events(&run())).unwrap();
        let mut longer = costs.clone();
        longer.steps = 20;
        longer.wall_s = 60.0;
        longer.interruptions[0].from_memory = false;
        let prediction = predict(&costs, &longer).unwrap();
        // 40 s of steps, saves after 4, 8, 12, 16 and 20, and steps 5 and 6 twice.
        assert!((prediction.predicted_s - (5.0 + 40.0 + 2.5 + 4.0 + 1.0 + 4.0)).abs() < 1e-9, "{prediction:?}");
        assert_eq!(prediction.outcome.steps_lost, 2);
        longer.interruptions[0].class = "hung".to_owned();
        assert_eq!(predict(&costs, &longer).unwrap_err().expected.as_deref(), Some("a failure of class hung"));
    }

    #[test]
    fn steps_that_were_not_reported_are_counted() {
        let lines = [
            started(100.0),
            restored(101.0, 1, 0, "scratch"),
            step(113.0, 1, 5),
            serde_json::json!({"time": 120.0, "event": "generation_aborted", "generation": 1, "reason": "r", "step": 7}),
            restored(122.0, 2, 7, "memory"),
            step(129.0, 2, 10),
            serde_json::json!({"time": 129.0, "event": "run_stopped", "step": 10}),
        ];
        let observed = observe(&events(&lines)).unwrap();
        assert!((observed.startup_s - 3.0).abs() < 1e-9, "five steps of two seconds end at 113");
        let interruption = &observed.interruptions[0];
        assert_eq!((interruption.class.as_str(), interruption.step), (BROKEN, 7));
        assert!((interruption.noticed_s - 3.0).abs() < 1e-9, "two more steps, then three seconds");
        assert!((interruption.recovery_s - 3.0).abs() < 1e-9, "three steps end at 129");
        assert_eq!(observed.every_steps, None);
    }

    #[test]
    fn workers_that_were_taken_over_have_restored_nothing() {
        let lines = [
            started(100.0),
            restored(101.0, 1, 0, "scratch"),
            step(103.0, 1, 1),
            started(104.0),
            serde_json::json!({"time": 104.5, "event": "coordinator_restarted", "generation": 1, "adopted": true}),
            step(105.0, 1, 2),
            step(107.0, 1, 3),
            serde_json::json!({"time": 107.0, "event": "run_stopped", "step": 3}),
        ];
        let observed = observe(&events(&lines)).unwrap();
        assert_eq!((observed.steps, observed.interruptions.len()), (2, 0));
    }

    #[test]
    fn a_run_that_has_not_ended_is_refused() {
        let mut lines = run();
        lines.pop();
        assert_eq!(observe(&events(&lines)).unwrap_err().what, "the run has not ended");
        let idle = [started(1.0), serde_json::json!({"time": 2.0, "event": "run_stopped", "step": 0})];
        assert_eq!(observe(&events(&idle)).unwrap_err().what, "the run did no step");
    }

    #[test]
    fn an_unfinished_last_line_is_passed_over_and_a_broken_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let whole: String = run().iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&path, format!("{whole}{{\"time\": 1")).unwrap();
        assert_eq!(read_events(folder.path()).unwrap().len(), run().len());
        std::fs::write(&path, format!("nonsense\n{whole}")).unwrap();
        let failure = read_events(folder.path()).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Damaged);
        assert!(failure.place.unwrap().ends_with("events.jsonl:1"));
        assert_eq!(read_events(&folder.path().join("none")).unwrap_err().kind, FailureKind::Input);
    }
}
