//! The ring over TCP: works between any machines, moves each value of a sum twice per rank, and needs no memory beyond a small buffer.
//!
//! What travels when is in `course.rs`, the loop that does it in `link.rs`. A sum is made where the values lie: a rank adds what arrives to its own
//! values in place and sends the result on from there.

use std::io;
use std::net::TcpListener;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use zerocopy::IntoBytes;

use super::api::{AbortHandle, Collective, CollectiveCause, CollectiveError, Operation, WaitObserver, Waiting};
use super::course::{Turn, relay};
use super::handshake::{Attempt, Fault, Identity, Neighbours, join_ring};
use super::header::Header;
use super::layout::{share_before, share_of};
use super::link::{Link, State};

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
    observer: Option<WaitObserver>,
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
        Ok(Self { identity, step: 0, sequence: 0, state, link, observer: None })
    }

    /// Runs one operation and turns its fault into an error that names everything.
    fn run(&mut self, header: Header, body: impl FnOnce(&mut Link, &Identity) -> Result<(), Fault>) -> Result<(), CollectiveError> {
        self.sequence += 1;
        let result = match (self.state.fault(), &mut self.link) {
            (Some(fault), _) => Err(fault),
            (None, _) if header.root >= self.identity.world_size => {
                let text = format!("the root or distance {} is not below the world size {}", header.root, self.identity.world_size);
                Err((None, CollectiveCause::Mismatch(text)))
            }
            (None, None) => {
                // Nothing blocks in a world of one, but whoever watches sees that the worker gets on.
                drop(Waiting::begin(self.observer.as_ref()));
                Ok(())
            }
            (None, Some(link)) => {
                let _waiting = Waiting::begin(self.observer.as_ref());
                body(link, &self.identity)
            }
        };
        result.map_err(|fault| {
            let (peer, cause) = self.state.fail(fault);
            CollectiveError { peer, ..self.error(header.operation, cause) }
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
        self.run(header, |link, identity| {
            let turn = Turn::all_reduce(data.len(), identity.world_size, identity.rank);
            link.run(turn.course(header), data.as_mut_bytes())
        })
    }

    fn reduce_scatter_sum(&mut self, data: &mut [f32]) -> Result<Range<usize>, CollectiveError> {
        let header = self.header(Operation::ReduceScatter, 0, data.len());
        self.run(header, |link, identity| {
            let turn = Turn::reduce_scatter(data.len(), identity.world_size, identity.rank);
            link.run(turn.course(header), data.as_mut_bytes())
        })?;
        Ok(share_of(data.len(), self.identity.world_size, self.identity.rank))
    }

    fn all_gather(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let header = self.header(Operation::AllGather, 0, data.len());
        self.run(header, |link, identity| {
            let turn = Turn::all_gather(data.len(), identity.world_size, identity.rank);
            link.run(turn.course(header), data.as_mut_bytes())
        })
    }

    fn gather_share(&mut self, data: &mut [f32], distance: usize) -> Result<Range<usize>, CollectiveError> {
        let header = self.header(Operation::GatherShare, distance, data.len());
        self.run(header, |link, identity| {
            // A share that goes nowhere is there already.
            if distance == 0 {
                return Ok(());
            }
            let turn = Turn::gather_share(data.len(), identity.world_size, identity.rank, distance);
            link.run(turn.course(header), data.as_mut_bytes())
        })?;
        Ok(share_before(data.len(), self.identity.world_size, self.identity.rank, distance))
    }

    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<(), CollectiveError> {
        let header = self.header(Operation::Broadcast, root, data.len());
        self.run(header, |link, identity| link.run(relay(header, identity.world_size, identity.rank), data))
    }

    /// A sum of one value: nobody has the result before everybody has added to it.
    fn barrier(&mut self) -> Result<(), CollectiveError> {
        let header = self.header(Operation::Barrier, 0, 1);
        self.run(header, |link, identity| {
            let turn = Turn::all_reduce(1, identity.world_size, identity.rank);
            link.run(turn.course(header), [0.0_f32].as_mut_bytes())
        })
    }

    fn abort_handle(&self) -> AbortHandle {
        let state = Arc::downgrade(&self.state);
        AbortHandle::new(move |reason| {
            if let Some(state) = state.upgrade() {
                state.fail((None, CollectiveCause::Aborted(reason.to_owned())));
            }
        })
    }

    fn set_wait_observer(&mut self, observer: WaitObserver) {
        self.observer = Some(observer);
    }

    fn error(&self, operation: Operation, cause: CollectiveCause) -> CollectiveError {
        let Identity { rank, generation, .. } = self.identity;
        CollectiveError { operation, rank, peer: None, generation, step: self.step, cause }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::Ordering;
    use std::thread;
    use std::time::Instant;

    use super::super::api::DeviceFloats;
    use super::super::conformance::{conformance, on_all, sample};
    use super::super::layout::Layout;
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
        rings_with_timeout(world_size, TIMEOUT)
    }

    /// Rings whose operations give up after `timeout`.
    pub(in crate::collective) fn rings_with_timeout(world_size: usize, timeout: Duration) -> Vec<Box<dyn Collective>> {
        let rings = connect(world_size, |options| options.timeout = timeout);
        rings.into_iter().map(|ring| Box::new(ring.unwrap()) as Box<dyn Collective>).collect()
    }

    #[test]
    fn conforms() {
        conformance(rings_with_timeout);
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
    fn shares_are_summed_in_ring_order() {
        for (world_size, len) in [(2, 7), (3, 1000), (4, 100_003)] {
            let inputs: Vec<Vec<f32>> = (0..world_size).map(|rank| sample(rank, len)).collect();
            // The sum of a share ends at its rank, so it begins at the rank after.
            let expected = |rank: usize, index: usize| {
                let first = inputs[(rank + 1) % world_size][index];
                (2..=world_size).fold(first, |sum, hop| sum + inputs[(rank + hop) % world_size][index])
            };
            on_all(&mut rings(world_size), |collective| {
                let mut data = sample(collective.rank(), len);
                let share = collective.reduce_scatter_sum(&mut data).unwrap();
                assert_eq!(share, share_of(len, world_size, collective.rank()));
                for index in share {
                    assert_eq!(data[index].to_bits(), expected(collective.rank(), index).to_bits(), "index {index}");
                }
            });
        }
    }

    #[test]
    fn device_memory_is_refused_with_everything_in_the_error() {
        let mut ring = connect(1, |_| {}).remove(0).unwrap();
        ring.set_step(8);
        assert!(!ring.works_on_device());
        let error = ring.all_gather_on_device(DeviceFloats { address: 0xab, len: 3, device: 0 }).unwrap_err();
        assert_eq!((error.operation, error.generation, error.step), (Operation::AllGather, 3, 8));
        assert_eq!(error.cause, CollectiveCause::HostOnly { address: 0xab });
        assert!(ring.join_device().is_err());
        assert!(ring.barrier().is_ok(), "a refusal is no fault of the group");
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
