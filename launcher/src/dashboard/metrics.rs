//! The view in Prometheus' text format, version 0.0.4.

use std::fmt::Write as _;

use cloze_cluster::FailureClass;

use crate::view::ledger::class_name;
use crate::view::{RunState, RunView, WorkerState};

/// Every class of failures, so that each has its series from the beginning.
const CLASSES: [FailureClass; 9] = [
    FailureClass::ConnectionClosed,
    FailureClass::MissedHeartbeat,
    FailureClass::Hung,
    FailureClass::NotFinite,
    FailureClass::OutOfMemory,
    FailureClass::Device,
    FailureClass::Collective,
    FailureClass::Excluded,
    FailureClass::Other,
];

/// All metrics of a run, and the number of streams that follow it.
pub(super) fn text(view: &RunView, streams: usize) -> String {
    let mut metrics = Metrics::default();
    run(&mut metrics, view);
    training(&mut metrics, view);
    workers(&mut metrics, view);
    failures(&mut metrics, view);
    checkpoints(&mut metrics, view);
    metrics.one("cloze_dashboard_streams", Kind::Gauge, "Pages and terminals that follow the run.", Some(streams as f64));
    metrics.text
}

fn run(metrics: &mut Metrics, view: &RunView) {
    metrics.family("cloze_run_info", Kind::Gauge, "The run and its recipe; always 1.");
    metrics.sample(&[("name", view.name.as_str()), ("recipe_hash", view.recipe_hash.as_str())], 1.0);
    metrics.family("cloze_run_state", Kind::Gauge, "1 for the state that the run is in, 0 for the others.");
    for state in RunState::ALL {
        metrics.sample(&[("state", state.name())], f64::from(u8::from(state == view.state)));
    }
    metrics.one("cloze_run_start_timestamp_seconds", Kind::Gauge, "Unix time at which the controller started.", Some(view.started));
    metrics.one("cloze_last_event_timestamp_seconds", Kind::Gauge, "Unix time of the newest event.", Some(view.updated));
    metrics.one("cloze_generation", Kind::Gauge, "Number of the newest generation.", Some(view.generation as f64));
    metrics.one("cloze_warnings_total", Kind::Counter, "Warnings of the run.", Some(view.totals.warnings as f64));
}

fn training(metrics: &mut Metrics, view: &RunView) {
    let (progress, totals) = (&view.progress, &view.totals);
    let gauges = [
        ("cloze_step", "Steps done.", Some(progress.step as f64)),
        ("cloze_target_steps", "Steps of the whole run.", Some(progress.steps as f64)),
        ("cloze_loss", "Loss of the newest step.", progress.loss),
        ("cloze_smoothed_loss", "Exponential mean of the losses.", progress.smoothed_loss),
        ("cloze_learning_rate", "Learning rate of the newest step.", progress.learning_rate),
        ("cloze_gradient_norm", "Gradient norm of the newest step, before clipping.", progress.gradient_norm),
        ("cloze_tokens_per_second", "Tokens per second of the newest step.", progress.tokens_per_s),
        ("cloze_mean_tokens_per_second", "Tokens per second over the last 50 steps.", progress.mean_tokens_per_s),
        ("cloze_examples_per_second", "Examples per second of the newest step.", progress.examples_per_s),
        ("cloze_data_position_examples", "Examples that the steps up to the newest one trained on.", Some(progress.examples as f64)),
        ("cloze_remaining_seconds", "Seconds until the last step at the present pace.", progress.eta_s),
    ];
    for (name, help, value) in gauges {
        metrics.one(name, Kind::Gauge, help, value);
    }
    let counters = [
        ("cloze_steps_total", "Steps done, replayed ones included.", totals.steps as f64),
        ("cloze_tokens_total", "Tokens of these steps.", totals.tokens as f64),
        ("cloze_examples_total", "Examples of these steps.", totals.examples as f64),
        ("cloze_step_seconds_total", "Seconds that these steps took.", totals.step_seconds),
    ];
    for (name, help, value) in counters {
        metrics.one(name, Kind::Counter, help, Some(value));
    }
}

fn workers(metrics: &mut Metrics, view: &RunView) {
    metrics.family("cloze_workers", Kind::Gauge, "Workers by what they do.");
    for state in WorkerState::ALL {
        let count = view.workers.iter().filter(|worker| worker.state == state).count();
        metrics.sample(&[("state", state.name())], count as f64);
    }
    metrics.family("cloze_worker_up", Kind::Gauge, "1 while the worker is there: joined or training.");
    for worker in &view.workers {
        let is_up = matches!(worker.state, WorkerState::Joined | WorkerState::Training);
        let (slot, host) = (worker.slot.to_string(), worker.host.as_deref().unwrap_or_default());
        metrics.sample(&[("worker", slot.as_str()), ("host", host)], f64::from(u8::from(is_up)));
    }
    metrics.family("cloze_worker_restarts_total", Kind::Counter, "Restarts of the worker's process.");
    for worker in &view.workers {
        metrics.sample(&[("worker", worker.slot.to_string().as_str())], f64::from(worker.restarts));
    }
}

fn failures(metrics: &mut Metrics, view: &RunView) {
    let totals = &view.totals;
    metrics.family("cloze_failures_total", Kind::Counter, "Failures that are dealt with, by class.");
    for class in CLASSES.map(class_name) {
        metrics.sample(&[("class", class)], totals.failures.get(class).copied().unwrap_or_default() as f64);
    }
    metrics.family("cloze_recovery_seconds", Kind::Summary, "Seconds from the end of a generation to the first step of the next.");
    metrics.part("_sum", totals.recovery_seconds);
    metrics.part("_count", totals.recoveries as f64);
    metrics.one("cloze_steps_lost_total", Kind::Counter, "Steps that had to be done again.", Some(totals.steps_lost as f64));
}

