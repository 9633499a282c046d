//! A view as text for a terminal: a page, or one line.

use std::fmt::Write as _;

use super::ledger::{FailureRecord, class_name};
use super::{RunState, RunView, WarningView, WorkerState, WorkerView};
use crate::reporter::numbers::{clock_text, compact};

/// Most rows of the workers' table; those that do not train come first.
const MAX_WORKER_ROWS: usize = 32;
/// Failures that are shown, the newest.
const SHOWN_FAILURES: usize = 5;
/// Width of the names on the left, in characters.
const NAME_WIDTH: usize = 12;
/// What stands where a number is not known.
const UNKNOWN: &str = "?";

/// The whole view; `now` is Unix time in seconds, `controller` says whether one lives.
pub fn status_page(view: &RunView, controller: bool, now: f64) -> String {
    // A run that waits for its first job, or whose log is of no use: every number below would be made up.
    if view.name.is_empty() && view.updated <= 0.0 {
        return "no event of this run yet\n".to_owned();
    }
    let mut text = format!("run {}: {}\n", plain(&view.name), state_text(view, controller));
    let mut add = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {name:<NAME_WIDTH$}{}", plain(&value));
    };
    if let Some(failure) = &view.failure {
        add("failure", failure_text(failure));
    }
    if view.generation > 0 {
        add("generation", format!("{} with {} of {} slots", view.generation, view.members.len(), view.workers.len()));
        add("state from", view.source.clone());
    }
    add("step", step_text(view, controller));
    add("loss", loss_text(view));
    add("speed", speed_text(view));
    add("data", format!("{} of {} examples", view.progress.examples, view.progress.examples_in_all));
    if let Some(saved) = view.checkpoints.back() {
        let (step, bytes) = (saved.step, compact(saved.bytes as f64));
        add("checkpoint", format!("step {step}, {bytes}B in {:.1} s, held up {:.1} s: {}", saved.seconds, saved.blocked_s, saved.url));
    }
    if let Some(url) = view.dashboard.as_ref().filter(|_| controller) {
        add("dashboard", url.clone());
    }
    add("last event", format!("{} ago", clock_text(now - view.updated)));
    if let Some(warning) = view.warnings.back().filter(|warning| !is_stale(view, warning)) {
        add("warning", warning.message.clone());
    }
    text + &workers_text(&view.workers) + &failures_text(&view.failures)
}

/// Whether the run has gone on since a warning: its controller is a later one, a checkpoint was saved, or all steps are done.
fn is_stale(view: &RunView, warning: &WarningView) -> bool {
    let is_saved_since = view.checkpoints.back().is_some_and(|checkpoint| checkpoint.time > warning.time);
    view.started > warning.time || is_saved_since || view.state == RunState::Finished
}

/// One line, for a file that is watched.
pub fn status_line(view: &RunView) -> String {
    let progress = &view.progress;
    let speed = progress.mean_tokens_per_s.map_or_else(|| UNKNOWN.to_owned(), compact);
    let eta = progress.eta_s.map_or_else(|| UNKNOWN.to_owned(), clock_text);
    format!(
        "{} · generation {} · step {}/{} · loss {} · {speed} tokens/s · ETA {eta} · {} of {} workers train · {}",
        view.state.name(),
        view.generation,
        progress.step,
        progress.steps,
        number(progress.loss, 3),
        view.workers.iter().filter(|worker| worker.state == WorkerState::Training).count(),
        view.workers.len(),
        count(view.failures.len(), "failure"),
    )
}

fn state_text(view: &RunView, controller: bool) -> String {
    let state = view.state.name();
    match (view.state.is_end(), controller) {
        (true, _) | (false, true) => state.to_owned(),
        (false, false) if view.state == RunState::Training => {
            format!("{state} when its controller ended; `cloze resume` takes it over or goes on from its newest checkpoint")
        }
        (false, false) => format!("{state} when its controller ended; `cloze resume` goes on"),
    }
}

fn failure_text(failure: &cloze_recipes::failure::Failure) -> String {
    let parts = [Some(&failure.what), failure.place.as_ref(), failure.cause.as_ref()];
    parts.into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join("; ")
}

