//! From facts to the numbers of a run.

use cloze_recipes::recipe::{CheckpointRecipe, Device, TrainRecipe};
use serde::Serialize;

use super::facts::{DataFacts, MachineFacts, PlanFacts, TrialFacts};
use super::memory::{MemoryPlan, memory, parameters};

/// Bytes of a stored value, and values of one parameter: the weight and two moments.
const STORED_BYTES: u64 = 4 * 3;
/// Files of a checkpoint beside the shares: config, tokenizer, manifest.
const COMPANION_FILES: u64 = 3;
/// Bytes of a token in a shard.
const TOKEN_BYTES: u64 = 4;
/// Bytes of text behind one token, about; English text and a vocabulary of 50,000.
const TEXT_BYTES_PER_TOKEN: u64 = 4;

/// What a run needs, in numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunPlan {
    /// Name of the recipe.
    pub name: String,
    /// Hash of the recipe.
    pub hash: String,
    /// Machines.
    pub nodes: u32,
    /// Workers over all machines, each one rank.
    pub workers: u32,
    /// Parameters of the model.
    pub parameters: u64,
    /// Steps; `None` while the data decides about them and is not prepared.
    pub steps: Option<u64>,
    /// Examples of a step.
    pub examples_per_step: u32,
    /// Tokens.
    pub tokens: TokenPlan,
    /// Passes over the data; `None` while it is not prepared.
    pub epochs: Option<f64>,
    /// Memory of one worker.
    pub memory: MemoryUse,
    /// Checkpoints.
    pub checkpoints: CheckpointPlan,
    /// Data on disk.
    pub data: DataPlan,
    /// Time; `None` where the speed or the number of steps is not known.
    pub time: Option<TimePlan>,
    /// All runs of the sweep together.
    pub sweep: Option<SweepPlan>,
}

/// Tokens of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TokenPlan {
    /// Tokens of a step.
    pub per_step: u64,
    /// Whether that is the longest that samples may be, and not what prepared samples have.
    pub is_upper_bound: bool,
    /// Tokens of the run.
    pub total: Option<u64>,
}

/// Memory of one worker at its fullest moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryUse {
    /// Device that must hold it.
    pub on_gpu: bool,
    /// What for, and how many bytes.
    pub parts: Vec<MemoryPart>,
    /// All parts that the device holds; on a GPU without the copy for a checkpoint, which lies in host memory.
    pub total_bytes: u64,
    /// What there is, in bytes.
    pub available_bytes: Option<u64>,
}

/// One use of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPart {
    /// What for.
    pub name: String,
    /// How much.
    pub bytes: u64,
}

/// Checkpoints of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckpointPlan {
    /// Bytes of one: weights and both moments.
    pub bytes: u64,
    /// Files of one.
    pub files: u64,
    /// Saves by step over the run; `None` while the number of steps is not known.
    pub saves: Option<u64>,
    /// Complete ones that are there at the same time, at most; `None` where `keep_every_steps` keeps more with every step, and the
    /// number of steps is not known.
    pub kept: Option<u64>,
    /// What the place must hold: those, and the one that is being written.
    pub place_bytes: Option<u64>,
    /// Bytes on the local disk of the leader's host.
    pub cache_bytes: u64,
}

/// Data of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DataPlan {
    /// Whether it is prepared.
    pub is_prepared: bool,
    /// Bytes of the record files, as stored.
    pub source_bytes: Option<u64>,
    /// Bytes of the shards: counted, or about as many as the sources could become.
    pub prepared_bytes: Option<u64>,
    /// Bytes that the preparation needs at its fullest moment, when parts and shards are there.
    pub preparation_bytes: Option<u64>,
}

/// Time of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TimePlan {
    /// Tokens that one worker trains on in a second.
    pub worker_tokens_per_second: f64,
    /// Seconds of training, if the workers do not slow each other down.
    pub seconds: f64,
    /// Jobs, one after another; `None` without a time limit.
    pub jobs: Option<u64>,
}

/// All runs of a sweep.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SweepPlan {
    /// Runs.
    pub trials: u64,
    /// Runs at the same time, at most.
    pub concurrency: u32,
    /// Workers at the same time, at most.
    pub workers: u64,
    /// Tokens of all runs.
    pub tokens: Option<u64>,
    /// Bytes of the checkpoints of all runs.
    pub place_bytes: Option<u64>,
    /// Seconds until the last run ends, if it is never waited for machines.
    pub seconds: Option<f64>,
    /// Seconds of one worker, times workers.
    pub worker_seconds: Option<f64>,
    /// Whether runs that fall behind are stopped, so that all this is the most that can come.
    pub stops_early: bool,
}

