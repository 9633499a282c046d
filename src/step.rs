//! One optimizer step: forward and backward of this worker's packs, the sum over the workers, the update.

use anyhow::{Result, ensure};
use cloze_data::batch::Pack;
use cloze_recipes::recipe::{LossNorm, Recipe, Shard, TrainRecipe};
use tch::{Device, Kind, Tensor};

use crate::batch_feed::StepBatch;
use crate::checkpoint::Loaded;
use crate::collective::Collective;
use crate::model::config::Config;
use crate::model::modernbert::{ModernBert, Placement};
use crate::model::packed::{Labelled, PackedInput};
use crate::model::parameters::Division;
use crate::optim::adamw::{AdamW, LossSums};
use crate::optim::schedule::Schedule;
use crate::sharding::buckets::BUCKET_FLOATS_MIN;
use crate::sharding::exchange::Exchange;
use crate::sharding::layout::SharePlace;
use crate::sharding::pass::{Buffers, Overlap, pass};
use crate::sharding::survivors::{self, Mine, Summed};
use crate::sharding::{state, update};
use crate::torch::memory::{self, Readback};

pub use crate::sharding::state::{Group, SharePart};

/// Steps after which a worker says how much memory its tensors needed: by then everything that a step does has happened.
const STEPS_BEFORE_MEMORY_REPORT: u64 = 10;

/// Places of the numbers behind the gradients.
const EXTRA_LOSS: i64 = 0;
const EXTRA_DENOMINATOR: i64 = 1;
const EXTRA_LABELS: i64 = 2;
const EXTRA_STOP: i64 = 3;
const EXTRA_REGROUP: i64 = 4;
const EXTRA_SAVE: i64 = 5;

/// The state that training changes: parameters and moments, or this worker's shard of them.
pub struct State {
    /// Parameters and gradients.
    pub model: ModernBert,
    /// Moments and number of steps.
    pub optimizer: AdamW,
    /// What the gradients hold, where the state is shared out.
    pub summed: Option<Summed>,
}

impl State {
    /// A zeroed state for this worker's place among the others.
    pub fn new(recipe: &TrainRecipe, config: Config, placement: Placement, place: SharePlace) -> Result<Self> {
        let SharePlace { rank, world_size, replica_distance } = place;
        let division = Division { shard: recipe.shard, rank, world_size, replica_distance, bucket_floats_min: BUCKET_FLOATS_MIN };
        Self::divided(recipe, config, placement, &division)
    }

    /// Which part of the state this is; `None` where every worker holds the whole.
    pub fn place(&self) -> Option<SharePlace> {
        let parameters = self.model.parameters();
        (parameters.shard() != Shard::None).then(|| SharePlace::of(parameters.layout(), parameters.replica()))
    }

    /// As [`State::new`], with buckets of another size.
    pub fn divided(recipe: &TrainRecipe, config: Config, placement: Placement, division: &Division) -> Result<Self> {
        let model = ModernBert::divided(config, placement, division)?;
        let optimizer = AdamW::new(model.parameters(), recipe.into());
        Ok(Self { model, optimizer, summed: None })
    }
}

/// Everything that a step changes, and what it is computed from.
pub struct Trainer<'a> {
    /// The other workers. It stands first, so that it is dropped first: nobody may write into memory that is given back.
    pub collective: Box<dyn Collective>,
    /// The recipe of the run.
    pub recipe: &'a Recipe,
    /// Parameters and gradients.
    pub model: ModernBert,
    /// Optimizer state.
    pub optimizer: AdamW,
    /// Learning rate.
    pub schedule: Schedule,
    /// How the state is exchanged with them.
    pub sharding: Sharding,
}

/// What a trainer knows about the exchange of its state.
#[derive(Debug)]
pub struct Sharding {
    buffers: Buffers,
    is_whole: bool,
    summed: Option<Summed>,
    steps_taken: u64,
    overlap: Overlap,
}

impl<'a> Trainer<'a> {
    /// Brings a state and the other workers together. A state that is shared out must have been made for the same place in the world.
    pub fn new(recipe: &'a Recipe, state: State, schedule: Schedule, collective: Box<dyn Collective>) -> Result<Self> {
        let State { model, optimizer, summed } = state;
        let parameters = model.parameters();
        let place = (collective.rank(), collective.world_size());
        let made_for = parameters.layout().rank_of();
        ensure!(
            parameters.shard() == Shard::None || made_for == place,
            "the state is for rank {} of {}, this worker is rank {} of {}",
            made_for.0,
            made_for.1,
            place.0,
            place.1
        );
        let buffers = Buffers::new(parameters)?;
        let sharding = Sharding { buffers, is_whole: true, summed, steps_taken: 0, overlap: Overlap::default() };
        Ok(Self { collective, recipe, model, optimizer, schedule, sharding })
    }

