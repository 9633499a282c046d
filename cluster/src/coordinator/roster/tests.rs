//! Decisions applied: outboxes and events, without sockets.

mod losses;
mod succession;

use tokio::sync::mpsc;

use super::*;
use crate::coordinator::server::Control;
use crate::membership::HangLimits;
use crate::protocol::{self, Held, JoinRequest, PROTOCOL_VERSION, Phase, SavedFile, WorkerMessage};

type Inbox = mpsc::Receiver<Frame>;

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn limits() -> Limits {
    Limits {
        heartbeat_timeout: at(5),
        join_timeout: at(50),
        blame_grace: Duration::from_millis(300),
        max_fruitless_generations: 3,
        min_workers: None,
        replacement_wait: at(10),
        hang: HangLimits { init: at(100), data: at(100), step: at(20), checkpoint: at(100) },
        retries_per_step: 1,
        exclude_host_after: 0,
        state_is_replicated: true,
        until_step: None,
        adopt_timeout: at(10),
    }
}

fn elastic() -> Limits {
    Limits { min_workers: Some(1), ..limits() }
}

/// A roster whose workers, each on a host of its own, have joined on connections of their own numbers, and are ready.
fn roster_of(num_workers: u32, limits: Limits) -> (Roster, Vec<Inbox>) {
    let mut roster = Roster::new(num_workers, limits, None).unwrap();
    let inboxes = (0..num_workers).map(|worker| join(&mut roster, worker, u64::from(worker), at(0))).collect();
    for worker in 0..num_workers {
        ready(&mut roster, worker, at(0), 0, None);
    }
    (roster, inboxes)
}

fn roster(num_workers: u32) -> (Roster, Vec<Inbox>) {
    roster_of(num_workers, limits())
}

fn request(worker: u32) -> JoinRequest {
    JoinRequest {
        protocol_version: PROTOCOL_VERSION,
        token: Secret::new("t"),
        recipe_hash: "r".to_owned(),
        build: "b".to_owned(),
        executable: "e".to_owned(),
        worker,
        process_id: 1000 + worker,
        host: format!("node-{worker}"),
        collective_address: format!("127.0.0.1:{worker}"),
        held: None,
    }
}

fn join_as(roster: &mut Roster, connection: u64, request: JoinRequest, now: Duration) -> Inbox {
    let (outbox, inbox) = mpsc::channel(64);
    roster.join(connection, request, now, outbox);
    inbox
}

fn join(roster: &mut Roster, worker: u32, connection: u64, now: Duration) -> Inbox {
    join_as(roster, connection, request(worker), now)
}

fn rejoin(roster: &mut Roster, worker: u32, generation: u64, now: Duration) -> Inbox {
    join_as(roster, u64::from(worker), JoinRequest { held: Some(Held { generation, step: 0 }), ..request(worker) }, now)
}

/// Says something on the connection that has the worker's number.
fn say(roster: &mut Roster, worker: u32, now: Duration, message: WorkerMessage) {
    roster.message(u64::from(worker), worker, now, message);
}

fn ready(roster: &mut Roster, worker: u32, now: Duration, generation: u64, state_step: Option<u64>) {
    say(roster, worker, now, WorkerMessage::Ready { generation, state_step, share: None });
}

fn heartbeat(roster: &mut Roster, worker: u32, now: Duration, step: u64) {
    let (generation, progress) = (roster.state.generation, now.as_secs());
    say(roster, worker, now, WorkerMessage::Heartbeat { generation, step, phase: Phase::Training, waiting: false, progress });
}

fn heard(inbox: &mut Inbox) -> Vec<CoordinatorMessage> {
    std::iter::from_fn(|| inbox.try_recv().ok()).map(|frame| protocol::decode(&frame.parts().concat()[4..]).unwrap()).collect()
}

fn settle(roster: &mut Roster, now: Duration) -> Vec<Event> {
    assert_eq!(roster.settle(now).unwrap(), None);
    roster.take_events()
}

fn failure(what: &str) -> Failure {
    Failure::new(FailureKind::Run, what)
}

