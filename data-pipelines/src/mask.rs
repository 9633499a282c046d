//! Objective and masks of one example, from integers alone.
//!
//! An answer example shows everything but its answer token and predicts that. An auxiliary example masks each token that is
//! not special with the recipe's probability; real MLM predicts the original tokens, dummy MLM the mask token itself. Both
//! draw the same masks.

use cloze_recipes::recipe::{Auxiliary, Masking, ObjectiveRecipe};

use crate::batch::Slot;
use crate::dataset::Sample;
use crate::draw::{Stream, below, draw_u64, draw_unit};
use crate::tokenizer::Tokenizer;

/// Label of a position that is not scored.
pub const NOT_SCORED: i32 = -100;

/// What masking has to know about a tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenFacts {
    /// Id of the mask token.
    pub mask_id: u32,
    /// Ids that are never masked: start, end, padding, mask and unknown token. The anchor token is none of them.
    pub special_ids: Vec<u32>,
    /// Largest id plus one.
    pub vocab_size: u32,
    /// Id of the token right before the answer.
    pub anchor_id: u32,
}

impl TokenFacts {
    /// Those of a tokenizer, with the token that stands before an answer.
    pub fn of(tokenizer: &Tokenizer, anchor_id: u32) -> Self {
        Self { mask_id: tokenizer.mask_id, special_ids: tokenizer.special_ids(), vocab_size: tokenizer.vocab_size(), anchor_id }
    }
}

/// Everything that the masks of a run depend on.
#[derive(Clone, Debug, PartialEq)]
pub struct MaskSpec {
    /// Seed of the recipe.
    pub seed: u64,
    /// What is masked and how the loss is formed.
    pub objective: ObjectiveRecipe,
    /// The tokenizer's side.
    pub tokens: TokenFacts,
}

/// What an example predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExampleKind {
    /// Its answer token.
    Answer,
    /// Masked tokens (MLM) or mask tokens (dummy MLM), as the recipe says.
    Auxiliary,
}

/// One example as the model sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskedExample {
    /// Token ids with the masks in place.
    pub input_ids: Vec<u32>,
    /// The id to predict at each position, or [`NOT_SCORED`].
    pub labels: Vec<i32>,
    /// What the example predicts.
    pub kind: ExampleKind,
}

impl MaskedExample {
    /// Number of scored positions; at least 1 for every example that [`mask_example`] makes.
    pub fn num_labels(&self) -> usize {
        self.labels.iter().filter(|&&label| label != NOT_SCORED).count()
    }

    /// The sample as it is, nothing masked, nothing scored.
    fn unmasked(sample: &Sample, kind: ExampleKind) -> Self {
        Self { input_ids: sample.tokens.clone(), labels: vec![NOT_SCORED; sample.tokens.len()], kind }
    }
}

/// Masks a sample for its slot. The result depends on the spec, the epoch, the number of the sample and its tokens only.
///
/// An auxiliary example that drew no masked token masks its answer token, so that every example has a label.
pub fn mask_example(spec: &MaskSpec, slot: &Slot, sample: &Sample) -> MaskedExample {
    match kind_of(spec, slot) {
        ExampleKind::Answer => mask_answer(spec, sample),
        ExampleKind::Auxiliary => mask_auxiliary(spec, slot, sample),
    }
}

/// What the example in a slot predicts: auxiliary with the recipe's ratio, drawn anew each epoch.
pub fn kind_of(spec: &MaskSpec, slot: &Slot) -> ExampleKind {
    let auxiliary = spec.objective.auxiliary != Auxiliary::None
        && draw_unit(spec.seed, Stream::Objective, slot.epoch, slot.sample, 0) < spec.objective.auxiliary_ratio;
    if auxiliary { ExampleKind::Auxiliary } else { ExampleKind::Answer }
}

fn mask_answer(spec: &MaskSpec, sample: &Sample) -> MaskedExample {
    let mut example = MaskedExample::unmasked(sample, ExampleKind::Answer);
    let position = sample.answer_position as usize;
    example.labels[position] = sample.tokens[position] as i32;
    example.input_ids[position] = spec.tokens.mask_id;
    example
}

