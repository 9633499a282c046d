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

// Tensors that come in are borrowed for the call; the shim keeps references of its own to what it needs longer. A tensor that is returned
// is the caller's, and `owned` takes it. On an error a function returns null or a status other than 0, and `cloze_error` has the text.
// Shapes have the letters of `ops.rs`.
unsafe extern "C" {
    /// Text of the calling thread's last error, empty before the first. The shim frees it; it lives until the thread's next error.
    fn cloze_error() -> *const c_char;

    /// Rows of the weight `[V, E]` for ids `[T]` int64: a new tensor `[T, E]`, or null. The backward pass adds the weight's gradient to
    /// `gradient` `[V, E]`, which may be null where none is wanted.
    pub fn cloze_embed(ids: RawConst, weight: RawConst, gradient: RawConst) -> Raw;

    /// `x [T, I]` times the weight `[O, I]` transposed: a new tensor `[T, O]`, or null. The backward pass adds the weight's gradient to
    /// `gradient` `[O, I]`, which may be null.
    pub fn cloze_linear(x: RawConst, weight: RawConst, gradient: RawConst) -> Raw;

    /// Layer norm of `x [T, E]` over E with the weight `[E]` and no bias: a new tensor `[T, E]`, or null. `epsilon` is added to the
    /// variance. The backward pass adds the weight's gradient to `gradient` `[E]`, which may be null.
    pub fn cloze_layer_norm(x: RawConst, weight: RawConst, gradient: RawConst, epsilon: f64) -> Raw;

    /// The sum of `x` and `delta`, both `[T, E]`, and its layer norm as in `cloze_layer_norm`. Writes two new tensors `[T, E]`, sum and
    /// norm, to `results`, which has room for two; returns 0, or 1 and writes none.
    pub fn cloze_add_layer_norm(
        x: RawConst,
        delta: RawConst,
        weight: RawConst,
        gradient: RawConst,
        epsilon: f64,
        results: *mut Raw,
    ) -> c_int;

    /// `gelu(first half) * second half` of `x [T, 2F]`: a new tensor `[T, F]`, or null.
    pub fn cloze_geglu(x: RawConst) -> Raw;

    /// Rotary embedding and attention inside each document, of `qkv [T, 3HD]`: a new tensor `[T, HD]`, or null. `cos` and `sin` are float32,
    /// `[T, D/2]`. The documents' bounds in tokens, `num_documents + 1` numbers from 0 to T, stand in `cu_lengths`, int32 on the device of
    /// `qkv`, and once more in `cu_lengths_host`, which is copied. `window` is the number of tokens seen on each side, -1 for all;
    /// `force_plain` other than 0 takes the path of plain matrix products.
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

    /// Sum over N of `label_weight [N]` float32 times the cross entropy of `h [N, E]` times the weight `[V, E]` transposed plus `bias [V]`,
    /// against `target [N]` int64: a new float32 scalar, or null. The gradients of weight and bias are added to `gradient [V, E]` and
    /// `bias_gradient [V]` in this very call, as those of the plain sum; not where `gradient` is null or no graph is kept.
    pub fn cloze_head_loss(
        h: RawConst,
        weight: RawConst,
        bias: RawConst,
        target: RawConst,
        label_weight: RawConst,
        gradient: RawConst,
        bias_gradient: RawConst,
    ) -> Raw;

    /// One `AdamW` step in place on flat float32 buffers of one length; the gradient is divided in place too. `step` (from 1),
    /// `gradient_divisor` and `skip` (1 changes nothing) are float32 scalars on the same device, so that the host waits for none of
    /// them. `options` is read during the call. Returns 0, or 1.
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

    /// Tells `listener` of the passes that the calling thread runs, backward passes on libtorch's threads included. `context` must live
    /// until `cloze_listen_no_more`. Returns 0, or 1.
    pub fn cloze_listen(listener: PassListener, context: *mut c_void) -> c_int;

    /// Takes away the listener that the calling thread has set last. Returns 0, or 1 where there is none.
    pub fn cloze_listen_no_more() -> c_int;

    /// Names the memory behind a tensor and all its views. Nothing is to be read there or freed. Cannot fail.
    pub fn cloze_storage_of(tensor: RawConst) -> *const c_void;

    /// Frees the memory behind a tensor that covers the whole of it (`hold` 0), or takes it again with unspecified content. Views stay
    /// valid. Returns 0, or 1 where the memory is not the tensor's own or cannot be had.
    pub fn cloze_storage_hold(whole: RawConst, hold: c_int) -> c_int;

    /// A new account of the host memory of tensors that the calling thread makes from now on. It lives until the process ends. Cannot fail.
    #[cfg(test)]
    pub fn cloze_account_open() -> *mut c_void;

    /// The calling thread's tensors count for no account any more. Cannot fail.
    #[cfg(test)]
    pub fn cloze_account_close();

    /// The most bytes in use at a time since the account's last reset; a null account is that of the process. Cannot fail.
    pub fn cloze_peak_bytes(account: *const c_void) -> i64;

    /// Lets an account's peak begin again at what is in use; a null account is that of the process. Cannot fail.
    pub fn cloze_reset_peak(account: *mut c_void);

    /// Copies a host tensor to CUDA device number `device` through pinned memory: a new tensor there, or null. Does not wait for the copy;
    /// work that the current stream is given later does.
    pub fn cloze_copy_aside(host: RawConst, device: i64) -> Raw;

    /// Lets the process keep memory that it frees, for the next step; for good. Cannot fail.
    pub fn cloze_keep_freed_memory();

    /// Opens libtorch's CUDA half at a NUL-terminated path, which is read during the call; for good. Returns 0, or 1 where it or something
    /// that it needs cannot be loaded.
    pub fn cloze_cuda_open(libtorch_cuda_path: *const c_char) -> c_int;

    /// Makes operations of this process repeatable, bit by bit; those that cannot be fail from now on. Returns 0, or 1.
    pub fn cloze_use_deterministic_algorithms() -> c_int;

    /// A new event behind all work that the current stream of CUDA device number `device` was given so far, to be freed by
    /// `cloze_event_free`; null on an error.
    pub fn cloze_event_record(device: i64) -> *mut c_void;

    /// Blocks until an event is reached. Returns 0, or 1 where the work before it failed.
    pub fn cloze_event_wait(event: *mut c_void) -> c_int;

    /// Frees an event, once; null is none. Cannot fail.
    pub fn cloze_event_free(event: *mut c_void);

    /// Makes CUDA device number `device` the calling thread's current one. Returns 0, or 1 where it is not there or has no memory left.
    pub fn cloze_cuda_set_device(device: i64) -> c_int;

    /// Blocks until all work of CUDA device number `device` is done. Returns 0, or 1 where some of it failed.
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
