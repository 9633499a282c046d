//! One file for each promise.

mod buckets;
mod checkpoints;
mod data;
mod disk_full;
mod documents;
mod loading;
mod models;
mod network;
mod recipes;
mod recovery;
mod reference;
mod resume;
mod stop;
mod world_size;
