//! The functions of NCCL and of the CUDA driver that are used, each looked up by name when its library is opened.
//!
//! The types come from cudarc; its own loader knows no library of the name `libnccl.so.2`, and panics where it finds none.
#![expect(unsafe_code, reason = "opens libraries and takes functions out of them")]
#![expect(non_snake_case, reason = "fields have the names of the C functions")]

use std::ffi::{c_char, c_int, c_uint, c_void};

#[cfg(test)]
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::sys::{CUcontext, CUdevice, CUevent, CUresult, CUstream};
use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId};
use libloading::{Error, Library};

/// Makes a struct with one function pointer for each C function, and its constructor from a library's name.
macro_rules! functions {
    ($(#[$about:meta])* $table:ident {
        $($(#[doc = $text:literal])* $(#[cfg($condition:meta)])? $name:ident($($argument:ty),*) -> $result:ty;)*
    }) => {
        $(#[$about])*
        pub struct $table {
            $($(#[doc = $text])* $(#[cfg($condition)])? pub $name: unsafe extern "C" fn($($argument),*) -> $result,)*
            /// Closed after the last use of its functions.
            _library: Library,
        }

        impl $table {
            /// Opens the library and finds every function, or says which one is missing.
            pub fn open(name: &str) -> Result<Self, Error> {
                // SAFETY: opening it runs the initialisers of NVIDIA's library and nothing of ours.
                let library = unsafe { Library::new(name) }?;
                Ok(Self {
                    // SAFETY: the types are those of the library's own header; the pointers live no longer than the library beside them.
                    $($(#[cfg($condition)])? $name: unsafe { *library.get(concat!(stringify!($name), "\0").as_bytes())? },)*
                    _library: library,
                })
            }
        }
    };
}

functions! {
    /// NCCL. Communicators do not block here: a call that returns `ncclSuccess` or `ncclInProgress` is accepted, any other result is an
    /// error. What is accepted runs on the stream later, and its errors show in `ncclCommGetAsyncError`. Memory is the device's and the
    /// caller's, and stays until the stream is past the operation. Counts are elements.
    NcclFunctions {
        /// Send, receive, count, type: every rank's `count` values, in rank order, for all ranks; the receiver holds `count` times the
        /// ranks. In place where a rank sends from its own part of the receiver.
        ncclAllGather(*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, cudaStream_t) -> ncclResult_t;
        /// Send, receive, count, type, operation: `count` values of every rank reduced, for all ranks. In place where both pointers are
        /// one.
        ncclAllReduce(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) -> ncclResult_t;
        /// Send, receive, count, type, root: `count` values of the root, for all ranks. Only the root's send pointer is read.
        ncclBroadcast(*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
        /// Ends a communicator with whatever it is doing, and frees it; the handle is invalid afterwards. May take long.
        ncclCommAbort(ncclComm_t) -> ncclResult_t;
        /// Writes what a communicator is at: in progress, done, or the error of something that was accepted earlier.
        ncclCommGetAsyncError(ncclComm_t, *mut ncclResult_t) -> ncclResult_t;
        /// Communicator, ranks, id, rank, settings: begins to form a communicator on the thread's current device and writes its handle,
        /// which `ncclCommAbort` frees. All ranks call it with the same id; forming it fails on a device that two ranks of a host use.
        ncclCommInitRankConfig(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> ncclResult_t;
        /// What a result means, NUL-terminated. The text is a constant of NCCL's.
        ncclGetErrorString(ncclResult_t) -> *const c_char;
        /// NCCL's last error in words, NUL-terminated; the communicator may be null. The text is NCCL's, and its next error replaces it.
        ncclGetLastError(ncclComm_t) -> *const c_char;
        /// Writes an id by which the ranks of one new communicator find each other; fails where no network interface can be used.
        ncclGetUniqueId(*mut ncclUniqueId) -> ncclResult_t;
        /// Closes the thread's group: what was called since it was opened begins together. Returns the first error of those calls.
        ncclGroupEnd() -> ncclResult_t;
        /// Opens a group of calls on the thread.
        ncclGroupStart() -> ncclResult_t;
        /// Receive, count, type, peer: `count` values that the peer sends with `ncclSend`. Deadlocks outside a group where both wait.
        ncclRecv(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
        /// Send, receive, count, type, operation, root: `count` values of every rank reduced, for the root. Only its receiver is written.
        ncclReduce(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
        /// Send, receive, count, type, operation: every rank sends `count` times the ranks, and gets the `count` reduced values of its own
        /// part. In place where a rank receives into that part of what it sends.
        ncclReduceScatter(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) -> ncclResult_t;
        /// Send, count, type, peer: `count` values for a peer that calls `ncclRecv`.
        ncclSend(*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
    }
}

functions! {
    /// The CUDA driver. A result other than `CUDA_SUCCESS` is an error, either of the call or of work that the device was given earlier.
    /// What is made in the thread's current context is freed by the call that is named.
    DriverFunctions {
        /// Makes a context the thread's current one; null leaves it without one.
        cuCtxSetCurrent(CUcontext) -> CUresult;
        /// Writes the handle of the device with a number, counted from 0; there is nothing to free. Fails where there is none.
        cuDeviceGet(*mut CUdevice, c_int) -> CUresult;
        /// Writes the number of devices.
        #[cfg(test)]
        cuDeviceGetCount(*mut c_int) -> CUresult;
        /// Gives one hold of the device's primary context back; the last one destroys it.
        cuDevicePrimaryCtxRelease_v2(CUdevice) -> CUresult;
        /// Writes the device's primary context, which libtorch uses too, and holds it until `cuDevicePrimaryCtxRelease_v2`.
        cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice) -> CUresult;
        /// Writes a new event with flags, to be freed by `cuEventDestroy_v2`.
        cuEventCreate(*mut CUevent, c_uint) -> CUresult;
        /// Frees an event, at once or as soon as it is reached; does not wait.
        cuEventDestroy_v2(CUevent) -> CUresult;
        /// Whether all work before an event is done: `CUDA_SUCCESS`, `CUDA_ERROR_NOT_READY`, or the error of that work.
        cuEventQuery(CUevent) -> CUresult;
        /// Puts an event behind what a stream was given so far. Both must be of one context.
        cuEventRecord(CUevent, CUstream) -> CUresult;
        /// Starts the driver, before anything else; the flags are 0. Fails where there is no device.
        cuInit(c_uint) -> CUresult;
        /// Writes the address of so many bytes of device memory, to be freed by `cuMemFree_v2`. Fails for 0 bytes and where there is too
        /// little.
        #[cfg(test)]
        cuMemAlloc_v2(*mut CUdeviceptr, usize) -> CUresult;
        /// Frees device memory.
        #[cfg(test)]
        cuMemFree_v2(CUdeviceptr) -> CUresult;
        /// Copies bytes from the device to the host, after what the default stream was given before; returns when they are there.
        #[cfg(test)]
        cuMemcpyDtoH_v2(*mut c_void, CUdeviceptr, usize) -> CUresult;
        /// Copies bytes from the host to the device; returns when the host's may be changed again.
        #[cfg(test)]
        cuMemcpyHtoD_v2(CUdeviceptr, *const c_void, usize) -> CUresult;
        /// Writes a new stream with flags, to be freed by `cuStreamDestroy_v2`.
        cuStreamCreate(*mut CUstream, c_uint) -> CUresult;
        /// Frees a stream once its work is done; does not wait.
        cuStreamDestroy_v2(CUstream) -> CUresult;
        /// Lets what a stream is given from now on wait for an event; the flags are 0. The event may be freed at once.
        cuStreamWaitEvent(CUstream, CUevent, c_uint) -> CUresult;
    }
}
