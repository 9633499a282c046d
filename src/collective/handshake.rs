//! How two neighbours of a ring find each other and make sure that they belong to the same group.
//!
//! Every rank dials the next one and accepts the previous one at the same time. The dialler says who it is and proves that it
//! knows the generation's key without sending it; the other side answers with a verdict and a proof of its own.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use super::api::CollectiveCause;

/// Version of the handshake and of what follows it on the wire.
const PROTOCOL_VERSION: u32 = 2;
const MAGIC: [u8; 8] = *b"CLOZRING";
const PROOF_BYTES: usize = 32;
/// Magic, version, generation, rank, world size, proof.
const HELLO_BYTES: usize = 8 + 4 + 8 + 4 + 4 + PROOF_BYTES;
/// Verdict and proof.
const REPLY_BYTES: usize = 1 + PROOF_BYTES;
/// How often a wait looks whether it has been interrupted. A listener of the standard library cannot wait with a limit.
const POLL_MS: u64 = 2;
/// A connection that does not introduce itself within this time is dropped.
const HELLO_WAIT_MS: u64 = 1000;
/// Connections that are asked who they are at the same time; more wait until one of them is dropped.
const VISITORS_MAX: usize = 16;
/// Longest wait for one attempt to connect.
const DIAL_WAIT_MS: u64 = 3000;
/// Failed attempts to connect before the peer counts as gone: listeners are open before any rank learns their addresses.
const DIAL_ATTEMPTS: u32 = 3;
/// Pause between two attempts to connect.
const DIAL_PAUSE_MS: u64 = 100;

/// A cause and the rank that is to blame.
pub type Fault = (Option<usize>, CollectiveCause);

/// Who this rank is and what it shares with its peers.
pub struct Identity {
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// The generation that the group belongs to.
    pub generation: u64,
    key: [u8; 32],
}

impl Identity {
    /// Derives the proof key from the text that the coordinator gave to the generation's members.
    pub fn new(rank: usize, world_size: usize, generation: u64, key: &str) -> Self {
        Self { rank, world_size, generation, key: blake3::derive_key("cloze collective ring handshake v1", key.as_bytes()) }
    }

    /// Rank that this one sends to.
    pub fn next(&self) -> usize {
        (self.rank + 1) % self.world_size
    }

    /// Rank that this one receives from.
    pub fn previous(&self) -> usize {
        (self.rank + self.world_size - 1) % self.world_size
    }

    /// What only a member of this generation can compute: it depends on who speaks, to whom, and on the role.
    /// Two `blake3::Hash` are compared in constant time.
    fn proof(&self, role: [u8; 5], from: usize, to: usize) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&role).update(&self.generation.to_le_bytes());
        hasher.update(&(from as u64).to_le_bytes()).update(&(to as u64).to_le_bytes());
        hasher.finalize()
    }
}

/// The answer to a hello, one byte on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Accepted = 1,
    OtherProtocol = 2,
    OtherGeneration = 3,
    /// The acceptor has not left an older generation yet; the dialler tries again.
    NotYet = 4,
    WrongKey = 5,
    WrongRank = 6,
}

impl Verdict {
    fn reason(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::OtherProtocol => "it speaks another version of the protocol",
            Self::OtherGeneration => "it is in another generation",
            Self::NotYet => "it is still in an older generation",
            Self::WrongKey => "the key of the generation is wrong",
            Self::WrongRank => "it expected another rank or world size",
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        let all = [Self::Accepted, Self::OtherProtocol, Self::OtherGeneration, Self::NotYet, Self::WrongKey, Self::WrongRank];
        all.into_iter().find(|verdict| *verdict as u8 == byte)
    }
}

/// One attempt to form the ring: its limits, and the first thing that went wrong on either side.
pub struct Attempt<'a> {
    started: Instant,
    timeout: Duration,
    interrupt: &'a AtomicBool,
    fault: Mutex<Option<Fault>>,
    /// What became of the last connection that was not wanted; it may be why nothing else comes.
    note: Mutex<String>,
}

impl<'a> Attempt<'a> {
    /// An attempt that starts now, ends after `timeout`, and gives up as soon as `interrupt` becomes true.
    pub fn new(timeout: Duration, interrupt: &'a AtomicBool) -> Self {
        Self { started: Instant::now(), timeout, interrupt, fault: Mutex::new(None), note: Mutex::default() }
    }

    /// Keeps the first fault, and returns it.
    fn fail(&self, peer: usize, cause: CollectiveCause) -> Fault {
        let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        fault.get_or_insert((Some(peer), cause)).clone()
    }

