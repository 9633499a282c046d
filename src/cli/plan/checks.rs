//! Looks at everything that a run will touch, and says at once what is wrong with it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use cloze_data::manifest::Manifest;
use cloze_data::prepare::check_prepared;
use cloze_data::record::{Format, list_inputs};
use cloze_data::store::{ConditionalPut, probe_conditional_put};
use cloze_data::tokenizer::Tokenizer;
use cloze_launcher::plan::{Check, CheckLevel, DataFacts, check_clock};
use cloze_launcher::sweep::hosts::{places_of_host, site_of_hosts};
use cloze_launcher::words::counted;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::{DataRecipe, ModelRecipe, ModelShape, Recipe};
use cloze_recipes::site::{SiteKind, SshSite};

use super::facts::model_sizes;
use super::{Trials, Wanted};
use crate::cli::places::{open_place, try_place};
use crate::cli::run::RUNS_FOLDER;
use crate::cli::worker_process::worker_binary;

/// About how many times as large records are when they are decompressed.
const COMPRESSION: u64 = 4;

/// Files of weights that a model folder can have.
const WEIGHTS: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];

/// The model and its tokenizer; returns the model's extents where they are known.
pub(super) fn model(wanted: &Wanted<'_>, checks: &mut Vec<Check>) -> Option<(ModelShape, u64)> {
    let recipe = &wanted.study.recipe;
    // An earlier stage's export has the extents of the model that the first stage starts from.
    let first = wanted.trials.as_ref().and_then(|trials| trials.graph.wanted().next());
    let (mut model, mut stage) = (&recipe.model, first.and_then(|node| node.trial.parent.as_deref()));
    while let Some(trial) = stage {
        model = &trial.recipe.model;
        stage = trial.parent.as_deref();
    }
    let sizes = match model_sizes(model) {
        Ok(sizes) => {
            checks.push(weights(model));
            Some(sizes)
        }
        Err(error) => {
            checks.push(Check::error("model", &error));
            None
        }
    };
    checks.push(tokenizer(&recipe.model, model, sizes.as_ref().map(|(_, vocab)| *vocab)));
    sizes
}

fn weights(model: &ModelRecipe) -> Check {
    let name = "model";
    let Some(folder) = &model.path else { return Check::ok(name, "new, from its shape") };
    if WEIGHTS.iter().any(|file| folder.join(file).is_file()) {
        return Check::ok(name, folder.display());
    }
    let failure = Failure::new(FailureKind::Input, "the model folder holds no weights").at(folder.display());
    Check::fail(name, &failure.expected(WEIGHTS.join(" or ")).hint("get the model as safetensors"))
}

/// The tokenizer is there, its anchor is one token, and the model's embedding has a row for each of its tokens.
fn tokenizer(of_run: &ModelRecipe, of_first_stage: &ModelRecipe, vocab: Option<u64>) -> Check {
    let name = "tokenizer";
    // That of an earlier stage's export is copied from the first stage.
    let path = if of_run.tokenizer.exists() { &of_run.tokenizer } else { &of_first_stage.tokenizer };
    match Tokenizer::load_with_anchor(path, &of_run.anchor_token) {
        Err(error) => Check::error(name, &error),
        Ok((tokenizer, _)) => match vocab.filter(|vocab| *vocab < u64::from(tokenizer.vocab_size())) {
            Some(vocab) => {
                let failure = Failure::new(FailureKind::Mismatch, "the tokenizer has more tokens than the model's embedding has rows");
                let failure = failure.at(path.display()).expected(format!("at most {vocab}")).found(tokenizer.vocab_size());
                Check::fail(name, &failure.hint("set `model.tokenizer` to the tokenizer that the model was trained with"))
            }
            None => Check::ok(name, format!("{} tokens; anchor `{}` is one of them", tokenizer.vocab_size(), of_run.anchor_token)),
        },
    }
}

/// The data: prepared and of this recipe, or at least its sources.
pub(super) fn data(wanted: &Wanted<'_>, checks: &mut Vec<Check>) -> DataFacts {
    let recipe = &wanted.study.recipe;
    let sources = sources(&recipe.data, wanted.offline, checks);
    if let Some(trials) = &wanted.trials {
        return data_of_trials(trials, checks).unwrap_or(sources);
    }
    let name = "prepared data";
    match Manifest::find(&recipe.data.output) {
        Err(error) => {
            checks.push(Check::error(name, &error));
            sources
        }
        Ok(None) => {
            let found = format!("not prepared yet, at {}", recipe.data.output.display());
            checks.push(Check::warn(name, found, "run `cloze data prepare RECIPE` first"));
            sources
        }
        Ok(Some(manifest)) => {
            checks.push(of_this_recipe(recipe, &manifest));
            facts_of(recipe, &manifest)
        }
    }
}

