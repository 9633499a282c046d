//! Server-sent events: one task for each reader, which sends what that reader lacks.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::Instrument as _;

use super::body::Answer;
use super::shared::{Shared, stopped};

/// Shortest time between two events of a stream; steps of a few milliseconds come together.
const MIN_INTERVAL_MS: u64 = 200;

/// Silence after which a comment is sent, so that both ends notice a dead connection.
const KEEP_ALIVE_S: u64 = 15;

/// Longest time for which a reader may leave the stream full.
const SEND_TIMEOUT_S: u64 = 30;

/// Tells browsers to connect again after a second.
const RETRY: &[u8] = b"retry: 1000\n\n";

/// A comment, which readers ignore.
const COMMENT: &[u8] = b": alive\n\n";

/// Opens a stream; `None` where too many are open.
pub(super) fn open(shared: &Arc<Shared>) -> Option<Answer> {
    let permit = Arc::clone(&shared.streams).try_acquire_owned().ok()?;
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(feed(Arc::clone(shared), sender, permit).instrument(tracing::info_span!("dashboard stream")));
    Some(Answer::Stream(receiver))
}

async fn feed(shared: Arc<Shared>, sender: mpsc::Sender<Bytes>, _permit: OwnedSemaphorePermit) {
    let mut changes = shared.changes();
    let mut stopping = shared.stopping();
    let mut seen = None;
    if !send(&sender, Bytes::from_static(RETRY)).await {
        return;
    }
    loop {
        // Looked at before the view is: what is published before the end is in the last event.
        let is_last = *stopping.borrow();
        changes.mark_unchanged();
        let (frame, now) = match shared.frame(seen) {
            Ok(made) => made,
            Err(error) => {
                tracing::error!(%error, "a view could not become JSON");
                return;
            }
        };
        if !send(&sender, frame).await || is_last {
            return;
        }
        seen = Some(now);
        tokio::select! {
            () = sleep(Duration::from_millis(MIN_INTERVAL_MS)) => {}
            () = stopped(&mut stopping) => {}
        }
        if !wait_for_news(&sender, &mut changes, &mut stopping).await {
            return;
        }
    }
}

/// Waits for a change or the end, and keeps the connection alive; false when the reader is gone.
async fn wait_for_news(sender: &mpsc::Sender<Bytes>, changes: &mut watch::Receiver<u64>, stopping: &mut watch::Receiver<bool>) -> bool {
    loop {
        tokio::select! {
            changed = changes.changed() => return changed.is_ok(),
            () = stopped(stopping) => return true,
            () = sender.closed() => return false,
            () = sleep(Duration::from_secs(KEEP_ALIVE_S)) => {}
        }
        if !send(sender, Bytes::from_static(COMMENT)).await {
            return false;
        }
    }
}

/// Whether the reader took it in time.
async fn send(sender: &mpsc::Sender<Bytes>, bytes: Bytes) -> bool {
    matches!(timeout(Duration::from_secs(SEND_TIMEOUT_S), sender.send(bytes)).await, Ok(Ok(())))
}
