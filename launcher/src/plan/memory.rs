//! How much memory one worker needs, from the recipe alone.
//!
//! The plan follows what the worker allocates (`src/model/`, `src/sharding/`, `src/torch/` of the root package), whose tests compare it with
//! what they measure. It is that of the worst pack: as many tokens as the recipe allows, each of them labelled.
//!
//! Shape legend: T tokens of a pack, E hidden width, F feed-forward width, D head width, H heads, V vocabulary.

use cloze_recipes::recipe::{Device, ModelShape, Precision, Shard, TrainRecipe};

/// Bytes of a float32.
const FLOAT: u64 = 4;
/// Bytes of a token id or a position.
const INTEGER: u64 = 8;
/// Every parameter begins at a multiple of this many floats.
const ALIGNMENT_FLOATS: u64 = 64;
/// A bucket of the exchange is closed when it holds this many floats.
const BUCKET_FLOATS_MIN: u64 = 1 << 20;
/// Numbers that travel with the gradients.
const EXTRA_FLOATS: u64 = 8;
/// Logits are computed in pieces of at most so many bytes of float32.
const LOGITS_BYTES_MAX_CPU: u64 = 32 << 20;
const LOGITS_BYTES_MAX_CUDA: u64 = 1 << 30;
/// Rotary tables grow in steps of this many positions.
const ROTARY_STEP: u64 = 1024;

/// Name of the part that is no tensor: the copy of its share that a worker makes for a checkpoint.
const CHECKPOINT_COPY: &str = "checkpoint copy";

/// Memory of one worker at its fullest moment, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// What for, and how much.
    pub parts: Vec<(&'static str, u64)>,
    /// All parts together.
    pub total: u64,
}

impl MemoryPlan {
    /// The tensors alone, without the copy for a checkpoint.
    pub fn tensors(&self) -> u64 {
        self.parts.iter().filter(|(name, _)| *name != CHECKPOINT_COPY).map(|(_, bytes)| bytes).sum()
    }
}

/// Number of parameters of a model.
pub fn parameters(shape: &ModelShape, vocab: u64) -> u64 {
    let sizes = Sizes::new(shape, vocab);
    sizes.matrices().iter().sum::<u64>() + sizes.vectors().iter().sum::<u64>()
}

/// The memory of one of `world_size` workers.
pub fn memory(shape: &ModelShape, vocab: u64, train: &TrainRecipe, world_size: u32) -> MemoryPlan {
    let sizes = Sizes::new(shape, vocab);
    let state = StateFloats::new(&sizes, train.shard, u64::from(world_size.max(1)));
    let pass = Pass::new(&sizes, train);
    let head = Moment { activations: pass.at_the_head(), extra_gradients: 0 };
    let backward = Moment { activations: pass.in_the_last_layer(), extra_gradients: state.first_bucket };
    let bytes = |moment: &Moment| moment.activations + state.pieces(pass.number, moment.extra_gradients);
    let fullest = if bytes(&head) >= bytes(&backward) { head } else { backward };
    let half = if pass.number == FLOAT || state.shard == Shard::Parameters { 0 } else { pass.number * state.values };
    let parts = vec![
        ("parameters", FLOAT * state.values + half),
        ("gradients", FLOAT * (state.gradients + EXTRA_FLOATS)),
        ("optimizer moments", 2 * FLOAT * state.moments),
        ("replica of a share", FLOAT * state.replica(train.replicate_shards)),
        ("buckets of the exchange", state.pieces(pass.number, fullest.extra_gradients)),
        ("activations", fullest.activations),
        (CHECKPOINT_COPY, 3 * FLOAT * state.all.div_ceil(state.world_size)),
    ];
    let total = parts.iter().map(|(_, bytes)| bytes).sum();
    MemoryPlan { parts, total }
}

/// A moment at which memory may be fullest.
struct Moment {
    activations: u64,
    /// Floats of gradients that are held beside those of the last bucket.
    extra_gradients: u64,
}