#[test]
fn all_workers_are_one_executable() {
    let mut roster = Roster::new(2, limits(), None).unwrap();
    let refused = JoinRequest { worker: 7, executable: "first".to_owned(), ..request(0) };
    let _refused = join_as(&mut roster, 9, refused, at(0));
    // Whoever was refused sets no example.
    let _first = join(&mut roster, 0, 0, at(0));
    let mut inbox = join_as(&mut roster, 1, JoinRequest { executable: "other".to_owned(), ..request(1) }, at(0));
    let [CoordinatorMessage::Refused { failure }] = &heard(&mut inbox)[..] else { panic!("refused") };
    assert_eq!(failure.kind, FailureKind::Mismatch);
    let (expected, found) = (failure.expected.as_deref(), failure.found.as_deref());
    assert_eq!((expected, found), (Some("executable e, as worker 0 on node-0 has it"), Some("executable other")));
    // Also a worker that comes back, whose file was replaced meanwhile.
    roster.closed(0, 0, at(0), "connection closed");
    let mut again = join_as(&mut roster, 2, JoinRequest { executable: "other".to_owned(), ..request(0) }, at(0));
    assert!(matches!(heard(&mut again)[..], [CoordinatorMessage::Refused { .. }]));
    let mut same = join(&mut roster, 0, 3, at(0));
    assert!(matches!(heard(&mut same)[..], [CoordinatorMessage::Welcome { .. }]));
}

#[test]
fn a_slot_has_one_owner() {
    let (mut roster, _inboxes) = roster(2);
    for worker in [1, 7] {
        let stranger = JoinRequest { process_id: 1, ..request(worker) };
        let mut inbox = join_as(&mut roster, 9, stranger, at(0));
        assert!(matches!(heard(&mut inbox)[..], [CoordinatorMessage::Refused { .. }]), "worker {worker}");
    }
    // Words on the refused connection do not count as the owner's.
    roster.closed(9, 1, at(0), "connection closed");
    assert!(!settle(&mut roster, at(0)).iter().any(|event| matches!(event, Event::WorkerLost { .. })));
}

#[test]
fn late_words_of_an_old_generation_are_ignored() {
    let (mut roster, _inboxes) = roster(1);
    settle(&mut roster, at(0));
    say(&mut roster, 0, at(1), WorkerMessage::Finished { generation: 0, step: 9, stopped: false });
    say(&mut roster, 0, at(1), WorkerMessage::Broken { generation: 0, reason: "old".to_owned() });
    ready(&mut roster, 0, at(1), 0, Some(5));
    let class = FailureClass::NotFinite;
    say(&mut roster, 0, at(1), WorkerMessage::Failed { failure: failure("old"), class, generation: 0, step: 1, culprit: true });
    assert_eq!(settle(&mut roster, at(2)), Vec::new());
}

#[test]
fn a_silent_worker_ends_the_generation() {
    let (mut roster, mut inboxes) = roster(2);
    settle(&mut roster, at(0));
    heartbeat(&mut roster, 0, at(6), 0);
    let events = settle(&mut roster, at(6));
    let Event::WorkerLost { worker: 1, rank: Some(1), host, class: FailureClass::MissedHeartbeat, reason } = &events[0] else {
        panic!("{events:?}")
    };
    assert_eq!((host.as_str(), reason.as_str()), ("node-1", "no heartbeat for 6.0 s"));
    let Event::GenerationAborted { generation: 1, reason, .. } = &events[1] else { panic!("{events:?}") };
    assert_eq!(reason, "worker 1 (rank 1) on node-1 lost: no heartbeat for 6.0 s");
    assert!(matches!(heard(&mut inboxes[0]).last(), Some(CoordinatorMessage::Abort { generation: 1, .. })));
}

