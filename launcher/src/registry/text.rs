//! Runs as text for a terminal.

use std::fmt::Write as _;
use std::path::Path;

use comfy_table::{CellAlignment, Table, presets};

use super::difference::Difference;
use super::entry::{RunEntry, plain};
use crate::reporter::numbers::clock_text;

/// Length of a hash in a list.
const HASH_CHARS: usize = 8;
/// What stands where nothing is known.
const UNKNOWN: &str = "-";

/// A list of runs; `now` is Unix time in seconds.
pub fn list_text(runs: &[RunEntry], now: f64) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["run", "hash", "state", "step", "loss", "accuracy", "parents", "checkpoints", "worker-hours", "GPU-hours", "started"]);
    for run in runs {
        table.add_row([
            run.name.clone(),
            run.recipe_hash.chars().take(HASH_CHARS).collect(),
            run.state.clone(),
            step_text(run),
            run.loss.map_or_else(|| UNKNOWN.to_owned(), |loss| format!("{loss:.4}")),
            run.metrics.get("mean").map_or_else(|| UNKNOWN.to_owned(), |mean| format!("{mean:.2}")),
            joined(run.parents.iter().map(|parent| file_name(parent))),
            checkpoint_text(run),
            format!("{:.3}", run.worker_hours),
            if run.gpu_hours > 0.0 { format!("{:.3}", run.gpu_hours) } else { UNKNOWN.to_owned() },
            started_text(run, now),
        ]);
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let noted = runs.iter().filter(|run| !run.notes.is_empty()).count();
    let notes = if noted > 0 { format!("\nruns with files that cannot be read: {noted}; `cloze runs show RUN` names them") } else { String::new() };
    let count = if runs.len() == 1 { "1 run".to_owned() } else { format!("{} runs", runs.len()) };
    without_controls(&format!("{table}\n{count}{notes}\n"))
}

/// Everything of one run.
pub fn entry_text(run: &RunEntry, now: f64) -> String {
    let mut text = format!("run {}: {}\n", run.name, run.state);
    let mut add = |name: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {name:<13}{value}");
    };
    add("place", &run.place);
    add("recipe hash", &run.recipe_hash);
    if let Some(study) = &run.study {
        add("study", &format!("{study}, trial {}", run.trial.as_deref().unwrap_or(UNKNOWN)));
    }
    run.parents.iter().for_each(|parent| add("parent", &parent.display().to_string()));
    add("started", &started_text(run, now));
    add("step", &step_text(run));
    if let Some(loss) = run.loss {
        add("loss", &format!("{loss:.4}"));
    }
    run.metrics.iter().for_each(|(task, accuracy)| add("accuracy", &format!("{accuracy:.2} {task}")));
    add("checkpoints", &format!("{}: {}", checkpoint_text(run), run.checkpoints.place));
    let gpus = if run.gpu_hours > 0.0 { format!(", {:.3} GPU-hours", run.gpu_hours) } else { String::new() };
    add("cost", &format!("{:.3} worker-hours{gpus}", run.worker_hours));
    run.failure.iter().for_each(|failure| add("failure", failure));
    run.notes.iter().for_each(|note| add("note", note));
    run.recipe.iter().for_each(|(key, value)| add("recipe", &format!("{key}: {}", plain(value))));
    without_controls(&text)
}

/// What two runs differ in.
pub fn difference_text(difference: &Difference) -> String {
    let mut text = String::new();
    if difference.recipe.is_empty() {
        text.push_str("the recipes are equal\n");
    } else {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(["recipe", &difference.first, &difference.second]);
        let value = |value: &serde_json::Value| if value.is_null() { UNKNOWN.to_owned() } else { plain(value) };
        for pair in &difference.recipe {
            table.add_row([pair.key.clone(), value(&pair.first), value(&pair.second)]);
        }
        let _ = writeln!(text, "{table}");
    }
    if !difference.metrics.is_empty() {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(["result", &difference.first, &difference.second, "delta"]);
        let number = |number: Option<f64>| number.map_or_else(|| UNKNOWN.to_owned(), shown);
        for metric in &difference.metrics {
            let delta = metric.delta.map_or_else(|| UNKNOWN.to_owned(), |delta| format!("{}{}", if delta > 0.0 { "+" } else { "" }, shown(delta)));
            table.add_row([metric.name.clone(), number(metric.first), number(metric.second), delta]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let _ = writeln!(text, "\n{table}");
    }
    without_controls(&text)
}

/// Whole numbers as such, others with four decimals.
fn shown(number: f64) -> String {
    if number.fract() == 0.0 { format!("{number:.0}") } else { format!("{number:.4}") }
}

fn step_text(run: &RunEntry) -> String {
    if run.steps == 0 { run.step.to_string() } else { format!("{}/{}", run.step, run.steps) }
}

fn checkpoint_text(run: &RunEntry) -> String {
    match run.checkpoints.newest_step {
        Some(step) => format!("{}, newest {step}", run.checkpoints.count),
        None => run.checkpoints.count.to_string(),
    }
}

fn started_text(run: &RunEntry, now: f64) -> String {
    run.started.map_or_else(|| UNKNOWN.to_owned(), |started| format!("{} ago", clock_text(now - started)))
}

fn joined(names: impl Iterator<Item = String>) -> String {
    let names: Vec<String> = names.collect();
    if names.is_empty() { UNKNOWN.to_owned() } else { names.join(" < ") }
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// A name may hold anything, and a terminal would obey it.
fn without_controls(text: &str) -> String {
    text.chars().map(|character| if character.is_control() && character != '\n' { ' ' } else { character }).collect()
}
