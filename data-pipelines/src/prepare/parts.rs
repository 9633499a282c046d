//! Part files: the samples of one input, before the cap.
//!
//! Layout: the samples (task, answer position, number of tokens, tokens), then the task of every sample, then a report as JSON,
//! then the report's length, a blake3 hash of all that, and a magic number. All numbers are little-endian u32.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use cloze_recipes::failure::Failure;
use serde::{Deserialize, Serialize};

use super::pipeline::ChunkSamples;
use super::tasks::TaskTable;
use crate::dataset::Sample;
use crate::files;
use crate::manifest::TaskEntry;

const MAGIC: &[u8; 8] = b"CLZPART1";
/// Length of the report, hash, magic number.
const TRAILER_BYTES: usize = VALUE_BYTES + HASH_BYTES + MAGIC.len();
const HASH_BYTES: usize = 32;
/// Task, answer position, number of tokens.
const HEADER_BYTES: usize = 12;
const VALUE_BYTES: usize = 4;
/// Buffer for reading and writing parts.
const BUFFER_BYTES: usize = 1 << 20;

/// What stands at the end of a part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PartReport {
    /// Hash of the input file.
    pub(super) input_blake3: String,
    /// Tasks by their number in this part.
    pub(super) tasks: Vec<TaskEntry>,
    /// Number of samples.
    pub(super) samples: u64,
    /// Bytes of the samples.
    pub(super) body_bytes: u64,
}

/// A finished part.
#[derive(Debug)]
pub(super) struct Part {
    path: PathBuf,
    pub(super) report: PartReport,
}

/// Path of the part with a key.
pub(super) fn part_path(folder: &Path, key: &str) -> PathBuf {
    folder.join(format!("{key}.part"))
}

impl Part {
    /// Opens a part and checks its hash; `None` where there is none or where it is not whole, so that it is made again.
    pub(super) fn find(path: &Path) -> Option<Self> {
        let mut file = File::open(path).ok()?;
        let size = file.metadata().ok()?.len();
        let trailer_at = size.checked_sub(TRAILER_BYTES as u64)?;
        // The hash covers all that comes before it, so that the numbers below can be believed.
        let mut hasher = blake3::Hasher::new();
        let mut stream = BufReader::with_capacity(BUFFER_BYTES, &mut file);
        std::io::copy(&mut stream.by_ref().take(trailer_at + VALUE_BYTES as u64), &mut hasher).ok()?;
        let mut end = [0; HASH_BYTES + MAGIC.len()];
        stream.read_exact(&mut end).ok()?;
        if end[..HASH_BYTES] != *hasher.finalize().as_bytes() || end[HASH_BYTES..] != *MAGIC {
            return None;
        }
        let mut length = [0; VALUE_BYTES];
        file.seek(SeekFrom::Start(trailer_at)).ok()?;
        file.read_exact(&mut length).ok()?;
        let report_bytes = u32::from_le_bytes(length);
        file.seek(SeekFrom::Start(trailer_at.checked_sub(u64::from(report_bytes))?)).ok()?;
        let mut report = vec![0; report_bytes as usize];
        file.read_exact(&mut report).ok()?;
        let report = serde_json::from_slice(&report).ok()?;
        Some(Self { path: path.to_path_buf(), report })
    }

    /// The task of every sample, by its number in this part.
    pub(super) fn sample_tasks(&self) -> anyhow::Result<Vec<u32>> {
        let mut file = self.open()?;
        let mut bytes = vec![0; self.report.samples as usize * VALUE_BYTES];
        file.seek(SeekFrom::Start(self.report.body_bytes))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|error| files::disk_failure("read part", &self.path, &error))?;
        Ok(values(&bytes))
    }

    /// Reads the samples in order; their tasks are numbers in this part.
    pub(super) fn samples(&self) -> anyhow::Result<PartReader<'_>> {
        Ok(PartReader { part: self, stream: BufReader::with_capacity(BUFFER_BYTES, self.open()?), num_left: self.report.samples })
    }

    fn open(&self) -> Result<File, Failure> {
        File::open(&self.path).map_err(|error| files::disk_failure("open part", &self.path, &error))
    }
}

/// Reads the samples of a part.
pub(super) struct PartReader<'a> {
    part: &'a Part,
    stream: BufReader<File>,
    num_left: u64,
}

impl PartReader<'_> {
    /// The next sample; `None` after the last.
    pub(super) fn next_sample(&mut self) -> anyhow::Result<Option<Sample>> {
        if self.num_left == 0 {
            return Ok(None);
        }
        self.num_left -= 1;
        let header = values(&self.take(HEADER_BYTES)?);
        let &[task, answer_position, num_tokens] = header.as_slice() else { anyhow::bail!("a header has three numbers") };
        let tokens = values(&self.take(num_tokens as usize * VALUE_BYTES)?);
        Ok(Some(Sample { tokens, answer_position, task }))
    }

    fn take(&mut self, num_bytes: usize) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; num_bytes];
        self.stream.read_exact(&mut bytes).map_err(|error| files::disk_failure("read part", &self.part.path, &error))?;
        Ok(bytes)
    }
}

/// Writes a part under a temporary name.
pub(super) struct PartWriter {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    tasks: TaskTable,
    sample_tasks: Vec<u32>,
    body_bytes: u64,
}

