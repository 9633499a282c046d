//! Shards: samples as Arrow IPC files of one uncompressed record batch, so that one sample can be read by its position.
//!
//! Columns: `tokens` (list of u32), `answer_position` (u32), `task` (u32), `crc32c` (u32, over the little-endian tokens followed
//! by the answer position). Any Arrow reader opens them; [`ShardReader`] keeps all but the tokens in memory.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use arrow_array::{ListArray, RecordBatch, UInt32Array};
use arrow_buffer::{OffsetBuffer, ScalarBuffer};
use arrow_ipc::writer::FileWriter;
use arrow_schema::{ArrowError, DataType, Field, Schema};
use cloze_recipes::failure::{Failure, FailureKind};

use crate::dataset::Sample;
use crate::files;
use crate::manifest::ShardEntry;

/// A shard is closed once it holds this many tokens: 2^24 · 4 bytes = 64 MiB.
pub const SHARD_TOKENS: usize = 1 << 24;
/// Offsets inside a shard are 32-bit; one sample more than [`SHARD_TOKENS`] stays far below this.
const MAX_SHARD_TOKENS: usize = 1 << 26;
/// Longest footer or batch header that is read; ours are below 1 KiB.
const MAX_HEADER_BYTES: u64 = 1 << 20;
/// An Arrow file ends with the length of its footer (4 bytes) and `ARROW1`.
const TRAILER_BYTES: u64 = 10;
/// A batch header starts with a marker and its length, 4 bytes each.
const HEADER_PREFIX_BYTES: usize = 8;
/// Bytes of a token, an offset, or a value of another column.
const VALUE_BYTES: usize = 4;
/// Position of the data buffers in the batch; those between are empty validity bitmaps.
const OFFSETS_BUFFER: usize = 1;
const TOKENS_BUFFER: usize = 3;
const ANSWERS_BUFFER: usize = 5;
const TASKS_BUFFER: usize = 7;
const CHECKSUMS_BUFFER: usize = 9;

/// Name of the n-th shard.
pub fn shard_name(index: usize) -> String {
    format!("shard-{index:05}.arrow")
}

/// Checksum of a sample: crc32c over its tokens and its answer position, all little-endian.
pub fn checksum(token_bytes: &[u8], answer_position: u32) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(token_bytes), &answer_position.to_le_bytes())
}

/// Collects the samples of one shard.
#[derive(Debug)]
pub struct ShardBuilder {
    tokens: Vec<u32>,
    offsets: Vec<i32>,
    answers: Vec<u32>,
    tasks: Vec<u32>,
    checksums: Vec<u32>,
}

impl Default for ShardBuilder {
    fn default() -> Self {
        Self { tokens: Vec::new(), offsets: vec![0], answers: Vec::new(), tasks: Vec::new(), checksums: Vec::new() }
    }
}

impl ShardBuilder {
    /// Adds a sample. Fails when the shard would outgrow its offsets.
    pub fn push(&mut self, sample: &Sample) -> anyhow::Result<()> {
        anyhow::ensure!(self.tokens.len() + sample.tokens.len() <= MAX_SHARD_TOKENS, "a shard holds at most {MAX_SHARD_TOKENS} tokens");
        let bytes: Vec<u8> = sample.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        self.tokens.extend_from_slice(&sample.tokens);
        self.offsets.push(self.tokens.len() as i32);
        self.answers.push(sample.answer_position);
        self.tasks.push(sample.task);
        self.checksums.push(checksum(&bytes, sample.answer_position));
        Ok(())
    }

