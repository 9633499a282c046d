//! Stories of failures, event by event.

use cloze_recipes::failure::FailureKind;

use super::*;
use crate::view::fixtures::{aborted, exited, generation, lost, recorded, recovered, restored, start, step};

/// The records of a story that goes on behind the usual start and step 57, and how many were given out before its last event.
fn story(events: Vec<Event>) -> (Vec<FailureRecord>, usize) {
    let mut ledger = Ledger::new();
    let mut given = Vec::new();
    let mut before = 0;
    for event in recorded(start().into_iter().chain([step(1, 57, 1.0)]).chain(events)) {
        before = given.len();
        given.extend(ledger.apply(&event));
    }
    assert_eq!(ledger.open_records().count(), 0, "nothing stays open");
    (given, before)
}

fn restarted() -> Event {
    Event::WorkerRestarted { worker: 1, attempt: 1, budget_left: 2 }
}

fn joined(rejoined: bool) -> Event {
    Event::WorkerJoined { worker: 1, host: "node-a".to_owned(), process_id: 111, rejoined }
}

fn abort(reason: &str, worker: Option<u32>) -> Event {
    Event::GenerationAborted { generation: 1, reason: reason.to_owned(), step: 57, worker, rank: worker }
}

const CLOSED: FailureClass = FailureClass::ConnectionClosed;

#[test]
fn a_killed_worker_is_told_whole() {
    let events = vec![
        lost(Some(1)),
        aborted(1, 58),
        exited(),
        restarted(),
        Event::WorkerStarted { worker: 1, process_id: 111 },
        joined(false),
        generation(2, &[0, 1]),
        restored(2, 58, "memory of worker 0"),
        step(2, 59, 1.0),
        recovered(2, 1, CLOSED),
    ];
    let (records, before) = story(events);
    assert_eq!(before, 0, "it is complete with the recovery");
    // Seven events of the start, then step 57; the loss is the ninth.
    let expected = FailureRecord {
        time: 8.0,
        class: CLOSED,
        worker: Some(1),
        rank: Some(1),
        host: Some("node-a".to_owned()),
        reason: "connection closed".to_owned(),
        exit: Some("signal 9 (SIGKILL)".to_owned()),
        dump: None,
        generation: 1,
        step: 58,
        decision: Some(Decision::Replaced),
        recovered_s: Some(0.8),
        steps_lost: Some(0),
        source: Some("memory of worker 0".to_owned()),
    };
    assert_eq!(records, [expected]);
}

#[test]
fn decisions() {
    let excluded = Event::HostExcluded { host: "node-a".to_owned(), failures: 3 };
    let failed = || Event::RunFailed { failure: Failure::new(FailureKind::Run, "the restart budget is spent") };
    let whole = || vec![generation(2, &[0, 1]), recovered(2, 1, CLOSED)];
    let smaller = || vec![generation(2, &[0]), recovered(2, 1, CLOSED)];
    let cases = [
        ("replaced", vec![restarted(), joined(false)], whole(), Some(Decision::Replaced)),
        ("replaced by `cloze join`", vec![joined(false)], whole(), Some(Decision::Replaced)),
        ("came back", vec![joined(true)], whole(), Some(Decision::JoinedAgain)),
        ("fewer", vec![], smaller(), Some(Decision::WentOnWithFewer)),
        ("excluded", vec![excluded], smaller(), Some(Decision::HostExcluded)),
        ("failed", vec![restarted()], vec![failed()], Some(Decision::Stopped)),
        ("stopped by hand", vec![restarted()], vec![Event::RunStopped { step: 57 }], Some(Decision::Replaced)),
    ];
    for (name, deeds, end, decision) in cases {
        let events = [vec![lost(Some(1)), aborted(1, 57), exited()], deeds, end].concat();
        let (records, _) = story(events);
        assert_eq!(records.iter().map(|record| record.decision).collect::<Vec<_>>(), [decision], "{name}");
    }
}

