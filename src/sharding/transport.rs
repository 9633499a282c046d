//! The collective's operations on tensors, wherever these are: in host memory, on a GPU with a transport that works there, or on a GPU
//! by way of host memory.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::collective::{Collective, CollectiveError, DeviceFloats};
use crate::torch::memory;

/// Whether operations on tensors of this device are queued, so that [`join`] must follow before anything uses the result.
pub fn is_queued(collective: &dyn Collective, device: Device) -> bool {
    device != Device::Cpu && collective.works_on_device()
}

/// Replaces the numbers by their sum over all ranks.
pub fn all_reduce(collective: &mut dyn Collective, tensor: &Tensor) -> Result<()> {
    exchange(collective, tensor, |collective, data| match data {
        Floats::Host(data) => collective.all_reduce_sum(data),
        Floats::Device(data) => collective.all_reduce_sum_on_device(data),
    })
}

/// Leaves the sum of this rank's share at its place; the rest is unspecified.
pub fn reduce_scatter(collective: &mut dyn Collective, tensor: &Tensor) -> Result<()> {
    exchange(collective, tensor, |collective, data| match data {
        Floats::Host(data) => collective.reduce_scatter_sum(data).map(drop),
        Floats::Device(data) => collective.reduce_scatter_on_device(data).map(drop),
    })
}

/// Fills the tensor with the shares of all ranks.
pub fn all_gather(collective: &mut dyn Collective, tensor: &Tensor) -> Result<()> {
    exchange(collective, tensor, |collective, data| match data {
        Floats::Host(data) => collective.all_gather(data),
        Floats::Device(data) => collective.all_gather_on_device(data),
    })
}

/// Brings the share of the rank `distance` places before this one to its place; what lies outside it and the own share is unspecified.
pub fn gather_share(collective: &mut dyn Collective, tensor: &Tensor, distance: usize) -> Result<()> {
    exchange(collective, tensor, |collective, data| match data {
        Floats::Host(data) => collective.gather_share(data, distance).map(drop),
        Floats::Device(data) => collective.gather_share_on_device(data, distance).map(drop),
    })
}

/// Makes the results of queued operations usable; does nothing where none are queued.
pub fn join(collective: &mut dyn Collective, device: Device) -> Result<()> {
    if is_queued(collective, device) {
        collective.join_device()?;
    }
    Ok(())
}

enum Floats<'a> {
    Host(&'a mut [f32]),
    Device(DeviceFloats),
}

fn exchange(
    collective: &mut dyn Collective,
    tensor: &Tensor,
    operation: impl FnOnce(&mut dyn Collective, Floats) -> Result<(), CollectiveError>,
) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let mut tensor = tensor.shallow_clone();
    let len = tensor.numel();
    if len == 0 {
        return Ok(());
    }
    let Device::Cuda(device) = tensor.device() else {
        return Ok(memory::with_floats_mut(&mut tensor, |data| operation(collective, Floats::Host(data)))??);
    };
    if collective.works_on_device() {
        ensure!(tensor.kind() == Kind::Float && tensor.is_contiguous(), "expected contiguous float32 on the GPU");
        let address = tensor.data_ptr().addr() as u64;
        return Ok(operation(collective, Floats::Device(DeviceFloats { address, len, device }))?);
    }
    let mut host = tensor.f_to_device(Device::Cpu)?;
    memory::with_floats_mut(&mut host, |data| operation(collective, Floats::Host(data)))??;
    tensor.f_copy_(&host)?;
    Ok(())
}
