//! Host memory of tensors: borrowed views for the collective and for checkpoints, and the allocator's habits.
#![expect(unsafe_code, reason = "views of tensor memory")]

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::sys;

/// Keeps freed memory in the process: the same shapes come back every step.
pub fn keep_freed_memory() {
    // SAFETY: sets allocator options only.
    unsafe { sys::cloze_keep_freed_memory() }
}

/// Runs `work` on the numbers of a contiguous float32 CPU tensor.
pub fn with_floats_mut<R>(tensor: &mut Tensor, work: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    let length = checked_length(tensor)?;
    // SAFETY: the tensor is contiguous float32 on the host with `length` numbers; the exclusive borrow keeps this program's other users away.
    Ok(work(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), length) }))
}

/// Runs `work` on the bytes of a contiguous float32 CPU tensor, little endian as on every supported machine.
pub fn with_bytes<R>(tensor: &Tensor, work: impl FnOnce(&[u8]) -> R) -> Result<R> {
    let length = checked_length(tensor)?;
    // SAFETY: as above, read only, four bytes a number.
    Ok(work(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>().cast_const(), length * 4) }))
}

/// Runs `work` on the bytes of a contiguous float32 CPU tensor, to be changed.
pub fn with_bytes_mut<R>(tensor: &mut Tensor, work: impl FnOnce(&mut [u8]) -> R) -> Result<R> {
    let length = checked_length(tensor)?;
    // SAFETY: as in `with_floats_mut`, four bytes a number.
    Ok(work(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), length * 4) }))
}

/// Copies a host tensor to a device. To a GPU it goes through pinned memory on a stream of its own: nothing waits on the host, and the copy
/// overlaps with what is computed; on a CPU the tensor stays as it is.
pub fn to_device(host: Tensor, device: Device) -> Result<Tensor> {
    let Device::Cuda(index) = device else { return Ok(host) };
    // SAFETY: the pointer comes from a live tensor; the shim keeps its own references.
    sys::owned("copy to the device", unsafe { sys::cloze_copy_aside(host.as_ptr(), index as i64) })
}

/// Numbers on their way from a device to the host; nothing waits until [`Readback::finish`].
#[derive(Debug)]
pub struct Readback {
    host: Tensor,
    event: Option<Event>,
}

#[derive(Debug)]
struct Event(*mut std::ffi::c_void);

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event came from cloze_event_record and is given back once.
        unsafe { sys::cloze_event_free(self.0) };
    }
}

impl Readback {
    /// Starts copying a float32 tensor; on a CPU the numbers are there at once.
    pub fn start(tensor: &Tensor) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let Device::Cuda(index) = tensor.device() else { return Ok(Self { host: tensor.copy(), event: None }) };
        // A copy from a GPU that does not block lands in pinned memory, which libtorch allocates for it.
        let host = tensor.f_to_device_(Device::Cpu, Kind::Float, true, false)?;
        // SAFETY: no pointers are passed; a null result is an error of the shim.
        let event = unsafe { sys::cloze_event_record(index as i64) };
        ensure!(!event.is_null(), "record an event: {}", sys::error_text());
        Ok(Self { host, event: Some(Event(event)) })
    }

    /// Waits for the copy and gives the numbers.
    pub fn finish(mut self) -> Result<Vec<f32>> {
        if let Some(event) = self.event.take() {
            // SAFETY: the event came from cloze_event_record and lives until it is dropped.
            let status = unsafe { sys::cloze_event_wait(event.0) };
            sys::checked("wait for an event", status)?;
        }
        Ok(Vec::<f32>::try_from(&self.host)?)
    }
}

fn checked_length(tensor: &Tensor) -> Result<usize> {
    ensure!(tensor.device() == Device::Cpu, "expected a tensor on the CPU, found {:?}", tensor.device());
    ensure!(tensor.kind() == Kind::Float, "expected float32, found {:?}", tensor.kind());
    ensure!(tensor.is_contiguous(), "expected a contiguous tensor");
    Ok(tensor.numel())
}
