//! Training state that the workers share out among themselves, as `ZeRO` does: moments, then gradients too, then parameters too.
//!
//! The flat buffers are cut into segments ([`buckets`]), of each of which every rank owns a share ([`layout`]). A pass ([`pass`]) exchanges
//! segments with the other workers ([`exchange`], [`transport`]); [`update`] changes what this worker owns; [`state`] brings the whole
//! state in and out, and [`survivors`] makes one out of what is left when workers are lost.

pub mod buckets;
pub mod exchange;
pub mod layout;
pub mod pass;
pub mod state;
pub mod survivors;
pub mod transport;
pub mod update;

#[cfg(test)]
mod memory_tests;
#[cfg(test)]
mod survivor_tests;
#[cfg(test)]
mod tests;
