//! NCCL for values in GPU memory; everything in host memory goes over the ring that the group has formed first.
//!
//! A thin communicator over NCCL's own functions. It is created without blocking, every wait looks at the clock, and a watchdog thread aborts it after
//! a fault: NCCL itself notices neither a silent peer nor an abort elsewhere. Only that thread ever ends the communicator, so that nobody else waits
//! for the end. An operation is queued on a stream of its own, behind an event of the compute stream, and the caller goes on computing;
//! [`Collective::join_device`] then waits on the host, because an update that is already queued behind a broken sum could not be taken back.
//!
//! | Thread | On an error | On a stop |
//! | --- | --- | --- |
//! | `nccl-watchdog` | keeps the fault, cuts the ring, aborts the communicator, ends | aborts the communicator, ends |

mod device;
mod functions;
mod library;

use std::collections::VecDeque;
use std::ffi::c_int;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use device::{DeviceContext, Event};
use library::{Call, Communicator, Status, UNIQUE_ID_BYTES, libraries, unique_id};

use super::api::{AbortHandle, Collective, CollectiveCause, CollectiveError, DeviceFloats, Operation, WaitObserver, Waiting};
use super::layout::{share_before, share_of};
use super::local::Ring;

/// Pause between two looks at NCCL or an event while a caller waits. Neither offers a wait with a limit, and a step should not wait long for its end.
const WAIT_POLL_US: u64 = 50;
/// Pause between two looks of the watchdog while operations are under way.
const WATCH_POLL_MS: u64 = 10;

/// What a rank needs for a group whose devices talk to each other.
pub struct NcclOptions {
    /// The formed ring of the same group: it gives rank, world size and generation, carries NCCL's identifier and all host memory.
    pub ring: Ring,
    /// Index of this rank's device.
    pub device: usize,
    /// The stream on which the values are computed, as the runtime hands it out; 0 is the device's default stream, where libtorch computes.
    pub compute_stream: u64,
    /// Longest time to form the group, and later the longest time without any progress.
    pub timeout: Duration,
    /// Set it to true to give up forming the group. Afterwards the abort handle does that.
    pub interrupt: Arc<AtomicBool>,
}

/// A [`Collective`] whose operations on device memory are NCCL's.
pub struct Nccl {
    ring: Ring,
    shared: Arc<Shared>,
    watchdog: Option<JoinHandle<()>>,
    observer: Option<WaitObserver>,
    step: u64,
}

impl Nccl {
    /// Forms the group within the timeout. Fails on every rank when it fails on one, because that one's ring closes.
    pub fn connect(options: NcclOptions) -> Result<Self, CollectiveError> {
        let NcclOptions { mut ring, device, compute_stream, timeout, interrupt } = options;
        let (rank, world_size) = (ring.rank(), ring.world_size());
        let prepared = libraries().and_then(|libraries| {
            let context = DeviceContext::open(libraries, device, compute_stream)?;
            let id = if rank == 0 { unique_id(libraries)? } else { [0; UNIQUE_ID_BYTES] };
            Ok((libraries, context, id))
        });
        let (libraries, context, mut id) = prepared.map_err(|cause| ring.error(Operation::Connect, cause))?;
        ring.broadcast(&mut id, 0)?;
        let shared = Arc::new(Shared {
            watch: Mutex::new(Watch::default()),
            news: Condvar::new(),
            communicator: Mutex::new(Communicator::new(libraries)),
            ring: ring.abort_handle(),
            timeout,
            context,
        });
        let watched = Arc::clone(&shared);
        let watchdog = thread::Builder::new().name("nccl-watchdog".to_owned()).spawn(move || watched.watch_over());
        let watchdog = watchdog.map_err(|error| ring.error(Operation::Connect, CollectiveCause::Io(error.to_string())))?;
        // From here on dropping this ends the communicator, however far it is.
        let group = Self { ring, shared, watchdog: Some(watchdog), observer: None, step: 0 };
        let formed = group.shared.begin(rank, world_size, id).and_then(|()| group.shared.settle(Some(&interrupt)));
        formed.map_err(|cause| group.failed(Operation::Connect, cause))?;
        Ok(group)
    }

    /// Keeps the group's first fault, and returns it as an error. `operation` is what this rank is in.
    fn failed(&self, operation: Operation, cause: CollectiveCause) -> CollectiveError {
        let fault = self.shared.fail(Fault { operation: Some(operation), peer: None, cause });
        self.error_of(operation, fault)
    }

    fn error_of(&self, operation: Operation, fault: Fault) -> CollectiveError {
        CollectiveError { peer: fault.peer, ..self.error(fault.operation.unwrap_or(operation), fault.cause) }
    }

