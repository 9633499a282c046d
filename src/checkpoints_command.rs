//! `cloze checkpoints`: looks at, verifies, compares, deletes and exports checkpoints, of a run or anywhere.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use cloze_recipes::failure::{Failure, FailureKind};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::checkpoint::{
    CheckpointState, CheckpointStore, Difference, Loaded, MIN_KEPT_GOOD, Overview, StorePolicy, Verification, difference, step_of_folder,
};
use crate::export::write_folder;
use crate::worker::{checkpoint_url, store_policy};

/// What to do.
#[derive(Debug, Subcommand)]
pub enum CheckpointsCommand {
    /// List checkpoints.
    Ls(LookArguments),
    /// Compare every file with its manifest.
    Verify(LookArguments),
    /// Compare two checkpoints.
    Diff(DiffArguments),
    /// Delete what is no longer needed.
    Prune(PruneArguments),
    /// Write a model folder.
    Export(ExportArguments),
}

/// Which checkpoints to look at.
#[derive(Args, Debug)]
pub struct LookArguments {
    target: String,
    #[arg(long)]
    json: bool,
    #[arg(long = "option")]
    options: Vec<String>,
}

/// Which checkpoints to compare.
#[derive(Args, Debug)]
pub struct DiffArguments {
    first: String,
    second: String,
    #[arg(long)]
    json: bool,
    #[arg(long = "option")]
    options: Vec<String>,
}

/// What to keep.
#[derive(Args, Debug)]
pub struct PruneArguments {
    target: String,
    #[arg(long)]
    keep_last: Option<u32>,
    #[arg(long)]
    keep_best: Option<u32>,
    #[arg(long)]
    keep_every_steps: Option<u64>,
    #[arg(long)]
    dry_run: bool,
    #[arg(long = "option")]
    options: Vec<String>,
}

/// Which checkpoint to write, and where to.
#[derive(Args, Debug)]
pub struct ExportArguments {
    target: String,
    #[arg(long)]
    output: PathBuf,
    #[arg(long = "option")]
    options: Vec<String>,
}

/// Does it; data go to stdout.
pub fn run(command: CheckpointsCommand) -> Result<()> {
    run_to(command, &mut std::io::stdout().lock())
}

fn run_to(command: CheckpointsCommand, out: &mut dyn Write) -> Result<()> {
    match command {
        CheckpointsCommand::Ls(arguments) => list(&arguments, out),
        CheckpointsCommand::Verify(arguments) => verify(&arguments, out),
        CheckpointsCommand::Diff(arguments) => diff(&arguments, out),
        CheckpointsCommand::Prune(arguments) => prune(&arguments, out),
        CheckpointsCommand::Export(arguments) => export(&arguments),
    }
}

fn list(arguments: &LookArguments, out: &mut dyn Write) -> Result<()> {
    let place = Place::open(&arguments.target, &arguments.options, None)?;
    let mut overviews = place.store.overview()?;
    if let Some(step) = place.step {
        overviews.retain(|overview| overview.step == step);
    }
    if overviews.is_empty() {
        return Err(place.nothing_there().into());
    }
    if arguments.json {
        return write_json(&overviews, out);
    }
    let mut table = table(&["step", "kind", "files", "size", "workers", "shard", "loss", "state"]);
    for overview in &overviews {
        table.add_row(overview_row(overview));
    }
    for index in [0, 2, 3, 4, 6] {
        align_right(&mut table, index);
    }
    writeln!(out, "{table}").context("print the checkpoints")
}

fn overview_row(overview: &Overview) -> [String; 8] {
    let Overview { step, num_files, bytes, manifest, reason } = overview;
    let state = manifest.as_ref().map(|manifest| &manifest.state);
    let of_state = |text: &dyn Fn(&CheckpointState) -> String| state.map_or_else(|| "-".to_owned(), text);
    [
        step.to_string(),
        of_state(&|state| String::from(if state.temporary { "temporary" } else { "permanent" })),
        num_files.to_string(),
        size_text(*bytes),
        of_state(&|state| state.world_size.to_string()),
        of_state(&|state| state.shard.clone()),
        of_state(&|state| state.loss.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.4}"))),
        reason.as_ref().map_or_else(|| "complete".to_owned(), |reason| format!("incomplete: {reason}")),
    ]
}

