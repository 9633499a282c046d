//! Views of small stories.

use cloze_cluster::{FailureClass, Unreported};
use cloze_recipes::failure::FailureKind;

use super::*;
use crate::view::fixtures::{aborted, exited, generation, lost, recorded, recovered, report, restored, start, step};
use crate::view::ledger::Decision;

fn view(events: impl IntoIterator<Item = Event>) -> RunView {
    let mut view = RunView::default();
    recorded(events).iter().for_each(|event| view.apply(event));
    view
}

fn training() -> Vec<Event> {
    start().into_iter().chain((1..=57).map(|number| step(1, number, 1.0))).collect()
}

fn recovery() -> Vec<Event> {
    let restarted = Event::WorkerRestarted { worker: 1, attempt: 1, budget_left: 2 };
    let joined = Event::WorkerJoined { worker: 1, host: "node-b".to_owned(), process_id: 111, rejoined: false };
    vec![
        lost(Some(1)),
        aborted(1, 57),
        exited(),
        restarted,
        Event::WorkerStarted { worker: 1, process_id: 111 },
        joined,
        generation(2, &[0, 1]),
        restored(2, 57, "memory of worker 0"),
        step(2, 58, 1.0),
        recovered(2, 1, FailureClass::ConnectionClosed),
    ]
}

fn after(events: &[Event], more: impl IntoIterator<Item = Event>) -> RunView {
    view(events.iter().cloned().chain(more))
}

#[test]
fn states_follow_events() {
    let failed = Event::RunFailed { failure: Failure::new(FailureKind::Run, "the restart budget is spent") };
    let regrouped = Event::GenerationRegrouped { generation: 1, reason: "worker 2 is there".to_owned(), step: 57 };
    let again = Event::RunStarted { name: "demo".to_owned(), recipe_hash: "4f1c".to_owned(), workers: 2, min_workers: None, steps: 300 };
    let cases = [
        ("nothing", vec![], RunState::Starting),
        ("start", start(), RunState::Starting),
        ("a step", training(), RunState::Training),
        ("an abort", [training(), vec![lost(Some(1)), aborted(1, 57)]].concat(), RunState::Recovering),
        ("a recovery", [training(), recovery()].concat(), RunState::Training),
        ("a regroup", [training(), vec![regrouped]].concat(), RunState::Regrouping),
        ("the end", [training(), vec![Event::RunFinished { step: 57, seconds: 9.0 }]].concat(), RunState::Finished),
        ("a stop", [training(), vec![Event::RunStopped { step: 57 }]].concat(), RunState::Stopped),
        ("a failure", [training(), vec![failed.clone()]].concat(), RunState::Failed),
        ("a resume", [training(), vec![failed, again]].concat(), RunState::Starting),
    ];
    for (name, events, state) in cases {
        let view = view(events);
        assert_eq!(view.state, state, "{name}");
        assert_eq!(view.failure.is_some(), state == RunState::Failed, "{name}");
    }
}

#[test]
fn a_running_view() {
    let view = view(training());
    assert_eq!((view.name.as_str(), view.generation, view.members.as_slice()), ("demo", 1, [0, 1].as_slice()));
    assert_eq!((view.progress.step, view.progress.steps, view.source.as_str()), (57, 300, "scratch"));
    assert_eq!((view.totals.steps, view.totals.tokens, view.totals.examples), (57, 5700, 456));
    let worker = &view.workers[1];
    assert_eq!((worker.state, worker.rank, worker.process_id, worker.restarts), (WorkerState::Training, Some(1), Some(101), 0));
    assert_eq!(worker.host.as_deref(), Some("node-a"));
    // One event a second: seven of the start, then the steps.
    assert_eq!((view.started, view.updated), (0.0, 63.0));
}