    /// The state, for the next generation.
    pub fn into_state(self) -> State {
        let Self { collective, model, optimizer, sharding, .. } = self;
        drop(collective);
        State { model, optimizer, summed: sharding.summed }
    }

    /// What this worker writes into a checkpoint; the parts of all workers together are the state.
    pub fn share(&self) -> Result<Vec<SharePart>> {
        state::share(self.model.parameters(), &self.optimizer, self.collective.rank(), self.collective.world_size())
    }

    /// Gives the state to all workers, which all call this: from the root's checkpoint, or from its memory.
    pub fn distribute(&mut self, loaded: Option<&Loaded>, root: usize) -> Result<()> {
        // A root that gives its own state changes nothing of it.
        if self.collective.rank() != root || loaded.is_some() {
            self.sharding.is_whole = false;
            self.sharding.summed = None;
        }
        state::distribute(self.model.parameters_mut(), &self.optimizer, self.collective.as_mut(), loaded, root)?;
        self.sharding.is_whole = true;
        Ok(())
    }

    /// Gives every worker its shares of a state that `old_world_size` ranks have shared out, from what the workers hold; all of them call this.
    /// Returns the old ranks whose shares are lost, on all of them, and has then changed nothing.
    pub fn deal(&mut self, mine: Mine, old_world_size: usize) -> Result<Vec<usize>> {
        // Who has all changes nothing of it.
        if !matches!(mine, Mine::All) {
            self.sharding.is_whole = false;
            self.sharding.summed = None;
        }
        let parameters = self.model.parameters_mut();
        let lost = survivors::deal(parameters, &self.optimizer, self.collective.as_mut(), mine, old_world_size)?;
        self.sharding.is_whole = true;
        Ok(lost)
    }

    /// Says how much of the exchange the passes have hidden, where that was measured.
    pub fn log_overlap(&self) {
        let Sharding { overlap, steps_taken, .. } = &self.sharding;
        if let Some(hidden_share) = overlap.hidden_share() {
            let (exchange_s, exposed_s) = (overlap.exchange_s, overlap.exposed_s);
            tracing::info!(steps = steps_taken, exchange_s, exposed_s, hidden_share, "exchange of gradients beside the backward pass");
        }
    }

    /// Whether parameters and moments belong to one step. They do not after an error in the midst of an update, of
    /// [`Trainer::distribute`] or of [`Trainer::deal`].
    pub fn state_is_whole(&self) -> bool {
        self.sharding.is_whole
    }
}

/// What a worker wants at the end of a step; agreed as soon as one of them wants it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asks {
    /// The run is to stop.
    pub stop: bool,
    /// Another generation is to go on.
    pub regroup: bool,
    /// A checkpoint is to be saved.
    pub save: bool,
}

/// What came of a step.
#[derive(Debug)]
pub struct StepOutcome {
    /// Loss, denominator, labels and gradient norm, summed over the workers, on their way to the host. A loss or norm that is not finite
    /// means that nothing was changed.
    pub numbers: Readback,
    /// What the workers agreed on.
    pub agreed: Asks,
    /// Whether all workers have the new values, where each updates a share of them. The step is done in any case.
    pub spread: Result<()>,
    /// This worker's own sum of losses, a scalar on the device.
    pub local_loss: Tensor,
}

