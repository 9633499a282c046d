//! The two connections of a rank, and the loop that sends to the next rank while it receives from the previous one.
//!
//! One thread does both, without waiting in either call: it writes what the kernel takes, reads what the kernel has, and waits only when neither
//! moves. Values go from the vector straight to the kernel and back; only what is to be added passes a small buffer, which stays in the cache.
//! Whoever waits to send also receives, so a ring cannot block itself, whatever the kernel buffers.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::api::CollectiveCause;
use super::course::{BYTES_PER_ELEMENT, Course, Receive};
use super::handshake::{Fault, Identity, Neighbours};
use super::header::{HEADER_BYTES, Header};

/// What is read at a time to be added: large enough that the call does not count, small enough to stay in the first- and second-level caches.
const SCRATCH_BYTES: usize = 64 * 1024;
/// Turns in which nothing moved before the thread waits in the kernel, each of which gives the core away. A piece of the neighbour's is often only
/// microseconds away, and waking a thread takes longer than that.
const IDLE_TURNS_MAX: u32 = 16;

#[cfg(not(target_endian = "little"))]
compile_error!("values are sent as they lie in memory, and the wire is little-endian");

/// What a ring shares with its abort handles.
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

/// The working end of a ring of two or more.
pub struct Link {
    state: Arc<State>,
    next: usize,
    previous: usize,
    timeout: Duration,
    scratch: Box<[u8]>,
}

impl Link {
    /// Makes the connections ready. `None` without neighbours.
    pub fn start(state: &Arc<State>, identity: &Identity, timeout: Duration) -> io::Result<Option<Self>> {
        let Some(Neighbours { next, previous }) = &state.neighbours else { return Ok(None) };
        next.set_nonblocking(true)?;
        previous.set_nonblocking(true)?;
        let (next, previous) = (identity.next(), identity.previous());
        Ok(Some(Self { state: Arc::clone(state), next, previous, timeout, scratch: vec![0; SCRATCH_BYTES].into_boxed_slice() }))
    }

    /// Does everything of one operation with `data`. Returns when all is received, and all that is to be sent is in the kernel's hands.
    pub fn run(&mut self, course: Course<impl Iterator<Item = Receive>>, data: &mut [u8]) -> Result<(), Fault> {
        let Some(neighbours) = &self.state.neighbours else { return Err((None, CollectiveCause::Closed)) };
        let (next, previous) = (Some(self.next), Some(self.previous));
        let mut exchange = Exchange::new(course, neighbours, &mut self.scratch);
        let mut idle_turns = 0;
        while !exchange.is_done() {
            let has_sent = exchange.send_some(data).map_err(|error| (next, cause_of(&error)))?;
            let has_received = exchange.receive_some(data).map_err(|cause| (previous, cause))?;
            if has_sent || has_received {
                idle_turns = 0;
            } else if idle_turns < IDLE_TURNS_MAX {
                idle_turns += 1;
                thread::yield_now();
            } else {
                let peer = if exchange.awaits_arrival() { previous } else { next };
                let is_ready = exchange.wait(self.timeout).map_err(|error| (peer, cause_of(&error)))?;
                if !is_ready {
                    return Err((peer, CollectiveCause::TimedOut { timeout_ms: self.timeout.as_millis() as u64, note: String::new() }));
                }
            }
        }
        Ok(())
    }
}

/// How far one operation is.
struct Exchange<'a, R> {
    neighbours: &'a Neighbours,
    header: Header,
    /// What is sent before everything else, and how much of it is sent.
    announcement: [u8; HEADER_BYTES],
    announced: usize,
    queue: VecDeque<Range<usize>>,
    /// What the previous rank announces, while that is incomplete.
    awaits_header: bool,
    received_header: [u8; HEADER_BYTES],
    arrivals: R,
    arriving: Option<Receive>,
    /// Bytes of the header, or of what is arriving, that are in place.
    filled: usize,
    scratch: &'a mut [u8],
    /// Bytes at the start of the scratch that are less than a value.
    carried: usize,
}

impl<'a, R: Iterator<Item = Receive>> Exchange<'a, R> {
    fn new(course: Course<R>, neighbours: &'a Neighbours, scratch: &'a mut [u8]) -> Self {
        let Course { header, sends, receives, mut first_sends, mut arrivals } = course;
        first_sends.retain(|range| !range.is_empty());
        let arriving = arrivals.next();
        Self {
            neighbours,
            header,
            announcement: header.to_bytes(),
            announced: if sends { 0 } else { HEADER_BYTES },
            queue: first_sends,
            awaits_header: receives,
            received_header: [0; HEADER_BYTES],
            arrivals,
            arriving,
            filled: 0,
            scratch,
            carried: 0,
        }
    }

