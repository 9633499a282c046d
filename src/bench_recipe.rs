//! Times the steps of a recipe as one worker does them, and prints one JSON line: its model, its prepared data, its objective, in the
//! loop that trains. Nothing is saved, and nothing is exchanged with other workers.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cloze_cluster::protocol::StepReport;
use cloze_cluster::secret::Secret;
use cloze_data::batch::{BatchSpec, Pack};
use cloze_data::dataset::Dataset;
use cloze_data::mask::TokenFacts;
use cloze_data::tokenizer::Tokenizer;
use cloze_recipes::recipe::{Precision, Recipe};
use serde_json::json;
use tch::Device;

use crate::batch_feed::{BatchFeed, FeedPlan, StepBatch};
use crate::collective::local::{Ring, RingOptions};
use crate::drill::Drills;
use crate::model::folder;
use crate::model::modernbert::Placement;
use crate::optim::schedule::Schedule;
use crate::sharding::layout::SharePlace;
use crate::step::{Asks, State, Trainer};
use crate::torch::cuda;
use crate::train::{SavePoint, Watcher, train};

/// What is timed.
#[derive(Debug)]
pub struct RecipeBenchOptions {
    /// The recipe.
    pub recipe: Recipe,
    /// Workers of the run on this machine, which share its cores and each batch; what one of them does is timed.
    pub workers: u32,
    /// Timed steps.
    pub steps: u64,
    /// Steps before the clock starts.
    pub warmup_steps: u64,
    /// Cores that the workers may use; `None` is all.
    pub cores: Option<u32>,
    /// Folder of another `PyTorch`, for its CUDA half.
    pub torch_folder: Option<PathBuf>,
}

/// Times the steps; returns the JSON line.
pub fn bench_recipe(options: &RecipeBenchOptions) -> Result<String> {
    let recipe = &options.recipe;
    let device = crate::device::open(recipe.train.device, 0, options.torch_folder.as_deref())?;
    if recipe.train.deterministic && device.is_cuda() {
        cuda::use_deterministic_algorithms()?;
    }
    crate::device::set_threads(recipe.train.threads, options.cores, options.workers);
    let dataset = Arc::new(Dataset::open(&recipe.data.output)?);
    let (tokenizer, anchor_id) = Tokenizer::load_with_anchor(&recipe.model.tokenizer, &recipe.model.anchor_token)?;
    dataset.check_tokenizer(&tokenizer)?;
    let facts = TokenFacts::of(&tokenizer, anchor_id);
    let total_steps = options.warmup_steps + options.steps;
    let mut feed = BatchFeed::start(FeedPlan {
        spec: BatchSpec::new(recipe, facts, &*dataset),
        dataset,
        from_step: 0,
        total_steps,
        rank: 0,
        world_size: options.workers as usize,
    })?;
    let mut trainer = trainer(recipe, &tokenizer, device, total_steps)?;
    let mut watcher = Clock { warmup_steps: options.warmup_steps, started: Instant::now(), own: Own::default(), seconds: 0.0 };
    train(&mut trainer, &mut feed, &mut watcher, &mut Drills::new(Vec::new()), &mut 0)?;
    Ok(line(options, &trainer, &watcher))
}

/// One worker alone, with random weights: the time of a step does not depend on them.
fn trainer<'a>(recipe: &'a Recipe, tokenizer: &Tokenizer, device: Device, total_steps: u64) -> Result<Trainer<'a>> {
    let bfloat16 = recipe.train.precision == Precision::Bfloat16 && device != Device::Cpu;
    let placement = Placement { device, trainable: true, bfloat16 };
    let config = folder::config_of(&recipe.model, tokenizer)?;
    let ring = ring_of_one(recipe)?;
    let alone = SharePlace { rank: 0, world_size: 1, replica_distance: 0 };
    let mut state = State::new(&recipe.train, config, placement, alone)?;
    state.model.parameters_mut().initialise(recipe.seed);
    state.model.parameters_mut().refresh();
    let schedule = Schedule::new(&recipe.train.schedule, recipe.train.learning_rate, total_steps);
    Trainer::new(recipe, state, schedule, Box::new(ring))
}

fn ring_of_one(recipe: &Recipe) -> Result<Ring> {
    let listener = TcpListener::bind("127.0.0.1:0").context("open a socket")?;
    let peers = vec![listener.local_addr().context("read the socket's address")?.to_string()];
    Ok(Ring::connect(RingOptions {
        listener,
        rank: 0,
        peers,
        key: Secret::random()?.expose().to_owned(),
        generation: 1,
        timeout: Duration::from_millis(recipe.cluster.collective_timeout_ms),
        interrupt: Arc::new(AtomicBool::new(false)),
    })?)
}

/// Counts what this worker does after the warm-up.
struct Clock {
    warmup_steps: u64,
    /// When the last step of the warm-up was done.
    started: Instant,
    own: Own,
    /// From there to the end of the newest step.
    seconds: f64,
}

/// This worker's part of the batches.
#[derive(Default)]
struct Own {
    tokens: usize,
    examples: usize,
}

impl Watcher for Clock {
    fn batch_awaited(&mut self, _steps_done: u64) -> Result<()> {
        Ok(())
    }

    fn is_far_enough(&self, _steps_done: u64) -> bool {
        false
    }

    fn asks(&mut self, _steps_done: u64) -> Asks {
        Asks { stop: false, regroup: false, save: false }
    }

    fn before_update(&mut self) -> Result<()> {
        Ok(())
    }

    fn step_done(&mut self, batch: &StepBatch, report: &StepReport) -> Result<()> {
        if report.step <= self.warmup_steps {
            self.started = Instant::now();
            return Ok(());
        }
        self.own.tokens += batch.packs.iter().map(Pack::num_tokens).sum::<usize>();
        self.own.examples += batch.packs.iter().map(Pack::num_examples).sum::<usize>();
        self.seconds = self.started.elapsed().as_secs_f64();
        Ok(())
    }

    fn must_save_to_regroup(&self) -> bool {
        false
    }

    fn save_due(&self, _steps_done: u64) -> bool {
        false
    }

    fn save(&mut self, _trainer: &mut Trainer, _point: SavePoint) -> Result<()> {
        Ok(())
    }
}

fn line(options: &RecipeBenchOptions, trainer: &Trainer, clock: &Clock) -> String {
    let (recipe, seconds) = (trainer.recipe, clock.seconds);
    json!({
        "trainer": "cloze", "recipe": recipe.name, "parameters": trainer.model.parameters().num_parameters(),
        "device": recipe.train.device, "dtype": recipe.train.precision, "workers": options.workers, "steps": options.steps,
        "tokens": clock.own.tokens, "examples": clock.own.examples,
        "seconds": (seconds * 1e3).round() / 1e3,
        "tokens_per_s": (clock.own.tokens as f64 / seconds).round(),
        "examples_per_s": (clock.own.examples as f64 / seconds * 10.0).round() / 10.0,
        "step_ms": (seconds / options.steps as f64 * 1e5).round() / 100.0,
    })
    .to_string()
}