/// Takes one step. `before_update` is called once, right before parameters or moments change.
///
/// # Errors
/// That of a pass, of the exchange or of `before_update`. The state is then as before, except where [`Trainer::state_is_whole`] says otherwise.
pub fn train_step(
    trainer: &mut Trainer,
    batch: &StepBatch,
    asks: Asks,
    before_update: &mut dyn FnMut() -> Result<()>,
) -> Result<StepOutcome> {
    if trainer.sharding.steps_taken == 0 {
        memory::reset_peak();
    }
    let agreement = agree_ahead(trainer, batch.packs.len(), asks)?;
    let extras = zero_gradients(trainer)?;
    let local_loss = Tensor::f_zeros([] as [i64; 0], (Kind::Float, trainer.model.device()))?;
    let sums = Sums { extras: &extras, local_loss: &local_loss };
    sums.start(trainer.recipe, &batch.packs, asks)?;
    let num_rounds = agreement.as_ref().map_or(1, |agreement| agreement.num_rounds);
    run_passes(trainer, &batch.packs, num_rounds, &sums)?;
    let agreed = match agreement {
        Some(agreement) => agreement.asks,
        None => sums.asks()?,
    };
    let learning_rate = trainer.schedule.learning_rate(batch.step);
    let Updated { norm, spread } = update_state(trainer, &sums, (batch.step, learning_rate), before_update)?;
    trainer.sharding.steps_taken += 1;
    if trainer.sharding.steps_taken == STEPS_BEFORE_MEMORY_REPORT {
        tracing::info!(bytes = memory::peak_allocated(), steps = STEPS_BEFORE_MEMORY_REPORT, "most host memory of tensors at a time");
    }
    let numbers = tch::no_grad(|| Tensor::f_cat(&[extras.narrow(0, 0, EXTRA_LABELS + 1), norm.view([1])], 0))?;
    Ok(StepOutcome { numbers: Readback::start(&numbers)?, agreed, spread, local_loss })
}

/// What the workers know of each other before the step.
struct Agreement {
    asks: Asks,
    /// Passes of the worker that has the most packs.
    num_rounds: usize,
}

/// Agrees with the others where that cannot wait for the numbers behind the gradients: because each pass is exchanged, so that all workers take
/// part in as many, or because those numbers are on a GPU, which the host does not wait for.
fn agree_ahead(trainer: &mut Trainer, num_packs: usize, asks: Asks) -> Result<Option<Agreement>> {
    let (rank, world_size) = (trainer.collective.rank(), trainer.collective.world_size());
    if world_size == 1 {
        return Ok(Some(Agreement { asks, num_rounds: num_packs }));
    }
    if trainer.model.device() == Device::Cpu && !exchanges_each_pass(trainer) {
        return Ok(None);
    }
    let mut wishes = asks.floats().to_vec();
    let mut counts = vec![0.0; world_size];
    counts[rank] = num_packs as f32;
    wishes.append(&mut counts);
    trainer.collective.all_reduce_sum(&mut wishes)?;
    let (wishes, counts) = wishes.split_at(asks.floats().len());
    let num_rounds = counts.iter().copied().fold(0.0, f32::max) as usize;
    Ok(Some(Agreement { asks: Asks::from_sums(wishes), num_rounds }))
}

/// Whether no gradient may wait for the last pass.
fn exchanges_each_pass(trainer: &Trainer) -> bool {
    trainer.model.parameters().shard() >= Shard::Gradients
}

impl Asks {
    fn floats(self) -> [f32; 3] {
        [self.stop, self.regroup, self.save].map(|asked| f32::from(u8::from(asked)))
    }

    /// From the sums over the workers, in the order of [`Asks::floats`].
    fn from_sums(sums: &[f32]) -> Self {
        let asked = |place: usize| sums.get(place).is_some_and(|&sum| sum > 0.0);
        Self { stop: asked(0), regroup: asked(1), save: asked(2) }
    }
}

/// Zeroes gradients and extras; returns the extras.
fn zero_gradients(trainer: &mut Trainer) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    trainer.sharding.summed = None;
    let parameters = trainer.model.parameters();
    drop(parameters.gradients()?.shallow_clone().f_zero_()?);
    parameters.extras()
}

/// What is added up beside the gradients.
struct Sums<'a> {
    /// The numbers behind the gradients; summed over the workers when the passes are done.
    extras: &'a Tensor,
    /// This worker's loss alone.
    local_loss: &'a Tensor,
}

