//! A byte-level BPE vocabulary learnt from the generated text, and the tokenizer files that hold it.
//!
//! Learnt here and not with the tokenizers crate's trainer, because that one breaks ties between equal entries of its queue
//! by the order of a randomly seeded hash map, so the same text may give another vocabulary. Here every choice has a total order.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

use anyhow::Context;
use serde_json::{Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

/// Tokens before all others, at ids 0 to 5, in this order.
const ADDED_TOKENS: [&str; 6] = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[unused0]"];

/// The token right before the answer.
const ANCHOR: &str = "[unused0]";

/// Tokens of the vocabulary; a multiple of 64, so that a model adds no unused rows.
const VOCAB_SIZE: usize = 1024;

/// Longest text a tokenizer configuration promises, in tokens.
const MODEL_MAX_LENGTH: u32 = 512;

/// Count added to each answer word: more than any text has, so that answers become whole tokens first.
const ANSWER_WORD_COUNT: u64 = 1 << 40;

/// What a byte-level BPE tokenizer is made of.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Vocabulary {
    /// Token texts in byte-level writing, by id.
    tokens: Vec<String>,
    /// Pairs of tokens that are merged, first come first.
    merges: Vec<(String, String)>,
}

impl Vocabulary {
    /// Learns a vocabulary from texts. Every one of `answer_words` becomes one token where it follows a space.
    ///
    /// Numbers of several digits are left out, so that each of their digits stays a token.
    pub(crate) fn learn(texts: impl IntoIterator<Item = String>, answer_words: &[&str]) -> anyhow::Result<Self> {
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for text in texts {
            for word in pre_tokenize(&text)? {
                *counts.entry(word).or_default() += 1;
            }
        }
        for word in answer_words {
            for word in pre_tokenize(&format!(" {word}"))? {
                *counts.entry(word).or_default() += ANSWER_WORD_COUNT;
            }
        }
        counts.retain(|word, _| word.chars().filter(char::is_ascii_digit).count() < 2);
        Ok(learn_merges(&counts))
    }

    /// Number of tokens.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The `tokenizer.json` of this vocabulary, with the settings of `ModernBERT`'s tokenizer.
    pub(crate) fn tokenizer_json(&self) -> Value {
        let vocab: serde_json::Map<String, Value> =
            self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), Value::from(id))).collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": ADDED_TOKENS.iter().enumerate().map(|(id, token)| added_token(Some(id), token)).collect::<Vec<_>>(),
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0)],
                "pair": [special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0), sequence("B", 0), special("[SEP]", 0)],
                "special_tokens": {
                    "[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]},
                    "[SEP]": {"id": "[SEP]", "ids": [2], "tokens": ["[SEP]"]},
                },
            },
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": false,
                "vocab": vocab,
                "merges": self.merges.iter().map(|(left, right)| json!([left, right])).collect::<Vec<_>>(),
            },
        })
    }
}

/// The `tokenizer_config.json` with which `transformers` loads the tokenizer as a `PreTrainedTokenizerFast`.
pub(crate) fn tokenizer_config() -> Value {
    let decoder: serde_json::Map<String, Value> =
        ADDED_TOKENS.iter().enumerate().map(|(id, token)| (id.to_string(), added_token(None, token))).collect();
    json!({
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": false,
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": "[PAD]",
        "sep_token": "[SEP]",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "[UNK]",
    })
}

/// Loads a `tokenizer.json` and checks that each answer word is one token right after the anchor, and that a mask in its
/// place leaves the same tokens around it.
pub(crate) fn check_answers(tokenizer_json: &[u8], answer_words: &[&str]) -> anyhow::Result<()> {
    let tokenizer = tokenizers::Tokenizer::from_bytes(tokenizer_json).map_err(anyhow::Error::from_boxed).context("load the tokenizer")?;
    let encode = |answer: &str| {
        let text = format!("Is it?\nAnswer: {ANCHOR} {answer}");
        tokenizer.encode(text, true).map(|encoding| encoding.get_ids().to_vec()).map_err(anyhow::Error::from_boxed)
    };
    let masked = encode("[MASK]")?;
    let place = masked.len() - 2;
    for word in answer_words {
        let ids = encode(word)?;
        let mut expected = masked.clone();
        expected[place] = *ids.get(place).unwrap_or(&0);
        anyhow::ensure!(
            ids == expected && expected[place] != masked[place],
            "answer word {word:?} is not one token after {ANCHOR}: {ids:?}"
        );
    }
    Ok(())
}

/// Splits a text into words as the tokenizer does, in byte-level writing (a space is `Ġ`).
fn pre_tokenize(text: &str) -> anyhow::Result<Vec<String>> {
    let mut pieces = PreTokenizedString::from(text);
    ByteLevel::new(false, true, true).pre_tokenize(&mut pieces).map_err(anyhow::Error::from_boxed).context("split text into words")?;
    let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
    Ok(splits.into_iter().map(|(word, _, _)| word.to_owned()).collect())
}

