//! The two connections of a rank: a thread that writes to the next rank, reads from the previous one, and the buffers between.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::api::CollectiveCause;
use super::handshake::{Fault, Identity, Neighbours};
use super::layout::{MAX_PIECE_ELEMENTS, PIPELINE_DEPTH_WINDOWS};

/// Bytes of one `f32` on the wire.
pub const BYTES_PER_ELEMENT: usize = 4;
/// Size of a buffer.
pub const PIECE_BYTES: usize = MAX_PIECE_ELEMENTS * BYTES_PER_ELEMENT;
/// Buffers of a ring: what may be under way, and as much again so that receiving does not wait for the sender.
const POOL_PIECES: usize = 2 * PIPELINE_DEPTH_WINDOWS;

/// What a ring shares with its sending thread and its abort handles.
pub struct State {
    neighbours: Option<Neighbours>,
    fault: Mutex<Option<Fault>>,
}

impl State {
    /// The state of a sound ring; a world of one has no neighbours.
    pub fn new(neighbours: Option<Neighbours>) -> Self {
        Self { neighbours, fault: Mutex::new(None) }
    }

    /// The fault that ended the ring, if one did.
    pub fn fault(&self) -> Option<Fault> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps the first fault, cuts both connections so that nobody waits any longer, and returns the first fault.
    pub fn fail(&self, fault: Fault) -> Fault {
        let first = self.fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault).clone();
        if let Some(Neighbours { next, previous }) = &self.neighbours {
            // A connection that is already closed cannot be closed again; that is no error here.
            drop(next.shutdown(Shutdown::Both));
            drop(previous.shutdown(Shutdown::Both));
        }
        first
    }
}

/// A buffer of the pool; the first `len_bytes` are in use.
pub struct Piece {
    bytes: Box<[u8]>,
    len_bytes: usize,
}

impl Piece {
    /// The bytes in use.
    pub fn used_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len_bytes]
    }
}

/// The working end of a ring of two or more.
pub struct Link {
    state: Arc<State>,
    next: usize,
    previous: usize,
    timeout: Duration,
    spare: Vec<Piece>,
    free: Receiver<Piece>,
    queue: Option<SyncSender<Piece>>,
    sender: Option<JoinHandle<()>>,
}

impl Link {
    /// Starts the sending thread and fills the pool. `None` without neighbours.
    pub fn start(state: &Arc<State>, identity: &Identity, timeout: Duration) -> io::Result<Option<Self>> {
        let Some(Neighbours { next, previous }) = &state.neighbours else { return Ok(None) };
        next.set_write_timeout(Some(timeout))?;
        previous.set_read_timeout(Some(timeout))?;
        let (next, previous) = (identity.next(), identity.previous());
        let (queue, queued) = sync_channel(POOL_PIECES);
        let (freed, free) = sync_channel(POOL_PIECES);
        let shared = Arc::clone(state);
        let body = move || send_all(&shared, &queued, &freed, next, timeout);
        let sender = Some(thread::Builder::new().name("ring-send".to_owned()).spawn(body)?);
        let spare = (0..POOL_PIECES).map(|_| Piece { bytes: vec![0; PIECE_BYTES].into_boxed_slice(), len_bytes: 0 }).collect();
        Ok(Some(Self { state: Arc::clone(state), next, previous, timeout, spare, free, queue: Some(queue), sender }))
    }

    /// Hands `len_bytes` bytes, written by `fill` to the start of a free buffer, to the sending thread.
    pub fn send(&mut self, len_bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<(), Fault> {
        let mut piece = self.free_piece()?;
        piece.len_bytes = len_bytes;
        fill(piece.used_mut());
        self.forward(piece)
    }

    /// Hands a buffer to the sending thread. The queue has room for every buffer there is, so this never waits.
    pub fn forward(&mut self, piece: Piece) -> Result<(), Fault> {
        let gone = || (Some(self.next), CollectiveCause::Closed);
        self.queue.as_ref().ok_or_else(gone)?.send(piece).map_err(|_| gone())
    }

    /// Puts a buffer that need not be sent back into the pool.
    pub fn release(&mut self, piece: Piece) {
        self.spare.push(piece);
    }

    /// Reads exactly `len_bytes` from the previous rank into a free buffer.
    pub fn receive(&mut self, len_bytes: usize) -> Result<Piece, Fault> {
        let mut piece = self.free_piece()?;
        piece.len_bytes = len_bytes;
        self.read(piece.used_mut())?;
        Ok(piece)
    }

    /// Fills `bytes` from the previous rank.
    pub fn read(&self, bytes: &mut [u8]) -> Result<(), Fault> {
        let Some(Neighbours { previous, .. }) = &self.state.neighbours else { return Err((None, CollectiveCause::Closed)) };
        let mut stream = previous;
        stream.read_exact(bytes).map_err(|error| (Some(self.previous), cause_of(&error, self.timeout)))
    }

    /// A buffer that is not in use; waits for the sender to return one.
    fn free_piece(&mut self) -> Result<Piece, Fault> {
        if let Some(piece) = self.spare.pop() {
            return Ok(piece);
        }
        self.free.recv_timeout(self.timeout).map_err(|error| match error {
            RecvTimeoutError::Timeout => (Some(self.next), timed_out(self.timeout)),
            RecvTimeoutError::Disconnected => (Some(self.next), CollectiveCause::Closed),
        })
    }
}

impl Drop for Link {
    /// Lets the sender finish what the next rank still needs; its writes are bounded by the timeout.
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(sender) = self.sender.take() {
            // A panic of the sender has already been printed, and there is nobody left to tell.
            drop(sender.join());
        }
    }
}

/// The sending thread: writes what is queued until the ring is dropped or a write fails.
fn send_all(state: &State, queued: &Receiver<Piece>, freed: &SyncSender<Piece>, next: usize, timeout: Duration) {
    let Some(Neighbours { next: stream, .. }) = &state.neighbours else { return };
    let mut stream = stream;
    for piece in queued {
        if let Err(error) = stream.write_all(&piece.bytes[..piece.len_bytes]) {
            state.fail((Some(next), cause_of(&error, timeout)));
            return;
        }
        if freed.send(piece).is_err() {
            return;
        }
    }
}

fn timed_out(timeout: Duration) -> CollectiveCause {
    CollectiveCause::TimedOut { timeout_ms: timeout.as_millis() as u64, note: String::new() }
}

fn cause_of(error: &io::Error, timeout: Duration) -> CollectiveCause {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::WouldBlock | Kind::TimedOut => timed_out(timeout),
        Kind::UnexpectedEof | Kind::BrokenPipe | Kind::ConnectionReset | Kind::ConnectionAborted | Kind::NotConnected => {
            CollectiveCause::Closed
        }
        _ => CollectiveCause::Io(error.to_string()),
    }
}
