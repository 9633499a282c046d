//! Accuracy, macro-F1 and the confusion matrix of a classification.

use serde::Serialize;

/// Scores of one set of predictions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Rows scored.
    pub num_rows: u64,
    /// Share of the rows whose predicted label is the right one.
    pub accuracy: f64,
    /// Mean over the labels of the F1 score; a label that neither occurs nor is predicted counts as 0, as in RAFT.
    pub macro_f1: f64,
    /// Rows by right label, columns by predicted label.
    pub confusion: Vec<Vec<u64>>,
}

/// Counts of right against predicted labels.
pub fn confusion(num_labels: usize, pairs: impl IntoIterator<Item = (usize, usize)>) -> Vec<Vec<u64>> {
    let mut counts = vec![vec![0; num_labels]; num_labels];
    for (right, predicted) in pairs {
        counts[right][predicted] += 1;
    }
    counts
}

/// Sum of two matrices of the same size.
pub fn merged(mut one: Vec<Vec<u64>>, other: &[Vec<u64>]) -> Vec<Vec<u64>> {
    for (row, other_row) in one.iter_mut().zip(other) {
        for (cell, other_cell) in row.iter_mut().zip(other_row) {
            *cell += other_cell;
        }
    }
    one
}

/// Scores of a confusion matrix; an empty one scores 0.
pub fn scores(confusion: Vec<Vec<u64>>) -> Scores {
    let num_rows: u64 = confusion.iter().flatten().sum();
    let correct: u64 = (0..confusion.len()).map(|label| confusion[label][label]).sum();
    let f1 = |label: usize| {
        let right: u64 = confusion[label].iter().sum();
        let predicted: u64 = confusion.iter().map(|row| row[label]).sum();
        ratio(2 * confusion[label][label], right + predicted)
    };
    let macro_f1 = (0..confusion.len()).map(f1).sum::<f64>() / confusion.len().max(1) as f64;
    Scores { num_rows, accuracy: ratio(correct, num_rows), macro_f1, confusion }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_worked_by_hand() {
        // right: 3 of label 0, 2 of label 1; predictions 0,0,1 and 1,0.
        let counts = confusion(2, [(0, 0), (0, 0), (0, 1), (1, 1), (1, 0)]);
        let found = scores(counts);
        assert!((found.accuracy - 0.6).abs() < 1e-12);
        // F1 of label 0: 2*2/(3+3) = 2/3; of label 1: 2*1/(2+2) = 1/2.
        assert!((found.macro_f1 - f64::midpoint(2.0 / 3.0, 0.5)).abs() < 1e-12);
    }

    #[test]
    fn a_constant_prediction_over_three_even_labels_scores_a_sixth() {
        let found = scores(confusion(3, [(0, 0), (1, 0), (2, 0)]));
        assert!((found.macro_f1 - 1.0 / 6.0).abs() < 1e-12);
        assert!((found.accuracy - 1.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn nothing_scored_is_zero() {
        assert!(scores(confusion(2, [])).macro_f1.abs() < 1e-12);
    }
}