    /// Whether it is time to write the shard.
    pub fn is_full(&self) -> bool {
        self.tokens.len() >= SHARD_TOKENS
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Writes the shard into a folder; it appears whole or not at all.
    pub fn write(self, folder: &Path, name: &str) -> anyhow::Result<ShardEntry> {
        let (samples, tokens) = (self.answers.len() as u64, self.tokens.len() as u64);
        let path = folder.join(name);
        let temporary = files::temporary(&path);
        let batch = self.batch().context("build the record batch of a shard")?;
        let (bytes, blake3) = write_batch(&temporary, &batch).map_err(|error| {
            let _ = fs::remove_file(&temporary);
            files::disk_failure("write shard", &path, &error)
        })?;
        files::publish(&temporary, &path)?;
        Ok(ShardEntry { file: name.to_owned(), samples, tokens, bytes, blake3 })
    }

    fn batch(self) -> Result<RecordBatch, ArrowError> {
        let offsets = OffsetBuffer::new(ScalarBuffer::from(self.offsets));
        let tokens = ListArray::try_new(token_field(), offsets, Arc::new(UInt32Array::from(self.tokens)), None)?;
        RecordBatch::try_new(
            Arc::new(schema()),
            vec![
                Arc::new(tokens),
                Arc::new(UInt32Array::from(self.answers)),
                Arc::new(UInt32Array::from(self.tasks)),
                Arc::new(UInt32Array::from(self.checksums)),
            ],
        )
    }
}

fn token_field() -> Arc<Field> {
    Arc::new(Field::new("item", DataType::UInt32, false))
}

fn schema() -> Schema {
    Schema::new(vec![
        Field::new("tokens", DataType::List(token_field()), false),
        Field::new("answer_position", DataType::UInt32, false),
        Field::new("task", DataType::UInt32, false),
        Field::new("crc32c", DataType::UInt32, false),
    ])
}

/// Writes an Arrow file and answers with its size and hash.
fn write_batch(path: &Path, batch: &RecordBatch) -> io::Result<(u64, String)> {
    let file = File::create(path)?;
    let hashing = Hashing { inner: BufWriter::new(file), hasher: blake3::Hasher::new(), num_bytes: 0 };
    let mut writer = FileWriter::try_new(hashing, &batch.schema()).map_err(io_error)?;
    writer.write(batch).map_err(io_error)?;
    let hashing = writer.into_inner().map_err(io_error)?;
    let file = hashing.inner.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    Ok((hashing.num_bytes, hashing.hasher.finalize().to_hex().to_string()))
}

/// The disk's own error inside Arrow's, so that a full disk is seen as such.
fn io_error(error: ArrowError) -> io::Error {
    match error {
        ArrowError::IoError(_, error) => error,
        other => io::Error::other(other),
    }
}

/// Hashes and counts what is written.
struct Hashing<W> {
    inner: W,
    hasher: blake3::Hasher,
    num_bytes: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.num_bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Reads single samples of a shard; 16 bytes of memory for each sample in it.
#[derive(Debug)]
pub struct ShardReader {
    path: PathBuf,
    file: File,
    tokens_at: u64,
    offsets: Vec<u32>,
    answers: Vec<u32>,
    tasks: Vec<u32>,
    checksums: Vec<u32>,
}

impl ShardReader {
    /// Opens a shard and reads all but its tokens. Fails when it is not a shard of ours or does not hold what its entry says.
    pub fn open(folder: &Path, entry: &ShardEntry) -> anyhow::Result<Self> {
        let path = folder.join(&entry.file);
        let file = File::open(&path).map_err(|error| damaged(&path, "cannot be opened").because(error))?;
        let size = file.metadata().map_err(|error| files::disk_failure("read shard", &path, &error))?.len();
        if size != entry.bytes {
            let failure = damaged(&path, "has another size than the manifest says");
            return Err(failure.expected(format!("{} bytes", entry.bytes)).found(format!("{size} bytes")).into());
        }
        let layout = Layout::read(&file, size).map_err(|reason| damaged(&path, "cannot be read").because(reason))?;
        let column = |buffer: usize| layout.column(&file, buffer).map_err(|reason| damaged(&path, "cannot be read").because(reason));
        let shard = Self {
            tokens_at: layout.buffers[TOKENS_BUFFER].0,
            offsets: column(OFFSETS_BUFFER)?,
            answers: column(ANSWERS_BUFFER)?,
            tasks: column(TASKS_BUFFER)?,
            checksums: column(CHECKSUMS_BUFFER)?,
            file,
            path,
        };
        shard.check(entry, layout.buffers[TOKENS_BUFFER].1)?;
        Ok(shard)
    }

    /// Number of samples.
    pub fn num_samples(&self) -> usize {
        self.answers.len()
    }

    /// Tokens of the sample in a row; panics past the end.
    pub fn length(&self, row: usize) -> u32 {
        self.offsets[row + 1] - self.offsets[row]
    }

    /// Task of the sample in a row; panics past the end.
    pub fn task(&self, row: usize) -> u32 {
        self.tasks[row]
    }

    /// Reads the sample in a row and checks it; panics past the end. Fails when its checksum is wrong.
    pub fn read(&self, row: usize) -> anyhow::Result<Sample> {
        let mut bytes = vec![0; self.length(row) as usize * VALUE_BYTES];
        let at = self.tokens_at + u64::from(self.offsets[row]) * VALUE_BYTES as u64;
        self.file.read_exact_at(&mut bytes, at).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged(&self.path, "was cut off since it was opened"),
            _ => files::disk_failure("read shard", &self.path, &error),
        })?;
        let answer_position = self.answers[row];
        let found = checksum(&bytes, answer_position);
        if found != self.checksums[row] || answer_position >= self.length(row) {
            return Err(damaged(&self.path, &format!("has a damaged sample in row {row}"))
                .expected(format!("crc32c {:08x}", self.checksums[row]))
                .found(format!("crc32c {found:08x}"))
                .into());
        }
        Ok(Sample { tokens: values(&bytes), answer_position, task: self.tasks[row] })
    }