/// Merges the most frequent pair until the vocabulary is full or every word is one token; ties go to the smaller ids.
fn learn_merges(counts: &BTreeMap<String, u64>) -> Vocabulary {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut tokens: Vec<String> = ADDED_TOKENS.iter().map(|&token| token.to_owned()).collect();
    tokens.extend(alphabet.iter().map(char::to_string));
    let mut ids: HashMap<String, u32> = tokens.iter().cloned().zip(0..).collect();
    let mut words: Vec<(Vec<u32>, u64)> =
        counts.iter().map(|(word, &count)| (word.chars().map(|character| ids[&character.to_string()]).collect(), count)).collect();
    let mut merges = Vec::new();
    while tokens.len() < VOCAB_SIZE {
        let Some((left, right)) = most_frequent_pair(&words) else { break };
        let merged = format!("{}{}", tokens[left as usize], tokens[right as usize]);
        let pair = (tokens[left as usize].clone(), tokens[right as usize].clone());
        // Two ways of merging may lead to the same token: "a" + "bc" and "ab" + "c". So a pair may also come up again.
        if !merges.contains(&pair) {
            merges.push(pair);
        }
        let id = *ids.entry(merged.clone()).or_insert_with(|| {
            tokens.push(merged);
            tokens.len() as u32 - 1
        });
        for (word, _) in &mut words {
            merge_pair(word, (left, right), id);
        }
    }
    Vocabulary { tokens, merges }
}

fn most_frequent_pair(words: &[(Vec<u32>, u64)]) -> Option<(u32, u32)> {
    let mut counts: HashMap<(u32, u32), u64> = HashMap::new();
    for (word, count) in words {
        for pair in word.windows(2) {
            *counts.entry((pair[0], pair[1])).or_default() += count;
        }
    }
    // The order of the map does not matter: no two entries compare equal.
    counts.into_iter().max_by_key(|&(pair, count)| (count, Reverse(pair))).map(|(pair, _)| pair)
}

/// Replaces the pair wherever it stands, from the left.
fn merge_pair(word: &mut Vec<u32>, pair: (u32, u32), id: u32) {
    let mut position = 0;
    while position + 1 < word.len() {
        if (word[position], word[position + 1]) == pair {
            word[position] = id;
            word.remove(position + 1);
        }
        position += 1;
    }
}

fn added_token(id: Option<usize>, content: &str) -> Value {
    let anchor = content == ANCHOR;
    let mut token = json!({
        "content": content,
        "single_word": false,
        // The mask takes the space before it along, as an answer's token does.
        "lstrip": content == "[MASK]",
        "rstrip": false,
        "normalized": anchor,
        "special": !anchor,
    });
    if let Some(id) = id {
        token["id"] = Value::from(id);
    }
    token
}

fn special(id: &str, type_id: u32) -> Value {
    json!({"SpecialToken": {"id": id, "type_id": type_id}})
}

fn sequence(id: &str, type_id: u32) -> Value {
    json!({"Sequence": {"id": id, "type_id": type_id}})
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWERS: [&str; 4] = ["yes", "no", "maybe", "7"];

    fn learn() -> Vocabulary {
        let texts = ["Is the door open? It is.", "the cat, the dog and the door", "12 and 345 and 7"].map(str::to_owned);
        Vocabulary::learn(texts, &ANSWERS).unwrap()
    }

    fn load(vocabulary: &Vocabulary) -> tokenizers::Tokenizer {
        tokenizers::Tokenizer::from_bytes(vocabulary.tokenizer_json().to_string()).unwrap()
    }

    #[test]
    fn learning_is_deterministic_and_answers_are_tokens() {
        let vocabulary = learn();
        for _ in 0..5 {
            assert_eq!(learn(), vocabulary);
        }
        assert!(vocabulary.len() <= VOCAB_SIZE);
        check_answers(vocabulary.tokenizer_json().to_string().as_bytes(), &ANSWERS).unwrap();
        let error = check_answers(vocabulary.tokenizer_json().to_string().as_bytes(), &["yes", "unheard"]).unwrap_err();
        assert!(error.to_string().contains("unheard"));
    }

    #[test]
    fn words_are_whole_and_long_numbers_are_not() {
        let tokenizer = load(&learn());
        let tokens = |text: &str| tokenizer.encode(text, false).unwrap().get_tokens().to_vec();
        assert_eq!(tokens("the cat is 7"), ["the", "Ġcat", "Ġis", "Ġ7"]);
        assert_eq!(tokens(" 71").len(), 2);
        assert_eq!(tokens("Answer: [unused0] [MASK]").last().unwrap().trim(), "[MASK]");
    }

    #[test]
    fn any_text_survives_a_round_trip() {
        let tokenizer = load(&learn());
        for text in ["naïve café, 中文\n\ttabs", "", " leading and trailing "] {
            let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
        let ids = tokenizer.encode("the dog", true).unwrap().get_ids().to_vec();
        assert_eq!((ids[0], ids[ids.len() - 1]), (1, 2));
    }

    #[test]
    fn special_tokens_have_their_ids() {
        let tokenizer = load(&learn());
        for (id, token) in ADDED_TOKENS.iter().enumerate() {
            assert_eq!(tokenizer.token_to_id(token), Some(id as u32));
        }
        assert_eq!(tokenizer_config()["added_tokens_decoder"]["4"]["lstrip"], true);
    }

    #[test]
    fn pairs_merge_from_the_left() {
        let mut word = vec![1, 1, 1, 2, 1, 1];
        merge_pair(&mut word, (1, 1), 9);
        assert_eq!(word, [9, 1, 2, 9]);
    }
}