impl RunPlan {
    /// Computes the numbers. `steps` is what the data pipeline makes of recipe and samples; `None` while it cannot say.
    pub fn new(facts: &PlanFacts, steps: Option<u64>) -> Self {
        let recipe = &facts.recipe;
        let parameters = parameters(&facts.shape, facts.vocab);
        let tokens = tokens(facts, steps);
        let checkpoints = checkpoints(&recipe.checkpoint, parameters, facts.workers, steps);
        let time = time(tokens.total, facts.workers, &facts.machine);
        let epochs = match (facts.data, steps) {
            (DataFacts::Prepared { epoch_samples, .. }, Some(steps)) if epoch_samples > 0 => {
                Some(steps as f64 * f64::from(recipe.train.batch_examples) / epoch_samples as f64)
            }
            _ => recipe.train.epochs,
        };
        let mut plan = Self {
            name: recipe.name.clone(),
            hash: recipe.hash(),
            nodes: facts.nodes,
            workers: facts.workers,
            parameters,
            steps,
            examples_per_step: recipe.train.batch_examples,
            tokens,
            epochs,
            memory: memory_use(facts, &recipe.train),
            checkpoints,
            data: data(facts.data),
            time,
            sweep: None,
        };
        plan.sweep = facts.trials.map(|trials| sweep(&plan, trials));
        plan
    }
}

/// The memory of a worker with other settings of training than the recipe's.
pub(super) fn memory_use(facts: &PlanFacts, train: &TrainRecipe) -> MemoryUse {
    let plan: MemoryPlan = memory(&facts.shape, facts.vocab, train, facts.workers);
    let on_gpu = train.device == Device::Cuda;
    let total_bytes = if on_gpu { plan.tensors() } else { plan.total };
    let parts = plan.parts.into_iter().map(|(name, bytes)| MemoryPart { name: name.to_owned(), bytes }).collect();
    MemoryUse { on_gpu, parts, total_bytes, available_bytes: facts.machine.worker_memory_mib.map(|mib| mib << 20) }
}

fn tokens(facts: &PlanFacts, steps: Option<u64>) -> TokenPlan {
    let examples = u64::from(facts.recipe.train.batch_examples);
    let (per_step, is_upper_bound) = match facts.data {
        DataFacts::Prepared { samples, tokens, .. } if samples > 0 => {
            ((tokens as f64 / samples as f64 * examples as f64).round() as u64, false)
        }
        _ => (examples * u64::from(facts.recipe.data.max_length), true),
    };
    TokenPlan { per_step, is_upper_bound, total: steps.map(|steps| steps.saturating_mul(per_step)) }
}

fn checkpoints(recipe: &CheckpointRecipe, parameters: u64, workers: u32, steps: Option<u64>) -> CheckpointPlan {
    let bytes = STORED_BYTES * parameters;
    let index = u64::from(workers > 1);
    let files = 2 * u64::from(workers) + index + COMPANION_FILES;
    // The last step is always saved.
    let saves = steps.map(|steps| steps.div_ceil(recipe.every_steps.max(1)).max(1));
    let newest_and_best = u64::from(recipe.keep_last.max(2)) + u64::from(recipe.keep_best);
    let kept_for_good = match (recipe.keep_every_steps, steps) {
        (None, _) => Some(0),
        (Some(every), Some(steps)) => Some(steps / every.max(1)),
        (Some(_), None) => None,
    };
    let kept = kept_for_good.map(|for_good| {
        let most = newest_and_best + for_good;
        // With `every_seconds` there are saves beside those by step.
        if recipe.every_seconds.is_some() { most } else { saves.map_or(most, |saves| most.min(saves)) }
    });
    CheckpointPlan {
        bytes,
        files,
        saves,
        kept,
        place_bytes: kept.map(|kept| bytes.saturating_mul(kept + 1)),
        cache_bytes: if recipe.cache.is_some() { bytes } else { 0 },
    }
}

fn data(facts: DataFacts) -> DataPlan {
    match facts {
        DataFacts::Prepared { bytes, .. } => {
            DataPlan { is_prepared: true, source_bytes: None, prepared_bytes: Some(bytes), preparation_bytes: None }
        }
        DataFacts::Sources { stored_bytes, text_bytes } => {
            let prepared = text_bytes / TEXT_BYTES_PER_TOKEN * TOKEN_BYTES;
            DataPlan {
                is_prepared: false,
                source_bytes: Some(stored_bytes),
                prepared_bytes: Some(prepared),
                preparation_bytes: Some(2 * prepared),
            }
        }
        DataFacts::Unknown => DataPlan { is_prepared: false, source_bytes: None, prepared_bytes: None, preparation_bytes: None },
    }
}

fn time(tokens: Option<u64>, workers: u32, machine: &MachineFacts) -> Option<TimePlan> {
    let rate = machine.tokens_per_second.filter(|rate| *rate > 0.0)?;
    let seconds = tokens? as f64 / (rate * f64::from(workers.max(1)));
    let job_s = machine.time_limit_minutes.map(|minutes| (f64::from(minutes) * 60.0 - f64::from(machine.warning_s)).max(1.0));
    Some(TimePlan { worker_tokens_per_second: rate, seconds, jobs: job_s.map(|job_s| ((seconds / job_s).ceil() as u64).max(1)) })
}

