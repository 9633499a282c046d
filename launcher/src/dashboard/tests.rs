//! A dashboard on a real socket.

use std::time::Duration;

use cloze_cluster::{Event, Secret};
use cloze_recipes::failure::{Failure, FailureKind};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::*;
use crate::view::fixtures::{recorded, start, step};
use crate::view::{RunState, RunView};

/// Longest wait for anything here; generous, because many tests share the machine.
const PATIENCE: Duration = Duration::from_mins(1);
const TOKEN: &str = "correct horse";

async fn dashboard() -> (Dashboard, mpsc::Receiver<DashboardOrder>) {
    let (sender, receiver) = mpsc::channel(1);
    let options = DashboardOptions { bind: "127.0.0.1:0".parse().unwrap(), token: Secret::new(TOKEN) };
    let mut dashboard = Dashboard::start(options, sender).await.unwrap();
    publish(&mut dashboard, start());
    (dashboard, receiver)
}

fn publish(dashboard: &mut Dashboard, events: impl IntoIterator<Item = Event>) {
    recorded(events).iter().for_each(|event| dashboard.publish(event));
}

/// Sends bytes and reads until the connection closes.
async fn exchange(dashboard: &Dashboard, request: &str) -> String {
    let mut stream = TcpStream::connect(dashboard.address()).await.unwrap();
    // A server that leaves a request unread resets the connection; what it said before that counts.
    drop(stream.write_all(request.as_bytes()).await);
    let mut answer = Vec::new();
    drop(timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an answer in time"));
    String::from_utf8(answer).unwrap()
}

/// A request with these header lines besides `Host`.
async fn ask(dashboard: &Dashboard, line: &str, headers: &str) -> String {
    exchange(dashboard, &format!("{line} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{headers}\r\n", dashboard.address())).await
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_default()
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default()
}

#[tokio::test]
async fn everything_that_can_be_read() {
    let (mut dashboard, _orders) = dashboard().await;
    publish(&mut dashboard, [step(1, 1, 2.0)]);
    let cases = [
        ("GET /", "text/html", "<!doctype html>"),
        ("GET /api/view", "application/json", "\"name\":\"demo\""),
        ("GET /metrics", "text/plain; version=0.0.4", "\ncloze_step 1\n"),
        ("GET /healthz", "text/plain", "ok\n"),
    ];
    for (line, content_type, part) in cases {
        let answer = ask(&dashboard, line, "").await;
        assert_eq!(status(&answer), 200, "{line}: {answer}");
        let head = answer.split("\r\n\r\n").next().unwrap().to_lowercase();
        for header in [format!("content-type: {content_type}").as_str(), "cache-control: no-store", "x-content-type-options: nosniff"] {
            assert!(head.contains(header), "{line}: {head}");
        }
        assert!(body(&answer).contains(part), "{line}");
    }
    let head = ask(&dashboard, "HEAD /api/view", "").await;
    assert_eq!((status(&head), body(&head)), (200, ""));
    assert!(ask(&dashboard, "GET /", "").await.to_lowercase().contains("content-security-policy: default-src 'none'; script-src 'nonce-"));
    let view: RunView = serde_json::from_str(body(&ask(&dashboard, "GET /api/view", "").await)).unwrap();
    assert_eq!((view.state, view.progress.loss), (RunState::Training, Some(2.0)));
}

#[tokio::test]
async fn what_is_refused() {
    let (dashboard, mut orders) = dashboard().await;
    let right = format!("Authorization: Bearer {TOKEN}\r\n");
    let cases = [
        ("GET /nothing", "", 404, ""),
        ("GET /api/view/", "", 404, ""),
        ("POST /api/view", "", 405, "allow: get, head"),
        ("DELETE /", "", 405, "allow: get, head"),
        ("GET /api/stop", right.as_str(), 405, "allow: post"),
        ("POST /api/stop", "", 401, "www-authenticate: bearer"),
        ("POST /api/stop", "Authorization: Bearer wrong\r\n", 401, "www-authenticate: bearer"),
        ("POST /api/save", "Authorization: Basic correct horse\r\n", 401, "www-authenticate: bearer"),
        ("POST /api/save", "Authorization: correct\r\n", 401, "www-authenticate: bearer"),
        ("POST /api/stop", "Content-Length: 5000\r\n", 413, "connection: close"),
        ("POST /api/stop", "Transfer-Encoding: chunked\r\n", 413, "connection: close"),
    ];
    for (line, headers, expected, part) in cases {
        let answer = ask(&dashboard, line, headers).await;
        assert_eq!(status(&answer), expected, "{line} {headers}: {answer}");
        assert!(answer.to_lowercase().contains(part), "{line} {headers}: {answer}");
        assert!(body(&answer).starts_with("{\"error\":\""), "{answer}");
    }
    assert!(orders.try_recv().is_err(), "nothing of it became an order");
}

#[tokio::test]
async fn hosts_of_other_names_are_refused() {
    let (dashboard, _orders) = dashboard().await;
    let address = dashboard.address();
    let cases = [
        (format!("GET /api/view HTTP/1.1\r\nHost: {address}\r\n"), 200),
        ("GET /api/view HTTP/1.1\r\nHost: localhost\r\n".to_owned(), 200),
        (format!("GET http://{address}/api/view HTTP/1.1\r\nHost: {address}\r\n"), 200),
        ("GET /api/view HTTP/1.1\r\nHost: evil.example\r\n".to_owned(), 403),
        (format!("GET http://evil.example/api/view HTTP/1.1\r\nHost: {address}\r\n"), 403),
        (format!("GET /api/view HTTP/1.1\r\nHost: {address}\r\nHost: evil.example\r\n"), 403),
        ("GET /healthz HTTP/1.1\r\n".to_owned(), 403),
    ];
    for (request, expected) in cases {
        let answer = exchange(&dashboard, &format!("{request}Connection: close\r\n\r\n")).await;
        assert_eq!(status(&answer), expected, "{request}: {answer}");
    }
}

#[tokio::test]
async fn orders_reach_the_controller() {
    let (dashboard, mut orders) = dashboard().await;
    let token = format!("Authorization: Bearer {TOKEN}\r\n");
    let reason = "asked for on the dashboard".to_owned();
    let answer = ask(&dashboard, "POST /api/save", &token).await;
    assert_eq!((status(&answer), body(&answer)), (202, "{\"accepted\":\"save\"}"));
    // One order fits: the controller has to take it before the next.
    assert_eq!(status(&ask(&dashboard, "POST /api/stop", &token).await), 503);
    assert_eq!(orders.recv().await, Some(DashboardOrder::Save { reason: reason.clone() }));
    assert_eq!(status(&ask(&dashboard, "POST /api/stop", &token).await), 202);
    assert_eq!(orders.recv().await, Some(DashboardOrder::Stop { reason }));
    drop(orders);
    assert_eq!(status(&ask(&dashboard, "POST /api/stop", &token).await), 503);
}

#[tokio::test]
async fn a_request_that_is_too_long_is_refused() {
    let (dashboard, _orders) = dashboard().await;
    let many = "X-Many: x\r\n".repeat(100);
    assert_eq!(status(&ask(&dashboard, "GET /healthz", &many).await), 431);
    let long = format!("X-Long: {}\r\n", "x".repeat(200_000));
    assert_ne!(status(&ask(&dashboard, "GET /healthz", &long).await), 200);
    assert_eq!(status(&ask(&dashboard, "GET /healthz", "").await), 200, "the others are answered as before");
}

#[tokio::test]
async fn a_reader_follows_to_the_end() {
    let (mut dashboard, _orders) = dashboard().await;
    let url = dashboard.url();
    let (opened, is_open) = tokio::sync::oneshot::channel();
    let reader = spawn_blocking(move || {
        let mut view = RunView::default();
        let mut stream = ViewStream::open(&url).unwrap();
        assert!(stream.next(&mut view).unwrap());
        assert_eq!((view.name.as_str(), view.state, view.progress.step), ("demo", RunState::Starting, 0));
        opened.send(()).unwrap();
        let mut changes = 0;
        while stream.next(&mut view).unwrap() {
            changes += 1;
        }
        (view, changes)
    });
    timeout(PATIENCE, is_open).await.expect("the first view in time").unwrap();
    publish(&mut dashboard, (1..=500).map(|number| step(1, number, 1.0)));
    publish(&mut dashboard, [Event::RunFinished { step: 500, seconds: 9.0 }]);
    let before = fetch(&dashboard).await;
    dashboard.close().await;
    let (view, changes) = timeout(PATIENCE, reader).await.expect("the stream ends").unwrap();
    assert_eq!((view.state, view.progress.step, view.curve.points.len()), (RunState::Finished, 500, 500));
    assert_eq!(view.curve, before.curve);
    // Hundreds of events at once come together, and the end is among them.
    assert!((1..100).contains(&changes), "{changes} changes");
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_nobody_up() {
    let (mut dashboard, _orders) = dashboard().await;
    let mut idle = TcpStream::connect(dashboard.address()).await.unwrap();
    idle.write_all(format!("GET /api/events HTTP/1.1\r\nHost: {}\r\n\r\n", dashboard.address()).as_bytes()).await.unwrap();
    let message = "x".repeat(10_000);
    for _ in 0..200 {
        publish(&mut dashboard, [Event::Warning { message: message.clone() }]);
    }
    assert_eq!(fetch(&dashboard).await.totals.warnings, 200);
    timeout(PATIENCE, dashboard.close()).await.expect("closing is bounded");
}

#[tokio::test]
async fn a_seed_is_what_events_go_on_from() {
    let (mut dashboard, _orders) = dashboard().await;
    let mut past = RunView::default();
    recorded(start().into_iter().chain([step(1, 7, 2.0)])).iter().for_each(|event| past.apply(event));
    dashboard.seed(past);
    publish(&mut dashboard, [step(1, 8, 1.0)]);
    let view = fetch(&dashboard).await;
    // The steps before the seventh had no report of their own.
    assert_eq!((view.totals.steps, view.progress.step), (8, 8));
}

#[tokio::test]
async fn a_taken_address_is_an_environment_failure() {
    let (dashboard, _orders) = dashboard().await;
    let (sender, _receiver) = mpsc::channel(1);
    let options = DashboardOptions { bind: dashboard.address(), token: Secret::new(TOKEN) };
    let failure = Dashboard::start(options, sender).await.unwrap_err().downcast::<Failure>().unwrap();
    assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Environment, "the dashboard cannot listen there"));
}

/// The view as a client in another process reads it.
async fn fetch(dashboard: &Dashboard) -> RunView {
    let url = dashboard.url();
    spawn_blocking(move || fetch_view(&url)).await.unwrap().unwrap()
}
