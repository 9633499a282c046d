//! Reads records from parquet.

use std::borrow::Cow;
use std::fmt::Display;
use std::fs::File;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type};
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use cloze_recipes::failure::{Failure, FailureKind};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use super::fields::{COLUMNS, Fields, Record, Value};

/// Rows of one chunk.
const CHUNK_ROWS: usize = 1024;

/// Some rows of a file.
#[derive(Debug)]
pub(super) struct Rows {
    /// 1-based number of the first row.
    first: u64,
    batch: RecordBatch,
}

impl Rows {
    /// Number and record of every row.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, Result<Record<'_>, Failure>)> {
        (self.first..).zip((0..self.batch.num_rows()).map(|row| fields(&self.batch, row).into_record()))
    }
}

/// Reads the columns that records need from a parquet file.
pub(super) struct TableReader {
    batches: ParquetRecordBatchReader,
    url: String,
    next_row: u64,
}

impl TableReader {
    /// Opens a file; `url` is its name in messages. Fails when it is no parquet file.
    pub(super) fn new(file: File, url: &str) -> anyhow::Result<Self> {
        let broken = |error: &dyn Display| damaged(url, error);
        // The Arrow schema that writers embed would bring dictionaries and views; without it strings are plain.
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let builder = ParquetRecordBatchReaderBuilder::try_new_with_options(file, options).map_err(|error| broken(&error))?;
        let columns = ProjectionMask::columns(builder.parquet_schema(), COLUMNS);
        let batches = builder.with_projection(columns).with_batch_size(CHUNK_ROWS).build().map_err(|error| broken(&error))?;
        Ok(Self { batches, url: url.to_owned(), next_row: 1 })
    }

    /// The next rows; `None` at the end of the file.
    pub(super) fn next_rows(&mut self) -> anyhow::Result<Option<Rows>> {
        let Some(batch) = self.batches.next() else { return Ok(None) };
        let batch = batch.map_err(|error| damaged(&format!("{}: row {} or later", self.url, self.next_row), &error))?;
        let first = self.next_row;
        self.next_row += batch.num_rows() as u64;
        Ok(Some(Rows { first, batch }))
    }
}

fn damaged(place: &str, error: &dyn Display) -> Failure {
    Failure::new(FailureKind::Input, "parquet file is cut off or damaged")
        .at(place)
        .because(error)
        .hint("get the file again; finished files are kept, and the same command goes on")
}

fn fields(batch: &RecordBatch, row: usize) -> Fields<'_> {
    Fields(COLUMNS.map(|name| batch.column_by_name(name).map_or(Value::Absent, |column| value(column.as_ref(), row))))
}

fn value(column: &dyn Array, row: usize) -> Value<'_> {
    if column.is_null(row) {
        return Value::Absent;
    }
    match column.data_type() {
        DataType::Null => Value::Absent,
        DataType::Utf8 => Value::Text(Cow::Borrowed(column.as_string::<i32>().value(row))),
        DataType::LargeUtf8 => Value::Text(Cow::Borrowed(column.as_string::<i64>().value(row))),
        DataType::Binary => match std::str::from_utf8(column.as_binary::<i32>().value(row)) {
            Ok(text) => Value::Text(Cow::Borrowed(text)),
            Err(_) => Value::Other("bytes that are not UTF-8"),
        },
        DataType::Int8 => Value::Number(column.as_primitive::<Int8Type>().value(row).to_string()),
        DataType::Int16 => Value::Number(column.as_primitive::<Int16Type>().value(row).to_string()),
        DataType::Int32 => Value::Number(column.as_primitive::<Int32Type>().value(row).to_string()),
        DataType::Int64 => Value::Number(column.as_primitive::<Int64Type>().value(row).to_string()),
        DataType::UInt8 => Value::Number(column.as_primitive::<UInt8Type>().value(row).to_string()),
        DataType::UInt16 => Value::Number(column.as_primitive::<UInt16Type>().value(row).to_string()),
        DataType::UInt32 => Value::Number(column.as_primitive::<UInt32Type>().value(row).to_string()),
        DataType::UInt64 => Value::Number(column.as_primitive::<UInt64Type>().value(row).to_string()),
        DataType::List(_) => texts(column.as_list::<i32>().value(row).as_ref()),
        _ => Value::Other("a column that is neither text nor number"),
    }
}

fn texts(items: &dyn Array) -> Value<'static> {
    match items.as_string_opt::<i32>() {
        Some(items) => Value::List(items.iter().map(|text| Cow::Owned(text.unwrap_or_default().to_owned())).collect()),
        None => Value::Other("a list of something else than strings"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::fixtures;

    fn read(content: &[u8]) -> anyhow::Result<Vec<(u64, Result<(String, String, Option<String>), Failure>)>> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        let mut reader = TableReader::new(file, "t.parquet")?;
        let mut found = Vec::new();
        while let Some(rows) = reader.next_rows()? {
            found.extend(rows.iter().map(|(row, record)| {
                let record = record.map(|r| (r.inputs.into_owned(), r.targets.into_owned(), r.template.map(Cow::into_owned)));
                (row, record)
            }));
        }
        Ok(found)
    }

    #[test]
    fn rows_are_numbered_and_columns_of_other_types_are_read() {
        let found = read(&fixtures::parquet(&[("q1", Some("yes")), ("q2", None)])).unwrap();
        assert_eq!(found[0], (1, Ok(("q1".to_owned(), "yes".to_owned(), Some("0".to_owned())))));
        let failure = found[1].1.as_ref().unwrap_err();
        assert_eq!((found[1].0, failure.what.as_str()), (2, "record has no usable `targets`"));
    }

    #[test]
    fn many_rows_come_in_chunks_with_running_numbers() {
        let rows = vec![("q", Some("yes")); CHUNK_ROWS + 3];
        let found = read(&fixtures::parquet(&rows)).unwrap();
        assert_eq!(found.last().unwrap().0, (CHUNK_ROWS + 3) as u64);
    }

    #[test]
    fn a_cut_file_is_an_input_failure() {
        let content = fixtures::parquet(&[("q", Some("yes"))]);
        for end in [0, 3, content.len() - 1] {
            let failure = read(&content[..end]).unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!(failure.what, "parquet file is cut off or damaged", "{end}");
            assert_eq!(failure.kind, FailureKind::Input);
        }
    }
}
