//! Reads one record file of any format.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use cloze_recipes::failure::Failure;
use flate2::read::MultiGzDecoder;

use super::fields::{Record, parse_line};
use super::input::{Format, Input};
use super::lines::{LineReader, Lines};
use super::table::{Rows, TableReader};
use crate::files;
use crate::store::ObjectReader;

/// Record files are read in ranges of this many bytes, one ahead.
const RANGE_BYTES: u64 = 2 << 20;
/// Buffer behind a decoder.
const BUFFER_BYTES: usize = 256 << 10;

/// Some records of a file, not yet parsed.
#[derive(Debug)]
pub struct Chunk(Body);

#[derive(Debug)]
enum Body {
    Lines(Lines),
    Rows(Rows),
}

impl Chunk {
    /// Calls `visit` with every record in order. Stops at the first error; one in a record names `url` and the line or row.
    pub fn for_each(&self, url: &str, mut visit: impl FnMut(&Record<'_>) -> anyhow::Result<()>) -> anyhow::Result<()> {
        match &self.0 {
            Body::Lines(lines) => {
                for (number, line) in lines.iter() {
                    visit(&parse_line(line).map_err(|failure| failure.at(format!("{url}:{number}")))?)?;
                }
            }
            Body::Rows(rows) => {
                for (number, record) in rows.iter() {
                    visit(&record.map_err(|failure| failure.at(format!("{url}: row {number}")))?)?;
                }
            }
        }
        Ok(())
    }
}

/// Reads the chunks of one file.
pub struct RecordReader {
    source: Source,
    digest: Arc<Mutex<blake3::Hasher>>,
}

enum Source {
    Lines(LineReader<Box<dyn io::BufRead + Send>>),
    Table(Box<TableReader>),
}

impl RecordReader {
    /// Opens a file. A parquet file in a bucket is first copied to `scratch`, since its index stands at the end.
    pub fn open(input: &Input, scratch: &Path) -> anyhow::Result<Self> {
        let mut raw = ObjectReader::new(&input.store, &input.info, RANGE_BYTES)?;
        let digest = raw.digest();
        let source = match input.format {
            Format::Jsonl => lines(raw, input),
            Format::JsonlGzip => lines(MultiGzDecoder::new(raw), input),
            Format::JsonlZstd => {
                let decoder = zstd::stream::read::Decoder::new(raw).map_err(|error| ObjectReader::failure(error, &input.url))?;
                lines(decoder, input)
            }
            Format::Parquet => {
                let file = parquet_file(&mut raw, input, scratch)?;
                Source::Table(Box::new(TableReader::new(file, &input.url)?))
            }
        };
        Ok(Self { source, digest })
    }

    /// The next records; `None` at the end of the file. Fails with file and line when the file is damaged.
    pub fn next_chunk(&mut self) -> anyhow::Result<Option<Chunk>> {
        let body = match &mut self.source {
            Source::Lines(lines) => lines.next_lines()?.map(Body::Lines),
            Source::Table(table) => table.next_rows()?.map(Body::Rows),
        };
        Ok(body.map(Chunk))
    }

    /// Hash (blake3, hex) of the file as it is stored; valid after the last chunk.
    pub fn content_hash(&self) -> String {
        self.digest.lock().unwrap_or_else(PoisonError::into_inner).finalize().to_hex().to_string()
    }
}

/// Hash (blake3, hex) of a file as it is stored; reads all of it.
pub fn content_hash(input: &Input) -> anyhow::Result<String> {
    let mut raw = ObjectReader::new(&input.store, &input.info, RANGE_BYTES)?;
    let digest = raw.digest();
    io::copy(&mut raw, &mut io::sink()).map_err(|error| ObjectReader::failure(error, &input.url))?;
    let hash = digest.lock().unwrap_or_else(PoisonError::into_inner).finalize();
    Ok(hash.to_hex().to_string())
}

fn lines(stream: impl Read + Send + 'static, input: &Input) -> Source {
    Source::Lines(LineReader::new(Box::new(BufReader::with_capacity(BUFFER_BYTES, stream)), &input.url))
}

/// A local file itself, or an unnamed copy of a remote one; either way all of it has gone through the hash.
fn parquet_file(raw: &mut ObjectReader, input: &Input, scratch: &Path) -> anyhow::Result<File> {
    if input.store.is_local() {
        io::copy(raw, &mut io::sink()).map_err(|error| ObjectReader::failure(error, &input.url))?;
        let path = Path::new(&input.url);
        return Ok(File::open(path).map_err(|error| files::disk_failure("open file", path, &error))?);
    }
    let path = scratch.join(format!("download-{}.tmp", blake3::hash(input.url.as_bytes()).to_hex()));
    let disk = |error: io::Error| files::disk_failure("copy parquet file from its bucket", &path, &error);
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&path).map_err(disk)?;
    // Without its name the copy goes away by itself, however this program ends.
    fs::remove_file(&path).map_err(disk)?;
    copy(raw, &mut file, input, &disk)?;
    Ok(file)
}

