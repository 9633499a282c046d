//! Evaluation files: `.jsonl`, `.jsonl.gz` and `.csv`, as rows of named text columns.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cloze_recipes::failure::{Failure, FailureKind};
use serde_json::Value;

/// Largest evaluation file after decompression, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// Nesting of a JSON row that becomes dotted column names (`choices.text.0`).
const DEPTH_MAX: usize = 4;

/// One row: column name to text, and the line it came from (1-based).
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Line in the file.
    pub line: u64,
    /// Text of each column.
    pub columns: BTreeMap<String, String>,
}

/// The files that a path of a recipe names: itself, or every evaluation file in a folder, sorted.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let unreadable =
        |error: std::io::Error| Failure::new(FailureKind::Input, "the folder cannot be read").at(path.display()).because(error);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        if format_of(&file).is_some() {
            found.push(file);
        }
    }
    found.sort();
    if found.is_empty() {
        return Err(Failure::new(FailureKind::Input, "the folder holds no evaluation file")
            .at(path.display())
            .expected("*.jsonl, *.jsonl.gz or *.csv")
            .into());
    }
    Ok(found)
}

/// Reads a file. `columns` names the columns of a csv without a header.
pub fn read(path: &Path, columns: &[String]) -> Result<Vec<Row>> {
    let Some(format) = format_of(path) else {
        return Err(Failure::new(FailureKind::Input, "unknown kind of evaluation file")
            .at(path.display())
            .expected("*.jsonl, *.jsonl.gz or *.csv")
            .into());
    };
    let text = read_text(path, format == Format::JsonLinesGzip)?;
    match format {
        Format::Csv => csv_rows(path, &text, columns),
        Format::JsonLines | Format::JsonLinesGzip => json_rows(path, &text),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Format {
    JsonLines,
    JsonLinesGzip,
    Csv,
}

fn format_of(path: &Path) -> Option<Format> {
    let name = path.file_name()?.to_str()?;
    let endings = [(".jsonl", Format::JsonLines), (".jsonl.gz", Format::JsonLinesGzip), (".csv", Format::Csv)];
    endings.into_iter().find(|(ending, _)| name.ends_with(ending)).map(|(_, format)| format)
}

fn read_text(path: &Path, gzip: bool) -> Result<String> {
    let failure = |what: &str, cause: &dyn std::fmt::Display| Failure::new(FailureKind::Input, what).at(path.display()).because(cause);
    let file = std::fs::File::open(path).map_err(|error| failure("the evaluation file cannot be read", &error))?;
    let mut bytes = Vec::new();
    let read = if gzip {
        flate2::read::MultiGzDecoder::new(file).take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)
    } else {
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)
    };
    read.map_err(|error| failure("the evaluation file is truncated or damaged", &error))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(failure("the evaluation file is too large", &format!("more than {FILE_BYTES_MAX} bytes")).into());
    }
    Ok(String::from_utf8(bytes).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|&&b| b == b'\n').count() + 1;
        Failure::new(FailureKind::Input, "the evaluation file is not UTF-8")
            .at(format!("{}:{line}", path.display()))
            .because(error.utf8_error())
    })?)
}

fn csv_rows(path: &Path, text: &str, columns: &[String]) -> Result<Vec<Row>> {
    let mut reader = csv::ReaderBuilder::new().has_headers(columns.is_empty()).flexible(false).from_reader(text.as_bytes());
    let bad = |error: csv::Error| Failure::new(FailureKind::Input, "the csv file is not valid").at(path.display()).because(error);
    let names: Vec<String> =
        if columns.is_empty() { reader.headers().map_err(bad)?.iter().map(str::to_owned).collect() } else { columns.to_vec() };
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(bad)?;
        let line = record.position().map_or(0, csv::Position::line);
        if record.len() != names.len() {
            return Err(Failure::new(FailureKind::Input, "a csv row has another number of columns than the recipe names")
                .at(format!("{}:{line}", path.display()))
                .expected(format!("{} ({})", names.len(), names.join(", ")))
                .found(record.len())
                .into());
        }
        rows.push(Row { line, columns: names.iter().cloned().zip(record.iter().map(str::to_owned)).collect() });
    }
    Ok(rows)
}

fn json_rows(path: &Path, text: &str) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = || format!("{}:{}", path.display(), index + 1);
        let value: Value = serde_json::from_str(line)
            .map_err(|error| Failure::new(FailureKind::Input, "a row is not valid JSON").at(place()).because(error))?;
        let mut columns = BTreeMap::new();
        flatten("", &value, 0, &mut columns);
        if !value.is_object() {
            return Err(Failure::new(FailureKind::Input, "a row is not a JSON object")
                .at(place())
                .found(line.chars().take(60).collect::<String>())
                .into());
        }
        rows.push(Row { line: index as u64 + 1, columns });
    }
    Ok(rows)
}

/// Nested values become dotted columns; text stays as it is, other scalars as JSON writes them.
fn flatten(prefix: &str, value: &Value, depth: usize, into: &mut BTreeMap<String, String>) {
    let name = |key: &str| if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
    match value {
        Value::Object(map) if depth < DEPTH_MAX => map.iter().for_each(|(key, value)| flatten(&name(key), value, depth + 1, into)),
        Value::Array(list) if depth < DEPTH_MAX => {
            list.iter().enumerate().for_each(|(i, value)| flatten(&name(&i.to_string()), value, depth + 1, into));
        }
        Value::String(text) => drop(into.insert(prefix.to_owned(), text.clone())),
        other => drop(into.insert(prefix.to_owned(), other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(line: u64, columns: &[(&str, &str)]) -> Row {
        Row { line, columns: columns.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect() }
    }

    fn written(name: &str, content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    #[test]
    fn csv_with_and_without_a_header() {
        let (_folder, path) = written("a.csv", b"q,a\n\"x, y\",B\n");
        assert_eq!(read(&path, &[]).unwrap(), [row(2, &[("q", "x, y"), ("a", "B")])]);
        let names = ["one".to_owned(), "two".to_owned()];
        assert_eq!(read(&path, &names).unwrap()[0], row(1, &[("one", "q"), ("two", "a")]));
    }

    #[test]
    fn nested_json_becomes_dotted_columns() {
        let (_folder, path) = written("a.jsonl", b"{\"q\": \"x\", \"choices\": {\"text\": [\"u\", \"v\"]}, \"label\": 1}\n");
        assert_eq!(read(&path, &[]).unwrap(), [row(1, &[("q", "x"), ("choices.text.0", "u"), ("choices.text.1", "v"), ("label", "1")])]);
    }

    #[test]
    fn bad_files_name_the_line() {
        for (name, content, expected) in [
            ("a.jsonl", b"{\"a\": 1}\n{".to_vec(), "a.jsonl:2"),
            ("a.jsonl", b"{\"a\": 1}\n\xff\n".to_vec(), "a.jsonl:2"),
            ("a.csv", b"x,y\n1,2,3\n".to_vec(), "a.csv"),
            ("a.jsonl.gz", b"\x1f\x8b\x08".to_vec(), "truncated or damaged"),
        ] {
            let (_folder, path) = written(name, &content);
            let text = read(&path, &[]).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
    }
}