/// Extents of a model.
struct Sizes {
    hidden: u64,
    feed_forward: u64,
    num_layers: u64,
    num_heads: u64,
    vocab: u64,
    longest: u64,
}

impl Sizes {
    fn new(shape: &ModelShape, vocab: u64) -> Self {
        Self {
            hidden: shape.hidden_size.into(),
            feed_forward: shape.intermediate_size.into(),
            num_layers: shape.num_hidden_layers.into(),
            num_heads: shape.num_attention_heads.into(),
            vocab,
            longest: shape.max_position_embeddings.into(),
        }
    }

    /// Floats of each matrix in the order of the forward pass, the shared embedding first.
    fn matrices(&self) -> Vec<u64> {
        let (hidden, feed_forward) = (self.hidden, self.feed_forward);
        let layer = [3 * hidden * hidden, hidden * hidden, 2 * feed_forward * hidden, hidden * feed_forward];
        let layers = (0..self.num_layers).flat_map(|_| layer);
        [self.vocab * hidden].into_iter().chain(layers).chain([hidden * hidden]).collect()
    }

    /// Floats of each norm and bias: two norms a layer, of which the first layer lacks one, those of embedding, end and head, and the bias.
    fn vectors(&self) -> Vec<u64> {
        let num_norms = (2 * self.num_layers).saturating_sub(1) + 3;
        (0..num_norms).map(|_| self.hidden).chain([self.vocab]).collect()
    }
}

fn aligned(floats: u64) -> u64 {
    floats.next_multiple_of(ALIGNMENT_FLOATS)
}

/// Floats of the buffers that one worker holds.
struct StateFloats {
    shard: Shard,
    world_size: u64,
    /// The whole flat buffer.
    all: u64,
    values: u64,
    gradients: u64,
    moments: u64,
    /// Embedding, norms and biases, which a pass holds from its beginning to its end.
    last_bucket: u64,
    /// The bucket of the head and the last layer, whose gradients come first.
    first_bucket: u64,
    /// The largest of the others, of which a pass holds one at a time.
    largest_bucket: u64,
}

impl StateFloats {
    fn new(sizes: &Sizes, shard: Shard, world_size: u64) -> Self {
        let matrices: Vec<u64> = sizes.matrices().into_iter().map(aligned).collect();
        let rest: u64 = sizes.vectors().into_iter().map(aligned).sum();
        let buckets = buckets(&matrices[1..]);
        let segments = || buckets.iter().copied().chain([matrices[0], rest]);
        let all = segments().sum();
        let own: u64 = segments().map(|segment| segment.div_ceil(world_size)).sum();
        let held = |least: Shard| if shard >= least { own } else { all };
        Self {
            shard,
            world_size,
            all,
            values: held(Shard::Parameters),
            gradients: held(Shard::Gradients),
            moments: held(Shard::Optimizer),
            last_bucket: matrices[0] + rest,
            first_bucket: buckets.first().copied().unwrap_or(0),
            largest_bucket: buckets.iter().copied().max().unwrap_or(0),
        }
    }

    /// Floats of the replica of another worker's share: what is shared out, as that worker holds it.
    fn replica(&self, is_kept: bool) -> u64 {
        if !is_kept || self.world_size == 1 {
            return 0;
        }
        let of = |floats: u64, least: Shard| if self.shard >= least { floats } else { 0 };
        of(self.values, Shard::Parameters) + of(self.gradients, Shard::Gradients) + 2 * of(self.moments, Shard::Optimizer)
    }

    /// Bytes of what comes and goes during a pass; values are of `number` bytes.
    fn pieces(&self, number: u64, extra_gradients: u64) -> u64 {
        let gradients = FLOAT * (self.last_bucket + extra_gradients);
        // Where values are not float32, they are gathered as such first.
        let gathered = if number == FLOAT { 0 } else { FLOAT * self.largest_bucket };
        let values = number * (self.last_bucket + self.largest_bucket) + gathered;
        match self.shard {
            Shard::None | Shard::Optimizer => 0,
            Shard::Gradients => gradients,
            Shard::Parameters => gradients + values,
        }
    }
}

