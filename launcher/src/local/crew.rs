//! The worker processes that one program started or found, by slot: what each is doing, and when it is ended or replaced.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use cloze_cluster::host::host_name;
use cloze_cluster::{Event, FailureClass};
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::Instrument as _;

use super::contact::Contact;
use super::drill::Drill;
use super::process::{Exit, ProcessOrder, WorkerCommand, WorkerProcess};
use super::record::ProcessRecord;
use super::restart::{ExitDecision, ExitFacts, ExitReason, RestartLimits, decide_exit};

/// Time for a worker that lost its seat to leave by itself, and so to say why, before it is killed.
const LOST_WORKER_GRACE_S: u64 = 1;

/// After the run has ended, longest time for the workers to leave before they are killed.
pub(super) const LEAVE_TIMEOUT_S: u64 = 10;

/// Longest wait for killed processes to be gone.
pub(super) const KILL_TIMEOUT_S: u64 = 5;

/// Longest usual time between two looks at processes that have not joined. Whoever did not look for longer stood still.
const USUAL_GAP_S: u64 = 5;

/// The processes of one program.
pub(super) struct Crew {
    command: WorkerCommand,
    slots: BTreeMap<u32, Slot>,
    processes: JoinSet<Exit>,
    /// Replacements so far.
    restarts: u32,
    /// This host is used no more.
    excluded: bool,
    /// When it was last looked whether processes hang.
    looked: Option<Instant>,
}

/// One worker slot.
#[derive(Default)]
struct Slot {
    /// Where the live process takes its orders; `None` while there is none.
    orders: Option<Sender<ProcessOrder>>,
    process_id: u32,
    /// The live process has joined the coordinator.
    joined: bool,
    /// The worker has said that it is done.
    finished: bool,
    /// How the coordinator lost the live process.
    class: Option<FailureClass>,
    /// When the live process, which this program has started, must have joined.
    join_by: Option<Instant>,
    /// When the live process is killed, having lost its seat.
    kill_at: Option<Instant>,
    /// When a replacement is started, and what the budget is then.
    restart_at: Option<(Instant, u32)>,
    restarts: u32,
    /// Nobody fills this slot any more.
    empty: bool,
    /// What the slot's first process practises; its replacements do not.
    drills: Vec<String>,
}

/// A process that is to take the place of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Replacement {
    /// Its slot.
    pub worker: u32,
    /// Restarts of this slot so far, from 1.
    pub attempt: u32,
    /// Restarts that are left.
    pub budget_left: u32,
}

/// What becomes of a slot whose process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    /// What is done.
    pub decision: ExitDecision,
    /// Why.
    pub reason: ExitReason,
    /// The worker had said that it was done.
    pub finished: bool,
}

impl Crew {
    /// A crew without processes yet.
    pub(super) fn new(command: WorkerCommand, slots: impl IntoIterator<Item = u32>) -> Self {
        let slots = slots.into_iter().map(|worker| (worker, Slot::default())).collect();
        Self { command, slots, processes: JoinSet::new(), restarts: 0, excluded: false, looked: None }
    }

    /// Gives the slots' first processes what they are to practise. A process that lives already cannot be told any more.
    pub(super) fn practise(&mut self, drills: &[Drill]) {
        for drill in drills.iter().filter(|drill| drill.kind.is_in_worker()) {
            match self.slots.get_mut(&drill.worker) {
                Some(slot) if slot.orders.is_none() => slot.drills.push(drill.worker_argument()),
                _ => tracing::warn!(?drill, "a drill is left out: its worker lives already"),
            }
        }
    }

    /// What all its processes have in common.
    pub(super) fn command(&self) -> &WorkerCommand {
        &self.command
    }

    /// Lets later processes look for the coordinator elsewhere.
    pub(super) fn redirect(&mut self, contact: Contact) {
        self.command.contact = contact;
    }

    /// The slots that have no process.
    pub(super) fn vacant(&self) -> Vec<u32> {
        self.slots.iter().filter(|(_, slot)| slot.orders.is_none()).map(|(&worker, _)| worker).collect()
    }

