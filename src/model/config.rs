//! `config.json` of a `ModernBERT` folder: read what Hugging Face writes (both the older flat names and the newer nested ones), write what it reads.

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::ModelShape;
use serde_json::{Map, Value, json};

/// A `ModernBERT` as this program computes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Rows of the embedding.
    pub vocab_size: i64,
    /// Width E of the residual stream.
    pub hidden_size: i64,
    /// Width F of one half of the GLU.
    pub intermediate_size: i64,
    /// Number of layers.
    pub num_layers: i64,
    /// Number of heads H.
    pub num_heads: i64,
    /// Every n-th layer attends globally.
    pub global_every: i64,
    /// Tokens that a local layer sees on each side.
    pub local_window: i64,
    /// `RoPE` base of global layers.
    pub global_theta: f64,
    /// `RoPE` base of local layers.
    pub local_theta: f64,
    /// Longest document.
    pub max_positions: i64,
    /// Epsilon of the norms.
    pub norm_epsilon: f64,
    /// Standard deviation of the first values.
    pub initializer_range: f64,
    /// The file as it was read, so that an export keeps what this program does not use.
    pub source: Map<String, Value>,
}

impl Config {
    /// A new model of a shape and vocabulary.
    pub fn new(shape: &ModelShape, vocab_size: i64) -> Self {
        Self {
            vocab_size,
            hidden_size: shape.hidden_size.into(),
            intermediate_size: shape.intermediate_size.into(),
            num_layers: shape.num_hidden_layers.into(),
            num_heads: shape.num_attention_heads.into(),
            global_every: shape.global_attn_every_n_layers.into(),
            local_window: i64::from(shape.local_attention) / 2,
            global_theta: shape.global_rope_theta,
            local_theta: shape.local_rope_theta,
            max_positions: shape.max_position_embeddings.into(),
            norm_epsilon: 1e-5,
            initializer_range: 0.02,
            source: Map::new(),
        }
    }

    /// Reads a config.json; `place` is its path, for messages.
    ///
    /// # Errors
    /// [`FailureKind::Damaged`] for a file that is no JSON or lacks a number, [`FailureKind::Mismatch`] for a model this program does not compute.
    pub fn parse(text: &str, place: &str) -> Result<Self, Failure> {
        let source: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| Failure::new(FailureKind::Damaged, "config.json is not valid").at(place).because(error))?;
        refuse_variants(&source, place)?;
        let integer = |key: &str, default: Option<i64>| number(&source, key, default.map(|n| n as f64), place).map(|n| n as i64);
        let real = |key: &str, default: f64| number(&source, key, Some(default), place);
        let theta = |layers: &str, key: &str, default: f64| match source
            .get("rope_parameters")
            .and_then(|p| p.get(layers)?.get("rope_theta")?.as_f64())
        {
            Some(theta) => Ok(theta),
            None => real(key, default),
        };
        let config = Self {
            vocab_size: integer("vocab_size", None)?,
            hidden_size: integer("hidden_size", None)?,
            intermediate_size: integer("intermediate_size", None)?,
            num_layers: integer("num_hidden_layers", None)?,
            num_heads: integer("num_attention_heads", None)?,
            global_every: global_every(&source, place)?,
            local_window: integer("local_attention", Some(128))? / 2,
            global_theta: theta("full_attention", "global_rope_theta", 160_000.0)?,
            local_theta: theta("sliding_attention", "local_rope_theta", 10_000.0)?,
            max_positions: integer("max_position_embeddings", Some(8192))?,
            norm_epsilon: real("norm_eps", 1e-5)?,
            initializer_range: real("initializer_range", 0.02)?,
            source: source.clone(),
        };
        config.check_sizes(place)?;
        Ok(config)
    }

    /// Whether a layer attends globally.
    pub fn is_global(&self, layer: i64) -> bool {
        layer % self.global_every == 0
    }

    /// Width D of one head.
    pub fn head_width(&self) -> i64 {
        self.hidden_size / self.num_heads
    }

    /// The config.json of this model, over what was read.
    pub fn to_json(&self, tokens: &SpecialTokens) -> String {
        let mut file = self.source.clone();
        let layer_types: Vec<&str> =
            (0..self.num_layers).map(|layer| if self.is_global(layer) { "full_attention" } else { "sliding_attention" }).collect();
        let fields = json!({
            "architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", "dtype": "float32",
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers, "num_attention_heads": self.num_heads,
            "global_attn_every_n_layers": self.global_every, "local_attention": self.local_window * 2, "layer_types": layer_types,
            "global_rope_theta": self.global_theta, "local_rope_theta": self.local_theta,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": self.global_theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": self.local_theta},
            },
            "max_position_embeddings": self.max_positions, "norm_eps": self.norm_epsilon, "norm_bias": false,
            "attention_bias": false, "mlp_bias": false, "decoder_bias": true, "classifier_bias": false, "tie_word_embeddings": true,
            "hidden_activation": "gelu", "classifier_activation": "gelu", "initializer_range": self.initializer_range, "initializer_cutoff_factor": 2.0,
            "embedding_dropout": 0.0, "attention_dropout": 0.0, "mlp_dropout": 0.0, "classifier_dropout": 0.0,
            "pad_token_id": tokens.pad, "cls_token_id": tokens.cls, "bos_token_id": tokens.cls, "sep_token_id": tokens.sep, "eos_token_id": tokens.sep,
        });
        if let Value::Object(fields) = fields {
            file.extend(fields);
        }
        serde_json::to_string_pretty(&file).unwrap_or_default()
    }

    fn check_sizes(&self, place: &str) -> Result<(), Failure> {
        let positive = [self.vocab_size, self.hidden_size, self.intermediate_size, self.num_layers, self.num_heads, self.global_every];
        if positive.iter().any(|&n| !(1..=1 << 24).contains(&n)) || self.hidden_size % (2 * self.num_heads) != 0 {
            return Err(Failure::new(FailureKind::Damaged, "the sizes in config.json do not fit together")
                .at(place)
                .expected("positive sizes, hidden_size a multiple of twice num_attention_heads")
                .found(format!(
                    "hidden_size {}, num_attention_heads {}, num_hidden_layers {}",
                    self.hidden_size, self.num_heads, self.num_layers
                )));
        }
        Ok(())
    }
}

