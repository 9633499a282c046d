//! The listener and its connections.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use cloze_cluster::{Recorded, Secret};
use cloze_recipes::failure::{Failure, FailureKind};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tracing::Instrument as _;

use super::routes;
use super::shared::{DashboardOrder, Shared, stopped};
use crate::view::RunView;

/// Connections that are open at once; a browser holds two or three, a scraper one.
const MAX_CONNECTIONS: usize = 256;

/// Longest time for the head of a request, the wait for it on a connection that is kept included.
const HEAD_TIMEOUT_S: u64 = 10;

/// Most bytes of the head of a request; browsers send less than two kilobytes.
const MAX_HEAD_BYTES: usize = 16 * 1024;

/// Most header lines of a request.
const MAX_HEADERS: usize = 64;

/// Longest life of a connection without a stream, so that a client that does not read its answer holds none for long.
const PLAIN_LIFE_S: u64 = 60;

/// Longest time that the end of all connections may take; the run waits for it.
const CLOSE_TIMEOUT_MS: u64 = 1_000;

/// Pause after an accept that failed, as it does without free file descriptors.
const ACCEPT_PAUSE_MS: u64 = 100;

/// What a client is told that comes when all connections are taken.
const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";

/// Where a dashboard listens and who may give orders.
#[derive(Clone, Debug)]
pub struct DashboardOptions {
    /// Where it listens; port 0 takes a free one.
    pub bind: SocketAddr,
    /// Whoever knows it may stop the run and save.
    pub token: Secret,
}

/// A dashboard that listens. Dropping it ends it at once.
#[derive(Debug)]
pub struct Dashboard {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Dashboard {
    /// Starts to listen, on the caller's runtime. Fails with kind `Environment` when the address cannot be had.
    pub async fn start(options: DashboardOptions, orders: mpsc::Sender<DashboardOrder>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(options.bind).await.map_err(|error| {
            Failure::new(FailureKind::Environment, "the dashboard cannot listen there")
                .at(options.bind)
                .because(error)
                .hint("name another address with --dashboard; port 0 takes a free one, `off` does without")
        })?;
        let bound = listener.local_addr().context("read the dashboard's address")?;
        let shared = Arc::new(Shared::new(options.token, bound, orders));
        let task = tokio::spawn(listen(listener, Arc::clone(&shared)).instrument(tracing::info_span!("dashboard")));
        Ok(Self { shared, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.shared.bound
    }

    /// Its page.
    pub fn url(&self) -> String {
        format!("http://{}/", self.address())
    }

    /// Begins with a view of earlier events, as those of a run that is resumed.
    pub fn seed(&mut self, view: RunView) {
        self.shared.replace(view);
    }

    /// Takes in an event. Readers see it when they can; nobody waits for them.
    pub fn publish(&mut self, recorded: &Recorded) {
        self.shared.publish(recorded);
    }

    /// Gives every reader the last view and ends, within a second or so.
    pub async fn close(mut self) {
        self.shared.stop();
        if timeout(Duration::from_millis(CLOSE_TIMEOUT_MS), &mut self.task).await.is_err() {
            tracing::debug!("readers of the dashboard were cut off at its end");
        }
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        // Streams are tasks of their own and end by this; connections end with the listener's task.
        self.shared.stop();
        self.task.abort();
    }
}

/// Accepts connections until the end, then waits for theirs.
async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    let mut stopping = shared.stopping();
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = stopped(&mut stopping) => break,
        };
        match accepted {
            // Best effort: whoever comes too late may also find the connection closed.
            Ok((stream, _)) if connections.len() >= MAX_CONNECTIONS => drop(stream.try_write(BUSY)),
            Ok((stream, peer)) => {
                let span = tracing::debug_span!("dashboard connection", %peer);
                connections.spawn(serve(stream, Arc::clone(&shared)).instrument(span));
            }
            Err(error) => {
                tracing::warn!(%error, "the dashboard failed to accept a connection");
                sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Answers the requests of one connection.
async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let mut stopping = shared.stopping();
    let has_stream = Arc::new(AtomicBool::new(false));
    let marks = Arc::clone(&has_stream);
    let service = service_fn(move |request: Request<Incoming>| {
        let reply = routes::reply(&shared, &request);
        if reply.is_stream {
            marks.store(true, Ordering::Relaxed);
        }
        std::future::ready(Ok::<_, Infallible>(reply.response))
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(HEAD_TIMEOUT_S))
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let is_stuck = async {
        sleep(Duration::from_secs(PLAIN_LIFE_S)).await;
        if has_stream.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = is_stuck => return,
        () = stopped(&mut stopping) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection of the dashboard broke");
    }
}