fn copy(raw: &mut ObjectReader, file: &mut File, input: &Input, disk: &dyn Fn(io::Error) -> Failure) -> Result<(), Failure> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let num_bytes = raw.read(&mut buffer).map_err(|error| ObjectReader::failure(error, &input.url))?;
        if num_bytes == 0 {
            return Ok(());
        }
        file.write_all(&buffer[..num_bytes]).map_err(disk)?;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cloze_recipes::failure::FailureKind;
    use cloze_recipes::recipe::DataSource;

    use super::*;
    use crate::fixtures;
    use crate::record::list_inputs;

    fn open(path: &Path) -> anyhow::Result<(Input, RecordReader)> {
        let source = DataSource { url: path.display().to_string(), task: None, options: BTreeMap::new() };
        let input = list_inputs(&[source])?.remove(0);
        let reader = RecordReader::open(&input, path.parent().unwrap())?;
        Ok((input, reader))
    }

    fn read(path: &Path) -> anyhow::Result<(Vec<String>, String)> {
        let (input, mut reader) = open(path)?;
        let mut inputs = Vec::new();
        while let Some(chunk) = reader.next_chunk()? {
            chunk.for_each(&input.url, |record| {
                inputs.push(record.inputs.to_string());
                Ok(())
            })?;
        }
        Ok((inputs, reader.content_hash()))
    }

    #[test]
    fn every_format_gives_the_same_records_and_the_hash_of_the_stored_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let rows: Vec<(String, &str)> = (0..3000).map(|row| (format!("question {row}"), "yes")).collect();
        for (name, content) in fixtures::every_format(&rows) {
            let path = folder.path().join(name);
            fs::write(&path, &content).unwrap();
            let (inputs, hash) = read(&path).unwrap();
            assert_eq!(inputs.len(), 3000, "{name}");
            assert!(inputs.iter().zip(&rows).all(|(found, (expected, _))| found == expected), "{name}");
            assert_eq!(hash, blake3::hash(&content).to_hex().to_string(), "{name}");
            assert_eq!(content_hash(&open(&path).unwrap().0).unwrap(), hash, "{name}");
        }
    }

    #[test]
    fn cut_files_are_input_failures_with_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let rows: Vec<(String, &str)> = (0..3000).map(|row| (format!("question {}", blake3::hash(&[row as u8])), "yes")).collect();
        for (name, content) in fixtures::every_format(&rows) {
            let path = folder.path().join(name);
            fs::write(&path, &content[..content.len() * 2 / 3 - 5]).unwrap();
            let failure = read(&path).unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!(failure.kind, FailureKind::Input, "{name}");
            assert!(failure.place.as_deref().unwrap().starts_with(&path.display().to_string()), "{name}");
            assert!(name.ends_with("parquet") || failure.place.unwrap().rsplit(':').next().unwrap().parse::<u64>().unwrap() >= 1, "{name}");
        }
    }

    #[test]
    fn a_bad_line_is_named_by_file_and_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let good = r#"{"inputs":"q","targets":"a"}"#;
        let cases: [(&[u8], &str); 3] = [
            (b"{\"inputs\":\"\xff\"}", "text is not UTF-8"),
            (b"{\"inputs\":\"q\"}", "record has no usable `targets`"),
            (b"{\"inputs\":", "line is not a JSON object"),
        ];
        for (bad, what) in cases {
            fs::write(&path, [good.as_bytes(), b"\n\n", bad, b"\n"].concat()).unwrap();
            let failure = read(&path).unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!(failure.what, what);
            assert_eq!(failure.place, Some(format!("{}:3", path.display())));
        }
    }
}