#[test]
fn a_stuck_worker_loses_its_seat_for_good() {
    let (mut roster, _inboxes) = roster(2);
    settle(&mut roster, at(0));
    let training = |progress| WorkerMessage::Heartbeat { generation: 1, step: 3, phase: Phase::Training, waiting: false, progress };
    say(&mut roster, 1, at(1), training(7));
    for second in 2..=22 {
        assert!(!settle(&mut roster, at(second - 1)).iter().any(|event| matches!(event, Event::WorkerLost { .. })), "{second}");
        heartbeat(&mut roster, 0, at(second), 3);
        say(&mut roster, 1, at(second), training(7));
    }
    let events = settle(&mut roster, at(22));
    assert!(matches!(events[0], Event::WorkerLost { worker: 1, class: FailureClass::Hung, .. }), "{events:?}");
    let mut inbox = rejoin(&mut roster, 1, 1, at(23));
    assert!(matches!(heard(&mut inbox)[..], [CoordinatorMessage::Refused { .. }]), "the same process");
    let mut inbox = join_as(&mut roster, 1, JoinRequest { process_id: 5, ..request(1) }, at(23));
    assert_eq!(heard(&mut inbox), [CoordinatorMessage::Welcome { adopted: false }], "its replacement");
}

#[test]
fn a_pause_of_the_coordinator_is_nobodys_fault() {
    let (mut roster, _inboxes) = roster(1);
    settle(&mut roster, at(0));
    heartbeat(&mut roster, 0, at(1), 0);
    roster.excuse_silence(at(1000), at(999));
    assert_eq!(settle(&mut roster, at(1000)), Vec::new());
    let presence = roster.state.present(0).unwrap();
    assert_eq!((presence.heard, presence.activity.since), (at(1000), at(1000)));
}

#[test]
fn a_collective_that_always_breaks_ends_the_run() {
    let (mut roster, _inboxes) = roster(1);
    let mut now = at(1);
    for generation in 1..10 {
        assert_eq!(roster.settle(now).unwrap(), None);
        say(&mut roster, 0, now, WorkerMessage::Broken { generation, reason: "no route".to_owned() });
        now += at(1);
        ready(&mut roster, 0, now, generation, None);
        if let Some(end) = roster.settle(now).unwrap() {
            assert_eq!(generation, 4);
            assert!(matches!(end, RunEnd::Failed(_)));
            return;
        }
    }
    panic!("the run goes on for ever");
}

#[test]
fn a_failure_names_its_worker() {
    let (mut roster, _inboxes) = roster(2);
    settle(&mut roster, at(0));
    let class = FailureClass::Other;
    say(&mut roster, 1, at(1), WorkerMessage::Failed { failure: failure("damaged"), class, generation: 1, step: 3, culprit: true });
    let Some(RunEnd::Failed(failure)) = roster.settle(at(1)).unwrap() else { panic!("failed") };
    assert_eq!(failure.place.as_deref(), Some("worker 1 (rank 1)"));
}

#[test]
fn a_loss_that_is_not_finite_is_tried_again_once() {
    let (mut roster, _inboxes) = roster(2);
    settle(&mut roster, at(0));
    let nan = |generation, culprit| WorkerMessage::Failed {
        failure: failure("the loss is not finite"),
        class: FailureClass::NotFinite,
        generation,
        step: 17,
        culprit,
    };
    for worker in [0, 1] {
        say(&mut roster, worker, at(1), nan(1, worker == 1));
        ready(&mut roster, worker, at(1), 1, Some(16));
    }
    let events = settle(&mut roster, at(1));
    let Event::GenerationAborted { generation: 1, reason, .. } = &events[0] else { panic!("{events:?}") };
    assert_eq!(reason, "worker 1 (rank 1): its loss is not finite; attempt 1 to do step 17 again");
    assert!(matches!(events[1], Event::GenerationStarted { generation: 2, .. }), "{events:?}");
    for worker in [0, 1] {
        say(&mut roster, worker, at(2), nan(2, false));
    }
    let Some(RunEnd::Failed(failure)) = roster.settle(at(2)).unwrap() else { panic!("failed") };
    assert!(failure.hint.unwrap().contains("tried again once"));
}

