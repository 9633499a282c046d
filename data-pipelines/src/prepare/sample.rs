//! A record becomes tokens, or is found not to fit.

use std::collections::HashMap;

use cloze_recipes::recipe::{Recipe, Truncation};

use super::template::Template;
use crate::tokenizer::Tokenizer;

/// Targets whose test is remembered; few answers make up most of a corpus. The memory is emptied when it is full.
const MAX_REMEMBERED: usize = 1 << 16;
/// Longer targets are tested each time.
const MAX_REMEMBERED_BYTES: usize = 64;

/// What became of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The target is not one token of the vocabulary in its place.
    NotSingleToken,
    /// Too long, and not to be cut or not to be cut enough.
    TooLong,
    /// A sample.
    Sample { tokens: Vec<u32>, answer_position: u32, truncated: bool },
}

/// Tokens from the anchor on, for a target that is one token.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tail {
    ids: Vec<u32>,
    /// Index of the answer in `ids`.
    answer: usize,
}

/// What was found for targets, `None` for those that are not one token; one for each thread.
#[derive(Default)]
pub(super) struct TailMemory(HashMap<String, Option<Tail>>);

/// Two answers, to see where the tokens of an answer begin.
const PROBES: [&str; 2] = ["A", "7"];

/// Makes samples by a recipe.
pub(super) struct SampleEncoder<'a> {
    tokenizer: &'a Tokenizer,
    template: Template,
    max_length: usize,
    truncate: Truncation,
    special_ids: Vec<u32>,
    splits_words: bool,
    /// Tokens of the text from the anchor up to the answer.
    before_ids: Vec<u32>,
    /// Tokens between inputs and anchor.
    cue_ids: Vec<u32>,
    /// Special tokens before and after a text.
    num_leading: usize,
    num_trailing: usize,
}

impl<'a> SampleEncoder<'a> {
    /// Prepares the tests; `anchor_id` is the token of the recipe's anchor.
    pub(super) fn new(recipe: &Recipe, tokenizer: &'a Tokenizer, anchor_id: u32) -> anyhow::Result<Self> {
        let anchor = &recipe.model.anchor_token;
        let template = Template::parse(&recipe.data.template, anchor)?;
        let before_ids = before_ids(tokenizer, template.before())?;
        let mut cue_ids = tokenizer.encode(&[template.cue(), anchor.as_str()].concat(), false)?;
        cue_ids.pop();
        // The anchor is one token, so that whatever else stands around it alone comes from the tokenizer.
        let alone = tokenizer.encode(anchor, true)?;
        let num_leading = alone.iter().position(|id| *id == anchor_id).unwrap_or(0);
        Ok(Self {
            special_ids: tokenizer.special_ids(),
            splits_words: tokenizer.splits_words()?,
            max_length: recipe.data.max_length as usize,
            truncate: recipe.data.truncate,
            num_leading,
            num_trailing: alone.len() - num_leading - 1,
            tokenizer,
            template,
            before_ids,
            cue_ids,
        })
    }

    /// Makes the sample of a record.
    pub(super) fn encode(&self, inputs: &str, target: &str, memory: &mut TailMemory) -> anyhow::Result<Verdict> {
        let target = target.trim();
        let Some(tail) = self.tail(target, memory)? else { return Ok(Verdict::NotSingleToken) };
        let ids = self.tokenizer.encode(&self.template.render(inputs, target), true)?;
        // Tokens around an anchor do not depend on what stands before it; where they do all the same, the record does not fit.
        let content = &ids[..ids.len() - self.num_trailing];
        if !content.ends_with(&tail.ids) {
            return Ok(Verdict::NotSingleToken);
        }
        if ids.len() > self.max_length {
            return Ok(self.cut(&ids, &tail));
        }
        let answer_position = (content.len() - tail.ids.len() + tail.answer) as u32;
        Ok(Verdict::Sample { tokens: ids, answer_position, truncated: false })
    }

    fn cut(&self, ids: &[u32], tail: &Tail) -> Verdict {
        match self.truncate {
            Truncation::Drop => Verdict::TooLong,
            Truncation::PromptKeepAnswer => self.cut_prompt(ids, tail),
            Truncation::Right => self.cut_right(ids),
        }
    }

