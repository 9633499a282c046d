//! `cloze predict`: texts in, one JSON line each out: the best label, or the most probable tokens at the mask.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use cloze_data::tokenizer::Tokenizer;
use cloze_recipes::failure::{Failure, FailureKind};
use serde::Serialize;
use serde_json::{Map, Value};
use tch::Device;

use crate::eval::prompt::{Marks, Prompt, Template};
use crate::eval::rows::Row;
use crate::eval::score;
use crate::eval::task::label_sums;
use crate::model::folder;
use crate::model::modernbert::{ModernBert, Placement};

/// Texts answered together.
const TEXTS_AT_ONCE: usize = 64;

/// Tokens of one forward pass, at least.
const PACK_TOKENS_MIN: usize = 4096;

/// Tokens listed where no labels are given.
const TOP_TOKENS: usize = 5;

/// What is asked of the model.
#[derive(Debug)]
pub struct PredictOptions {
    /// Model folder with tokenizer.
    pub model: PathBuf,
    /// Labels to choose among; empty lists the most probable tokens.
    pub labels: Vec<String>,
    /// Prompt with `{text}`, `{anchor}` and `{mask}`.
    pub template: String,
    /// Token before the mask.
    pub anchor: String,
    /// Longest prompt, in tokens.
    pub max_length: usize,
}

/// One answer.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<&'a str>,
    /// By label as given, or by token with the most probable first.
    scores: Map<String, Value>,
}

struct Predictor {
    options: PredictOptions,
    model: ModernBert,
    tokenizer: Tokenizer,
    template: Template,
    mask: String,
    label_tokens: Vec<Vec<u32>>,
}

/// Answers the given texts, or the lines of stdin where none are given.
pub fn predict(options: PredictOptions, texts: &[String], stdin: &mut dyn BufRead, stdout: &mut dyn Write) -> Result<()> {
    let predictor = Predictor::load(options)?;
    if !texts.is_empty() {
        return texts.chunks(TEXTS_AT_ONCE).try_for_each(|some| predictor.answer(some, stdout));
    }
    let mut waiting = Vec::new();
    for line in stdin.lines() {
        waiting.push(line.context("read a line of stdin as UTF-8")?);
        if waiting.len() == TEXTS_AT_ONCE {
            predictor.answer(&waiting, stdout)?;
            waiting.clear();
        }
    }
    predictor.answer(&waiting, stdout)
}

/// A probability with the digits that float32 has.
fn shown(probability: f32) -> Value {
    Value::from((f64::from(probability) * 1e7).round() / 1e7)
}

/// Refuses labels among which nothing can be chosen; none at all is another question.
fn check_labels(labels: &[String]) -> Result<(), Failure> {
    let distinct: BTreeSet<&String> = labels.iter().collect();
    if labels.is_empty() || (labels.len() > 1 && distinct.len() == labels.len() && labels.iter().all(|label| !label.is_empty())) {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Recipe, "`--labels` leaves nothing to choose")
        .expected("two or more different words, separated by commas")
        .found(labels.join(",")))
}

impl Predictor {
    fn load(options: PredictOptions) -> Result<Self> {
        let placement = Placement { device: Device::Cpu, trainable: false, bfloat16: false };
        let model = folder::load(&options.model, placement)?;
        let (tokenizer, _anchor_id) = Tokenizer::load_with_anchor(&options.model, &options.anchor)?;
        folder::check_tokenizer(&tokenizer, model.config(), &options.model)?;
        let mask = tokenizer.decode(&[tokenizer.mask_id], false).trim().to_owned();
        let template = Template::parse(&options.template);
        if template.columns().any(|name| name != "text") || template.columns().next().is_none() {
            let found = template.columns().map(|name| format!("`{{{name}}}`")).collect::<Vec<_>>().join(", ");
            let failure = Failure::new(FailureKind::Recipe, "the template does not hold the text");
            return Err(failure
                .expected("`{text}`, `{anchor}` and `{mask}`")
                .found(if found.is_empty() { "no name".to_owned() } else { found })
                .into());
        }
        check_labels(&options.labels)?;
        let marks = Marks { anchor: &options.anchor, mask: &mask };
        let tokens_of = |label: &String| template.label_tokens(std::slice::from_ref(label), &tokenizer, marks);
        let label_tokens = options.labels.iter().map(tokens_of).collect::<Result<_>>()?;
        Ok(Self { options, model, tokenizer, template, mask, label_tokens })
    }

    fn answer(&self, texts: &[String], stdout: &mut dyn Write) -> Result<()> {
        let prompts: Vec<Prompt> = texts.iter().map(|text| self.prompt(text)).collect::<Result<_>>()?;
        let mut answers: Vec<Option<Answer>> = texts.iter().map(|_| None).collect();
        score::at_masks(&self.model, &prompts, self.options.max_length.max(PACK_TOKENS_MIN) as u32, |index, probabilities| {
            answers[index] = Some(self.read(&texts[index], probabilities));
        })?;
        for answer in answers.iter().flatten() {
            writeln!(stdout, "{}", serde_json::to_string(answer)?).context("print an answer")?;
        }
        stdout.flush().context("print an answer")
    }

    fn prompt(&self, text: &str) -> Result<Prompt> {
        let row = Row { line: 1, columns: BTreeMap::from([("text".to_owned(), text.to_owned())]) };
        let marks = Marks { anchor: &self.options.anchor, mask: &self.mask };
        self.template.prompt(&row, &self.tokenizer, marks, self.options.max_length)
    }

    fn read<'a>(&'a self, text: &'a str, probabilities: &[f32]) -> Answer<'a> {
        if self.label_tokens.is_empty() {
            let mut order: Vec<usize> = (0..probabilities.len()).collect();
            order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
            let scores =
                order.iter().take(TOP_TOKENS).map(|&id| (self.tokenizer.decode(&[id as u32], false), shown(probabilities[id]))).collect();
            return Answer { text, label: None, scores };
        }
        let sums = label_sums(probabilities, &self.label_tokens);
        let best = (0..sums.len()).rev().max_by(|&a, &b| sums[a].total_cmp(&sums[b]));
        let scores = self.options.labels.iter().cloned().zip(sums.iter().map(|&sum| shown(sum))).collect();
        Answer { text, label: best.map(|index| self.options.labels[index].as_str()), scores }
    }
}
