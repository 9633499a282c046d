//! `cloze bench`: how many tokens one worker trains on in a second, by a recipe or by a file of tokens.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::raw::Preset;
use cloze_recipes::recipe::Recipe;

use super::arguments::{BenchArguments, DeviceName, PresetName};
use super::run::{check_inputs, write_last_line};
use super::worker_process::{placement, run, run_for_output};

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
    let is_foreign = arguments.placement.bfloat16 || matches!(arguments.placement.device, DeviceName::Cuda);
    if is_foreign || arguments.model.is_some() || arguments.batch_tokens.is_some() || arguments.threads.is_some() {
        return Err(Failure::new(FailureKind::Recipe, "a recipe says itself what it computes, and on what")
            .found("`--model`, `--batch-tokens`, `--threads`, `--device` or `--bfloat16`, which belong to `--workload`")
            .hint("`--set` changes a recipe: `--set train.device=cuda --set train.precision=bfloat16`")
            .into());
    }
    let recipe = arguments.changes.load(file)?;
    check_inputs(&recipe)?;
    let checked = CheckedRecipe::write(&recipe)?;
    let mut worker = vec![OsString::from("bench-recipe"), checked.0.clone().into()];
    worker.extend(numbers(&[
        ("--workers", arguments.workers.into()),
        ("--steps", arguments.steps),
        ("--warmup-steps", arguments.warmup_steps),
    ]));
    let (code, line) = run_for_output(&worker)?;
    stdout.write_all(line.as_bytes()).context("print the figures")?;
    let speed = serde_json::from_str::<serde_json::Value>(&line).ok().and_then(|figures| figures["tokens_per_s"].as_f64());
    if let Some(speed) = speed {
        let shown = file.display();
        let hint = format!(
            "for the expected time: `cloze plan {shown} --tokens-per-second {speed}`, or `tokens_per_second: {speed}` in the cluster file"
        );
        write_last_line(&mut std::io::stderr(), &hint)?;
    }
    Ok(code)
}

/// A checked recipe, as a run folder would hold it, in a file that goes with this value.
struct CheckedRecipe(PathBuf);

impl CheckedRecipe {
    fn write(recipe: &Recipe) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("cloze-bench-{}.yaml", std::process::id()));
        let written = File::create_new(&path).and_then(|mut file| file.write_all(recipe.to_yaml().as_bytes()));
        written.map_err(|error| {
            Failure::new(FailureKind::Storage, "the checked recipe cannot be written for the worker").at(path.display()).because(error)
        })?;
        Ok(Self(path))
    }
}

impl Drop for CheckedRecipe {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a temporary file stays behind");
        }
    }
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
    worker.extend(placement(&arguments.placement));
    run(worker)
}

fn numbers(flags: &[(&str, u64)]) -> Vec<OsString> {
    flags.iter().flat_map(|(flag, number)| [(*flag).into(), number.to_string().into()]).collect()
}
