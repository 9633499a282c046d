//! What the tests stand on: programs with a time limit, small worlds, runs, test tools, a full disk, a bucket with faults, hosts, a SLURM cluster.

mod azure;
mod bucket;
mod damage;
mod disk;
mod event_tail;
mod fake_slurm;
mod fleet;
mod netns;
mod program;
mod proxy;
mod run;
mod slurm;
mod ssh;
mod tools;
mod world;

pub use azure::Azurite;
pub use bucket::{ACCESS_KEY, SECRET_KEY, SeaweedFs};
pub use damage::{flip_middle_byte, truncate};
pub use disk::SmallDisk;
pub use event_tail::EventTail;
pub use fake_slurm::{fake_slurm, fake_slurm_with_a_queue};
pub use fleet::Fleet;
pub use netns::Network;
pub use program::{Outcome, Process, run_command, send_signal, wait_until};
pub use proxy::{FaultProxy, StoreFault};
pub use run::{Run, expect_close, number};
pub use slurm::{SlurmCluster, SlurmOptions};
pub use ssh::SshHosts;
pub use tools::{python_json, skipped, tool};
pub use world::{CLOZE, RECIPE, RECIPE_TEXT, WORKER, World, repository};