#[test]
fn a_worker_without_memory_is_let_go_and_replaced() {
    let (mut roster, mut inboxes) = roster(2);
    settle(&mut roster, at(0));
    let class = FailureClass::OutOfMemory;
    say(&mut roster, 1, at(1), WorkerMessage::Failed { failure: failure("out of memory"), class, generation: 1, step: 16, culprit: true });
    let events = settle(&mut roster, at(1));
    assert!(matches!(events[0], Event::WorkerLost { worker: 1, class: FailureClass::OutOfMemory, .. }), "{events:?}");
    let Event::GenerationAborted { reason, .. } = &events[1] else { panic!("{events:?}") };
    assert_eq!(reason, "worker 1 (rank 1): out of memory; attempt 1 to do step 16 again");
    heard(&mut inboxes[1]);
    assert!(matches!(inboxes[1].try_recv(), Err(mpsc::error::TryRecvError::Disconnected)), "its connection closes");
    ready(&mut roster, 0, at(2), 1, Some(16));
    let _replacement = join(&mut roster, 1, 1, at(3));
    ready(&mut roster, 1, at(3), 0, None);
    let events = settle(&mut roster, at(3));
    assert!(matches!(events.last(), Some(Event::GenerationStarted { generation: 2, .. })), "{events:?}");
}

#[test]
fn a_recovery_is_told_with_what_it_cost() {
    let (mut roster, mut inboxes) = roster(2);
    settle(&mut roster, at(0));
    let restored = |generation, step, source: &str| WorkerMessage::Restored {
        generation,
        step,
        source: source.to_owned(),
        skipped: Vec::new(),
        seconds: 0.5,
    };
    say(&mut roster, 0, at(1), restored(1, 0, "scratch"));
    heartbeat(&mut roster, 0, at(2), 20);
    roster.closed(1, 1, at(1), "connection closed");
    settle(&mut roster, at(4));
    ready(&mut roster, 0, at(4), 1, Some(20));
    let _replacement = join(&mut roster, 1, 1, at(5));
    ready(&mut roster, 1, at(5), 0, None);
    settle(&mut roster, at(5));
    let source = heard(&mut inboxes[0]).into_iter().rev().find_map(|message| match message {
        CoordinatorMessage::Start { generation: 2, source, .. } => Some(source),
        _ => None,
    });
    assert_eq!(source, Some(StateSource::Peer { rank: 0, step: 20 }));
    say(&mut roster, 0, at(6), restored(2, 18, "memory of worker 0"));
    assert_eq!(roster.state.saved_step, 0, "memory is no checkpoint");
    heartbeat(&mut roster, 0, at(6), 18);
    assert!(!settle(&mut roster, at(6)).iter().any(|event| matches!(event, Event::Recovered { .. })), "no step yet");
    heartbeat(&mut roster, 0, at(7), 19);
    let wanted = Event::Recovered {
        generation: 2,
        failed_generation: 1,
        class: FailureClass::ConnectionClosed,
        seconds: 3.0,
        steps_lost: 2,
        source: "memory of worker 0".to_owned(),
    };
    assert_eq!(settle(&mut roster, at(7)), [wanted]);
}

#[test]
fn steps_without_a_report_are_told_now_and_then() {
    let (mut roster, _inboxes) = roster(2);
    settle(&mut roster, at(0));
    let mut told = Vec::new();
    for second in 1..=16 {
        heartbeat(&mut roster, 0, at(second), 10 * second);
        heartbeat(&mut roster, 1, at(second), 10 * second);
        roster.note_progress(at(second)).unwrap();
        let steps = settle(&mut roster, at(second)).into_iter().filter_map(|event| match event {
            Event::Progress { generation: 1, step } => Some(step),
            _ => None,
        });
        told.extend(steps);
    }
    assert_eq!(told, [60, 120]);
}

#[test]
fn the_end_of_a_generation_names_who_is_to_blame_and_the_last_step_done() {
    let (mut roster, _inboxes) = roster(2);
    settle(&mut roster, at(0));
    heartbeat(&mut roster, 0, at(1), 20);
    for (worker, culprit) in [(0, false), (1, true)] {
        let failure = failure("the loss is not finite");
        let word = WorkerMessage::Failed { failure, class: FailureClass::NotFinite, generation: 1, step: 27, culprit };
        say(&mut roster, worker, at(2), word);
    }
    let events = settle(&mut roster, at(3));
    let [Event::GenerationAborted { step: 26, worker: Some(1), rank: Some(1), .. }] = events[..] else { panic!("{events:?}") };
}