fn mask_auxiliary(spec: &MaskSpec, slot: &Slot, sample: &Sample) -> MaskedExample {
    let mut example = MaskedExample::unmasked(sample, ExampleKind::Auxiliary);
    for (position, &token) in sample.tokens.iter().enumerate() {
        let masked = !spec.tokens.special_ids.contains(&token)
            && draw_unit(spec.seed, Stream::MaskToken, slot.epoch, slot.sample, position as u64) < spec.objective.mask_probability;
        if masked {
            example.labels[position] = label_of(spec, token);
            example.input_ids[position] = shown_token(spec, slot, position as u64, token);
        }
    }
    if example.num_labels() == 0 {
        let position = sample.answer_position as usize;
        example.labels[position] = label_of(spec, sample.tokens[position]);
        example.input_ids[position] = spec.tokens.mask_id;
    }
    example
}

/// What an auxiliary example predicts at a masked position that held `token`.
fn label_of(spec: &MaskSpec, token: u32) -> i32 {
    match spec.objective.auxiliary {
        Auxiliary::DummyMlm => spec.tokens.mask_id as i32,
        Auxiliary::Mlm | Auxiliary::None => token as i32,
    }
}

/// What the model sees at a masked position that held `token`.
fn shown_token(spec: &MaskSpec, slot: &Slot, position: u64, token: u32) -> u32 {
    if spec.objective.masking == Masking::AllMask {
        return spec.tokens.mask_id;
    }
    // One uniform draw decides: [0, 0.8) mask, [0.8, 0.9) random, [0.9, 1) unchanged.
    let unit = draw_unit(spec.seed, Stream::MaskKind, slot.epoch, slot.sample, position);
    if unit < 0.8 {
        spec.tokens.mask_id
    } else if unit < 0.9 {
        let bits = draw_u64(spec.seed, Stream::RandomToken, slot.epoch, slot.sample, position);
        below(bits, u64::from(spec.tokens.vocab_size)) as u32
    } else {
        token
    }
}

#[cfg(test)]
mod tests {
    use cloze_recipes::recipe::LossNorm;

    use super::*;

    const CLS: u32 = 1;
    const SEP: u32 = 2;
    const MASK: u32 = 4;
    const ANCHOR: u32 = 5;

    fn spec(auxiliary: Auxiliary, ratio: f64, probability: f64, masking: Masking) -> MaskSpec {
        MaskSpec {
            seed: 11,
            objective: ObjectiveRecipe {
                auxiliary,
                auxiliary_ratio: ratio,
                mask_probability: probability,
                masking,
                loss_norm: LossNorm::TokenMean,
            },
            tokens: TokenFacts { mask_id: MASK, special_ids: vec![0, CLS, SEP, 3, MASK], vocab_size: 1000, anchor_id: ANCHOR },
        }
    }

    /// `[CLS] 100 101 … [unused0] 999 [SEP]` with `words` words.
    fn sample(words: u32) -> Sample {
        let mut tokens = vec![CLS];
        tokens.extend(100..100 + words);
        tokens.extend([ANCHOR, 999, SEP]);
        Sample { answer_position: tokens.len() as u32 - 2, tokens, task: 0 }
    }

    fn slot(epoch: u64, sample: u64) -> Slot {
        Slot { index: 0, epoch, sample }
    }

    #[test]
    fn an_answer_example_masks_its_answer_alone() {
        let example = mask_example(&spec(Auxiliary::None, 1.0, 1.0, Masking::AllMask), &slot(0, 0), &sample(3));
        assert_eq!(example.kind, ExampleKind::Answer);
        assert_eq!(example.input_ids, [CLS, 100, 101, 102, ANCHOR, MASK, SEP]);
        assert_eq!(example.labels, [NOT_SCORED, NOT_SCORED, NOT_SCORED, NOT_SCORED, NOT_SCORED, 999, NOT_SCORED]);
    }

    #[test]
    fn specials_are_never_masked_but_anchor_and_answer_are() {
        let example = mask_example(&spec(Auxiliary::Mlm, 1.0, 1.0, Masking::AllMask), &slot(0, 0), &sample(2));
        assert_eq!(example.kind, ExampleKind::Auxiliary);
        assert_eq!(example.input_ids, [CLS, MASK, MASK, MASK, MASK, SEP]);
        assert_eq!(example.labels, [NOT_SCORED, 100, 101, ANCHOR as i32, 999, NOT_SCORED]);
    }

