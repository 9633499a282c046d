//! What the publisher, the connections and the streams share.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use cloze_cluster::{Recorded, Secret};
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc, watch};

use crate::view::{RunView, Seen};

/// Streams that are open at once; pages, metrics and orders keep the other connections.
const MAX_STREAMS: usize = 128;

/// What somebody asks for on the dashboard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DashboardOrder {
    /// Save and stop.
    Stop {
        /// Who asked.
        reason: String,
    },
    /// Save a checkpoint and go on.
    Save {
        /// Who asked.
        reason: String,
    },
}

/// The state behind all connections.
#[derive(Debug)]
pub(super) struct Shared {
    current: Mutex<Current>,
    /// Counts the changes of the view.
    changes: watch::Sender<u64>,
    stopping: watch::Sender<bool>,
    /// One permit for each stream.
    pub(super) streams: Arc<Semaphore>,
    /// Whoever knows it may give orders.
    pub(super) token: Secret,
    /// Where the dashboard listens.
    pub(super) bound: SocketAddr,
    /// Name of this machine.
    pub(super) own_name: String,
    /// Where orders go.
    pub(super) orders: mpsc::Sender<DashboardOrder>,
}

/// The view and its JSON, which all readers of one change share.
#[derive(Debug, Default)]
struct Current {
    view: RunView,
    json: Option<Bytes>,
}

impl Shared {
    pub(super) fn new(token: Secret, bound: SocketAddr, orders: mpsc::Sender<DashboardOrder>) -> Self {
        Self {
            current: Mutex::default(),
            changes: watch::Sender::new(0),
            stopping: watch::Sender::new(false),
            streams: Arc::new(Semaphore::new(MAX_STREAMS)),
            token,
            bound,
            own_name: cloze_cluster::host::host_name(),
            orders,
        }
    }

    /// Takes in an event and wakes the streams.
    pub(super) fn publish(&self, recorded: &Recorded) {
        self.change(|view| view.apply(recorded));
    }

    /// Puts another view in place.
    pub(super) fn replace(&self, replacement: RunView) {
        self.change(|view| *view = replacement);
    }

    /// Looks at the view.
    pub(super) fn look<T>(&self, looks: impl FnOnce(&RunView) -> T) -> T {
        looks(&self.lock().view)
    }

    /// The view as JSON.
    pub(super) fn json(&self) -> serde_json::Result<Bytes> {
        self.lock().json()
    }

    /// The server-sent event that brings a reader up to date, and what it has then.
    pub(super) fn frame(&self, seen: Option<Seen>) -> serde_json::Result<(Bytes, Seen)> {
        let mut current = self.lock();
        let now = current.view.seen();
        let frame = match seen.and_then(|seen| current.view.update_since(seen)) {
            Some(update) => frame("step", &to_json(&update)?),
            None => frame("view", &current.json()?),
        };
        Ok((frame, now))
    }

    /// Streams that are open.
    pub(super) fn open_streams(&self) -> usize {
        MAX_STREAMS.saturating_sub(self.streams.available_permits())
    }

    /// Changes of the view from now on.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Whether the dashboard closes.
    pub(super) fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// Tells every task that the dashboard closes.
    pub(super) fn stop(&self) {
        self.stopping.send_replace(true);
    }

    fn change(&self, changes: impl FnOnce(&mut RunView)) {
        {
            let mut current = self.lock();
            changes(&mut current.view);
            current.json = None;
        }
        self.changes.send_modify(|count| *count += 1);
    }

    /// A view is whole between two events, whatever happened to a thread that looked at it.
    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Current {
    fn json(&mut self) -> serde_json::Result<Bytes> {
        if let Some(json) = &self.json {
            return Ok(json.clone());
        }
        let json = to_json(&self.view)?;
        self.json = Some(json.clone());
        Ok(json)
    }
}

/// Waits until the dashboard closes.
pub(super) async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // A sender that is gone means the same.
    let _ = stopping.wait_for(|is_stopping| *is_stopping).await.is_ok();
}

fn to_json(value: &impl Serialize) -> serde_json::Result<Bytes> {
    serde_json::to_vec(value).map(Bytes::from)
}

/// JSON has no line feeds, so that one `data` line holds it.
fn frame(event: &str, json: &[u8]) -> Bytes {
    [b"event: ".as_slice(), event.as_bytes(), b"\ndata: ", json, b"\n\n"].concat().into()
}
