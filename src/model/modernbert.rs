//! `ModernBERT` with its masked-language-model head, over packed tokens.
//!
//! Source: Warner et al., "Smarter, Better, Faster, Longer" (2024), and the modelling file of Hugging Face transformers, whose parameter names it keeps.
//! Each layer is `x += attention(norm(x)); x += geglu(norm(x))`; every third layer attends to the whole document, the others to a window.
//!
//! Shape legend: T tokens of a pack, E hidden width, F feed-forward width, V vocabulary, N labelled positions, P rows of a rotary table.

use std::cell::RefCell;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::config::Config;
use super::packed::{Labelled, PackedInput};
use super::parameters::{Division, FlatParameters, Init, Specification};
use crate::torch::ops::{self, AttentionPlan, Parameter};

/// Rotary tables grow in steps of this many positions.
const ROTARY_STEP: i64 = 1024;

/// A `ModernBERT` on one device.
#[derive(Debug)]
pub struct ModernBert {
    config: Config,
    device: Device,
    parameters: FlatParameters,
    weights: Weights,
    rotary: RefCell<Option<RotaryTables>>,
    force_plain_attention: bool,
}

/// Views into the flat buffers, in the order of the computation.
#[derive(Debug)]
struct Weights {
    embedding: Parameter,
    embedding_norm: Parameter,
    layers: Vec<LayerWeights>,
    final_norm: Parameter,
    head_dense: Parameter,
    head_norm: Parameter,
    decoder_bias: Parameter,
}

#[derive(Debug)]
struct LayerWeights {
    /// `None` in the first layer, which follows the embedding's norm.
    attention_norm: Option<Parameter>,
    qkv: Parameter,
    attention_out: Parameter,
    feed_forward_norm: Parameter,
    feed_forward_in: Parameter,
    feed_forward_out: Parameter,
}

/// Cosines and sines `[P, D/2]` of the global and the local layers.
#[derive(Debug)]
struct RotaryTables {
    positions: i64,
    global: [Tensor; 2],
    local: [Tensor; 2],
}

/// How a model is held.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    /// Where the tensors are.
    pub device: Device,
    /// Whether there is a gradient buffer.
    pub trainable: bool,
    /// Whether products are in bfloat16.
    pub bfloat16: bool,
}

impl ModernBert {
    /// A model with zeroed parameters; follow with `parameters_mut().initialise` or `.load`.
    pub fn new(config: Config, placement: Placement) -> Result<Self> {
        Self::divided(config, placement, &Division::WHOLE)
    }

    /// What one worker holds of a model, zeroed.
    pub fn divided(config: Config, placement: Placement, division: &Division) -> Result<Self> {
        let parameters = FlatParameters::zeros(specifications(&config), placement, division)?;
        let weights = Weights::view(&config, &parameters)?;
        Ok(Self { config, device: placement.device, parameters, weights, rotary: RefCell::new(None), force_plain_attention: false })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the tensors are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The parameters.
    pub fn parameters(&self) -> &FlatParameters {
        &self.parameters
    }

    /// The parameters, to be changed.
    pub fn parameters_mut(&mut self) -> &mut FlatParameters {
        &mut self.parameters
    }

    /// Takes the plain attention path everywhere; the reference in tests.
    #[cfg(test)]
    pub fn force_plain_attention(&mut self) {
        self.force_plain_attention = true;
    }

    /// Final hidden states `[T, E]` of a pack.
    pub fn hidden(&self, input: &PackedInput) -> Result<Tensor> {
        let [global, local] = self.rotary(input);
        let epsilon = self.config.norm_epsilon;
        let mut x_te = ops::layer_norm(&ops::embed(&input.ids, &self.weights.embedding)?, &self.weights.embedding_norm, epsilon)?;
        // The block output that is not yet part of the residual stream; adding it and taking the next norm is one operation.
        let mut pending_te: Option<Tensor> = None;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let is_global = self.config.is_global(index as i64);
            let plan = self.attention_plan(input, if is_global { &global } else { &local }, is_global);
            let normed_te = match (&layer.attention_norm, pending_te.take()) {
                (Some(norm), Some(delta_te)) => {
                    let (sum_te, normed_te) = ops::add_layer_norm(&x_te, &delta_te, norm, epsilon)?;
                    x_te = sum_te;
                    normed_te
                }
                (Some(norm), None) => ops::layer_norm(&x_te, norm, epsilon)?,
                (None, _) => x_te.shallow_clone(),
            };
            let attended_te = ops::linear(&ops::attention(&ops::linear(&normed_te, &layer.qkv)?, &plan)?, &layer.attention_out)?;
            let (sum_te, normed_te) = ops::add_layer_norm(&x_te, &attended_te, &layer.feed_forward_norm, epsilon)?;
            x_te = sum_te;
            pending_te = Some(ops::linear(&ops::geglu(&ops::linear(&normed_te, &layer.feed_forward_in)?)?, &layer.feed_forward_out)?);
        }
        match pending_te {
            Some(delta_te) => Ok(ops::add_layer_norm(&x_te, &delta_te, &self.weights.final_norm, epsilon)?.1),
            None => ops::layer_norm(&x_te, &self.weights.final_norm, epsilon),
        }
    }

    /// Logits `[N, V]` float32 at some rows of the hidden states.
    pub fn logits(&self, hidden_ne: &Tensor) -> Result<Tensor> {
        let h_ne = self.head(hidden_ne)?;
        let weight_ve = &self.weights.embedding.value;
        Ok(h_ne.f_linear(weight_ve, Some(&self.weights.decoder_bias.value))?.to_kind(Kind::Float))
    }

