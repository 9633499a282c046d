//! What a roster takes over from the one before it, and leaves to the next.

use super::*;
use crate::journal::Past;

#[test]
fn a_successor_takes_over_what_the_journal_knows() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.jsonl");
    let mut first = Roster::new(2, limits(), Some(Journal::open(&path, Past::Over { generation: 0, saved_step: 0 }).unwrap())).unwrap();
    let _inboxes: Vec<Inbox> = (0..2).map(|worker| join(&mut first, worker, u64::from(worker), at(0))).collect();
    (0..2).for_each(|worker| ready(&mut first, worker, at(0), 0, None));
    settle(&mut first, at(0));
    heartbeat(&mut first, 0, at(3), 12);
    first.note_progress(at(3)).unwrap();
    drop(first);

    let successor = || Roster::new(2, limits(), Some(Journal::open(&path, Past::MayRun).unwrap())).unwrap();
    let mut second = successor();
    assert_eq!(settle(&mut second, at(0)), Vec::new(), "it waits for the members");
    let mut other = rejoin(&mut second, 1, 1, at(1));
    say(&mut second, 1, at(1), WorkerMessage::ShareSaved { generation: 1, step: 10, files: Vec::new() });
    let mut leader = rejoin(&mut second, 0, 1, at(1));
    let share = CoordinatorMessage::ShareSaved { generation: 1, step: 10, rank: 1, files: Vec::new() };
    assert_eq!(heard(&mut leader), [CoordinatorMessage::Welcome { adopted: true }, share]);
    assert_eq!(heard(&mut other), [CoordinatorMessage::Welcome { adopted: true }]);
    let events = settle(&mut second, at(1));
    assert_eq!(events.last(), Some(&Event::CoordinatorRestarted { generation: 1, adopted: true }));
    assert_eq!(second.step, 12);

    // A member that listens elsewhere is another process, and the generation is over.
    let mut third = successor();
    let elsewhere = JoinRequest { collective_address: "127.0.0.1:9".to_owned(), held: Some(Held { generation: 1, step: 0 }), ..request(1) };
    let mut inbox = join_as(&mut third, 1, elsewhere, at(1));
    assert_eq!(heard(&mut inbox), [CoordinatorMessage::Welcome { adopted: false }]);
    let events = settle(&mut third, at(1));
    assert!(events.contains(&Event::CoordinatorRestarted { generation: 1, adopted: false }), "{events:?}");
    drop(third);
    let mut fourth = successor();
    assert_eq!(fourth.take_events(), [Event::CoordinatorRestarted { generation: 1, adopted: false }], "it was ended already");
    let _inboxes: Vec<Inbox> = (0..2).map(|worker| join(&mut fourth, worker, u64::from(worker), at(0))).collect();
    (0..2).for_each(|worker| ready(&mut fourth, worker, at(0), 0, None));
    let events = settle(&mut fourth, at(0));
    assert!(matches!(events.last(), Some(Event::GenerationStarted { generation: 2, .. })), "numbers go on: {events:?}");
}

#[test]
fn members_that_are_taken_over_hear_of_another_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.jsonl");
    for (before, after) in [(Some(40), None), (None, Some(40)), (Some(40), Some(40))] {
        let open = |past, until_step| Roster::new(1, Limits { until_step, ..limits() }, Some(Journal::open(&path, past).unwrap())).unwrap();
        let mut first = open(Past::Over { generation: 0, saved_step: 0 }, before);
        let _inbox = join(&mut first, 0, 0, at(0));
        ready(&mut first, 0, at(0), 0, None);
        settle(&mut first, at(0));
        drop(first);
        let mut second = open(Past::MayRun, after);
        let mut inbox = rejoin(&mut second, 0, 1, at(1));
        settle(&mut second, at(1));
        let is_told = heard(&mut inbox).iter().any(|message| matches!(message, CoordinatorMessage::Regroup { generation: 1, .. }));
        assert_eq!(is_told, before != after, "{before:?} {after:?}");
    }
}

#[test]
fn numbers_of_generations_are_not_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let journal = Journal::open(&folder.path().join("journal.jsonl"), Past::Over { generation: 4, saved_step: 0 }).unwrap();
    let mut roster = Roster::new(1, limits(), Some(journal)).unwrap();
    let _inbox = join(&mut roster, 0, 0, at(0));
    ready(&mut roster, 0, at(0), 0, None);
    let events = settle(&mut roster, at(0));
    assert!(matches!(events[..], [Event::WorkerJoined { .. }, Event::GenerationStarted { generation: 5, .. }]), "{events:?}");
}

#[test]
fn the_end_of_a_run_leaves_nothing_to_take_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.jsonl");
    let mut roster = Roster::new(1, limits(), Some(Journal::open(&path, Past::Over { generation: 0, saved_step: 0 }).unwrap())).unwrap();
    let mut inbox = join(&mut roster, 0, 0, at(0));
    ready(&mut roster, 0, at(0), 0, None);
    settle(&mut roster, at(0));
    roster.control(Control::GiveUp { failure: failure("enough") });
    let end = roster.settle(at(1)).unwrap().unwrap();
    roster.farewell(&end).unwrap();
    let told = heard(&mut inbox);
    assert!(matches!(
        &told[told.len() - 3..],
        [CoordinatorMessage::Abort { generation: 1, .. }, CoordinatorMessage::Stop { .. }, CoordinatorMessage::Released {}]
    ));
    assert_eq!(Journal::open(&path, Past::MayRun).unwrap().memory().running, None);
}
