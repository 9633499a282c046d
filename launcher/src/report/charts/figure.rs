//! One plot with its words and numbers, and all plots of a report.

use serde::Serialize;

use super::super::material::Material;
use super::super::table::{Row, ScoreTable};
use super::{confusion, curves, spread, swept};

/// Rows of the table that are drawn; more lines than these cannot be told apart.
pub(super) const MAX_ROWS: usize = super::super::svg::NUM_COLOURS;

/// A plot.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// The heading that it stands under.
    pub section: String,
    /// What it shows.
    pub title: String,
    /// The same in words, for those who do not see it.
    pub description: String,
    /// How to read it.
    pub caption: String,
    /// The picture; files for programs have only the numbers.
    #[serde(skip)]
    pub svg: String,
    /// What is drawn.
    pub numbers: Numbers,
}

/// A table of texts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Numbers {
    /// Headings.
    pub header: Vec<String>,
    /// Rows, as wide as the header.
    pub rows: Vec<Vec<String>>,
}

/// All plots that the material allows.
pub fn figures(material: &Material, table: &ScoreTable) -> Vec<Figure> {
    let mut figures = Vec::new();
    figures.extend(curves::figure(material, table));
    figures.extend(swept::figures(material, table));
    figures.extend(swept::data_scale(material, table));
    figures.extend(spread::figures(material, table));
    figures.extend(confusion::figures(material, table));
    figures
}

/// The rows that are drawn, each with the number of its colour, and a sentence on those that are not.
pub(super) fn drawn(table: &ScoreTable, has_any: impl Fn(&Row) -> bool) -> (Vec<(usize, &Row)>, String) {
    let rows: Vec<&Row> = table.rows.iter().filter(|row| has_any(row)).collect();
    let hidden = rows.len().saturating_sub(MAX_ROWS);
    let left_out =
        if hidden > 0 { format!(" Drawn are the first {MAX_ROWS} rows of the table; {hidden} more are not.") } else { String::new() };
    (rows.into_iter().take(MAX_ROWS).enumerate().collect(), left_out)
}

/// The id of a figure's elements.
pub(super) fn id(kind: &str, number: usize) -> String {
    format!("{kind}-{number}")
}
