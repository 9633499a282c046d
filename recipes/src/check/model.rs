//! The model: one source of weights, and a shape that can be built.

use super::Context;
use crate::raw::{ModelRaw, Preset, ShapeRaw};
use crate::recipe::{ModelRecipe, ModelShape};

pub(super) fn check(context: &mut Context<'_>, raw: ModelRaw) -> ModelRecipe {
    let from_scratch = raw.preset.is_some() || raw.shape.is_some();
    match (&raw.path, from_scratch) {
        (Some(_), true) => {
            context
                .problem("model.path", "found `path` together with `preset` or `shape`, expected one source; unset the other with `null`");
        }
        (None, false) => context.problem("model", "found neither `path` nor `preset`, expected one source of the model"),
        _ => {}
    }
    if raw.path.is_none() && raw.tokenizer.is_none() {
        context.problem("model", "found no `tokenizer`, expected the folder with tokenizer.json: only a `path` brings its own");
    }
    let path = raw.path.as_ref().map(|path| context.path("model.path", path));
    let tokenizer = raw.tokenizer.as_ref().map(|tokenizer| context.path("model.tokenizer", tokenizer));
    let tokenizer = tokenizer.or_else(|| path.clone()).unwrap_or_default();
    let shape = from_scratch.then(|| shape(context, raw.preset, &raw.shape.unwrap_or_default()));
    ModelRecipe { path, tokenizer, shape, anchor_token: raw.anchor_token }
}

/// The preset with single values replaced.
fn shape(context: &mut Context<'_>, preset: Option<Preset>, stated: &ShapeRaw) -> ModelShape {
    let mut shape = preset_shape(preset);
    shape.hidden_size = stated.hidden_size.unwrap_or(shape.hidden_size);
    shape.intermediate_size = stated.intermediate_size.unwrap_or(shape.intermediate_size);
    shape.num_hidden_layers = stated.num_hidden_layers.unwrap_or(shape.num_hidden_layers);
    shape.num_attention_heads = stated.num_attention_heads.unwrap_or(shape.num_attention_heads);
    shape.global_attn_every_n_layers = stated.global_attn_every_n_layers.unwrap_or(shape.global_attn_every_n_layers);
    shape.local_attention = stated.local_attention.unwrap_or(shape.local_attention);
    shape.global_rope_theta = stated.global_rope_theta.unwrap_or(shape.global_rope_theta);
    shape.local_rope_theta = stated.local_rope_theta.unwrap_or(shape.local_rope_theta);
    shape.max_position_embeddings = stated.max_position_embeddings.unwrap_or(shape.max_position_embeddings);
    check_shape(context, &shape);
    shape
}

/// The sizes of a preset. Without one the four sizes are 0, which no recipe can state, and the rest is as in every preset.
fn preset_shape(preset: Option<Preset>) -> ModelShape {
    match preset {
        Some(preset) => preset.shape(),
        None => ModelShape { hidden_size: 0, intermediate_size: 0, num_hidden_layers: 0, num_attention_heads: 0, ..Preset::Tiny.shape() },
    }
}

fn check_shape(context: &mut Context<'_>, shape: &ModelShape) {
    let sizes = [
        ("hidden_size", shape.hidden_size),
        ("intermediate_size", shape.intermediate_size),
        ("num_hidden_layers", shape.num_hidden_layers),
        ("num_attention_heads", shape.num_attention_heads),
    ];
    let missing: Vec<String> = sizes.iter().filter(|(_, size)| *size == 0).map(|(name, _)| format!("`{name}`")).collect();
    if !missing.is_empty() {
        context.problem("model.shape", format!("found no {}, expected all four sizes or a `preset`", missing.join(", ")));
        return;
    }
    let (hidden, heads) = (shape.hidden_size, shape.num_attention_heads);
    if !hidden.is_multiple_of(heads) {
        context.mismatch("model.shape.num_attention_heads", heads, format!("a divisor of hidden_size, which is {hidden}"));
    } else if !(hidden / heads).is_multiple_of(2) {
        let found = format!("{heads}, which makes heads of width {}", hidden / heads);
        context.mismatch("model.shape.num_attention_heads", found, "an even head width");
    }
    if !shape.local_attention.is_multiple_of(2) {
        context.mismatch("model.shape.local_attention", shape.local_attention, "an even number: half of it lies on each side");
    }
}