    /// Keeps the start of the prompt, and the cue if there is room for it and a token of the prompt.
    fn cut_prompt(&self, ids: &[u32], tail: &Tail) -> Verdict {
        let num_fixed = tail.ids.len() + self.num_trailing;
        let prompt = &ids[self.num_leading..ids.len() - num_fixed];
        let num_cue = prompt.iter().rev().zip(self.cue_ids.iter().rev()).take_while(|(a, b)| a == b).count();
        let room = |num_kept: usize| self.max_length.checked_sub(self.num_leading + num_kept);
        let num_kept = match (room(num_fixed + num_cue), room(num_fixed)) {
            (Some(1..), _) => num_fixed + num_cue,
            (_, Some(_)) => num_fixed,
            (_, None) => return Verdict::TooLong,
        };
        let mut tokens = ids[..self.max_length - num_kept].to_vec();
        tokens.extend_from_slice(&ids[ids.len() - num_kept..]);
        let answer_position = (tokens.len() - num_fixed + tail.answer) as u32;
        Verdict::Sample { tokens, answer_position, truncated: true }
    }

    /// Keeps the start, whatever the last token then is.
    fn cut_right(&self, ids: &[u32]) -> Verdict {
        if self.max_length <= self.num_leading + self.num_trailing {
            return Verdict::TooLong;
        }
        let num_content = self.max_length - self.num_trailing;
        let mut tokens = ids[..num_content].to_vec();
        tokens.extend_from_slice(&ids[ids.len() - self.num_trailing..]);
        Verdict::Sample { tokens, answer_position: num_content as u32 - 1, truncated: true }
    }

    fn tail(&self, target: &str, memory: &mut TailMemory) -> anyhow::Result<Option<Tail>> {
        // Most targets that fail are sentences, and most of those fail here, without being encoded.
        if target.is_empty() || (self.splits_words && has_two_words(target)) {
            return Ok(None);
        }
        if let Some(known) = memory.0.get(target) {
            return Ok(known.clone());
        }
        let tail = self.test(target)?;
        if target.len() <= MAX_REMEMBERED_BYTES {
            if memory.0.len() >= MAX_REMEMBERED {
                memory.0.clear();
            }
            memory.0.insert(target.to_owned(), tail.clone());
        }
        Ok(tail)
    }

    /// Encodes the text from the anchor on: the answer has to be exactly one token more than the text before it has.
    fn test(&self, target: &str) -> anyhow::Result<Option<Tail>> {
        let spans = self.tokenizer.encode_spans(&self.template.tail(target))?;
        let target_end = self.template.before().len() + target.len();
        let num_up_to_answer = spans.iter().filter(|span| span.start < target_end).count();
        let answer = self.before_ids.len();
        let ids: Vec<u32> = spans.iter().map(|span| span.id).collect();
        let fits = num_up_to_answer == answer + 1
            && ids.starts_with(&self.before_ids)
            && spans[answer].end <= target_end
            && !self.special_ids.contains(&ids[answer])
            && self.before_ids.first() != Some(&ids[answer]);
        Ok(fits.then_some(Tail { ids, answer }))
    }
}

/// Tokens before the answer, whatever it is: a space before it may become part of its token, a line end stays a token of its own.
fn before_ids(tokenizer: &Tokenizer, before: &str) -> anyhow::Result<Vec<u32>> {
    let [one, other] = PROBES.map(|answer| tokenizer.encode(&[before, answer].concat(), false));
    let (one, other) = (one?, other?);
    if one == other {
        // A vocabulary of few words knows neither probe.
        return tokenizer.encode(before.trim_end(), false);
    }
    Ok(one.iter().zip(&other).take_while(|(a, b)| a == b).map(|(a, _)| *a).collect())
}

