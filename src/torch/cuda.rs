//! CUDA at run time: libtorch's CUDA half is opened when a recipe asks for a GPU, and never otherwise.
//!
//! libtorch remembers the answer to its first CUDA query, so [`open`] must run before anything asks.
#![expect(unsafe_code, reason = "calls into the C++ shim")]

use std::ffi::CString;
use std::path::{Path, PathBuf};

use cloze_recipes::failure::{Failure, FailureKind};
use tch::Device;

use super::sys;

/// Environment variable that names another `torch` folder than the one of the build, read by `worker_main`.
pub const TORCH_FOLDER_VARIABLE: &str = "CLOZE_TORCH";

/// Opens libtorch's CUDA half and checks that device `index` answers.
///
/// # Errors
/// [`FailureKind::Environment`] that names what is missing: the library, one of the libraries it needs, the driver or the device.
pub fn open(index: usize, torch_folder: Option<&Path>) -> Result<Device, Failure> {
    let library = library_path(torch_folder);
    if !library.exists() {
        return Err(missing("libtorch_cuda.so is not there", &library));
    }
    let real = library.canonicalize().unwrap_or_else(|_| library.clone());
    let text = CString::new(real.as_os_str().as_encoded_bytes()).map_err(|error| missing("bad library path", &library).because(error))?;
    // SAFETY: a NUL-terminated path; opening a library of the same PyTorch build runs its initialisers only.
    if unsafe { sys::cloze_cuda_open(text.as_ptr()) } != 0 {
        return Err(missing("libtorch_cuda.so could not be opened", &library).because(sys::error_text()));
    }
    let count = tch::Cuda::device_count();
    if count <= index as i64 {
        let failure = missing("the recipe asks for a GPU that is not there", &library);
        return Err(failure.expected(format!("CUDA device {index}")).found(format!("{count} CUDA devices")));
    }
    // SAFETY: no pointers are passed.
    let status = unsafe { sys::cloze_cuda_set_device(index as i64) };
    if status != 0 {
        return Err(missing("the GPU does not answer", &library).at(format!("CUDA device {index}")).because(sys::error_text()));
    }
    Ok(Device::Cuda(index))
}

/// Lets operations give the same bits every time; those that cannot fail from now on. For the whole process. cuBLAS needs a setting of the
/// environment besides, which the launcher gives every worker.
///
/// # Errors
/// What libtorch says against it.
pub fn use_deterministic_algorithms() -> anyhow::Result<()> {
    // SAFETY: no pointers are passed.
    sys::checked("choose deterministic algorithms", unsafe { sys::cloze_use_deterministic_algorithms() })
}

/// Waits until all work of a device is done; for timings.
///
/// # Errors
/// The first error of that work, such as a kernel that failed.
pub fn synchronize(device: Device) -> anyhow::Result<()> {
    let Device::Cuda(index) = device else { return Ok(()) };
    // SAFETY: no pointers are passed.
    sys::checked("wait for the GPU", unsafe { sys::cloze_device_synchronize(index as i64) })
}

fn library_path(torch_folder: Option<&Path>) -> PathBuf {
    match torch_folder {
        Some(folder) => folder.join("lib/libtorch_cuda.so"),
        None => Path::new(env!("CLOZE_LIBTORCH")).join("cuda/libtorch_cuda.so"),
    }
}

fn missing(what: &str, library: &Path) -> Failure {
    Failure::new(FailureKind::Environment, what)
        .at(library.display())
        .hint("a GPU run needs a full PyTorch 2.11 environment: set CLOZE_TORCH to its torch folder, or say `--set train.device=cpu`")
}
