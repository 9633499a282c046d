//! Runs as text for a terminal.

use std::fmt::Write as _;
use std::path::Path;

use comfy_table::{CellAlignment, Table, presets};

use super::difference::Difference;
use super::entry::{RunEntry, plain};
use crate::reporter::numbers::clock_text;
use crate::view::RunState;

/// Length of a hash in a list.
const HASH_CHARS: usize = 8;
/// Seconds of a day.
const DAY_S: f64 = 86_400.0;
/// What stands where nothing is known.
const UNKNOWN: &str = "-";

/// A list of runs; `now` is Unix time in seconds.
pub fn list_text(runs: &[RunEntry], now: f64) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "run",
        "hash",
        "state",
        "step",
        "loss",
        "accuracy",
        "parents",
        "checkpoints",
        "worker-hours",
        "GPU-hours",
        "started",
    ]);
    for run in runs {
        table.add_row([
            // What `cloze runs show` and `cloze diff` take.
            run.place.clone(),
            run.recipe_hash.chars().take(HASH_CHARS).collect(),
            state_text(run, now),
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
    let notes =
        if noted > 0 { format!("\nruns with files that cannot be read: {noted}; `cloze runs show RUN` names them") } else { String::new() };
    let count = if runs.len() == 1 { "1 run".to_owned() } else { format!("{} runs", runs.len()) };
    without_controls(&format!("{table}\n{count}{notes}\n"))
}

/// Everything of one run.
pub fn entry_text(run: &RunEntry, now: f64) -> String {
    let mut text = format!("run {}: {}\n", run.name, state_text(run, now));
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
            let delta =
                metric.delta.map_or_else(|| UNKNOWN.to_owned(), |delta| format!("{}{}", if delta > 0.0 { "+" } else { "" }, shown(delta)));
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

/// A bucket is told now and then, so that a run which has not ended may be farther by now, or gone.
fn state_text(run: &RunEntry, now: f64) -> String {
    match run.told {
        Some(told) if !RunState::ALL.iter().any(|state| state.is_end() && state.name() == run.state) => {
            format!("{}, told {}", run.state, ago(now - told))
        }
        _ => run.state.clone(),
    }
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
    run.started.map_or_else(|| UNKNOWN.to_owned(), |started| ago(now - started))
}

/// Days where there are two of them, else hours, minutes and seconds.
fn ago(seconds: f64) -> String {
    if seconds >= 2.0 * DAY_S { format!("{:.0} d ago", seconds / DAY_S) } else { format!("{} ago", clock_text(seconds)) }
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::super::difference::{Side, compare};
    use super::super::entry::entries;
    use super::*;
    use crate::report::fixtures::{run_folder, study};

    #[test]
    fn a_list_and_everything_of_one_run() {
        let root = tempfile::tempdir().unwrap();
        let study = study(root.path());
        // The third seed of an arm starts from the first one, as a later stage does.
        let path = study.join("trials/mlm-43.json");
        let trial = fs::read_to_string(&path).unwrap().replace("\"parent\": null", "\"parent\": \"mlm-42\"");
        fs::write(&path, trial).unwrap();
        fs::create_dir_all(study.join("runs/table1-mlm-43/checkpoints/step-000000000020")).unwrap();
        fs::write(study.join("runs/table1-mlm-43/checkpoints/step-000000000020/manifest.json"), "{}").unwrap();
        fs::create_dir_all(study.join("runs/table1-mlm-43/checkpoints/step-000000000030")).unwrap();
        let folders: Vec<PathBuf> = ["mlm-43", "mlm-44"].iter().map(|name| study.join(format!("runs/table1-{name}"))).collect();
        let (runs, notes) = entries(&folders);
        assert!(notes.is_empty(), "{notes:?}");
        let list = list_text(&runs, 50.0 + 3.0 * DAY_S).replace(&format!("{}/", study.join("runs").display()), "");
        let expected = "\
───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
 run             hash   state       step     loss   accuracy         parents    checkpoints   worker-hours   GPU-hours   started 
═══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
 table1-mlm-43   4f1c   finished   20/300  1.3244      32.00   table1-mlm-42   1, newest 20          0.015       0.015   3 d ago 
───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
 table1-mlm-44   4f1c   failed     20/300  1.3344          -               -              0          0.015       0.015   3 d ago 
───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
2 runs
";
        assert_eq!(squeezed(&list), squeezed(expected), "\n{list}");
        let shown = entry_text(&runs[0], 60.0);
        for part in
            ["study        table1, trial mlm-43", "parent       ", "accuracy     32.00 mmlu", "recipe       train.steps: 20", "0:10 ago"]
        {
            assert!(shown.contains(part), "`{part}` is missing in:\n{shown}");
        }
        assert!(entry_text(&runs[1], 60.0).contains("failure      restart budget spent"));
        assert!(runs[0].contains("TRAIN.DEVICE=cuda") && runs[0].contains("table1") && !runs[0].contains("train.device=cpu"));
    }

    /// Without what only lines up columns.
    fn squeezed(text: &str) -> String {
        let is_rule = |line: &&str| line.starts_with(['─', '═']);
        text.lines().filter(|line| !is_rule(line)).map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") + "\n").collect()
    }

    #[test]
    fn differences_line_up() {
        let root = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| root.path().join(name));
        run_folder(&one, 1, Some(0.25));
        run_folder(&two, 2, Some(0.5));
        let side = |run: &PathBuf| Side::read(run).unwrap();
        let text = squeezed(&difference_text(&compare(side(&one), side(&two))));
        for line in ["name one two", "seed 1 2", "mmlu accuracy 25 50 +25", "step 20 20 0"] {
            assert!(text.contains(&format!("\n{line}\n")), "`{line}` is missing in:\n{text}");
        }
        assert!(!text.contains("train.steps"), "{text}");
    }
}
