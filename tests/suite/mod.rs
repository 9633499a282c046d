//! One file for each promise.

mod buckets;
mod chaos;
mod checkpoints;
mod clouds;
mod controller_restart;
mod dashboard;
mod data;
mod disk_full;
mod documents;
mod elastic;
mod failures;
mod loading;
mod models;
mod multihost;
mod network;
mod papers;
mod recipes;
mod recovery;
mod reference;
mod resume;
mod sharding;
mod stop;
mod studies;
mod world_size;