    /// Fails when the other side has failed, when interrupted, and when the time is up.
    fn check(&self, peer: usize) -> Result<(), Fault> {
        if let Some(fault) = self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Err(fault);
        }
        if self.interrupt.load(Ordering::SeqCst) {
            let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
            return Err(fault.get_or_insert((None, CollectiveCause::Aborted("the generation has ended".to_owned()))).clone());
        }
        if self.started.elapsed() < self.timeout {
            return Ok(());
        }
        let timeout_ms = self.timeout.as_millis() as u64;
        let note = self.note.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Err(self.fail(peer, CollectiveCause::TimedOut { timeout_ms, note }))
    }

    fn is_over(&self) -> bool {
        let failed = self.fault.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        failed || self.interrupt.load(Ordering::SeqCst) || self.started.elapsed() >= self.timeout
    }

    fn remaining(&self) -> Duration {
        self.timeout.saturating_sub(self.started.elapsed()).max(Duration::from_millis(1))
    }
}

/// The two connections of a rank.
pub struct Neighbours {
    /// To the next rank; only written to.
    pub next: TcpStream,
    /// From the previous rank; only read from.
    pub previous: TcpStream,
}

/// Dials the next rank and accepts the previous one. Call it only for a world of two or more.
pub fn join_ring(listener: &TcpListener, identity: &Identity, peers: &[String], attempt: &Attempt) -> Result<Neighbours, Fault> {
    let previous = identity.previous();
    thread::scope(|scope| {
        let dialler = thread::Builder::new().name("ring-dial".to_owned()).spawn_scoped(scope, || dial(identity, peers, attempt));
        let dialler = dialler.map_err(|error| attempt.fail(identity.next(), CollectiveCause::Io(error.to_string())))?;
        let accepted = accept(listener, identity, attempt);
        let dialled = match dialler.join() {
            Ok(dialled) => dialled,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let (next, accepted) = (dialled?, accepted?);
        for stream in [&next, &accepted] {
            // Pieces are written whole; waiting for more to fill a packet would only add latency. The buffer sizes stay with
            // the kernel, which grows them further than a process may ask for.
            stream.set_nodelay(true).map_err(|error| attempt.fail(previous, CollectiveCause::Io(error.to_string())))?;
        }
        Ok(Neighbours { next, previous: accepted })
    })
}

/// Connects to the next rank until it accepts, refuses, or counts as gone.
fn dial(identity: &Identity, peers: &[String], attempt: &Attempt) -> Result<TcpStream, Fault> {
    let peer = identity.next();
    let mut failures = 0;
    loop {
        attempt.check(peer)?;
        match dial_once(identity, &peers[peer], attempt) {
            Ok((stream, Verdict::Accepted)) => return Ok(stream),
            Ok((_, Verdict::NotYet)) => {}
            Ok((_, verdict)) => return Err(attempt.fail(peer, CollectiveCause::Refused(verdict.reason().to_owned()))),
            Err(error) => {
                failures += 1;
                if failures >= DIAL_ATTEMPTS {
                    attempt.check(peer)?;
                    let text = format!("no connection to {} after {failures} attempts: {error}", peers[peer]);
                    return Err(attempt.fail(peer, CollectiveCause::Io(text)));
                }
            }
        }
        thread::sleep(Duration::from_millis(DIAL_PAUSE_MS).min(attempt.remaining()));
    }
}

/// One connection, one hello, one answer.
fn dial_once(identity: &Identity, address: &str, attempt: &Attempt) -> io::Result<(TcpStream, Verdict)> {
    let limit = Duration::from_millis(DIAL_WAIT_MS).min(attempt.remaining());
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the address names no host");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, limit) {
            Ok(stream) => return introduce(identity, stream, attempt),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Says hello on a fresh connection and waits for the verdict as long as the attempt lasts.
fn introduce(identity: &Identity, stream: TcpStream, attempt: &Attempt) -> io::Result<(TcpStream, Verdict)> {
    stream.set_write_timeout(Some(attempt.remaining()))?;
    (&stream).write_all(&hello(identity))?;
    let mut reply = [0; REPLY_BYTES];
    read_within(&stream, &mut reply, attempt.remaining(), &|| attempt.is_over())?;
    let verdict = Verdict::from_byte(reply[0]).ok_or_else(|| invalid("the reply is not one of this protocol"))?;
    let (_, proof) = reply.split_at(1);
    if verdict == Verdict::Accepted && identity.proof(*b"reply", identity.next(), identity.rank) != hash_of(proof) {
        return Ok((stream, Verdict::WrongKey));
    }
    Ok((stream, verdict))
}

/// Connections that are asked who they are at the same time, so that a silent stranger does not hold up the previous rank.
struct Hall<'a> {
    identity: &'a Identity,
    attempt: &'a Attempt<'a>,
    num_visitors: AtomicUsize,
    found: Mutex<Found>,
}

/// What came of them so far.
#[derive(Default)]
struct Found {
    /// The previous rank's connection.
    previous: Option<TcpStream>,
    /// It is there; nobody else is wanted.
    is_complete: bool,
}

/// Accepts connections until one comes from the previous rank. Others are told why they are refused.
fn accept(listener: &TcpListener, identity: &Identity, attempt: &Attempt) -> Result<TcpStream, Fault> {
    let peer = identity.previous();
    let io_fault = |error: io::Error| attempt.fail(peer, CollectiveCause::Io(error.to_string()));
    listener.set_nonblocking(true).map_err(io_fault)?;
    let hall = Hall { identity, attempt, num_visitors: AtomicUsize::new(0), found: Mutex::default() };
    let stream = thread::scope(|scope| {
        loop {
            if let Some(stream) = hall.lock().previous.take() {
                return Ok(stream);
            }
            attempt.check(peer)?;
            if hall.num_visitors.load(Ordering::SeqCst) >= VISITORS_MAX {
                thread::sleep(Duration::from_millis(POLL_MS));
                continue;
            }
            match listener.accept() {
                Ok((stream, address)) => hall.let_in(scope, stream, address).map_err(io_fault)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(POLL_MS)),
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
                Err(error) => return Err(io_fault(error)),
            }
        }
    })?;
    // The listener may be a clone whose other half lives on, and the mode belongs to both.
    listener.set_nonblocking(false).map_err(io_fault)?;
    Ok(stream)
}