    fn check(&self, entry: &ShardEntry, token_bytes: u64) -> Result<(), Failure> {
        let samples = self.answers.len();
        let same_length = self.tasks.len() == samples && self.checksums.len() == samples && self.offsets.len() == samples + 1;
        let ascending = self.offsets.first() == Some(&0) && self.offsets.is_sorted();
        let last = self.offsets.last().map_or(0, |last| u64::from(*last));
        if !same_length || !ascending || last * VALUE_BYTES as u64 != token_bytes {
            return Err(damaged(&self.path, "has columns that do not fit together"));
        }
        if (samples as u64, last) != (entry.samples, entry.tokens) {
            return Err(damaged(&self.path, "does not hold what the manifest says")
                .expected(format!("{} samples, {} tokens", entry.samples, entry.tokens))
                .found(format!("{samples} samples, {last} tokens")));
        }
        Ok(())
    }
}

/// What is told about a shard that is not as it was written.
pub(crate) fn damaged(path: &Path, what: &str) -> Failure {
    Failure::new(FailureKind::Damaged, format!("shard {what}"))
        .at(path.display())
        .hint("copy the shard again, or prepare the data again: `cloze data prepare RECIPE --force`")
}

/// Where the buffers of the only batch are in the file: offset and length in bytes.
struct Layout {
    buffers: Vec<(u64, u64)>,
}

impl Layout {
    fn read(file: &File, size: u64) -> Result<Self, String> {
        let footer = footer_bytes(file, size)?;
        let footer = arrow_ipc::root_as_footer(&footer).map_err(|error| format!("footer: {error}"))?;
        let found = footer.schema().ok_or("footer has no schema")?;
        let found = arrow_ipc::convert::try_fb_to_schema(found).map_err(|error| format!("schema: {error}"))?;
        if found.fields() != schema().fields() {
            return Err(format!("columns are {found}"));
        }
        let blocks = footer.recordBatches().ok_or("footer has no batches")?;
        if blocks.len() != 1 {
            return Err(format!("{} batches instead of one", blocks.len()));
        }
        let block = blocks.get(0);
        let (offset, header_bytes) = (unsigned(block.offset())?, unsigned(i64::from(block.metaDataLength()))?);
        let header = bytes_at(file, offset, header_bytes, size)?;
        let message = header.get(HEADER_PREFIX_BYTES..).ok_or("batch header is too short")?;
        let message = arrow_ipc::root_as_message(message).map_err(|error| format!("batch header: {error}"))?;
        let batch = message.header_as_record_batch().ok_or("no record batch")?;
        if batch.compression().is_some() {
            return Err("batch is compressed".to_owned());
        }
        let body_at = offset + header_bytes;
        let mut buffers = Vec::new();
        for buffer in batch.buffers().ok_or("batch has no buffers")? {
            let (at, length) = (body_at.saturating_add(unsigned(buffer.offset())?), unsigned(buffer.length())?);
            if at.saturating_add(length) > size {
                return Err("a buffer reaches past the end of the file".to_owned());
            }
            buffers.push((at, length));
        }
        if buffers.len() != CHECKSUMS_BUFFER + 1 {
            return Err(format!("{} buffers instead of {}", buffers.len(), CHECKSUMS_BUFFER + 1));
        }
        Ok(Self { buffers })
    }

    fn column(&self, file: &File, buffer: usize) -> Result<Vec<u32>, String> {
        let (at, length) = self.buffers[buffer];
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, at).map_err(|error| error.to_string())?;
        Ok(values(&bytes))
    }
}

fn footer_bytes(file: &File, size: u64) -> Result<Vec<u8>, String> {
    let trailer_at = size.checked_sub(TRAILER_BYTES).ok_or("file is too short")?;
    let mut trailer = [0; TRAILER_BYTES as usize];
    file.read_exact_at(&mut trailer, trailer_at).map_err(|error| error.to_string())?;
    let length = arrow_ipc::reader::read_footer_length(trailer).map_err(|error| error.to_string())? as u64;
    let at = trailer_at.checked_sub(length).ok_or("footer is longer than the file")?;
    bytes_at(file, at, length, size)
}

