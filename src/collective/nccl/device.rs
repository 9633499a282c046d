//! What of the CUDA driver the group needs: libtorch's context, a stream of its own, events.
#![expect(unsafe_code, reason = "calls the CUDA driver")]

use std::ffi::{c_int, c_uint};
use std::ptr;

use cudarc::driver::sys as cuda;

use super::library::Libraries;
use crate::collective::api::CollectiveCause;

/// A stream of the driver.
#[derive(Clone, Copy)]
pub struct Stream(pub cuda::CUstream);

/// The context that libtorch uses too, and the group's own stream in it.
pub struct DeviceContext {
    libraries: &'static Libraries,
    /// Index of the device.
    pub index: usize,
    device: cuda::CUdevice,
    context: cuda::CUcontext,
    /// The group's own stream.
    pub stream: Stream,
    /// Where the values are computed.
    pub compute: Stream,
}

// SAFETY: the driver lets any thread use its handles, and several at a time.
unsafe impl Send for DeviceContext {}
// SAFETY: as above.
unsafe impl Sync for DeviceContext {}

impl DeviceContext {
    /// Opens device `index` and makes a stream there.
    pub fn open(libraries: &'static Libraries, index: usize, compute_stream: u64) -> Result<Self, CollectiveCause> {
        let mut device = 0;
        let mut context = ptr::null_mut();
        let mut stream = ptr::null_mut();
        let cuda = &libraries.cuda;
        // SAFETY: the pointers are to living values of the types that the driver names.
        unsafe {
            driver("start", (cuda.cuInit)(0))?;
            driver("find the device", (cuda.cuDeviceGet)(&raw mut device, index as c_int))?;
            driver("take the device's context", (cuda.cuDevicePrimaryCtxRetain)(&raw mut context, device))?;
        }
        let compute = Stream(ptr::with_exposed_provenance_mut(compute_stream as usize));
        // From here on dropping this gives the context back.
        let mut opened = Self { libraries, index, device, context, stream: Stream(ptr::null_mut()), compute };
        opened.enter()?;
        // One that does not wait for the default stream, whose work it is to run beside.
        let flags = cuda::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: as above.
        driver("make a stream", unsafe { (cuda.cuStreamCreate)(&raw mut stream, flags) })?;
        opened.stream = Stream(stream);
        Ok(opened)
    }

    /// Makes the context the thread's current one.
    pub fn enter(&self) -> Result<(), CollectiveCause> {
        // SAFETY: the context is held until this is dropped.
        driver("enter the context", unsafe { (self.libraries.cuda.cuCtxSetCurrent)(self.context) })
    }

    /// An event behind everything that a stream has been given so far.
    pub fn record(&self, stream: Stream) -> Result<Event, CollectiveCause> {
        let mut event = ptr::null_mut();
        let flags = cuda::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: the pointer is to a living value.
        driver("make an event", unsafe { (self.libraries.cuda.cuEventCreate)(&raw mut event, flags) })?;
        let event = Event { libraries: self.libraries, event };
        // SAFETY: event and stream live.
        driver("record an event", unsafe { (self.libraries.cuda.cuEventRecord)(event.event, stream.0) })?;
        Ok(event)
    }

    /// Lets what a stream is given from now on wait for an event.
    pub fn wait(&self, stream: Stream, event: &Event) -> Result<(), CollectiveCause> {
        // SAFETY: event and stream live; the driver keeps what it needs of the event.
        driver("let a stream wait", unsafe { (self.libraries.cuda.cuStreamWaitEvent)(stream.0, event.event, 0) })
    }
}

impl Drop for DeviceContext {
    fn drop(&mut self) {
        let cuda = &self.libraries.cuda;
        if !self.stream.0.is_null() {
            // SAFETY: the stream is this one's own and is given back once. There is nobody left to tell of an error.
            let _ = unsafe { (cuda.cuStreamDestroy_v2)(self.stream.0) };
        }
        // SAFETY: taken once in `open`. libtorch holds the context too, so that it lives on.
        let _ = unsafe { (cuda.cuDevicePrimaryCtxRelease_v2)(self.device) };
    }
}

/// A point in a stream.
pub struct Event {
    libraries: &'static Libraries,
    event: cuda::CUevent,
}

// SAFETY: the driver lets any thread use its handles.
unsafe impl Send for Event {}

impl Event {
    /// Whether all work before it is done; fails when that work failed.
    pub fn is_reached(&self) -> Result<bool, CollectiveCause> {
        // SAFETY: the event lives until this is dropped.
        match unsafe { (self.libraries.cuda.cuEventQuery)(self.event) } {
            cuda::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => driver("run an operation", result).map(|()| true),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `record` and given back once. There is nobody left to tell of an error.
        let _ = unsafe { (self.libraries.cuda.cuEventDestroy_v2)(self.event) };
    }
}

/// Turns a result of the driver into an error.
pub fn driver(what: &str, result: cuda::CUresult) -> Result<(), CollectiveCause> {
    match result {
        cuda::CUresult::CUDA_SUCCESS => Ok(()),
        error => Err(CollectiveCause::Device(format!("the CUDA driver failed to {what}: {error:?}"))),
    }
}