/// What the trials of a sweep find in the study's folder, each preparation once; the facts are those of the first trial, where its data
/// is prepared.
fn data_of_trials(trials: &Trials, checks: &mut Vec<Check>) -> Option<DataFacts> {
    let name = "prepared data";
    let first = trials.graph.wanted().next().map(|node| node.trial.data_hash.as_str());
    let mut looked_at = BTreeSet::new();
    let (mut num_prepared, mut facts, num_before) = (0, None, checks.len());
    for trial in trials.graph.nodes.iter().map(|node| &node.trial).filter(|trial| looked_at.insert(trial.data_hash.as_str())) {
        match Manifest::find(&trial.recipe.data.output) {
            Err(error) => checks.push(Check::error(name, &error)),
            Ok(None) => {}
            Ok(Some(manifest)) => {
                num_prepared += 1;
                let check = of_this_recipe(&trial.recipe, &manifest);
                if check.level == CheckLevel::Fail {
                    checks.push(check);
                }
                if first == Some(trial.data_hash.as_str()) {
                    facts = Some(facts_of(&trial.recipe, &manifest));
                }
            }
        }
    }
    if checks.len() == num_before {
        checks.push(Check::ok(name, preparations(num_prepared, looked_at.len(), &trials.folder.root().join("data"))));
    }
    facts
}

/// How many of the sweep's preparations are there. One that is not yet is no failure: the first trial that needs it prepares it.
fn preparations(prepared: usize, all: usize, place: &Path) -> String {
    let place = place.display();
    match (prepared, all) {
        (0, 1) => format!("the sweep prepares it, in {place}"),
        (0, all) => format!("the sweep prepares {all} times, in {place}"),
        (1, 1) => format!("there, in {place}"),
        (prepared, all) if prepared == all => format!("{all} preparations are there, in {place}"),
        (prepared, all) => format!("{prepared} of {all} preparations there, in {place}; the sweep prepares the rest"),
    }
}

fn facts_of(recipe: &Recipe, manifest: &Manifest) -> DataFacts {
    let bytes = manifest.shards.iter().map(|shard| shard.bytes).sum();
    let epoch_samples = manifest.epoch_samples(recipe.data.mixing_cap);
    DataFacts::Prepared { samples: manifest.samples, epoch_samples, tokens: manifest.tokens, bytes }
}

fn of_this_recipe(recipe: &Recipe, manifest: &Manifest) -> Check {
    let name = "prepared data";
    if let Err(failure) = check_prepared(recipe, manifest) {
        return Check::fail(name, &failure);
    }
    if manifest.samples == 0 {
        let failure = Failure::new(FailureKind::Input, "the prepared data holds no samples").at(recipe.data.output.display());
        return Check::fail(name, &failure.hint("look at the counts in its manifest.json: the filters dropped every record"));
    }
    let of_tokenizer = Tokenizer::load(&recipe.model.tokenizer);
    if of_tokenizer.is_ok_and(|tokenizer| tokenizer.fingerprint() != manifest.tokenizer_fingerprint) {
        let failure = Failure::new(FailureKind::Mismatch, "the data was prepared with another tokenizer").at(recipe.data.output.display());
        return Check::fail(name, &failure.hint("prepare it again: `cloze data prepare RECIPE --force`"));
    }
    Check::ok(name, format!("{} samples, {} tokens", manifest.samples, manifest.tokens))
}

/// Every source, and how large they are together.
fn sources(data: &DataRecipe, offline: bool, checks: &mut Vec<Check>) -> DataFacts {
    let (mut stored_bytes, mut text_bytes, mut all_known) = (0, 0, true);
    for source in &data.sources {
        let name = "source";
        if offline && source.url.contains("://") && !source.url.starts_with("file://") {
            checks.push(Check::warn(name, format!("{} was not looked at", source.url), "leave `--offline` out"));
            all_known = false;
            continue;
        }
        match list_inputs(std::slice::from_ref(source)) {
            Ok(inputs) => {
                let bytes: u64 = inputs.iter().map(|input| input.info.size).sum();
                stored_bytes += bytes;
                text_bytes += inputs
                    .iter()
                    .map(|input| if input.format == Format::Jsonl { input.info.size } else { COMPRESSION * input.info.size })
                    .sum::<u64>();
                if bytes == 0 {
                    let failure = Failure::new(FailureKind::Input, "the source is empty").at(&source.url);
                    checks.push(Check::fail(name, &failure.hint("check `data.sources` in the recipe")));
                } else {
                    let files = if inputs.len() == 1 { "file" } else { "files" };
                    checks.push(Check::ok(name, format!("{}: {} {files}, {} MiB", source.url, inputs.len(), bytes.div_ceil(1 << 20))));
                }
            }
            Err(error) => {
                checks.push(Check::error(name, &error));
                all_known = false;
            }
        }
    }
    if all_known { DataFacts::Sources { stored_bytes, text_bytes } } else { DataFacts::Unknown }
}

