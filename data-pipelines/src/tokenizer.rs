//! Text to token ids and back, by a Hugging Face `tokenizer.json`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use cloze_recipes::failure::{Failure, FailureKind};
use tokenizers::AddedToken;

const FILE_NAME: &str = "tokenizer.json";
/// Largest tokenizer file that is read; the largest known ones have some 35 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;
const MASK: [&str; 2] = ["[MASK]", "<mask>"];
const START: [&str; 2] = ["[CLS]", "<s>"];
const END: [&str; 2] = ["[SEP]", "</s>"];
const PADDING: [&str; 2] = ["[PAD]", "<pad>"];
const UNKNOWN: [&str; 2] = ["[UNK]", "<unk>"];
/// What stands for white space in vocabularies: itself, in byte-level ones `Ġ Ċ ĉ č`, in sentence pieces `▁`.
const SPACES: [char; 9] = [' ', '\n', '\t', '\r', 'Ġ', 'Ċ', 'ĉ', 'č', '▁'];

/// A tokenizer of a masked language model; truncation and padding that its file asks for are switched off.
pub struct Tokenizer {
    /// Token at the positions to be predicted.
    pub mask_id: u32,
    /// Token before a text.
    pub cls_id: Option<u32>,
    /// Token after a text.
    pub sep_id: Option<u32>,
    /// Token that fills up short texts.
    pub pad_id: Option<u32>,
    /// Token for what the vocabulary lacks.
    pub unk_id: Option<u32>,
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    bytes: Vec<u8>,
    fingerprint: String,
    vocab_size: u32,
}

/// A token with the bytes of the text that it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenSpan {
    /// The token.
    pub id: u32,
    /// First byte.
    pub start: usize,
    /// Byte after the last.
    pub end: usize,
}

