//! Whatever the workers share out, they compute the same: real rings, one thread for each worker, a model whose buckets end in the midst of
//! layers, and workers with different numbers of packs.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use cloze_data::batch::Pack;
use cloze_recipes::raw::Preset;
use cloze_recipes::recipe::{ModelShape, Recipe, Shard};
use tch::Device;

use crate::batch_feed::StepBatch;
use crate::checkpoint::{CheckpointState, Loaded, NamedTensorOwned};
use crate::collective::local::{Ring, RingOptions};
use crate::collective::{Collective, CollectiveError};
use crate::model::config::Config;
use crate::model::modernbert::{ModernBert, Placement};
use crate::model::packed::NOT_SCORED;
use crate::model::parameters::Division;
use crate::optim::schedule::Schedule;
use crate::step::{Asks, Group, SharePart, State, StepOutcome, Trainer, train_step};
use crate::torch::memory;

const VOCABULARY: i64 = 96;
pub(super) const STEPS: u64 = 10;
const ALL: [Shard; 4] = [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters];
const RECIPE: &str = "version: 1
name: shared-out
model: {preset: tiny, tokenizer: t}
data: {sources: [{url: corpus}], output: out, max_length: 128}
train:
  steps: 10
  batch_examples: 4
  micro_batch_tokens: 256
  learning_rate: 1e-3
  schedule: {kind: constant, warmup_steps: 0}
";

/// The recipe of these tests.
pub(super) fn recipe(shard: Shard) -> Recipe {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recipe.yaml");
    std::fs::write(&path, RECIPE).unwrap();
    let mut recipe = cloze_recipes::load(&path, &[]).unwrap();
    recipe.train.shard = shard;
    recipe
}

/// Connected rings by rank.
pub(super) fn rings(world_size: usize) -> Vec<Box<dyn Collective>> {
    let listeners: Vec<TcpListener> = (0..world_size).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let peers: Vec<String> = listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect();
    let connect = |(rank, listener): (usize, TcpListener)| {
        let options = RingOptions {
            listener,
            rank,
            peers: peers.clone(),
            key: "key".to_owned(),
            generation: 1,
            timeout: Duration::from_mins(1),
            interrupt: Arc::new(AtomicBool::new(false)),
        };
        thread::spawn(move || Ring::connect(options).unwrap())
    };
    let threads: Vec<_> = listeners.into_iter().enumerate().map(connect).collect();
    threads.into_iter().map(|thread| Box::new(thread.join().unwrap()) as Box<dyn Collective>).collect()
}

