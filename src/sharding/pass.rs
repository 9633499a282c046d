//! One forward and backward pass, and the exchange that goes with it.
//!
//! In host memory, a thread sums gradients while the pass computes the rest. Where operations are queued on the device, or values come and go,
//! the exchange happens where the pass asks for it. On a GPU whose workers meet in host memory, everything is summed when the pass has ended.

use std::collections::HashMap;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use cloze_recipes::recipe::Shard;
use tch::{Device, Tensor};

use super::buckets::Buckets;
use super::exchange::Exchange;
use crate::model::parameters::FlatParameters;
use crate::torch::listen::{Listener, Spot, Told, while_listening};
use crate::torch::memory;

/// Buckets that wait for the thread while it sums one, where each holds memory of its own.
const WAITING_BUCKETS_MAX: usize = 1;

/// Which segments the buffers that a pass uses belong to, by the name of their memory.
#[derive(Debug)]
pub struct Buffers {
    /// First float of the flat buffer that each buffer of gradients holds.
    gradient_starts: HashMap<usize, usize>,
    gradient_segments: HashMap<usize, usize>,
    value_segments: HashMap<usize, usize>,
}

impl Buffers {
    /// The buffers of a model.
    pub fn new(parameters: &FlatParameters) -> Result<Self> {
        let by_storage = |pieces: Option<Vec<Tensor>>| -> HashMap<usize, usize> {
            pieces.unwrap_or_default().iter().enumerate().map(|(segment, piece)| (memory::storage_of(piece), segment)).collect()
        };
        let gradient_segments = by_storage(parameters.gradient_pieces());
        let segments = parameters.buckets().segments();
        let mut gradient_starts: HashMap<usize, usize> =
            gradient_segments.iter().map(|(&storage, &segment)| (storage, segments[segment].range.start)).collect();
        if gradient_starts.is_empty() {
            gradient_starts.insert(memory::storage_of(parameters.gradients()?), 0);
        }
        Ok(Self { gradient_starts, gradient_segments, value_segments: by_storage(parameters.value_pieces()) })
    }
}

/// How much of the exchange went on while passes computed, where a thread does it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Overlap {
    /// Seconds in which buckets were summed, the waits for other workers included.
    pub exchange_s: f64,
    /// Seconds of these for which the passes were over and waited.
    pub exposed_s: f64,
}

impl Overlap {
    /// The part of the exchange that cost no time; `None` before the first.
    pub fn hidden_share(&self) -> Option<f64> {
        (self.exchange_s > 0.0).then(|| 1.0 - (self.exposed_s / self.exchange_s).min(1.0))
    }

    fn add(&mut self, exchange: Duration, exposed: Duration) {
        self.exchange_s += exchange.as_secs_f64();
        self.exposed_s += exposed.as_secs_f64();
    }
}

/// Runs a pass and its exchange. A worker without a pack calls [`Exchange::stand_in`] instead.
pub fn pass(exchange: &mut Exchange, buffers: &Buffers, overlap: &mut Overlap, backward: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    let (shard, is_on_host) = (exchange.shard(), exchange.device() == Device::Cpu);
    if shard == Shard::Parameters || (!is_on_host && (exchange.is_queued() || shard == Shard::Gradients)) {
        in_place(exchange, buffers, backward)
    } else if is_on_host {
        let waiting = if shard == Shard::Gradients { WAITING_BUCKETS_MAX } else { exchange.buckets().num_buckets() };
        let (exchanged, exposed) = beside(exchange, buffers, backward, waiting)?;
        overlap.add(exchanged, exposed);
        Ok(())
    } else {
        backward()?;
        exchange.stand_in()
    }
}

/// Exchanges in the midst of the pass.
fn in_place(exchange: &mut Exchange, buffers: &Buffers, backward: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    exchange.begin()?;
    let (buckets, pieces) = (exchange.buckets(), exchange.gradient_pieces());
    let tracker = Tracker::new(buckets, buffers, pieces, Sink::Here(exchange));
    let result = while_listening(&tracker, backward);
    if result.is_ok() {
        tracker.complete_all();
    }
    // A pass that the tracker stopped failed for the tracker's reason.
    match (tracker.into_error(), result) {
        (Some(error), _) | (None, Err(error)) => Err(error),
        (None, Ok(())) => exchange.end(),
    }
}