impl PartWriter {
    /// Starts the part that will be at `path`.
    pub(super) fn create(path: PathBuf) -> anyhow::Result<Self> {
        let temporary = files::temporary(&path);
        let file = File::create(&temporary).map_err(|error| files::disk_failure("create part", &temporary, &error))?;
        Ok(Self {
            path,
            file: BufWriter::with_capacity(BUFFER_BYTES, file),
            hasher: blake3::Hasher::new(),
            tasks: TaskTable::default(),
            sample_tasks: Vec::new(),
            body_bytes: 0,
        })
    }

    /// Adds the samples and counts of some records.
    pub(super) fn append(&mut self, chunk: &ChunkSamples) -> anyhow::Result<()> {
        let numbers = self.tasks.merge(&chunk.tasks.entries);
        let mut bytes = Vec::with_capacity(chunk.tokens.len() * VALUE_BYTES + chunk.rows.len() * HEADER_BYTES);
        let mut tokens = chunk.tokens.as_slice();
        for row in &chunk.rows {
            let task = numbers[row.task as usize];
            let (own, rest) = tokens.split_at(row.num_tokens as usize);
            tokens = rest;
            self.sample_tasks.push(task);
            bytes.extend([task, row.answer_position, row.num_tokens].iter().flat_map(|value| value.to_le_bytes()));
            bytes.extend(own.iter().flat_map(|token| token.to_le_bytes()));
        }
        self.body_bytes += bytes.len() as u64;
        self.write(&bytes)
    }

    /// Completes the part; only now it is there.
    pub(super) fn finish(mut self, input_blake3: String) -> anyhow::Result<Part> {
        let sample_tasks: Vec<u8> = self.sample_tasks.iter().flat_map(|task| task.to_le_bytes()).collect();
        self.write(&sample_tasks)?;
        let report =
            PartReport { input_blake3, tasks: self.tasks.entries, samples: self.sample_tasks.len() as u64, body_bytes: self.body_bytes };
        let mut end = serde_json::to_vec(&report).context("encode the report of a part")?;
        end.extend((end.len() as u32).to_le_bytes());
        self.hasher.update(&end);
        end.extend(self.hasher.finalize().as_bytes());
        end.extend(MAGIC);
        let temporary = files::temporary(&self.path);
        self.file
            .write_all(&end)
            .and_then(|()| self.file.flush())
            .and_then(|()| fs::rename(&temporary, &self.path))
            .map_err(|error| files::disk_failure("write part", &self.path, &error))?;
        Ok(Part { path: self.path, report })
    }

    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.hasher.update(bytes);
        Ok(self.file.write_all(bytes).map_err(|error| files::disk_failure("write part", &self.path, &error))?)
    }
}

fn values(bytes: &[u8]) -> Vec<u32> {
    let (values, _) = bytes.as_chunks::<VALUE_BYTES>();
    values.iter().map(|value| u32::from_le_bytes(*value)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::pipeline::Row;
    use super::*;

    fn chunk(samples: &[(&str, u32, &[u32])]) -> ChunkSamples {
        let mut chunk = ChunkSamples::default();
        for (task, answer_position, tokens) in samples {
            let task = chunk.tasks.id(task, None);
            chunk.tasks.entries[task as usize].counts.kept += 1;
            chunk.rows.push(Row { task, answer_position: *answer_position, num_tokens: tokens.len() as u32 });
            chunk.tokens.extend_from_slice(tokens);
        }
        chunk
    }

    fn write(path: &Path) -> Part {
        let mut writer = PartWriter::create(path.to_path_buf()).unwrap();
        writer.append(&chunk(&[("a", 1, &[1, 2]), ("b", 0, &[3])])).unwrap();
        writer.append(&chunk(&[("b", 2, &[4, 5, 6])])).unwrap();
        assert!(Part::find(path).is_none(), "a part is not there before it is finished");
        writer.finish("hash".into()).unwrap()
    }

    #[test]
    fn samples_come_back_with_the_tasks_of_the_part() {
        let folder = tempfile::tempdir().unwrap();
        let path = part_path(folder.path(), "key");
        let written = write(&path);
        let part = Part::find(&path).unwrap();
        assert_eq!(part.report, written.report);
        assert_eq!(part.sample_tasks().unwrap(), [0, 1, 1]);
        let mut reader = part.samples().unwrap();
        let expected: [(&[u32], u32, u32); 3] = [(&[1, 2], 1, 0), (&[3], 0, 1), (&[4, 5, 6], 2, 1)];
        for (tokens, answer_position, task) in expected {
            assert_eq!(reader.next_sample().unwrap(), Some(Sample { tokens: tokens.to_vec(), answer_position, task }));
        }
        assert_eq!(reader.next_sample().unwrap(), None);
        assert_eq!(part.report.tasks.iter().map(|task| task.counts.kept).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_part_that_is_not_whole_counts_as_missing() {
        let folder = tempfile::tempdir().unwrap();
        let path = part_path(folder.path(), "key");
        write(&path);
        let content = fs::read(&path).unwrap();
        for at in 0..content.len() {
            let mut broken = content.clone();
            broken[at] ^= 4;
            fs::write(&path, &broken).unwrap();
            let part = Part::find(&path);
            assert!(part.is_none(), "{at}");
            fs::write(&path, &content[..at]).unwrap();
            assert!(Part::find(&path).is_none(), "{at}");
        }
    }
}
