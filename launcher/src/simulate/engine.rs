//! One simulated run: events in the order of their times, until all steps are done and saved.
//!
//! A run is always in exactly one [`Activity`], and every second goes to that activity's cause. A failure cuts the activity short;
//! its end, which is still in the queue, then carries an old number and is passed over.

use std::collections::VecDeque;

use cloze_recipes::failure::{Failure, FailureKind};

use super::costs::{ClassCosts, Costs, FailureCosts, Loses};
use super::mechanisms::Mechanisms;
use super::model::Model;
use super::queue::Queue;
use super::random::{Draws, Purpose};
use super::read::size_problem;
use super::recovery::{Fleet, Length, Needs, Part};
use super::spent::{Cause, Spent};

/// Failures after which a run counts as one that never ends. Llama 3 had 419 in 54 days on 16,384 GPUs.
const MAX_FAILURES: u64 = 100_000;

/// One size of a cluster, with some of the mechanisms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// GPUs at full size; a multiple of those of a node.
    pub gpus: u32,
    /// What is switched on.
    pub mechanisms: Mechanisms,
}

/// What one simulated run came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Seconds from the command to the last saved state.
    pub wall_s: f64,
    /// Where they went; adds up to `wall_s`.
    pub spent: Spent,
    /// Failures that interrupted the run.
    pub failures: u64,
    /// Steps that were done again.
    pub steps_lost: u64,
    /// Checkpoints for which training stood still.
    pub checkpoints: u64,
}

impl Outcome {
    /// Share of the wall time in which steps that count were computed.
    pub fn goodput(&self) -> f64 {
        self.spent.get(Cause::Compute) / self.wall_s
    }
}

/// A failure at a step instead of at a drawn time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduledFailure {
    /// It happens when so many steps are done for the first time.
    pub step: u64,
    /// Position of its class in the costs.
    pub class: usize,
    /// Whether a survivor has the state; if not, the run goes back to the newest checkpoint.
    pub from_memory: bool,
}

/// Simulates one run with failures drawn from a seed. The same arguments give the same outcome.
///
/// Fails with kind `Recipe` when the number of GPUs does not fit the nodes, and with kind `Run` when failures come so fast that the
/// run does not end.
pub fn simulate(costs: &Costs, case: &Case, seed: u64) -> Result<Outcome, Failure> {
    Engine::new(costs, case, Draws::new(seed), VecDeque::new())?.run()
}

/// Simulates one run with exactly these failures, in the order of their steps; the costs' own rate of failures is not used.
pub fn simulate_schedule(costs: &Costs, case: &Case, schedule: &[ScheduledFailure]) -> Result<Outcome, Failure> {
    if let Some(unknown) = schedule.iter().find(|failure| failure.class >= costs.failures.classes.len()) {
        return Err(Failure::new(FailureKind::Recipe, "a scheduled failure has no class").found(unknown.class));
    }
    let costs = Costs { failures: FailureCosts { gpu_mtbf_hours: None, ..costs.failures.clone() }, ..costs.clone() };
    let mut schedule: Vec<ScheduledFailure> = schedule.to_vec();
    schedule.sort_by_key(|failure| failure.step);
    Engine::new(&costs, case, Draws::new(0), schedule.into())?.run()
}

/// What the queue holds.
#[derive(Debug)]
enum Event {
    /// The activity with this number ends as planned.
    ActivityEnds(u64),
    /// The failure with this number happens.
    Failure(u64),
    /// A failed node is sound again.
    NodeBack,
    /// The upload with this number is complete.
    Uploaded(u64),
    /// The coordinator fails for the n-th time.
    CoordinatorFails(u64),
}

/// What the run does at the moment.
#[derive(Debug)]
enum Activity {
    /// Starts for the first time.
    Starting,
    /// Computes a step that consists of this.
    Stepping(Spent),
    /// Stands still for a checkpoint, which is complete at its end if it is not uploaded behind the training.
    Saving {
        /// Whether the upload is part of it.
        whole: bool,
    },
    /// Goes through the parts of a recovery.
    Recovering(Cause),
    /// Waits for the last upload.
    Uploading,
}

/// A state that can be gone back to.
#[derive(Clone, Copy, Debug, Default)]
struct Saved {
    step: u64,
    /// What was spent until then.
    spent: Spent,
}

/// A checkpoint on its way to the store.
#[derive(Debug)]
struct Upload {
    number: u64,
    saved: Saved,
    ends: f64,
}

