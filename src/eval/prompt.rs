//! Prompts with a mask: a template filled from a row, tokenised, and the words of the labels as token ids in that place.

use anyhow::Result;
use cloze_data::tokenizer::Tokenizer;
use cloze_recipes::failure::{Failure, FailureKind};

use super::rows::Row;

/// A column whose text is cut to fit keeps at least this many characters.
const COLUMN_CHARS_MIN: usize = 16;

/// Cuts tried before a prompt is given up as too long.
const CUTS_MAX: usize = 32;

/// A template taken apart: fixed text, and names in braces.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq)]
enum Piece {
    Text(String),
    Name(String),
}

/// The two special words of a template.
#[derive(Clone, Copy, Debug)]
pub struct Marks<'a> {
    /// Stands for `{anchor}`.
    pub anchor: &'a str,
    /// Stands for `{mask}`.
    pub mask: &'a str,
}

/// A tokenised prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Tokens with special ones.
    pub tokens: Vec<u32>,
    /// Where the last mask is.
    pub mask_position: usize,
    /// Whether a column was cut to fit.
    pub was_cut: bool,
}

impl Template {
    /// Takes a template apart; braces around anything but a name are text.
    pub fn parse(text: &str) -> Self {
        let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "_-. ".contains(c));
        let mut pieces = vec![];
        let mut rest = text;
        let mut plain = String::new();
        while let Some(open) = rest.find('{') {
            plain.push_str(&rest[..open]);
            let after = &rest[open + 1..];
            match after.find('}').filter(|&close| is_name(&after[..close])) {
                Some(close) => {
                    pieces.push(Piece::Text(std::mem::take(&mut plain)));
                    pieces.push(Piece::Name(after[..close].to_owned()));
                    rest = &after[close + 1..];
                }
                None => {
                    plain.push('{');
                    rest = after;
                }
            }
        }
        plain.push_str(rest);
        pieces.push(Piece::Text(plain));
        Self { pieces }
    }

    /// Names of the columns that the template needs.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Name(name) if name != "anchor" && name != "mask" => Some(name.as_str()),
            _ => None,
        })
    }

    /// The filled template; `column` gives the text of a name.
    fn fill<'a>(&'a self, marks: Marks<'a>, mut column: impl FnMut(&'a str) -> &'a str) -> String {
        let text = self.pieces.iter().map(|piece| match piece {
            Piece::Text(text) => text.as_str(),
            Piece::Name(name) if name == "anchor" => marks.anchor,
            Piece::Name(name) if name == "mask" => marks.mask,
            Piece::Name(name) => column(name),
        });
        text.collect()
    }

    /// The prompt of a row, at most `max_length` tokens: the longest column is cut in its middle until it fits.
    pub fn prompt(&self, row: &Row, tokenizer: &Tokenizer, marks: Marks, max_length: usize) -> Result<Prompt> {
        let mut columns = row.columns.clone();
        for cut in 0..=CUTS_MAX {
            let text = self.fill(marks, |name| columns.get(name).map_or("", String::as_str));
            let tokens = tokenizer.encode(&text, true)?;
            if tokens.len() <= max_length {
                let mask_position = last_mask(&tokens, tokenizer)?;
                return Ok(Prompt { tokens, mask_position, was_cut: cut > 0 });
            }
            let longest = self.columns().filter_map(|name| columns.get_key_value(name)).max_by_key(|(_, text)| text.len());
            let Some((name, text)) = longest.map(|(name, text)| (name.clone(), text.clone())) else { break };
            let characters = text.chars().count();
            if characters <= COLUMN_CHARS_MIN {
                break;
            }
            // Characters per token of the whole prompt, and one token more than needed, so that few rounds are enough.
            let excess = (tokens.len() - max_length + 1) * characters.max(tokens.len()) / tokens.len();
            columns.insert(name, without_middle(&text, characters.saturating_sub(excess.max(1)).max(COLUMN_CHARS_MIN)));
        }
        Err(Failure::new(FailureKind::Recipe, "a prompt does not fit into `max_length`, even with its columns cut")
            .expected(format!("at most {max_length} tokens"))
            .into())
    }

    /// Token ids that stand for each label at the mask: in the template itself, and as the bare word with and without a space before it.
    ///
    /// # Errors
    /// [`FailureKind::Mismatch`] for a word that is not one token there.
    pub fn label_tokens(&self, words: &[String], tokenizer: &Tokenizer, marks: Marks) -> Result<Vec<u32>> {
        let masked = tokenizer.encode(&self.fill(marks, |_| ""), true)?;
        let position = last_mask(&masked, tokenizer)?;
        let mut ids = Vec::new();
        for word in words {
            let text = self.fill(Marks { mask: word, ..marks }, |_| "");
            let filled = tokenizer.encode(&text, true)?;
            if filled.len() != masked.len() {
                let pieces: Vec<String> =
                    tokenizer.encode(&format!(" {word}"), false)?.iter().map(|&id| tokenizer.decode(&[id], false)).collect();
                return Err(Failure::new(FailureKind::Mismatch, format!("`{word}` is not one token at the mask"))
                    .expected("a word that the tokenizer keeps whole")
                    .found(format!("{pieces:?}"))
                    .hint("choose another word for this label")
                    .into());
            }
            ids.push(filled[position]);
            for variant in [word.clone(), format!(" {word}")] {
                if let [id] = tokenizer.encode(&variant, false)?.as_slice() {
                    ids.push(*id);
                }
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }
}

fn last_mask(tokens: &[u32], tokenizer: &Tokenizer) -> Result<usize> {
    let mask = tokenizer.mask_id;
    tokens
        .iter()
        .rposition(|&id| id == mask)
        .ok_or_else(|| Failure::new(FailureKind::Recipe, "the prompt holds no mask token").hint("the template needs `{mask}` once").into())
}

/// The first and last characters of a text, `keep` in all.
fn without_middle(text: &str, keep: usize) -> String {
    let characters: Vec<char> = text.chars().collect();
    let head = keep.div_ceil(2);
    characters[..head].iter().chain(&characters[characters.len() - (keep - head)..]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_keeps_braces_that_hold_no_name() {
        let template = Template::parse("{q} {x:y} {} {choices.0}: {anchor} {mask}");
        let marks = Marks { anchor: "[a]", mask: "[m]" };
        assert_eq!(template.fill(marks, |name| if name == "q" { "Q" } else { "C" }), "Q {x:y} {} C: [a] [m]");
        assert_eq!(template.columns().collect::<Vec<_>>(), ["q", "choices.0"]);
    }

    #[test]
    fn the_middle_goes_first() {
        assert_eq!(without_middle("abcdefgh", 5), "abcgh");
        assert_eq!(without_middle("äöü", 2), "äü");
    }
}
