//! A batch system of a shell's making, for the tests of this folder.

use std::process::Command;

use cloze_recipes::site::SlurmSite;

use super::Slurm;

/// A site that names its partition and nothing else.
pub(crate) fn site() -> SlurmSite {
    SlurmSite {
        partition: Some("main".to_owned()),
        account: None,
        qos: None,
        constraint: None,
        exclude: Vec::new(),
        gpu_type: None,
        options: Vec::new(),
        time_limit_minutes: None,
        warning_s: 120,
        max_jobs: 20,
        poll_s: 2,
    }
}

/// A folder in which each program is these lines of shell; `sbatch --version` answers too. A shell of its own writes them: while this
/// program has one open to write, a process that another test starts would inherit it, and it could not be executed.
pub(crate) fn cluster(programs: &[(&str, &str)]) -> (tempfile::TempDir, Slurm) {
    let folder = tempfile::tempdir().unwrap();
    let version = r#"[ "$1" = --version ] && echo "slurm 22.05.8" && exit 0"#;
    for (name, text) in [("sbatch", version)].iter().chain(programs) {
        let write = r#"[ -e "$0" ] || printf '#!/bin/sh\n' > "$0"; printf '%s\n' "$1" >> "$0" && chmod 755 "$0""#;
        assert!(Command::new("/bin/sh").args(["-c", write]).arg(folder.path().join(name)).arg(text).status().unwrap().success());
    }
    let slurm = Slurm::at(Some(folder.path().to_owned()), &site()).unwrap();
    (folder, slurm)
}