/// Runs all ranks at once, each in a thread of its own with one core, and returns the results by rank.
pub(super) fn on_all<T: Send>(rings: Vec<Box<dyn Collective>>, body: impl Fn(Box<dyn Collective>) -> T + Sync) -> Vec<T> {
    let body = &body;
    thread::scope(|scope| {
        let run = |ring| {
            scope.spawn(move || {
                tch::set_num_threads(1);
                body(ring)
            })
        };
        let threads: Vec<_> = rings.into_iter().map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn shape() -> ModelShape {
    ModelShape {
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        local_attention: 8,
        ..Preset::Tiny.shape()
    }
}

const PLACEMENT: Placement = Placement { device: Device::Cpu, trainable: true, bfloat16: false };

/// A state whose buckets hold about two thirds of a layer, so that they end in the midst of layers; replicas are those of the rank before.
pub(super) fn empty_state(recipe: &Recipe, collective: &dyn Collective) -> State {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let replica_distance = usize::from(recipe.train.replicate_shards && world_size > 1);
    let division = Division { shard: recipe.train.shard, rank, world_size, replica_distance, bucket_floats_min: 6000 };
    let state = State::divided(&recipe.train, Config::new(&shape(), VOCABULARY), PLACEMENT, &division).unwrap();
    assert!(state.model.parameters().buckets().num_buckets() > 4);
    state
}

/// A trainer with an empty state.
fn trainer(recipe: &Recipe, collective: Box<dyn Collective>) -> Trainer<'_> {
    let state = empty_state(recipe, collective.as_ref());
    let schedule = Schedule::new(&recipe.train.schedule, recipe.train.learning_rate, STEPS);
    Trainer::new(recipe, state, schedule, collective).unwrap()
}

/// A state in the form of a checkpoint.
fn loaded(model: Vec<NamedTensorOwned>, optimizer: Vec<NamedTensorOwned>) -> Loaded {
    let state = CheckpointState {
        step: 0,
        recipe_hash: String::new(),
        data_fingerprint: String::new(),
        world_size: 1,
        adam_step: 0,
        loss: None,
        temporary: false,
        shard: "none".to_owned(),
    };
    Loaded { state, model, optimizer, url: "memory".to_owned(), skipped: Vec::new() }
}

/// First values drawn from a seed, and moments of zero.
fn first_state(seed: u64) -> Loaded {
    let mut model = ModernBert::new(Config::new(&shape(), VOCABULARY), PLACEMENT).unwrap();
    model.parameters_mut().initialise(seed);
    let values = model.parameters().named(model.parameters().values()).unwrap();
    let zeroed = |prefix: &str, value: &NamedTensorOwned| NamedTensorOwned {
        name: format!("{prefix}{}", value.name),
        shape: value.shape.clone(),
        data: Bytes::from(vec![0; value.data.len()]),
    };
    let optimizer = ["exp_avg.", "exp_avg_sq."].iter().flat_map(|prefix| values.iter().map(move |value| zeroed(prefix, value))).collect();
    loaded(values, optimizer)
}

/// A trainer that holds the first state.
pub(super) fn started(recipe: &Recipe, collective: Box<dyn Collective>) -> Trainer<'_> {
    let mut trainer = trainer(recipe, collective);
    let first = (trainer.collective.rank() == 0).then(|| first_state(7));
    trainer.distribute(first.as_ref(), 0).unwrap();
    trainer
}

fn pack(number: u64) -> Pack {
    let lengths = vec![9 + (number % 5) as i32, 20, 1];
    let total: i32 = lengths.iter().sum();
    let token = |t: i32, factor: i32| (t * factor + number as i32 * 13) % VOCABULARY as i32;
    Pack {
        input_ids: (0..total).map(|t| token(t, 37)).collect(),
        labels: (0..total).map(|t| if t % 3 == 0 { token(t, 5) } else { NOT_SCORED }).collect(),
        label_weights: (0..total).map(|t| if t % 3 == 0 { 1.0 } else { 0.0 }).collect(),
        lengths,
        slots: Vec::new(),
        kinds: Vec::new(),
    }
}

/// One to five packs, dealt out in turn, so that workers have none, one or several.
pub(super) fn batch(step: u64, collective: &dyn Collective) -> StepBatch {
    let (rank, world_size) = (collective.rank() as u64, collective.world_size() as u64);
    let numbers = (0..=step % 5).filter(|number| number % world_size == rank);
    StepBatch { step, packs: numbers.map(|number| pack(10 * step + number)).collect(), global_examples: 3, global_tokens: 30 }
}

pub(super) fn step(trainer: &mut Trainer, number: u64, asks: Asks) -> anyhow::Result<StepOutcome> {
    let batch = batch(number, trainer.collective.as_ref());
    let mut updates = 0;
    let outcome = train_step(trainer, &batch, asks, &mut || {
        updates += 1;
        Ok(())
    })?;
    assert_eq!(updates, 1);
    Ok(outcome)
}

/// Mean loss and gradient norm of a step.
pub(super) fn figures(outcome: StepOutcome) -> [f64; 2] {
    let numbers = outcome.numbers.finish().unwrap();
    [f64::from(numbers[0]) / f64::from(numbers[1]), f64::from(numbers[3])]
}

/// A part of the state as plain numbers: file, tensor, its shape, first element, elements.
pub(super) type PlainPart = (bool, String, Vec<usize>, usize, Vec<f32>);

/// Shape and elements of each tensor, by file and name.
pub(super) type WholeState = BTreeMap<(bool, String), (Vec<usize>, Vec<f32>)>;

fn plain(part: SharePart) -> PlainPart {
    let values = Vec::<f32>::try_from(&part.tensor).unwrap();
    (part.group == Group::Model, part.name, part.full_shape, part.start, values)
}

pub(super) fn plain_share(trainer: &Trainer) -> Vec<PlainPart> {
    trainer.share().unwrap().into_iter().map(plain).collect()
}

/// The whole state out of the parts of all ranks; every element must be there once.
pub(super) fn merged(shares: Vec<Vec<PlainPart>>) -> WholeState {
    let mut whole: BTreeMap<(bool, String), (Vec<usize>, Vec<Option<f32>>)> = BTreeMap::new();
    for (is_model, name, shape, start, values) in shares.into_iter().flatten() {
        let length = shape.iter().product();
        let (_, elements) = whole.entry((is_model, name)).or_insert_with(|| (shape, vec![None; length]));
        for (element, value) in elements[start..].iter_mut().zip(&values) {
            assert!(element.replace(*value).is_none(), "an element is written twice");
        }
    }
    let complete = |values: Vec<Option<f32>>| values.into_iter().map(|value| value.expect("an element is missing")).collect();
    whole.into_iter().map(|(key, (shape, values))| (key, (shape, complete(values)))).collect()
}

/// The merged state in the form of a checkpoint.
fn as_loaded(state: &WholeState) -> Loaded {
    let of = |wanted: bool| {
        let tensors = state.iter().filter(|((is_model, _), _)| *is_model == wanted);
        let tensors = tensors.map(|((_, name), (shape, values))| NamedTensorOwned {
            name: name.clone(),
            shape: shape.clone(),
            data: values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into(),
        });
        tensors.collect::<Vec<_>>()
    };
    loaded(of(true), of(false))
}

/// Losses and norms of ten steps, as every rank saw them, and the merged state after them.
fn trained(shard: Shard, world_size: usize) -> (Vec<[f64; 2]>, WholeState) {
    let recipe = recipe(shard);
    let mut results = on_all(rings(world_size), |collective| {
        let mut trainer = started(&recipe, collective);
        let figures: Vec<[f64; 2]> = (0..STEPS).map(|number| figures(step(&mut trainer, number, Asks::default()).unwrap())).collect();
        assert!(trainer.state_is_whole());
        assert_eq!(trainer.optimizer.steps_done(), STEPS);
        (figures, plain_share(&trainer))
    });
    let figures = results[0].0.clone();
    assert!(results.iter().all(|(other, _)| *other == figures), "the ranks differ in {shard:?}");
    (figures, merged(results.drain(..).map(|(_, share)| share).collect()))
}

#[test]
fn what_is_shared_out_does_not_change_what_is_computed() {
    for world_size in 1..=3 {
        let (expected, whole) = trained(Shard::None, world_size);
        assert!(expected[9][0] < expected[0][0], "the loss does not fall: {expected:?}");
        for shard in [Shard::Optimizer, Shard::Gradients, Shard::Parameters] {
            let (figures, state) = trained(shard, world_size);
            for ([loss, norm], [expected_loss, expected_norm]) in figures.iter().zip(&expected) {
                assert!((loss / expected_loss - 1.0).abs() < 1e-6, "{shard:?}, world {world_size}: loss {loss} is not {expected_loss}");
                assert!((norm / expected_norm - 1.0).abs() < 1e-4, "{shard:?}, world {world_size}: norm {norm} is not {expected_norm}");
            }
            assert!(state.keys().eq(whole.keys()));
            for (((_, name), (shape, values)), (expected_shape, expected)) in state.iter().zip(whole.values()) {
                assert_eq!(shape, expected_shape);
                // A tenth of what one step may change.
                let furthest = values.iter().zip(expected).map(|(value, expected)| (value - expected).abs()).fold(0.0, f32::max);
                assert!(furthest < 1e-4, "{shard:?}, world {world_size}: {name} is off by {furthest}");
            }
        }
    }
}

#[test]
fn a_run_gives_the_same_bits_each_time() {
    for shard in ALL {
        assert_eq!(trained(shard, 2), trained(shard, 2), "{shard:?}");
    }
}

#[test]
fn a_state_survives_another_division() {
    let (_, state) = trained(Shard::Parameters, 3);
    for (shard, world_size, root) in [(Shard::None, 2, 1), (Shard::Optimizer, 3, 0), (Shard::Gradients, 2, 0), (Shard::Parameters, 2, 1)] {
        let recipe = recipe(shard);
        let shares = on_all(rings(world_size), |collective| {
            let mut trainer = trainer(&recipe, collective);
            let given = (trainer.collective.rank() == root).then(|| as_loaded(&state));
            trainer.distribute(given.as_ref(), root).unwrap();
            plain_share(&trainer)
        });
        assert!(merged(shares) == state, "{shard:?}, world {world_size}");
    }
}

#[test]
fn a_worker_gives_its_own_state_to_the_others() {
    let recipe = recipe(Shard::None);
    let states = on_all(rings(3), |collective| {
        let mut trainer = trainer(&recipe, collective);
        let rank = trainer.collective.rank();
        trainer.model.parameters_mut().initialise(rank as u64);
        let _ = tch::no_grad(|| trainer.optimizer.first_moment.fill_(rank as f64 + 1.0));
        trainer.distribute(None, 1).unwrap();
        let values = Vec::<f32>::try_from(trainer.model.parameters().values()).unwrap();
        (values, Vec::<f32>::try_from(&trainer.optimizer.first_moment).unwrap())
    });
    let mut own = ModernBert::new(Config::new(&shape(), VOCABULARY), PLACEMENT).unwrap();
    own.parameters_mut().initialise(1);
    let expected = Vec::<f32>::try_from(own.parameters().values()).unwrap();
    for (values, moments) in states {
        assert!(values == expected);
        assert!(moments.iter().all(|moment| (moment - 2.0).abs() < f32::EPSILON));
    }
}

#[test]
fn a_shard_is_not_taken_for_the_whole_state() {
    let recipe = recipe(Shard::Optimizer);
    let mut trainer = trainer(&recipe, rings(1).remove(0));
    let error = trainer.distribute(None, 0).unwrap_err();
    assert!(error.to_string().contains("cannot give the whole of it"), "{error:#}");
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    for shard in ALL {
        let recipe = recipe(shard);
        on_all(rings(2), |collective| {
            let mut trainer = started(&recipe, collective);
            let is_culprit = trainer.collective.rank() == 1;
            step(&mut trainer, 4, Asks::default()).unwrap();
            let before = plain_share(&trainer);
            let mut spoiled = batch(4, trainer.collective.as_ref());
            if is_culprit {
                spoiled.packs[0].label_weights.fill(f32::NAN);
            }
            let outcome = train_step(&mut trainer, &spoiled, Asks::default(), &mut || Ok(())).unwrap();
            assert_eq!(outcome.local_loss.double_value(&[]).is_nan(), is_culprit);
            assert!(figures(outcome)[0].is_nan());
            assert!(plain_share(&trainer) == before, "{shard:?}");
            assert_eq!(trainer.optimizer.steps_done(), 1);
            assert!(trainer.state_is_whole());
            // And the next step is none the worse for it.
            assert!(figures(step(&mut trainer, 4, Asks::default()).unwrap())[0].is_finite());
            assert_eq!(trainer.optimizer.steps_done(), 2);
        });
    }
}

#[test]
fn what_one_worker_asks_all_of_them_know() {
    let wishes = [
        Asks::default(),
        Asks { stop: true, ..Asks::default() },
        Asks { regroup: true, ..Asks::default() },
        Asks { save: true, ..Asks::default() },
        Asks { stop: true, regroup: false, save: true },
    ];
    for shard in ALL {
        for world_size in [1, 2] {
            let recipe = recipe(shard);
            on_all(rings(world_size), |collective| {
                let mut trainer = started(&recipe, collective);
                for (number, wish) in (0..).zip(wishes) {
                    let is_asking = trainer.collective.rank() + 1 == world_size;
                    let asks = if is_asking { wish } else { Asks::default() };
                    assert_eq!(step(&mut trainer, number, asks).unwrap().agreed, wish, "{shard:?}");
                }
            });
        }
    }
}

#[test]
fn a_peer_that_leaves_costs_no_state() {
    for shard in ALL {
        let recipe = recipe(shard);
        on_all(rings(2), |collective| {
            let mut trainer = started(&recipe, collective);
            step(&mut trainer, 4, Asks::default()).unwrap();
            if trainer.collective.rank() == 1 {
                return;
            }
            let before = plain_share(&trainer);
            let error = step(&mut trainer, 4, Asks::default()).unwrap_err();
            assert!(error.downcast_ref::<CollectiveError>().is_some(), "{shard:?}: {error:#}");
            assert!(plain_share(&trainer) == before && trainer.state_is_whole(), "{shard:?}");
        });
    }
}

#[test]
fn an_update_that_is_put_off_in_vain_changes_nothing() {
    let recipe = recipe(Shard::None);
    let mut trainer = started(&recipe, rings(1).remove(0));
    let before = plain_share(&trainer);
    let batch = batch(0, trainer.collective.as_ref());
    let error = train_step(&mut trainer, &batch, Asks::default(), &mut || anyhow::bail!("the copy failed")).unwrap_err();
    assert_eq!(error.to_string(), "the copy failed");
    assert!(plain_share(&trainer) == before && trainer.state_is_whole());
}

#[test]
fn memory_between_the_passes_is_given_back() {
    let recipe = recipe(Shard::Parameters);
    on_all(rings(2), |collective| {
        let account = memory::ThreadAccount::open();
        let mut trainer = started(&recipe, collective);
        step(&mut trainer, 4, Asks::default()).unwrap();
        account.reset_peak();
        let parameters = trainer.model.parameters();
        // Values, gradients and two moments of half the model, and four rotary tables of 1024 positions; the smallest bucket has 12 KiB.
        let expected = 4 * 2 * parameters.length() as u64 + 4 * 4 * 1024 * 8;
        let held = account.peak();
        assert!(held.abs_diff(expected) < 8 * 1024, "{held} bytes are held, expected {expected}");
    });
}