    /// Fails with the first fault of the group, where there is one.
    fn check(&self, operation: Operation) -> Result<(), CollectiveError> {
        self.shared.fault().map_or(Ok(()), |fault| Err(self.error_of(operation, fault)))
    }

    /// An operation in host memory. Its error ends the whole group.
    fn on_host<T>(
        &mut self,
        operation: Operation,
        work: impl FnOnce(&mut Ring) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        self.check(operation)?;
        work(&mut self.ring).map_err(|error| {
            // A fault of the devices has cut the ring, and is then the cause.
            let fault = self.shared.fail(Fault { operation: Some(operation), peer: error.peer, cause: error.cause });
            self.error_of(operation, fault)
        })
    }

    /// Queues one operation: behind what is computed so far, between two events that tell when it runs and when it is done.
    fn queue(&self, operation: Operation, data: DeviceFloats, issue: impl Fn(&Call) -> Status) -> Result<(), CollectiveError> {
        self.check(operation)?;
        let context = &self.shared.context;
        if data.device != context.index {
            let text = format!("values on device {} were given to the group of device {}", data.device, context.index);
            return Err(self.failed(operation, CollectiveCause::Mismatch(text)));
        }
        if data.len == 0 {
            return Ok(());
        }
        let queued = context.enter().and_then(|()| {
            let computed = context.record(context.compute)?;
            context.wait(context.stream, &computed)?;
            let started = context.record(context.stream)?;
            self.shared.lock().is_issued = true;
            self.shared.lock_communicator().issue(data.address, context.stream, issue)?;
            self.shared.settle(None)?;
            let ended = context.record(context.stream)?;
            Ok(Queued { operation, started, ended })
        });
        let queued = queued.map_err(|cause| self.failed(operation, cause))?;
        self.shared.lock().queue.push_back(queued);
        self.shared.news.notify_all();
        Ok(())
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.ring.rank()
    }

    fn world_size(&self) -> usize {
        self.ring.world_size()
    }

    fn set_step(&mut self, step: u64) {
        self.step = step;
        self.ring.set_step(step);
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.on_host(Operation::AllReduce, |ring| ring.all_reduce_sum(data))
    }

    fn reduce_scatter_sum(&mut self, data: &mut [f32]) -> Result<Range<usize>, CollectiveError> {
        self.on_host(Operation::ReduceScatter, |ring| ring.reduce_scatter_sum(data))
    }

    fn all_gather(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.on_host(Operation::AllGather, |ring| ring.all_gather(data))
    }

    fn gather_share(&mut self, data: &mut [f32], distance: usize) -> Result<Range<usize>, CollectiveError> {
        self.on_host(Operation::GatherShare, |ring| ring.gather_share(data, distance))
    }

    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<(), CollectiveError> {
        self.on_host(Operation::Broadcast, |ring| ring.broadcast(data, root))
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.on_host(Operation::Barrier, Ring::barrier)
    }

    fn abort_handle(&self) -> AbortHandle {
        let shared = Arc::downgrade(&self.shared);
        AbortHandle::new(move |reason| {
            if let Some(shared) = shared.upgrade() {
                shared.fail(Fault { operation: None, peer: None, cause: CollectiveCause::Aborted(reason.to_owned()) });
            }
        })
    }

    fn set_wait_observer(&mut self, observer: WaitObserver) {
        self.ring.set_wait_observer(Arc::clone(&observer));
        self.observer = Some(observer);
    }

    fn error(&self, operation: Operation, cause: CollectiveCause) -> CollectiveError {
        CollectiveError { step: self.step, ..self.ring.error(operation, cause) }
    }

    fn works_on_device(&self) -> bool {
        true
    }

    fn all_reduce_sum_on_device(&mut self, data: DeviceFloats) -> Result<(), CollectiveError> {
        self.queue(Operation::AllReduce, data, |call| call.all_reduce(data.len))
    }

    fn reduce_scatter_on_device(&mut self, data: DeviceFloats) -> Result<Range<usize>, CollectiveError> {
        let (rank, world_size) = (self.rank(), self.world_size());
        self.queue(Operation::ReduceScatter, data, |call| {
            if data.len.is_multiple_of(world_size) {
                return call.reduce_scatter(share_of(data.len, world_size, rank));
            }
            // NCCL's own operation needs shares of one size.
            call.in_one((0..world_size).map(|root| share_of(data.len, world_size, root)), Call::reduce)
        })?;
        Ok(share_of(data.len, world_size, rank))
    }

    fn all_gather_on_device(&mut self, data: DeviceFloats) -> Result<(), CollectiveError> {
        let (rank, world_size) = (self.rank(), self.world_size());
        self.queue(Operation::AllGather, data, |call| {
            if data.len.is_multiple_of(world_size) {
                return call.all_gather(share_of(data.len, world_size, rank));
            }
            call.in_one((0..world_size).map(|root| share_of(data.len, world_size, root)), Call::broadcast)
        })
    }