/// Whether a space stands between two letters or digits.
fn has_two_words(text: &str) -> bool {
    let mut words = text.split_ascii_whitespace();
    let Some(mut before) = words.next() else { return false };
    for word in words {
        let joins = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        if joins(before.as_bytes().last()) && joins(word.as_bytes().first()) {
            return true;
        }
        before = word;
    }
    false
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::fixtures;

    /// Encodes with the tiny tokenizer and shows the tokens as text.
    fn encode(change: impl FnOnce(&mut Recipe), inputs: &str, target: &str) -> Option<(String, u32, bool)> {
        let folder = tempfile::tempdir().unwrap();
        let mut recipe = fixtures::recipe(&fixtures::tokenizer(folder.path()), folder.path(), &[Path::new("/x")]);
        change(&mut recipe);
        let (tokenizer, anchor) = Tokenizer::load_with_anchor(&recipe.model.tokenizer, &recipe.model.anchor_token).unwrap();
        let encoder = SampleEncoder::new(&recipe, &tokenizer, anchor).unwrap();
        match encoder.encode(inputs, target, &mut TailMemory::default()).unwrap() {
            Verdict::Sample { tokens, answer_position, truncated } => Some((tokenizer.decode(&tokens, false), answer_position, truncated)),
            Verdict::NotSingleToken | Verdict::TooLong => None,
        }
    }

    #[test]
    fn the_answer_stands_after_the_anchor() {
        let (text, answer, truncated) = encode(|_| (), "is it ?", "  yes\n").unwrap();
        assert_eq!(text, "[CLS] is it ? Answer : [unused0] yes [SEP]");
        assert_eq!((answer, truncated), (7, false));
    }

    #[test]
    fn text_may_follow_the_answer() {
        let template = |recipe: &mut Recipe| recipe.data.template = "{inputs} Answer: {anchor} {target} ? ?".into();
        assert_eq!(encode(template, "one", "yes").unwrap(), ("[CLS] one Answer : [unused0] yes ? ? [SEP]".into(), 5, false));
        assert_eq!(encode(template, "one", "yes no"), None);
    }

    #[test]
    fn targets_of_no_or_several_tokens_and_unknown_or_special_ones_do_not_fit() {
        for target in ["", "  ", "yes no", "yes?", "unheard", "[MASK]", "[SEP]", "[unused0]"] {
            assert_eq!(encode(|_| (), "is it ?", target), None, "{target:?}");
        }
        assert!(encode(|_| (), "is it ?", "?").is_some());
    }

    #[test]
    fn a_long_prompt_is_cut_by_the_three_rules() {
        let prompt = "one two three four five ".repeat(4);
        let cut = |truncate: Truncation, max_length: u32| {
            let change = |recipe: &mut Recipe| (recipe.data.truncate, recipe.data.max_length) = (truncate, max_length);
            encode(change, &prompt, "yes")
        };
        assert_eq!(cut(Truncation::Drop, 10), None);
        let kept = "[CLS] one two three four Answer : [unused0] yes [SEP]".to_owned();
        assert_eq!(cut(Truncation::PromptKeepAnswer, 10), Some((kept, 8, true)));
        // Without room for cue and prompt the cue goes.
        assert_eq!(cut(Truncation::PromptKeepAnswer, 5), Some(("[CLS] one [unused0] yes [SEP]".into(), 3, true)));
        assert_eq!(cut(Truncation::PromptKeepAnswer, 3), None);
        assert_eq!(cut(Truncation::Right, 5), Some(("[CLS] one two three [SEP]".into(), 3, true)));
        assert_eq!(cut(Truncation::Right, 2), None);
    }

    #[test]
    fn two_words_are_seen_without_the_tokenizer() {
        for (text, expected) in [("yes", false), ("yes no", true), ("a.\n b", false), ("a. b c", true), ("- -", false), ("5 6", true)] {
            assert_eq!(has_two_words(text), expected, "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn every_sample_obeys_the_bound_and_keeps_its_answer(words in 0_usize..60, max_length in 8_u32..40) {
            let change = |recipe: &mut Recipe| recipe.data.max_length = max_length;
            let (text, answer, truncated) = encode(change, &"two ".repeat(words), "no").unwrap();
            let tokens: Vec<&str> = text.split(' ').collect();
            prop_assert!(tokens.len() <= max_length as usize);
            prop_assert_eq!(truncated, words + 6 > max_length as usize);
            prop_assert_eq!((tokens[answer as usize - 1], tokens[answer as usize], tokens[answer as usize + 1]), ("[unused0]", "no", "[SEP]"));
        }
    }
}