    fn is_done(&self) -> bool {
        !self.awaits_arrival() && !self.has_to_send()
    }

    fn awaits_arrival(&self) -> bool {
        self.awaits_header || self.arriving.is_some()
    }

    fn has_to_send(&self) -> bool {
        self.announced < HEADER_BYTES || !self.queue.is_empty()
    }

    /// Sends as much as one call takes; whether that was anything.
    fn send_some(&mut self, data: &[u8]) -> io::Result<bool> {
        let unsent = if self.announced < HEADER_BYTES {
            &self.announcement[self.announced..]
        } else if let Some(range) = self.queue.front() {
            &data[range.clone()]
        } else {
            return Ok(false);
        };
        let mut stream = &self.neighbours.next;
        let Some(count) = unless_blocked(stream.write(unsent))? else { return Ok(false) };
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        if self.announced < HEADER_BYTES {
            self.announced += count;
        } else if let Some(range) = self.queue.front_mut() {
            range.start += count;
            if range.start == range.end {
                self.queue.pop_front();
            }
        }
        Ok(true)
    }

    /// Receives as much as one call gives; whether that was anything.
    fn receive_some(&mut self, data: &mut [u8]) -> Result<bool, CollectiveCause> {
        let count = if self.awaits_header { self.receive_header()? } else { self.receive_values(data)? };
        // An empty piece is complete without a byte, and so is the end of a full one.
        while !self.awaits_header && self.arriving.as_ref().is_some_and(|arriving| self.filled == arriving.range.len()) {
            let then_send = self.arriving.take().and_then(|arriving| arriving.then_send);
            self.queue.extend(then_send.filter(|range| !range.is_empty()));
            self.arriving = self.arrivals.next();
            self.filled = 0;
        }
        Ok(count > 0)
    }

    fn receive_header(&mut self) -> Result<usize, CollectiveCause> {
        let count = read_from(self.neighbours, &mut self.received_header[self.filled..])?;
        self.filled += count;
        if self.filled == HEADER_BYTES {
            self.header.check(&self.received_header)?;
            self.awaits_header = false;
            self.filled = 0;
        }
        Ok(count)
    }

    fn receive_values(&mut self, data: &mut [u8]) -> Result<usize, CollectiveCause> {
        let Some(Receive { range, is_added, .. }) = &self.arriving else { return Ok(0) };
        let rest = &mut data[range.start + self.filled..range.end];
        if !is_added {
            let count = read_from(self.neighbours, rest)?;
            self.filled += count;
            return Ok(count);
        }
        let limit = self.scratch.len().min(rest.len());
        let count = read_from(self.neighbours, &mut self.scratch[self.carried..limit])?;
        let available = self.carried + count;
        let whole = available - available % BYTES_PER_ELEMENT;
        add(&mut rest[..whole], &self.scratch[..whole]);
        self.scratch.copy_within(whole..available, 0);
        self.carried = available - whole;
        self.filled += whole;
        Ok(count)
    }