fn step_text(view: &RunView, controller: bool) -> String {
    let (step, steps) = (view.progress.step, view.progress.steps);
    let percent = (step * 100).checked_div(steps).unwrap_or(0);
    let eta = view.progress.eta_s.map_or_else(|| UNKNOWN.to_owned(), clock_text);
    // Where nobody tells of steps, the pace of the last ones is that of the past.
    if view.state.is_end() || !controller {
        format!("{step} of {steps} ({percent} %)")
    } else {
        format!("{step} of {steps} ({percent} %), ETA {eta}")
    }
}

fn loss_text(view: &RunView) -> String {
    let progress = &view.progress;
    let rate = progress.learning_rate.map_or_else(|| UNKNOWN.to_owned(), |rate| format!("{rate:.1e}"));
    let (loss, smoothed, norm) = (number(progress.loss, 3), number(progress.smoothed_loss, 3), number(progress.gradient_norm, 2));
    format!("{loss} (smoothed {smoothed}), learning rate {rate}, gradient norm {norm}")
}

fn speed_text(view: &RunView) -> String {
    let [mean, last, examples] = [view.progress.mean_tokens_per_s, view.progress.tokens_per_s, view.progress.examples_per_s]
        .map(|speed| speed.map_or_else(|| UNKNOWN.to_owned(), compact));
    format!("{mean} tokens/s (last step {last}), {examples} examples/s")
}

fn workers_text(workers: &[WorkerView]) -> String {
    if workers.is_empty() {
        return String::new();
    }
    let mut shown: Vec<&WorkerView> = workers.iter().collect();
    // The sort is stable: slots stay in order within each half.
    shown.sort_by_key(|worker| worker.state == WorkerState::Training);
    let hidden = shown.len().saturating_sub(MAX_WORKER_ROWS);
    shown.truncate(MAX_WORKER_ROWS);
    shown.sort_by_key(|worker| worker.slot);
    let mut rows = vec![["worker", "state", "rank", "host", "process", "restarts", "last word"].map(str::to_owned)];
    rows.extend(shown.into_iter().map(worker_row));
    let mut text = format!("\n{}", table(&rows));
    if hidden > 0 {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  … and {hidden} more that train");
    }
    text
}

fn worker_row(worker: &WorkerView) -> [String; 7] {
    let known = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    [
        worker.slot.to_string(),
        worker.state.name().to_owned(),
        known(worker.rank),
        worker.host.clone().unwrap_or_else(|| "-".to_owned()),
        known(worker.process_id),
        worker.restarts.to_string(),
        worker.last_word.clone(),
    ]
}

fn failures_text(failures: &[FailureRecord]) -> String {
    let Some(newest) = failures.len().checked_sub(1) else { return String::new() };
    let skipped = (newest + 1).saturating_sub(SHOWN_FAILURES);
    let mut rows = vec![["failure", "worker", "host", "step", "decision", "recovered", "steps lost", "reason"].map(str::to_owned)];
    rows.extend(failures[skipped..].iter().map(|record| {
        [
            class_name(record.class).replace('_', " "),
            record.worker.map_or_else(|| "-".to_owned(), |worker| worker.to_string()),
            record.host.clone().unwrap_or_else(|| "-".to_owned()),
            record.step.to_string(),
            record.decision.map_or_else(|| "open".to_owned(), |decision| decision.text().to_owned()),
            record.recovered_s.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.1} s")),
            record.steps_lost.map_or_else(|| "-".to_owned(), |steps| steps.to_string()),
            record.reason.clone(),
        ]
    }));
    let earlier = if skipped > 0 { format!("  … and {skipped} earlier\n") } else { String::new() };
    format!("\n{}{earlier}", table(&rows))
}

/// Columns as wide as their widest cell; the last one is as long as it is.
fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let rows: Vec<[String; COLUMNS]> = rows.iter().map(|row| row.each_ref().map(|cell| plain(cell))).collect();
    let widths: [usize; COLUMNS] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default());
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str("  ");
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn number(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), |value| format!("{value:.decimals$}"))
}

fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// Without control characters: a reason may quote anything, and a terminal would obey it.
fn plain(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

#[cfg(test)]
mod tests;