    /// Weighted sum of the cross entropy over the labelled positions, a float32 scalar; its gradients go to the flat buffer.
    pub fn loss_sum(&self, input: &PackedInput, labelled: &Labelled) -> Result<Tensor> {
        let hidden_ne = self.hidden(input)?.f_index_select(0, &labelled.position)?;
        let h_ne = self.head(&hidden_ne)?;
        ops::head_loss(&h_ne, &self.weights.embedding, &self.weights.decoder_bias, &labelled.targets)
    }

    /// Transform before the decoder: dense, gelu, norm.
    fn head(&self, hidden_ne: &Tensor) -> Result<Tensor> {
        let dense_ne = ops::linear(hidden_ne, &self.weights.head_dense)?.f_gelu("none")?;
        ops::layer_norm(&dense_ne, &self.weights.head_norm, self.config.norm_epsilon)
    }

    fn attention_plan<'a>(&self, input: &'a PackedInput, rotary: &'a [Tensor; 2], is_global: bool) -> AttentionPlan<'a> {
        AttentionPlan {
            cos: &rotary[0],
            sin: &rotary[1],
            cu_lengths: &input.cu_lengths,
            cu_lengths_host: &input.cu_lengths_host,
            num_heads: self.config.num_heads,
            window: (!is_global).then_some(self.config.local_window),
            force_plain: self.force_plain_attention,
        }
    }

    /// Angles of every token: global and local, each cosines and sines `[T, D/2]`.
    fn rotary(&self, input: &PackedInput) -> [[Tensor; 2]; 2] {
        let mut tables = self.rotary.borrow_mut();
        if tables.as_ref().is_none_or(|tables| tables.positions < input.longest) {
            let positions = (input.longest + ROTARY_STEP - 1) / ROTARY_STEP * ROTARY_STEP;
            let table = |theta| rotary_table(theta, positions, self.config.head_width(), self.device);
            *tables = Some(RotaryTables { positions, global: table(self.config.global_theta), local: table(self.config.local_theta) });
        }
        let select = |table: &[Tensor; 2]| table.each_ref().map(|t| t.index_select(0, &input.positions));
        match tables.as_ref() {
            Some(tables) => [select(&tables.global), select(&tables.local)],
            None => unreachable!("the tables were made above"),
        }
    }
}

impl Weights {
    fn view(config: &Config, parameters: &FlatParameters) -> Result<Self> {
        let get = |name: &str| parameters.parameter(name);
        let layers = (0..config.num_layers).map(|layer| LayerWeights::view(layer, parameters)).collect::<Result<_>>()?;
        Ok(Self {
            embedding: get("model.embeddings.tok_embeddings.weight")?,
            embedding_norm: get("model.embeddings.norm.weight")?,
            layers,
            final_norm: get("model.final_norm.weight")?,
            head_dense: get("head.dense.weight")?,
            head_norm: get("head.norm.weight")?,
            decoder_bias: get("decoder.bias")?,
        })
    }
}

impl LayerWeights {
    fn view(layer: i64, parameters: &FlatParameters) -> Result<Self> {
        let get = |name: &str| parameters.parameter(&format!("model.layers.{layer}.{name}.weight"));
        Ok(Self {
            attention_norm: if layer == 0 { None } else { Some(get("attn_norm")?) },
            qkv: get("attn.Wqkv")?,
            attention_out: get("attn.Wo")?,
            feed_forward_norm: get("mlp_norm")?,
            feed_forward_in: get("mlp.Wi")?,
            feed_forward_out: get("mlp.Wo")?,
        })
    }
}

/// Names, shapes and first values: truncated normals, 0.02 into a block and `0.02 / sqrt(2 L)` out of it and in the head.
fn specifications(config: &Config) -> Vec<Specification> {
    let (vocabulary, hidden, feed_forward) = (config.vocab_size, config.hidden_size, config.intermediate_size);
    let inwards = Init::Normal(config.initializer_range);
    let outwards = Init::Normal(config.initializer_range / (2.0 * config.num_layers as f64).sqrt());
    let one = |name: &str, shape: &[i64], init| Specification { name: name.to_owned(), shape: shape.to_vec(), init };
    let mut all = vec![
        one("model.embeddings.tok_embeddings.weight", &[vocabulary, hidden], inwards),
        one("model.embeddings.norm.weight", &[hidden], Init::Ones),
    ];
    for layer in 0..config.num_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        if layer > 0 {
            all.push(one(&name("attn_norm"), &[hidden], Init::Ones));
        }
        all.push(one(&name("attn.Wqkv"), &[3 * hidden, hidden], inwards));
        all.push(one(&name("attn.Wo"), &[hidden, hidden], outwards));
        all.push(one(&name("mlp_norm"), &[hidden], Init::Ones));
        all.push(one(&name("mlp.Wi"), &[2 * feed_forward, hidden], inwards));
        all.push(one(&name("mlp.Wo"), &[hidden, feed_forward], outwards));
    }
    all.push(one("model.final_norm.weight", &[hidden], Init::Ones));
    all.push(one("head.dense.weight", &[hidden, hidden], outwards));
    all.push(one("head.norm.weight", &[hidden], Init::Ones));
    all.push(one("decoder.bias", &[vocabulary], Init::Zeros));
    all
}

/// Cosines and sines of position × θ^(−2j/D), computed in float32 as transformers does.
fn rotary_table(theta: f64, positions: i64, head_width: i64, device: Device) -> [Tensor; 2] {
    let exponents = Tensor::arange_start_step(0, head_width, 2, (Kind::Float, Device::Cpu)) / head_width as f64;
    let inverse_frequencies = Tensor::from(theta as f32).pow(&exponents).reciprocal();
    let angles = Tensor::arange(positions, (Kind::Float, Device::Cpu)).unsqueeze(1) * inverse_frequencies.unsqueeze(0);
    [angles.cos().to_device(device), angles.sin().to_device(device)]
}