#[test]
fn a_record_waits_for_the_end_of_its_process() {
    let dumped = Event::StackDumped { worker: 1, process_id: 101, path: "dumps/worker-1-101.txt".to_owned() };
    let events = vec![lost(Some(1)), aborted(1, 57), generation(2, &[0]), recovered(2, 1, CLOSED), dumped, exited()];
    let (records, before) = story(events);
    assert_eq!((before, records.len()), (0, 1));
    assert_eq!(records[0].exit.as_deref(), Some("signal 9 (SIGKILL)"));
    assert_eq!(records[0].dump.as_deref(), Some("dumps/worker-1-101.txt"));
}

#[test]
fn a_process_that_never_joined_has_a_record_of_its_own() {
    let dumped = Event::StackDumped { worker: 1, process_id: 111, path: "dumps/worker-1-111.txt".to_owned() };
    let ended = Event::WorkerExited { worker: 1, process_id: 111, status: "SIGKILL".to_owned(), tail: String::new() };
    let started = |process_id| Event::WorkerStarted { worker: 1, process_id };
    let events = vec![lost(Some(1)), aborted(1, 57), exited(), restarted(), started(111), dumped, ended, restarted(), started(121)];
    let (records, _) = story([events, vec![joined(false), generation(2, &[0, 1]), recovered(2, 1, CLOSED)]].concat());
    let told = records.iter().map(|record| (record.class, record.dump.is_some(), record.exit.as_deref(), record.decision));
    let replaced = Some(Decision::Replaced);
    let expected = [(FailureClass::Hung, true, Some("SIGKILL"), replaced), (CLOSED, false, Some("signal 9 (SIGKILL)"), replaced)];
    assert_eq!(told.collect::<Vec<_>>(), expected);
}

#[test]
fn the_end_of_a_process_elsewhere_is_waited_for_as_long_as_it_may_come() {
    let joined = Event::WorkerJoined { worker: 1, host: "node-b".to_owned(), process_id: 909, rejoined: false };
    let ended = Event::WorkerExited { worker: 1, process_id: 909, status: "SIGSEGV".to_owned(), tail: String::new() };
    // The controller's own process has ended; the next one came by `cloze join`.
    let events = vec![exited(), joined, lost(Some(1)), aborted(1, 57), generation(2, &[0]), recovered(2, 1, CLOSED)];
    let (records, before) = story([events.clone(), vec![ended]].concat());
    assert_eq!((before, records.len(), records[0].exit.as_deref()), (0, 1, Some("SIGSEGV")));
    // Its host is lost with it: a step half a minute later, nobody waits any more.
    let steps = (58..95).map(|number| step(2, number, 1.0)).collect();
    let (records, before) = story([events, steps].concat());
    assert_eq!((records.len(), records[0].exit.as_deref()), (1, None));
    assert_eq!(before, 1);
}

#[test]
fn an_end_that_is_known_before_the_loss_counts() {
    let events = vec![exited(), lost(Some(1)), aborted(1, 57), restarted(), generation(2, &[0, 1]), recovered(2, 1, CLOSED)];
    assert_eq!(story(events).0[0].exit.as_deref(), Some("signal 9 (SIGKILL)"));
}

#[test]
fn nobody_is_lost_when_a_step_is_retried() {
    let events = vec![
        abort("worker 1 (rank 1): its loss is not finite", Some(1)),
        generation(2, &[0, 1]),
        restored(2, 63, "memory"),
        recovered(2, 1, FailureClass::NotFinite),
    ];
    let (records, _) = story(events);
    let record = &records[0];
    assert_eq!((records.len(), record.worker, record.rank, record.class), (1, Some(1), Some(1), FailureClass::NotFinite));
    assert_eq!(record.host.as_deref(), Some("node-a"));
    // The state in memory tells how far the workers were, also where not every step is reported.
    assert_eq!((record.decision, record.step), (Some(Decision::RetriedTheStep), 63));
}

#[test]
fn nobody_is_named_where_all_failed() {
    let events = vec![abort("all ranks: their loss is not finite", None), generation(2, &[0, 1]), recovered(2, 1, FailureClass::NotFinite)];
    let (records, _) = story(events);
    assert_eq!((records.len(), records[0].worker, records[0].host.as_deref()), (1, None, None));
}

