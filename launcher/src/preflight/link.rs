//! The bandwidth between two agents, over one TCP connection for each direction.
//!
//! Whoever accepts a connection sends a nonce; whoever made it proves with a keyed hash over nonce, node and order that it belongs to
//! the same check, so that strangers get nothing and nobody measures a node that it did not mean. The receiver of the data keeps the time
//! and decides when it is over: after the window that was asked for, or after [`MAX_BYTES`].

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use cloze_cluster::Secret;

use super::protocol::Peer;

/// Most bytes of one direction; fast links need no whole window.
const MAX_BYTES: u64 = 1 << 30;
/// Longest window, in milliseconds, whatever is asked for.
pub(super) const MAX_WINDOW_MS: u64 = 5000;
/// Longest wait for a connection to one address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest time in which nothing is read or written.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the receiver of an upload goes on reading, so that its answer is not lost behind data that is still on the way.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes that are written or read at a time.
const CHUNK_BYTES: usize = 256 << 10;
/// Connections that are served at the same time; one is usual.
const MAX_CONNECTIONS: usize = 8;

const NONCE_BYTES: usize = 32;
/// Direction (1 byte) and window in milliseconds (8 bytes, little-endian).
const ORDER_BYTES: usize = 9;
const UP: u8 = b'u';
const DOWN: u8 = b'd';
const WELCOME: u8 = b'w';

/// What both sides of a measurement know.
#[derive(Clone)]
pub(super) struct LinkKey {
    key: [u8; 32],
}

impl LinkKey {
    /// From the secret of the check.
    pub(super) fn new(secret: &Secret) -> Self {
        Self { key: blake3::derive_key("cloze preflight link 1", secret.expose().as_bytes()) }
    }

    fn proof(&self, nonce: &[u8; NONCE_BYTES], node: &str, order: &[u8; ORDER_BYTES]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(nonce).update(order).update(node.as_bytes());
        hasher.finalize()
    }
}

/// Serves measurements on threads of its own, as long as the process lives.
pub(super) fn serve(listener: TcpListener, node: String, key: LinkKey) -> io::Result<()> {
    let serve_all = move || {
        let num_open = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming().filter_map(Result::ok) {
            if num_open.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS {
                num_open.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let (node, key, open) = (node.clone(), key.clone(), Arc::clone(&num_open));
            let serve_one = move || {
                if let Err(error) = serve_connection(stream, &node, &key) {
                    tracing::debug!(error = format!("{error:#}"), "a measurement ended early");
                }
                open.fetch_sub(1, Ordering::SeqCst);
            };
            if thread::Builder::new().name("preflight measurement".to_owned()).spawn(serve_one).is_err() {
                num_open.fetch_sub(1, Ordering::SeqCst);
            }
        }
    };
    thread::Builder::new().name("preflight listener".to_owned()).spawn(serve_all).map(drop)
}

fn serve_connection(mut stream: TcpStream, node: &str, key: &LinkKey) -> anyhow::Result<()> {
    prepare(&stream)?;
    let nonce = fresh_nonce()?;
    stream.write_all(&nonce).context("send the nonce")?;
    let (mut order, mut proof) = ([0; ORDER_BYTES], [0; 32]);
    stream.read_exact(&mut order).context("read the order")?;
    stream.read_exact(&mut proof).context("read the proof")?;
    // Compared in constant time.
    ensure!(key.proof(&nonce, node, &order) == blake3::Hash::from_bytes(proof), "a stranger asked for a measurement");
    stream.write_all(&[WELCOME]).context("welcome the other side")?;
    let [direction, window @ ..] = order;
    let window = Duration::from_millis(u64::from_le_bytes(window).min(MAX_WINDOW_MS));
    if direction == UP {
        let (bytes, elapsed) = receive(&mut stream, window)?;
        stream.write_all(&bytes.to_le_bytes()).context("send the count")?;
        stream.write_all(&(elapsed.as_micros() as u64).to_le_bytes()).context("send the time")?;
        drain(&mut stream);
    } else {
        send(&mut stream, window, || false);
    }
    Ok(())
}

/// Megabits a second to another agent and back.
pub(super) fn measure(peer: &Peer, key: &LinkKey) -> anyhow::Result<(f64, f64)> {
    let window = Duration::from_millis(peer.window_ms.min(MAX_WINDOW_MS));
    let mut stream = connect(peer, key, UP)?;
    let mut answer = stream.try_clone().context("copy a connection")?;
    let reader = thread::Builder::new().name("preflight answer".to_owned()).spawn(move || read_counts(&mut answer));
    let reader = reader.context("start a thread")?;
    send(&mut stream, window, || reader.is_finished());
    let (bytes, elapsed) = reader.join().map_err(|_| anyhow::anyhow!("the thread that waits for the answer failed"))??;
    let up = mbit_per_s(bytes, elapsed)?;
    let mut stream = connect(peer, key, DOWN)?;
    let (bytes, elapsed) = receive(&mut stream, window)?;
    Ok((up, mbit_per_s(bytes, elapsed)?))
}

fn read_counts(stream: &mut TcpStream) -> anyhow::Result<(u64, Duration)> {
    // The other side answers when its window is over, and says nothing before.
    stream.set_read_timeout(Some(Duration::from_millis(MAX_WINDOW_MS) + SILENCE_TIMEOUT)).context("set a timeout")?;
    let mut counts = [0; 16];
    stream.read_exact(&mut counts).context("read what arrived at the other side")?;
    let number = |from: usize| u64::from_le_bytes(std::array::from_fn(|place| counts[from + place]));
    Ok((number(0), Duration::from_micros(number(8))))
}

/// A connection to the agent that was meant, at the first of its addresses where it answers.
fn connect(peer: &Peer, key: &LinkKey, direction: u8) -> anyhow::Result<TcpStream> {
    let mut reasons = Vec::new();
    for host in &peer.hosts {
        let addresses: Vec<SocketAddr> = match (host.as_str(), peer.port).to_socket_addrs() {
            Ok(addresses) => addresses.collect(),
            Err(error) => {
                reasons.push(format!("{host}: {error}"));
                continue;
            }
        };
        for address in addresses {
            match connect_at(address, peer, key, direction) {
                Ok(stream) => return Ok(stream),
                Err(error) => reasons.push(format!("{address}: {error:#}")),
            }
        }
    }
    bail!("it answers at none of its addresses ({})", reasons.join(", "))
}

fn connect_at(address: SocketAddr, peer: &Peer, key: &LinkKey, direction: u8) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
    prepare(&stream)?;
    let mut nonce = [0; NONCE_BYTES];
    stream.read_exact(&mut nonce)?;
    let mut order = [direction; ORDER_BYTES];
    order[1..].copy_from_slice(&peer.window_ms.to_le_bytes());
    stream.write_all(&order)?;
    stream.write_all(key.proof(&nonce, &peer.node, &order).as_bytes())?;
    let mut welcome = [0];
    stream.read_exact(&mut welcome).context("another node answers there")?;
    ensure!(welcome == [WELCOME], "something else answers there");
    Ok(stream)
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE_TIMEOUT))?;
    stream.set_write_timeout(Some(SILENCE_TIMEOUT))
}

