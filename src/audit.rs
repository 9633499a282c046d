//! Which samples this worker trained on in which step, for those who want to check it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cloze_recipes::failure::{Failure, FailureKind};
use serde::Serialize;

use crate::batch_feed::StepBatch;

/// The audit file of one worker; a line for every step that it completed.
pub struct Audit {
    path: PathBuf,
    file: File,
    generation: u64,
}

/// One line.
#[derive(Serialize)]
struct Line {
    generation: u64,
    /// Steps done after it.
    step: u64,
    /// Epoch and sample of each example.
    samples: Vec<(u64, u64)>,
}

impl Audit {
    /// Opens the file for appending; its folder is made where it is missing.
    pub fn open(path: &Path, generation: u64) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        let opened = fs::create_dir_all(folder).and_then(|()| OpenOptions::new().create(true).read(true).append(true).open(path));
        let file = opened.and_then(end_last_line).map_err(|error| storage(path, &error))?;
        Ok(Self { path: path.to_owned(), file, generation })
    }

    /// Writes the line of a step in one piece.
    pub fn write(&mut self, batch: &StepBatch) -> Result<()> {
        let samples = batch.packs.iter().flat_map(|pack| &pack.slots).map(|slot| (slot.epoch, slot.sample)).collect();
        let line = Line { generation: self.generation, step: batch.step + 1, samples };
        let mut text = serde_json::to_vec(&line).context("serialise an audit line")?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(|error| storage(&self.path, &error).into())
    }
}

/// A process that was killed may have left half a line; the next one begins on its own.
fn end_last_line(mut file: File) -> io::Result<File> {
    let mut last = [b'\n'];
    if file.metadata()?.len() > 0 {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
    }
    if last != [b'\n'] {
        file.write_all(b"\n")?;
    }
    Ok(file)
}

fn storage(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(FailureKind::Storage, "failed to write the audit of the samples")
        .at(path.display())
        .because(error)
        .hint("make room, or set `train.audit_samples: false`")
}
