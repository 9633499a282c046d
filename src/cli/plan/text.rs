//! A plan for people: numbers, a table of memory, the batch script, and one line for each check.

use cloze_launcher::plan::{Check, RunPlan, SweepPlan, duration};
use comfy_table::{CellAlignment, Table, presets};

use super::Printed;

/// Everything that is printed.
pub(super) fn text(printed: &Printed) -> String {
    let mut sections = Vec::new();
    if let Some(plan) = &printed.plan {
        sections.push(named(&facts(plan)));
        sections.push(format!("{}\n", memory(plan)));
        if let Some(sweep) = &plan.sweep {
            let bound = if sweep.stops_early { ", at most" } else { "" };
            sections.push(format!("all trials of the sweep{bound}\n{}", named(&all_trials(sweep))));
        }
    }
    if let Some(script) = &printed.script {
        sections.push(format!("batch script of {}\n\n{}\n", printed.script_of, script.trim_end()));
    }
    sections.push(printed.checks.iter().map(line).collect());
    sections.join("\n")
}

fn named(values: &[(&'static str, String)]) -> String {
    values.iter().map(|(name, value)| format!("{name}: {value}\n")).collect()
}

fn line(check: &Check) -> String {
    let hint = check.hint.as_ref().map_or_else(String::new, |hint| format!("      hint: {hint}\n"));
    format!("{:<5} {}: {}\n{hint}", check.level, check.name, check.found)
}

fn facts(plan: &RunPlan) -> Vec<(&'static str, String)> {
    let unknown = || "known when the data is prepared".to_owned();
    let bound = if plan.tokens.is_upper_bound { "at most" } else { "about" };
    let checkpoints = &plan.checkpoints;
    let kept = match (checkpoints.kept, checkpoints.place_bytes) {
        (Some(kept), Some(bytes)) => format!("{kept} at most, {} with the one that is being written", size(bytes)),
        _ => unknown(),
    };
    let mut facts = vec![
        ("recipe", format!("{}, hash {}", plan.name, plan.hash)),
        ("ranks", format!("{} on {}", grouped(plan.workers.into()), counted(plan.nodes.into(), "node"))),
        ("parameters", grouped(plan.parameters)),
        ("steps", plan.steps.map_or_else(unknown, grouped)),
        ("examples of a step", grouped(plan.examples_per_step.into())),
        ("tokens of a step", format!("{bound} {}", grouped(plan.tokens.per_step))),
        ("tokens", plan.tokens.total.map_or_else(unknown, |total| format!("{bound} {}", grouped(total)))),
        ("epochs", plan.epochs.map_or_else(unknown, |epochs| format!("{epochs:.2}"))),
        ("checkpoint", format!("{} in {} files", size(checkpoints.bytes), grouped(checkpoints.files))),
        ("checkpoints kept", kept),
    ];
    if checkpoints.cache_bytes > 0 {
        facts.push(("checkpoint cache", format!("{} on a local disk", size(checkpoints.cache_bytes))));
    }
    facts.push(("prepared data", data(plan)));
    facts.push(("time", time(plan)));
    facts
}

fn data(plan: &RunPlan) -> String {
    let data = &plan.data;
    match (data.prepared_bytes, data.preparation_bytes) {
        (Some(bytes), _) if data.is_prepared => size(bytes),
        (Some(bytes), Some(meanwhile)) => format!("at most about {}, and {} while it is prepared", size(bytes), size(meanwhile)),
        _ => "not known".to_owned(),
    }
}

fn time(plan: &RunPlan) -> String {
    let Some(time) = &plan.time else { return "not known: measure with `cloze bench RECIPE`".to_owned() };
    let rate = grouped(time.worker_tokens_per_second.round() as u64);
    let jobs = time.jobs.map_or_else(String::new, |jobs| format!(", in {}", counted(jobs, "job")));
    format!("{} at {rate} tokens a second and worker{jobs}", duration(time.seconds))
}

fn all_trials(sweep: &SweepPlan) -> Vec<(&'static str, String)> {
    let unknown = || "not known".to_owned();
    vec![
        ("trials", format!("{}, {} at a time", grouped(sweep.trials), grouped(sweep.concurrency.into()))),
        ("workers at a time", grouped(sweep.workers)),
        ("tokens", sweep.tokens.map_or_else(unknown, grouped)),
        ("checkpoints", sweep.place_bytes.map_or_else(unknown, size)),
        ("time", sweep.seconds.map_or_else(unknown, duration)),
        ("time of all workers", sweep.worker_seconds.map_or_else(unknown, duration)),
    ]
}

fn memory(plan: &RunPlan) -> Table {
    let mut table = Table::new();
    let holder = if plan.memory.on_gpu { "memory of a GPU" } else { "memory of a worker" };
    table.load_style(presets::ASCII_MARKDOWN).set_header([holder, "MiB"]);
    for part in &plan.memory.parts {
        table.add_row([part.name.clone(), mebibytes(part.bytes)]);
    }
    let total = if plan.memory.on_gpu { "total, less the copy in host memory" } else { "total" };
    table.add_row([total.to_owned(), mebibytes(plan.memory.total_bytes)]);
    if let Some(bytes) = plan.memory.available_bytes {
        table.add_row(["there is".to_owned(), mebibytes(bytes)]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn counted(number: u64, what: &str) -> String {
    format!("{} {what}{}", grouped(number), if number == 1 { "" } else { "s" })
}

fn size(bytes: u64) -> String {
    format!("{} MiB", mebibytes(bytes))
}

/// Rounded up, so that what needs memory never shows as zero.
fn mebibytes(bytes: u64) -> String {
    grouped(bytes.div_ceil(1 << 20))
}

/// A number with its digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use cloze_launcher::plan::run_plan::MemoryPart;
    use cloze_launcher::plan::{CheckpointPlan, DataPlan, MemoryUse, TimePlan, TokenPlan};
    use cloze_recipes::failure::{Failure, FailureKind};

    use super::*;

    #[test]
    fn digits_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1 000"), (12_345_678, "12 345 678")] {
            assert_eq!(grouped(number), text);
        }
    }

    fn plan() -> RunPlan {
        let parts = [("parameters", 4 << 20), ("activations", 1)].map(|(name, bytes)| MemoryPart { name: name.to_owned(), bytes });
        RunPlan {
            name: "base".to_owned(),
            hash: "abc".to_owned(),
            nodes: 2,
            workers: 16,
            parameters: 149_014_272,
            steps: Some(1000),
            examples_per_step: 256,
            tokens: TokenPlan { per_step: 32_000, is_upper_bound: false, total: Some(32_000_000) },
            epochs: Some(1.5),
            memory: MemoryUse { on_gpu: false, parts: parts.into(), total_bytes: (4 << 20) + 1, available_bytes: Some(8 << 20) },
            checkpoints: CheckpointPlan {
                bytes: 1 << 30,
                files: 36,
                saves: Some(4),
                kept: Some(3),
                place_bytes: Some(4 << 30),
                cache_bytes: 0,
            },
            data: DataPlan { is_prepared: true, source_bytes: None, prepared_bytes: Some(5 << 20), preparation_bytes: None },
            time: Some(TimePlan { worker_tokens_per_second: 1000.0, seconds: 2000.0, jobs: Some(1) }),
            sweep: Some(SweepPlan {
                trials: 6,
                concurrency: 2,
                workers: 32,
                tokens: Some(192_000_000),
                place_bytes: Some(24 << 30),
                seconds: Some(6000.0),
                worker_seconds: None,
                stops_early: false,
            }),
        }
    }

    #[test]
    fn the_plan_is_read_at_a_glance() {
        let failure = Failure::new(FailureKind::Recipe, "too few").hint("more");
        let checks = vec![Check::ok("model", "new"), Check::warn("data", "not yet", "do it"), Check::fail("hosts", &failure)];
        let printed =
            Printed { ok: false, plan: Some(plan()), checks, script: Some("#!/bin/bash\nexec x\n".to_owned()), script_of: "the first job" };
        let expected = "\
recipe: base, hash abc
ranks: 16 on 2 nodes
parameters: 149 014 272
steps: 1 000
examples of a step: 256
tokens of a step: about 32 000
tokens: about 32 000 000
epochs: 1.50
checkpoint: 1 024 MiB in 36 files
checkpoints kept: 3 at most, 4 096 MiB with the one that is being written
prepared data: 5 MiB
time: 33 min 20 s at 1 000 tokens a second and worker, in 1 job

| memory of a worker | MiB |
|--------------------|-----|
| parameters         |   4 |
| activations        |   1 |
| total              |   5 |
| there is           |   8 |

all trials of the sweep
trials: 6, 2 at a time
workers at a time: 32
tokens: 192 000 000
checkpoints: 24 576 MiB
time: 1 h 40 min
time of all workers: not known

batch script of the first job

#!/bin/bash
exec x

OK    model: new
WARN  data: not yet
      hint: do it
FAIL  hosts: too few
      hint: more
";
        assert_eq!(text(&printed), expected);
    }
}