/// Sends until the other side has enough, which it shows by closing the connection or by its answer.
fn send(stream: &mut TcpStream, window: Duration, is_answered: impl Fn() -> bool) {
    let chunk = vec![0xA5; CHUNK_BYTES];
    // The receiver's window begins later than ours; it ends the measurement, and this only bounds it.
    let deadline = Instant::now() + window + SILENCE_TIMEOUT;
    let mut sent = 0;
    while !is_answered() && Instant::now() < deadline && sent <= MAX_BYTES {
        match stream.write(&chunk) {
            Ok(written) => sent += written as u64,
            // It has what it wants, or is gone, which the missing count tells.
            Err(_) => return,
        }
    }
}

/// Reads for the time of the window; returns bytes, and the time from the first of them.
fn receive(stream: &mut TcpStream, window: Duration) -> anyhow::Result<(u64, Duration)> {
    let mut chunk = vec![0; CHUNK_BYTES];
    // What is there already says nothing about the link.
    ensure!(stream.read(&mut chunk).context("wait for data")? > 0, "no data came");
    let started = Instant::now();
    let mut bytes = 0;
    while started.elapsed() < window && bytes < MAX_BYTES {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(read) => bytes += read as u64,
            Err(error) => return Err(error).context("read data"),
        }
    }
    Ok((bytes, started.elapsed()))
}

/// Reads what is still on the way, until the other side closes.
fn drain(stream: &mut TcpStream) {
    let deadline = Instant::now() + DRAIN_TIMEOUT;
    let mut chunk = vec![0; CHUNK_BYTES];
    while Instant::now() < deadline && stream.read(&mut chunk).is_ok_and(|read| read > 0) {}
}

fn mbit_per_s(bytes: u64, elapsed: Duration) -> anyhow::Result<f64> {
    ensure!(bytes > 0, "nothing came through in {:.1} s", elapsed.as_secs_f64());
    Ok(bytes as f64 * 8.0 / 1e6 / elapsed.as_secs_f64().max(1e-6))
}

fn fresh_nonce() -> anyhow::Result<[u8; NONCE_BYTES]> {
    let mut nonce = [0; NONCE_BYTES];
    std::fs::File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut nonce)).context("read /dev/urandom for a nonce")?;
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(node: &str, secret: &str) -> Peer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        serve(listener, node.to_owned(), LinkKey::new(&Secret::new(secret))).unwrap();
        Peer { node: node.to_owned(), hosts: vec!["no such host".to_owned(), "127.0.0.1".to_owned()], port, window_ms: 50 }
    }

    #[test]
    fn both_directions_are_measured() {
        let peer = served("a", "secret");
        let (up, down) = measure(&peer, &LinkKey::new(&Secret::new("secret"))).unwrap();
        // Loopback carries gigabits; even a busy machine has a hundredth of that.
        assert!(up > 10.0 && down > 10.0, "{up} {down}");
    }

    #[test]
    fn strangers_and_other_nodes_are_refused() {
        let peer = served("a", "secret");
        let wrong_secret = measure(&peer, &LinkKey::new(&Secret::new("other"))).unwrap_err();
        let wrong_node = measure(&Peer { node: "b".into(), ..peer.clone() }, &LinkKey::new(&Secret::new("secret"))).unwrap_err();
        for error in [wrong_secret, wrong_node] {
            assert!(format!("{error:#}").contains("another node answers there"), "{error:#}");
        }
        // The port is free again when the listener is dropped.
        let gone = { TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port() };
        let error = measure(&Peer { port: gone, ..peer }, &LinkKey::new(&Secret::new("secret"))).unwrap_err();
        assert!(format!("{error:#}").contains("Connection refused"), "{error:#}");
    }
}
