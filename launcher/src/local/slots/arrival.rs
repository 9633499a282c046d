//! Before the workers of `cloze join` start: slots that nobody else fills, and a controller that can be reached.

use std::io::Write as _;
use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use tokio::time::{Instant, sleep};

use super::SlotsOptions;
use crate::local::contact::{Contact, StatedContact, reach};
use crate::local::signals::{Request, Signals};
use crate::local::slot_locks::{RunEndWatch, SlotLocks};
use crate::run_folder::{ControlFile, read_info, read_recipe};

/// Wait before the coordinator is looked for again.
pub(super) const RETRY_MS: u64 = 500;

/// Waits until no other `cloze join` fills one of the slots; `None` when the run ends before that.
pub(super) async fn take_slots(options: &mut SlotsOptions, signals: &Signals) -> anyhow::Result<Option<SlotLocks>> {
    let mut watch = RunEndWatch::new(&options.paths);
    let mut is_told = false;
    loop {
        let slot = match SlotLocks::take(&options.paths, &options.slots)? {
            Ok(locks) => return Ok(Some(locks)),
            Err(slot) => slot,
        };
        if !std::mem::replace(&mut is_told, true) {
            let line = format!("another `cloze join` fills slot {slot}; this one takes its place when it ends");
            // Nobody who reads it is no reason not to stand by.
            drop(writeln!(options.output, "{line}").and_then(|()| options.output.flush()));
        }
        if watch.has_ended() {
            return Ok(None);
        }
        if let Some(signal) = signals.take(Request::Stop).or_else(|| signals.take(Request::EarlyStop)) {
            return Err(Failure::new(FailureKind::Interrupted, "stopped while waiting for a slot").found(signal).into());
        }
        sleep(Duration::from_millis(RETRY_MS)).await;
    }
}

/// A coordinator that can be reached, and what its run is now.
pub(super) struct Found {
    /// The checked recipe.
    pub recipe: Recipe,
    /// What was said of the coordinator.
    pub stated: StatedContact,
    /// How it is reached.
    pub contact: Contact,
}

/// Waits until the coordinator can be reached. The recipe is read anew each time: a controller may have the run operated otherwise.
pub(super) async fn find_coordinator(options: &SlotsOptions, signals: &Signals) -> anyhow::Result<Found> {
    let deadline = Instant::now() + options.join_timeout;
    loop {
        let recipe = read_recipe(&options.paths, &read_info(&options.paths)?)?;
        let (coordinator, token, key) = (options.coordinator.clone(), options.token.clone(), options.coordinator_key);
        let stated = StatedContact { coordinator, token, key, tls: recipe.cluster.tls };
        match reach(&options.paths, &stated).await {
            Ok(contact) => return Ok(Found { recipe, stated, contact }),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(error) => tracing::debug!(error = format!("{error:#}"), "the coordinator is not there yet"),
        }
        if let Some(signal) = signals.take(Request::Stop).or_else(|| signals.take(Request::EarlyStop)) {
            return Err(Failure::new(FailureKind::Interrupted, "stopped while waiting for the coordinator").found(signal).into());
        }
        sleep(Duration::from_millis(RETRY_MS)).await;
    }
}

/// Leaves the slots that a new controller fills itself; whether any are left.
pub(super) fn keep_free_slots(options: &mut SlotsOptions) -> anyhow::Result<bool> {
    let own = ControlFile::read(&options.paths)?.and_then(|control| control.local_workers).unwrap_or(0);
    let (taken, free): (Vec<u32>, Vec<u32>) = options.slots.iter().partition(|&&slot| slot < own);
    if !taken.is_empty() {
        let line = format!("the new controller fills slots {taken:?} itself");
        drop(writeln!(options.output, "{line}").and_then(|()| options.output.flush()));
    }
    options.slots = free;
    Ok(!options.slots.is_empty())
}