/// Floats of the buckets of these matrices, from the last layer to the first.
fn buckets(matrices: &[u64]) -> Vec<u64> {
    let mut buckets = Vec::new();
    let mut open = 0;
    for floats in matrices.iter().rev() {
        open += floats;
        if open >= BUCKET_FLOATS_MIN {
            buckets.push(std::mem::take(&mut open));
        }
    }
    if open > 0 {
        buckets.push(open);
    }
    buckets
}

/// What a forward and a backward pass hold, in bytes.
struct Pass {
    /// Bytes of a number in the compute precision.
    number: u64,
    /// T times E, and T times F.
    token_hidden: u64,
    token_feed_forward: u64,
    /// What the backward pass needs of all layers, and the pack itself.
    saved: u64,
    tokens: u64,
    hidden: u64,
    vocab: u64,
    logits_bytes_max: u64,
}

impl Pass {
    fn new(sizes: &Sizes, train: &TrainRecipe) -> Self {
        let number = match train.precision {
            Precision::Float32 => FLOAT,
            Precision::Bfloat16 => 2,
        };
        let logits_bytes_max = match train.device {
            Device::Cpu => LOGITS_BYTES_MAX_CPU,
            Device::Cuda => LOGITS_BYTES_MAX_CUDA,
        };
        let tokens = u64::from(train.micro_batch_tokens);
        let (token_hidden, token_feed_forward) = (tokens * sizes.hidden, tokens * sizes.feed_forward);
        // Of each layer: two sums and two norms, the rotated queries, keys and values, and what attention gives: eight times [T, E]; into and out
        // of the gated unit three times [T, F]; one number a token and head, and mean and deviation of each norm.
        let layer = number * (8 * token_hidden + 3 * token_feed_forward) + FLOAT * tokens * (sizes.num_heads + 4);
        Self {
            number,
            token_hidden,
            token_feed_forward,
            saved: sizes.num_layers * layer + pack(sizes, tokens),
            tokens,
            hidden: sizes.hidden,
            vocab: sizes.vocab,
            logits_bytes_max,
        }
    }

    /// While logits are computed: the sum before the last norm, and of the head its input, the product, the gelu, the norm and the gradient.
    fn at_the_head(&self) -> u64 {
        let rows = (self.logits_bytes_max / (FLOAT * self.vocab)).clamp(1, self.tokens.max(1));
        let beside_logits = (rows * self.hidden).max(self.vocab);
        // In 16 bits there are the logits twice, and the product for the weight's gradient is added as a whole.
        let (logits, product) = if self.number == FLOAT {
            (FLOAT * rows * self.vocab, FLOAT * beside_logits)
        } else {
            ((FLOAT + self.number) * rows * self.vocab, self.number * self.vocab * self.hidden)
        };
        self.saved + self.number * 6 * self.token_hidden + FLOAT * 4 * self.tokens + logits + product
    }

    /// While the backward pass is in the last layer: in its gated unit or, where that is narrow, in its attention.
    fn in_the_last_layer(&self) -> u64 {
        let (token_hidden, token_feed_forward) = (self.token_hidden, self.token_feed_forward);
        // Off the float32 path the gated unit has two more intermediate results.
        let intermediate = if self.number == FLOAT { 0 } else { 2 * token_feed_forward };
        let gated_unit = self.number * (token_hidden + 2 * token_feed_forward + intermediate);
        // The gradients of queries, keys and values, once more rotated back, the gradient of the output and of the residual stream; what the
        // feed-forward half of the layer had saved is gone.
        let attention = (self.number * 8 * token_hidden).saturating_sub(self.number * (2 * token_hidden + 3 * token_feed_forward));
        self.saved + gated_unit.max(attention)
    }
}