#[test]
fn a_stop_between_generations_saves_what_is_in_memory() {
    let (mut roster, mut inboxes) = roster(2);
    settle(&mut roster, at(0));
    heartbeat(&mut roster, 0, at(1), 20);
    roster.closed(1, 1, at(1), "connection closed");
    settle(&mut roster, at(1));
    roster.control(Control::Stop { reason: "SIGINT".to_owned() });
    assert!(settle(&mut roster, at(2)).is_empty(), "the survivor may hold more than is saved");
    ready(&mut roster, 0, at(2), 1, Some(21));
    settle(&mut roster, at(2));
    let told = heard(&mut inboxes[0]);
    let Some(CoordinatorMessage::Start { generation: 2, saves_only: true, members, .. }) = told.last() else { panic!("{told:?}") };
    assert_eq!(members, &[0]);
    say(&mut roster, 0, at(3), WorkerMessage::Finished { generation: 2, step: 21, stopped: true });
    assert_eq!(roster.settle(at(3)).unwrap(), Some(RunEnd::Stopped { step: 21 }));
}

#[test]
fn a_run_shrinks_and_grows_again() {
    let (mut roster, mut inboxes) = roster_of(2, elastic());
    settle(&mut roster, at(0));
    roster.closed(1, 1, at(1), "connection closed");
    ready(&mut roster, 0, at(1), 1, Some(7));
    assert!(!settle(&mut roster, at(1)).iter().any(|event| matches!(event, Event::GenerationStarted { .. })), "a replacement may come");
    roster.control(Control::NoReplacement { worker: 1 });
    let events = settle(&mut roster, at(2));
    assert!(matches!(&events[0], Event::GenerationStarted { generation: 2, world_size: 1, workers, .. } if workers == &[0]), "{events:?}");

    heartbeat(&mut roster, 0, at(3), 8);
    heard(&mut inboxes[0]);
    let _newcomer = join(&mut roster, 1, 1, at(3));
    ready(&mut roster, 1, at(3), 0, None);
    settle(&mut roster, at(3));
    settle(&mut roster, at(4));
    let told = heard(&mut inboxes[0]);
    assert_eq!(told, [CoordinatorMessage::Regroup { generation: 2, reason: "worker 1 joined".to_owned() }], "once");
    ready(&mut roster, 0, at(5), 2, Some(9));
    let events = settle(&mut roster, at(5));
    assert_eq!(events[0], Event::GenerationRegrouped { generation: 2, reason: "worker 1 joined".to_owned(), step: 9 });
    assert!(matches!(&events[1], Event::GenerationStarted { generation: 3, workers, .. } if workers == &[0, 1]), "{events:?}");
    assert!(!events.iter().any(|event| matches!(event, Event::GenerationAborted { .. })));
}

#[test]
fn a_loss_in_the_midst_of_a_regroup_is_an_abort() {
    let (mut roster, mut inboxes) = roster_of(3, elastic());
    // Worker 2 is late, and lets the others begin.
    roster.closed(2, 2, at(0), "connection closed");
    roster.control(Control::NoReplacement { worker: 2 });
    settle(&mut roster, at(0));
    let _newcomer = join(&mut roster, 2, 2, at(1));
    ready(&mut roster, 2, at(1), 0, None);
    settle(&mut roster, at(1));
    assert!(heard(&mut inboxes[0]).iter().any(|message| matches!(message, CoordinatorMessage::Regroup { .. })));
    // Worker 0 has left as asked, and worker 1 dies before it has.
    ready(&mut roster, 0, at(2), 1, Some(9));
    roster.closed(1, 1, at(2), "connection closed");
    let events = settle(&mut roster, at(2));
    assert!(events.iter().any(|event| matches!(event, Event::GenerationAborted { generation: 1, worker: Some(1), .. })), "{events:?}");
    assert!(!events.iter().any(|event| matches!(event, Event::GenerationRegrouped { .. })), "{events:?}");
    // Who left before is not asked again, and the newcomer gets its state.
    roster.control(Control::NoReplacement { worker: 1 });
    let events = settle(&mut roster, at(3));
    assert!(matches!(&events[..], [Event::GenerationStarted { generation: 2, workers, .. }] if workers == &[0, 2]), "{events:?}");
    let told = heard(&mut inboxes[0]);
    let Some(CoordinatorMessage::Start { source, .. }) = told.last() else { panic!("{told:?}") };
    assert_eq!(*source, StateSource::Peer { rank: 0, step: 9 });
}

