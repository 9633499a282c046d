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

/// Names the memory behind a tensor and all its views; another tensor has another name as long as both live.
pub fn storage_of(tensor: &Tensor) -> usize {
    // SAFETY: the pointer comes from a live tensor; the result is used as a number only.
    unsafe { sys::cloze_storage_of(tensor.as_ptr()) }.addr()
}

/// Gives back the memory of a tensor that covers the whole of it. Nobody may use the numbers of the tensor or of its views until
/// [`take_zeroed`] or [`take`] has returned.
pub fn give_back(whole: &Tensor) -> Result<()> {
    // SAFETY: the pointer comes from a live tensor; its views find out at each use where the memory is.
    sys::checked("give memory back", unsafe { sys::cloze_storage_hold(whole.as_ptr(), 0) })
}

/// Takes memory for a tensor whose memory was given back; the content is unspecified. Does nothing where there is memory.
pub fn take(whole: &Tensor) -> Result<()> {
    // SAFETY: as in `give_back`.
    sys::checked("take memory", unsafe { sys::cloze_storage_hold(whole.as_ptr(), 1) })
}

/// As [`take`], and fills it with zeros.
pub fn take_zeroed(whole: &Tensor) -> Result<()> {
    take(whole)?;
    let _ = tch::no_grad(|| whole.shallow_clone().f_zero_())?;
    Ok(())
}

/// The most host memory that tensors of this process had at a time since [`reset_peak`], in bytes.
pub fn peak_allocated() -> u64 {
    // SAFETY: a null account is that of the process.
    unsafe { sys::cloze_peak_bytes(std::ptr::null()) }.unsigned_abs()
}

/// From now on, [`peak_allocated`] counts from what is in use.
pub fn reset_peak() {
    // SAFETY: a null account is that of the process.
    unsafe { sys::cloze_reset_peak(std::ptr::null_mut()) }
}

/// Counts the tensors that this thread makes; other tests run in the same process.
#[cfg(test)]
pub struct ThreadAccount(*mut std::ffi::c_void);

#[cfg(test)]
impl ThreadAccount {
    /// Starts counting; what was made before does not count.
    pub fn open() -> Self {
        // SAFETY: no pointers are passed; the account is never freed.
        Self(unsafe { sys::cloze_account_open() })
    }

    /// From now on, the peak counts from what is in use.
    pub fn reset_peak(&self) {
        // SAFETY: the account came from `cloze_account_open`.
        unsafe { sys::cloze_reset_peak(self.0) }
    }

    /// The most memory at a time, in bytes.
    pub fn peak(&self) -> u64 {
        // SAFETY: as above.
        unsafe { sys::cloze_peak_bytes(self.0) }.unsigned_abs()
    }
}

#[cfg(test)]
impl Drop for ThreadAccount {
    fn drop(&mut self) {
        // SAFETY: no pointers are passed.
        unsafe { sys::cloze_account_close() }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    const FLOATS: i64 = 1 << 20;

    #[test]
    fn memory_is_given_back_and_taken_again_under_the_views() {
        let account = ThreadAccount::open();
        let whole = Tensor::ones([FLOATS], (Kind::Float, Device::Cpu));
        let view = whole.narrow(0, FLOATS / 2, 4).view([2, 2]);
        assert_eq!(storage_of(&whole), storage_of(&view));
        assert_eq!(account.peak(), 4 * FLOATS as u64);
        give_back(&whole).unwrap();
        account.reset_peak();
        assert_eq!(account.peak(), 0);
        take_zeroed(&whole).unwrap();
        assert_eq!(account.peak(), 4 * FLOATS as u64);
        let _ = whole.narrow(0, FLOATS / 2, 1).fill_(3.0);
        assert_eq!(Vec::<f32>::try_from(view.view([4])).unwrap(), [3.0, 0.0, 0.0, 0.0]);
        // Memory that is there stays, with its content.
        take(&whole).unwrap();
        assert!((view.double_value(&[0, 0]) - 3.0).abs() < f64::EPSILON);
    }

    #[test]
    fn the_peak_outlives_what_made_it() {
        let account = ThreadAccount::open();
        for _ in 0..3 {
            drop(Tensor::ones([FLOATS], (Kind::Float, Device::Cpu)));
        }
        assert_eq!(account.peak(), 4 * FLOATS as u64);
    }

    #[test]
    fn the_peak_of_the_process_covers_what_is_in_use() {
        let held = Tensor::ones([FLOATS], (Kind::Float, Device::Cpu));
        reset_peak();
        assert!(peak_allocated() >= 4 * held.numel() as u64);
    }
}
