//! The results of an evaluation as a table for people, Markdown for documents and JSON for programs.

use comfy_table::{CellAlignment, Table, TableStyle, presets};
use serde::Serialize;

use super::task::TaskResult;

/// Everything that one evaluation found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where the weights came from.
    pub model: String,
    /// Name of the recipe.
    pub recipe: String,
    /// Hash of the recipe.
    pub recipe_hash: String,
    /// One entry a task, in the order of the recipe.
    pub tasks: Vec<TaskResult>,
    /// Mean of the tasks' accuracies.
    pub mean_accuracy: f64,
    /// Mean of the tasks' macro-F1.
    pub mean_macro_f1: f64,
}

impl Report {
    /// Puts results together.
    pub fn new(model: String, recipe: String, recipe_hash: String, tasks: Vec<TaskResult>) -> Self {
        let mean = |of: fn(&TaskResult) -> f64| tasks.iter().map(of).sum::<f64>() / tasks.len().max(1) as f64;
        let (mean_accuracy, mean_macro_f1) = (mean(|t| t.scores.accuracy), mean(|t| t.scores.macro_f1));
        Self { model, recipe, recipe_hash, tasks, mean_accuracy, mean_macro_f1 }
    }

    /// The table for a terminal.
    pub fn table(&self) -> String {
        self.rendered(presets::UTF8_HORIZONTAL_ONLY)
    }

    /// The same as Markdown, with a line that says what was scored.
    pub fn markdown(&self) -> String {
        format!(
            "# Evaluation of {}\n\nModel: `{}`. Recipe hash: `{}`.\n\n{}\n",
            self.recipe,
            self.model,
            self.recipe_hash,
            self.rendered(presets::ASCII_MARKDOWN)
        )
    }

    /// The same as JSON, with files and confusion matrices.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    fn rendered(&self, style: TableStyle) -> String {
        let mut table = Table::new();
        table.load_style(style).set_header(["task", "rows", "chance", "accuracy", "macro-F1", "cut"]);
        for task in &self.tasks {
            let scores = &task.scores;
            let chance = 1.0 / task.labels.len().max(1) as f64;
            table.add_row([
                task.name.clone(),
                scores.num_rows.to_string(),
                percent(chance),
                percent(scores.accuracy),
                percent(scores.macro_f1),
                task.num_cut.to_string(),
            ]);
        }
        table.add_row([
            "mean".to_owned(),
            String::new(),
            String::new(),
            percent(self.mean_accuracy),
            percent(self.mean_macro_f1),
            String::new(),
        ]);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }
}

fn percent(share: f64) -> String {
    format!("{:.2}", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::super::metrics::{confusion, scores};
    use super::*;

    #[test]
    fn the_markdown_is_what_a_reader_pastes() {
        let scores = scores(confusion(2, [(0, 0), (0, 1), (1, 1), (1, 1)]));
        let task =
            TaskResult { name: "sst2".to_owned(), labels: vec!["no".to_owned(), "yes".to_owned()], scores, files: vec![], num_cut: 1 };
        let report = Report::new("runs/a".to_owned(), "a".to_owned(), "0f".to_owned(), vec![task]);
        let expected = "\
# Evaluation of a

Model: `runs/a`. Recipe hash: `0f`.

| task | rows | chance | accuracy | macro-F1 | cut |
|------|------|--------|----------|----------|-----|
| sst2 |    4 |  50.00 |    75.00 |    73.33 |   1 |
| mean |      |        |    75.00 |    73.33 |     |
";
        assert_eq!(report.markdown(), expected);
    }
}
