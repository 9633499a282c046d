//! Versions of the batch system, and what differs between them.

use std::fmt;
use std::num::NonZeroU32;

use cloze_recipes::failure::{Failure, FailureKind};

/// The oldest version whose options are known to work.
pub const OLDEST: Version = Version { year: 20, month: 11 };

/// A version, by the month of its release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Year of the release, as in 22.
    pub year: u32,
    /// Month of the release, as in 5.
    pub month: u32,
}

impl Version {
    /// From the output of `sbatch --version`, such as `slurm 20.11.9` or `slurm-wlm 22.05.8`.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let numbers = text.split_whitespace().find_map(|word| {
            let mut numbers = word.split('.');
            let year: u32 = numbers.next()?.parse().ok()?;
            let month: u32 = numbers.next()?.get(..2)?.parse().ok()?;
            Some(Self { year, month })
        });
        numbers.ok_or_else(|| {
            Failure::new(FailureKind::Environment, "`sbatch --version` names no version")
                .expected("a line such as `slurm 22.05.8`")
                .found(text.chars().take(200).collect::<String>())
        })
    }

    /// Refuses a version that is too old, with kind `Environment`.
    pub fn check(self) -> Result<Self, Failure> {
        if self >= OLDEST {
            return Ok(self);
        }
        Err(Failure::new(FailureKind::Environment, "this SLURM is too old").expected(format!("{OLDEST} or newer")).found(self))
    }

    /// What must be said differently to this version.
    pub fn dialect(self) -> Dialect {
        Dialect { steps_need_cpus: self >= Version { year: 22, month: 5 }, cancels_invalid_dependencies: self >= OLDEST }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}.{:02}", self.year, self.month)
    }
}

/// What must be said differently to different versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialect {
    /// From 22.05 a step gets `--cpus-per-task` of its job only if it says so itself.
    pub steps_need_cpus: bool,
    /// `--kill-on-invalid-dep`
    pub cancels_invalid_dependencies: bool,
}

impl Dialect {
    /// Asks for GPUs on each node. `--gres` is understood by every version and by both ways to select resources; `--gpus-per-node`
    /// only where the site selects by `cons_tres`.
    pub fn gpus(self, gpus_per_node: u32, gpu_type: Option<&str>) -> Option<String> {
        let gpus = NonZeroU32::new(gpus_per_node)?;
        Some(match gpu_type {
            Some(gpu_type) => format!("--gres=gpu:{gpu_type}:{gpus}"),
            None => format!("--gres=gpu:{gpus}"),
        })
    }

    /// Lets a step of one task have all that the job has on its node, beside other steps. Without `--overlap`, from 20.11 on, it would
    /// wait until the batch step, which never ends before it, lets go of its cores.
    pub fn whole_node_step(self, node: Option<&str>, cpus: Option<u32>) -> Vec<String> {
        let mut options =
            ["--nodes=1", "--ntasks=1", "--overlap", "--mem=0", "--cpu-bind=none", "--export=ALL"].map(str::to_owned).to_vec();
        options.extend(node.map(|node| format!("--nodelist={node}")));
        if self.steps_need_cpus {
            options.extend(cpus.map(|cpus| format!("--cpus-per-task={cpus}")));
        }
        options
    }

    /// Starts a job only if another one ends badly. A job that can never start is taken off the queue.
    pub fn after_failure(self, job: super::JobId) -> Vec<String> {
        let mut options = vec![format!("--dependency=afternotok:{job}")];
        if self.cancels_invalid_dependencies {
            options.push("--kill-on-invalid-dep=yes".to_owned());
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::super::JobId;
    use super::*;

    #[test]
    fn versions_are_read() {
        let cases = [
            ("slurm 20.11.9\n", Some((20, 11))),
            ("slurm-wlm 22.05.8\n", Some((22, 5))),
            ("slurm 23.02.0-0rc1", Some((23, 2))),
            ("slurm 24.11.5-1.el9", Some((24, 11))),
            ("slurm 25.05", Some((25, 5))),
            ("sbatch: command not found", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(Version::parse(text).ok().map(|version| (version.year, version.month)), expected, "{text}");
        }
    }

    #[test]
    fn old_versions_are_refused() {
        let failure = Version { year: 20, month: 2 }.check().unwrap_err();
        assert_eq!((failure.expected.as_deref(), failure.found.as_deref()), (Some("20.11 or newer"), Some("20.02")));
        assert!(OLDEST.check().is_ok());
        assert!(Version { year: 21, month: 8 }.check().is_ok());
    }

    #[test]
    fn each_version_is_told_what_it_needs() {
        let [old, new] = [(21, 8), (22, 5)].map(|(year, month)| Version { year, month }.dialect());
        assert!(!old.whole_node_step(Some("n2"), Some(8)).iter().any(|option| option.starts_with("--cpus-per-task")));
        assert!(new.whole_node_step(Some("n2"), Some(8)).contains(&"--cpus-per-task=8".to_owned()));
        assert_eq!(new.gpus(0, Some("h100")), None);
        assert_eq!(new.gpus(4, Some("h100")).as_deref(), Some("--gres=gpu:h100:4"));
        assert_eq!(new.gpus(4, None).as_deref(), Some("--gres=gpu:4"));
        assert_eq!(new.after_failure(JobId::whole(7)), ["--dependency=afternotok:7", "--kill-on-invalid-dep=yes"]);
    }
}