fn verify(arguments: &LookArguments, out: &mut dyn Write) -> Result<()> {
    let place = Place::open(&arguments.target, &arguments.options, None)?;
    let mut reports = Vec::new();
    let mut unfinished = Vec::new();
    for listed in place.store.list()? {
        match place.step {
            Some(step) if step != listed.step => {}
            // Without a manifest there is no checkpoint that could be damaged; asked for by name, it is missed.
            None if !listed.has_manifest() => unfinished.push(listed.step),
            _ => reports.push(place.store.verify(listed.step)?),
        }
    }
    if reports.is_empty() {
        return Err(place.nothing_there().into());
    }
    if arguments.json {
        write_json(&reports, out)?;
    } else {
        writeln!(out, "{}", verification_table(&reports)).context("print the verification")?;
    }
    for step in unfinished {
        let text = format!("{}: without a manifest, so no checkpoint", place.store.step_url(step));
        writeln!(std::io::stderr(), "{text}").context("report an unfinished save")?;
    }
    let damaged: Vec<String> = reports.iter().filter(|report| !report.is_good()).map(|report| place.store.step_url(report.step)).collect();
    if damaged.is_empty() {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Damaged, format!("{} of {} checkpoints are damaged", damaged.len(), reports.len()))
        .at(damaged.join(", "))
        .hint("a run passes damaged checkpoints over and goes on from the newest good one")
        .into())
}

fn verification_table(reports: &[Verification]) -> Table {
    let mut table = table(&["step", "file", "size", "state"]);
    for report in reports {
        if let Some(problem) = &report.problem {
            table.add_row([report.step.to_string(), String::new(), String::new(), problem.clone()]);
        }
        for file in &report.files {
            let state = file.problem.clone().unwrap_or_else(|| "good".to_owned());
            table.add_row([report.step.to_string(), file.name.clone(), size_text(file.size), state]);
        }
    }
    align_right(&mut table, 0);
    align_right(&mut table, 2);
    table
}

fn diff(arguments: &DiffArguments, out: &mut dyn Write) -> Result<()> {
    let first = Place::open(&arguments.first, &arguments.options, None)?.load()?;
    let second = Place::open(&arguments.second, &arguments.options, None)?.load()?;
    let found = difference(&first, &second);
    if arguments.json {
        return write_json(&found, out);
    }
    writeln!(out, "{}", difference_text(&found)).context("print the differences")
}

fn difference_text(found: &Difference) -> String {
    let mut lines = Vec::new();
    lines.extend(found.fields.iter().map(|field| format!("{}: {} and {}", field.name, field.first, field.second)));
    lines.extend(found.tensors.iter().map(|tensor| format!("{}: {}", tensor.name, tensor.kind)));
    lines.push(if found.has_equal_tensors() {
        format!("all {} tensors are equal", found.num_equal)
    } else {
        format!("{} tensors differ, {} are equal", found.tensors.len(), found.num_equal)
    });
    lines.join("\n")
}

fn prune(arguments: &PruneArguments, out: &mut dyn Write) -> Result<()> {
    let place = Place::open(&arguments.target, &arguments.options, Some(arguments))?;
    let verdicts = place.store.prune_now(arguments.dry_run, place.recipe_hash.as_deref())?;
    if verdicts.is_empty() {
        return Err(place.nothing_there().into());
    }
    for (step, verdict) in &verdicts {
        let would_be = if arguments.dry_run && verdict.is_deletion() { "would be " } else { "" };
        writeln!(out, "{}: {would_be}{verdict}", place.store.step_url(*step)).context("print what was deleted")?;
    }
    if let Some(note) = note_of(arguments.keep_last) {
        writeln!(std::io::stderr(), "{note}").context("report what is kept")?;
    }
    let num_deleted = verdicts.iter().filter(|(_, verdict)| verdict.is_deletion()).count();
    let verb = if arguments.dry_run { "would be deleted" } else { "deleted" };
    writeln!(std::io::stderr(), "{num_deleted} of {} {verb}", verdicts.len()).context("report the deletion")
}

/// Says that more is kept than was asked for.
fn note_of(keep_last: Option<u32>) -> Option<String> {
    let few = keep_last.filter(|&keep_last| (keep_last as usize) < MIN_KEPT_GOOD)?;
    Some(format!("note: the {MIN_KEPT_GOOD} newest are kept, not {few}: a damaged newest checkpoint must have a predecessor"))
}

