// CPU kernels of the shim: plain loops that the compiler vectorises, cloned for the instruction sets in use.
#pragma once
#include <cstdint>

namespace kernels {

// gradient[ids[t]] += upstream[t]; columns are shared among threads, so every sum has one order.
void scatter_add_rows(float* gradient, const int64_t* ids, const float* upstream, int64_t num_tokens, int64_t width);

// x [rows, 2 width] -> y [rows, width] = gelu(x[:, :width]) * x[:, width:], with the exact (erf) gelu.
void geglu_forward(const float* x, float* y, int64_t rows, int64_t width);
void geglu_backward(const float* x, const float* upstream, float* dx, int64_t rows, int64_t width);

// Rotates q and k of qkv [tokens, 3, heads, width] in place by the angles whose cosine and sine are [tokens, width / 2];
// direction -1 undoes it, which is also the gradient.
struct RotaryShape { int64_t num_tokens, num_heads, head_width; };
void rotate(float* qkv, const float* cosine, const float* sine, const RotaryShape& shape, float direction);

// Each row of logits becomes weight * (softmax - one hot); returns the sum of weight * cross entropy.
double cross_entropy_in_place(float* logits, const int64_t* target, const float* weight, int64_t rows, int64_t vocabulary);

}  // namespace kernels