    #[test]
    fn dummy_masks_as_mlm_does_and_predicts_the_mask() {
        for number in 0..200 {
            let real = mask_example(&spec(Auxiliary::Mlm, 0.5, 0.3, Masking::EightyTenTen), &slot(1, number), &sample(20));
            let dummy = mask_example(&spec(Auxiliary::DummyMlm, 0.5, 0.3, Masking::EightyTenTen), &slot(1, number), &sample(20));
            assert_eq!(real.kind, dummy.kind);
            assert_eq!(real.input_ids, dummy.input_ids);
            for (&real_label, &dummy_label) in real.labels.iter().zip(&dummy.labels) {
                match (real.kind, real_label) {
                    (ExampleKind::Auxiliary, label) if label != NOT_SCORED => assert_eq!(dummy_label, MASK as i32),
                    _ => assert_eq!(dummy_label, real_label),
                }
            }
        }
    }

    #[test]
    fn an_auxiliary_example_without_a_draw_masks_its_answer() {
        let spec = spec(Auxiliary::Mlm, 1.0, 0.0, Masking::EightyTenTen);
        for number in 0..20 {
            let example = mask_example(&spec, &slot(0, number), &sample(3));
            assert_eq!((example.kind, example.num_labels()), (ExampleKind::Auxiliary, 1));
            assert_eq!((example.input_ids[5], example.labels[5]), (MASK, 999));
        }
    }

    #[test]
    fn ratio_and_mask_rate_are_as_asked() {
        let spec = spec(Auxiliary::Mlm, 0.2, 0.3, Masking::AllMask);
        let examples: Vec<_> = (0..5000).map(|number| mask_example(&spec, &slot(0, number), &sample(28))).collect();
        let auxiliary: Vec<_> = examples.iter().filter(|example| example.kind == ExampleKind::Auxiliary).collect();
        // 5000 x 0.2 = 1000, standard deviation 28; 30 maskable tokens each, so 9 labels each, deviation 2.5 / sqrt(1000) = 0.08.
        assert!((850..1150).contains(&auxiliary.len()), "{}", auxiliary.len());
        let mean = auxiliary.iter().map(|example| example.num_labels()).sum::<usize>() as f64 / auxiliary.len() as f64;
        assert!((8.5..9.5).contains(&mean), "{mean}");
    }

    #[test]
    fn eighty_ten_ten_has_its_shares_and_keeps_the_label() {
        let spec = spec(Auxiliary::Mlm, 1.0, 1.0, Masking::EightyTenTen);
        let (mut masked, mut random, mut kept) = (0, 0, 0);
        for number in 0..1000 {
            let sample = sample(18);
            let example = mask_example(&spec, &slot(0, number), &sample);
            for position in 1..sample.tokens.len() - 1 {
                assert_eq!(example.labels[position], sample.tokens[position] as i32);
                match example.input_ids[position] {
                    MASK => masked += 1,
                    token if token == sample.tokens[position] => kept += 1,
                    token => {
                        assert!(token < 1000);
                        random += 1;
                    }
                }
            }
        }
        // 20,000 positions: 16,000 / 2,000 / 2,000 with deviations 57 / 42 / 42.
        assert!((15_700..16_300).contains(&masked), "{masked}");
        assert!((1750..2250).contains(&random), "{random}");
        assert!((1750..2250).contains(&kept), "{kept}");
    }

    #[test]
    fn epochs_redraw_and_slots_of_one_epoch_repeat() {
        let spec = spec(Auxiliary::Mlm, 0.5, 0.3, Masking::AllMask);
        let masks = |epoch| (0..50).map(|number| mask_example(&spec, &slot(epoch, number), &sample(20))).collect::<Vec<_>>();
        assert_eq!(masks(0), masks(0));
        assert_ne!(masks(0), masks(1));
        let late = Slot { index: 77, epoch: 0, sample: 3 };
        assert_eq!(mask_example(&spec, &late, &sample(20)), mask_example(&spec, &slot(0, 3), &sample(20)));
    }
}
