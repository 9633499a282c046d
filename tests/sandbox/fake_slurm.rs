//! Programs that answer as SLURM does where there is no cluster: one partition, and an account that may submit nothing.

use std::process::Command;

use super::{World, run_command};

/// The programs and what they do.
const PROGRAMS: [(&str, &str); 4] = [
    ("sbatch", "[ \"$1\" = --version ] && echo 'slurm-wlm 22.05.8' && exit; echo 'sbatch: error: Invalid account' >&2; exit 1"),
    ("sinfo", "echo 'main*|up|infinite|4|8|16000|(null)'"),
    ("squeue", "exit 0"),
    ("scontrol", "echo 'ClusterName = fake'"),
];

/// Puts the programs into a world; returns the `PATH` with which they are found.
pub fn fake_slurm(world: &World) -> String {
    let folder = world.path("slurm-bin");
    std::fs::create_dir(&folder).expect("make a folder for programs");
    for (name, commands) in PROGRAMS {
        // A shell of its own writes the file: a process that another test starts at the same moment would inherit one that is open to be
        // written, and the program could not be executed.
        let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod 755 "$0""#;
        run_command(Command::new("/bin/sh").args(["-c", write]).arg(folder.join(name)).arg(commands)).expect_code(0);
    }
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default())
}