    /// Whether no process lives and none is to come.
    pub(super) fn is_done(&self) -> bool {
        self.slots.values().all(|slot| slot.orders.is_none() && slot.restart_at.is_none())
    }

    /// Starts a slot's process; returns its id.
    pub(super) fn start(&mut self, worker: u32) -> anyhow::Result<u32> {
        let slot = self.slots.entry(worker).or_default();
        let (process, orders) = WorkerProcess::start(&self.command, worker, &std::mem::take(&mut slot.drills))?;
        (slot.joined, slot.class, slot.kill_at) = (false, None, None);
        slot.join_by = Some(Instant::now() + self.command.join_within);
        Ok(self.watch(worker, process, orders))
    }

    /// Takes over a process that lives already. It is killed at the deadline unless it joins before.
    pub(super) fn find(&mut self, record: ProcessRecord, deadline: Option<Instant>) {
        let worker = record.worker;
        let (process, orders) = WorkerProcess::find(&self.command, record);
        let slot = self.slots.entry(worker).or_default();
        // Its seat in the generation that still runs is its join.
        (slot.joined, slot.kill_at) = (true, deadline);
        self.watch(worker, process, orders);
    }

    fn watch(&mut self, worker: u32, process: WorkerProcess, orders: Sender<ProcessOrder>) -> u32 {
        let process_id = process.process_id();
        let slot = self.slots.entry(worker).or_default();
        (slot.orders, slot.process_id) = (Some(orders), process_id);
        let span = tracing::info_span!("worker process", worker, process_id);
        self.processes.spawn(process.wait().instrument(span));
        process_id
    }

    /// Takes note of what the coordinator said. A worker that fell silent or hung leaves its stacks before it is killed.
    pub(super) fn hear(&mut self, event: &Event, now: Instant) {
        match event {
            Event::WorkerJoined { worker, .. } => {
                if let Some(slot) = self.slots.get_mut(worker) {
                    (slot.joined, slot.class, slot.kill_at, slot.join_by) = (true, None, None, None);
                }
            }
            Event::WorkerFinished { worker, .. } => {
                if let Some(slot) = self.slots.get_mut(worker) {
                    slot.finished = true;
                }
            }
            Event::WorkerLost { worker, class, .. } => self.lose(*worker, *class, now),
            Event::HostExcluded { host, .. } if *host == host_name() => self.excluded = true,
            _ => {}
        }
    }

    fn lose(&mut self, worker: u32, class: FailureClass, now: Instant) {
        let Some(slot) = self.slots.get_mut(&worker) else { return };
        // A process that has not joined is the replacement of the lost one.
        if !std::mem::take(&mut slot.joined) || slot.orders.is_none() {
            return;
        }
        slot.class = Some(class);
        if matches!(class, FailureClass::Hung | FailureClass::MissedHeartbeat) {
            let path = self.command.paths.dump(worker, slot.process_id);
            self.order(worker, ProcessOrder::DumpAndKill(path));
        } else {
            slot.kill_at = Some(now + Duration::from_secs(LOST_WORKER_GRACE_S));
        }
    }

    /// Gives the live process of a slot an order; where there is none, none is needed.
    pub(super) fn order(&self, worker: u32, order: ProcessOrder) {
        let Some(orders) = self.slots.get(&worker).and_then(|slot| slot.orders.as_ref()) else { return };
        if let Err(TrySendError::Full(order)) = orders.try_send(order) {
            tracing::warn!(worker, ?order, "a worker process has too many orders to follow one more");
        }
    }

    /// The slots whose processes should have joined by now. Time in which nobody asked is given back to them: who did not look, or stood
    /// still, has heard nothing either.
    pub(super) fn hanging(&mut self, now: Instant) -> Vec<u32> {
        let gap = now.saturating_duration_since(self.looked.replace(now).unwrap_or(now));
        let excused = if gap > Duration::from_secs(USUAL_GAP_S) { gap } else { Duration::ZERO };
        for by in self.slots.values_mut().filter_map(|slot| slot.join_by.as_mut()) {
            *by += excused;
        }
        let is_late = |slot: &Slot| slot.join_by.is_some_and(|by| now >= by);
        self.slots.iter().filter(|(_, slot)| is_late(slot)).map(|(&worker, _)| worker).collect()
    }

