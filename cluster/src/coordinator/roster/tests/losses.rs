//! Workers that are lost and come back, GPUs that fail, and checkpoints that are gone.

use super::*;

#[test]
fn a_worker_whose_gpu_fails_is_lost_and_the_run_is_not() {
    let (mut roster, mut inboxes) = roster_of(2, Limits { exclude_host_after: 2, ..limits() });
    settle(&mut roster, at(0));
    let class = FailureClass::Device;
    say(&mut roster, 1, at(1), WorkerMessage::Failed { failure: failure("CUDA error"), class, generation: 1, step: 3, culprit: true });
    let events = settle(&mut roster, at(1));
    assert!(matches!(&events[0], Event::WorkerLost { worker: 1, class: FailureClass::Device, .. }), "{events:?}");
    assert!(matches!(heard(&mut inboxes[0]).last(), Some(CoordinatorMessage::Abort { generation: 1, .. })));
    assert_eq!(roster.state.hosts["node-1"].failures, 1, "the host answers for its devices");
}

#[test]
fn a_gpu_that_stays_away_is_lost_again_and_one_that_never_was_there_ends_the_run() {
    let (mut roster, _inboxes) = roster(2);
    settle(&mut roster, at(0));
    let environment = Failure::new(FailureKind::Environment, "the GPU does not answer").because("no device");
    let failed = |class, generation| WorkerMessage::Failed { failure: environment.clone(), class, generation, step: 3, culprit: true };
    say(&mut roster, 1, at(1), failed(FailureClass::Device, 1));
    settle(&mut roster, at(1));
    let _inbox = join_as(&mut roster, 1, JoinRequest { process_id: 5, ..request(1) }, at(2));
    say(&mut roster, 1, at(2), failed(FailureClass::Other, 0));
    let events = settle(&mut roster, at(2));
    let reason = "the GPU does not answer: no device";
    let is_lost = |event: &Event| matches!(event, Event::WorkerLost { class: FailureClass::Device, reason: told, .. } if told == reason);
    assert!(events.iter().any(is_lost), "{events:?}");
    // A process that gets ready has found it in order: what is missing from then on is missing for good.
    let _inbox = join_as(&mut roster, 1, JoinRequest { process_id: 6, ..request(1) }, at(3));
    ready(&mut roster, 1, at(3), 1, None);
    say(&mut roster, 1, at(3), failed(FailureClass::Other, 1));
    assert!(matches!(roster.settle(at(3)).unwrap(), Some(RunEnd::Failed(_))));
}

#[test]
fn a_process_that_comes_back_between_generations_is_not_its_own_replacement() {
    let (mut roster, _inboxes) = roster(2);
    let joins = |events: Vec<Event>| -> Vec<bool> {
        let rejoined =
            events.into_iter().filter_map(|event| if let Event::WorkerJoined { rejoined, .. } = event { Some(rejoined) } else { None });
        rejoined.collect()
    };
    assert_eq!(joins(settle(&mut roster, at(0))), [false, false]);
    roster.closed(1, 1, at(1), "connection closed");
    let _inbox = join(&mut roster, 1, 1, at(2));
    assert_eq!(joins(settle(&mut roster, at(2))), [true]);
    roster.closed(1, 1, at(3), "connection closed");
    let _inbox = join_as(&mut roster, 1, JoinRequest { process_id: 5, ..request(1) }, at(4));
    assert_eq!(joins(settle(&mut roster, at(4))), [false]);
}

#[test]
fn an_exit_that_is_heard_of_late_is_not_the_replacements() {
    let (mut roster, _inboxes) = roster(2);
    settle(&mut roster, at(0));
    roster.closed(1, 1, at(1), "connection closed");
    settle(&mut roster, at(1));
    let _inbox = join_as(&mut roster, 2, JoinRequest { process_id: 5, ..request(1) }, at(2));
    roster.control(Control::WorkerExited { worker: 1, process_id: request(1).process_id, status: "SIGKILL".to_owned() });
    let lost = |events: &[Event]| -> Vec<String> {
        let reasons =
            events.iter().filter_map(|event| if let Event::WorkerLost { reason, .. } = event { Some(reason.clone()) } else { None });
        reasons.collect()
    };
    assert!(lost(&settle(&mut roster, at(2))).is_empty());
    roster.control(Control::WorkerExited { worker: 1, process_id: 5, status: "SIGKILL".to_owned() });
    assert_eq!(lost(&settle(&mut roster, at(2))), ["process ended with SIGKILL"]);
}

#[test]
fn checkpoints_that_are_gone_are_missed() {
    let (mut roster, _inboxes) = roster(1);
    settle(&mut roster, at(0));
    let restored =
        |step, source: &str| WorkerMessage::Restored { generation: 1, step, source: source.to_owned(), skipped: Vec::new(), seconds: 0.5 };
    let warnings = |events: Vec<Event>| events.into_iter().filter(|event| matches!(event, Event::Warning { .. })).count();
    say(&mut roster, 0, at(1), restored(0, "scratch"));
    assert_eq!(warnings(settle(&mut roster, at(1))), 0, "nothing was saved yet");
    roster.state.saved_step = 220;
    say(&mut roster, 0, at(2), restored(200, "checkpoint 200"));
    assert_eq!(warnings(settle(&mut roster, at(2))), 0, "an older one is told by its source");
    roster.state.saved_step = 220;
    say(&mut roster, 0, at(3), restored(0, "scratch"));
    assert_eq!(warnings(settle(&mut roster, at(3))), 1);
}
