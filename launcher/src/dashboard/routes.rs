//! From a request to its answer. Nothing here waits.

use std::sync::Arc;

use bytes::Bytes;
use cloze_cluster::Secret;
use hyper::body::Body;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use tokio::sync::mpsc::error::TrySendError;

use super::body::Answer;
use super::shared::{DashboardOrder, Shared};
use super::{hosts, metrics, page, stream};

/// Most bytes of a request's body; orders need none.
const MAX_BODY_BYTES: u64 = 4 * 1024;

/// Methods of what can be read.
const READING: &str = "GET, HEAD";
/// Method of orders.
const ORDERING: &str = "POST";

const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
const EVENTS: &str = "text/event-stream";

/// An answer.
pub(super) struct Reply {
    /// Head and body.
    pub response: Response<Answer>,
    /// The body goes on for as long as the run.
    pub is_stream: bool,
}

/// Why a request is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    ForeignHost,
    NotFound,
    /// With the methods that are allowed.
    WrongMethod(&'static str),
    NoToken,
    BodyTooLong,
    TooManyStreams,
    /// The controller takes no order.
    NotTaken(&'static str),
    Broken,
}

/// Answers a request.
pub(super) fn reply<B: Body>(shared: &Arc<Shared>, request: &Request<B>) -> Reply {
    let response = route(shared, request).unwrap_or_else(Refusal::response);
    Reply { is_stream: matches!(response.body(), Answer::Stream(_)), response }
}

fn route<B: Body>(shared: &Arc<Shared>, request: &Request<B>) -> Result<Response<Answer>, Refusal> {
    if !names_this_machine(shared, request) {
        return Err(Refusal::ForeignHost);
    }
    let path = request.uri().path();
    let allowed = match path {
        "/" | "/api/view" | "/api/events" | "/metrics" | "/healthz" => READING,
        "/api/stop" | "/api/save" => ORDERING,
        _ => return Err(Refusal::NotFound),
    };
    if !allowed.split(", ").any(|method| method == request.method().as_str()) {
        return Err(Refusal::WrongMethod(allowed));
    }
    if request.body().size_hint().upper().is_none_or(|bytes| bytes > MAX_BODY_BYTES) {
        return Err(Refusal::BodyTooLong);
    }
    match path {
        "/" => html(),
        "/api/view" => Ok(whole(StatusCode::OK, JSON, shared.json().map_err(|_| Refusal::Broken)?)),
        "/api/events" if request.method() == Method::HEAD => Ok(whole(StatusCode::OK, EVENTS, Bytes::new())),
        "/api/events" => stream::open(shared).map(|answer| with_type(StatusCode::OK, EVENTS, answer)).ok_or(Refusal::TooManyStreams),
        "/metrics" => Ok(whole(StatusCode::OK, METRICS, shared.look(|view| metrics::text(view, shared.open_streams())))),
        "/healthz" => Ok(whole(StatusCode::OK, TEXT, "ok\n")),
        _ => order(shared, request.headers(), path == "/api/stop"),
    }
}

/// Both the `Host` header and a whole address in the request line have to be ours; one of them is there.
fn names_this_machine<B>(shared: &Shared, request: &Request<B>) -> bool {
    let is_ours = |host: &str| hosts::is_allowed(host, shared.bound, &shared.own_name);
    let mut named = request.headers().get_all(header::HOST).iter().map(|host| host.to_str().is_ok_and(is_ours));
    let in_line = request.uri().host();
    match (named.next(), named.next(), in_line) {
        (Some(is_ours_in_header), None, None) => is_ours_in_header,
        (Some(is_ours_in_header), None, Some(host)) => is_ours_in_header && is_ours(host),
        (None, _, Some(host)) => is_ours(host),
        (None, _, None) | (Some(_), Some(_), _) => false,
    }
}

fn html() -> Result<Response<Answer>, Refusal> {
    let page = page::page().map_err(|error| {
        tracing::error!(error = %format!("{error:#}"), "the dashboard's page could not be made");
        Refusal::Broken
    })?;
    let policy = HeaderValue::try_from(page.policy).map_err(|_| Refusal::Broken)?;
    let mut response = whole(StatusCode::OK, HTML, page.html);
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    Ok(response)
}

fn order(shared: &Shared, headers: &HeaderMap, stops: bool) -> Result<Response<Answer>, Refusal> {
    if bearer(headers).is_none_or(|token| Secret::new(token) != shared.token) {
        return Err(Refusal::NoToken);
    }
    let reason = "asked for on the dashboard".to_owned();
    let (order, name) = if stops { (DashboardOrder::Stop { reason }, "stop") } else { (DashboardOrder::Save { reason }, "save") };
    match shared.orders.try_send(order) {
        Ok(()) => {
            tracing::info!(order = name, "the dashboard was given an order");
            Ok(whole(StatusCode::ACCEPTED, JSON, serde_json::json!({ "accepted": name }).to_string()))
        }
        Err(TrySendError::Full(_)) => Err(Refusal::NotTaken("the controller has not done the earlier orders yet")),
        Err(TrySendError::Closed(_)) => Err(Refusal::NotTaken("the run has ended")),
    }
}

/// The token of `Authorization: Bearer TOKEN`.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

impl Refusal {
    fn response(self) -> Response<Answer> {
        let (status, error) = match self {
            Self::ForeignHost => (StatusCode::FORBIDDEN, "the Host header does not name this machine"),
            Self::NotFound => (StatusCode::NOT_FOUND, "there is nothing at this path"),
            Self::WrongMethod(_) => (StatusCode::METHOD_NOT_ALLOWED, "this path has other methods"),
            Self::NoToken => (StatusCode::UNAUTHORIZED, "orders need the run's token"),
            Self::BodyTooLong => (StatusCode::PAYLOAD_TOO_LARGE, "the body is too long, or of unknown length"),
            Self::TooManyStreams => (StatusCode::SERVICE_UNAVAILABLE, "too many streams are open"),
            Self::NotTaken(error) => (StatusCode::SERVICE_UNAVAILABLE, error),
            Self::Broken => (StatusCode::INTERNAL_SERVER_ERROR, "the answer could not be made"),
        };
        let mut response = whole(status, JSON, serde_json::json!({ "error": error }).to_string());
        let headers = response.headers_mut();
        match self {
            Self::WrongMethod(allowed) => drop(headers.insert(header::ALLOW, HeaderValue::from_static(allowed))),
            Self::NoToken => drop(headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
            // Its body is not read, so the connection ends with the answer.
            Self::BodyTooLong => drop(headers.insert(header::CONNECTION, HeaderValue::from_static("close"))),
            _ => {}
        }
        response
    }
}

fn whole(status: StatusCode, content_type: &'static str, bytes: impl Into<Bytes>) -> Response<Answer> {
    with_type(status, content_type, Answer::Whole(Some(bytes.into())))
}

fn with_type(status: StatusCode, content_type: &'static str, answer: Answer) -> Response<Answer> {
    let mut response = Response::new(answer);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}
