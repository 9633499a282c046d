//! One evaluation task: its files, prompts, predictions and scores.

use std::path::Path;

use anyhow::Result;
use cloze_data::tokenizer::Tokenizer;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::EvaluationTask;
use serde::Serialize;

use super::metrics::{Scores, confusion, merged, scores};
use super::prompt::{Marks, Prompt, Template};
use super::rows::{self, Row};
use super::score;
use crate::model::modernbert::ModernBert;

/// Tokens of one forward pass.
const PACK_TOKENS: u32 = 8192;

/// Scores of a task.
#[derive(Clone, Debug, Serialize)]
pub struct TaskResult {
    /// Name in the recipe.
    pub name: String,
    /// Labels in the order of the confusion matrix.
    pub labels: Vec<String>,
    /// All files together.
    pub scores: Scores,
    /// Each file alone.
    pub files: Vec<FileResult>,
    /// Prompts that were cut to fit.
    pub num_cut: u64,
}

/// Scores of one file of a task.
#[derive(Clone, Debug, Serialize)]
pub struct FileResult {
    /// File name.
    pub file: String,
    /// Its scores.
    pub scores: Scores,
}

/// A model with what its prompts need.
pub struct Scorer<'a> {
    /// The model.
    pub model: &'a ModernBert,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Token before the mask.
    pub anchor: &'a str,
}

/// Scores one task.
pub fn run(scorer: &Scorer, task: &EvaluationTask) -> Result<TaskResult> {
    let template = Template::parse(&task.template);
    let mask = scorer.tokenizer.decode(&[scorer.tokenizer.mask_id], false);
    let marks = Marks { anchor: scorer.anchor, mask: mask.trim() };
    let label_tokens: Vec<Vec<u32>> =
        task.labels.iter().map(|label| template.label_tokens(&label.words, scorer.tokenizer, marks)).collect::<Result<_>>()?;
    let mut results = Vec::new();
    let mut total = confusion(task.labels.len(), []);
    let mut num_cut = 0;
    for path in task.files.iter().map(|path| rows::files(path)).collect::<Result<Vec<_>>>()?.concat() {
        let file = read_file(task, &template, &path)?;
        let prompts = file
            .rows
            .iter()
            .map(|row| template.prompt(row, scorer.tokenizer, marks, task.max_length as usize))
            .collect::<Result<Vec<_>>>()?;
        num_cut += prompts.iter().filter(|prompt| prompt.was_cut).count() as u64;
        let predicted = predictions(scorer.model, &prompts, &label_tokens)?;
        let counts = confusion(task.labels.len(), file.right.into_iter().zip(predicted));
        total = merged(total, &counts);
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        results.push(FileResult { file: name, scores: scores(counts) });
    }
    let labels = task.labels.iter().map(|label| label.value.clone()).collect();
    Ok(TaskResult { name: task.name.clone(), labels, scores: scores(total), files: results, num_cut })
}

/// For each prompt the label whose tokens are most probable together; the first of equals.
pub fn predictions(model: &ModernBert, prompts: &[Prompt], label_tokens: &[Vec<u32>]) -> Result<Vec<usize>> {
    let mut predicted = vec![0; prompts.len()];
    score::at_masks(model, prompts, PACK_TOKENS, |prompt, probabilities| {
        let sums = label_sums(probabilities, label_tokens);
        predicted[prompt] = (0..sums.len()).rev().max_by(|&a, &b| sums[a].total_cmp(&sums[b])).unwrap_or(0);
    })?;
    Ok(predicted)
}

/// Probability of each label: the sum over its tokens.
pub fn label_sums(probabilities: &[f32], label_tokens: &[Vec<u32>]) -> Vec<f32> {
    label_tokens.iter().map(|tokens| tokens.iter().map(|&id| probabilities[id as usize]).sum()).collect()
}

struct TaskFile {
    rows: Vec<Row>,
    right: Vec<usize>,
}

/// Reads a file and checks every row: the template's columns are there and the answer is one of the labels.
fn read_file(task: &EvaluationTask, template: &Template, path: &Path) -> Result<TaskFile> {
    let mut rows = rows::read(path, &task.columns)?;
    if let Some(limit) = task.limit {
        rows.truncate(limit as usize);
    }
    let mut right = Vec::with_capacity(rows.len());
    for row in &rows {
        let wrong = |what: String| Failure::new(FailureKind::Input, what).at(format!("{}:{}", path.display(), row.line));
        let column = |name: &str| {
            let known = || row.columns.keys().cloned().collect::<Vec<_>>().join(", ");
            row.columns.get(name).ok_or_else(|| {
                wrong(format!("a row has no column `{name}`")).expected(format!("the columns of task `{}`", task.name)).found(known())
            })
        };
        for name in template.columns() {
            column(name)?;
        }
        let answer = column(&task.answer_column)?.trim();
        let known = || task.labels.iter().map(|label| label.value.as_str()).collect::<Vec<_>>().join(", ");
        let label = task.labels.iter().position(|label| label.value == answer);
        right.push(label.ok_or_else(|| wrong("an answer is none of the task's labels".to_owned()).expected(known()).found(answer))?);
    }
    Ok(TaskFile { rows, right })
}
