//! Who is told that a generation is over.

use std::sync::Mutex;

use super::{AbortCallback, lock};

/// The last abort, and whom to tell.
#[derive(Default)]
pub(super) struct Aborts(Mutex<Told>);

#[derive(Default)]
struct Told {
    last: Option<(u64, String)>,
    callback: Option<AbortCallback>,
}

impl Aborts {
    /// Replaces the callback, and tells it what has happened already.
    pub(super) fn register(&self, callback: AbortCallback) {
        let mut told = lock(&self.0);
        if let Some((generation, reason)) = &told.last {
            callback(*generation, reason);
        }
        told.callback = Some(callback);
    }

    /// Generations up to this one are over.
    pub(super) fn tell(&self, generation: u64, reason: &str) {
        let mut told = lock(&self.0);
        if let Some(callback) = &told.callback {
            callback(generation, reason);
        }
        told.last = Some((generation, reason.to_owned()));
    }
}