#[test]
fn steps_without_a_report_count() {
    // Every tenth step is reported, and tells what the nine before it were.
    let reported = |generation: u64, number: u64, steps: u64| {
        let before = Unreported { steps, tokens: 100 * steps, seconds: 0.5 * steps as f64 };
        Event::Step { generation, report: StepReport { before, ..report(number, 1.0) } }
    };
    let ten = |range: std::ops::RangeInclusive<u64>| range.map(|tens| reported(1, 10 * tens, 9));
    let steady = || start().into_iter().chain(ten(1..=5)).collect::<Vec<_>>();
    let sums = |view: &RunView| (view.progress.step, view.totals.steps, view.totals.tokens, view.totals.examples);
    let steady_view = view(steady());
    assert_eq!(sums(&steady_view), (50, 50, 5000, 400));
    assert!((steady_view.totals.step_seconds - 25.0).abs() < 1e-9);
    let progress = Event::Progress { generation: 1, step: 57 };
    let ended = || vec![progress.clone(), Event::RunStopped { step: 58 }];
    let memory = || vec![aborted(1, 57), generation(2, &[0, 1]), restored(2, 58, "memory of worker 0"), reported(2, 60, 9)];
    let checkpoint = || vec![aborted(1, 57), generation(2, &[0, 1]), restored(2, 40, "file:///c"), reported(2, 50, 9)];
    let cases = [
        ("steps that nobody reported yet", vec![progress.clone()], (57, 50, 5000, 456)),
        ("a stop between two reports", ended(), (58, 58, 5000, 464)),
        ("state from memory", memory(), (60, 60, 6000, 480)),
        ("ten steps are done again, and seven were done for nothing", checkpoint(), (50, 67, 6000, 400)),
    ];
    for (name, more, (step, steps, tokens, position)) in cases {
        let view = after(&steady(), more);
        assert_eq!(
            (view.progress.step, view.totals.steps, view.totals.tokens, view.progress.examples),
            (step, steps, tokens, position),
            "{name}"
        );
    }
}

#[test]
fn a_recovery_is_told() {
    let view = after(&training(), recovery());
    let failure = &view.failures[0];
    assert_eq!((view.failures.len(), failure.decision, failure.recovered_s), (1, Some(Decision::Replaced), Some(0.8)));
    assert_eq!((view.totals.recoveries, view.totals.recovery_seconds, view.totals.failures["connection_closed"]), (1, 0.8, 1));
    let worker = &view.workers[1];
    assert_eq!(
        (worker.state, worker.restarts, worker.process_id, worker.host.as_deref()),
        (WorkerState::Training, 1, Some(111), Some("node-b"))
    );
}

#[test]
fn restarts_of_a_slot_that_is_filled_elsewhere_are_counted() {
    let joined = |process_id, rejoined| Event::WorkerJoined { worker: 1, host: "node-b".to_owned(), process_id, rejoined };
    let started =
        |workers: u32| Event::RunStarted { name: "demo".to_owned(), recipe_hash: String::new(), workers, min_workers: None, steps: 300 };
    let cases = [
        ("the first process", vec![started(2), joined(7, false)], (0, 7)),
        ("its connection broke", vec![started(2), joined(7, false), joined(7, true)], (0, 7)),
        ("another process", vec![started(2), joined(7, false), lost(Some(1)), joined(8, false)], (1, 8)),
        ("a new controller started anew", vec![started(2), joined(7, false), started(2), joined(8, false)], (0, 8)),
        (
            "a new controller took it over",
            vec![
                generation(1, &[0, 1]),
                started(2),
                Event::CoordinatorRestarted { generation: 1, adopted: true },
                lost(Some(1)),
                joined(8, false),
            ],
            (1, 8),
        ),
    ];
    for (name, events, (restarts, process_id)) in cases {
        let worker = &view(events).workers[1];
        assert_eq!((worker.restarts, worker.process_id), (restarts, Some(process_id)), "{name}");
    }
}

#[test]
fn nobody_trains_in_a_run_that_has_ended() {
    let failed = Event::RunFailed { failure: Failure::new(FailureKind::Run, "the restart budget is spent") };
    let view = after(&training(), [lost(Some(1)), failed]);
    let shown: Vec<_> = view.workers.iter().map(|worker| (worker.state, worker.rank)).collect();
    assert_eq!(shown, [(WorkerState::Absent, None), (WorkerState::Lost, None)]);
    assert_eq!(view.workers[0].last_word, "the run has ended");
}

