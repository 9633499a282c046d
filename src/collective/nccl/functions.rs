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
    ($(#[$about:meta])* $table:ident { $($(#[$attribute:meta])* $name:ident($($argument:ty),*) -> $result:ty;)* }) => {
        $(#[$about])*
        pub struct $table {
            $($(#[$attribute])* pub $name: unsafe extern "C" fn($($argument),*) -> $result,)*
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
                    $($(#[$attribute])* $name: unsafe { *library.get(concat!(stringify!($name), "\0").as_bytes())? },)*
                    _library: library,
                })
            }
        }
    };
}

functions! {
    /// NCCL.
    NcclFunctions {
        ncclAllGather(*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, cudaStream_t) -> ncclResult_t;
        ncclAllReduce(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) -> ncclResult_t;
        ncclBroadcast(*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
        ncclCommAbort(ncclComm_t) -> ncclResult_t;
        ncclCommGetAsyncError(ncclComm_t, *mut ncclResult_t) -> ncclResult_t;
        ncclCommInitRankConfig(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> ncclResult_t;
        ncclGetErrorString(ncclResult_t) -> *const c_char;
        ncclGetLastError(ncclComm_t) -> *const c_char;
        ncclGetUniqueId(*mut ncclUniqueId) -> ncclResult_t;
        ncclGroupEnd() -> ncclResult_t;
        ncclGroupStart() -> ncclResult_t;
        ncclReduce(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
        ncclReduceScatter(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) -> ncclResult_t;
    }
}

functions! {
    /// The CUDA driver.
    DriverFunctions {
        cuCtxSetCurrent(CUcontext) -> CUresult;
        cuDeviceGet(*mut CUdevice, c_int) -> CUresult;
        #[cfg(test)]
        cuDeviceGetCount(*mut c_int) -> CUresult;
        cuDevicePrimaryCtxRelease_v2(CUdevice) -> CUresult;
        cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice) -> CUresult;
        cuEventCreate(*mut CUevent, c_uint) -> CUresult;
        cuEventDestroy_v2(CUevent) -> CUresult;
        cuEventQuery(CUevent) -> CUresult;
        cuEventRecord(CUevent, CUstream) -> CUresult;
        cuInit(c_uint) -> CUresult;
        #[cfg(test)]
        cuMemAlloc_v2(*mut CUdeviceptr, usize) -> CUresult;
        #[cfg(test)]
        cuMemFree_v2(CUdeviceptr) -> CUresult;
        #[cfg(test)]
        cuMemcpyDtoH_v2(*mut c_void, CUdeviceptr, usize) -> CUresult;
        #[cfg(test)]
        cuMemcpyHtoD_v2(CUdeviceptr, *const c_void, usize) -> CUresult;
        cuStreamCreate(*mut CUstream, c_uint) -> CUresult;
        cuStreamDestroy_v2(CUstream) -> CUresult;
        cuStreamWaitEvent(CUstream, CUevent, c_uint) -> CUresult;
    }
}