impl Hall<'_> {
    fn lock(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks a connection who it is, on a thread that ends with the search.
    fn let_in<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, stream: TcpStream, address: SocketAddr) -> io::Result<()> {
        self.num_visitors.fetch_add(1, Ordering::SeqCst);
        let visit = move || {
            let note = match self.welcome(stream) {
                Ok(Verdict::Accepted) => None,
                Ok(verdict) => Some(format!("; a connection from {address} was refused: {}", verdict.reason())),
                Err(error) => Some(format!("; a connection from {address} failed: {error}")),
            };
            if let Some(note) = note {
                *self.attempt.note.lock().unwrap_or_else(PoisonError::into_inner) = note;
            }
            self.num_visitors.fetch_sub(1, Ordering::SeqCst);
        };
        thread::Builder::new().name("ring-welcome".to_owned()).spawn_scoped(scope, visit).map(drop)
    }

    /// Reads a hello and answers it.
    fn welcome(&self, stream: TcpStream) -> io::Result<Verdict> {
        stream.set_nonblocking(false)?;
        let limit = Duration::from_millis(HELLO_WAIT_MS).min(self.attempt.remaining());
        stream.set_write_timeout(Some(limit))?;
        let mut hello = [0; HELLO_BYTES];
        read_within(&stream, &mut hello, limit, &|| self.attempt.is_over() || self.lock().is_complete)?;
        let verdict = judge(self.identity, &hello);
        let mut reply = [0; REPLY_BYTES];
        reply[0] = verdict as u8;
        if verdict != Verdict::Accepted {
            (&stream).write_all(&reply)?;
            return Ok(verdict);
        }
        reply[1..].copy_from_slice(self.identity.proof(*b"reply", self.identity.rank, self.identity.previous()).as_bytes());
        // One connection is taken, and the other side uses the one that it has an answer on.
        let mut found = self.lock();
        if !found.is_complete {
            (&stream).write_all(&reply)?;
            (found.previous, found.is_complete) = (Some(stream), true);
        }
        Ok(verdict)
    }
}

/// What this rank says to the next one.
fn hello(identity: &Identity) -> [u8; HELLO_BYTES] {
    let mut hello = [0; HELLO_BYTES];
    hello[..8].copy_from_slice(&MAGIC);
    hello[8..12].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    hello[12..20].copy_from_slice(&identity.generation.to_le_bytes());
    hello[20..24].copy_from_slice(&(identity.rank as u32).to_le_bytes());
    hello[24..28].copy_from_slice(&(identity.world_size as u32).to_le_bytes());
    hello[28..].copy_from_slice(identity.proof(*b"hello", identity.rank, identity.next()).as_bytes());
    hello
}

