//! The ring over TCP: works on any machine, moves each value twice per rank, and needs no memory beyond a few pieces.
//!
//! A piece travels as the bytes of its values. A rank adds its own values into the received bytes where they lie and hands
//! the same buffer to its sending thread, so that receiving, adding and sending overlap and nothing is copied in between.
//! Every received piece causes exactly one piece to be sent: the same one, or, when its journey ends here, the first of a
//! later window. Only a header and `PIPELINE_DEPTH_WINDOWS` pieces more are therefore handed to the sender than have been
//! received; there are more buffers than that, so some rank can always receive, and the ring cannot block itself at any size.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::api::{AbortHandle, Collective, CollectiveCause, CollectiveError, Operation};
use super::handshake::{Attempt, Fault, Identity, Neighbours, join_ring};
use super::layout::{Layout, PIPELINE_DEPTH_WINDOWS};
use super::link::{BYTES_PER_ELEMENT, Link, PIECE_BYTES, State};

/// Operation, root, sequence number, length.
const HEADER_BYTES: usize = 4 + 4 + 8 + 8;

/// What a rank needs to take its place in a ring.
pub struct RingOptions {
    /// Where the previous rank connects to; bound before the address was announced.
    pub listener: TcpListener,
    /// This rank.
    pub rank: usize,
    /// `host:port` of every rank's listener, by rank; their number is the world size.
    pub peers: Vec<String>,
    /// Secret of the generation; never sent.
    pub key: String,
    /// The generation that the ring belongs to.
    pub generation: u64,
    /// Longest time to form the ring, and later the longest time without any progress.
    pub timeout: Duration,
    /// Set it to true to give up forming the ring. Afterwards the abort handle does that.
    pub interrupt: Arc<AtomicBool>,
}

/// A [`Collective`] over TCP connections between neighbours.
pub struct Ring {
    identity: Identity,
    step: u64,
    sequence: u64,
    state: Arc<State>,
    /// `None` in a world of one, where every operation is done before it begins.
    link: Option<Link>,
}

impl Ring {
    /// Connects to both neighbours, or returns why that failed within the timeout. A world of one needs no connection.
    pub fn connect(options: RingOptions) -> Result<Self, CollectiveError> {
        let RingOptions { listener, rank, peers, key, generation, timeout, interrupt } = options;
        let timeout = timeout.max(Duration::from_millis(1));
        let error = |(peer, cause): Fault| CollectiveError { operation: Operation::Connect, rank, peer, generation, step: 0, cause };
        if rank >= peers.len() {
            let text = format!("rank {rank} is not below the world size {}", peers.len());
            return Err(error((None, CollectiveCause::Mismatch(text))));
        }
        let identity = Identity::new(rank, peers.len(), generation, &key);
        let mut neighbours = None;
        if peers.len() > 1 {
            let attempt = Attempt::new(timeout, &interrupt);
            neighbours = Some(join_ring(&listener, &identity, &peers, &attempt).map_err(error)?);
        }
        Self::over(identity, neighbours, timeout).map_err(|cause| error((None, CollectiveCause::Io(cause.to_string()))))
    }

    /// The ring over ready connections.
    fn over(identity: Identity, neighbours: Option<Neighbours>, timeout: Duration) -> io::Result<Self> {
        let state = Arc::new(State::new(neighbours));
        let link = Link::start(&state, &identity, timeout)?;
        Ok(Self { identity, step: 0, sequence: 0, state, link })
    }

    /// Runs one operation and turns its fault into an error that names everything.
    fn run(&mut self, header: Header, body: impl FnOnce(&mut Link, &Identity) -> Result<(), Fault>) -> Result<(), CollectiveError> {
        self.sequence += 1;
        let result = match (self.state.fault(), &mut self.link) {
            (Some(fault), _) => Err(fault),
            (None, _) if header.root >= self.identity.world_size => {
                let text = format!("the root {} is not below the world size {}", header.root, self.identity.world_size);
                Err((None, CollectiveCause::Mismatch(text)))
            }
            (None, None) => Ok(()),
            (None, Some(link)) => body(link, &self.identity),
        };
        result.map_err(|fault| {
            let (peer, cause) = self.state.fail(fault);
            let Identity { rank, generation, .. } = self.identity;
            CollectiveError { operation: header.operation, rank, peer, generation, step: self.step, cause }
        })
    }

    /// The header of the operation that is about to begin.
    fn header(&self, operation: Operation, root: usize, len: usize) -> Header {
        Header { operation, root, sequence: self.sequence, len }
    }
}

impl Collective for Ring {
    fn rank(&self) -> usize {
        self.identity.rank
    }