fn bytes_at(file: &File, at: u64, length: u64, size: u64) -> Result<Vec<u8>, String> {
    if length > MAX_HEADER_BYTES || at.saturating_add(length) > size {
        return Err("a header reaches past the end of the file".to_owned());
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, at).map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn unsigned(value: i64) -> Result<u64, String> {
    u64::try_from(value).map_err(|_| "a negative offset".to_owned())
}

fn values(bytes: &[u8]) -> Vec<u32> {
    let (values, _) = bytes.as_chunks::<VALUE_BYTES>();
    values.iter().map(|value| u32::from_le_bytes(*value)).collect()
}

#[cfg(test)]
mod tests {
    use arrow_ipc::reader::FileReader;
    use proptest::prelude::*;

    use super::*;

    fn sample(tokens: &[u32], answer_position: u32, task: u32) -> Sample {
        Sample { tokens: tokens.to_vec(), answer_position, task }
    }

    fn write(folder: &Path, samples: &[Sample]) -> ShardEntry {
        let mut builder = ShardBuilder::default();
        samples.iter().for_each(|sample| builder.push(sample).unwrap());
        builder.write(folder, &shard_name(0)).unwrap()
    }

    #[test]
    fn a_shard_is_an_arrow_file_that_hashes_as_its_entry_says() {
        let folder = tempfile::tempdir().unwrap();
        let entry = write(folder.path(), &[sample(&[1, 2, 3], 1, 0), sample(&[4], 0, 7)]);
        let content = fs::read(folder.path().join(&entry.file)).unwrap();
        assert_eq!(entry.bytes, content.len() as u64);
        assert_eq!(entry.blake3, blake3::hash(&content).to_hex().to_string());
        assert_eq!((entry.samples, entry.tokens), (2, 4));
        let mut batches = FileReader::try_new(io::Cursor::new(content), None).unwrap();
        let batch = batches.next().unwrap().unwrap();
        assert_eq!(batch.num_rows(), 2);
        assert_eq!(batch.schema().fields(), schema().fields());
        assert!(batches.next().is_none());
    }

    #[test]
    fn every_flipped_bit_of_a_sample_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let entry = write(folder.path(), &[sample(&[1, 2, 3], 1, 0), sample(&[4, 5], 0, 7)]);
        let path = folder.path().join(&entry.file);
        let content = fs::read(&path).unwrap();
        let at = ShardReader::open(folder.path(), &entry).unwrap().tokens_at as usize;
        for bit in 0..8 * 5 * VALUE_BYTES {
            let mut broken = content.clone();
            broken[at + bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, broken).unwrap();
            let shard = ShardReader::open(folder.path(), &entry).unwrap();
            let failure = (0..2).find_map(|row| shard.read(row).err()).unwrap().downcast::<Failure>().unwrap();
            assert_eq!(failure.kind, FailureKind::Damaged);
            assert!(failure.what.contains(if bit < 8 * 3 * VALUE_BYTES { "row 0" } else { "row 1" }));
            assert!(failure.place.unwrap().ends_with("shard-00000.arrow"));
        }
    }

    #[test]
    fn cut_foreign_and_missing_shards_are_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let entry = write(folder.path(), &[sample(&[1, 2, 3], 1, 0)]);
        let path = folder.path().join(&entry.file);
        let content = fs::read(&path).unwrap();
        let mut garbage = content.clone();
        garbage[content.len() - 200..].fill(0x5a);
        let cases = [content[..content.len() - 9].to_vec(), Vec::new(), garbage, vec![0; content.len()]];
        for broken in cases {
            fs::write(&path, &broken).unwrap();
            let failure = ShardReader::open(folder.path(), &entry).unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!(failure.kind, FailureKind::Damaged);
            // The same without the size to give it away.
            let entry = ShardEntry { bytes: broken.len() as u64, ..entry.clone() };
            assert!(ShardReader::open(folder.path(), &entry).is_err());
        }
        fs::remove_file(&path).unwrap();
        assert!(ShardReader::open(folder.path(), &entry).is_err());
        assert!(ShardReader::open(folder.path(), &ShardEntry { samples: 9, ..entry }).is_err());
    }

    #[test]
    fn a_shard_that_cannot_be_written_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("shard-00000.arrow")).unwrap();
        let mut builder = ShardBuilder::default();
        builder.push(&sample(&[1], 0, 0)).unwrap();
        let failure = builder.write(&folder.path().join("none"), "shard-00000.arrow").unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.kind, FailureKind::Storage);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    proptest! {
        #[test]
        fn samples_read_back(lengths in prop::collection::vec(1_usize..40, 1..30), seed in any::<u32>()) {
            let folder = tempfile::tempdir().unwrap();
            let samples: Vec<Sample> = (0_u32..).zip(&lengths).map(|(row, length)| {
                let tokens: Vec<u32> = (0..*length as u32).map(|i| seed ^ (row * 1000 + i)).collect();
                sample(&tokens, *length as u32 - 1, row % 3)
            }).collect();
            let entry = write(folder.path(), &samples);
            let shard = ShardReader::open(folder.path(), &entry).unwrap();
            prop_assert_eq!(shard.num_samples(), samples.len());
            for (row, sample) in samples.iter().enumerate() {
                prop_assert_eq!(&shard.read(row).unwrap(), sample);
                prop_assert_eq!(shard.length(row) as usize, sample.tokens.len());
            }
        }
    }
}