/// Decides about a hello. The key is looked at before the rank, so that a stranger learns nothing about the group.
fn judge(identity: &Identity, hello: &[u8; HELLO_BYTES]) -> Verdict {
    let number = |start: usize| u32::from_le_bytes([hello[start], hello[start + 1], hello[start + 2], hello[start + 3]]);
    if hello[..8] != MAGIC || number(8) != PROTOCOL_VERSION {
        return Verdict::OtherProtocol;
    }
    let generation = u64::from(number(12)) | (u64::from(number(16)) << 32);
    if generation > identity.generation {
        return Verdict::NotYet;
    }
    if generation < identity.generation {
        return Verdict::OtherGeneration;
    }
    let rank = number(20) as usize;
    if identity.proof(*b"hello", rank, identity.rank) != hash_of(&hello[28..]) {
        return Verdict::WrongKey;
    }
    if rank != identity.previous() || number(24) as usize != identity.world_size {
        return Verdict::WrongRank;
    }
    Verdict::Accepted
}

/// Fills `bytes` within `limit`, and stops early when nobody waits for them any more.
fn read_within(mut stream: &TcpStream, bytes: &mut [u8], limit: Duration, is_over: &dyn Fn() -> bool) -> io::Result<()> {
    let started = Instant::now();
    stream.set_read_timeout(Some(Duration::from_millis(POLL_MS)))?;
    let mut filled = 0;
    while filled < bytes.len() {
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                if started.elapsed() >= limit || is_over() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// A proof as a hash, for the constant-time comparison. A slice of another length becomes a hash that matches nothing.
fn hash_of(proof: &[u8]) -> blake3::Hash {
    blake3::Hash::from_slice(proof).unwrap_or_else(|_| blake3::Hash::from_bytes([0; PROOF_BYTES]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_has_its_verdict() {
        let acceptor = Identity::new(1, 3, 5, "secret");
        let cases = [
            (Identity::new(0, 3, 5, "secret"), Verdict::Accepted),
            (Identity::new(0, 3, 4, "secret"), Verdict::OtherGeneration),
            (Identity::new(0, 3, 6, "secret"), Verdict::NotYet),
            (Identity::new(0, 3, 5, "guess"), Verdict::WrongKey),
            (Identity::new(0, 2, 5, "secret"), Verdict::WrongRank),
            (Identity::new(2, 3, 5, "secret"), Verdict::WrongKey),
        ];
        for (dialler, verdict) in cases {
            assert_eq!(judge(&acceptor, &hello(&dialler)), verdict);
        }
    }

    #[test]
    fn silent_strangers_hold_nobody_up() {
        let listeners = [0, 1].map(|_| TcpListener::bind(("127.0.0.1", 0)).unwrap());
        let peers = [0, 1].map(|rank: usize| listeners[rank].local_addr().unwrap().to_string());
        // They are in the queue before any member is, and one says something else.
        let strangers: Vec<TcpStream> = (0..VISITORS_MAX - 1).map(|_| TcpStream::connect(peers[1].as_str()).unwrap()).collect();
        (&strangers[3]).write_all(&[b'x'; HELLO_BYTES]).unwrap();
        let interrupt = AtomicBool::new(false);
        let started = Instant::now();
        thread::scope(|scope| {
            for (rank, listener) in listeners.iter().enumerate() {
                let (peers, interrupt) = (&peers, &interrupt);
                scope.spawn(move || {
                    let attempt = Attempt::new(Duration::from_secs(20), interrupt);
                    join_ring(listener, &Identity::new(rank, 2, 1, "secret"), peers, &attempt).unwrap_or_else(|fault| panic!("{fault:?}"));
                });
            }
        });
        let elapsed = started.elapsed();
        assert!(elapsed < Duration::from_millis(HELLO_WAIT_MS), "{elapsed:?}");
        drop(strangers);
    }

    #[test]
    fn another_version_is_refused() {
        let mut bytes = hello(&Identity::new(0, 3, 5, "secret"));
        bytes[8] += 1;
        assert_eq!(judge(&Identity::new(1, 3, 5, "secret"), &bytes), Verdict::OtherProtocol);
    }

    #[test]
    fn verdicts_survive_the_wire() {
        for byte in 1..=6 {
            assert_eq!(Verdict::from_byte(byte).map(|verdict| verdict as u8), Some(byte));
        }
        assert_eq!(Verdict::from_byte(0), None);
    }

    #[test]
    fn a_hello_or_a_reply_of_another_role_is_no_proof() {
        let identity = Identity::new(0, 2, 1, "secret");
        assert_ne!(identity.proof(*b"hello", 0, 1), identity.proof(*b"reply", 0, 1));
        assert_ne!(identity.proof(*b"hello", 0, 1), identity.proof(*b"hello", 1, 0));
    }
}
