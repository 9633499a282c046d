//! An HTTP proxy between Cloze and an object store that does to requests what a bad day does to them.
//!
//! It passes the `Host` header on as it came, because the client's signature covers it. Every connection carries one request.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{Builder, JoinHandle, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Longest head of a request, in bytes; those of an object store's client are about one kilobyte.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Longest body of a request, in bytes; a test's checkpoints are far smaller.
const MAX_BODY_BYTES: usize = 64 << 20;
/// Longest wait for more of a request or an answer.
const READ_TIMEOUT: Duration = Duration::from_mins(1);
/// Longest time that a request is left without an answer; clients give up earlier.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(45);
/// Interval at which a silent connection looks whether it is still wanted.
const SILENCE_STEP: Duration = Duration::from_millis(50);
/// Bytes that a slow connection passes on at a time.
const SLOW_PIECE_BYTES: usize = 4 << 10;
/// What a server asks a client to wait, in seconds; the header knows whole ones only.
const RETRY_AFTER_S: u32 = 1;

/// What happens to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreFault {
    /// It is answered with 500.
    ServerError,
    /// It is answered with 503.
    Unavailable,
    /// It is answered with 503 and a time to wait.
    RetryAfter,
    /// It is not answered until the client gives up.
    Silence,
    /// The second half of its body, or of the answer where it has none, never comes.
    Truncation,
    /// Body and answer pass at so many bytes per second.
    Slow(u32),
    /// The connection is reset before anything is read.
    Reset,
    /// It is done, and the client never hears of it.
    LostAnswer,
}

/// A running proxy; it stops when the value is dropped.
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
}

/// What the threads of all connections have in common.
struct Shared {
    server: SocketAddr,
    closed: AtomicBool,
    faults: Mutex<Faults>,
}

#[derive(Default)]
struct Faults {
    waiting: VecDeque<StoreFault>,
    applied: Vec<(StoreFault, f64)>,
}

impl FaultProxy {
    /// Starts a proxy at a free port of this address, in front of a server at a port of this machine.
    pub fn start(address: IpAddr, server_port: u16) -> Self {
        let listener = TcpListener::bind((address, 0)).expect("find a port for the proxy");
        let address = listener.local_addr().expect("read the proxy's port");
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, server_port));
        let shared = Arc::new(Shared { server, closed: AtomicBool::new(false), faults: Mutex::default() });
        let for_thread = Arc::clone(&shared);
        let listening = Builder::new().name("fault-proxy".to_owned()).spawn(move || listen(&listener, &for_thread));
        Self { address, shared, listening: Some(listening.expect("start the proxy")) }
    }

    /// Where clients connect to.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Lets a fault happen to so many of the next requests, after those that still wait.
    pub fn inject(&self, fault: StoreFault, count: usize) {
        self.shared.faults().waiting.extend(std::iter::repeat_n(fault, count));
    }

    /// The faults that have happened, with their time in seconds of Unix time.
    pub fn applied(&self) -> Vec<(StoreFault, f64)> {
        self.shared.faults().applied.clone()
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        // The listening thread looks at the mark after each connection.
        drop(TcpStream::connect(self.address));
        if let Some(listening) = self.listening.take() {
            drop(listening.join());
        }
    }
}

impl Shared {
    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().expect("no thread of the proxy panics while it holds the faults")
    }

    /// The fault of the request that begins.
    fn take_fault(&self) -> Option<StoreFault> {
        let mut faults = self.faults();
        let fault = faults.waiting.pop_front()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is right").as_secs_f64();
        faults.applied.push((fault, now));
        Some(fault)
    }
}

fn listen(listener: &TcpListener, shared: &Arc<Shared>) {
    for connection in listener.incoming() {
        if shared.closed.load(Ordering::SeqCst) {
            return;
        }
        let Ok(client) = connection else { continue };
        let shared = Arc::clone(shared);
        // A connection that breaks is the client's to notice; both ends are closed when the thread ends.
        let serving = move || drop(serve(client, &shared));
        drop(Builder::new().name("fault-proxy-request".to_owned()).spawn(serving).expect("start a thread of the proxy"));
    }
}

