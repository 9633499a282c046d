//! What must hold for the model without another implementation at hand: the attention paths agree, documents of a pack do not see each other,
//! gradients are those of the function, and a config survives a round trip.

use cloze_recipes::raw::Preset;
use cloze_recipes::recipe::ModelShape;
use tch::{Device, Kind, Tensor};

use super::config::{Config, SpecialTokens};
use super::modernbert::{ModernBert, Placement};
use super::packed::{Labelled, NOT_SCORED, PackedInput};

const VOCABULARY: i64 = 64;

fn shape() -> ModelShape {
    ModelShape {
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 4,
        num_attention_heads: 2,
        local_attention: 16,
        ..Preset::Tiny.shape()
    }
}

fn model(trainable: bool) -> ModernBert {
    let placement = Placement { device: Device::Cpu, trainable, bfloat16: false };
    let mut model = ModernBert::new(Config::new(&shape(), VOCABULARY), placement).unwrap();
    model.parameters_mut().initialise(7);
    model
}

/// Documents shorter and longer than the window and than a block of the windowed attention.
const LENGTHS: [i32; 4] = [5, 1, 300, 40];

fn ids(count: i32) -> Vec<i32> {
    (0..count).map(|t| (t * 37 + 11) % VOCABULARY as i32).collect()
}

fn labels(count: i32) -> Vec<i32> {
    (0..count).map(|t| if t % 7 == 0 { (t * 5) % VOCABULARY as i32 } else { NOT_SCORED }).collect()
}

fn gradients(model: &ModernBert) -> Vec<f32> {
    let total: i32 = LENGTHS.iter().sum();
    let input = PackedInput::new(&ids(total), &LENGTHS, Device::Cpu).unwrap();
    let labelled = Labelled::new(&labels(total), &vec![1.0; total as usize], Device::Cpu).unwrap();
    let _ = tch::no_grad(|| model.parameters().gradients().unwrap().shallow_clone().zero_());
    model.loss_sum(&input, &labelled).unwrap().backward();
    Vec::<f32>::try_from(model.parameters().gradients().unwrap()).unwrap()
}

fn relative_difference(one: &[f32], other: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut one.iter().zip(other).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut other.iter().map(|b| f64::from(*b)))
}

#[test]
fn both_attention_paths_give_the_same_gradients() {
    let fast = gradients(&model(true));
    let mut reference = model(true);
    reference.force_plain_attention();
    assert!(relative_difference(&fast, &gradients(&reference)) < 1e-5);
}

#[test]
fn gradients_are_the_same_bits_every_time() {
    let model = model(true);
    assert_eq!(gradients(&model), gradients(&model));
}

#[test]
fn bfloat16_follows_float32_within_its_rounding() {
    let placement = Placement { device: Device::Cpu, trainable: true, bfloat16: true };
    let mut half = ModernBert::new(Config::new(&shape(), VOCABULARY), placement).unwrap();
    half.parameters_mut().initialise(7);
    let full = gradients(&model(true));
    assert!(relative_difference(&gradients(&half), &full) < 0.05);
}

#[test]
fn a_loss_without_a_graph_adds_no_gradients() {
    let model = model(true);
    let input = PackedInput::new(&ids(9), &[9], Device::Cpu).unwrap();
    let labelled = Labelled::new(&labels(9), &[1.0; 9], Device::Cpu).unwrap();
    let _ = tch::no_grad(|| model.loss_sum(&input, &labelled)).unwrap();
    assert_eq!(model.parameters().gradients().unwrap().abs().max().double_value(&[]).to_bits(), 0);
}

#[test]
fn a_small_step_against_the_gradient_lowers_the_loss_as_predicted() {
    let model = model(true);
    let gradient = gradients(&model);
    let total: i32 = LENGTHS.iter().sum();
    let input = PackedInput::new(&ids(total), &LENGTHS, Device::Cpu).unwrap();
    let labelled = Labelled::new(&labels(total), &vec![1.0; total as usize], Device::Cpu).unwrap();
    let loss = || tch::no_grad(|| model.loss_sum(&input, &labelled)).unwrap().double_value(&[]);
    let before = loss();
    let values = model.parameters().values();
    let direction = Tensor::from_slice(&gradient[..values.numel()]);
    let squared_norm = direction.square().sum(Kind::Double).double_value(&[]);
    let step = 0.02 / squared_norm.sqrt();
    let _ = tch::no_grad(|| values.shallow_clone().f_sub_(&(direction * step))).unwrap();
    let predicted = step * squared_norm;
    let measured = before - loss();
    assert!((measured / predicted - 1.0).abs() < 0.05, "predicted {predicted}, measured {measured}");
}

#[test]
fn documents_of_a_pack_do_not_see_each_other() {
    let model = model(false);
    let total: i32 = LENGTHS.iter().sum();
    let all = ids(total);
    let packed = tch::no_grad(|| model.hidden(&PackedInput::new(&all, &LENGTHS, Device::Cpu).unwrap())).unwrap();
    let mut start = 0;
    for length in LENGTHS {
        let alone = &all[start as usize..(start + length) as usize];
        let hidden = tch::no_grad(|| model.hidden(&PackedInput::new(alone, &[length], Device::Cpu).unwrap())).unwrap();
        let difference = (packed.narrow(0, start.into(), length.into()) - hidden).abs().max().double_value(&[]);
        assert!(difference < 1e-5, "document of {length} tokens differs by {difference}");
        start += length;
    }
}

#[test]
fn first_values_follow_the_paper_and_the_seed() {
    let one = model(false);
    let embedding = one.parameters().parameter("model.embeddings.tok_embeddings.weight").unwrap().value;
    // A normal cut at two deviations keeps 0.8796 of its standard deviation.
    assert!((embedding.std(true).double_value(&[]) / (0.02 * 0.8796) - 1.0).abs() < 0.05);
    assert!(embedding.abs().max().double_value(&[]) <= 0.04);
    let out = one.parameters().parameter("model.layers.0.attn.Wo.weight").unwrap().value;
    assert!((out.std(true).double_value(&[]) / (0.02 / 8.0_f64.sqrt() * 0.8796) - 1.0).abs() < 0.1);
    assert!(one.parameters().values().equal(model(false).parameters().values()));
    let mut other = model(false);
    other.parameters_mut().initialise(8);
    assert!(!one.parameters().values().equal(other.parameters().values()));
}

#[test]
fn a_config_survives_a_round_trip() {
    let config = Config::new(&shape(), VOCABULARY);
    let text = config.to_json(&SpecialTokens { pad: Some(3), cls: Some(1), sep: Some(2) });
    let mut read = Config::parse(&text, "config.json").unwrap();
    read.source.clear();
    assert_eq!(read, config);
}

#[test]
fn other_models_are_refused_by_name() {
    for (text, expected) in [
        ("{", "not valid"),
        (r#"{"model_type": "bert"}"#, "`model_type`"),
        (r#"{"model_type": "modernbert", "norm_bias": true}"#, "`norm_bias`"),
        (r#"{"model_type": "modernbert", "vocab_size": 10}"#, "`hidden_size`"),
        (
            r#"{"vocab_size": 8, "hidden_size": 10, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 4}"#,
            "do not fit together",
        ),
    ] {
        let failure = Config::parse(text, "config.json").unwrap_err().to_string();
        assert!(failure.contains(expected), "{failure}");
    }
}