#[test]
fn a_worker_that_ended_while_no_controller_lived_is_named() {
    let again = Event::RunStarted { name: "demo".to_owned(), recipe_hash: "4f1c".to_owned(), workers: 2, min_workers: None, steps: 300 };
    let not_adopted = Event::CoordinatorRestarted { generation: 1, adopted: false };
    let started = Event::WorkerStarted { worker: 1, process_id: 111 };
    let cases = [
        ("its successor is there first", vec![started.clone(), joined(false)], vec![], Some(Decision::Replaced)),
        ("its successor comes later", vec![], vec![started, restarted(), joined(false)], Some(Decision::Replaced)),
        ("it comes back", vec![], vec![joined(true)], Some(Decision::JoinedAgain)),
    ];
    for (name, before, after, decision) in cases {
        let abort = abort("worker 1 came back without the generation", Some(1));
        let whole = vec![generation(2, &[0, 1]), restored(2, 57, "memory of worker 0"), recovered(2, 1, CLOSED)];
        let (records, _) = story([vec![again.clone()], before, vec![not_adopted.clone(), abort], after, whole].concat());
        let found: Vec<_> = records.iter().map(|record| (record.worker, record.class, record.decision)).collect();
        assert_eq!(found, [(Some(1), CLOSED, decision)], "{name}");
    }
}

#[test]
fn a_worker_that_tells_its_own_failure_has_one_record() {
    let events = vec![
        abort("worker 1 (rank 1): out of memory", Some(1)),
        lost(None),
        exited(),
        restarted(),
        generation(2, &[0, 1]),
        recovered(2, 1, FailureClass::OutOfMemory),
    ];
    let (records, _) = story(events);
    let record = &records[0];
    assert_eq!((records.len(), record.worker, record.class), (1, Some(1), FailureClass::OutOfMemory));
    assert_eq!((record.decision, record.exit.is_some()), (Some(Decision::Replaced), true));
    // The loss of another worker is another failure.
    let events =
        vec![abort("worker 11 (rank 1): out of memory", Some(11)), lost(None), exited(), generation(2, &[0]), recovered(2, 1, CLOSED)];
    assert_eq!(story(events).0.len(), 2);
}

#[test]
fn a_loss_between_generations_ends_with_the_next_one() {
    let (records, _) = story(vec![lost(None), exited(), restarted(), generation(2, &[0, 1])]);
    assert_eq!((records.len(), records[0].decision, records[0].recovered_s), (1, Some(Decision::Replaced), None));
}

#[test]
fn two_failed_generations_recover_together() {
    let events = vec![
        lost(Some(1)),
        aborted(1, 57),
        exited(),
        generation(2, &[0, 1]),
        Event::GenerationAborted { generation: 2, reason: "the collective broke".to_owned(), step: 57, worker: None, rank: None },
        generation(3, &[0, 1]),
        recovered(3, 2, FailureClass::Collective),
    ];
    let (records, before) = story(events);
    assert_eq!((before, records.len()), (0, 2));
    assert!(records.iter().all(|record| record.recovered_s == Some(0.8)));
    assert_eq!([records[0].class, records[1].class], [CLOSED, FailureClass::Collective]);
}

#[test]
fn a_run_that_fails_by_itself_has_a_record() {
    let (records, _) = story(vec![Event::RunFailed { failure: Failure::new(FailureKind::Damaged, "a shard is damaged").at("shard 3") }]);
    assert_eq!(records[0].reason, "a shard is damaged (shard 3)");
    assert_eq!((records[0].class, records[0].decision), (FailureClass::Other, Some(Decision::Stopped)));
}

#[test]
fn what_is_open_comes_out_at_the_end() {
    let mut ledger = Ledger::new();
    for event in recorded(start().into_iter().chain([lost(Some(1)), aborted(1, 57)])) {
        assert!(ledger.apply(&event).is_empty());
    }
    let records = ledger.finish();
    assert_eq!((records.len(), records[0].decision), (1, None));
    assert!(ledger.finish().is_empty());
}

#[test]
fn names_are_those_of_the_json() {
    for decision in [Decision::RetriedTheStep, Decision::WentOnWithFewer, Decision::Stopped] {
        assert_eq!(serde_json::to_value(decision).unwrap(), decision.text());
    }
    for class in [FailureClass::NotFinite, FailureClass::MissedHeartbeat, FailureClass::Other] {
        assert_eq!(serde_json::to_value(class).unwrap(), class_name(class));
    }
}