    fn world_size(&self) -> usize {
        self.identity.world_size
    }

    fn set_step(&mut self, step: u64) {
        self.step = step;
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let header = self.header(Operation::AllReduce, 0, data.len());
        self.run(header, |link, identity| sum(link, identity, header, data))
    }

    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<(), CollectiveError> {
        let header = self.header(Operation::Broadcast, root, data.len());
        self.run(header, |link, identity| relay(link, identity, header, data))
    }

    /// A sum of one value: nobody has the result before everybody has added to it.
    fn barrier(&mut self) -> Result<(), CollectiveError> {
        let header = self.header(Operation::Barrier, 0, 1);
        self.run(header, |link, identity| sum(link, identity, header, &mut [0.0]))
    }

    fn abort_handle(&self) -> AbortHandle {
        let state = Arc::downgrade(&self.state);
        AbortHandle::new(move |reason| {
            if let Some(state) = state.upgrade() {
                state.fail((None, CollectiveCause::Aborted(reason.to_owned())));
            }
        })
    }
}

/// Both halves of the ring all-reduce, window by window; [`Layout`] says what a window is.
fn sum(link: &mut Link, identity: &Identity, header: Header, data: &mut [f32]) -> Result<(), Fault> {
    let (rank, world_size) = (identity.rank, identity.world_size);
    let layout = Layout::new(data.len(), world_size);
    let num_windows = layout.num_windows();
    send_header(link, header)?;
    for window in 0..num_windows.min(PIPELINE_DEPTH_WINDOWS) {
        send_values(link, &data[layout.piece(window, rank)])?;
    }
    expect_header(link, identity, header)?;
    // Piece c leaves rank c, so what arrives in step 0 is the previous rank's piece, then the one before, and so on.
    let num_steps = 2 * (world_size - 1);
    for block in (0..num_windows).step_by(PIPELINE_DEPTH_WINDOWS) {
        let windows = block..num_windows.min(block + PIPELINE_DEPTH_WINDOWS);
        for (step, window) in (0..num_steps).flat_map(|step| windows.clone().map(move |window| (step, window))) {
            let range = layout.piece(window, (rank + 2 * world_size - 1 - step) % world_size);
            let mut piece = link.receive(range.len() * BYTES_PER_ELEMENT)?;
            merge(step, world_size, &mut data[range], piece.used_mut());
            if step + 1 < num_steps {
                link.forward(piece)?;
                continue;
            }
            link.release(piece);
            let later = window + PIPELINE_DEPTH_WINDOWS;
            if later < num_windows {
                send_values(link, &data[layout.piece(later, rank)])?;
            }
        }
    }
    Ok(())
}

/// Sends the root's bytes once round the ring; the rank before the root keeps them.
fn relay(link: &mut Link, identity: &Identity, header: Header, data: &mut [u8]) -> Result<(), Fault> {
    if identity.rank == header.root {
        send_header(link, header)?;
        return data.chunks(PIECE_BYTES).try_for_each(|chunk| link.send(chunk.len(), |bytes| bytes.copy_from_slice(chunk)));
    }
    expect_header(link, identity, header)?;
    let is_last = identity.next() == header.root;
    if !is_last {
        send_header(link, header)?;
    }
    for chunk in data.chunks_mut(PIECE_BYTES) {
        let mut piece = link.receive(chunk.len())?;
        chunk.copy_from_slice(piece.used_mut());
        if is_last {
            link.release(piece);
        } else {
            link.forward(piece)?;
        }
    }
    Ok(())
}

fn send_header(link: &mut Link, header: Header) -> Result<(), Fault> {
    link.send(HEADER_BYTES, |bytes| bytes.copy_from_slice(&header.to_bytes()))
}

fn expect_header(link: &Link, identity: &Identity, expected: Header) -> Result<(), Fault> {
    let mut bytes = [0; HEADER_BYTES];
    link.read(&mut bytes)?;
    if bytes == expected.to_bytes() {
        return Ok(());
    }
    let text = format!("this rank is in {expected}, the previous one in {}", describe(&bytes));
    Err((Some(identity.previous()), CollectiveCause::Mismatch(text)))
}

fn send_values(link: &mut Link, values: &[f32]) -> Result<(), Fault> {
    link.send(values.len() * BYTES_PER_ELEMENT, |bytes| {
        let (elements, _) = bytes.as_chunks_mut::<BYTES_PER_ELEMENT>();
        for (element, value) in elements.iter_mut().zip(values) {
            *element = value.to_le_bytes();
        }
    })
}