/// One request and its answer.
fn serve(mut client: TcpStream, shared: &Shared) -> io::Result<()> {
    client.set_read_timeout(Some(READ_TIMEOUT))?;
    client.set_nodelay(true)?;
    if client.peek(&mut [0])? == 0 {
        return Ok(());
    }
    let fault = shared.take_fault();
    if fault == Some(StoreFault::Reset) {
        // The kernel resets a connection that is closed while something was not read.
        return Ok(());
    }
    let request = read_request(&mut client)?;
    match fault {
        Some(StoreFault::ServerError) => refuse(&mut client, "500 Internal Server Error", ""),
        Some(StoreFault::Unavailable) => refuse(&mut client, "503 Service Unavailable", ""),
        Some(StoreFault::RetryAfter) => refuse(&mut client, "503 Service Unavailable", &format!("Retry-After: {RETRY_AFTER_S}\r\n")),
        Some(StoreFault::Silence) => stay_silent(&mut client, shared),
        Some(StoreFault::Truncation) if !request.body.is_empty() => {
            let mut server = TcpStream::connect(shared.server)?;
            server.write_all(&request.head)?;
            server.write_all(&request.body[..request.body.len() / 2])
        }
        Some(StoreFault::Truncation) => {
            let answer = forward(&request, shared, write_whole)?;
            client.write_all(&answer[..answer.len() / 2])
        }
        Some(StoreFault::Slow(rate)) => {
            let slowly = |stream: &mut TcpStream, bytes: &[u8]| write_slowly(stream, bytes, rate);
            let answer = forward(&request, shared, slowly)?;
            write_slowly(&mut client, &answer, rate)
        }
        Some(StoreFault::LostAnswer) => forward(&request, shared, write_whole).map(drop),
        Some(StoreFault::Reset) | None => {
            let answer = forward(&request, shared, write_whole)?;
            client.write_all(&answer)?;
            client.shutdown(Shutdown::Write)
        }
    }
}

/// A request as it is passed on.
struct Request {
    /// The head, which asks the server to close the connection after the answer.
    head: Vec<u8>,
    body: Vec<u8>,
}

fn read_request(client: &mut TcpStream) -> io::Result<Request> {
    let mut bytes: Vec<u8> = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        let mut piece = [0; 8192];
        let count = client.read(&mut piece)?;
        if count == 0 || bytes.len() > MAX_HEAD_BYTES {
            return Err(io::Error::other("the request has no end of its head"));
        }
        bytes.extend_from_slice(&piece[..count]);
    };
    let mut body = bytes.split_off(end + 4);
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines: Vec<&str> = head.split("\r\n").collect();
    let length = lines.iter().find_map(|line| header(line, "content-length")).unwrap_or("0");
    let length: usize = length.parse().map_err(io::Error::other)?;
    if length > MAX_BODY_BYTES || lines.iter().any(|line| header(line, "transfer-encoding").is_some()) {
        return Err(io::Error::other("a request of a kind that the proxy does not know"));
    }
    let rest = (length as u64).saturating_sub(body.len() as u64);
    client.take(rest).read_to_end(&mut body)?;
    lines.retain(|line| header(line, "connection").is_none());
    lines.push("Connection: close\r\n\r\n");
    Ok(Request { head: lines.join("\r\n").into_bytes(), body })
}

/// The value of a header line, where it is the line of this name.
fn header<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_once(':').filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

/// Passes a request on, with its body written in some way, and reads the whole answer.
fn forward(request: &Request, shared: &Shared, write_body: impl Fn(&mut TcpStream, &[u8]) -> io::Result<()>) -> io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(shared.server)?;
    server.set_read_timeout(Some(READ_TIMEOUT))?;
    server.set_nodelay(true)?;
    server.write_all(&request.head)?;
    write_body(&mut server, &request.body)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    Ok(answer)
}

fn write_whole(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)
}

/// Writes at a rate in bytes per second.
fn write_slowly(stream: &mut TcpStream, bytes: &[u8], rate: u32) -> io::Result<()> {
    for piece in bytes.chunks(SLOW_PIECE_BYTES) {
        stream.write_all(piece)?;
        sleep(Duration::from_secs_f64(piece.len() as f64 / f64::from(rate)));
    }
    Ok(())
}

/// Answers with an error, as S3 words it.
fn refuse(client: &mut TcpStream, status: &str, headers: &str) -> io::Result<()> {
    let body = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>InternalError</Code><Message>a fault on request</Message></Error>";
    let length = body.len();
    let headers = format!("{headers}Content-Type: application/xml\r\nContent-Length: {length}\r\nConnection: close\r\n");
    write!(client, "HTTP/1.1 {status}\r\n{headers}\r\n{body}")?;
    client.shutdown(Shutdown::Write)
}

/// Says nothing until the client closes the connection.
fn stay_silent(client: &mut TcpStream, shared: &Shared) -> io::Result<()> {
    client.set_read_timeout(Some(SILENCE_STEP))?;
    let deadline = Instant::now() + SILENCE_TIMEOUT;
    while Instant::now() < deadline && !shared.closed.load(Ordering::SeqCst) {
        match client.read(&mut [0; 64]) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut].contains(&error.kind()) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