fn export(arguments: &ExportArguments) -> Result<()> {
    crate::export::check_is_free(&arguments.output)?;
    let place = Place::open(&arguments.target, &arguments.options, None)?;
    let loaded = place.load()?;
    write_folder(&arguments.output, &loaded.model, &place.store.companions(loaded.state.step)?)?;
    writeln!(std::io::stderr(), "exported {} to {}", loaded.url, arguments.output.display()).context("report the export")
}

/// Where checkpoints are, and which one is meant.
struct Place {
    store: CheckpointStore,
    step: Option<u64>,
    /// Hash of the run's recipe, where a run folder was named.
    recipe_hash: Option<String>,
}

impl Place {
    /// Opens what the user named: a run folder, whose recipe knows more, or a path or url. `wanted` changes what is kept.
    fn open(target: &str, options: &[String], wanted: Option<&PruneArguments>) -> Result<Self> {
        let (target, step) = split_step(target);
        let given = parse_options(options)?;
        let recipe_file = Path::new(target).join("recipe.yaml");
        let mut recipe_hash = None;
        let (url, mut options, policy) = if recipe_file.is_file() {
            let recipe = cloze_recipes::load(&recipe_file, &[])?;
            let policy = store_policy(&recipe);
            recipe_hash = Some(recipe.hash());
            (checkpoint_url(&recipe, Path::new(target)), recipe.checkpoint.options, policy)
        } else {
            let has_policy = wanted.is_none_or(|wanted| wanted.keep_last.is_some());
            if !has_policy {
                return Err(Failure::new(FailureKind::Recipe, "no recipe says how many checkpoints are kept")
                    .at(target)
                    .hint("name a run folder, or give `--keep-last`")
                    .into());
            }
            (target.to_owned(), BTreeMap::new(), StorePolicy::default())
        };
        options.extend(given);
        Ok(Self { store: CheckpointStore::open(&url, &options, policy_of(&policy, wanted))?, step, recipe_hash })
    }

    /// The checkpoint that was named, or the newest good one.
    fn load(&self) -> Result<Loaded> {
        if let Some(step) = self.step {
            return self.store.load_step(step);
        }
        let loaded = self.store.latest_good()?.ok_or_else(|| self.nothing_there())?;
        for skipped in &loaded.skipped {
            tracing::warn!(checkpoint = skipped, "damaged checkpoint passed over");
        }
        Ok(loaded)
    }

    fn nothing_there(&self) -> Failure {
        let what = self.step.map_or_else(|| "no checkpoint here".to_owned(), |step| format!("no checkpoint of step {step} here"));
        let hint = "name a run folder, or the path or url that holds `step-…` folders";
        Failure::new(FailureKind::Input, what).at(self.store.url()).hint(hint)
    }
}

/// What is kept: the flags go before the recipe. Nothing is cached for a look at checkpoints.
fn policy_of(recipe: &StorePolicy, wanted: Option<&PruneArguments>) -> StorePolicy {
    let recipe = StorePolicy { cache: None, ..recipe.clone() };
    let Some(wanted) = wanted else { return recipe };
    StorePolicy {
        keep_last: wanted.keep_last.unwrap_or(recipe.keep_last),
        keep_best: wanted.keep_best.unwrap_or(recipe.keep_best),
        keep_every_steps: wanted.keep_every_steps.or(recipe.keep_every_steps),
        ..recipe
    }
}

/// Takes the step off a name: `TARGET@STEP`, or the folder of a checkpoint itself.
fn split_step(target: &str) -> (&str, Option<u64>) {
    let trimmed = target.trim_end_matches('/');
    let by_sign = trimmed.rsplit_once('@').and_then(|(target, step)| Some((target, step.parse().ok()?)));
    let by_folder = trimmed.rsplit_once('/').and_then(|(target, name)| Some((target, step_of_folder(name)?)));
    match by_sign.or(by_folder) {
        Some((target, step)) if !target.is_empty() => (target, Some(step)),
        _ => (target, None),
    }
}

