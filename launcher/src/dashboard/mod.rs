//! The dashboard of a run: a page, its live data, metrics, and two orders, over HTTP/1.1 from the controller's own process.
//!
//! | route              | answer                                                                    |
//! |--------------------|---------------------------------------------------------------------------|
//! | `GET /`            | the page: one file, nothing is loaded from elsewhere                       |
//! | `GET /api/view`    | the [`RunView`](crate::view::RunView) as JSON                              |
//! | `GET /api/events`  | server-sent events: `view` holds the whole view, `step` what a step changes |
//! | `GET /metrics`     | Prometheus text format                                                    |
//! | `GET /healthz`     | `ok`                                                                      |
//! | `POST /api/stop`   | asks the run to save and stop; needs `Authorization: Bearer TOKEN`        |
//! | `POST /api/save`   | asks for a checkpoint; needs the token too                                |
//!
//! Reading needs no token, so the dashboard listens on loopback unless a user says otherwise. A request whose `Host` is neither
//! a loopback name nor the bound address is refused: a page of another site could otherwise read the run through a name that it
//! points to this machine.
//!
//! | task         | name (tracing span)    | on error                           | on stop                                       |
//! |--------------|------------------------|------------------------------------|-----------------------------------------------|
//! | the listener | `dashboard`            | a failed accept is logged, it goes on | waits for the connections, aborted after a second |
//! | a connection | `dashboard connection` | ends; logged at debug              | ends after its answer                         |
//! | a stream     | `dashboard stream`     | ends                               | sends the last view and ends                  |
//!
//! The publisher never waits for a reader: it changes the view behind a lock and leaves. Each stream looks at the view when it
//! can, at most a few times a second, and sends what its reader lacks.

mod body;
mod client;
mod hosts;
mod metrics;
mod page;
mod routes;
mod server;
mod shared;
mod stream;

pub use client::{ViewStream, fetch_view};
pub use server::{Dashboard, DashboardOptions};
pub use shared::DashboardOrder;

#[cfg(test)]
mod tests;