#[test]
fn an_open_failure_is_shown_already() {
    let view = after(&training(), recovery().into_iter().take(3));
    assert_eq!((view.failures.len(), view.failures[0].decision, view.totals.failures.len()), (1, None, 0));
    let worker = &view.workers[1];
    assert_eq!((worker.state, worker.rank, worker.process_id), (WorkerState::Lost, None, None));
    assert_eq!(worker.last_word, "lost: connection closed; its process ended: signal 9 (SIGKILL)");
    assert_eq!((view.workers[0].state, view.workers[0].last_word.as_str()), (WorkerState::Joined, "waits for the next generation"));
}

#[test]
fn a_late_end_of_an_old_process_changes_nothing() {
    let view = after(&training(), recovery().into_iter().chain([exited()]));
    assert_eq!((view.workers[1].state, view.workers[1].process_id), (WorkerState::Training, Some(111)));
}

#[test]
fn a_new_controller_adopts_the_members() {
    let again = Event::RunStarted { name: "demo".to_owned(), recipe_hash: "4f1c".to_owned(), workers: 2, min_workers: Some(1), steps: 300 };
    let joined = [1, 0].map(|worker| Event::WorkerJoined { worker, host: "node-a".to_owned(), process_id: 100 + worker, rejoined: true });
    let adopted = Event::CoordinatorRestarted { generation: 1, adopted: true };
    let events = [vec![again], joined.to_vec(), vec![adopted]].concat();
    for (name, view) in [("with its past", after(&training(), events.clone())), ("from here on", view(events))] {
        assert_eq!((view.state, view.generation, view.members.as_slice()), (RunState::Training, 1, [0, 1].as_slice()), "{name}");
        let seats: Vec<_> = view.workers.iter().map(|worker| (worker.state, worker.rank)).collect();
        assert_eq!(seats, [(WorkerState::Training, Some(0)), (WorkerState::Training, Some(1))], "{name}");
    }
}

#[test]
fn lists_are_bounded() {
    let warnings = (0..100).map(|number| Event::Warning { message: format!("warning {number}") });
    let saved = |step| Event::CheckpointSaved { step, url: "file:///c".to_owned(), bytes: 10, seconds: 0.5, blocked_s: 0.25 };
    let losses = (0..100).flat_map(|_| [lost(None), exited(), generation(2, &[0, 1])]);
    let view = after(&training(), warnings.chain((0..100).map(saved)).chain(losses));
    assert_eq!((view.warnings.len(), view.warnings[MAX_WARNINGS - 1].message.as_str()), (MAX_WARNINGS, "warning 99"));
    assert_eq!((view.checkpoints.len(), view.checkpoints[MAX_CHECKPOINTS - 1].step), (MAX_CHECKPOINTS, 99));
    assert_eq!((view.failures.len(), view.totals.failures["connection_closed"]), (MAX_FAILURES, 100));
    assert_eq!((view.totals.warnings, view.totals.checkpoints, view.totals.checkpoint_blocked_seconds), (100, 100, 25.0));
    let far = Event::WorkerJoined { worker: u32::MAX, host: "node-z".to_owned(), process_id: 7, rejoined: false };
    assert_eq!(after(&start(), [far]).workers.len(), MAX_SLOTS as usize);
}

#[test]
fn a_reader_catches_up_with_steps_and_needs_the_whole_after_anything_else() {
    let mut written = view(training());
    let mut read: RunView = serde_json::from_value(serde_json::to_value(&written).unwrap()).unwrap();
    let mut seen = written.seen();
    for event in recorded([step(1, 58, 0.5), step(1, 59, f64::NAN)]) {
        written.apply(&event);
        let update = written.update_since(seen).expect("a step needs no more");
        let update = serde_json::from_str(&serde_json::to_string(&update).unwrap()).unwrap();
        read.merge(update);
        seen = written.seen();
    }
    assert_eq!(serde_json::to_value(&read).unwrap(), serde_json::to_value(&written).unwrap());
    assert_eq!((read.progress.loss, read.curve.points.len()), (None, 59));
    let others = [step(1, 40, 0.5), step(2, 60, 0.5), Event::Warning { message: "disk is slow".to_owned() }];
    for event in recorded(others) {
        let seen = written.seen();
        written.apply(&event);
        assert_eq!(written.update_since(seen), None, "{event:?}");
    }
}

#[test]
fn names_are_those_of_the_json() {
    for state in RunState::ALL {
        assert_eq!(serde_json::to_value(state).unwrap(), state.name());
    }
}
