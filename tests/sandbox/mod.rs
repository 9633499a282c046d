//! What the tests stand on: programs with a time limit, small worlds, runs, test tools, a full disk and a bucket.

mod bucket;
mod damage;
mod disk;
mod program;
mod run;
mod tools;
mod world;

pub use bucket::{ACCESS_KEY, SECRET_KEY, SeaweedFs};
pub use damage::{flip_middle_byte, truncate};
pub use disk::SmallDisk;
pub use program::{Outcome, Process, run_command, wait_until};
pub use run::Run;
pub use tools::{python_json, skipped, tool};
pub use world::{CLOZE, RECIPE, RECIPE_TEXT, WORKER, World, repository};
