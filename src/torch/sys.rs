//! The C interface of the shim, as `shim.hpp` declares it, and the one place that turns its error texts into errors.
#![expect(unsafe_code, reason = "declarations of the C++ shim")]

use std::ffi::{CStr, c_char, c_int, c_void};

use anyhow::{Result, bail};
use tch::Tensor;

/// An `at::Tensor*` as tch hands it out.
pub type Raw = *mut torch_sys::C_tensor;
/// The same, not written through.
pub type RawConst = *const torch_sys::C_tensor;

/// Numbers of one `AdamW` step, in the layout of `ClozeAdamW`.
#[repr(C)]
pub struct AdamWOptions {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
}

/// Called with the context, what happens, and the memory and place of a parameter; a result other than 0 ends the pass.
pub type PassListener = extern "C" fn(*mut c_void, c_int, *const c_void, i64) -> c_int;

unsafe extern "C" {
    fn cloze_error() -> *const c_char;
    pub fn cloze_embed(ids: RawConst, weight: RawConst, gradient: RawConst) -> Raw;
    pub fn cloze_linear(x: RawConst, weight: RawConst, gradient: RawConst) -> Raw;
    pub fn cloze_layer_norm(x: RawConst, weight: RawConst, gradient: RawConst, epsilon: f64) -> Raw;
    pub fn cloze_add_layer_norm(
        x: RawConst,
        delta: RawConst,
        weight: RawConst,
        gradient: RawConst,
        epsilon: f64,
        results: *mut Raw,
    ) -> c_int;
    pub fn cloze_geglu(x: RawConst) -> Raw;
    pub fn cloze_attention(
        qkv: RawConst,
        cos: RawConst,
        sin: RawConst,
        cu_lengths: RawConst,
        cu_lengths_host: *const i32,
        num_documents: i64,
        num_heads: i64,
        window: i64,
        force_plain: c_int,
    ) -> Raw;
    pub fn cloze_head_loss(
        h: RawConst,
        weight: RawConst,
        bias: RawConst,
        target: RawConst,
        label_weight: RawConst,
        gradient: RawConst,
        bias_gradient: RawConst,
    ) -> Raw;
    pub fn cloze_adamw(
        parameter: RawConst,
        gradient: RawConst,
        first_moment: RawConst,
        second_moment: RawConst,
        step: RawConst,
        options: *const AdamWOptions,
        gradient_divisor: RawConst,
        skip: RawConst,
    ) -> c_int;
    pub fn cloze_listen(listener: PassListener, context: *mut c_void) -> c_int;
    pub fn cloze_listen_no_more() -> c_int;
    pub fn cloze_storage_of(tensor: RawConst) -> *const c_void;
    pub fn cloze_storage_hold(whole: RawConst, hold: c_int) -> c_int;
    #[cfg(test)]
    pub fn cloze_account_open() -> *mut c_void;
    #[cfg(test)]
    pub fn cloze_account_close();
    pub fn cloze_peak_bytes(account: *const c_void) -> i64;
    pub fn cloze_reset_peak(account: *mut c_void);
    pub fn cloze_copy_aside(host: RawConst, device: i64) -> Raw;
    pub fn cloze_keep_freed_memory();
    pub fn cloze_cuda_open(libtorch_cuda_path: *const c_char) -> c_int;
    pub fn cloze_event_record(device: i64) -> *mut c_void;
    pub fn cloze_event_wait(event: *mut c_void) -> c_int;
    pub fn cloze_event_free(event: *mut c_void);
    pub fn cloze_cuda_set_device(device: i64) -> c_int;
    pub fn cloze_device_synchronize(device: i64) -> c_int;
}

/// The pointer of a tensor that may be absent.
pub fn pointer(tensor: Option<&Tensor>) -> RawConst {
    tensor.map_or(std::ptr::null(), Tensor::as_ptr)
}

/// Takes ownership of a tensor that the shim returned.
pub fn owned(operation: &str, raw: Raw) -> Result<Tensor> {
    if raw.is_null() {
        bail!("{operation}: {}", error_text());
    }
    // SAFETY: the shim returns a pointer made by `new at::Tensor` that nobody else holds.
    Ok(unsafe { Tensor::from_ptr(raw) })
}

/// Turns a status of the shim into an error.
pub fn checked(operation: &str, status: c_int) -> Result<()> {
    if status != 0 {
        bail!("{operation}: {}", error_text());
    }
    Ok(())
}

/// Text of this thread's last shim error.
pub fn error_text() -> String {
    // SAFETY: cloze_error returns a NUL-terminated string that lives until the thread's next shim error.
    let text = unsafe { CStr::from_ptr(cloze_error()) };
    text.to_string_lossy().lines().next().unwrap_or_default().to_owned()
}