/// The pack and the rotary angles of its tokens, from tables for all positions.
fn pack(sizes: &Sizes, tokens: u64) -> u64 {
    let head_width = sizes.hidden / sizes.num_heads.max(1);
    let positions = tokens.min(sizes.longest).next_multiple_of(ROTARY_STEP);
    // Cosines and sines of the global and of the local layers, half a head wide.
    let rotary = 4 * (head_width / 2) * FLOAT * (tokens + positions);
    // Ids and positions; place, target and weight of each label.
    rotary + tokens * (4 * INTEGER + FLOAT)
}

#[cfg(test)]
mod tests {
    use cloze_recipes::raw::Preset;

    use super::*;

    fn train() -> TrainRecipe {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recipe.yaml");
        let text = "version: 1
name: plan
model: {preset: base, tokenizer: t}
data: {sources: [{url: corpus}], output: out, max_length: 128}
train: {steps: 10, batch_examples: 4, micro_batch_tokens: 8192, learning_rate: 1e-3}
";
        std::fs::write(&path, text).unwrap();
        cloze_recipes::load(&path, &[]).unwrap().train
    }

    fn plan(shard: Shard, world_size: u32) -> MemoryPlan {
        memory(&Preset::Base.shape(), 50_368, &TrainRecipe { shard, ..train() }, world_size)
    }

    fn part(plan: &MemoryPlan, name: &str) -> u64 {
        plan.parts.iter().find(|(part, _)| *part == name).unwrap().1
    }

    #[test]
    fn base_has_as_many_parameters_as_published() {
        // The decoder's bias and the head's matrix and norm are not part of the published number.
        let head = 768 * 768 + 768 + 50_368;
        assert_eq!(parameters(&Preset::Base.shape(), 50_368) - head, 149_014_272);
    }

    #[test]
    fn each_level_shares_out_what_it_says() {
        let all = part(&plan(Shard::None, 1), "parameters");
        for (shard, divided) in [
            (Shard::None, [false, false, false]),
            (Shard::Optimizer, [false, false, true]),
            (Shard::Gradients, [false, true, true]),
            (Shard::Parameters, [true, true, true]),
        ] {
            let plan = plan(shard, 4);
            let wholes = [("parameters", all), ("gradients", all), ("optimizer moments", 2 * all)];
            for ((name, whole), is_divided) in wholes.into_iter().zip(divided) {
                let expected = if is_divided { whole / 4 } else { whole };
                assert!(part(&plan, name).abs_diff(expected) < 4096, "{shard:?}: {name}");
            }
            assert_eq!(part(&plan, "buckets of the exchange") > 0, shard >= Shard::Gradients);
            assert_eq!(plan.total, plan.parts.iter().map(|(_, bytes)| bytes).sum::<u64>());
            assert_eq!(plan.total - plan.tensors(), part(&plan, CHECKPOINT_COPY));
        }
    }

    #[test]
    fn more_workers_never_need_more_memory_each() {
        for shard in [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters] {
            let totals: Vec<u64> = [1, 2, 3, 8, 64].map(|world_size| plan(shard, world_size).total).to_vec();
            assert!(totals.windows(2).all(|pair| pair[1] <= pair[0]), "{shard:?}: {totals:?}");
        }
    }

    #[test]
    fn activations_grow_with_the_pack_and_shrink_with_the_precision() {
        let train = train();
        let activations = |train: &TrainRecipe| part(&memory(&Preset::Base.shape(), 50_368, train, 1), "activations");
        let longer = TrainRecipe { micro_batch_tokens: 2 * train.micro_batch_tokens, ..train.clone() };
        let half = TrainRecipe { precision: Precision::Bfloat16, ..train.clone() };
        assert!(activations(&longer) > 3 * activations(&train) / 2);
        assert!(activations(&half) < 2 * activations(&train) / 3);
    }

    #[test]
    fn buckets_are_closed_as_the_worker_closes_them() {
        let million = BUCKET_FLOATS_MIN;
        assert_eq!(buckets(&[million / 2, million / 2, 5, million]), [million, 5 + million]);
        assert_eq!(buckets(&[7, 3 * million, 1]), [3 * million + 1, 7]);
        assert!(buckets(&[]).is_empty());
    }
}