impl Tokenizer {
    /// Loads a `tokenizer.json`, or the one in a folder. Fails when it is missing, not a tokenizer, or has no mask token.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let path = if path.is_dir() { path.join(FILE_NAME) } else { path.to_path_buf() };
        let size = fs::metadata(&path).map_err(|error| unreadable(&path, &error))?.len();
        if size > FILE_BYTES_MAX {
            let failure = Failure::new(FailureKind::Damaged, "tokenizer file is too large").at(path.display());
            return Err(failure.expected(format!("at most {FILE_BYTES_MAX} bytes")).found(size).into());
        }
        let bytes = fs::read(&path).map_err(|error| unreadable(&path, &error))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| {
            Failure::new(FailureKind::Damaged, "file is not a usable tokenizer")
                .at(path.display())
                .because(error)
                .hint("`model.tokenizer` needs a `tokenizer.json` of the Hugging Face tokenizers library; get the file again")
        })?;
        inner.with_truncation(None).map_err(|error| anyhow!("switch truncation off: {error}"))?;
        inner.with_padding(None);
        let find = |names: [&str; 2]| names.iter().find_map(|name| inner.token_to_id(name));
        let mask_id = find(MASK).ok_or_else(|| {
            Failure::new(FailureKind::Mismatch, "tokenizer has no mask token")
                .at(path.display())
                .expected(format!("a token {} or {}", MASK[0], MASK[1]))
                .hint("set `model.tokenizer` to the tokenizer of a masked language model")
        })?;
        let (cls_id, sep_id, pad_id, unk_id) = (find(START), find(END), find(PADDING), find(UNKNOWN));
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |id| id + 1);
        let fingerprint = blake3::hash(&bytes).to_hex().to_string();
        Ok(Self { mask_id, cls_id, sep_id, pad_id, unk_id, inner, path, bytes, fingerprint, vocab_size })
    }

    /// Loads a tokenizer and makes sure that `anchor` is one token, whose id is returned too.
    ///
    /// A token that the vocabulary holds but that text would be split around (as with `[unused0]` of BERT) is declared a token
    /// of its own. Fails when the vocabulary lacks it.
    pub fn load_with_anchor(path: &Path, anchor: &str) -> anyhow::Result<(Self, u32)> {
        let mut tokenizer = Self::load(path)?;
        let missing = |found: String| {
            Failure::new(FailureKind::Mismatch, format!("anchor `{anchor}` is not one token of the tokenizer"))
                .at(tokenizer.path.display())
                .expected("a token of the vocabulary that is otherwise unused")
                .found(found)
                .hint("set `model.anchor_token` to such a token, for example `[unused0]`, or `model.tokenizer` to the right tokenizer")
        };
        let Some(id) = tokenizer.token_id(anchor) else { return Err(missing("no such token".to_owned()).into()) };
        if tokenizer.encode(anchor, false)? != [id] {
            tokenizer.inner.add_special_tokens(&[AddedToken::from(anchor, true)]);
            let found = tokenizer.encode(anchor, false)?;
            if found != [id] {
                let failure = Failure::new(FailureKind::Mismatch, format!("anchor `{anchor}` is not one token of the tokenizer"));
                return Err(failure.at(tokenizer.path.display()).found(format!("{} tokens", found.len())).into());
            }
        }
        Ok((tokenizer, id))
    }

    /// Token ids of a text, with the special tokens around it where `special`.
    pub fn encode(&self, text: &str, special: bool) -> anyhow::Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, special).map_err(|error| anyhow!("encode text: {error}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Tokens of a text, without special tokens, and what they cover.
    pub fn encode_spans(&self, text: &str) -> anyhow::Result<Vec<TokenSpan>> {
        let encoding = self.inner.encode(text, false).map_err(|error| anyhow!("encode text: {error}"))?;
        let spans = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(spans.map(|(&id, &(start, end))| TokenSpan { id, start, end }).collect())
    }

    /// Text of token ids, without the special tokens where `skip_special`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.inner.decode(ids, skip_special).unwrap_or_else(|error| format!("<cannot decode: {error}>"))
    }

    /// Id of a token by its exact writing in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Largest id + 1, added tokens included.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Hash (blake3, hex) of the file.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Mask, start, end, padding and unknown token, as far as there are, ascending.
    pub fn special_ids(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = [Some(self.mask_id), self.cls_id, self.sep_id, self.pad_id, self.unk_id].into_iter().flatten().collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Path of the `tokenizer.json`.
    pub fn file_path(&self) -> &Path {
        &self.path
    }

    /// Content of the `tokenizer.json`, to be copied next to a model.
    pub fn file_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether two words with a space between are always two tokens or more; so it is with all usual tokenizers.
    pub fn splits_words(&self) -> anyhow::Result<bool> {
        let joined = self.inner.get_vocab(true).keys().any(|token| joins_words(token));
        Ok(!joined && self.encode("a b", false)?.len() >= 2)
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    let what = if error.kind() == io::ErrorKind::NotFound { "tokenizer is missing" } else { "failed to read tokenizer" };
    Failure::new(FailureKind::Input, what)
        .at(path.display())
        .because(error)
        .hint("set `model.tokenizer` to a `tokenizer.json` or to a folder that has one")
}

/// Whether white space stands between letters or digits somewhere inside a token.
fn joins_words(token: &str) -> bool {
    let mut words = token.split(SPACES);
    let Some(mut before) = words.next() else { return false };
    for word in words.filter(|word| !word.is_empty()) {
        if before.ends_with(|c: char| c.is_ascii_alphanumeric()) && word.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return true;
        }
        before = word;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    fn failure<T>(result: anyhow::Result<T>) -> Failure {
        result.err().unwrap().downcast::<Failure>().unwrap()
    }

    #[test]
    fn a_folder_or_a_file_gives_the_same_tokenizer() {
        let folder = tempfile::tempdir().unwrap();
        let path = fixtures::tokenizer(folder.path());
        let by_file = Tokenizer::load(&path).unwrap();
        let by_folder = Tokenizer::load(folder.path()).unwrap();
        assert_eq!(by_file.fingerprint(), by_folder.fingerprint());
        assert_eq!(by_file.file_path(), path);
        assert_eq!(by_file.special_ids(), [0, 1, 2, 3, 4]);
        assert_eq!(
            (by_file.mask_id, by_file.cls_id, by_file.sep_id, by_file.pad_id, by_file.unk_id),
            (4, Some(1), Some(2), Some(3), Some(0))
        );
        assert_eq!(by_file.vocab_size() as usize, fixtures::VOCABULARY.len());
    }

    #[test]
    fn texts_become_ids_and_ids_texts() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = Tokenizer::load(&fixtures::tokenizer(folder.path())).unwrap();
        let (yes, no) = (tokenizer.token_id("yes").unwrap(), tokenizer.token_id("no").unwrap());
        assert_eq!(tokenizer.encode("yes no", true).unwrap(), [1, yes, no, 2]);
        assert_eq!(tokenizer.encode("yes nowhere", false).unwrap(), [yes, 0]);
        assert_eq!(tokenizer.encode_spans("yes  no").unwrap()[1], TokenSpan { id: no, start: 5, end: 7 });
        assert_eq!(tokenizer.decode(&[1, yes, no, 2], true), "yes no");
        assert!(tokenizer.splits_words().unwrap());
    }

    #[test]
    fn an_anchor_has_to_be_in_the_vocabulary() {
        let folder = tempfile::tempdir().unwrap();
        let path = fixtures::tokenizer(folder.path());
        let (tokenizer, id) = Tokenizer::load_with_anchor(&path, "[unused0]").unwrap();
        assert_eq!(tokenizer.token_id("[unused0]"), Some(id));
        let failure = failure(Tokenizer::load_with_anchor(&path, "[unused99]"));
        assert_eq!(failure.kind, FailureKind::Mismatch);
        assert!(failure.what.contains("[unused99]") && failure.hint.unwrap().contains("model.anchor_token"));
    }

    #[test]
    fn an_anchor_that_text_would_be_split_around_is_declared_a_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        // `[spare]` is in the vocabulary, but the pre-tokenizer cuts brackets off.
        fs::write(&path, fixtures::tokenizer_json().replace("\"maybe\"", "\"[spare]\"")).unwrap();
        assert_ne!(Tokenizer::load(&path).unwrap().encode("[spare]", false).unwrap().len(), 1);
        let (tokenizer, id) = Tokenizer::load_with_anchor(&path, "[spare]").unwrap();
        assert_eq!(tokenizer.encode("yes [spare] no", false).unwrap()[1], id);
    }

    #[test]
    fn wrong_files_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        assert_eq!(failure(Tokenizer::load(&path)).kind, FailureKind::Input);
        fs::write(&path, "{}").unwrap();
        assert_eq!(failure(Tokenizer::load(&path)).kind, FailureKind::Damaged);
        fs::write(&path, fixtures::tokenizer_json().replace("[MASK]", "[GAP]")).unwrap();
        assert_eq!(failure(Tokenizer::load(&path)).kind, FailureKind::Mismatch);
    }

    #[test]
    fn tokens_that_join_words_are_seen() {
        let cases = [("ĠNew", false), ("NewĠYork", true), ("new york", true), ("ĊĊ", false), (".Ġa", false), ("▁a▁b", true), ("a▁", false)];
        for (token, expected) in cases {
            assert_eq!(joins_words(token), expected, "{token}");
        }
    }
}