/// The whole state of a simulation.
struct Engine<'a> {
    costs: &'a Costs,
    mechanisms: Mechanisms,
    model: Model<'a>,
    draws: Draws,
    schedule: VecDeque<ScheduledFailure>,
    queue: Queue<Event>,
    now: f64,
    activity: Activity,
    began: f64,
    /// Number of the activity.
    number: u64,
    /// What is still to do before training goes on.
    recovery: VecDeque<Part>,
    needs: Needs,
    fleet: Fleet,
    done: u64,
    spent: Spent,
    safe: Saved,
    upload: Option<Upload>,
    num_uploads: u64,
    /// Seconds of training since the last save, or since the state that was gone back to.
    trained_s: f64,
    save_due: bool,
    coordinator_back: f64,
    failures: u64,
    steps_lost: u64,
    checkpoints: u64,
}

impl<'a> Engine<'a> {
    fn new(costs: &'a Costs, case: &Case, draws: Draws, schedule: VecDeque<ScheduledFailure>) -> Result<Self, Failure> {
        if let Some(problem) = size_problem(case.gpus, costs.gpus_per_node) {
            return Err(Failure::new(FailureKind::Recipe, problem));
        }
        let model = Model::new(costs, case.gpus);
        let fleet = Fleet::new(model.nodes, model.min_nodes(), costs.recovery.spare_nodes, case.mechanisms.elastic);
        let mut engine = Self {
            costs,
            mechanisms: case.mechanisms,
            model,
            draws,
            schedule,
            queue: Queue::new(),
            now: 0.0,
            activity: Activity::Starting,
            began: 0.0,
            number: 0,
            recovery: VecDeque::new(),
            needs: Needs::default(),
            fleet,
            done: 0,
            spent: Spent::default(),
            safe: Saved::default(),
            upload: None,
            num_uploads: 0,
            trained_s: 0.0,
            save_due: false,
            coordinator_back: 0.0,
            failures: 0,
            steps_lost: 0,
            checkpoints: 0,
        };
        engine.begin(Activity::Starting, costs.run.startup_s);
        engine.schedule_failure(0);
        engine.schedule_coordinator_failure(0);
        Ok(engine)
    }

    fn run(mut self) -> Result<Outcome, Failure> {
        while let Some((at, event)) = self.queue.take() {
            self.now = at;
            let finished = match event {
                Event::ActivityEnds(number) => number == self.number && self.activity_ends(),
                Event::Failure(number) => {
                    self.schedule_failure(number + 1);
                    self.fails(self.class_of(number), self.mechanisms.memory_restore);
                    false
                }
                Event::NodeBack => {
                    self.node_back();
                    false
                }
                Event::Uploaded(number) => {
                    self.uploaded(number);
                    false
                }
                Event::CoordinatorFails(number) => {
                    self.coordinator_fails(number);
                    false
                }
            };
            if finished {
                let (steps_lost, checkpoints) = (self.steps_lost, self.checkpoints);
                return Ok(Outcome { wall_s: self.now, spent: self.spent, failures: self.failures, steps_lost, checkpoints });
            }
            if self.failures > MAX_FAILURES {
                break;
            }
        }
        Err(Failure::new(FailureKind::Run, "the simulated run does not end: failures come faster than it recovers from them")
            .found(format!("{} of {} steps done after {} failures", self.done, self.costs.run.steps, self.failures))
            .hint("look at failures.gpu_mtbf_hours and at the seconds of `recovery` in the costs"))
    }

    /// Ends the activity where it stands, and begins another that takes so long.
    fn begin(&mut self, activity: Activity, seconds: f64) {
        self.number += 1;
        self.activity = activity;
        self.began = self.now;
        self.queue.put(self.now + seconds, Event::ActivityEnds(self.number));
    }

    /// The activity ends as planned; whether the run is over with it.
    fn activity_ends(&mut self) -> bool {
        let seconds = self.now - self.began;
        match self.activity {
            Activity::Starting => self.spent.add(Cause::Startup, seconds),
            Activity::Stepping(parts) => self.step_done(&parts),
            Activity::Saving { whole } => {
                self.spent.add(Cause::Checkpoint, seconds);
                self.save_done(whole);
            }
            Activity::Recovering(cause) => self.spent.add(cause, seconds),
            Activity::Uploading => self.spent.add(Cause::Checkpoint, seconds),
        }
        self.go_on()
    }

