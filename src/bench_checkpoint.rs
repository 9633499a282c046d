//! Times the storing and loading of a training state of a given size, without a training.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result};
use bytes::Bytes;
use cloze_data::store;
use cloze_recipes::failure::{Failure, FailureKind};
use serde_json::json;
use zerocopy::IntoBytes;

use crate::checkpoint::{CheckpointState, CheckpointStore, Piece, Share, StorePolicy};

/// Tensors of each of the three groups: weights and two moments.
const TENSORS_PER_GROUP: usize = 64;

/// What is timed.
pub struct CheckpointBenchOptions {
    /// Folder or url to write to; must hold nothing.
    pub place: String,
    /// Parameters of the pretended model.
    pub num_parameters: usize,
    /// How often the state is stored and loaded, each time at a new place.
    pub rounds: u32,
}

/// Prints one JSON line per round: seconds to copy the state, which is done once, to store it (durable, hashed, with its manifest), and to
/// load it (every hash compared). What was stored is removed after each round.
///
/// The first round also pays for memory that the system has not given out before, the page cache's included; a run pays for it once.
pub fn run(options: &CheckpointBenchOptions, output: &mut dyn Write) -> Result<()> {
    check_is_empty(&options.place)?;
    let length = options.num_parameters / TENSORS_PER_GROUP;
    let tensors: Vec<Vec<f32>> =
        (0..3 * TENSORS_PER_GROUP).map(|tensor| (0..length).map(|place| ((place + tensor) as f32).sin()).collect()).collect();
    let started = Instant::now();
    let share = copy(&tensors);
    let copy_s = started.elapsed().as_secs_f64();
    drop(tensors);
    let gb = (3 * TENSORS_PER_GROUP * length * 4) as f64 / 1e9;
    for round in 1..=options.rounds {
        let place = format!("{}/round-{round}", options.place.trim_end_matches('/'));
        let (saved_s, load_s) = store_and_load(&place, &share)?;
        let line = json!({
            "tool": "cloze", "round": round, "gb": gb, "copy_s": copy_s, "saved_s": saved_s, "save_gb_s": gb / saved_s, "load_s": load_s,
        });
        writeln!(output, "{line}").context("print the figures")?;
    }
    Ok(())
}

/// Seconds to store a state, and to load it.
fn store_and_load(place: &str, share: &Share) -> Result<(f64, f64)> {
    let checkpoints = CheckpointStore::open(place, &BTreeMap::new(), StorePolicy::default())?;
    let started = Instant::now();
    let files = checkpoints.save_share(1, share)?;
    checkpoints.commit(&state(), files)?;
    let saved_s = started.elapsed().as_secs_f64();
    // Another store, which remembers nothing of the first.
    let checkpoints = CheckpointStore::open(place, &BTreeMap::new(), StorePolicy::default())?;
    let started = Instant::now();
    let loaded = checkpoints.latest_good()?.context("find the checkpoint that was just written")?;
    let load_s = started.elapsed().as_secs_f64();
    drop(loaded);
    remove(place)?;
    Ok((saved_s, load_s))
}

/// A checkpoint that is there would be pruned or mixed with this one, and removed.
fn check_is_empty(place: &str) -> Result<()> {
    let objects = store::list(&store::open(place, &BTreeMap::new())?)?;
    let Some(first) = objects.first() else { return Ok(()) };
    Err(Failure::new(FailureKind::Input, "the place to write to is not empty").at(place).found(&first.key).hint("name a new one").into())
}

/// Removes what one round has stored, where nothing was before it.
fn remove(place: &str) -> Result<()> {
    let written = store::open(place, &BTreeMap::new())?;
    store::list(&written)?.iter().try_for_each(|object| store::delete(&written, &object.key))?;
    if written.is_local() {
        std::fs::remove_dir_all(written.url("")).context("remove the folders of a round")?;
    }
    Ok(())
}

fn copy(tensors: &[Vec<f32>]) -> Share {
    let piece = |(index, values): (usize, &Vec<f32>)| {
        let data = Bytes::copy_from_slice(values.as_bytes());
        Piece { name: format!("tensor.{index}"), full_shape: vec![values.len()], start: 0, data }
    };
    let (model, optimizer) = tensors.split_at(TENSORS_PER_GROUP);
    let pieces = |part: &[Vec<f32>]| part.iter().enumerate().map(piece).collect();
    Share { rank: 0, world_size: 1, model: pieces(model), optimizer: pieces(optimizer), companions: Vec::new() }
}

fn state() -> CheckpointState {
    CheckpointState {
        step: 1,
        recipe_hash: "bench".to_owned(),
        data_fingerprint: "bench".to_owned(),
        world_size: 1,
        adam_step: 1,
        loss: None,
        temporary: false,
        shard: "none".to_owned(),
    }
}
