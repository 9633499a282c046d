//! The decision table, with a clock that the test sets.

use cloze_recipes::failure::FailureKind;

use super::*;
use crate::protocol::{Phase, Share};

/// Seconds since the coordinator's start.
fn at(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn limits() -> Limits {
    Limits {
        heartbeat_timeout: at(5.0),
        join_timeout: at(30.0),
        blame_grace: at(0.5),
        max_fruitless_generations: 3,
        min_workers: None,
        replacement_wait: at(10.0),
        hang: HangLimits { init: at(100.0), data: at(40.0), step: at(20.0), checkpoint: at(60.0) },
        retries_per_step: 2,
        exclude_host_after: 0,
        state_is_replicated: true,
        until_step: None,
        adopt_timeout: at(10.0),
    }
}

fn elastic(min_workers: u32) -> Limits {
    Limits { min_workers: Some(min_workers), ..limits() }
}

/// A member of generation 1 that trains.
fn training(heard: f64) -> Worker {
    doing(Phase::Training, heard, heard)
}

fn doing(phase: Phase, since: f64, heard: f64) -> Worker {
    let activity = Activity { phase, waiting: false, progress: 1, since: at(since) };
    Worker::Present(Presence { host: "a".to_owned(), heard: at(heard), generation: 1, ready: None, activity })
}

fn waiting(since: f64, heard: f64) -> Worker {
    let Worker::Present(mut presence) = doing(Phase::Training, since, heard) else { panic!("present") };
    presence.activity.waiting = true;
    Worker::Present(presence)
}

/// A worker that waits for a generation, with a state of so many steps.
fn ready(heard: f64, state_step: Option<u64>) -> Worker {
    let Worker::Present(mut presence) = doing(Phase::Joining, 0.0, heard) else { panic!("present") };
    presence.ready = Some(Ready { state_step, share: None });
    Worker::Present(presence)
}

fn absent(cause: &str) -> Worker {
    absence(cause, true)
}

fn absence(cause: &str, is_awaited: bool) -> Worker {
    Worker::Absent(Absence { cause: cause.to_owned(), class: FailureClass::ConnectionClosed, host: "a".to_owned(), is_awaited })
}

fn gathering(since: f64, workers: Vec<Worker>) -> State {
    State { stage: Stage::Gathering { since: at(since), patient: true }, workers, generation: 1, ..State::new(0) }
}

/// All slots are members.
fn running(workers: Vec<Worker>) -> State {
    let members = (0..workers.len() as u32).collect();
    State { stage: Stage::Running { members, regroup: None }, generation: 1, workers, ..State::new(0) }
}

fn adopting(since: f64, workers: Vec<Worker>) -> State {
    let members = (0..workers.len() as u32).collect();
    State { stage: Stage::Adopting { members, since: at(since) }, generation: 1, workers, ..State::new(0) }
}

fn start(members: &[u32], source: StateSource) -> Decision {
    Decision::Start { members: members.to_vec(), source }
}

fn scratch(members: &[u32]) -> Decision {
    start(members, StateSource::Checkpoint)
}

fn check(limits: &Limits, cases: Vec<(&str, f64, State, Decision, &str)>) {
    for (name, now, state, decision, reason) in cases {
        let (found, why) = decide(at(now), &state, limits);
        assert_eq!((found, why.to_string().as_str()), (decision, reason), "{name}");
    }
}

#[test]
fn gathering_table() {
    check(
        &limits(),
        vec![
            ("nobody yet", 1.0, State::new(2), Decision::Wait, "waiting for workers 0, 1"),
            ("one of two", 1.0, gathering(0.0, vec![ready(0.5, None), absent("x")]), Decision::Wait, "waiting for worker 1"),
            ("all joined", 1.0, gathering(0.0, vec![ready(0.5, None); 2]), scratch(&[0, 1]), "all 2 workers are there"),
            ("a world of one", 1.0, gathering(0.0, vec![ready(0.5, None)]), scratch(&[0]), "the worker is there"),
            (
                "a survivor sends heartbeats and has not left the old generation",
                21.0,
                gathering(20.0, vec![training(20.9), ready(20.5, None)]),
                Decision::Wait,
                "waiting until all workers are ready",
            ),
            (
                "heartbeat missed",
                10.0,
                gathering(0.0, vec![ready(4.9, None), absent("x")]),
                Decision::Lose { worker: 0, class: FailureClass::MissedHeartbeat },
                "no heartbeat for 5.1 s",
            ),
            ("just in time", 10.0, gathering(0.0, vec![ready(5.0, None), absent("x")]), Decision::Wait, "waiting for worker 1"),
            ("join timeout not yet", 30.0, gathering(0.0, vec![ready(29.0, None), absent("x")]), Decision::Wait, "waiting for worker 1"),
        ],
    );
}

#[test]
fn the_state_comes_from_the_newest_memory() {
    let peer = |rank, step| StateSource::Peer { rank, step };
    let cases = [
        ("nobody has one", vec![None, None], 0, true, StateSource::Checkpoint),
        ("a survivor has it", vec![None, Some(17)], 10, true, peer(1, 17)),
        ("the newest, by its lowest rank", vec![Some(16), Some(17), Some(17)], 10, true, peer(1, 17)),
        ("before the first step", vec![Some(0), None], 0, true, peer(0, 0)),
        ("a checkpoint is newer", vec![Some(9), None], 10, true, StateSource::Checkpoint),
        ("each has a part only", vec![Some(17), Some(17)], 10, false, StateSource::Checkpoint),
    ];
    for (name, steps, saved_step, state_is_replicated, wanted) in cases {
        let workers: Vec<Worker> = steps.into_iter().map(|step| ready(1.0, step)).collect();
        let members: Vec<u32> = (0..workers.len() as u32).collect();
        let state = State { saved_step, ..gathering(0.0, workers) };
        let found = decide(at(1.0), &state, &Limits { state_is_replicated, ..limits() }).0;
        assert_eq!(found, start(&members, wanted), "{name}");
    }
}

/// A worker whose memory has this rank's share, among so many, of the state of a step.
fn sharing(step: u64, rank: u32, world_size: u32) -> Worker {
    holding(step, Share { rank, world_size, replica_of: None, next_is_summed: false })
}

fn holding(step: u64, share: Share) -> Worker {
    let Worker::Present(mut presence) = ready(1.0, Some(step)) else { panic!("present") };
    presence.ready = Some(Ready { state_step: Some(step), share: Some(share) });
    Worker::Present(presence)
}

/// As [`sharing`], with a replica of the share of the rank before.
fn replicating(step: u64, rank: u32, world_size: u32) -> Worker {
    let replica_of = Some((rank + world_size - 1) % world_size);
    holding(step, Share { rank, world_size, replica_of, next_is_summed: false })
}

#[test]
fn shares_are_the_state_where_all_of_them_are_there() {
    let both = |first: u64, second: u64| vec![sharing(first, 0, 2), sharing(second, 1, 2)];
    let of = |step, world_size| StateSource::Shares { step, world_size };
    let summed = |step, rank| holding(step, Share { rank, world_size: 2, replica_of: None, next_is_summed: true });
    let new = || ready(1.0, None);
    let cases = [
        ("all there", both(17, 17), 10, of(17, 2)),
        ("as new as the checkpoint", both(17, 17), 17, of(17, 2)),
        ("a checkpoint is newer", both(17, 17), 18, StateSource::Checkpoint),
        ("of two steps", both(17, 16), 10, StateSource::Checkpoint),
        ("one can follow", vec![sharing(17, 0, 2), summed(16, 1)], 10, of(17, 2)),
        ("both could go on", vec![summed(16, 0), summed(16, 1)], 10, of(16, 2)),
        ("two behind", vec![sharing(17, 0, 2), summed(15, 1)], 10, StateSource::Checkpoint),
        ("one is lost", vec![sharing(17, 0, 2), new()], 10, StateSource::Checkpoint),
        ("one is lost, its replica is not", vec![replicating(17, 0, 2), new()], 10, of(17, 2)),
        ("one of three is lost", vec![replicating(17, 0, 3), new(), replicating(17, 2, 3)], 10, of(17, 3)),
        ("with its replica", vec![replicating(17, 0, 3), new(), new()], 10, StateSource::Checkpoint),
        ("one less than before", vec![replicating(17, 0, 3), replicating(17, 1, 3)], 10, of(17, 3)),
        ("one more than before", vec![sharing(17, 0, 2), sharing(17, 1, 2), new()], 10, of(17, 2)),
        ("in another order", vec![sharing(17, 1, 2), sharing(17, 0, 2)], 10, of(17, 2)),
        ("twice the same", vec![sharing(17, 0, 2), sharing(17, 0, 2)], 10, StateSource::Checkpoint),
        ("of other numbers", vec![sharing(17, 0, 3), sharing(17, 1, 2), new()], 10, StateSource::Checkpoint),
        ("of more than there ever were", vec![sharing(17, 0, 9), sharing(17, 1, 9)], 10, StateSource::Checkpoint),
        ("beside a newer one that is not whole", vec![replicating(16, 0, 2), replicating(16, 1, 2), sharing(17, 0, 3)], 10, of(16, 2)),
        ("beside another one of that step", vec![replicating(17, 0, 2), replicating(17, 1, 2), replicating(17, 1, 3)], 10, of(17, 2)),
        ("one holds the whole", vec![sharing(17, 0, 2), ready(1.0, Some(17))], 10, StateSource::Checkpoint),
    ];
    for (name, workers, saved_step, wanted) in cases {
        let members: Vec<u32> = (0..workers.len() as u32).collect();
        let missing = absence("x", false);
        let padded = if name == "one less than before" { workers.into_iter().chain([missing]).collect() } else { workers };
        let state = State { saved_step, ..gathering(0.0, padded) };
        let limits = Limits { state_is_replicated: false, min_workers: Some(2), ..limits() };
        assert_eq!(decide(at(1.0), &state, &limits).0, start(&members, wanted.clone()), "{name}");
        // A stop saves what no checkpoint has, with those who have it.
        let has_a_share = |slot: &u32| state.present(*slot).and_then(|presence| presence.ready).is_some_and(|ready| ready.share.is_some());
        let holders: Vec<u32> = members.iter().copied().filter(has_a_share).collect();
        let stopped = State { stop: Some("SIGTERM".to_owned()), ..state.clone() };
        let expected = match wanted {
            StateSource::Shares { step, .. } if step > saved_step && !name.starts_with("beside") => start(&holders, wanted),
            StateSource::Shares { .. } if name.starts_with("beside") => start(&[0, 1], wanted),
            _ => Decision::Finish { step: saved_step, stopped: true },
        };
        assert_eq!(decide(at(1.0), &stopped, &limits).0, expected, "{name}");
    }
    let limits = Limits { state_is_replicated: false, ..limits() };
    let leaving = State { stop: Some("SIGTERM".to_owned()), ..gathering(0.0, vec![sharing(17, 0, 2), training(1.0)]) };
    assert_eq!(decide(at(1.0), &leaving, &limits).0, Decision::Wait);
    // Who prepares for its first generation is not waited for.
    let Worker::Present(new) = ready(1.0, None) else { panic!("present") };
    let preparing = Worker::Present(Presence { ready: None, generation: 0, ..new });
    let workers = vec![replicating(17, 0, 3), preparing, replicating(17, 2, 3)];
    let stopped = State { stop: Some("SIGTERM".to_owned()), ..gathering(0.0, workers) };
    assert_eq!(decide(at(1.0), &stopped, &limits).0, start(&[0, 2], StateSource::Shares { step: 17, world_size: 3 }));
}

#[test]
fn elastic_gathering_table() {
    let two = || vec![ready(9.9, Some(7)), absent("x"), ready(9.9, None)];
    let with_two = start(&[0, 2], StateSource::Peer { rank: 0, step: 7 });
    let fewer = "2 of 3 workers are there; the run goes on without worker 1";
    let regrouped = State { stage: Stage::Gathering { since: at(9.9), patient: false }, ..gathering(9.9, two()) };
    let hopeless = vec![ready(9.9, Some(7)), absence("x", false), ready(9.9, None)];
    let unready = vec![ready(9.9, Some(7)), absent("x"), training(9.9)];
    check(
        &elastic(2),
        vec![
            ("all there", 10.0, gathering(9.0, vec![ready(9.9, None); 3]), scratch(&[0, 1, 2]), "all 3 workers are there"),
            ("a replacement may come", 10.0, gathering(0.1, two()), Decision::Wait, "waiting for worker 1"),
            ("the wait is over", 10.0, gathering(0.0, two()), with_two.clone(), fewer),
            ("nobody will come", 10.0, gathering(9.9, hopeless), with_two.clone(), fewer),
            ("those who regroup do not wait", 10.0, regrouped, with_two, fewer),
            ("a survivor is not ready", 10.0, gathering(0.0, unready), Decision::Wait, "waiting for worker 1"),
            (
                "too few",
                10.0,
                gathering(0.0, vec![ready(9.9, Some(7)), absent("x"), absence("y", false)]),
                Decision::Wait,
                "waiting for workers 1, 2",
            ),
        ],
    );
    let state = gathering(0.0, vec![ready(30.0, None), absent("x"), absent("y")]);
    let Decision::Fail { failure } = decide(at(30.1), &state, &elastic(2)).0 else { panic!("too few for too long") };
    assert_eq!(failure.expected.as_deref(), Some("within 30.0 s, 2 of 3 joined"));
}

#[test]
fn running_table() {
    let finished = Worker::Finished { step: 300, stopped: false };
    let stopped = Worker::Finished { step: 120, stopped: true };
    let end = |step, stopped| Decision::Finish { step, stopped };
    check(
        &limits(),
        vec![
            ("all well", 9.0, running(vec![training(8.0), training(8.5)]), Decision::Wait, "training"),
            (
                "one lost",
                9.0,
                running(vec![training(8.0), absent("connection closed")]),
                Decision::Abort,
                "worker 1 (rank 1) on a lost: connection closed",
            ),
            (
                "one silent",
                14.0,
                running(vec![training(13.0), training(8.5)]),
                Decision::Lose { worker: 1, class: FailureClass::MissedHeartbeat },
                "no heartbeat for 5.5 s",
            ),
            ("one of two finished", 9.0, running(vec![finished.clone(), training(8.0)]), Decision::Wait, "training"),
            ("all finished", 9.0, running(vec![finished.clone(); 2]), end(300, false), "all workers are done"),
            (
                "one vanished after the other finished",
                9.0,
                running(vec![finished, absent("connection closed")]),
                end(300, false),
                "all workers are done",
            ),
            ("stopped", 9.0, running(vec![stopped.clone(), stopped]), end(120, true), "all workers are done"),
            ("all have left it", 9.0, running(vec![ready(8.0, Some(5)); 2]), Decision::Disband, "all workers have left it"),
            ("one has left it", 9.0, running(vec![ready(8.0, Some(5)), training(8.0)]), Decision::Wait, "training"),
        ],
    );
}

#[test]
fn a_rank_is_a_place_among_the_members() {
    let mut state = running(vec![training(8.0), absent("never came"), absent("connection closed")]);
    state.stage = Stage::Running { members: vec![0, 2], regroup: None };
    let (decision, reason) = decide(at(9.0), &state, &elastic(1));
    assert_eq!((decision, reason.class()), (Decision::Abort, FailureClass::ConnectionClosed));
    assert_eq!(reason.to_string(), "worker 2 (rank 1) on a lost: connection closed");
    state.workers[2] = training(8.0);
    assert_eq!(decide(at(9.0), &state, &elastic(1)).0, Decision::Wait, "an empty slot that is no member's");
}

#[test]
fn a_worker_without_progress_is_stuck() {
    let lost = |worker| Decision::Lose { worker, class: FailureClass::Hung };
    // Since 0 s, looked at when so much time has passed.
    let cases = [
        (Phase::Building, 100.0, 100.1),
        (Phase::Restoring, 100.0, 100.1),
        (Phase::Joining, 100.0, 100.1),
        (Phase::Waiting, 40.0, 40.1),
        (Phase::Training, 20.0, 20.1),
        (Phase::Saving, 60.0, 60.1),
        (Phase::Leaving, 60.0, 60.1),
    ];
    for (phase, patient, late) in cases {
        let state = |now| running(vec![training(now), doing(phase, 0.0, now)]);
        assert_eq!(decide(at(patient), &state(patient), &limits()).0, Decision::Wait, "{phase}");
        let (decision, reason) = decide(at(late), &state(late), &limits());
        assert_eq!(decision, lost(1), "{phase}");
        assert_eq!(reason.to_string(), format!("no progress for {late:.1} s while {phase}"));
    }
}

#[test]
fn who_waits_for_a_stuck_worker_is_not_stuck() {
    let lost = |worker| Decision::Lose { worker, class: FailureClass::Hung };
    let culprit = running(vec![waiting(0.0, 50.0), doing(Phase::Waiting, 0.0, 50.0), waiting(0.0, 50.0)]);
    assert_eq!(decide(at(50.0), &culprit, &limits()).0, lost(1));
    let nobody = running(vec![waiting(0.0, 50.0), waiting(0.0, 50.0)]);
    assert_eq!(decide(at(50.0), &nobody, &limits()).0, Decision::Wait, "the collective's own timeout decides");
    let idle = running(vec![ready(50.0, None), training(50.0)]);
    assert_eq!(decide(at(50.0), &idle, &limits()).0, Decision::Wait, "who waits for a generation");
    // An abort frees whoever waits in a collective; who does not leave it within a step's time is stuck in it.
    let freed = |now| gathering(45.0, vec![waiting(0.0, now), ready(now, None)]);
    assert_eq!(decide(at(65.0), &freed(65.0), &limits()).0, Decision::Wait);
    assert_eq!(decide(at(65.1), &freed(65.1), &limits()).0, lost(0));
}

#[test]
fn a_broken_collective_waits_for_the_culprit() {
    let broken = Broken { worker: 0, cause: "receive from rank 1".to_owned(), at: at(9.0) };
    let alive = State { broken: Some(broken), ..running(vec![training(9.0), training(8.9)]) };
    assert_eq!(decide(at(9.4), &alive, &limits()).0, Decision::Wait);
    let (decision, reason) = decide(at(9.5), &alive, &limits());
    assert_eq!((decision, reason.class()), (Decision::Abort, FailureClass::Collective));
    assert_eq!(reason.to_string(), "the collective broke, as worker 0 (rank 0) reports: receive from rank 1");

    let explained = State { workers: vec![training(9.0), absent("connection closed")], ..alive };
    let (decision, reason) = decide(at(9.1), &explained, &limits());
    assert_eq!((decision, reason.to_string().as_str()), (Decision::Abort, "worker 1 (rank 1) on a lost: connection closed"));
}

fn setback(worker: u32, class: FailureClass, culprit: bool) -> Setback {
    let failure = Failure::new(FailureKind::Run, "the loss is not finite").hint("lower the learning rate");
    Setback { worker, step: 17, class, culprit, failure, at: at(9.0) }
}

#[test]
fn a_step_is_tried_again_and_the_culprit_named() {
    let nan = |worker, culprit| setback(worker, FailureClass::NotFinite, culprit);
    let three = vec![training(9.0); 3];
    let state = |setbacks| State { setbacks, ..running(three.clone()) };
    let all = vec![nan(0, false), nan(2, true), nan(1, false)];
    let cases = [
        ("all have reported", 9.0, all, Some("worker 2 (rank 2): its loss is not finite; attempt 1 to do step 17 again")),
        ("others may know more", 9.4, vec![nan(0, false)], None),
        ("nobody says more", 9.5, vec![nan(0, false)], Some("all ranks: their loss is not finite; attempt 1 to do step 17 again")),
        (
            "two of three",
            9.5,
            vec![nan(0, true), nan(1, true)],
            Some("worker 0 (rank 0), worker 1 (rank 1): their loss is not finite; attempt 1 to do step 17 again"),
        ),
        (
            "memory",
            9.0,
            vec![setback(1, FailureClass::OutOfMemory, true)],
            Some("worker 1 (rank 1): out of memory; attempt 1 to do step 17 again"),
        ),
    ];
    for (name, now, setbacks, wanted) in cases {
        let (decision, reason) = decide(at(now), &state(setbacks), &limits());
        match wanted {
            Some(text) => assert_eq!((decision, reason.to_string().as_str()), (Decision::Abort, text), "{name}"),
            None => assert_eq!(decision, Decision::Wait, "{name}"),
        }
    }
}

#[test]
fn a_step_is_not_tried_for_ever() {
    let setbacks = vec![setback(0, FailureClass::NotFinite, false), setback(1, FailureClass::NotFinite, true)];
    let mut state = State { setbacks, ..running(vec![training(9.0); 2]) };
    state.retries = Retries { step: 17, attempts: 1 };
    let (decision, reason) = decide(at(9.0), &state, &limits());
    assert_eq!(decision, Decision::Abort);
    assert!(matches!(reason, Reason::Setback { attempt: 2, step: 17, .. }), "{reason}");
    state.retries.attempts = 2;
    let Decision::Fail { failure } = decide(at(9.0), &state, &limits()).0 else { panic!("failed") };
    assert_eq!(failure.place.as_deref(), Some("worker 1 (rank 1), step 17"), "the culprit's failure is told");
    let hint = failure.hint.unwrap();
    assert!(hint.starts_with("the step was tried again 2 times") && hint.ends_with("lower the learning rate"), "{hint}");
    state.retries = Retries { step: 16, attempts: 2 };
    assert_eq!(decide(at(9.0), &state, &limits()).0, Decision::Abort, "another step has its own attempts");
    let never = Limits { retries_per_step: 0, ..limits() };
    let Decision::Fail { failure } = decide(at(9.0), &state, &never).0 else { panic!("failed") };
    assert_eq!(failure.hint.as_deref(), Some("lower the learning rate"));
}

#[test]
fn a_shrunken_run_grows_again() {
    let small = |third: Worker| State {
        stage: Stage::Running { members: vec![0, 1], regroup: None },
        ..running(vec![training(9.0), training(9.0), third])
    };
    let (decision, reason) = decide(at(9.0), &small(ready(9.0, None)), &elastic(2));
    assert_eq!((decision, reason.to_string().as_str()), (Decision::Regroup, "worker 2 joined"));
    assert_eq!(decide(at(9.0), &small(training(9.0)), &elastic(2)).0, Decision::Wait, "it still prepares");
    assert_eq!(decide(at(9.0), &small(absent("x")), &elastic(2)).0, Decision::Wait);
    let stopping = State { stop: Some("SIGTERM".to_owned()), ..small(ready(9.0, None)) };
    assert_eq!(decide(at(9.0), &stopping, &elastic(2)).0, Decision::Wait, "a run that stops does not grow");

    let mut asked = small(ready(9.0, None));
    asked.stage = Stage::Running { members: vec![0, 1], regroup: Some("worker 2 joined".to_owned()) };
    assert_eq!(decide(at(9.0), &asked, &elastic(2)).0, Decision::Wait, "asked once");
    asked.workers[0] = ready(9.0, Some(21));
    assert_eq!(decide(at(9.0), &asked, &elastic(2)).0, Decision::Wait, "one has left it");
    asked.workers[1] = ready(9.0, Some(21));
    let (decision, reason) = decide(at(9.0), &asked, &elastic(2));
    assert_eq!((decision, reason.to_string().as_str()), (Decision::Disband, "worker 2 joined"));
}

#[test]
fn adoption_table() {
    let fresh = |heard: f64| {
        let Worker::Present(mut presence) = training(heard) else { panic!("present") };
        presence.generation = 0;
        Worker::Present(presence)
    };
    let finished = || Worker::Finished { step: 300, stopped: false };
    let away = || absent("has not joined yet");
    check(
        &limits(),
        vec![
            ("nobody yet", 1.0, adopting(0.0, vec![away(), away()]), Decision::Wait, "waiting for workers 0, 1"),
            ("one is back", 2.0, adopting(0.0, vec![training(1.0), away()]), Decision::Wait, "waiting for worker 1"),
            ("all are back", 2.0, adopting(0.0, vec![training(1.0); 2]), Decision::Adopt, "all 2 workers came back"),
            (
                "a member is another process",
                2.0,
                adopting(0.0, vec![training(1.0), fresh(1.0)]),
                Decision::Abort,
                "worker 1 came back without the generation",
            ),
            (
                "too late",
                10.1,
                adopting(0.0, vec![training(9.0), away()]),
                Decision::Abort,
                "worker 1 did not come back to the new coordinator",
            ),
            ("one came back to say that it is done", 2.0, adopting(0.0, vec![finished(), away()]), Decision::Wait, "waiting for worker 1"),
            (
                "all are done",
                2.0,
                adopting(0.0, vec![finished(), finished()]),
                Decision::Finish { step: 300, stopped: false },
                "all workers are done",
            ),
            (
                "one is done and the other never comes",
                10.1,
                adopting(0.0, vec![finished(), away()]),
                Decision::Finish { step: 300, stopped: false },
                "all workers are done",
            ),
        ],
    );
}

#[test]
fn a_proof_of_the_result_counts_after_an_abort() {
    let state = gathering(9.0, vec![Worker::Finished { step: 300, stopped: false }, absent("connection closed"), ready(9.0, None)]);
    assert_eq!(decide(at(9.1), &state, &limits()), (Decision::Finish { step: 300, stopped: false }, Reason::AllFinished));
}

#[test]
fn waiting_for_workers_ends() {
    let state = gathering(10.0, vec![ready(40.0, None), absent("exited with code 5")]);
    let (decision, reason) = decide(at(40.1), &state, &limits());
    assert_eq!(reason, Reason::JoinTimeout { missing: vec![1] });
    let Decision::Fail { failure } = decision else { panic!("{decision:?}") };
    assert_eq!(failure.what, "worker 1 did not join in time");
    assert_eq!(failure.cause.as_deref(), Some("worker 1: exited with code 5"));
    assert_eq!(failure.found.as_deref(), Some("1 joined"));
}

#[test]
fn breaking_without_end_ends() {
    let mut state = gathering(1.0, vec![ready(2.0, None), ready(2.0, None)]);
    state.fruitless_generations = 3;
    assert_eq!(decide(at(2.0), &state, &limits()).0, scratch(&[0, 1]));
    state.fruitless_generations = 4;
    assert!(matches!(decide(at(2.0), &state, &limits()), (Decision::Fail { .. }, Reason::Fruitless)));
}

#[test]
fn a_stop_ends_a_wait_at_the_saved_step() {
    let stop = Some("SIGINT".to_owned());
    let empty = State { stop: stop.clone(), saved_step: 50, ..gathering(0.0, vec![ready(0.5, None), absent("x")]) };
    let (decision, reason) = decide(at(1.0), &empty, &limits());
    assert_eq!((decision, reason.to_string().as_str()), (Decision::Finish { step: 50, stopped: true }, "stop requested: SIGINT"));
    let cases = [
        ("memory is newer", vec![ready(0.5, Some(57)), absent("x")], start(&[0], StateSource::Peer { rank: 0, step: 57 })),
        (
            "the newest memory, by its lowest slot",
            vec![ready(0.5, Some(56)), ready(0.5, Some(57)), ready(0.5, Some(57)), absent("x")],
            start(&[1], StateSource::Peer { rank: 0, step: 57 }),
        ),
        ("a survivor may hold more", vec![ready(0.5, Some(57)), waiting(0.5, 0.5), absent("x")], Decision::Wait),
        ("the checkpoint has it", vec![ready(0.5, Some(50)), absent("x")], Decision::Finish { step: 50, stopped: true }),
    ];
    for (name, workers, wanted) in cases {
        let state = State { stop: stop.clone(), saved_step: 50, ..gathering(0.0, workers) };
        assert_eq!(decide(at(1.0), &state, &limits()).0, wanted, "{name}");
        // One worker's share is no state.
        let sharded = Limits { state_is_replicated: false, ..limits() };
        let expected = if wanted == Decision::Wait { Decision::Wait } else { Decision::Finish { step: 50, stopped: true } };
        assert_eq!(decide(at(1.0), &state, &sharded).0, expected, "{name}");
    }
    let training = State { stop, ..running(vec![training(0.5)]) };
    assert_eq!(decide(at(1.0), &training, &limits()).0, Decision::Wait, "workers stop on their own");
}

#[test]
fn a_reported_failure_ends_the_run_at_once() {
    let failure = Failure::new(FailureKind::Run, "a shard is damaged");
    let state = State { failure: Some(failure.clone()), ..running(vec![training(0.0)]) };
    assert_eq!(decide(at(100.0), &state, &limits()), (Decision::Fail { failure }, Reason::Failed));
}

/// A member on a host of this name.
fn on(host: &str) -> Worker {
    let Worker::Present(presence) = training(1.0) else { panic!("present") };
    Worker::Present(Presence { host: host.to_owned(), ..presence })
}

#[test]
fn a_host_is_excluded_where_enough_workers_remain() {
    let bounds = |min_workers| Limits { exclude_host_after: 2, min_workers, ..limits() };
    let record = |failures, excluded| HostRecord { failures, excluded };
    let one_left = || vec![on("a"), on("b"), absent("x")];
    let cases = [
        ("below the bound", None, record(1, false), one_left(), false),
        ("at the bound", None, record(2, false), one_left(), true),
        ("the only host", None, record(9, false), vec![on("a"), on("a"), absent("x")], false),
        ("the workers of other hosts are gone", None, record(2, false), vec![on("a"), absent("x"), absent("y")], false),
        ("already excluded", None, record(3, true), one_left(), false),
        ("a run needs one worker at least", Some(0), record(2, false), vec![on("a"), absent("x"), absent("y")], false),
        ("too few remain", Some(2), record(2, false), one_left(), false),
        ("just enough remain", Some(2), record(2, false), vec![absent("x"), on("b"), on("c")], true),
    ];
    for (name, min_workers, failed, workers, wanted) in cases {
        let hosts = [("a".to_owned(), failed), ("b".to_owned(), record(0, false)), ("c".to_owned(), record(0, false))].into();
        let state = State { hosts, ..running(workers) };
        assert_eq!(is_host_to_be_excluded(&state, "a", &bounds(min_workers)), wanted, "{name}");
        assert!(!is_host_to_be_excluded(&state, "a", &Limits { exclude_host_after: 0, ..bounds(min_workers) }), "{name}");
    }
}

#[test]
fn time_in_which_nobody_listened_is_given_back() {
    // Heard at 10, with no progress since 8; the coordinator looks again at 60 and has missed so much.
    let cases = [
        ("a pass that took its time", 2.5, 10.0, 8.0, 0.0),
        ("reporters that were slow", 4.0, 60.0, 12.0, 0.0),
        ("longer than a worker's patience", 49.0, 60.0, 57.0, 65.0),
        ("longer than the run", 1000.0, 60.0, 60.0, 65.0),
    ];
    for (name, gap, heard, since, forgiving_until) in cases {
        let mut state = running(vec![doing(Phase::Training, 8.0, 10.0), absent("x")]);
        excuse(at(60.0), at(gap), &mut state, &limits());
        let presence = state.present(0).unwrap();
        assert_eq!((presence.heard, presence.activity.since, state.forgiving_until), (at(heard), at(since), at(forgiving_until)), "{name}");
    }
}

#[test]
fn waits_are_longer_by_the_time_in_which_nobody_listened() {
    let setback = setback(0, FailureClass::NotFinite, true);
    let broken = Some(Broken { worker: 0, cause: "x".to_owned(), at: at(9.5) });
    let stages = [gathering(9.0, Vec::new()), adopting(9.0, Vec::new()), State { broken, setbacks: vec![setback], ..running(Vec::new()) }];
    let [gathering, adopting, running] = stages.map(|mut state| {
        excuse(at(60.0), at(49.0), &mut state, &limits());
        state
    });
    assert_eq!(gathering.stage, Stage::Gathering { since: at(58.0), patient: true });
    assert_eq!(adopting.stage, Stage::Adopting { members: Vec::new(), since: at(58.0) });
    assert_eq!((running.broken.unwrap().at, running.setbacks[0].at), (at(58.5), at(58.0)));
}
