//! What one worker exchanges with the others during a pass, bucket by bucket, in the same order on all of them.

use anyhow::Result;
use cloze_recipes::recipe::Shard;
use tch::{Device, Kind, Tensor};

use super::buckets::Buckets;
use super::layout::ShardLayout;
use super::transport;
use crate::collective::Collective;
use crate::model::parameters::FlatParameters;
use crate::torch::memory;

/// The exchange of one step.
pub struct Exchange<'a> {
    collective: &'a mut dyn Collective,
    buckets: &'a Buckets,
    layout: &'a ShardLayout,
    shard: Shard,
    device: Device,
    values: Tensor,
    gradients: Tensor,
    extras: Tensor,
    value_pieces: Vec<Tensor>,
    gradient_pieces: Vec<Tensor>,
    /// The bucket before the last whose values are here.
    resident: Option<usize>,
    /// The bucket whose sums are under way and not yet in the shard.
    under_way: Option<usize>,
}

impl<'a> Exchange<'a> {
    /// The exchange of a model's gradients, and of its values where these are shared out.
    pub fn new(parameters: &'a FlatParameters, collective: &'a mut dyn Collective) -> Result<Self> {
        let values = parameters.values().shallow_clone();
        Ok(Self {
            collective,
            buckets: parameters.buckets(),
            layout: parameters.layout(),
            shard: parameters.shard(),
            device: values.device(),
            values,
            gradients: parameters.gradients()?.shallow_clone(),
            extras: parameters.extras()?,
            value_pieces: parameters.value_pieces().unwrap_or_default(),
            gradient_pieces: parameters.gradient_pieces().unwrap_or_default(),
            resident: None,
            under_way: None,
        })
    }

    /// How the flat buffer is cut.
    pub fn buckets(&self) -> &'a Buckets {
        self.buckets
    }

    /// What is shared out.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// Where the tensors are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Whether the transport queues operations on the device.
    pub fn is_queued(&self) -> bool {
        transport::is_queued(self.collective, self.device)
    }

    /// Whether values come and go during a pass.
    pub fn gathers_values(&self) -> bool {
        !self.value_pieces.is_empty()
    }

    /// What a pass adds gradients to, segment by segment; empty where that is the flat buffer.
    pub fn gradient_pieces(&self) -> Vec<Tensor> {
        self.gradient_pieces.iter().map(Tensor::shallow_clone).collect()
    }

    /// Before a pass: the values that all of it uses.
    pub fn begin(&mut self) -> Result<()> {
        if self.gathers_values() {
            self.gather(self.buckets.last())?;
        }
        Ok(())
    }

    /// Brings the values of a bucket, and gives those of another one back.
    pub fn need(&mut self, bucket: usize) -> Result<()> {
        if !self.gathers_values() || bucket == self.buckets.last() || self.resident == Some(bucket) {
            return Ok(());
        }
        self.release_values()?;
        self.gather(bucket)?;
        self.resident = Some(bucket);
        Ok(())
    }

    /// Sums the gradients of a bucket, which this worker has completed.
    pub fn reduce(&mut self, bucket: usize) -> Result<()> {
        if self.shard >= Shard::Gradients {
            // One bucket may be under way while the pass computes the next, but not more: their memory is held until then.
            self.settle()?;
        }
        for segment in self.buckets.segments_of(bucket) {
            self.reduce_segment(segment)?;
        }
        self.under_way = Some(bucket);
        if self.is_queued() { Ok(()) } else { self.settle() }
    }

    /// After a pass: all sums are there, and no memory is held that the next pass does not need.
    pub fn end(&mut self) -> Result<()> {
        self.settle()?;
        self.release_values()?;
        if self.gathers_values() {
            for segment in self.buckets.segments_of(self.buckets.last()) {
                memory::give_back(&self.value_pieces[segment])?;
            }
        }
        Ok(())
    }

    /// Takes part in a pass for which this worker has no pack: exchanges what the others exchange, in their order.
    pub fn stand_in(&mut self) -> Result<()> {
        let last = self.buckets.last();
        self.begin()?;
        for bucket in (0..last).rev() {
            self.need(bucket)?;
        }
        for bucket in 0..=last {
            self.need(bucket)?;
            if !self.gradient_pieces.is_empty() {
                for segment in self.buckets.segments_of(bucket) {
                    memory::take_zeroed(&self.gradient_pieces[segment])?;
                }
            }
            self.reduce(bucket)?;
        }
        self.end()
    }

    /// Sums the extras; where nothing is shared out they go with the last bucket, and this does nothing.
    pub fn sum_extras(&mut self) -> Result<()> {
        if self.shard == Shard::None {
            return Ok(());
        }
        transport::all_reduce(self.collective, &self.extras)?;
        transport::join(self.collective, self.device)
    }

    fn reduce_segment(&mut self, segment: usize) -> Result<()> {
        let range = &self.buckets.segments()[segment].range;
        let flat = |length: usize| self.gradients.f_narrow(0, range.start as i64, length as i64);
        match self.shard {
            Shard::None => {
                let is_last = segment + 1 == self.buckets.segments().len();
                let extras = if is_last { self.extras.numel() } else { 0 };
                transport::all_reduce(self.collective, &flat(range.len() + extras)?)
            }
            Shard::Optimizer => transport::reduce_scatter(self.collective, &flat(range.len())?),
            Shard::Gradients | Shard::Parameters => transport::reduce_scatter(self.collective, &self.gradient_pieces[segment]),
        }
    }

    /// Completes what is under way: adds this worker's part to its shard, and gives the memory of the bucket back.
    fn settle(&mut self) -> Result<()> {
        let Some(bucket) = self.under_way.take() else { return Ok(()) };
        transport::join(self.collective, self.device)?;
        if self.gradient_pieces.is_empty() {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        for segment in self.buckets.segments_of(bucket) {
            let (piece, part) = (&self.gradient_pieces[segment], &self.layout.parts()[segment]);
            let share = piece.f_narrow(0, part.in_segment().start as i64, part.share.len() as i64)?;
            let _ = self.gradients.f_narrow(0, part.place.start as i64, part.place.len() as i64)?.f_add_(&share)?;
            drop(share);
            memory::give_back(piece)?;
        }
        Ok(())
    }

    fn release_values(&mut self) -> Result<()> {
        let Some(bucket) = self.resident.take() else { return Ok(()) };
        self.buckets.segments_of(bucket).try_for_each(|segment| memory::give_back(&self.value_pieces[segment]))
    }

    /// Brings the values of a bucket from all shards.
    fn gather(&mut self, bucket: usize) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for segment in self.buckets.segments_of(bucket) {
            let (piece, part) = (&self.value_pieces[segment], &self.layout.parts()[segment]);
            memory::take(piece)?;
            let is_float = piece.kind() == Kind::Float;
            let full =
                if is_float { piece.shallow_clone() } else { Tensor::f_empty([part.segment.len() as i64], (Kind::Float, self.device))? };
            let own = self.values.f_narrow(0, part.place.start as i64, part.place.len() as i64)?;
            full.f_narrow(0, part.in_segment().start as i64, part.share.len() as i64)?.f_copy_(&own)?;
            transport::all_gather(self.collective, &full)?;
            transport::join(self.collective, self.device)?;
            if !is_float {
                piece.shallow_clone().f_copy_(&full)?;
            }
        }
        Ok(())
    }
}