    fn gather_share_on_device(&mut self, data: DeviceFloats, distance: usize) -> Result<Range<usize>, CollectiveError> {
        let (rank, world_size) = (self.rank(), self.world_size());
        if distance >= world_size {
            let text = format!("the distance {distance} is not below the world size {world_size}");
            return Err(self.failed(Operation::GatherShare, CollectiveCause::Mismatch(text)));
        }
        let (own, other) = (share_of(data.len, world_size, rank), share_before(data.len, world_size, rank, distance));
        let (to, from) = ((rank + distance) % world_size, (rank + world_size - distance) % world_size);
        if distance > 0 {
            self.queue(Operation::GatherShare, data, |call| call.pass_on((own.clone(), to as c_int), (other.clone(), from as c_int)))?;
        }
        Ok(other)
    }

    fn join_device(&mut self) -> Result<(), CollectiveError> {
        self.check(Operation::Barrier)?;
        let context = &self.shared.context;
        context.enter().map_err(|cause| self.failed(Operation::Barrier, cause))?;
        self.shared.lock().joined_since = Some(Instant::now());
        let is_alone = self.world_size() == 1;
        let waiting = Waiting::begin(self.observer.as_ref().filter(|_| !is_alone));
        while self.shared.advance() {
            thread::sleep(Duration::from_micros(WAIT_POLL_US));
        }
        drop(waiting);
        self.shared.lock().joined_since = None;
        self.check(Operation::Barrier)?;
        let joined = context.record(context.stream).and_then(|done| context.wait(context.compute, &done));
        joined.map_err(|cause| self.failed(Operation::Barrier, cause))
    }
}

impl Drop for Nccl {
    /// Lets the watchdog end the communicator. Where NCCL does not come back and an operation was under way, the process ends: that operation
    /// may still write into the state, and only a new process can be sure of its own.
    fn drop(&mut self) {
        self.shared.lock().is_closing = true;
        self.shared.news.notify_all();
        let watch = self.shared.lock();
        let ended = self.shared.news.wait_timeout_while(watch, self.shared.timeout, |watch| !watch.is_closed);
        let has_ended = ended.unwrap_or_else(PoisonError::into_inner).0.is_closed;
        match self.watchdog.take() {
            // A panic of the watchdog has already been printed, and there is nobody left to tell.
            Some(watchdog) if has_ended => drop(watchdog.join()),
            _ if self.shared.lock().is_issued => {
                tracing::error!(timeout_ms = self.shared.timeout.as_millis() as u64, "NCCL does not end an operation; this process ends");
                std::process::abort()
            }
            _ => tracing::warn!(timeout_ms = self.shared.timeout.as_millis() as u64, "NCCL does not end; its memory stays taken"),
        }
    }
}

/// What went wrong first, in which operation, where it was in one, and with whom, where somebody is to blame.
#[derive(Clone)]
struct Fault {
    operation: Option<Operation>,
    peer: Option<usize>,
    cause: CollectiveCause,
}

/// What the group shares with its watchdog and its abort handles. Where both locks are held, that of the communicator was taken first.
struct Shared {
    /// Before the context, so that events are gone before it.
    watch: Mutex<Watch>,
    news: Condvar,
    communicator: Mutex<Communicator>,
    ring: AbortHandle,
    timeout: Duration,
    context: DeviceContext,
}

#[derive(Default)]
struct Watch {
    fault: Option<Fault>,
    queue: VecDeque<Queued>,
    /// Since when the oldest operation is known to run.
    running_since: Option<Instant>,
    /// Since when somebody waits for the queue; moves on with every operation that ends.
    joined_since: Option<Instant>,
    /// Whether NCCL may be at work on memory that is not its own.
    is_issued: bool,
    is_closing: bool,
    is_closed: bool,
}

struct Queued {
    operation: Operation,
    started: Event,
    ended: Event,
}

