//! Reads a dashboard from another terminal, over plain HTTP with blocking sockets.
//!
//! Requests are HTTP/1.0, so that an answer is what comes until the connection closes: there are no chunks to put together.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};
use serde::de::DeserializeOwned;

use crate::view::RunView;

/// Longest time to connect.
const CONNECT_TIMEOUT_S: u64 = 5;
/// Longest silence; a stream says something every 15 seconds.
const SILENCE_TIMEOUT_S: u64 = 40;
/// Longest line of a head, in bytes.
const MAX_HEAD_LINE_BYTES: u64 = 8 * 1024;
/// Most lines of a head.
const MAX_HEAD_LINES: usize = 64;
/// Longest view, in bytes; one of ten thousand workers has about two million.
const MAX_VIEW_BYTES: u64 = 64 << 20;

/// Asks a dashboard for its view. `url` is `http://host:port`. Fails with kind `Environment` when nobody answers there, and with
/// kind `Mismatch` when what answers is no dashboard.
pub fn fetch_view(url: &str) -> Result<RunView, Failure> {
    let mut body = Vec::new();
    let answer = request(url, "/api/view")?;
    answer.take(MAX_VIEW_BYTES).read_to_end(&mut body).map_err(|error| silent(url, &error))?;
    parse(url, &body)
}

/// A view that a dashboard keeps up to date.
#[derive(Debug)]
pub struct ViewStream {
    reader: BufReader<TcpStream>,
    url: String,
}

impl ViewStream {
    /// Opens the stream of `http://host:port`; fails like [`fetch_view`].
    pub fn open(url: &str) -> Result<Self, Failure> {
        Ok(Self { reader: request(url, "/api/events")?, url: url.to_owned() })
    }

    /// Waits for the next change and takes it into `view`; false at the end of the stream.
    pub fn next(&mut self, view: &mut RunView) -> Result<bool, Failure> {
        let (mut event, mut data) = (String::new(), String::new());
        while let Some(line) = self.line()? {
            if let Some(name) = line.strip_prefix("event: ") {
                name.clone_into(&mut event);
            } else if let Some(text) = line.strip_prefix("data: ") {
                text.clone_into(&mut data);
            } else if line.is_empty() {
                match event.as_str() {
                    "view" => *view = parse(&self.url, data.as_bytes())?,
                    "step" => view.merge(parse(&self.url, data.as_bytes())?),
                    // How soon to connect again is for browsers.
                    _ => continue,
                }
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The next line without its end; `None` at the end of the stream.
    fn line(&mut self) -> Result<Option<String>, Failure> {
        let mut line = String::new();
        self.reader.by_ref().take(MAX_VIEW_BYTES).read_line(&mut line).map_err(|error| silent(&self.url, &error))?;
        Ok(line.strip_suffix('\n').map(str::to_owned))
    }
}

/// Sends a request and reads the head of its answer.
fn request(url: &str, path: &str) -> Result<BufReader<TcpStream>, Failure> {
    let authority = authority(url)?;
    let mut stream = connect(&authority).map_err(|error| {
        Failure::new(FailureKind::Environment, "no dashboard answers there")
            .at(url)
            .because(error)
            .hint("has the run ended? `cloze status RUN` reads the run's folder")
    })?;
    let text = format!("GET {path} HTTP/1.0\r\nHost: {authority}\r\n\r\n");
    stream.write_all(text.as_bytes()).map_err(|error| silent(url, &error))?;
    let mut reader = BufReader::new(stream);
    let status = head_line(url, &mut reader)?;
    if status.split(' ').nth(1) != Some("200") {
        return Err(no_dashboard(url).expected("status 200").found(status));
    }
    for _ in 0..MAX_HEAD_LINES {
        if head_line(url, &mut reader)?.is_empty() {
            return Ok(reader);
        }
    }
    Err(no_dashboard(url).expected(format!("at most {MAX_HEAD_LINES} header lines")))
}

/// `host:port` of `http://host:port`, with port 80 where none is named.
fn authority(url: &str) -> Result<String, Failure> {
    let rest = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
    let authority = rest.filter(|rest| !rest.is_empty() && !rest.contains(['/', '?', '#', '@']) && !rest.contains(char::is_whitespace));
    let Some(authority) = authority else {
        return Err(Failure::new(FailureKind::Recipe, "this is no address of a dashboard").expected("http://host:port").found(url));
    };
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    Ok(if has_port { authority.to_owned() } else { format!("{authority}:80") })
}

fn connect(authority: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in authority.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, Duration::from_secs(CONNECT_TIMEOUT_S)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(Duration::from_secs(SILENCE_TIMEOUT_S)))?;
                stream.set_write_timeout(Some(Duration::from_secs(CONNECT_TIMEOUT_S)))?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn head_line(url: &str, reader: &mut BufReader<TcpStream>) -> Result<String, Failure> {
    let mut line = Vec::new();
    reader.take(MAX_HEAD_LINE_BYTES).read_until(b'\n', &mut line).map_err(|error| silent(url, &error))?;
    match line.strip_suffix(b"\r\n") {
        Some(text) => Ok(String::from_utf8_lossy(text).into_owned()),
        None => Err(no_dashboard(url).expected("an answer in HTTP")),
    }
}

fn parse<T: DeserializeOwned>(url: &str, json: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(json).map_err(|error| no_dashboard(url).because(error))
}

fn silent(url: &str, error: &io::Error) -> Failure {
    Failure::new(FailureKind::Environment, "the dashboard does not answer any more").at(url).because(error)
}

fn no_dashboard(url: &str) -> Failure {
    Failure::new(FailureKind::Mismatch, "what answers there is no dashboard of this version of cloze").at(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let cases = [
            ("http://127.0.0.1:4243", Some("127.0.0.1:4243")),
            ("http://127.0.0.1:4243/", Some("127.0.0.1:4243")),
            ("http://node-a", Some("node-a:80")),
            ("http://[::1]:4243/", Some("[::1]:4243")),
            ("http://[::1]", Some("[::1]:80")),
            ("http://user@node-a:1", None),
            ("http://node-a/metrics", None),
            ("http://", None),
            ("https://node-a:4243", None),
            ("runs/demo", None),
        ];
        for (url, expected) in cases {
            assert_eq!(authority(url).ok().as_deref(), expected, "{url}");
        }
    }

    #[test]
    fn nobody_is_there() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        assert_eq!(fetch_view(&url).unwrap_err().kind, FailureKind::Environment);
    }

    #[test]
    fn something_else_is_there() {
        for answer in ["HTTP/1.0 404 Not Found\r\n\r\n", "HTTP/1.0 200 OK\r\n\r\n[]", "SSH-2.0-OpenSSH\r\n", ""] {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                // The request is read whole, so that closing sends no reset before the answer is read.
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut line = String::new();
                while line != "\r\n" {
                    line.clear();
                    reader.read_line(&mut line).unwrap();
                }
                stream.write_all(answer.as_bytes()).unwrap();
            });
            assert_eq!(fetch_view(&url).unwrap_err().kind, FailureKind::Mismatch, "{answer:?}");
            server.join().unwrap();
        }
    }
}