impl Sums<'_> {
    /// Writes what this worker's packs add to the denominator and the counts, and what it asks.
    fn start(&self, recipe: &Recipe, packs: &[Pack], asks: Asks) -> Result<()> {
        let labels: usize = packs.iter().map(Pack::num_labels).sum();
        let examples: usize = packs.iter().map(Pack::num_examples).sum();
        let mut numbers = vec![0.0_f32; self.extras.numel()];
        numbers[EXTRA_DENOMINATOR as usize] = match recipe.objective.loss_norm {
            LossNorm::TokenMean => labels as f32,
            LossNorm::PerExample => examples as f32,
        };
        numbers[EXTRA_LABELS as usize] = labels as f32;
        for (place, asked) in [EXTRA_STOP, EXTRA_REGROUP, EXTRA_SAVE].into_iter().zip(asks.floats()) {
            numbers[place as usize] = asked;
        }
        let _guard = tch::no_grad_guard();
        let mut extras = self.extras.shallow_clone();
        extras.f_copy_(&memory::to_device(Tensor::f_from_slice(&numbers)?, extras.device())?)?;
        Ok(())
    }

    /// Forward and backward of one pack: adds its gradients to the model's and its loss to the sums.
    fn add_pack(&self, model: &ModernBert, pack: &Pack) -> Result<()> {
        let input = PackedInput::new(&pack.input_ids, &pack.lengths, model.device())?;
        let labelled = Labelled::new(&pack.labels, &pack.label_weights, model.device())?;
        let loss_sum = model.loss_sum(&input, &labelled)?;
        loss_sum.f_backward()?;
        let _guard = tch::no_grad_guard();
        let loss = loss_sum.detach();
        let _ = self.extras.f_narrow(0, EXTRA_LOSS, 1)?.f_add_(&loss)?;
        let _ = self.local_loss.shallow_clone().f_add_(&loss)?;
        Ok(())
    }

    /// What the workers agreed on, from numbers in host memory.
    fn asks(&self) -> Result<Asks> {
        let numbers = Vec::<f32>::try_from(self.extras)?;
        Ok(Asks::from_sums(&numbers[EXTRA_STOP as usize..=EXTRA_SAVE as usize]))
    }
}

/// Loss and denominator out of the summed numbers behind the gradients.
pub fn loss_sums(extras: &Tensor) -> Result<LossSums> {
    let _guard = tch::no_grad_guard();
    let scalar = |place| -> Result<Tensor> { Ok(extras.f_narrow(0, place, 1)?.f_squeeze()?) };
    Ok(LossSums { loss: scalar(EXTRA_LOSS)?, denominator: scalar(EXTRA_DENOMINATOR)? })
}

/// Runs all packs and sums gradients and extras over the workers.
///
/// Where gradients stay in one buffer, packs add up in it and the sum over the workers goes with the last pass; else with each.
fn run_passes(trainer: &mut Trainer, packs: &[Pack], num_rounds: usize, sums: &Sums) -> Result<()> {
    let each_pass = exchanges_each_pass(trainer);
    let Trainer { model, collective, sharding, .. } = trainer;
    let model = &*model;
    let is_alone = collective.world_size() == 1 && model.parameters().shard() == Shard::None;
    let num_before = if each_pass { 0 } else { packs.len().saturating_sub(usize::from(!is_alone)) };
    let (before, exchanged) = packs.split_at(num_before);
    before.iter().try_for_each(|pack| sums.add_pack(model, pack))?;
    if is_alone {
        return Ok(());
    }
    let mut exchange = Exchange::new(model.parameters(), collective.as_mut())?;
    let num_rounds = if each_pass { num_rounds } else { 1 };
    for round in 0..num_rounds {
        match exchanged.get(round) {
            Some(pack) => pass(&mut exchange, &sharding.buffers, &mut sharding.overlap, &mut || sums.add_pack(model, pack))?,
            None => exchange.stand_in()?,
        }
    }
    exchange.sum_extras()
}

/// What an update came to.
struct Updated {
    /// Norm of the gradients before clipping.
    norm: Tensor,
    /// Whether the others' new values arrived.
    spread: Result<()>,
}

/// Updates parameters and moments, or leaves them as they are where loss or norm is not finite.
///
/// Where they are shared out, the norm comes last of what the workers exchange before it: who has it knows that all others have everything else.
fn update_state(
    trainer: &mut Trainer,
    sums: &Sums,
    (steps_done, learning_rate): (u64, f64),
    before_update: &mut dyn FnMut() -> Result<()>,
) -> Result<Updated> {
    let Trainer { model, optimizer, collective, sharding, .. } = trainer;
    let parameters = model.parameters_mut();
    let mut parts = update::parts(parameters)?;
    update::gather_replica_sums(parameters, collective.as_mut())?;
    if parameters.shard() != Shard::None {
        sharding.summed = Some(Summed { steps_done, norm: None });
    }
    let norm = update::gradient_norm(parameters, &parts, collective.as_mut())?;
    let verdict = optimizer.judge(&norm, &loss_sums(sums.extras)?)?;
    before_update()?;
    parts.append(&mut update::replica_parts(parameters)?);
    sharding.is_whole = false;
    optimizer.update(&parts, &verdict, learning_rate)?;
    sharding.is_whole = true;
    if let Some(summed) = &mut sharding.summed {
        summed.norm = Some(norm);
    }
    let spread = update::spread_values(parameters, collective.as_mut());
    parameters.refresh();
    Ok(Updated { norm: verdict.norm, spread })
}