/// Whether an operation has had its time. What waits behind the computation has all time until somebody waits for it.
fn is_stuck(now: Instant, running_since: Option<Instant>, joined_since: Option<Instant>, timeout: Duration) -> bool {
    running_since.or(joined_since).is_some_and(|since| now.saturating_duration_since(since) >= timeout)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_communicator(&self) -> MutexGuard<'_, Communicator> {
        self.communicator.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self) -> Option<Fault> {
        self.lock().fault.clone()
    }

    /// Keeps the first fault, cuts the ring, wakes the watchdog, and returns the first fault. Does not wait.
    fn fail(&self, fault: Fault) -> Fault {
        let first = self.lock().fault.get_or_insert(fault).clone();
        let reason = match &first.cause {
            CollectiveCause::Aborted(reason) => reason.clone(),
            cause => cause.to_string(),
        };
        self.ring.abort(&reason);
        self.news.notify_all();
        first
    }

    /// Begins to form the communicator.
    fn begin(&self, rank: usize, world_size: usize, id: [u8; UNIQUE_ID_BYTES]) -> Result<(), CollectiveCause> {
        self.context.enter()?;
        let mut communicator = self.lock_communicator();
        // The watchdog takes the communicator after a fault, and must not have done so before there is one.
        self.fault().map_or(Ok(()), |fault| Err(fault.cause))?;
        communicator.begin(rank, world_size, id)
    }

    /// Waits until NCCL has taken over what it was last asked for.
    fn settle(&self, interrupt: Option<&AtomicBool>) -> Result<(), CollectiveCause> {
        let started = Instant::now();
        while self.is_in_progress()? {
            if interrupt.is_some_and(|interrupt| interrupt.load(Ordering::SeqCst)) {
                return Err(CollectiveCause::Aborted("the generation has ended".to_owned()));
            }
            if let Some(fault) = self.fault() {
                return Err(fault.cause);
            }
            if started.elapsed() >= self.timeout {
                return Err(self.timed_out("; NCCL has not taken the operation over"));
            }
            thread::sleep(Duration::from_micros(WAIT_POLL_US));
        }
        Ok(())
    }

    /// Whether NCCL still works on what it was asked for; fails with what went wrong in the background.
    fn is_in_progress(&self) -> Result<bool, CollectiveCause> {
        let in_progress = self.lock_communicator().is_in_progress();
        // A communicator that is gone has been ended after a fault.
        in_progress.map_err(|cause| if cause == CollectiveCause::Closed { self.fault().map_or(cause, |fault| fault.cause) } else { cause })
    }

    /// Looks how far the queue is; false when it is empty or the group has failed.
    fn advance(&self) -> bool {
        let mut watch = self.lock();
        let fault = loop {
            let Some(oldest) = watch.queue.front() else { return false };
            if watch.fault.is_some() {
                return false;
            }
            let operation = oldest.operation;
            let seen = oldest.ended.is_reached().and_then(|has_ended| Ok((has_ended, has_ended || oldest.started.is_reached()?)));
            let now = Instant::now();
            match seen {
                Err(cause) => break Fault { operation: Some(operation), peer: None, cause },
                Ok((true, _)) => {
                    watch.queue.pop_front();
                    watch.is_issued = !watch.queue.is_empty();
                    watch.running_since = None;
                    watch.joined_since = watch.joined_since.map(|_| now);
                    continue;
                }
                Ok((false, true)) => {
                    watch.running_since.get_or_insert(now);
                }
                Ok((false, false)) => {}
            }
            if is_stuck(now, watch.running_since, watch.joined_since, self.timeout) {
                break Fault { operation: Some(operation), peer: None, cause: self.timed_out("") };
            }
            return true;
        };
        drop(watch);
        self.fail(fault);
        false
    }

    /// The watchdog: looks after what is under way, and ends the communicator.
    fn watch_over(&self) {
        if let Err(cause) = self.context.enter() {
            self.fail(Fault { operation: None, peer: None, cause });
        }
        while self.wait_for_work() {
            if self.advance()
                && let Err(cause) = self.is_in_progress()
            {
                let operation = self.lock().queue.front().map(|oldest| oldest.operation);
                self.fail(Fault { operation, peer: None, cause });
            }
        }
        // Taken out first: NCCL may need long for the end, and nobody waits for the lock meanwhile.
        let taken = self.lock_communicator().take();
        if let Err(cause) = taken.abort() {
            tracing::warn!(%cause, "NCCL reports an error while it ends");
        }
        self.lock().is_closed = true;
        self.news.notify_all();
    }

    /// Sleeps until it is time to look at the queue; false when the group has failed or is closed.
    fn wait_for_work(&self) -> bool {
        let over = |watch: &Watch| watch.fault.is_some() || watch.is_closing;
        let idle = self.news.wait_while(self.lock(), |watch| !over(watch) && watch.queue.is_empty());
        let watch = idle.unwrap_or_else(PoisonError::into_inner);
        let pause = Duration::from_millis(WATCH_POLL_MS);
        let paused = self.news.wait_timeout_while(watch, pause, |watch| !over(watch));
        !over(&paused.unwrap_or_else(PoisonError::into_inner).0)
    }

    fn timed_out(&self, note: &str) -> CollectiveCause {
        CollectiveCause::TimedOut { timeout_ms: self.timeout.as_millis() as u64, note: note.to_owned() }
    }
}

#[cfg(test)]
mod tests;
