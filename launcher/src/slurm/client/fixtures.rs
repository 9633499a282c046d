//! A batch system of a shell's making, for the tests of this folder.

use std::collections::BTreeMap;
use std::process::Command;

use cloze_recipes::site::{Preflight, Site, SiteKind, SlurmSite};
use cloze_recipes::study::Resources;

use super::Slurm;
use crate::sample;

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

/// A cluster of that batch system.
pub(crate) fn whole_site() -> Site {
    Site {
        name: "mine".to_owned(),
        kind: SiteKind::Slurm(site()),
        folder: None,
        container: None,
        modules: Vec::new(),
        environment: BTreeMap::new(),
        setup: Vec::new(),
        preflight: Preflight { enabled: true, min_bandwidth_share: 0.3, max_slowdown: 3.0, timeout_s: 300 },
        gpu_memory_mib: None,
        tokens_per_second: None,
    }
}

/// Nodes with four workers each, and with a GPU and eight cores for each worker.
pub(crate) fn resources(nodes: u32) -> Resources {
    Resources { nodes, workers_per_node: 4, gpus_per_node: 4, cpus_per_worker: Some(8), ..sample::resources() }
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
