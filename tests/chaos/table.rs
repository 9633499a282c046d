//! What was measured, as a table in Markdown.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::schedule::Kind;

/// What one fault cost.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// What it was.
    pub kind: Kind,
    /// Seconds from the fault to the first event that tells of it; `None` where the run need not notice.
    pub detection_s: Option<f64>,
    /// Seconds from the fault until the run does again what it did before.
    pub recovery_s: f64,
    /// Steps that were done twice.
    pub steps_lost: u64,
}

/// A row for each kind, and one for all.
pub fn table(measured: &[Measured]) -> String {
    let mut by_kind: BTreeMap<Kind, Vec<Measured>> = BTreeMap::new();
    for one in measured {
        by_kind.entry(one.kind).or_default().push(*one);
    }
    let mut text = "| fault | count | detection s (median, p95) | recovery s (median, p95) | steps lost (max) |\n".to_owned();
    text.push_str("|---|---|---|---|---|\n");
    let rows = by_kind.iter().map(|(kind, rows)| (kind.name(), rows.as_slice())).chain([("all", measured)]);
    for (name, rows) in rows {
        let detection = spread(rows.iter().filter_map(|row| row.detection_s).collect());
        let recovery = spread(rows.iter().map(|row| row.recovery_s).collect());
        let steps_lost = rows.iter().map(|row| row.steps_lost).max().unwrap_or(0);
        writeln!(text, "| {name} | {} | {detection} | {recovery} | {steps_lost} |", rows.len()).expect("text can be written");
    }
    text
}

/// Median and 95th percentile.
fn spread(mut values: Vec<f64>) -> String {
    if values.is_empty() {
        return "–".to_owned();
    }
    values.sort_by(f64::total_cmp);
    format!("{:.2}, {:.2}", percentile(&values, 50), percentile(&values, 95))
}

/// The smallest value that at least so many per cent do not exceed; of sorted values, of which there is one.
fn percentile(values: &[f64], per_cent: usize) -> f64 {
    let place = (values.len() * per_cent).div_ceil(100);
    values[place.max(1) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let values: Vec<f64> = (1..=20).map(f64::from).collect();
        for (count, per_cent, expected) in [(1, 50, 1.0), (1, 95, 1.0), (4, 50, 2.0), (20, 95, 19.0), (20, 100, 20.0)] {
            assert!((percentile(&values[..count], per_cent) - expected).abs() < 1e-12, "{per_cent} per cent of {count} values");
        }
    }

    #[test]
    fn a_row_for_each_kind_and_one_for_all() {
        let one = |kind, detection_s, recovery_s, steps_lost| Measured { kind, detection_s, recovery_s, steps_lost };
        let measured =
            [one(Kind::FullDisk, None, 0.5, 0), one(Kind::KilledWorker, Some(0.012), 1.0, 0), one(Kind::KilledWorker, Some(0.014), 3.0, 2)];
        let text = table(&measured);
        let rows: Vec<&str> = text.lines().skip(2).collect();
        let expected = [
            "| worker killed | 2 | 0.01, 0.01 | 1.00, 3.00 | 2 |",
            "| cache disk full | 1 | – | 0.50, 0.50 | 0 |",
            "| all | 3 | 0.01, 0.01 | 1.00, 3.00 | 2 |",
        ];
        assert_eq!(rows, expected);
    }
}