/// The files of the evaluation, of all trials where there are several.
pub(super) fn evaluation(wanted: &Wanted<'_>, checks: &mut Vec<Check>) {
    let name = "evaluation";
    let of_trials = wanted.trials.iter().flat_map(|trials| &trials.graph.nodes).map(|node| &node.trial.recipe);
    let recipes: Vec<&Recipe> = if wanted.trials.is_some() { of_trials.collect() } else { vec![&wanted.study.recipe] };
    let mut files: BTreeMap<&str, BTreeSet<&Path>> = BTreeMap::new();
    for task in recipes.into_iter().flat_map(|recipe| &recipe.evaluation) {
        files.entry(&task.name).or_default().extend(task.files.iter().map(PathBuf::as_path));
    }
    let before = checks.len();
    for (task, files) in &files {
        let missing: Vec<&Path> = files.iter().copied().filter(|file| !file.exists()).collect();
        if let Some(first) = missing.first() {
            let what = format!("{} of {} of the task `{task}` not there", missing.len(), counted(files.len(), "file"));
            let failure = Failure::new(FailureKind::Input, what).at(first.display());
            checks.push(Check::fail(name, &failure.hint("correct `files` of the task in the recipe; `cloze eval` needs them")));
        }
    }
    if checks.len() == before {
        let count = files.values().map(BTreeSet::len).sum();
        let found = if count == 0 { "no task".to_owned() } else { format!("{} there", counted(count, "file")) };
        checks.push(Check::ok(name, found));
    }
}

/// The place of the checkpoints, and its clock.
pub(super) fn places(wanted: &Wanted<'_>, checks: &mut Vec<Check>) {
    let recipe = &wanted.study.recipe;
    let of_run = || wanted.folder.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new(".")).to_owned();
    let folder = wanted.trials.as_ref().map_or_else(of_run, |trials| trials.folder.root().join(RUNS_FOLDER));
    let url = recipe.checkpoint.url.clone().unwrap_or_else(|| folder.display().to_string());
    let name = "checkpoint place";
    if wanted.offline && url.contains("://") && !url.starts_with("file://") {
        checks.push(Check::warn(name, format!("{url} was not looked at"), "leave `--offline` out"));
        return;
    }
    if let Err(error) = place(&url, recipe, checks) {
        checks.push(Check::error(name, &error));
    }
}

fn place(url: &str, recipe: &Recipe, checks: &mut Vec<Check>) -> Result<()> {
    let name = "checkpoint place";
    let store = open_place(url, &recipe.checkpoint.options)?;
    let tried = try_place(&store)?;
    checks.push(match probe_conditional_put(&store)? {
        ConditionalPut::Honoured => Check::ok(name, format!("{url} can be written")),
        ConditionalPut::Ignored | ConditionalPut::Unsupported => Check::warn(
            name,
            format!("{url} can be written, but not on the condition that an object is new"),
            "give every run a prefix of its own: two that save in one place at the same moment are not noticed",
        ),
    });
    checks.push(check_clock("the checkpoint place", tried.clock_skew_s));
    Ok(())
}

/// The programs and the machines that the site names.
pub(super) fn machines(wanted: &Wanted<'_>, checks: &mut Vec<Check>) {
    match worker_binary() {
        Ok(path) => checks.push(Check::ok("worker binary", path.display())),
        Err(error) => checks.push(Check::error("worker binary", &error)),
    }
    match &wanted.site.kind {
        SiteKind::Local => {}
        SiteKind::Ssh(ssh) => checks.push(match &wanted.study.sweep {
            _ if wanted.trials.is_none() => hosts(ssh, wanted.study.resources.nodes),
            sweep => hosts_of_trials(wanted, ssh, sweep.as_ref().map_or(1, |sweep| sweep.concurrency)),
        }),
        SiteKind::Slurm(slurm) => super::script::check_machines(wanted, slurm, checks),
    }
}

fn hosts(ssh: &SshSite, nodes: u32) -> Check {
    let found = format!("{} hosts for {nodes} nodes", ssh.hosts.len());
    if ssh.hosts.len() < nodes as usize {
        let failure = Failure::new(FailureKind::Recipe, "the cluster file names too few hosts").expected(format!("at least {nodes}"));
        return Check::fail("hosts", &failure.found(ssh.hosts.len()).hint("add to `ssh.hosts`, or lower `resources.nodes`"));
    }
    Check::ok("hosts", found)
}

/// Each trial has one host; which of them can be reached is found out when the sweep begins.
fn hosts_of_trials(wanted: &Wanted<'_>, ssh: &SshSite, concurrency: u32) -> Check {
    match site_of_hosts(&wanted.study.resources, wanted.site) {
        Err(failure) => Check::fail("hosts", &failure),
        Ok(_) => {
            let (hosts, places) = (ssh.hosts.len(), places_of_host(concurrency, ssh.hosts.len()));
            Check::ok("hosts", format!("{} for {concurrency} trials at a time, at most {places} on each", counted(hosts, "host")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_sweep_prepares_is_no_failure() {
        let cases = [
            (0, 1, "the sweep prepares it, in D"),
            (0, 3, "the sweep prepares 3 times, in D"),
            (1, 1, "there, in D"),
            (3, 3, "3 preparations are there, in D"),
            (1, 3, "1 of 3 preparations there, in D; the sweep prepares the rest"),
        ];
        for (prepared, all, expected) in cases {
            assert_eq!(preparations(prepared, all, Path::new("D")), expected);
        }
    }
}