#[test]
fn a_host_that_fails_too_often_is_used_no_more() {
    let (mut roster, mut inboxes) = roster_of(3, Limits { exclude_host_after: 2, ..elastic() });
    settle(&mut roster, at(0));
    // Worker 2 moves to the host of worker 1.
    let on_node_1 = |worker| JoinRequest { host: "node-1".to_owned(), ..request(worker) };
    roster.closed(2, 2, at(1), "connection closed");
    inboxes[2] = join_as(&mut roster, 2, on_node_1(2), at(1));
    roster.closed(1, 1, at(1), "connection closed");
    inboxes[1] = join_as(&mut roster, 1, on_node_1(1), at(1));
    assert!(!roster.take_events().iter().any(|event| matches!(event, Event::HostExcluded { .. })));
    roster.closed(1, 1, at(1), "connection closed");
    let events = roster.take_events();
    assert!(events.contains(&Event::HostExcluded { host: "node-1".to_owned(), failures: 2 }), "{events:?}");
    assert!(matches!(events.last(), Some(Event::WorkerLost { worker: 2, class: FailureClass::Excluded, .. })), "{events:?}");
    assert!(matches!(heard(&mut inboxes[2]).last(), Some(CoordinatorMessage::Refused { .. })));
    let mut inbox = join_as(&mut roster, 8, on_node_1(1), at(2));
    let told = heard(&mut inbox);
    let [CoordinatorMessage::Refused { failure }] = &told[..] else { panic!("refused") };
    assert_eq!((failure.kind, failure.found.as_deref()), (FailureKind::Environment, Some("2 failures of its workers")));
    let mut inbox = join_as(&mut roster, 9, JoinRequest { host: "node-3".to_owned(), ..request(1) }, at(2));
    assert_eq!(heard(&mut inbox), [CoordinatorMessage::Welcome { adopted: false }]);
}

#[test]
fn a_lost_connection_alone_does_not_end_a_generation() {
    let (mut roster, _inboxes) = roster(2);
    settle(&mut roster, at(0));
    // The worker notices first, and is back before anything is decided.
    let mut inbox = rejoin(&mut roster, 1, 1, at(1));
    assert_eq!(heard(&mut inbox), [CoordinatorMessage::Welcome { adopted: true }]);
    roster.closed(1, 1, at(1), "connection closed");
    let mut inbox = rejoin(&mut roster, 1, 1, at(1));
    assert_eq!(heard(&mut inbox), [CoordinatorMessage::Welcome { adopted: true }]);
    assert!(!settle(&mut roster, at(1)).iter().any(|event| matches!(event, Event::GenerationAborted { .. })));
    // Too late: the generation is over.
    roster.closed(1, 1, at(1), "connection closed");
    settle(&mut roster, at(2));
    let mut inbox = rejoin(&mut roster, 1, 1, at(2));
    assert_eq!(heard(&mut inbox), [CoordinatorMessage::Welcome { adopted: false }]);
}

#[test]
fn workers_that_gave_up_a_coordinator_that_did_not_listen_come_back_to_their_generation() {
    let (mut roster, _inboxes) = roster(2);
    settle(&mut roster, at(0));
    // Nobody has listened from second 1 to 40, which is longer than the 5 s of the limits.
    roster.excuse_silence(at(40), at(39));
    for worker in [1, 0] {
        roster.closed(u64::from(worker), worker, at(40), "connection closed");
    }
    assert!(settle(&mut roster, at(40)).is_empty(), "the closed connections are no loss");
    let mut inboxes = [0, 1].map(|worker| rejoin(&mut roster, worker, 1, at(41)));
    assert_eq!(heard(&mut inboxes[0]), [CoordinatorMessage::Welcome { adopted: true }]);
    let is_disturbance = |event: &Event| !matches!(event, Event::WorkerJoined { rejoined: true, .. });
    assert!(!settle(&mut roster, at(44)).iter().any(is_disturbance));
    // From second 45 on, a closed connection is what it was before.
    roster.closed(1, 1, at(46), "connection closed");
    let events = settle(&mut roster, at(46));
    assert!(matches!(events[..], [Event::WorkerLost { worker: 1, .. }, Event::GenerationAborted { generation: 1, .. }]), "{events:?}");
}

