//! What a paper says comes out: columns, rows and orders that name each other.

use super::{Context, sweep};
use crate::raw::{ColumnRaw, ExpectedRaw, MetricRaw, OrderRaw, RowRaw};
use crate::study::{Expected, ExpectedColumn, ExpectedOrder, ExpectedRow, RowSource};
use crate::tree::shortened;

/// Keys of a recipe and their values.
type Values = serde_json::Map<String, serde_json::Value>;

/// Checks the expectation; `swept` holds the keys of the sweep, or is `None` where that section is wrong.
pub(super) fn check(context: &mut Context<'_>, raw: ExpectedRaw, swept: Option<&[&str]>) -> Expected {
    let mut columns: Vec<ExpectedColumn> = Vec::new();
    for (index, column) in raw.columns.into_iter().enumerate() {
        let keys = ["expected", "columns", &index.to_string()];
        check_new(context, &keys, &column.name, columns.iter().any(|earlier| earlier.name == column.name));
        columns.push(checked_column(context, &keys, column));
    }
    let mut rows: Vec<ExpectedRow> = Vec::new();
    for (index, row) in raw.rows.into_iter().enumerate() {
        let keys = ["expected", "rows", &index.to_string()];
        check_new(context, &keys, &row.name, rows.iter().any(|earlier| earlier.name == row.name));
        rows.push(checked_row(context, &keys, row, (&columns, swept)));
    }
    for (index, row) in rows.iter().enumerate() {
        let same_arm = |earlier: &&ExpectedRow| row.ours != RowSource::Quoted && earlier.ours == row.ours;
        if let Some(earlier) = rows[..index].iter().find(same_arm) {
            let found = format!("the arm of row `{}`", shortened(&earlier.name));
            let key = if matches!(row.ours, RowSource::BestOf(_)) { "best_of" } else { "arm" };
            context.mismatch_in(&["expected", "rows", &index.to_string(), key], found, "arms that differ");
        }
    }
    let orders = raw.orders.into_iter().enumerate();
    let orders = orders.map(|(index, order)| checked_order(context, index, order, (&columns, &rows))).collect();
    Expected { source: raw.source, columns, rows, orders, reference_only: raw.reference_only, note: raw.note }
}

/// Refuses a name that an earlier item of the list has.
fn check_new(context: &mut Context<'_>, keys: &[&str], name: &str, taken: bool) {
    if taken {
        context.mismatch_in(&[keys, &["name"]].concat(), format!("`{}` a second time", shortened(name)), "names that differ");
    }
}

fn checked_column(context: &mut Context<'_>, keys: &[&str], raw: ColumnRaw) -> ExpectedColumn {
    let metric = sweep::metric(context, keys, MetricRaw { task: raw.task, score: raw.score });
    ExpectedColumn { name: raw.name, metric, tolerance: raw.tolerance }
}

fn checked_row(context: &mut Context<'_>, keys: &[&str], raw: RowRaw, known: (&[ExpectedColumn], Option<&[&str]>)) -> ExpectedRow {
    let (columns, swept) = known;
    for name in raw.values.keys().filter(|name| columns.iter().all(|column| column.name != **name)) {
        let known: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
        context.mismatch_in(&[keys, &["values", name]].concat(), "no such column", format!("one of `{}`", known.join("`, `")));
    }
    for (name, arm) in [("arm", &raw.arm), ("best_of", &raw.best_of)] {
        for key in arm.iter().flat_map(serde_json::Map::keys) {
            check_swept(context, &[keys, &[name, key]].concat(), key, swept);
        }
    }
    ExpectedRow { name: raw.name, ours: row_source(context, keys, raw.arm, raw.best_of), values: raw.values }
}

/// Refuses a key that no trial differs in.
fn check_swept(context: &mut Context<'_>, keys: &[&str], key: &str, swept: Option<&[&str]>) {
    let Some(swept) = swept.filter(|swept| !swept.contains(&key)) else { return };
    let known = if swept.is_empty() { "there is none".to_owned() } else { format!("`{}`", swept.join("`, `")) };
    context.mismatch_in(keys, format!("`{}`", shortened(key)), format!("a key of the sweep: {known}"));
}

fn row_source(context: &mut Context<'_>, keys: &[&str], arm: Option<Values>, best_of: Option<Values>) -> RowSource {
    match (arm, best_of) {
        (None, None) => RowSource::Quoted,
        (Some(arm), None) => RowSource::Arm(arm.into_iter().collect()),
        (arm, Some(best_of)) => {
            if arm.is_some() {
                context.mismatch_in(&[keys, &["best_of"]].concat(), "beside `arm`", "one of the two");
            }
            RowSource::BestOf(best_of.into_iter().collect())
        }
    }
}

fn checked_order(context: &mut Context<'_>, index: usize, raw: OrderRaw, known: (&[ExpectedColumn], &[ExpectedRow])) -> ExpectedOrder {
    let (columns, rows) = known;
    let number = index.to_string();
    if columns.iter().all(|column| column.name != raw.column) {
        let names: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
        let expected = format!("one of the columns `{}`", names.join("`, `"));
        context.mismatch_in(&["expected", "orders", &number, "column"], format!("`{}`", shortened(&raw.column)), expected);
    }
    let mut met: Vec<&str> = Vec::new();
    for (place, group) in raw.best_first.iter().enumerate() {
        for (item, name) in group.iter().enumerate() {
            let keys = ["expected", "orders", &number, "best_first", &place.to_string(), &item.to_string()];
            let found = format!("`{}`", shortened(name));
            match rows.iter().find(|row| row.name == *name) {
                None => context.mismatch_in(&keys, found, "the name of a row"),
                Some(row) if row.ours == RowSource::Quoted => {
                    context.mismatch_in(&keys, format!("{found}, which is only quoted"), "a row with an `arm` or `best_of`");
                }
                Some(_) if met.contains(&name.as_str()) => context.mismatch_in(&keys, format!("{found} a second time"), "each row once"),
                Some(_) => {}
            }
            met.push(name);
        }
    }
    ExpectedOrder { column: raw.column, groups: raw.best_first }
}
