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
use cloze_launcher::words::counted;

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

/// What there is of the samples that were kept. Tasks of which nothing was kept are counted as seen, since there may be many of them.
fn kept_text(manifest: &Manifest) -> String {
    let Manifest { tokens, tasks, shards, .. } = manifest;
    let with_samples = tasks.iter().filter(|task| task.counts.kept > 0).count();
    let of_seen = counted(tasks.len(), "task");
    format!("samples kept, {tokens} tokens, of {with_samples} of {of_seen}, in {}", counted(shards.len(), "shard"))
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
        (counts.kept, kept_text(manifest)),
    ];
    let text: String = lines.iter().map(|(count, what)| format!("{count:>12}  {what}\n")).collect();
    let shortfall = if manifest.shortfall > 0 { format!("{:>12}  fewer than wanted\n", manifest.shortfall) } else { String::new() };
    text + &shortfall
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cloze_data::manifest::{Counts, MANIFEST_VERSION, ShardEntry, TaskEntry};

    use super::*;

    #[test]
    fn tasks_that_kept_nothing_are_told_apart() {
        let task = |name: &str, kept| TaskEntry {
            name: name.to_owned(),
            source: None,
            counts: Counts { read: 4, held_out: 4 - kept, kept, ..Counts::default() },
        };
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            recipe_hash: String::new(),
            settings: BTreeMap::new(),
            tokenizer_fingerprint: String::new(),
            inputs: Vec::new(),
            counts: Counts { read: 12, held_out: 9, kept: 3, ..Counts::default() },
            cap_per_task: None,
            shortfall: 0,
            tasks: vec![task("a", 3), task("b", 0), task("c", 0)],
            samples: 3,
            tokens: 50,
            shards: vec![ShardEntry { file: "s".to_owned(), samples: 3, tokens: 50, bytes: 9, blake3: String::new() }],
        };
        let text = summary(&manifest);
        assert!(text.ends_with("           3  samples kept, 50 tokens, of 1 of 3 tasks, in 1 shard\n"), "{text}");
    }
}
