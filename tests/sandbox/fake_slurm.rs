//! Programs that answer as SLURM does where there is no cluster: one partition, and an account that may submit nothing, or one whose jobs
//! wait.

use super::World;

/// What `sbatch` says of itself.
const VERSION: &str = "[ \"$1\" = --version ] && echo 'slurm-wlm 22.05.8' && exit; ";
/// Refuses every job.
const REFUSES: &str = "echo 'sbatch: error: Invalid account' >&2; exit 1";
/// Takes every job under the same number.
const TAKES: &str = "echo 77";
/// The other programs and what they do, where no job is known.
const PROGRAMS: [(&str, &str); 3] =
    [("sinfo", "echo 'main*|up|infinite|4|8|16000|(null)'"), ("scontrol", "echo 'ClusterName = fake'"), ("sacct", "exit 1")];

/// Puts the programs into a world; returns the `PATH` with which they are found.
pub fn fake_slurm(world: &World) -> String {
    put(world, REFUSES, "exit 0")
}

/// The same with an account whose jobs are taken and wait.
pub fn fake_slurm_with_a_queue(world: &World) -> String {
    put(world, TAKES, "case \"$*\" in *--name=*) ;; *) echo '77_0|PENDING|0:00|1:00||Priority';; esac")
}

fn put(world: &World, sbatch: &str, squeue: &str) -> String {
    let folder = world.path("slurm-bin");
    std::fs::create_dir(&folder).expect("make a folder for programs");
    let sbatch = format!("{VERSION}{sbatch}");
    for (name, commands) in PROGRAMS.into_iter().chain([("sbatch", sbatch.as_str()), ("squeue", squeue)]) {
        world.write_program(&format!("slurm-bin/{name}"), commands);
    }
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default())
}
