//! Prepared data as training sees it: numbered samples, read one at a time.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use cloze_recipes::failure::{Failure, FailureKind};

use crate::files;
use crate::manifest::Manifest;
use crate::shard::{ShardReader, damaged};
use crate::tokenizer::Tokenizer;

/// One example with the answer in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Tokens, special tokens around the text included; the answer is not masked.
    pub tokens: Vec<u32>,
    /// Index of the answer in `tokens`.
    pub answer_position: u32,
    /// Index of the task in the manifest's list.
    pub task: u32,
}

/// A prepared folder. Samples are numbered through all shards, in the order of the inputs.
#[derive(Debug)]
pub struct Dataset {
    folder: PathBuf,
    manifest: Manifest,
    shards: Vec<ShardReader>,
    /// Number of the first sample of each shard.
    starts: Vec<u64>,
}

impl Dataset {
    /// Opens a prepared folder: checks sizes and columns, reads no tokens. Fails when it is not prepared or damaged.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let manifest = Manifest::load(folder)?;
        let mut shards = Vec::with_capacity(manifest.shards.len());
        let mut starts = Vec::with_capacity(manifest.shards.len());
        let mut num_samples = 0;
        for entry in &manifest.shards {
            let shard = ShardReader::open(folder, entry)?;
            starts.push(num_samples);
            num_samples += shard.num_samples() as u64;
            shards.push(shard);
        }
        Ok(Self { folder: folder.to_path_buf(), manifest, shards, starts })
    }

    /// Number of samples.
    pub fn num_samples(&self) -> u64 {
        self.manifest.samples
    }

    /// Tokens of all samples.
    pub fn num_tokens(&self) -> u64 {
        self.manifest.tokens
    }

    /// Tokens of a sample; panics past the end.
    pub fn length(&self, sample: u64) -> u32 {
        let (shard, row) = self.locate(sample);
        shard.length(row)
    }

    /// Task of a sample, an index into the manifest's list; panics past the end.
    pub fn task(&self, sample: u64) -> u32 {
        let (shard, row) = self.locate(sample);
        shard.task(row)
    }

    /// Reads a sample; panics past the end. Fails when it is damaged, naming shard and row.
    pub fn read(&self, sample: u64) -> anyhow::Result<Sample> {
        let (shard, row) = self.locate(sample);
        shard.read(row)
    }

    /// What the folder was made from, tasks and counts.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Refuses a tokenizer other than the one that made the tokens.
    ///
    /// # Errors
    /// [`FailureKind::Mismatch`] with both fingerprints.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<(), Failure> {
        let expected = &self.manifest.tokenizer_fingerprint;
        if expected == tokenizer.fingerprint() {
            return Ok(());
        }
        Err(Failure::new(FailureKind::Mismatch, "the data was prepared with another tokenizer")
            .at(self.folder.display())
            .expected(format!("{expected} (hash of tokenizer.json)"))
            .found(format!("{} ({})", tokenizer.fingerprint(), tokenizer.file_path().display()))
            .hint("prepare the data again with this recipe: cloze data prepare RECIPE --force"))
    }

    /// Hashes every shard. Fails on the first that is not what the manifest says.
    pub fn verify(&self) -> anyhow::Result<()> {
        for entry in &self.manifest.shards {
            let path = self.folder.join(&entry.file);
            let mut hasher = blake3::Hasher::new();
            File::open(&path)
                .and_then(|mut file| io::copy(&mut file, &mut hasher))
                .map_err(|error| files::disk_failure("read shard", &path, &error))?;
            let found = hasher.finalize().to_hex().to_string();
            if found != entry.blake3 {
                let failure = damaged(&path, "is not what the manifest says");
                return Err(failure.expected(format!("blake3 {}", entry.blake3)).found(format!("blake3 {found}")).into());
            }
        }
        Ok(())
    }

    fn locate(&self, sample: u64) -> (&ShardReader, usize) {
        assert!(sample < self.num_samples(), "sample {sample} of {}", self.num_samples());
        let shard = self.starts.partition_point(|start| *start <= sample) - 1;
        (&self.shards[shard], (sample - self.starts[shard]) as usize)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use cloze_recipes::failure::{Failure, FailureKind};

    use super::*;
    use crate::fixtures;

    fn samples() -> Vec<Sample> {
        (0..7_u32).map(|i| Sample { tokens: (0..=i).map(|t| 10 * i + t).collect(), answer_position: i, task: i % 2 }).collect()
    }

    #[test]
    fn samples_are_numbered_through_the_shards() {
        let folder = tempfile::tempdir().unwrap();
        let samples = samples();
        fixtures::shards(folder.path(), &[&samples[..3], &samples[3..4], &samples[4..]]);
        let dataset = Dataset::open(folder.path()).unwrap();
        assert_eq!(dataset.num_samples(), 7);
        assert_eq!(dataset.num_tokens(), 28);
        for (number, sample) in (0..).zip(&samples) {
            assert_eq!(&dataset.read(number).unwrap(), sample);
            assert_eq!(dataset.length(number) as usize, sample.tokens.len());
            assert_eq!(dataset.task(number), sample.task);
        }
        dataset.verify().unwrap();
    }

    #[test]
    fn an_unprepared_folder_says_what_to_run() {
        let folder = tempfile::tempdir().unwrap();
        let failure = Dataset::open(&folder.path().join("none")).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.kind, FailureKind::Input);
        assert!(failure.hint.unwrap().contains("cloze data prepare RECIPE"));
    }

    #[test]
    fn a_flipped_byte_anywhere_fails_the_verification() {
        let folder = tempfile::tempdir().unwrap();
        fixtures::shards(folder.path(), &[&samples()]);
        let path = folder.path().join("shard-00000.arrow");
        let content = fs::read(&path).unwrap();
        let dataset = Dataset::open(folder.path()).unwrap();
        for at in (0..content.len()).step_by(97) {
            let mut broken = content.clone();
            broken[at] ^= 1;
            fs::write(&path, broken).unwrap();
            let failure = dataset.verify().unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!(failure.kind, FailureKind::Damaged, "{at}");
        }
        fs::write(&path, content).unwrap();
        dataset.verify().unwrap();
    }

    #[test]
    #[should_panic(expected = "sample 7 of 7")]
    fn a_number_past_the_end_is_a_mistake_of_the_caller() {
        let folder = tempfile::tempdir().unwrap();
        fixtures::shards(folder.path(), &[&samples()]);
        Dataset::open(folder.path()).unwrap().length(7);
    }
}