/// Ids of the special tokens, as an exported config names them.
#[derive(Clone, Copy, Debug, Default)]
pub struct SpecialTokens {
    /// Padding.
    pub pad: Option<u32>,
    /// Beginning of a document.
    pub cls: Option<u32>,
    /// End of a document.
    pub sep: Option<u32>,
}

fn number(source: &Map<String, Value>, key: &str, default: Option<f64>, place: &str) -> Result<f64, Failure> {
    match (source.get(key).filter(|value| !value.is_null()), default) {
        (Some(value), _) => value
            .as_f64()
            .ok_or_else(|| Failure::new(FailureKind::Damaged, format!("`{key}` in config.json is not a number")).at(place).found(value)),
        (None, Some(default)) => Ok(default),
        (None, None) => Err(Failure::new(FailureKind::Damaged, format!("`{key}` is missing in config.json")).at(place)),
    }
}

/// The spacing of global layers, from `layer_types` where it is given.
fn global_every(source: &Map<String, Value>, place: &str) -> Result<i64, Failure> {
    let Some(types) = source.get("layer_types").and_then(Value::as_array) else {
        return number(source, "global_attn_every_n_layers", Some(3.0), place).map(|n| n as i64);
    };
    let is_global: Vec<bool> = types.iter().map(|kind| kind == "full_attention").collect();
    let every = is_global.iter().skip(1).position(|&global| global).map_or(is_global.len(), |index| index + 1).max(1);
    if is_global.iter().enumerate().any(|(layer, &global)| global != (layer % every == 0)) {
        return Err(Failure::new(FailureKind::Mismatch, "the layers of this model do not alternate regularly")
            .at(place)
            .expected("a global layer first and then one every n layers")
            .found(source.get("layer_types").map(Value::to_string).unwrap_or_default()));
    }
    Ok(every as i64)
}

/// Refuses models that would be computed wrongly.
fn refuse_variants(source: &Map<String, Value>, place: &str) -> Result<(), Failure> {
    let wanted = [
        ("model_type", json!("modernbert")),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("norm_bias", json!(false)),
        ("decoder_bias", json!(true)),
        ("hidden_activation", json!("gelu")),
        ("classifier_activation", json!("gelu")),
        ("tie_word_embeddings", json!(true)),
    ];
    for (key, expected) in wanted {
        if let Some(found) = source.get(key).filter(|value| **value != expected && !value.is_null()) {
            return Err(Failure::new(FailureKind::Mismatch, format!("this program does not compute models with this `{key}`"))
                .at(place)
                .expected(expected)
                .found(found));
        }
    }
    Ok(())
}
