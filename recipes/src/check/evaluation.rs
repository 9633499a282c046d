//! The evaluation tasks: names that differ, prompts with one mask, labels that can be told apart.

use super::{Context, template};
use crate::raw::{EvaluationRaw, LabelRaw};
use crate::recipe::{EvaluationLabel, EvaluationTask};

pub(super) fn check(context: &mut Context<'_>, tasks: Vec<EvaluationRaw>, max_length: u32) -> Vec<EvaluationTask> {
    for (index, task) in tasks.iter().enumerate() {
        if tasks[..index].iter().any(|earlier| earlier.name == task.name) {
            context.mismatch(&format!("evaluation.{index}.name"), format!("`{}` a second time", task.name), "names that differ");
        }
    }
    let numbered = tasks.into_iter().enumerate();
    numbered.map(|(index, task)| checked_task(context, &format!("evaluation.{index}"), task, max_length)).collect()
}

fn checked_task(context: &mut Context<'_>, path: &str, raw: EvaluationRaw, max_length: u32) -> EvaluationTask {
    context.name(&format!("{path}.name"), &raw.name);
    template::check_evaluation(context, &format!("{path}.template"), &raw.template, &raw.columns);
    if !raw.columns.is_empty() && !raw.columns.contains(&raw.answer_column) {
        let expected = format!("one of the columns {}", raw.columns.join(", "));
        context.mismatch(&format!("{path}.answer_column"), format!("`{}`", raw.answer_column), expected);
    }
    let labels: Vec<EvaluationLabel> = raw.labels.into_iter().map(checked_label).collect();
    check_labels(context, path, &labels);
    let files = raw.files.iter().enumerate();
    EvaluationTask {
        files: files.map(|(index, file)| context.path(&format!("{path}.files.{index}"), file)).collect(),
        name: raw.name,
        columns: raw.columns,
        template: raw.template,
        answer_column: raw.answer_column,
        labels,
        max_length: raw.max_length.unwrap_or(max_length),
        limit: raw.limit,
    }
}

/// A label without words is its own word.
fn checked_label(raw: LabelRaw) -> EvaluationLabel {
    let words = raw.words.unwrap_or_else(|| vec![raw.value.clone()]);
    EvaluationLabel { value: raw.value, words }
}

/// No two labels share a value or a word: neither the answer nor the score could be told apart.
fn check_labels(context: &mut Context<'_>, path: &str, labels: &[EvaluationLabel]) {
    for (index, label) in labels.iter().enumerate() {
        let earlier = &labels[..index];
        if earlier.iter().any(|other| other.value == label.value) {
            let found = format!("`{}` a second time", label.value);
            context.mismatch(&format!("{path}.labels.{index}.value"), found, "values that differ");
        }
        for word in &label.words {
            if let Some(other) = earlier.iter().find(|other| other.words.contains(word)) {
                let found = format!("`{word}`, which already stands for `{}`", other.value);
                context.mismatch(&format!("{path}.labels.{index}.words"), found, "words of one label only");
            }
        }
    }
}