    /// Chooses what comes next; whether the run is over.
    fn go_on(&mut self) -> bool {
        if self.next_recovery_part() {
            return false;
        }
        let all_done = self.done == self.costs.run.steps;
        // Without restoring from memory newcomers need a checkpoint of this very step.
        if !all_done && self.fleet.can_grow() && (self.mechanisms.memory_restore || self.safe.step == self.done) {
            self.fleet.grow();
            self.needs.state = true;
            self.recovery = self.forming();
            self.next_recovery_part();
        } else if !all_done && self.save_is_due() && self.upload.is_none() {
            self.save();
        } else if let Some(scheduled) = self.schedule.pop_front_if(|scheduled| scheduled.step <= self.done) {
            // The class was checked when the schedule was taken.
            self.fails(self.costs.failures.classes.get(scheduled.class), scheduled.from_memory);
        } else if all_done {
            return self.leave();
        } else {
            let unit = self.draws.unit(Purpose::Slowest, self.done);
            let parts = self.model.step(self.fleet.active, unit);
            self.begin(Activity::Stepping(parts), parts.total());
        }
        false
    }

    fn step_done(&mut self, parts: &Spent) {
        self.spent.add_all(parts);
        self.done += 1;
        self.trained_s += parts.total();
        self.save_due |= self.costs.checkpoint.every_steps.is_some_and(|every| self.done.is_multiple_of(every));
    }

    fn save_is_due(&self) -> bool {
        self.save_due || self.costs.checkpoint.every_s.is_some_and(|every_s| self.trained_s >= every_s)
    }

    /// Begins a checkpoint. Newcomers that need it wait for the whole of it.
    fn save(&mut self) {
        let awaited = self.fleet.can_grow() && !self.mechanisms.memory_restore;
        let whole = !self.mechanisms.async_checkpoint || awaited || self.done == self.costs.run.steps;
        self.trained_s = 0.0;
        self.save_due = false;
        self.checkpoints += 1;
        let upload_s = if whole { self.model.upload_s() } else { 0.0 };
        self.begin(Activity::Saving { whole }, self.costs.checkpoint.snapshot_s + upload_s);
    }

    fn save_done(&mut self, whole: bool) {
        let saved = Saved { step: self.done, spent: self.spent };
        if whole {
            self.safe = saved;
            return;
        }
        self.num_uploads += 1;
        let ends = self.now + self.model.upload_s();
        self.queue.put(ends, Event::Uploaded(self.num_uploads));
        self.upload = Some(Upload { number: self.num_uploads, saved, ends });
    }

    fn uploaded(&mut self, number: u64) {
        if let Some(upload) = self.upload.take_if(|upload| upload.number == number) {
            self.safe = upload.saved;
        }
    }

    /// All steps are done: the last state must be in the store before the run is over.
    fn leave(&mut self) -> bool {
        let checkpoint = &self.costs.checkpoint;
        let saves = checkpoint.every_s.is_some() || checkpoint.every_steps.is_some();
        if !saves || self.safe.step == self.done {
            return true;
        }
        match &self.upload {
            Some(upload) => {
                let wait_s = upload.ends - self.now;
                self.begin(Activity::Uploading, wait_s);
            }
            None => self.save(),
        }
        false
    }

    /// Something fails: what was going on is cut short, and a recovery is planned. No class is the coordinator, without which the job ends.
    fn fails(&mut self, class: Option<&ClassCosts>, from_memory: bool) {
        self.failures += 1;
        self.cut_short();
        let loses = class.map_or(Loses::Process, |class| class.loses);
        let in_place = self.mechanisms.restart_in_place;
        if !in_place || loses != Loses::Nothing {
            // Its share of the checkpoint is gone with the worker.
            self.upload = None;
        }
        self.needs.process |= loses == Loses::Process;
        self.needs.state |= loses != Loses::Nothing;
        if in_place && loses == Loses::Node {
            self.needs.process |= self.fleet.lose_node();
            self.queue.put(self.now + self.costs.recovery.node_replacement_s, Event::NodeBack);
        }
        if !in_place || !from_memory {
            self.go_back();
        }
        self.recovery = self.planned(class);
        self.next_recovery_part();
    }

    /// Accounts for what the activity has taken so far.
    fn cut_short(&mut self) {
        let cause = match self.activity {
            Activity::Starting => Cause::Startup,
            Activity::Stepping(_) => Cause::LostWork,
            Activity::Saving { .. } | Activity::Uploading => Cause::Checkpoint,
            Activity::Recovering(cause) => cause,
        };
        self.spent.add(cause, self.now - self.began);
    }

    /// Back to the newest state in the store.
    fn go_back(&mut self) {
        self.steps_lost += self.done - self.safe.step;
        self.done = self.safe.step;
        self.spent.lose_steps_since(&self.safe.spent);
        self.upload = None;
        self.save_due = false;
        self.trained_s = 0.0;
        self.needs.state = true;
    }

