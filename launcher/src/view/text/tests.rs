//! Snapshots of views as text.

use cloze_cluster::{Event, FailureClass};
use cloze_recipes::failure::{Failure, FailureKind};

use super::*;
use crate::view::fixtures::{aborted, exited, generation, lost, recorded, recovered, restored, start, step};

fn view(events: impl IntoIterator<Item = Event>) -> RunView {
    let mut view = RunView::default();
    recorded(events).iter().for_each(|event| view.apply(event));
    view
}

fn story() -> Vec<Event> {
    let mut events = start();
    events.push(Event::DashboardListening { url: "http://127.0.0.1:4243/".to_owned() });
    events.extend([step(1, 56, 1.3), step(1, 57, 1.2341)]);
    let url = "file:///c/step-000000000050".to_owned();
    events.push(Event::CheckpointSaved { step: 50, url, bytes: 12_300_000, seconds: 0.44, blocked_s: 0.02 });
    events.extend([lost(Some(1)), aborted(1, 57), exited()]);
    events.push(Event::WorkerRestarted { worker: 1, attempt: 1, budget_left: 2 });
    events.push(Event::WorkerStarted { worker: 1, process_id: 111 });
    events
}

fn recovery() -> Vec<Event> {
    vec![
        Event::WorkerJoined { worker: 1, host: "node-b".to_owned(), process_id: 111, rejoined: false },
        generation(2, &[0, 1]),
        restored(2, 57, "memory of worker 0"),
        step(2, 58, 1.2),
        recovered(2, 1, FailureClass::ConnectionClosed),
    ]
}

#[test]
fn a_page_while_a_worker_is_replaced() {
    assert_eq!(
        status_page(&view(story()), true, 20.0),
        "run demo: recovering
  generation  1 with 2 of 2 slots
  state from  scratch
  step        57 of 300 (19 %), ETA ?
  loss        1.234 (smoothed 1.293), learning rate 9.8e-4, gradient norm 0.50
  speed       200 tokens/s (last step 33k), 812 examples/s
  data        456 of 2400 examples
  checkpoint  step 50, 12MB in 0.4 s, held up 0.0 s: file:///c/step-000000000050
  dashboard   http://127.0.0.1:4243/
  last event  0:05 ago

  worker  state     rank  host    process  restarts  last word
  0       joined    -     node-a  100      0         waits for the next generation
  1       starting  -     node-a  111      1         its process was started

  failure            worker  host    step  decision  recovered  steps lost  reason
  connection closed  1       node-a  57    replaced  -          -           connection closed
"
    );
}

#[test]
fn a_warning_is_shown_until_the_run_has_gone_on() {
    let warning = || Event::Warning { message: "disk is slow".to_owned() };
    let saved = |step| Event::CheckpointSaved { step, url: "file:///c".to_owned(), bytes: 1, seconds: 0.1, blocked_s: 0.0 };
    let run = |more: Vec<Event>| start().into_iter().chain([saved(5), warning()]).chain(more);
    let cases = [
        (run(Vec::new()), true),
        (run(vec![step(1, 6, 1.0)]), true),
        (run(vec![saved(10)]), false),
        (run(vec![saved(10), warning()]), true),
        (run(start()), false),
        (run(vec![Event::RunFinished { step: 300, seconds: 9.0 }]), false),
        (run(vec![Event::RunStopped { step: 6 }]), true),
    ];
    for (events, is_shown) in cases {
        let events: Vec<Event> = events.collect();
        let text = status_page(&view(events.clone()), true, 4000.0);
        assert_eq!(text.contains("  warning     disk is slow\n"), is_shown, "{events:?}: {text}");
    }
}

#[test]
fn a_page_after_the_end() {
    let failed = Event::RunFailed {
        failure: Failure::new(FailureKind::Damaged, "a shard is damaged").at("shard 3").because("hash\u{1b}[2J differs").hint("prepare"),
    };
    let text = status_page(&view(story().into_iter().chain(recovery()).chain([failed])), false, 4000.0);
    assert!(text.starts_with("run demo: failed\n  failure     a shard is damaged; shard 3; hash [2J differs\n"), "{text}");
    assert!(text.contains("\n  step        58 of 300 (19 %)\n"), "{text}");
    assert!(text.contains("\n  1       absent  -     node-b  111      1         the run has ended\n"), "{text}");
    assert!(text.contains("\n  connection closed  1       node-a  57    replaced  0.8 s      0           connection closed\n"), "{text}");
}

#[test]
fn a_run_of_which_nothing_is_known_shows_no_numbers() {
    assert_eq!(status_page(&RunView::default(), false, 4000.0), "no event of this run yet\n");
}

#[test]
fn a_run_without_controller_says_so() {
    let cases = [
        (view(start()), true, "starting"),
        (view(start()), false, "starting when its controller ended; `cloze resume` goes on"),
        (
            view(start().into_iter().chain([step(1, 1, 1.0)])),
            false,
            "training when its controller ended; `cloze resume` takes it over or goes on from its newest checkpoint",
        ),
        (view([Event::RunStopped { step: 1 }]), false, "stopped"),
    ];
    for (view, controller, expected) in cases {
        assert_eq!(state_text(&view, controller), expected);
    }
}

#[test]
fn one_line() {
    let cases = [
        (view([]), "starting · generation 0 · step 0/0 · loss ? · ? tokens/s · ETA ? · 0 of 0 workers train · 0 failures"),
        (
            view(story().into_iter().chain(recovery())),
            "training · generation 2 · step 58/300 · loss 1.200 · 200 tokens/s · ETA 2:01 · 2 of 2 workers train · 1 failure",
        ),
    ];
    for (view, expected) in cases {
        assert_eq!(status_line(&view), expected);
    }
}

#[test]
fn a_long_table_shows_who_does_not_train() {
    let mut workers: Vec<WorkerView> = (0..100).map(WorkerView::absent).collect();
    workers.iter_mut().for_each(|worker| worker.becomes(WorkerState::Training, "trains"));
    workers[77].becomes(WorkerState::Lost, "lost: silent");
    let text = workers_text(&workers);
    assert_eq!(text.lines().count(), 1 + 1 + MAX_WORKER_ROWS + 1);
    assert!(text.contains("\n  77      lost "), "{text}");
    assert!(text.ends_with("  … and 68 more that train\n"), "{text}");
}
