//! The plan of memory against what libtorch allocates, for whole packs in which every token is labelled.

use cloze_data::batch::Pack;
use cloze_launcher::plan::memory::{memory, parameters};
use cloze_recipes::raw::Preset;
use cloze_recipes::recipe::{Recipe, Shard};
use tch::Device;

use super::layout::SharePlace;
use super::tests::{on_all, recipe, rings};
use crate::batch_feed::StepBatch;
use crate::collective::Collective;
use crate::model::config::Config;
use crate::model::modernbert::{ModernBert, Placement};
use crate::optim::schedule::Schedule;
use crate::step::{Asks, State, Trainer, train_step};
use crate::torch::memory::ThreadAccount;

/// How far the plan may be off.
const TOLERANCE: f64 = 0.05;

const PLACEMENT: Placement = Placement { device: Device::Cpu, trainable: true, bfloat16: false };

/// A model and the size of its packs, small enough for a test.
#[derive(Clone, Copy)]
struct Case {
    preset: Preset,
    vocab: i64,
    tokens: u32,
}

/// A pack of documents of different lengths that has exactly as many tokens as the recipe allows.
fn pack(case: Case) -> Pack {
    let tokens = case.tokens as i32;
    let lengths = vec![tokens / 2, tokens / 4, tokens - tokens / 2 - tokens / 4];
    let ids: Vec<i32> = (0..tokens).map(|t| (t * 37 + 11) % case.vocab as i32).collect();
    Pack { labels: ids.clone(), input_ids: ids, lengths, label_weights: vec![1.0; tokens as usize], slots: Vec::new(), kinds: Vec::new() }
}

/// Peak of one worker's tensors over a step of two packs.
fn measured(case: Case, recipe: &Recipe, collective: Box<dyn Collective>) -> u64 {
    let account = ThreadAccount::open();
    let config = Config::new(&case.preset.shape(), case.vocab);
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let replica_distance = usize::from(recipe.train.replicate_shards && world_size > 1);
    let place = SharePlace { rank, world_size, replica_distance };
    let state = State::new(&recipe.train, config, PLACEMENT, place).unwrap();
    let schedule = Schedule::new(&recipe.train.schedule, recipe.train.learning_rate, 1);
    let mut trainer = Trainer::new(recipe, state, schedule, collective).unwrap();
    account.reset_peak();
    let packs = vec![pack(case), pack(case)];
    let batch = StepBatch { step: 0, packs, global_examples: 6, global_tokens: u64::from(2 * case.tokens) };
    let outcome = train_step(&mut trainer, &batch, Asks::default(), &mut || Ok(())).unwrap();
    assert!(outcome.numbers.finish().unwrap()[0].is_finite());
    account.peak()
}

fn check(case: Case, world_size: usize) {
    let shards = [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters];
    for (shard, replicate_shards) in shards.into_iter().flat_map(|shard| [(shard, false), (shard, true)]) {
        let mut recipe = recipe(shard);
        recipe.train.replicate_shards = replicate_shards && shard != Shard::None;
        recipe.train.micro_batch_tokens = case.tokens;
        let plan = memory(&case.preset.shape(), case.vocab as u64, &recipe.train, world_size as u32);
        for measured in on_all(rings(world_size), |collective| measured(case, &recipe, collective)) {
            let ratio = measured as f64 / plan.tensors() as f64;
            assert!(
                (ratio - 1.0).abs() < TOLERANCE,
                "{:?}, {shard:?}, replicas {replicate_shards}, world {world_size}: measured {measured}, planned {} as {:?}",
                case.preset,
                plan.tensors(),
                plan.parts
            );
        }
    }
}

#[test]
fn the_plan_of_a_tiny_model_is_what_a_worker_needs() {
    // Once where the logits take most of the memory, and once where the layers do.
    for (vocab, tokens) in [(4096, 512), (256, 1024)] {
        for world_size in [1, 2] {
            check(Case { preset: Preset::Tiny, vocab, tokens }, world_size);
        }
    }
}

#[test]
fn the_plan_of_a_small_model_is_what_a_worker_needs() {
    for world_size in [1, 2] {
        check(Case { preset: Preset::Small, vocab: 2048, tokens: 64 }, world_size);
    }
}

#[test]
fn the_plan_knows_the_number_of_parameters() {
    for preset in [Preset::Tiny, Preset::Small] {
        let model = ModernBert::new(Config::new(&preset.shape(), 2048), PLACEMENT).unwrap();
        assert_eq!(parameters(&preset.shape(), 2048), model.parameters().num_parameters() as u64);
    }
}
