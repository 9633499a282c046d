//! Sums gradients over the workers while the backward pass still computes the rest of them.
//!
//! The flat gradient buffer is cut into buckets, in the order in which a backward pass completes them: from the last layer to the first, and the
//! shared embedding with all norms, biases and extras at the end. The order and the cuts depend on the model only, so that every worker reduces
//! the same ranges in the same order, and a run gives the same bits each time.
#![expect(unsafe_code, reason = "shares the gradient buffer between the backward pass and the reducer, range by range")]

use std::collections::HashMap;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use tch::{Device, Kind, Tensor};

use super::sys;
use crate::collective::{Collective, CollectiveError};

/// A bucket is closed when it holds this many floats (4 MiB): large enough for the ring's bandwidth, small enough to start early.
const BUCKET_FLOATS_MIN: usize = 1 << 20;

/// One parameter of the flat buffer.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// First float.
    pub offset: usize,
    /// Floats up to the next parameter, padding included.
    pub length: usize,
}

/// How the flat gradient buffer is reduced.
#[derive(Debug)]
pub struct Buckets {
    buckets: Vec<Bucket>,
    bucket_of: HashMap<usize, usize>,
}

#[derive(Debug)]
struct Bucket {
    ranges: Vec<Range<usize>>,
    num_parameters: usize,
}

impl Buckets {
    /// Cuts a buffer of `total` floats. `matrices` lie in it in the order of the forward pass, the shared embedding first; everything else
    /// is in the last bucket.
    pub fn new(matrices: &[Place], total: usize) -> Self {
        Self::cut(matrices, total, BUCKET_FLOATS_MIN)
    }

    fn cut(matrices: &[Place], total: usize, floats_min: usize) -> Self {
        let mut buckets = vec![];
        let mut bucket_of = HashMap::new();
        let mut open: Option<Bucket> = None;
        for place in matrices.iter().skip(1).rev() {
            let end = place.offset + place.length;
            let bucket = open.get_or_insert_with(|| Bucket { ranges: vec![Range { start: end, end }], num_parameters: 0 });
            bucket.ranges[0].start = place.offset;
            bucket.num_parameters += 1;
            bucket_of.insert(place.offset, buckets.len());
            if bucket.ranges[0].len() >= floats_min {
                buckets.extend(open.take());
            }
        }
        buckets.extend(open);
        let embedding_end = matrices.first().map_or(0, |place| place.offset + place.length);
        let matrices_end = matrices.last().map_or(0, |place| place.offset + place.length);
        buckets.push(Bucket { ranges: vec![0..embedding_end, matrices_end..total], num_parameters: 0 });
        Self { buckets, bucket_of }
    }
}

/// Runs `backward`, which completes the gradients, and sums every bucket over the workers as soon as it is complete.
pub fn reduce_during<R>(
    gradients: &mut Tensor,
    buckets: &Buckets,
    collective: &mut dyn Collective,
    backward: impl FnOnce() -> Result<R>,
) -> Result<R> {
    let floats = SharedFloats::new(gradients)?;
    let (sender, receiver) = sync_channel(buckets.buckets.len());
    let tracker = Tracker::new(buckets, sender);
    thread::scope(|scope| {
        let reduce = move || -> Result<(), CollectiveError> {
            for bucket in receiver {
                let bucket: usize = bucket;
                for range in &buckets.buckets[bucket].ranges {
                    // SAFETY: the tracker names each bucket once, after the backward pass has written its last float.
                    collective.all_reduce_sum(unsafe { floats.range(range) })?;
                }
            }
            Ok(())
        };
        let reducer =
            thread::Builder::new().name("gradient-reducer".to_owned()).spawn_scoped(scope, reduce).context("start the gradient reducer")?;
        let result = {
            let _installed = InstalledHook::new(&tracker);
            backward()
        };
        if result.is_ok() {
            tracker.complete_all();
        }
        drop(tracker);
        let reduced = reducer.join().map_err(|_| anyhow!("the gradient reducer panicked"))?;
        // An error of the backward pass is the cause where both failed.
        let result = result?;
        reduced?;
        Ok(result)
    })
}

/// The gradient buffer as the reducer sees it.
#[derive(Clone, Copy)]
struct SharedFloats {
    start: *mut f32,
    length: usize,
}

// SAFETY: the buffer outlives the scope of `reduce_during`, which holds it exclusively; ranges are handed over one at a time.
unsafe impl Send for SharedFloats {}

impl SharedFloats {
    fn new(tensor: &mut Tensor) -> Result<Self> {
        ensure!(
            tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && tensor.is_contiguous(),
            "expected contiguous float32 on the CPU"
        );
        Ok(Self { start: tensor.data_ptr().cast(), length: tensor.numel() })
    }

    /// # Safety
    /// Nobody else may use the range while the slice lives.
    unsafe fn range<'a>(self, range: &Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.length, "a bucket lies outside the gradient buffer");
        // SAFETY: inside the buffer, and exclusive as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// Counts the parameters of each bucket down and releases buckets in their order.
struct Tracker<'a> {
    buckets: &'a Buckets,
    state: Mutex<TrackerState>,
}

struct TrackerState {
    missing: Vec<usize>,
    next: usize,
    sender: SyncSender<usize>,
}

impl<'a> Tracker<'a> {
    fn new(buckets: &'a Buckets, sender: SyncSender<usize>) -> Self {
        let missing = buckets.buckets.iter().map(|bucket| bucket.num_parameters).collect();
        Self { buckets, state: Mutex::new(TrackerState { missing, next: 0, sender }) }
    }

