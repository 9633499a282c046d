//! Probabilities of tokens at the masks of prompts, several prompts to a pack.

use anyhow::Result;
use cloze_data::batch::pack;
use tch::{Kind, Tensor};

use super::prompt::Prompt;
use crate::model::modernbert::ModernBert;
use crate::model::packed::PackedInput;

/// Prompts scored in one forward pass, at most; bounds the logits that are alive at once.
const PACK_PROMPTS_MAX: usize = 128;

/// For each prompt the probabilities over the whole vocabulary at its mask are handed to `read`, in the order of the prompts' packs.
pub fn at_masks(model: &ModernBert, prompts: &[Prompt], pack_tokens: u32, mut read: impl FnMut(usize, &[f32])) -> Result<()> {
    let lengths: Vec<u32> = prompts.iter().map(|prompt| prompt.tokens.len() as u32).collect();
    for members in pack(&lengths, pack_tokens).iter().flat_map(|members| members.chunks(PACK_PROMPTS_MAX)) {
        let chosen: Vec<&Prompt> = members.iter().map(|&member| &prompts[member as usize]).collect();
        let probabilities = tch::no_grad(|| probabilities(model, &chosen))?;
        let width = probabilities.size()[1] as usize;
        let flat = Vec::<f32>::try_from(probabilities.contiguous().view([-1]))?;
        members.iter().zip(flat.chunks_exact(width)).for_each(|(&member, row)| read(member as usize, row));
    }
    Ok(())
}

/// Softmax over the vocabulary at each prompt's mask, on the host.
fn probabilities(model: &ModernBert, prompts: &[&Prompt]) -> Result<Tensor> {
    let ids: Vec<i32> = prompts.iter().flat_map(|prompt| prompt.tokens.iter().map(|&id| id as i32)).collect();
    let lengths: Vec<i32> = prompts.iter().map(|prompt| prompt.tokens.len() as i32).collect();
    let mut start = 0;
    let mut masks = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        masks.push(start + prompt.mask_position as i64);
        start += prompt.tokens.len() as i64;
    }
    let input = PackedInput::new(&ids, &lengths, model.device())?;
    let hidden = model.hidden(&input)?.f_index_select(0, &Tensor::f_from_slice(&masks)?.to_device(model.device()))?;
    Ok(model.logits(&hidden)?.softmax(-1, Kind::Float).to_device(tch::Device::Cpu))
}
