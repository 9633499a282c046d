//! `cloze bench`: how many tokens one worker trains on in a second, by a recipe or by a file of tokens.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::raw::Preset;

use super::arguments::{BenchArguments, ChangeArguments, DeviceName, PlacementArguments, PresetName};
use super::run::{check_inputs, write_last_line};
use super::worker_process::{placement, run, run_with_input};

/// Tokens of a step of a workload file, at most, where nobody says it.
const WORKLOAD_BATCH_TOKENS: u64 = 4096;

/// Times steps, and prints the figures as one JSON line.
pub fn bench(arguments: &BenchArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    match (&arguments.recipe, &arguments.workload) {
        (Some(recipe), _) => bench_recipe(recipe, arguments, stdout),
        (None, Some(workload)) => bench_workload(workload, arguments),
        (None, None) => unreachable!("the command line has one of them"),
    }
}

/// Steps of a recipe as it stands, on its prepared data.
fn bench_recipe(file: &Path, arguments: &BenchArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let is_placed = arguments.device.is_some() || arguments.bfloat16;
    if is_placed || arguments.model.is_some() || arguments.batch_tokens.is_some() || arguments.threads.is_some() {
        return Err(Failure::new(FailureKind::Recipe, "a recipe says itself what it computes, and on what")
            .found("`--model`, `--batch-tokens`, `--threads`, `--device` or `--bfloat16`, which belong to `--workload`")
            .hint("`--set` changes a recipe: `--set train.device=cuda --set train.precision=bfloat16`")
            .into());
    }
    let recipe = arguments.changes.load(file)?;
    check_inputs(&recipe)?;
    let mut worker = vec![OsString::from("bench-recipe")];
    worker.extend(numbers(&[
        ("--workers", arguments.workers.into()),
        ("--steps", arguments.steps),
        ("--warmup-steps", arguments.warmup_steps),
    ]));
    let (code, line) = run_with_input(&worker, &recipe.to_yaml())?;
    stdout.write_all(line.as_bytes()).context("print the figures")?;
    let speed = serde_json::from_str::<serde_json::Value>(&line).ok().and_then(|figures| figures["tokens_per_s"].as_f64());
    if let Some(speed) = speed {
        let plan = plan_command(file, arguments, speed);
        let hint = format!("for the expected time: `{plan}`, or `tokens_per_second: {speed}` in the cluster file");
        write_last_line(&mut std::io::stderr(), &hint)?;
    }
    Ok(code)
}

/// The plan of the very run that was timed.
fn plan_command(file: &Path, arguments: &BenchArguments, speed: f64) -> String {
    let ChangeArguments { profile, overrides } = &arguments.changes;
    let profile = profile.iter().map(|profile| format!(" --profile {profile}"));
    let overrides = overrides.iter().map(|change| format!(" --set '{change}'"));
    let changes: String = profile.chain(overrides).collect();
    format!("cloze plan {}{changes} --workers {} --tokens-per-second {speed}", file.display(), arguments.workers)
}

/// A file of tokens, which any trainer can be timed on.
fn bench_workload(workload: &Path, arguments: &BenchArguments) -> Result<ExitCode> {
    if !arguments.changes.overrides.is_empty() || arguments.changes.profile.is_some() {
        let failure = Failure::new(FailureKind::Recipe, "`--set` and `--profile` change a recipe, and `--workload` has none");
        return Err(failure.hint("`--model`, `--batch-tokens`, `--threads`, `--device` and `--bfloat16` say how it is replayed").into());
    }
    let preset = match arguments.model.unwrap_or(PresetName::Tiny) {
        PresetName::Tiny => Preset::Tiny,
        PresetName::Small => Preset::Small,
        PresetName::Base => Preset::Base,
        PresetName::Large => Preset::Large,
    };
    let mut worker = vec![OsString::from("bench"), workload.into()];
    worker.extend(["--shape".into(), serde_json::to_string(&preset.shape()).context("write the shape")?.into()]);
    worker.extend(numbers(&[
        ("--batch-tokens", arguments.batch_tokens.unwrap_or(WORKLOAD_BATCH_TOKENS)),
        ("--steps", arguments.steps),
        ("--warmup-steps", arguments.warmup_steps),
        ("--threads", arguments.threads.unwrap_or(0).into()),
    ]));
    let device = arguments.device.unwrap_or(DeviceName::Cpu);
    worker.extend(placement(&PlacementArguments { device, bfloat16: arguments.bfloat16 }));
    run(worker)
}

fn numbers(flags: &[(&str, u64)]) -> Vec<OsString> {
    flags.iter().flat_map(|(flag, number)| [(*flag).into(), number.to_string().into()]).collect()
}