    /// Ends processes that hang before they join, with their stacks written down.
    pub(super) fn end_hanging(&mut self, late: &[u32]) {
        for worker in late {
            let Some(slot) = self.slots.get_mut(worker) else { continue };
            slot.join_by = None;
            let dump = self.command.paths.dump(*worker, slot.process_id);
            self.order(*worker, ProcessOrder::DumpAndKill(dump));
        }
    }

    /// Gives processes that have not joined as much time again.
    pub(super) fn grant(&mut self, late: &[u32], now: Instant) {
        for worker in late {
            if let Some(slot) = self.slots.get_mut(worker) {
                slot.join_by = Some(now + self.command.join_within);
            }
        }
    }

    /// Kills the processes whose time has come; returns the replacements that are due.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Replacement> {
        let mut replacements = Vec::new();
        let mut to_kill = Vec::new();
        for (&worker, slot) in &mut self.slots {
            if slot.kill_at.take_if(|at| now >= *at).is_some() {
                to_kill.push(worker);
            }
            if let Some((_, budget_left)) = slot.restart_at.take_if(|(at, _)| now >= *at) {
                replacements.push(Replacement { worker, attempt: slot.restarts, budget_left });
            }
        }
        for worker in to_kill {
            self.order(worker, ProcessOrder::Kill);
        }
        replacements
    }

    /// Puts a replacement off.
    pub(super) fn postpone(&mut self, replacement: Replacement, until: Instant) {
        if let Some(slot) = self.slots.get_mut(&replacement.worker) {
            slot.restart_at = Some((until, replacement.budget_left));
        }
    }

    /// Waits for the end of a process; `None` while there is none. Loses nothing when it is dropped while it waits.
    pub(super) async fn next_exit(&mut self) -> Option<anyhow::Result<Exit>> {
        let exit = self.processes.join_next().await?.context("watch a worker process");
        if let Ok(exit) = &exit {
            self.forget(exit.worker);
        }
        Some(exit)
    }

    /// Decides what becomes of a slot, and takes note of it.
    pub(super) fn take_exit(&mut self, exit: &Exit, stopping: bool, limits: &RestartLimits) -> Verdict {
        let num_empty = self.slots.values().filter(|slot| slot.empty).count() as u32;
        let others = self.command.slots.saturating_sub(num_empty + 1);
        let slot = self.slots.entry(exit.worker).or_default();
        (slot.orders, slot.kill_at, slot.join_by, slot.joined) = (None, None, None, false);
        let facts = ExitFacts {
            code: exit.code,
            finished: slot.finished,
            stopping,
            restarts: self.restarts,
            slot_restarts: slot.restarts,
            class: slot.class,
            excluded: self.excluded,
            others,
        };
        let (decision, reason) = decide_exit(&facts, limits);
        tracing::debug!(worker = exit.worker, status = exit.status, %reason, ?decision, "a worker process ended");
        match decision {
            ExitDecision::Restart { after, budget_left } => {
                slot.restarts += 1;
                slot.restart_at = Some((Instant::now() + after, budget_left));
                self.restarts += 1;
            }
            ExitDecision::LeaveEmpty => slot.empty = true,
            ExitDecision::Expected | ExitDecision::GiveUp { .. } => {}
        }
        Verdict { decision, reason, finished: facts.finished }
    }

    /// Starts no more replacements.
    pub(super) fn stop_replacing(&mut self) {
        for slot in self.slots.values_mut() {
            slot.restart_at = None;
        }
    }

    /// Kills every process; nothing is replaced any more.
    pub(super) fn kill_all(&mut self) {
        self.stop_replacing();
        for &worker in self.slots.keys() {
            self.order(worker, ProcessOrder::Kill);
        }
    }

    /// Waits for the processes to leave, then kills what is left.
    pub(super) async fn end(&mut self, patience: Duration) {
        self.stop_replacing();
        if timeout(patience, self.all_ended()).await.is_ok() {
            return;
        }
        self.kill_all();
        if timeout(Duration::from_secs(KILL_TIMEOUT_S), self.all_ended()).await.is_err() {
            // Dropping the tasks kills once more; a process that survives that hangs in the kernel.
            tracing::error!(timeout_s = KILL_TIMEOUT_S, "some worker processes do not end");
        }
    }

    async fn all_ended(&mut self) {
        while self.next_exit().await.is_some() {}
    }

    /// Removes the record of a process that has ended. One that stays names a start time that no live process has.
    fn forget(&self, worker: u32) {
        if let Err(error) = ProcessRecord::remove(&self.command.paths, worker) {
            tracing::debug!(worker, error = format!("{error:#}"), "the record of a worker process stays behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use cloze_cluster::Secret;

    use super::*;
    use crate::run_folder::RunPaths;
    use crate::sample::script;

    const PATIENCE: Duration = Duration::from_mins(1);

    fn crew(folder: &Path, commands: &str) -> Crew {
        let paths = RunPaths::new(folder.to_owned());
        for folder in paths.folders() {
            std::fs::create_dir_all(folder).unwrap();
        }
        let binary = script(folder, commands);
        let contact = Contact { coordinator: "127.0.0.1:1".to_owned(), token: Secret::new("token"), key: None };
        let join_within = PATIENCE;
        Crew::new(
            WorkerCommand { binary, paths, contact, slots: 3, local_workers: 2, recipe_hash: "l".to_owned(), by_join: false, join_within },
            0..2,
        )
    }

    fn lost(worker: u32, class: FailureClass) -> Event {
        Event::WorkerLost { worker, rank: Some(worker), host: host_name(), class, reason: "silence".to_owned() }
    }

    async fn next(crew: &mut Crew) -> Exit {
        timeout(PATIENCE, crew.next_exit()).await.unwrap().unwrap().unwrap()
    }

    #[tokio::test]
    async fn a_worker_that_hangs_is_dumped_killed_and_replaced_without_its_drill() {
        let folder = tempfile::tempdir().unwrap();
        let mut crew = crew(folder.path(), "echo \"$@\"; kill -STOP $$");
        crew.practise(&["hang:1@3".parse().unwrap(), "kill:0@3".parse().unwrap()]);
        let process_id = crew.start(1).unwrap();
        let now = Instant::now();
        crew.hear(&Event::WorkerJoined { worker: 1, host: host_name(), process_id: 7, rejoined: false }, now);
        crew.hear(&lost(1, FailureClass::Hung), now);
        let exit = next(&mut crew).await;
        assert_eq!((exit.process_id, exit.status.as_str()), (process_id, "SIGKILL"));
        assert_eq!(exit.dump, Some(Ok(crew.command().paths.dump(1, process_id))));
        let limits = RestartLimits { max_restarts: 1, min_workers: None };
        let verdict = crew.take_exit(&exit, false, &limits);
        assert_eq!((verdict.reason, verdict.finished), (ExitReason::EndedEarly, false));
        assert!(!crew.is_done() && crew.vacant() == [0, 1]);
        let replacement = Replacement { worker: 1, attempt: 1, budget_left: 0 };
        assert_eq!(crew.due(Instant::now() + PATIENCE), [replacement]);
        crew.start(1).unwrap();
        // A word about the predecessor does not reach the replacement, which has not joined.
        crew.hear(&lost(1, FailureClass::Hung), now);
        crew.order(1, ProcessOrder::Kill);
        let exit = next(&mut crew).await;
        assert!(exit.dump.is_none());
        let log = std::fs::read_to_string(crew.command().paths.log(1)).unwrap();
        assert!(log.matches("--drill hang@3").count() <= 1, "{log}");
        let verdict = crew.take_exit(&exit, false, &limits);
        assert_eq!(verdict.reason, ExitReason::BudgetSpent { max_restarts: 1 });
        assert!(crew.is_done());
    }

    #[tokio::test]
    async fn a_worker_that_does_not_come_to_join_is_dumped_killed_and_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let mut crew = crew(folder.path(), "kill -STOP $$");
        let (quick, slow) = (crew.start(0).unwrap(), crew.start(1).unwrap());
        let now = Instant::now();
        crew.hear(&Event::WorkerJoined { worker: 0, host: host_name(), process_id: quick, rejoined: false }, now);
        assert!(crew.hanging(now).is_empty());
        assert!(crew.hanging(now + 2 * PATIENCE).is_empty(), "whoever has not looked for so long has not heard of a join either");
        let looks = (0..60).map(|second| now + 2 * PATIENCE + Duration::from_secs(second));
        let late: Vec<Instant> = looks.clone().filter(|&at| !crew.hanging(at).is_empty()).collect();
        assert!(late.is_empty(), "it has its whole time from then on");
        let end = now + 3 * PATIENCE + Duration::from_secs(1);
        assert_eq!(crew.hanging(end), [1]);
        crew.grant(&[1], end);
        assert!(crew.hanging(end + Duration::from_secs(1)).is_empty());
        crew.end_hanging(&[1]);
        let exit = next(&mut crew).await;
        assert_eq!((exit.worker, exit.process_id, exit.status.as_str()), (1, slow, "SIGKILL"));
        assert!(exit.dump.as_ref().is_some_and(|dump| dump.as_ref().is_ok_and(|path| path.exists())), "{:?}", exit.dump);
        let verdict = crew.take_exit(&exit, false, &RestartLimits { max_restarts: 1, min_workers: None });
        assert_eq!(verdict.reason, ExitReason::EndedEarly);
    }

    #[tokio::test]
    async fn a_worker_that_joins_again_is_spared() {
        let folder = tempfile::tempdir().unwrap();
        let mut crew = crew(folder.path(), "kill -STOP $$");
        for worker in [0, 1] {
            crew.start(worker).unwrap();
        }
        let now = Instant::now();
        let joined = |worker, rejoined| Event::WorkerJoined { worker, host: host_name(), process_id: 7, rejoined };
        for worker in [0, 1] {
            crew.hear(&joined(worker, false), now);
            crew.hear(&lost(worker, FailureClass::ConnectionClosed), now);
        }
        crew.hear(&joined(0, true), now);
        assert!(crew.due(now).is_empty());
        assert!(crew.due(now + Duration::from_secs(LOST_WORKER_GRACE_S)).is_empty());
        assert_eq!(next(&mut crew).await.worker, 1);
        assert!(crew.vacant().is_empty(), "the exit was not taken note of yet");
        crew.end(Duration::ZERO).await;
        assert!(super::super::record::living(&crew.command().paths).unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_process_that_was_found_has_until_its_deadline_to_join() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = crew(folder.path(), "kill -STOP $$");
        first.start(0).unwrap();
        let found = super::super::record::living(&first.command().paths).unwrap();
        let mut second = crew(folder.path(), "kill -STOP $$");
        let now = Instant::now();
        second.find(found[0].clone(), Some(now + PATIENCE));
        assert_eq!(second.vacant(), [1]);
        assert!(second.due(now + PATIENCE / 2).is_empty());
        assert!(second.due(now + PATIENCE).is_empty());
        let (own, other) = tokio::join!(next(&mut first), next(&mut second));
        assert_eq!((own.status.as_str(), other.code), ("SIGKILL", None));
    }

    #[tokio::test]
    async fn a_slot_on_a_bad_host_stays_empty() {
        let folder = tempfile::tempdir().unwrap();
        let mut crew = crew(folder.path(), "exit 5");
        crew.start(0).unwrap();
        crew.hear(&Event::HostExcluded { host: host_name(), failures: 3 }, Instant::now());
        let exit = next(&mut crew).await;
        let verdict = crew.take_exit(&exit, false, &RestartLimits { max_restarts: 9, min_workers: Some(1) });
        assert_eq!((verdict.decision, verdict.reason), (ExitDecision::LeaveEmpty, ExitReason::HostExcluded));
    }
}