/// Exchanges on a thread beside the pass. Returns how long the exchange took, and for how much of that the pass was over.
fn beside(
    exchange: &mut Exchange,
    buffers: &Buffers,
    backward: &mut dyn FnMut() -> Result<()>,
    waiting: usize,
) -> Result<(Duration, Duration)> {
    let (buckets, pieces) = (exchange.buckets(), exchange.gradient_pieces());
    let (sender, receiver) = sync_channel(waiting);
    let tracker = Tracker::new(buckets, buffers, pieces, Sink::Thread(sender));
    thread::scope(|scope| {
        let reduce = move || -> Result<Duration> {
            let mut busy = Duration::ZERO;
            for bucket in receiver {
                let started = Instant::now();
                exchange.reduce(bucket)?;
                busy += started.elapsed();
            }
            exchange.end().map(|()| busy)
        };
        let reducer =
            thread::Builder::new().name("gradient-reducer".to_owned()).spawn_scoped(scope, reduce).context("start the gradient reducer")?;
        let result = while_listening(&tracker, backward);
        if result.is_ok() {
            tracker.complete_all();
        }
        let ended = Instant::now();
        let stopped = tracker.into_error();
        let reduced = reducer.join().map_err(|_| anyhow!("the gradient reducer panicked"))?;
        match (stopped, reduced, result) {
            // What stopped the pass is that nobody took its buckets any more; the reducer knows why.
            (Some(_), Err(error), _) | (Some(error), Ok(_), _) | (None, _, Err(error)) => Err(error),
            (None, reduced, Ok(())) => reduced.map(|busy| (busy, ended.elapsed())),
        }
    })
}

/// Where complete buckets go.
enum Sink<'a, 'b> {
    Thread(SyncSender<usize>),
    Here(&'b mut Exchange<'a>),
}

impl Sink<'_, '_> {
    fn reduce(&mut self, bucket: usize) -> Result<()> {
        match self {
            Self::Thread(sender) => sender.send(bucket).context("hand a bucket to the gradient reducer"),
            Self::Here(exchange) => exchange.reduce(bucket),
        }
    }
}

/// Hears the pass: brings memory and values when they are needed, counts the parameters of each bucket down, and releases buckets in their order.
struct Tracker<'a, 'b, 'c> {
    buckets: &'c Buckets,
    buffers: &'c Buffers,
    state: Mutex<TrackerState<'a, 'b>>,
}

struct TrackerState<'a, 'b> {
    missing: Vec<usize>,
    next: usize,
    /// What gradients are added to, segment by segment; empty where that is the flat buffer.
    pieces: Vec<Tensor>,
    is_taken: Vec<bool>,
    sink: Sink<'a, 'b>,
    error: Option<anyhow::Error>,
}

impl<'a, 'b, 'c> Tracker<'a, 'b, 'c> {
    fn new(buckets: &'c Buckets, buffers: &'c Buffers, pieces: Vec<Tensor>, sink: Sink<'a, 'b>) -> Self {
        let missing = (0..buckets.num_buckets()).map(|bucket| buckets.num_parameters(bucket)).collect();
        let is_taken = vec![false; pieces.len()];
        Self { buckets, buffers, state: Mutex::new(TrackerState { missing, next: 0, pieces, is_taken, sink, error: None }) }
    }

    /// Releases what the pass has not announced: the last bucket.
    fn complete_all(&self) {
        let mut state = self.lock();
        while state.next < self.buckets.num_buckets() && state.error.is_none() {
            state.error = state.release(self.buckets).err();
        }
    }

    /// What stopped the pass.
    fn into_error(self) -> Option<anyhow::Error> {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).error
    }

    fn lock(&self) -> MutexGuard<'_, TrackerState<'a, 'b>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, told: Told, spot: Spot) -> Result<()> {
        let mut state = self.lock();
        match told {
            Told::ValueNeeded => match (self.buffers.value_segments.get(&spot.storage), &mut state.sink) {
                (Some(&segment), Sink::Here(exchange)) => exchange.need(self.buckets.bucket_of_segment(segment)),
                _ => Ok(()),
            },
            Told::GradientNeeded => match self.buffers.gradient_segments.get(&spot.storage) {
                Some(&segment) => state.take(segment),
                None => Ok(()),
            },
            Told::GradientAdded => {
                let start = self.buffers.gradient_starts.get(&spot.storage);
                let Some(bucket) = start.and_then(|start| self.buckets.bucket_of_parameter(start + spot.offset)) else { return Ok(()) };
                state.missing[bucket] = state.missing[bucket].saturating_sub(1);
                while state.next < self.buckets.last() && state.missing[state.next] == 0 {
                    state.release(self.buckets)?;
                }
                Ok(())
            }
        }
    }
}

impl Listener for Tracker<'_, '_, '_> {
    fn told(&self, told: Told, spot: Spot) -> bool {
        let result = self.hear(told, spot);
        let may_go_on = result.is_ok();
        if let Err(error) = result {
            self.lock().error.get_or_insert(error);
        }
        may_go_on
    }
}

impl TrackerState<'_, '_> {
    /// Memory for the gradients of a segment, at its first use.
    fn take(&mut self, segment: usize) -> Result<()> {
        if !self.is_taken[segment] {
            memory::take_zeroed(&self.pieces[segment])?;
            self.is_taken[segment] = true;
        }
        Ok(())
    }

    fn release(&mut self, buckets: &Buckets) -> Result<()> {
        let bucket = self.next;
        if !self.pieces.is_empty() {
            buckets.segments_of(bucket).try_for_each(|segment| self.take(segment))?;
        }
        self.next += 1;
        self.sink.reduce(bucket)
    }
}