fn checkpoints(metrics: &mut Metrics, view: &RunView) {
    let (totals, newest) = (&view.totals, view.checkpoints.back());
    metrics.one("cloze_checkpoints_total", Kind::Counter, "Checkpoints that were saved.", Some(totals.checkpoints as f64));
    let (name, help) = ("cloze_checkpoint_blocked_seconds_total", "Seconds for which saving held up training.");
    metrics.one(name, Kind::Counter, help, Some(totals.checkpoint_blocked_seconds));
    let gauges = [
        ("cloze_checkpoint_step", "Step of the newest checkpoint.", newest.map(|saved| saved.step as f64)),
        ("cloze_checkpoint_size_bytes", "Size of the newest checkpoint.", newest.map(|saved| saved.bytes as f64)),
        ("cloze_checkpoint_duration_seconds", "Seconds that the newest checkpoint took.", newest.map(|saved| saved.seconds)),
        ("cloze_checkpoint_timestamp_seconds", "Unix time of the newest checkpoint.", newest.map(|saved| saved.time)),
    ];
    for (name, help, value) in gauges {
        metrics.one(name, Kind::Gauge, help, value);
    }
}

/// Types of metrics.
#[derive(Clone, Copy)]
enum Kind {
    Gauge,
    Counter,
    Summary,
}

/// The text so far.
#[derive(Default)]
struct Metrics {
    text: String,
    /// The family that samples belong to.
    name: &'static str,
}

impl Metrics {
    fn family(&mut self, name: &'static str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
            Kind::Summary => "summary",
        };
        self.name = name;
        // Writing to a string cannot fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let _ = writeln!(self.text, "{}{{{}}} {value}", self.name, labels.join(","));
    }

    fn part(&mut self, suffix: &str, value: f64) {
        let _ = writeln!(self.text, "{}{suffix} {value}", self.name);
    }

    /// A family of one sample without labels; left out where there is no number.
    fn one(&mut self, name: &'static str, kind: Kind, help: &str, value: Option<f64>) {
        if let Some(value) = value {
            self.family(name, kind, help);
            self.part("", value);
        }
    }
}

/// A label's value as the format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use cloze_cluster::Event;

    use super::*;
    use crate::view::fixtures::{aborted, exited, generation, lost, recorded, recovered, start, step};

    fn metrics(more: impl IntoIterator<Item = Event>) -> String {
        let mut view = RunView::default();
        recorded(start().into_iter().chain(more)).iter().for_each(|event| view.apply(event));
        text(&view, 3)
    }

    #[test]
    fn a_run_in_numbers() {
        let saved = Event::CheckpointSaved { step: 1, url: "file:///c".to_owned(), bytes: 100, seconds: 0.5, blocked_s: 0.25 };
        let recovery = [lost(Some(1)), aborted(1, 2), exited(), generation(2, &[0]), step(2, 3, 1.5)];
        let story = [step(1, 1, 2.0), step(1, 2, f64::NAN), saved].into_iter().chain(recovery);
        let text = metrics(story.chain([recovered(2, 1, FailureClass::ConnectionClosed)]));
        for line in [
            "cloze_run_info{name=\"demo\",recipe_hash=\"4f1c\"} 1",
            "cloze_run_state{state=\"training\"} 1",
            "cloze_run_state{state=\"failed\"} 0",
            "cloze_step 3",
            "cloze_target_steps 300",
            "cloze_loss 1.5",
            "cloze_steps_total 3",
            "cloze_generation 2",
            "cloze_workers{state=\"lost\"} 1",
            "cloze_worker_up{worker=\"0\",host=\"node-a\"} 1",
            "cloze_worker_restarts_total{worker=\"1\"} 0",
            "cloze_failures_total{class=\"connection_closed\"} 1",
            "cloze_failures_total{class=\"hung\"} 0",
            "cloze_recovery_seconds_sum 0.8",
            "cloze_recovery_seconds_count 1",
            "cloze_checkpoint_blocked_seconds_total 0.25",
            "cloze_checkpoint_size_bytes 100",
            "cloze_dashboard_streams 3",
        ] {
            assert!(text.lines().any(|found| found == line), "`{line}` is missing in:\n{text}");
        }
    }

    #[test]
    fn what_is_no_number_is_left_out() {
        let text = metrics([step(1, 1, f64::NAN)]);
        assert!(!text.contains("NaN") && !text.contains(" inf") && !text.contains("cloze_loss "), "{text}");
        assert!(!text.contains("cloze_checkpoint_step"), "{text}");
    }

    #[test]
    fn the_format_is_kept() {
        let text = metrics([step(1, 1, 2.0)]);
        let mut families = BTreeSet::new();
        let mut family = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(families.insert(name.to_owned()), "{name} stands twice");
                assert!(help.ends_with('.'), "{line}");
                name.clone_into(&mut family);
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!((name, name.ends_with("_total")), (family.as_str(), kind == "counter"));
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let name = series.split('{').next().unwrap();
                assert!(name == family || [format!("{family}_sum"), format!("{family}_count")].contains(&name.to_owned()), "{line}");
                assert!(value.parse::<f64>().unwrap().is_finite(), "{line}");
            }
        }
        assert!(text.ends_with('\n'));
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(escaped("a\\b\"c\nd"), "a\\\\b\\\"c\\nd");
    }
}