    /// Waits until something can be received or, where there is something to send, sent; false when nothing happened for `timeout`.
    fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let started = Instant::now();
        let Neighbours { next, previous } = self.neighbours;
        loop {
            let remaining = timeout.saturating_sub(started.elapsed());
            if remaining.is_zero() {
                return Ok(false);
            }
            let limit = Timespec::try_from(remaining).map_err(io::Error::other)?;
            let mut both = [PollFd::new(previous, PollFlags::IN), PollFd::new(next, PollFlags::OUT)];
            // A connection that nothing is wanted from is left out: its end is no news, and would end the wait at once.
            let wanted = match (self.awaits_arrival(), self.has_to_send()) {
                (true, true) => &mut both[..],
                (true, false) => &mut both[..1],
                (false, _) => &mut both[1..],
            };
            match poll(wanted, Some(&limit)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Reads what is there, at most as much as `bytes` holds; 0 when nothing is there now.
fn read_from(neighbours: &Neighbours, bytes: &mut [u8]) -> Result<usize, CollectiveCause> {
    if bytes.is_empty() {
        return Ok(0);
    }
    let mut stream = &neighbours.previous;
    match unless_blocked(stream.read(bytes)) {
        Ok(Some(0)) => Err(CollectiveCause::Closed),
        Ok(count) => Ok(count.unwrap_or(0)),
        Err(error) => Err(cause_of(&error)),
    }
}

/// `None` when the call would have had to wait, or was interrupted.
fn unless_blocked(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Adds values to others, each as bytes. The order of the two operands makes no difference to a sum.
fn add(values: &mut [u8], arrived: &[u8]) {
    let (values, _) = values.as_chunks_mut::<BYTES_PER_ELEMENT>();
    let (arrived, _) = arrived.as_chunks::<BYTES_PER_ELEMENT>();
    for (value, other) in values.iter_mut().zip(arrived) {
        *value = (f32::from_le_bytes(*other) + f32::from_le_bytes(*value)).to_le_bytes();
    }
}

fn cause_of(error: &io::Error) -> CollectiveCause {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::WriteZero | Kind::UnexpectedEof | Kind::BrokenPipe | Kind::ConnectionReset | Kind::ConnectionAborted | Kind::NotConnected => {
            CollectiveCause::Closed
        }
        _ => CollectiveCause::Io(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::super::api::Operation;
    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ours, listener.accept().unwrap().0)
    }

    /// A link of rank 0 in a world of 3, and the other ends of its two connections: what it sends to, and what it receives from.
    fn link(timeout: Duration) -> (Link, TcpStream, TcpStream) {
        let ((next, sink), (previous, source)) = (pair(), pair());
        let state = Arc::new(State::new(Some(Neighbours { next, previous })));
        let identity = Identity::new(0, 3, 1, "key");
        (Link::start(&state, &identity, timeout).unwrap().unwrap(), sink, source)
    }

    fn course(arrivals: Vec<Receive>) -> Course<std::vec::IntoIter<Receive>> {
        let header = Header { operation: Operation::AllReduce, root: 0, sequence: 0, len: 2 };
        Course { header, sends: false, receives: true, first_sends: VecDeque::new(), arrivals: arrivals.into_iter() }
    }

    #[test]
    fn values_that_arrive_in_odd_parts_are_added_whole_and_sent_on() {
        let (mut link, mut sink, mut source) = link(Duration::from_secs(20));
        let arrivals = vec![
            Receive { range: 0..0, is_added: true, then_send: Some(0..0) },
            Receive { range: 0..8, is_added: true, then_send: Some(0..8) },
            Receive { range: 8..10, is_added: false, then_send: None },
        ];
        let course = course(arrivals);
        let mut wire = course.header.to_bytes().to_vec();
        wire.extend(2.5_f32.to_le_bytes().into_iter().chain(4.0_f32.to_le_bytes()).chain([7, 9]));
        let writer = thread::spawn(move || {
            source.set_nodelay(true).unwrap();
            for part in wire.chunks(3) {
                source.write_all(part).unwrap();
                thread::yield_now();
            }
            source
        });
        let mut data: Vec<u8> = [1.0_f32, -1.0].into_iter().flat_map(f32::to_le_bytes).chain([0, 0]).collect();
        link.run(course, &mut data).unwrap();
        let expected: Vec<u8> = [3.5_f32, 3.0].into_iter().flat_map(f32::to_le_bytes).chain([7, 9]).collect();
        assert_eq!(data, expected);
        let mut passed_on = [0; 8];
        sink.read_exact(&mut passed_on).unwrap();
        assert_eq!(passed_on, expected[..8]);
        writer.join().unwrap();
    }

    #[test]
    fn the_rank_that_does_not_move_is_named() {
        let timeout = Duration::from_millis(50);
        let (mut receiving, _sink, _source) = link(timeout);
        let late = CollectiveCause::TimedOut { timeout_ms: 50, note: String::new() };
        let result = receiving.run(course(vec![Receive { range: 0..8, is_added: true, then_send: None }]), &mut [0; 8]);
        assert_eq!(result, Err((Some(2), late.clone())));

        // More than all kernel buffers take, and nobody reads it.
        let mut data = vec![0_u8; 256 << 20];
        let (mut sending, _sink, _source) = link(timeout);
        let first_sends = VecDeque::from([Range { start: 0, end: data.len() }]);
        let course = Course { sends: true, receives: false, first_sends, ..course(vec![]) };
        assert_eq!(sending.run(course, &mut data), Err((Some(1), late)));
    }

    #[test]
    fn a_closed_connection_is_told_apart_from_a_slow_one() {
        let (mut link, _sink, source) = link(Duration::from_secs(20));
        drop(source);
        let result = link.run(course(vec![Receive { range: 0..8, is_added: true, then_send: None }]), &mut [0; 8]);
        assert_eq!(result, Err((Some(2), CollectiveCause::Closed)));
    }
}