#[test]
fn who_does_not_come_back_to_a_coordinator_that_did_not_listen_is_silent() {
    let (mut roster, mut inboxes) = roster(2);
    settle(&mut roster, at(0));
    roster.excuse_silence(at(40), at(39));
    drop(inboxes.remove(0));
    roster.closed(0, 0, at(40), "connection closed");
    // The leader's part of a checkpoint waits until it is back.
    let share = WorkerMessage::ShareSaved { generation: 1, step: 5, files: Vec::new() };
    say(&mut roster, 1, at(41), share);
    assert_eq!(roster.kept_for_leader.len(), 1);
    heartbeat(&mut roster, 1, at(45), 5);
    assert!(settle(&mut roster, at(45)).is_empty());
    heartbeat(&mut roster, 1, at(46), 5);
    let events = settle(&mut roster, at(46));
    let is_lost = |event: &Event| matches!(event, Event::WorkerLost { worker: 0, class: FailureClass::MissedHeartbeat, .. });
    assert!(events.iter().any(is_lost), "{events:?}");
}

#[test]
fn shares_and_requests_reach_those_whom_they_concern() {
    let (mut roster, mut inboxes) = roster(2);
    settle(&mut roster, at(0));
    inboxes.iter_mut().for_each(|inbox| drop(heard(inbox)));
    let files = vec![SavedFile { name: "a".to_owned(), size: 1, blake3: "00".to_owned() }];
    say(&mut roster, 1, at(1), WorkerMessage::ShareSaved { generation: 1, step: 10, files: files.clone() });
    say(&mut roster, 1, at(1), WorkerMessage::ShareSaved { generation: 0, step: 10, files: files.clone() });
    say(&mut roster, 1, at(1), WorkerMessage::Ping { id: 7 });
    roster.control(Control::Save { reason: "SIGUSR1".to_owned() });
    roster.pulse();
    let save = CoordinatorMessage::Save { reason: "SIGUSR1".to_owned() };
    let share = CoordinatorMessage::ShareSaved { generation: 1, step: 10, rank: 1, files };
    assert_eq!(heard(&mut inboxes[0]), [share, save.clone(), CoordinatorMessage::Pulse {}]);
    assert_eq!(heard(&mut inboxes[1]), [CoordinatorMessage::Pong { id: 7 }, save, CoordinatorMessage::Pulse {}]);
}

#[test]
fn a_save_that_nobody_can_do_is_told() {
    let (mut roster, mut inboxes) = roster(1);
    let save = || Control::Save { reason: "SIGUSR1".to_owned() };
    let message = "SIGUSR1: nobody trains at the moment, so nothing is saved".to_owned();
    roster.take_events();
    heard(&mut inboxes[0]);
    roster.control(save());
    assert_eq!(roster.take_events(), [Event::Warning { message }]);
    assert_eq!(heard(&mut inboxes[0]), Vec::new());
    settle(&mut roster, at(1));
    roster.control(save());
    assert_eq!(roster.take_events(), Vec::new());
    assert_eq!(heard(&mut inboxes[0]).last(), Some(&CoordinatorMessage::Save { reason: "SIGUSR1".to_owned() }));
}

#[test]
fn heartbeats_alone_bring_no_decision_about() {
    let (mut roster, _inboxes) = roster(1);
    settle(&mut roster, at(0));
    assert!(roster.take_change());
    heartbeat(&mut roster, 0, at(1), 0);
    say(&mut roster, 0, at(1), WorkerMessage::Ping { id: 1 });
    assert!(!roster.take_change());
    say(&mut roster, 0, at(1), WorkerMessage::Broken { generation: 1, reason: "cut".to_owned() });
    assert!(roster.take_change());
}
