//! What is known of checkpoints without loading them, and whether they are as they should be.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use bytes::Bytes;
use cloze_recipes::failure::{Failure, FailureKind};
use serde::Serialize;

use super::load::{Unusable, compare_size, tensors};
use super::manifest::{Manifest, ManifestFile};
use super::store::{CheckpointStore, Listed};

/// One step with objects.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Overview {
    /// The step.
    pub step: u64,
    /// Number of its files.
    pub num_files: usize,
    /// Bytes of its files.
    pub bytes: u64,
    /// Its manifest; `None` where it is no complete checkpoint.
    pub manifest: Option<Manifest>,
    /// Why it is none.
    pub reason: Option<String>,
}

/// What a verification found in one step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// The step.
    pub step: u64,
    /// What is wrong with the whole: its manifest, or tensors that cannot be put together.
    pub problem: Option<String>,
    /// Every file that the manifest names.
    pub files: Vec<VerifiedFile>,
}

/// What a verification found in one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VerifiedFile {
    /// Its name.
    pub name: String,
    /// Its size, as the manifest states it.
    pub size: u64,
    /// What is wrong with it.
    pub problem: Option<String>,
}

impl Verification {
    /// Whether nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.problem.is_none() && self.files.iter().all(|file| file.problem.is_none())
    }
}

impl CheckpointStore {
    /// Every step that has objects, oldest first, with its manifest where that agrees with the listing.
    pub fn overview(&self) -> Result<Vec<Overview>> {
        self.list()?.iter().map(|listed| self.overview_of(listed)).collect()
    }

    fn overview_of(&self, listed: &Listed) -> Result<Overview> {
        let (manifest, reason) = match self.manifest(listed) {
            Ok(manifest) => (Some(Arc::unwrap_or_clone(manifest)), None),
            Err(unusable) => (None, Some(reason_of(unusable)?)),
        };
        Ok(Overview { step: listed.step, num_files: listed.files.len(), bytes: listed.files.values().sum(), manifest, reason })
    }

    /// Reads every file of a step from the store and compares it with the manifest; then puts the tensors together. Fails only where
    /// there is no such step, or the store does not answer.
    pub fn verify(&self, step: u64) -> Result<Verification> {
        let listed = self.existing(step)?;
        let manifest = match self.readable_manifest(&listed) {
            Ok(manifest) => manifest,
            Err(unusable) => return Ok(Verification { step, problem: Some(reason_of(unusable)?), files: Vec::new() }),
        };
        let (mut files, mut contents) = (Vec::new(), BTreeMap::new());
        for file in &manifest.files {
            let problem = match self.checked_content(&listed, file) {
                Ok(content) => {
                    contents.insert(file.name.clone(), content);
                    None
                }
                Err(Unusable::Damaged(reason)) => Some(reason),
                Err(Unusable::Store(error)) => return Err(error),
            };
            files.push(VerifiedFile { name: file.name.clone(), size: file.size, problem });
        }
        let mut problem = None;
        if files.iter().all(|file| file.problem.is_none()) {
            let merged = tensors(&contents, &manifest.model_names()).and_then(|_| tensors(&contents, &manifest.optimizer_names()));
            problem = match merged {
                Ok(_) => None,
                Err(Unusable::Damaged(reason)) => Some(reason),
                Err(Unusable::Store(error)) => return Err(error),
            };
        }
        Ok(Verification { step, problem, files })
    }

    fn checked_content(&self, listed: &Listed, file: &ManifestFile) -> Result<Bytes, Unusable> {
        compare_size(listed, file)?;
        self.stored_content(listed.step, file)
    }
}

/// Why a checkpoint is not usable, to show. Fails where the store did not answer.
fn reason_of(unusable: Unusable) -> Result<String> {
    match unusable {
        Unusable::Damaged(reason) => Ok(reason),
        Unusable::Store(error) => match error.downcast_ref::<Failure>() {
            Some(failure) if failure.kind == FailureKind::Mismatch => Ok(failure.what.clone()),
            _ => Err(error),
        },
    }
}