fn sweep(plan: &RunPlan, facts: TrialFacts) -> SweepPlan {
    let TrialFacts { trials, concurrency, stops_early, .. } = facts;
    let at_once = u64::from(concurrency.max(1)).min(trials);
    let rounds = trials.div_ceil(at_once.max(1));
    let seconds = plan.time.as_ref().map(|time| time.seconds);
    SweepPlan {
        trials,
        concurrency,
        workers: at_once * u64::from(plan.workers),
        tokens: plan.tokens.total.map(|tokens| tokens.saturating_mul(trials)),
        place_bytes: plan.checkpoints.place_bytes.map(|bytes| bytes.saturating_mul(trials)),
        seconds: seconds.map(|seconds| seconds * rounds as f64),
        worker_seconds: seconds.map(|seconds| seconds * trials as f64 * f64::from(plan.workers)),
        stops_early,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::sample::facts;

    #[test]
    fn tokens_are_counted_or_bounded() {
        let mut facts = facts();
        let plan = RunPlan::new(&facts, Some(1000));
        assert_eq!(plan.tokens, TokenPlan { per_step: 12_800, is_upper_bound: true, total: Some(12_800_000) });
        assert_eq!(plan.epochs, None);
        facts.data = DataFacts::Prepared { samples: 50_000, epoch_samples: 50_000, tokens: 1_000_000, bytes: 7 };
        let plan = RunPlan::new(&facts, Some(1000));
        assert_eq!(plan.tokens, TokenPlan { per_step: 2000, is_upper_bound: false, total: Some(2_000_000) });
        assert_eq!((plan.epochs, plan.data.prepared_bytes), (Some(2.0), Some(7)));
        facts.data = DataFacts::Prepared { samples: 50_000, epoch_samples: 20_000, tokens: 1_000_000, bytes: 7 };
        let capped = RunPlan::new(&facts, Some(1000));
        assert_eq!((capped.epochs, capped.tokens), (Some(5.0), plan.tokens));
        assert_eq!(RunPlan::new(&facts, None).tokens.total, None);
    }

    #[test]
    fn checkpoints_take_the_place_of_those_that_are_kept_and_one_more() {
        let recipe = facts().recipe.checkpoint;
        let of = |change: &dyn Fn(&mut CheckpointRecipe), steps| {
            let mut recipe = recipe.clone();
            change(&mut recipe);
            let plan = checkpoints(&recipe, 1000, 4, steps);
            (plan.saves, plan.kept, plan.place_bytes)
        };
        // (what, steps, saves, kept)
        let cases: [(&dyn Fn(&mut CheckpointRecipe), Option<u64>, Option<u64>, Option<u64>); 6] = [
            (&|_| {}, Some(1000), Some(4), Some(3)),
            (&|_| {}, Some(300), Some(1), Some(1)),
            (&|_| {}, None, None, Some(3)),
            (&|recipe| recipe.keep_best = 2, Some(3000), Some(10), Some(5)),
            (&|recipe| recipe.keep_every_steps = Some(600), Some(3000), Some(10), Some(8)),
            (&|recipe| recipe.keep_every_steps = Some(600), None, None, None),
        ];
        for (place, (change, steps, saves, kept)) in cases.into_iter().enumerate() {
            assert_eq!(of(change, steps), (saves, kept, kept.map(|kept| 12_000 * (kept + 1))), "case {place}");
        }
        assert_eq!(checkpoints(&recipe, 1000, 1, None).files, 5);
        assert_eq!(checkpoints(&recipe, 1000, 4, None).files, 12);
    }

    #[test]
    fn time_is_tokens_over_the_speed_of_all_workers_and_jobs_end_before_their_limit() {
        let machine = |limit, warning_s| MachineFacts {
            tokens_per_second: Some(100.0),
            time_limit_minutes: limit,
            warning_s,
            ..MachineFacts::default()
        };
        let jobs = |limit, warning_s| time(Some(40_000), 4, &machine(limit, warning_s)).unwrap().jobs;
        assert!((time(Some(40_000), 4, &machine(None, 0)).unwrap().seconds - 100.0).abs() < 1e-9);
        assert_eq!([jobs(None, 0), jobs(Some(2), 0), jobs(Some(1), 0), jobs(Some(1), 30)], [None, Some(1), Some(2), Some(4)]);
        assert_eq!(time(None, 4, &machine(None, 0)), None);
        assert_eq!(time(Some(1), 4, &MachineFacts::default()), None);
    }

    #[test]
    fn a_sweep_is_all_its_trials() {
        let mut facts = facts();
        facts.machine.tokens_per_second = Some(1000.0);
        facts.trials = Some(TrialFacts { trials: 10, concurrency: 4, pack: 2, stops_early: false });
        let plan = RunPlan::new(&facts, Some(1000));
        let one = plan.time.as_ref().unwrap().seconds;
        let sweep = plan.sweep.unwrap();
        // Four at the same time, with four workers each: packed ones share a machine, but no workers.
        assert_eq!((sweep.workers, sweep.tokens), (16, Some(128_000_000)));
        assert_eq!((sweep.seconds, sweep.worker_seconds), (Some(3.0 * one), Some(40.0 * one)));
        assert_eq!(sweep.place_bytes, plan.checkpoints.place_bytes.map(|bytes| 10 * bytes));
    }
}