    /// The parts of the recovery from a failure of this class.
    fn planned(&mut self, class: Option<&ClassCosts>) -> VecDeque<Part> {
        let recovery = &self.costs.recovery;
        let noticed_s = class.map_or(0.0, |class| if self.mechanisms.fast_detection { class.detected_s } else { class.undetected_s });
        if !self.mechanisms.restart_in_place {
            self.fleet.replace_all();
            let restore_s = self.restore_s();
            return VecDeque::from([
                Part::new(Cause::Detection, noticed_s),
                Part::new(Cause::Restart, recovery.requeue_s),
                Part::new(Cause::Restore, restore_s),
            ]);
        }
        // While the coordinator is away nobody can be told.
        let away_s = (self.coordinator_back - self.now).max(0.0);
        let mut parts = VecDeque::from([Part::new(Cause::Detection, noticed_s.max(away_s)), Part::new(Cause::Regroup, recovery.abort_s)]);
        // Whoever came back meanwhile takes part without a recovery of its own.
        let newcomers = self.fleet.can_grow();
        self.fleet.grow();
        self.needs.state |= newcomers;
        if self.fleet.must_wait() {
            parts.push_back(Part { cause: Cause::WaitingForNodes, length: Length::UntilNodes });
            self.needs.process = true;
        }
        if self.needs.process {
            parts.push_back(Part::new(Cause::Restart, recovery.process_start_s));
        }
        parts.extend(self.forming());
        parts
    }

    /// The end of every recovery: a generation forms and gets its state.
    fn forming(&self) -> VecDeque<Part> {
        let restore_s = if self.needs.state { self.restore_s() } else { 0.0 };
        VecDeque::from([Part::new(Cause::Regroup, self.model.regroup_s()), Part::new(Cause::Restore, restore_s)])
    }

    fn restore_s(&self) -> f64 {
        if self.mechanisms.restart_in_place && self.mechanisms.memory_restore {
            self.model.restore_from_memory_s()
        } else if self.safe.step == 0 {
            // There is no checkpoint yet: every worker draws the same first values.
            0.0
        } else {
            self.model.restore_from_store_s()
        }
    }

    /// Begins the next part of a recovery, if one is left; the last one clears what was needed.
    fn next_recovery_part(&mut self) -> bool {
        let Some(part) = self.recovery.pop_front() else {
            self.needs = Needs::default();
            return false;
        };
        if part.length == Length::UntilNodes {
            // A node may have come back during the earlier parts.
            self.fleet.grow();
        }
        match part.length {
            Length::Seconds(seconds) => self.begin(Activity::Recovering(part.cause), seconds),
            Length::UntilNodes if self.fleet.must_wait() => {
                // Ends when a node comes back, which has its own event.
                self.number += 1;
                self.activity = Activity::Recovering(part.cause);
                self.began = self.now;
            }
            Length::UntilNodes => self.begin(Activity::Recovering(part.cause), 0.0),
        }
        true
    }

    fn node_back(&mut self) {
        let waited = self.is_waiting();
        self.fleet.node_back(waited);
        if waited && !self.fleet.must_wait() {
            self.spent.add(Cause::WaitingForNodes, self.now - self.began);
            self.next_recovery_part();
        }
    }

    fn is_waiting(&self) -> bool {
        matches!(self.activity, Activity::Recovering(Cause::WaitingForNodes)) && self.fleet.must_wait()
    }

    fn coordinator_fails(&mut self, number: u64) {
        let restart_s = self.costs.coordinator.as_ref().map_or(0.0, |coordinator| coordinator.restart_s);
        self.coordinator_back = self.now + restart_s;
        self.schedule_coordinator_failure(number + 1);
        // With a restart in place the workers train on meanwhile.
        if !self.mechanisms.restart_in_place {
            self.fails(None, false);
        }
    }

    fn schedule_failure(&mut self, number: u64) {
        if let Some(mtbf_s) = self.model.mtbf_s() {
            self.queue.put(self.now + self.draws.exponential(Purpose::FailureGap, number, mtbf_s), Event::Failure(number));
        }
    }

    fn schedule_coordinator_failure(&mut self, number: u64) {
        if let Some(coordinator) = &self.costs.coordinator {
            let gap_s = self.draws.exponential(Purpose::CoordinatorGap, number, coordinator.mtbf_hours * 3600.0);
            // It cannot fail again before it is back.
            self.queue.put(self.coordinator_back.max(self.now) + gap_s, Event::CoordinatorFails(number));
        }
    }

    /// The class of a drawn failure; the last one takes what rounding of the shares leaves over.
    fn class_of(&self, number: u64) -> Option<&'a ClassCosts> {
        let mut unit = self.draws.unit(Purpose::FailureClass, number);
        let classes = &self.costs.failures.classes;
        classes
            .iter()
            .find(|class| {
                unit -= class.share;
                unit < 0.0
            })
            .or(classes.last())
    }
}
