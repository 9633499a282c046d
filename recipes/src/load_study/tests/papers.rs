//! What the recipes say that papers have found. The numbers here were copied from the papers once more, so that a slip in a recipe shows.

use std::path::Path;

use crate::load_study;
use crate::study::Expected;

/// What a recipe of this folder expects.
fn expected(recipe: &str) -> Expected {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("{recipe}.yaml"));
    load_study(&file, &[], None).unwrap().expected.unwrap()
}

/// A paper's table: the names of its columns, and rows with their values, in the columns' order as far as they go.
type Table = (&'static str, &'static [&'static str], &'static [(&'static str, &'static [f64])]);

const MASK: [Table; 4] = [
    (
        "table1",
        &["MMLU", "MMLU-Pro", "Avg"],
        &[
            ("100 % ATP", &[37.07, 13.15, 25.11]),
            ("80 % ATP / 20 % MLM", &[41.83, 14.74, 28.29]),
            ("80 % ATP / 20 % dummy", &[43.06, 17.16, 30.11]),
        ],
    ),
    (
        "ratio",
        &["MMLU", "MMLU-Pro", "Avg"],
        &[
            ("100 % ATP", &[]),
            ("10 % MLM", &[]),
            ("15 % MLM", &[]),
            ("20 % MLM", &[]),
            ("25 % MLM", &[]),
            ("10 % dummy", &[]),
            ("15 % dummy", &[]),
            ("20 % dummy", &[]),
            ("25 % dummy", &[]),
        ],
    ),
    (
        "table2",
        &["MMLU", "MMLU-Pro", "ADEv2", "NIS", "OSE"],
        &[
            ("Tasksource-NLI", &[36.08, 16.54, 65.17, 58.72, 21.11]),
            ("RoBERTa-Large-SST", &[31.3, 13.63, 43.61, 75.0, 40.67]),
            ("UniMC", &[38.48, 18.83, 23.29, 73.96, 36.88]),
            ("ModernBERT-Large-Instruct", &[43.06, 17.16, 53.31, 85.53, 20.62]),
            ("SmolLM2-360M", &[35.8, 11.38]),
            ("Qwen2.5-0.5B", &[33.7, 15.93]),
            ("Llama3.2-1B", &[45.83, 22.6]),
            ("SmolLM2-1.7B", &[48.44, 18.31]),
            ("Qwen2.5-1.5B", &[59.67, 32.1]),
        ],
    ),
    (
        "table4",
        &["MMLU", "MMLU-Pro", "ADEv2", "NIS"],
        &[
            ("ModernBERT-Large", &[43.06, 17.16, 53.31, 85.53]),
            ("ModernBERT-Base", &[]), // ours: the paper has none
            ("GTE-en-MLM-Large", &[36.69, 14.47, 20.26, 79.48]),
            ("RoBERTa-Large", &[33.11, 14.47, 16.24, 44.0]),
        ],
    ),
];

/// Table 3: the set, then the accuracy of the MLM head and of the classification head.
const FINE_TUNED: [(&str, f64, f64); 7] = [
    ("mnli", 91.03, 90.8),
    ("yahoo", 77.88, 77.75),
    ("20ng", 73.96, 73.96),
    ("agnews", 95.24, 95.34),
    ("sst2", 96.22, 97.1),
    ("imdb", 97.2, 96.52),
    ("sst5", 61.13, 59.28),
];

/// Names of the columns, and rows with their values by column.
type Found = (Vec<String>, Vec<(String, Vec<(String, f64)>)>);

fn found(expected: &Expected) -> Found {
    let columns = expected.columns.iter().map(|column| column.name.clone()).collect();
    let rows = expected.rows.iter().map(|row| (row.name.clone(), row.values.clone().into_iter().collect())).collect();
    (columns, rows)
}

fn wanted(columns: &[&str], rows: &[(&str, &[f64])]) -> Found {
    let values = |values: &[f64]| {
        let mut named: Vec<(String, f64)> = columns.iter().zip(values).map(|(name, value)| ((*name).to_owned(), *value)).collect();
        named.sort_by(|one, other| one.0.cmp(&other.0));
        named
    };
    let rows = rows.iter().map(|(name, row)| ((*name).to_owned(), values(row))).collect();
    (columns.iter().map(|&name| name.to_owned()).collect(), rows)
}

#[test]
fn the_papers_tables_are_in_the_recipes() {
    for (table, columns, rows) in MASK {
        assert_eq!(found(&expected(&format!("its-all-in-the-mask/{table}"))), wanted(columns, rows), "{table}");
    }
    for (set, mlm_head, classification_head) in FINE_TUNED {
        let rows: [(&str, &[f64]); 2] = [("MLM head, best cell", &[mlm_head]), ("classification head, best cell", &[classification_head])];
        assert_eq!(found(&expected(&format!("its-all-in-the-mask/table3-{set}"))), wanted(&["Accuracy"], &rows), "{set}");
    }
}

#[test]
fn the_papers_orders_are_in_the_recipes() {
    let cases: [(&str, &str, &[&[&str]]); 7] = [
        ("its-all-in-the-mask/table1", "MMLU", &[&["80 % ATP / 20 % dummy"], &["80 % ATP / 20 % MLM"], &["100 % ATP"]]),
        ("its-all-in-the-mask/table1", "MMLU-Pro", &[&["80 % ATP / 20 % dummy"], &["80 % ATP / 20 % MLM"], &["100 % ATP"]]),
        ("its-all-in-the-mask/ratio", "Avg", &[&["20 % dummy", "15 % dummy"], &["10 % dummy", "25 % dummy", "100 % ATP"]]),
        (
            "flan/clusters",
            "Mean",
            &[&["7 clusters"], &["6 clusters"], &["5 clusters"], &["4 clusters", "3 clusters"], &["2 clusters"], &["1 cluster"]],
        ),
        ("flan/tasks-per-cluster", "Mean", &[&["4 tasks of each"], &["1 task of each"]]),
        ("related/quick-learners", "Accuracy", &[&["with the stage, 25 %"], &["without, 25 %"]]),
        ("related/quick-learners", "Accuracy", &[&["with the stage, 25 %"], &["without, 100 %"]]),
    ];
    for (recipe, column, groups) in cases {
        let orders = expected(recipe).orders;
        let is_there =
            orders.iter().any(|order| order.column == column && order.groups.iter().map(Vec::as_slice).eq(groups.iter().copied()));
        assert!(is_there, "{recipe}: {groups:?} is not among {orders:?}");
    }
}
