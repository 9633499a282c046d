// The C interface between Rust and the shim. Every function returns null or a non-zero status on an error, whose text cloze_error() gives.
// Tensors are `at::Tensor*`, the same pointers that tch holds; a returned pointer belongs to the caller.
//
// Shape legend: T tokens of a pack, B documents, H heads, D head width, E hidden width, F feed-forward width, V vocabulary, N labelled positions.
#pragma once
#include <ATen/ATen.h>
#include <cstdint>

extern "C" {
const char* cloze_error();

// ids [T] int64, weight [V, E] -> [T, E]. The gradient of the weight is added to `gradient` (may be null when no gradient is wanted).
at::Tensor* cloze_embed(const at::Tensor* ids_T, const at::Tensor* weight_VE, const at::Tensor* gradient_VE);

// x [T, I] times weight [O, I] transposed -> [T, O].
at::Tensor* cloze_linear(const at::Tensor* x_TI, const at::Tensor* weight_OI, const at::Tensor* gradient_OI);

// Layer norm over the last dimension, without bias.
at::Tensor* cloze_layer_norm(const at::Tensor* x_TE, const at::Tensor* weight_E, const at::Tensor* gradient_E, double epsilon);

// sum = x + delta and the layer norm of the sum, in one pass each way: results[0] is the sum, results[1] the norm.
int cloze_add_layer_norm(const at::Tensor* x_TE, const at::Tensor* delta_TE, const at::Tensor* weight_E, const at::Tensor* gradient_E, double epsilon,
                         at::Tensor** results);

// gelu(first half) * second half: [T, 2F] -> [T, F].
at::Tensor* cloze_geglu(const at::Tensor* x_T2F);

// Rotary position embedding and attention inside each document: qkv [T, 3HD] -> [T, HD].
// `window` is the number of tokens seen on each side, or -1 for all; `cu_lengths` [B+1] int32 lives on the device of qkv and
// `cu_lengths_host` holds the same numbers; cos and sin are [T, D/2] float32.
at::Tensor* cloze_attention(const at::Tensor* qkv_T3HD, const at::Tensor* cos, const at::Tensor* sin, const at::Tensor* cu_lengths,
                            const int32_t* cu_lengths_host, int64_t num_documents, int64_t num_heads, int64_t window, int force_plain);

// Sum over N of label_weight * cross entropy of (h weightᵀ + bias) against target, without keeping [N, V]; gradients of weight and bias are added
// to their buffers at once, scaled by one, so the result must be used as a plain sum (backward multiplies only h's gradient).
at::Tensor* cloze_head_loss(const at::Tensor* h_NE, const at::Tensor* weight_VE, const at::Tensor* bias_V, const at::Tensor* target_N,
                            const at::Tensor* label_weight_N, const at::Tensor* gradient_VE, const at::Tensor* gradient_V);

// One AdamW step on flat float32 buffers. `gradient_divisor` and `skip` are float32 scalars on the same device (no host synchronisation).
struct ClozeAdamW { double learning_rate, beta1, beta2, weight_decay, epsilon; };
int cloze_adamw(const at::Tensor* parameter, const at::Tensor* gradient, const at::Tensor* first_moment, const at::Tensor* second_moment,
                const at::Tensor* step, const ClozeAdamW* options, const at::Tensor* gradient_divisor, const at::Tensor* skip);

// Called during forward and backward passes about one parameter: 0 its value is about to be used by a matrix product, 1 its gradient is about
// to be added to, 2 its gradient is added. `storage` and `offset` say which: cloze_storage_of its buffer, and the place there. Every parameter's
// gradient is reported as added once in a backward pass, the shared embedding when its last part is added. A result other than 0 ends the
// pass with an error. The listener is that of the calling thread, and of the threads that run a backward pass started there.
typedef int (*cloze_pass_listener)(void* context, int what, const void* storage, int64_t offset);
int cloze_listen(cloze_pass_listener listener, void* context);
int cloze_listen_no_more();

// Names the memory behind a tensor and all its views.
const void* cloze_storage_of(const at::Tensor* tensor);
// Gives the memory behind a tensor back (hold 0) or takes it again, with unspecified content. All views stay valid, and may be used while the
// memory is held. `whole` covers its memory from the first to the last element.
int cloze_storage_hold(const at::Tensor* whole, int hold);

// Host memory of tensors, in bytes: the most that was in use since the last reset. A null account is that of the process; an open account is
// that of the allocations of the calling thread, wherever they are freed. Accounts live until the process ends.
void* cloze_account_open();
void cloze_account_close();
int64_t cloze_peak_bytes(const void* account);
void cloze_reset_peak(void* account);

// Keeps freed memory in the process instead of giving it back to the kernel after every step.
void cloze_keep_freed_memory();

// CUDA, reached through libc10's virtual interface, so that nothing here links CUDA. Returns 0, or 1 with cloze_error().
int cloze_cuda_open(const char* libtorch_cuda_path);
// From now on operations have the same result every time, or fail where they cannot; for the whole process.
int cloze_use_deterministic_algorithms();
// Copies a host tensor to a CUDA device through pinned memory, on a stream of its own: the copy overlaps with what the current stream computes,
// and later work of the current stream waits for it.
at::Tensor* cloze_copy_aside(const at::Tensor* host, int64_t device);
// Makes a device the current one of this thread and takes a little memory there, which shows whether it answers.
int cloze_cuda_set_device(int64_t device);
// An event behind all work queued so far on the device's current stream; cloze_event_wait blocks until it is reached.
void* cloze_event_record(int64_t device);
int cloze_event_wait(void* event);
void cloze_event_free(void* event);
int cloze_device_synchronize(int64_t device);
}