/// What a rank does with the piece that arrives in `step`: add, complete the sum, or take the finished sum over.
fn merge(step: usize, world_size: usize, values: &mut [f32], bytes: &mut [u8]) {
    let (elements, _) = bytes.as_chunks_mut::<BYTES_PER_ELEMENT>();
    let completing_step = world_size - 2;
    if step < completing_step {
        for (element, value) in elements.iter_mut().zip(values) {
            *element = (f32::from_le_bytes(*element) + *value).to_le_bytes();
        }
    } else if step == completing_step {
        for (element, value) in elements.iter_mut().zip(values) {
            *value += f32::from_le_bytes(*element);
            *element = value.to_le_bytes();
        }
    } else {
        for (element, value) in elements.iter().zip(values) {
            *value = f32::from_le_bytes(*element);
        }
    }
}

/// Announces an operation to the next rank, so that ranks that are not in the same one notice before they mix values.
#[derive(Clone, Copy)]
struct Header {
    operation: Operation,
    root: usize,
    sequence: u64,
    len: usize,
}

impl Header {
    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&(self.operation as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&(self.root as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..].copy_from_slice(&(self.len as u64).to_le_bytes());
        bytes
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&describe(&self.to_bytes()))
    }
}

/// A header in words; it may come from a peer and hold anything.
fn describe(bytes: &[u8; HEADER_BYTES]) -> String {
    let number = |range: Range<usize>| bytes[range].iter().rev().fold(0u64, |value, byte| (value << 8) | u64::from(*byte));
    let operations = [Operation::AllReduce, Operation::Broadcast, Operation::Barrier];
    let operation = operations.into_iter().find(|operation| *operation as u64 == number(0..4));
    let name = operation.map_or_else(|| format!("unknown kind {}", number(0..4)), |operation| operation.to_string());
    format!("operation {} ({name}, length {}, root {})", number(8..16), number(16..24), number(4..8))
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::Ordering;
    use std::thread;
    use std::time::Instant;

    use super::super::conformance::{conformance, on_all, sample};
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    fn listeners(world_size: usize) -> (Vec<TcpListener>, Vec<String>) {
        let listeners: Vec<_> = (0..world_size).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let peers = listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect();
        (listeners, peers)
    }

    fn options(listener: &TcpListener, rank: usize, peers: &[String]) -> RingOptions {
        RingOptions {
            listener: listener.try_clone().unwrap(),
            rank,
            peers: peers.to_vec(),
            key: "key".to_owned(),
            generation: 3,
            timeout: TIMEOUT,
            interrupt: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Connects all ranks at once; `change` sees the options of each rank first.
    fn connect(world_size: usize, change: impl Fn(&mut RingOptions)) -> Vec<Result<Ring, CollectiveError>> {
        let (listeners, peers) = listeners(world_size);
        let start = |(rank, listener): (usize, &TcpListener)| {
            let mut options = options(listener, rank, &peers);
            change(&mut options);
            thread::spawn(move || Ring::connect(options))
        };
        let threads: Vec<_> = listeners.iter().enumerate().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    }

    fn rings(world_size: usize) -> Vec<Box<dyn Collective>> {
        connect(world_size, |_| {}).into_iter().map(|ring| Box::new(ring.unwrap()) as Box<dyn Collective>).collect()
    }

    /// Rings whose operations give up after `timeout`.
    pub(in crate::collective) fn rings_with_timeout(world_size: usize, timeout: Duration) -> Vec<Box<dyn Collective>> {
        let rings = connect(world_size, |options| options.timeout = timeout);
        rings.into_iter().map(|ring| Box::new(ring.unwrap()) as Box<dyn Collective>).collect()
    }

    #[test]
    fn conforms() {
        conformance(rings);
    }

    #[test]
    fn sums_in_ring_order() {
        for (world_size, len) in [(2, 7), (3, 1000), (4, 100_003), (5, 1_000_003)] {
            let inputs: Vec<Vec<f32>> = (0..world_size).map(|rank| sample(rank, len)).collect();
            let layout = Layout::new(len, world_size);
            let mut expected = vec![0f32; len];
            for (window, start) in (0..layout.num_windows()).flat_map(|window| (0..world_size).map(move |start| (window, start))) {
                for index in layout.piece(window, start) {
                    let first = inputs[start][index];
                    expected[index] = (1..world_size).fold(first, |sum, hop| sum + inputs[(start + hop) % world_size][index]);
                }
            }
            let sums = on_all(&mut rings(world_size), |collective| {
                let mut data = sample(collective.rank(), len);
                collective.all_reduce_sum(&mut data).map(|()| data)
            });
            for sum in sums {
                assert!(sum.unwrap().iter().map(|value| value.to_bits()).eq(expected.iter().map(|value| value.to_bits())));
            }
        }
    }

    #[test]
    fn another_key_is_refused_by_name() {
        let results = connect(2, |options| {
            options.key = format!("key of {}", options.rank);
            options.timeout = Duration::from_secs(2);
        });
        let errors: Vec<CollectiveError> = results.into_iter().map(|result| result.err().unwrap()).collect();
        for (rank, error) in errors.iter().enumerate() {
            assert_eq!(error.peer, Some(1 - rank));
            assert!(error.to_string().contains("the key of the generation is wrong"), "{error}");
        }
        // The rank that is refused first leaves, and the other may then wait for it in vain.
        assert!(errors.iter().any(|error| matches!(error.cause, CollectiveCause::Refused(_))));
    }

    #[test]
    fn another_generation_never_joins() {
        let results = connect(2, |options| {
            options.generation += options.rank as u64;
            options.timeout = Duration::from_millis(400);
        });
        assert!(results.iter().all(Result::is_err));
        let error = results[0].as_ref().err().unwrap();
        assert_eq!((error.peer, error.cause.clone()), (Some(1), CollectiveCause::Refused("it is in another generation".to_owned())));
    }

    #[test]
    fn a_peer_that_is_still_in_an_older_generation_is_waited_for() {
        let (listeners, peers) = listeners(2);
        let newer = |rank: usize| RingOptions { generation: 4, ..options(&listeners[rank], rank, &peers) };
        let older = options(&listeners[0], 0, &peers);
        let ahead = newer(1);
        let ahead = thread::spawn(move || Ring::connect(ahead));
        assert!(Ring::connect(older).is_err());
        assert!(Ring::connect(newer(0)).is_ok());
        assert!(ahead.join().unwrap().is_ok());
    }

    #[test]
    fn connecting_is_bounded_and_can_be_interrupted() {
        let (listeners, peers) = listeners(2);
        let started = Instant::now();
        let alone = RingOptions { timeout: Duration::from_millis(200), ..options(&listeners[0], 0, &peers) };
        let error = Ring::connect(alone).err().unwrap();
        assert!(matches!(error.cause, CollectiveCause::TimedOut { timeout_ms: 200, .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(5));

        let alone = options(&listeners[0], 0, &peers);
        let interrupt = Arc::clone(&alone.interrupt);
        let waiting = thread::spawn(move || Ring::connect(alone));
        thread::sleep(Duration::from_millis(50));
        interrupt.store(true, Ordering::SeqCst);
        let error = waiting.join().unwrap().err().unwrap();
        assert!(matches!(error.cause, CollectiveCause::Aborted(_)), "{error}");
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_stranger_on_the_listener_does_no_harm() {
        let (listeners, peers) = listeners(2);
        drop(std::net::TcpStream::connect(&peers[0]).unwrap());
        let first = options(&listeners[0], 0, &peers);
        let second = options(&listeners[1], 1, &peers);
        let first = thread::spawn(move || Ring::connect(first));
        assert!(Ring::connect(second).is_ok());
        assert!(first.join().unwrap().is_ok());
    }

    #[test]
    fn a_silent_peer_is_named_after_the_timeout() {
        let rings = connect(3, |options| options.timeout = Duration::from_millis(300));
        let mut rings: Vec<Ring> = rings.into_iter().map(Result::unwrap).collect();
        let silent = rings.pop();
        let started = Instant::now();
        rings[0].set_step(12);
        let error = rings[0].barrier().unwrap_err();
        assert!(started.elapsed() >= Duration::from_millis(250) && started.elapsed() < Duration::from_secs(5));
        assert_eq!((error.peer, error.step, error.generation), (Some(2), 12, 3));
        assert!(matches!(error.cause, CollectiveCause::TimedOut { timeout_ms: 300, .. }), "{error}");
        assert_eq!(rings[0].barrier().unwrap_err(), error);
        drop(silent);
    }

    #[test]
    fn ranks_that_disagree_notice() {
        let results = on_all(&mut rings(2), |collective| match collective.rank() {
            0 => collective.all_reduce_sum(&mut [0.0; 8]),
            _ => collective.broadcast(&mut [0; 8], 0),
        });
        assert!(results.iter().all(Result::is_err));
        let mismatch = |error: &CollectiveError| matches!(&error.cause, CollectiveCause::Mismatch(text) if text.contains("length 8"));
        assert!(results.iter().any(|result| result.as_ref().is_err_and(mismatch)), "{results:?}");
    }
}
