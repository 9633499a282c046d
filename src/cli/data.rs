//! `cloze data`: prepare, inspect, verify, synth.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use cloze_data::batch::BatchSpec;
use cloze_data::dataset::Dataset;
use cloze_data::inspect::{Inspection, inspect as write_inspection};
use cloze_data::manifest::Manifest;
use cloze_data::mask::TokenFacts;
use cloze_data::prepare::{PrepareOptions, PrepareOutcome, ProgressLine, check_prepared, prepare as prepare_data};
use cloze_data::synth::{SynthOptions, synth as write_corpus};
use cloze_data::tokenizer::Tokenizer;

use super::arguments::{InspectArguments, PrepareArguments, RecipeArguments, SynthArguments};

/// Prepares a recipe's data; says what was kept and why the rest was not.
pub fn prepare(arguments: &PrepareArguments) -> Result<ExitCode> {
    let recipe = arguments.recipe.load()?;
    let mut stderr = std::io::stderr();
    let rewrites = stderr.is_terminal();
    let mut progress = |line: ProgressLine| {
        // Progress that cannot be shown is no reason to stop preparing.
        let _ = if rewrites { write!(stderr, "\r\x1b[2K{line}") } else { writeln!(stderr, "{line}") };
    };
    let outcome = prepare_data(&recipe, &PrepareOptions { force: arguments.force }, &mut progress)?;
    let (verb, manifest) = match &outcome {
        PrepareOutcome::Prepared(manifest) => ("prepared", manifest),
        PrepareOutcome::UpToDate(manifest) => ("already prepared, nothing to do", manifest),
    };
    let start = if rewrites { "\r\x1b[2K" } else { "" };
    writeln!(std::io::stderr(), "{start}{verb}: {}\n{}", recipe.data.output.display(), summary(manifest))
        .context("report the preparation")?;
    Ok(ExitCode::SUCCESS)
}

/// Shows samples as the model will see them.
pub fn inspect(arguments: &InspectArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let recipe = arguments.recipe.load()?;
    let dataset = Dataset::open(&recipe.data.output)?;
    check_prepared(&recipe, dataset.manifest())?;
    let (tokenizer, anchor_id) = Tokenizer::load_with_anchor(&recipe.model.tokenizer, &recipe.model.anchor_token)?;
    let facts = TokenFacts::of(&tokenizer, anchor_id);
    let spec = BatchSpec::new(&recipe, facts, &dataset);
    write_inspection(&dataset, &tokenizer, &Inspection { spec: &spec, step: arguments.step, count: arguments.count }, stdout)?;
    Ok(ExitCode::SUCCESS)
}

/// Hashes every shard.
pub fn verify(arguments: &RecipeArguments) -> Result<ExitCode> {
    let recipe = arguments.load()?;
    let dataset = Dataset::open(&recipe.data.output)?;
    dataset.verify()?;
    let text = format!("{}: {} samples agree with the manifest", recipe.data.output.display(), dataset.num_samples());
    writeln!(std::io::stderr(), "{text}").context("report the check")?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the generated corpus.
pub fn synth(arguments: &SynthArguments) -> Result<ExitCode> {
    let report = write_corpus(&arguments.output, &SynthOptions { seed: arguments.seed, examples: arguments.examples })?;
    writeln!(
        std::io::stderr(),
        "wrote {} records of {} tasks ({} of held-out templates) and {} evaluation rows to {}",
        report.examples,
        report.tasks,
        report.held_out_examples,
        report.evaluation_rows,
        arguments.output.display()
    )
    .context("report the corpus")?;
    Ok(ExitCode::SUCCESS)
}

/// What happened to the records, one line a stage.
fn summary(manifest: &Manifest) -> String {
    let counts = &manifest.counts;
    let cap = manifest.cap_per_task.map_or_else(|| "no cap per task".to_owned(), |cap| format!("at most {cap} per task"));
    let lines = [
        (counts.read, "records read".to_owned()),
        (counts.held_out, "of held-out tasks".to_owned()),
        (counts.held_out_template, "of held-out templates".to_owned()),
        (counts.not_single_token, "whose answer is not one token".to_owned()),
        (counts.too_long, "too long".to_owned()),
        (counts.capped, format!("left out by number ({cap})")),
        (
            counts.kept,
            format!("samples kept, {} tokens, {} tasks, {} shards", manifest.tokens, manifest.tasks.len(), manifest.shards.len()),
        ),
    ];
    let text: String = lines.iter().map(|(count, what)| format!("{count:>12}  {what}\n")).collect();
    let shortfall = if manifest.shortfall > 0 { format!("{:>12}  fewer than wanted\n", manifest.shortfall) } else { String::new() };
    text + &shortfall
}
