//! Whether a cluster's partition has what a run wants: asked before anything is made.

use std::path::Path;

use cloze_launcher::plan::Check;
use cloze_launcher::slurm::{Fit, PARTITION_KEY, Slurm, Wish};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::SlurmSite;
use cloze_recipes::study::Resources;

/// What a check of the partition is called.
pub(super) const NAME: &str = "partition";

/// What can be done where nodes are out of use.
const WAIT: &str = "the job waits until they come back; `sinfo -R` says why they are out of use";

/// What is asked of a partition.
#[derive(Clone, Copy)]
pub(super) struct Request<'a> {
    /// Machines of a run.
    pub resources: &'a Resources,
    /// What the site wants.
    pub site: &'a SlurmSite,
    /// The cluster file, where it is known.
    pub file: Option<&'a Path>,
}

impl Request<'_> {
    /// What the partition has, its failures with their places in the cluster file.
    fn fit(&self, slurm: &Slurm) -> Result<Fit, Failure> {
        let mut fit = slurm.fit(&Wish::of(self.resources, self.site))?;
        for failure in fit.misfits.iter_mut().filter(|failure| failure.place.as_deref() == Some(PARTITION_KEY)) {
            let place = self.file.and_then(|file| cloze_recipes::place_in_site(file, PARTITION_KEY));
            failure.place = place.or_else(|| failure.place.take());
        }
        Ok(fit)
    }

    /// One check for each thing that is wrong, and one for nodes that are out of use.
    pub(super) fn checks(&self, slurm: Result<&Slurm, &Failure>) -> Vec<Check> {
        match slurm.map_err(Failure::clone).and_then(|slurm| self.fit(slurm)) {
            Err(failure) => vec![Check::fail(NAME, &failure)],
            Ok(Fit { misfits, shortage }) => {
                let wrong = misfits.iter().map(|failure| Check::fail(NAME, failure));
                wrong.chain(shortage.map(|shortage| Check::warn(NAME, shortage, WAIT))).collect()
            }
        }
    }

    /// Fails with everything that the partition cannot give, at once. Returns what it cannot give at present, for a warning.
    pub(super) fn refuse_misfits(&self, slurm: &Slurm) -> Result<Option<String>, Failure> {
        let Fit { mut misfits, shortage } = self.fit(slurm)?;
        match misfits.len() {
            0 => Ok(shortage.map(|shortage| format!("{shortage}; {WAIT}"))),
            1 => Err(misfits.remove(0)),
            count => {
                let texts: Vec<String> = misfits.iter().map(|failure| failure.to_string().replace('\n', "\n    ")).collect();
                Err(Failure::new(FailureKind::Recipe, format!("the cluster cannot give {count} things that the run wants"))
                    .because(format!("\n    {}", texts.join("\n    "))))
            }
        }
    }
}
