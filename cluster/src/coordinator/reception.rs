//! The door: accepts connections, as many at a time as may be unknown, and sees them off.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::Instrument as _;

use super::connection::{Door, MAX_UNAUTHENTICATED_CONNECTIONS, serve_connection};

/// Wait before accepting again after the operating system refused, for instance for want of file descriptors.
const ACCEPT_RETRY_MS: u64 = 100;

/// Longest wait for the last messages to reach the workers.
const FAREWELL_MS: u64 = 500;

/// The listener and the connections it led to.
pub(super) struct Reception {
    listener: TcpListener,
    door: Arc<Door>,
    /// Bounds the connections that have not joined yet.
    unauthenticated: Arc<Semaphore>,
    connections: JoinSet<()>,
    num_accepted: u64,
}

impl Reception {
    pub(super) fn new(listener: TcpListener, door: Door) -> Self {
        let unauthenticated = Arc::new(Semaphore::new(MAX_UNAUTHENTICATED_CONNECTIONS));
        Self { listener, door: Arc::new(door), unauthenticated, connections: JoinSet::new(), num_accepted: 0 }
    }

    /// Accepts until it is told to quit, then lets the connections write their last messages and ends them.
    pub(super) async fn run(mut self, mut quit: oneshot::Receiver<()>) {
        loop {
            tokio::select! {
                // A sender that is gone means the same as its word.
                _ = &mut quit => break,
                accepted = accept(&self.listener, &self.unauthenticated) => if let Some((stream, peer, permit)) = accepted {
                    self.receive(stream, peer, permit);
                },
                Some(ended) = self.connections.join_next() => if let Err(error) = ended {
                    tracing::error!(%error, "a connection task failed");
                },
            }
        }
        let written = async { while self.connections.join_next().await.is_some() {} };
        if timeout(Duration::from_millis(FAREWELL_MS), written).await.is_err() {
            tracing::debug!("some workers did not take the last message");
        }
    }

    fn receive(&mut self, stream: TcpStream, peer: SocketAddr, permit: OwnedSemaphorePermit) {
        self.num_accepted += 1;
        let span = tracing::info_span!("coordinator connection", number = self.num_accepted, %peer);
        let served = serve_connection(stream, self.num_accepted, permit, Arc::clone(&self.door));
        self.connections.spawn(served.instrument(span));
    }
}

/// Accepts one connection when another may be unknown. Loses nothing when it is dropped while it waits.
async fn accept(listener: &TcpListener, unauthenticated: &Arc<Semaphore>) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    // The semaphore is never closed.
    let permit = Arc::clone(unauthenticated).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, peer)) => Some((stream, peer, permit)),
        Err(error) => {
            tracing::warn!(%error, "cannot accept a connection");
            sleep(Duration::from_millis(ACCEPT_RETRY_MS)).await;
            None
        }
    }
}