fn parse_options(options: &[String]) -> Result<BTreeMap<String, String>, Failure> {
    let parse = |option: &String| {
        let (name, value) = option.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(|| {
            Failure::new(FailureKind::Recipe, "not an option of an object store").expected("`--option KEY=VALUE`").found(option)
        })?;
        Ok((name.to_owned(), value.to_owned()))
    };
    options.iter().map(parse).collect()
}

fn write_json<T: Serialize>(value: &T, out: &mut dyn Write) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("write JSON")?;
    writeln!(out, "{text}").context("print JSON")
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(header.iter().copied());
    table
}

fn align_right(table: &mut Table, index: usize) {
    if let Some(column) = table.column_iter_mut().nth(index) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

/// A size for people: three digits and a unit of powers of 1024.
fn size_text(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{size:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use bytes::Bytes;
    use tempfile::TempDir;

    use crate::checkpoint::{Piece, Share};

    use super::*;

    /// A folder with checkpoints of these steps; the weight is the step.
    fn checkpoints(steps: &[u64]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), steps, "r");
        folder
    }

    /// Saves checkpoints of a recipe.
    fn save(folder: &Path, steps: &[u64], recipe_hash: &str) {
        let policy = StorePolicy { keep_last: 9, ..StorePolicy::default() };
        let store = CheckpointStore::open(&folder.display().to_string(), &BTreeMap::new(), policy).unwrap();
        for step in steps {
            let data = Bytes::copy_from_slice(&(*step as f32).to_le_bytes());
            let share = Share {
                rank: 0,
                world_size: 1,
                model: vec![Piece { name: "w".to_owned(), full_shape: vec![1], start: 0, data }],
                optimizer: Vec::new(),
                companions: vec![("config.json".to_owned(), Bytes::from_static(b"{}"))],
            };
            let state = CheckpointState {
                step: *step,
                recipe_hash: recipe_hash.to_owned(),
                data_fingerprint: "d".to_owned(),
                world_size: 1,
                adam_step: *step,
                loss: Some(0.5),
                temporary: step % 2 == 1,
                shard: "none".to_owned(),
            };
            store.commit(&state, store.save_share(*step, &share).unwrap()).unwrap();
        }
    }

    #[derive(clap::Parser)]
    struct Line {
        #[command(subcommand)]
        command: CheckpointsCommand,
    }

    fn run_line(words: &[&str]) -> Result<String> {
        let line = <Line as clap::Parser>::try_parse_from(std::iter::once("checkpoints").chain(words.iter().copied())).unwrap();
        let mut out = Vec::new();
        run_to(line.command, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn failure(words: &[&str]) -> Failure {
        run_line(words).unwrap_err().downcast().unwrap()
    }

    #[test]
    fn targets_name_a_place_and_a_step() {
        let cases = [
            ("runs/a", ("runs/a", None)),
            ("runs/a@17", ("runs/a", Some(17))),
            ("s3://bucket/a/step-000000000017/", ("s3://bucket/a", Some(17))),
            ("/data/step-000000000017", ("/data", Some(17))),
            ("me@host/a", ("me@host/a", None)),
            ("@17", ("@17", None)),
            ("runs/step-17", ("runs/step-17", None)),
        ];
        for (target, expected) in cases {
            assert_eq!(split_step(target), expected);
        }
        assert!(parse_options(&["a=b=c".to_owned()]).unwrap()["a"] == "b=c");
        assert!(parse_options(&["=b".to_owned()]).is_err() && parse_options(&["b".to_owned()]).is_err());
    }

    #[test]
    fn checkpoints_are_listed() {
        let folder = checkpoints(&[1, 2]);
        let url = folder.path().to_str().unwrap();
        fs::create_dir(folder.path().join("step-000000000003")).unwrap();
        fs::write(folder.path().join("step-000000000003/model.safetensors"), "half").unwrap();
        let text = run_line(&["ls", url]).unwrap();
        for words in ["temporary", "permanent", "0.5000", "complete", "incomplete: manifest.json is missing"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        let json: serde_json::Value = serde_json::from_str(&run_line(&["ls", url, "--json"]).unwrap()).unwrap();
        assert_eq!((json[1]["step"].as_u64(), json[1]["manifest"]["state"]["temporary"].as_bool()), (Some(2), Some(false)));
        assert_eq!(failure(&["ls", "/no/such/place"]).kind, FailureKind::Input);
    }

    #[test]
    fn damage_is_found_and_has_its_exit_code() {
        let folder = checkpoints(&[1, 2]);
        let url = folder.path().to_str().unwrap();
        assert!(run_line(&["verify", url]).unwrap().contains("good"));
        fs::create_dir(folder.path().join("step-000000000003")).unwrap();
        fs::write(folder.path().join("step-000000000003/model.safetensors"), "half").unwrap();
        run_line(&["verify", url]).unwrap();
        let path = folder.path().join("step-000000000001/model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path, bytes).unwrap();
        let found = failure(&["verify", url]);
        assert_eq!((found.kind.exit_code(), found.what.as_str()), (7, "1 of 2 checkpoints are damaged"));
        run_line(&["verify", &format!("{url}@2")]).unwrap();
        assert_eq!(failure(&["verify", &format!("{url}@3")]).kind, FailureKind::Damaged);
        assert_eq!(failure(&["verify", &format!("{url}@4")]).kind, FailureKind::Input);
    }

    #[test]
    fn two_checkpoints_are_compared() {
        let folder = checkpoints(&[1, 2]);
        let url = folder.path().to_str().unwrap();
        let text = run_line(&["diff", &format!("{url}@1"), url]).unwrap();
        for words in ["step: 1 and 2", "w: 1 of 1 values differ by up to 1", "1 tensors differ"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert_eq!(run_line(&["diff", url, &format!("{url}/step-000000000002")]).unwrap(), "all 1 tensors are equal\n");
        let json: serde_json::Value = serde_json::from_str(&run_line(&["diff", "--json", url, &format!("{url}@1")]).unwrap()).unwrap();
        assert_eq!(json["tensors"][0]["kind"]["values"]["max_absolute"].as_f64(), Some(1.0));
    }

    #[test]
    fn flags_say_what_is_kept() {
        let folder = checkpoints(&[1, 2, 3, 4, 5]);
        let url = folder.path().to_str().unwrap();
        assert_eq!(failure(&["prune", url]).kind, FailureKind::Recipe);
        let flags = ["prune", url, "--keep-last", "2", "--keep-every-steps", "2"];
        let dry = run_line(&[flags.as_slice(), &["--dry-run"]].concat()).unwrap();
        assert!(folder.path().join("step-000000000001").exists());
        assert_eq!(run_line(&flags).unwrap(), dry.replace("would be deleted", "deleted"));
        assert_eq!(dry.matches("would be deleted: no longer needed").count(), 2);
        let left: Vec<bool> = (1..=5).map(|step| folder.path().join(format!("step-{step:012}")).exists()).collect();
        assert_eq!(left, [false, true, false, true, true]);
    }

    #[test]
    fn the_checkpoints_of_several_runs_are_not_pruned_without_a_name() {
        let folder = checkpoints(&[1, 2]);
        save(folder.path(), &[3], "s");
        let found = failure(&["prune", folder.path().to_str().unwrap(), "--keep-last", "2"]);
        assert_eq!((found.kind, found.found.as_deref()), (FailureKind::Mismatch, Some("those of r, s")));
    }

    #[test]
    fn who_keeps_more_than_was_asked_for_says_so() {
        for (keep_last, is_told) in [(None, false), (Some(0), true), (Some(1), true), (Some(2), false)] {
            assert_eq!(note_of(keep_last).is_some(), is_told, "{keep_last:?}");
        }
    }

    #[test]
    fn a_step_becomes_a_model_folder() {
        let folder = checkpoints(&[1, 2]);
        let url = folder.path().to_str().unwrap();
        let output = folder.path().join("model");
        let words = ["export", &format!("{url}@1"), "--output", output.to_str().unwrap()];
        run_line(&words).unwrap();
        let read = crate::checkpoint::hf::read_weights(&output).unwrap();
        assert_eq!(read[0].data, 1.0_f32.to_le_bytes().as_slice());
        assert_eq!(fs::read(output.join("config.json")).unwrap(), b"{}");
        assert_eq!(failure(&words).what, "the output folder exists already");
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1_610_612_736, "1.5 GiB"), (u64::MAX, "16777216.0 TiB")] {
            assert_eq!(size_text(bytes), text);
        }
    }
}
