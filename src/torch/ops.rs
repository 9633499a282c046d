//! Operations over packed tokens with gradients, as safe functions.
//!
//! Shape legend: T tokens of a pack, H heads, D head width, E hidden width, F feed-forward width, V vocabulary, N labelled positions,
//! I and O the input and output width of a matrix.
#![expect(unsafe_code, reason = "calls into the C++ shim")]

use anyhow::Result;
use tch::Tensor;

use super::sys;

/// A weight as the operations see it: its value, and the buffer that its gradient is added to.
#[derive(Debug)]
pub struct Parameter {
    /// Value in the compute precision.
    pub value: Tensor,
    /// Float32 view into the flat gradient buffer; `None` where no gradient is wanted.
    pub gradient: Option<Tensor>,
}

/// Where the documents of a pack lie and how far its tokens are rotated.
#[derive(Debug)]
pub struct AttentionPlan<'a> {
    /// Cosines of the rotary angles, `[T, D/2]` float32.
    pub cos: &'a Tensor,
    /// Sines of the rotary angles, `[T, D/2]` float32.
    pub sin: &'a Tensor,
    /// Document boundaries `[B+1]` int32 on the device.
    pub cu_lengths: &'a Tensor,
    /// The same numbers on the host.
    pub cu_lengths_host: &'a [i32],
    /// Number of heads.
    pub num_heads: i64,
    /// Tokens seen on each side; `None` is the whole document.
    pub window: Option<i64>,
    /// Takes the plain path wherever it runs; the reference of the tests.
    pub force_plain: bool,
}

/// Rows of the embedding `[V, E]` for ids `[T]` int64 -> `[T, E]`.
pub fn embed(ids: &Tensor, weight: &Parameter) -> Result<Tensor> {
    // SAFETY: all pointers come from live tensors; the shim keeps its own references.
    sys::owned("embed", unsafe { sys::cloze_embed(ids.as_ptr(), weight.value.as_ptr(), sys::pointer(weight.gradient.as_ref())) })
}

/// `x [T, I]` times weight `[O, I]` transposed -> `[T, O]`.
pub fn linear(x: &Tensor, weight: &Parameter) -> Result<Tensor> {
    // SAFETY: as in `embed`.
    sys::owned("linear", unsafe { sys::cloze_linear(x.as_ptr(), weight.value.as_ptr(), sys::pointer(weight.gradient.as_ref())) })
}

/// Layer norm over the last dimension, without bias.
pub fn layer_norm(x: &Tensor, weight: &Parameter, epsilon: f64) -> Result<Tensor> {
    // SAFETY: as in `embed`.
    sys::owned("layer norm", unsafe {
        sys::cloze_layer_norm(x.as_ptr(), weight.value.as_ptr(), sys::pointer(weight.gradient.as_ref()), epsilon)
    })
}

/// `x + delta` and its layer norm.
pub fn add_layer_norm(x: &Tensor, delta: &Tensor, weight: &Parameter, epsilon: f64) -> Result<(Tensor, Tensor)> {
    let mut results = [std::ptr::null_mut(); 2];
    // SAFETY: as in `embed`; `results` has room for the two tensors that the shim writes.
    let status = unsafe {
        let gradient = sys::pointer(weight.gradient.as_ref());
        sys::cloze_add_layer_norm(x.as_ptr(), delta.as_ptr(), weight.value.as_ptr(), gradient, epsilon, results.as_mut_ptr())
    };
    sys::checked("add layer norm", status)?;
    Ok((sys::owned("add layer norm", results[0])?, sys::owned("add layer norm", results[1])?))
}

/// `gelu(first half) * second half`: `[T, 2F]` -> `[T, F]`.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    // SAFETY: as in `embed`.
    sys::owned("geglu", unsafe { sys::cloze_geglu(x.as_ptr()) })
}

/// Rotary embedding and attention inside each document: `[T, 3HD]` -> `[T, HD]`.
pub fn attention(qkv: &Tensor, plan: &AttentionPlan) -> Result<Tensor> {
    let num_documents = plan.cu_lengths_host.len() as i64 - 1;
    // SAFETY: as in `embed`; the boundary array holds `num_documents + 1` numbers and is only read during the call.
    sys::owned("attention", unsafe {
        sys::cloze_attention(
            qkv.as_ptr(),
            plan.cos.as_ptr(),
            plan.sin.as_ptr(),
            plan.cu_lengths.as_ptr(),
            plan.cu_lengths_host.as_ptr(),
            num_documents,
            plan.num_heads,
            plan.window.unwrap_or(-1),
            i32::from(plan.force_plain),
        )
    })
}

/// What the head is scored against.
#[derive(Debug)]
pub struct Targets {
    /// Token to predict, `[N]` int64.
    pub token: Tensor,
    /// Weight of each position in the sum, `[N]` float32.
    pub weight: Tensor,
}

/// Weighted sum over N of the cross entropy of `h weightᵀ + bias`, without keeping `[N, V]`. The gradients of weight and bias are those of the
/// plain sum, so the result must reach the loss with factor one.
pub fn head_loss(h: &Tensor, weight: &Parameter, bias: &Parameter, targets: &Targets) -> Result<Tensor> {
    // SAFETY: as in `embed`.
    sys::owned("head loss", unsafe {
        sys::cloze_head_loss(
            h.as_ptr(),
            weight.value.as_ptr(),
            bias.value.as_ptr(),
            targets.token.as_ptr(),
            targets.weight.as_ptr(),
            sys::pointer(weight.gradient.as_ref()),
            sys::pointer(bias.gradient.as_ref()),
        )
    })
}

/// Flat buffers that one `AdamW` step reads and writes; all float32 on one device.
#[derive(Debug)]
pub struct AdamWBuffers<'a> {
    /// Parameters, updated.
    pub parameter: &'a Tensor,
    /// Gradients, divided in place.
    pub gradient: &'a Tensor,
    /// First moment, updated.
    pub first_moment: &'a Tensor,
    /// Second moment, updated.
    pub second_moment: &'a Tensor,
    /// Number of this step from 1, a float32 scalar; not changed.
    pub step: &'a Tensor,
    /// Gradients are divided by this scalar first.
    pub gradient_divisor: &'a Tensor,
    /// 1 leaves everything as it is, 0 takes the step; a float32 scalar.
    pub skip: &'a Tensor,
}

pub use sys::AdamWOptions;

/// One fused `AdamW` step; reads nothing back to the host.
pub fn adamw(buffers: &AdamWBuffers, options: &AdamWOptions) -> Result<()> {
    // SAFETY: as in `embed`; `options` is only read during the call.
    let status = unsafe {
        sys::cloze_adamw(
            buffers.parameter.as_ptr(),
            buffers.gradient.as_ptr(),
            buffers.first_moment.as_ptr(),
            buffers.second_moment.as_ptr(),
            buffers.step.as_ptr(),
            options,
            buffers.gradient_divisor.as_ptr(),
            buffers.skip.as_ptr(),
        )
    };
    sys::checked("adamw", status)
}