    fn parameter_done(&self, offset: usize) {
        let Some(&bucket) = self.buckets.bucket_of.get(&offset) else { return };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.missing[bucket] = state.missing[bucket].saturating_sub(1);
        // The last bucket waits for `complete_all`: it holds what no parameter announces.
        while state.next + 1 < self.buckets.buckets.len() && state.missing[state.next] == 0 {
            state.release();
        }
    }

    fn complete_all(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.next < self.buckets.buckets.len() {
            state.release();
        }
    }
}

impl TrackerState {
    fn release(&mut self) {
        // A reducer that has failed takes no more buckets; its error is found when it is joined.
        let _ = self.sender.send(self.next);
        self.next += 1;
    }
}

/// The shim's hook while it points to a tracker.
struct InstalledHook;

impl InstalledHook {
    fn new(tracker: &Tracker) -> Self {
        let context: *const Tracker = tracker;
        // SAFETY: the guard is dropped, and the hook with it, before the tracker.
        unsafe { sys::cloze_set_gradient_hook(Some(on_gradient), context.cast_mut().cast()) };
        Self
    }
}

impl Drop for InstalledHook {
    fn drop(&mut self) {
        // SAFETY: a null hook switches the calls off.
        unsafe { sys::cloze_set_gradient_hook(None, std::ptr::null_mut()) };
    }
}

extern "C" fn on_gradient(context: *mut c_void, offset: i64, _length: i64) {
    // SAFETY: `InstalledHook` keeps the context a live tracker while the hook is set; the tracker is shared by reference only.
    let tracker = unsafe { &*context.cast_const().cast::<Tracker>() };
    tracker.parameter_done(offset as usize);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::api::AbortHandle;
    use crate::torch::ops::{self, Parameter};

    /// Two workers of which the other has the same gradients: a sum is a doubling. Keeps the ranges' lengths.
    struct Doubling(Vec<usize>);

    impl Collective for Doubling {
        fn rank(&self) -> usize {
            0
        }
        fn world_size(&self) -> usize {
            2
        }
        fn set_step(&mut self, _step: u64) {}
        fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
            self.0.push(data.len());
            data.iter_mut().for_each(|value| *value *= 2.0);
            Ok(())
        }
        fn broadcast(&mut self, _data: &mut [u8], _root: usize) -> Result<(), CollectiveError> {
            Ok(())
        }
        fn barrier(&mut self) -> Result<(), CollectiveError> {
            Ok(())
        }
        fn abort_handle(&self) -> AbortHandle {
            AbortHandle::new(|_| {})
        }
    }

    /// Matrices of these lengths one after another.
    fn places(lengths: &[usize]) -> Vec<Place> {
        let starts = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end - length)
        });
        starts.zip(lengths).map(|(offset, &length)| Place { offset, length }).collect()
    }

    #[test]
    fn every_float_is_in_one_bucket_and_late_layers_come_first() {
        let buckets = Buckets::cut(&places(&[100, 8, 8, 8, 4]), 138, 12);
        let ranges = |bucket: usize| buckets.buckets[bucket].ranges.iter().map(|range| (range.start, range.end)).collect::<Vec<_>>();
        assert_eq!([ranges(0), ranges(1)], [[(116, 128)], [(100, 116)]]);
        assert_eq!(ranges(2), [(0, 100), (128, 138)]);
    }

    /// Width of the square layers below.
    const WIDTH: i64 = 8;
    const LENGTH: i64 = WIDTH * WIDTH;

    /// Three layers behind an unused embedding's place, and four extras; adds the gradients of the output's sum to `gradients`.
    fn backward(gradients: &Tensor) -> Result<()> {
        let layers: Vec<Parameter> = (1..=3)
            .map(|layer| Parameter {
                value: (Tensor::arange(LENGTH, (Kind::Float, Device::Cpu)).view([WIDTH, WIDTH]) - layer as f64) / 64.0,
                gradient: Some(gradients.narrow(0, layer * LENGTH, LENGTH).view([WIDTH, WIDTH])),
            })
            .collect();
        let mut x = Tensor::ones([2, WIDTH], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        for layer in &layers {
            x = ops::linear(&x, layer)?;
        }
        x.sum(Kind::Float).f_backward()?;
        let _ = gradients.narrow(0, 4 * LENGTH, 4).fill_(1.0);
        Ok(())
    }

    #[test]
    fn gradients_are_summed_once_each_and_only_when_complete() {
        let zeros = || Tensor::zeros([4 * LENGTH + 4], (Kind::Float, Device::Cpu));
        let alone = zeros();
        backward(&alone).unwrap();
        let length = LENGTH as usize;
        let buckets = Buckets::cut(&places(&[length; 4]), 4 * length + 4, length);
        let mut together = zeros();
        let seen = together.shallow_clone();
        let mut collective = Doubling(vec![]);
        reduce_during(&mut together, &buckets, &mut collective, || backward(&seen)).unwrap();
        assert!(together.equal(&(alone * 2.0)));
        assert_eq!(collective.0, [length, length, length, length, 4]);
    }

    #[test]
    fn a_backward_pass_that_fails_leaves_the_rest_unreduced() {
        let buckets = Buckets::cut(&places(&[8, 8]), 16, 1);
        let mut gradients = Tensor::zeros([16], (Kind::Float, Device::Cpu));
        let mut collective = Doubling(vec![]);
        let result: Result<()> = reduce_during(&mut gradients, &buckets, &mut collective, || Err(anyhow!("no backward")));
        assert!(result.unwrap_err().to_string().contains("no backward"));
        assert!(collective.0.is_empty());
    }
}
