//! The recipe: what a run is to do, as one YAML file.
//!
//! [`load()`] reads a file (and the files that it `extends`), applies `--set` overrides, and answers with a checked
//! [`recipe::Recipe`] or with one [`failure::Failure`] that lists every problem with its file, line and column.
//! The way of a recipe through this crate:
//!
//! | step | module | in | out |
//! |---|---|---|---|
//! | parse | `tree` | YAML text | a tree in which every key and value knows its place |
//! | compose | `compose` | a file, its bases, the overrides | one tree |
//! | validate | `validate` | the tree, the JSON Schema | every unknown key, wrong type and broken bound |
//! | check | `check` | the sections whose form is right | a checked recipe, or what contradicts itself in it |
//! | render | `render` | a checked recipe | YAML that reads back to the same recipe |
//! | name | `identity` | a checked recipe | the hash of what it means |

pub mod failure;
pub mod raw;
pub mod recipe;
pub mod site;
pub mod study;

mod check;
mod compose;
mod identity;
mod job_time;
mod load;
mod load_site;
mod load_study;
mod paths;
mod problem;
mod render;
mod rendered;
mod schema;
mod tree;
mod validate;

pub use identity::{OPERATIONAL_KEYS, is_operational};
pub use job_time::{check_job_time, check_kept_job_time};
pub use load::{load, load_text, load_with_profile};
pub use load_site::{load_site, place_in_site};
pub use load_study::{CheckedFile, check_file, load_study};
pub use rendered::read_rendered;
pub use schema::{schema_json, site_schema_json};
pub use validate::nearest;
