// CPU kernels of the shim; see kernels.hpp. Results do not depend on the number of threads: every output element is computed by one thread in one order.
#include "kernels.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

// One binary serves every x86-64 machine: the loader picks the widest clone that the processor runs.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONED
#endif

namespace kernels {
namespace {

// e^x by 2^n * polynomial (degree 6, relative error below 2 units in the last place); arguments below -87 give 0.
inline float exponential(float x) {
    const float clamped = std::min(std::max(x, -87.3f), 88.3f);
    const float n = std::nearbyint(clamped * 1.44269504088896341f);
    float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < -87.3f ? 0.0f : p * scale;
}

// Cumulative normal distribution at x and the density's exponential e^(-x²/2), which the derivative of gelu needs as well.
// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
inline float normal_cdf(float x, float gaussian) {
    const float z = std::fabs(x) * 0.70710678118654752f;
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float tail = 0.5f * p * t * gaussian;
    return x < 0.0f ? tail : 1.0f - tail;
}

CLONED void geglu_forward_row(const float* __restrict__ input, const float* __restrict__ gate, float* __restrict__ y, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        const float x = input[i];
        y[i] = x * normal_cdf(x, exponential(-0.5f * x * x)) * gate[i];
    }
}

struct GegluRow { const float *input, *gate, *upstream; float *dinput, *dgate; };

CLONED void geglu_backward_row(const GegluRow& row, int64_t width) {
    const float* __restrict__ input = row.input;
    const float* __restrict__ gate = row.gate;
    const float* __restrict__ upstream = row.upstream;
    float* __restrict__ dinput = row.dinput;
    float* __restrict__ dgate = row.dgate;
    for (int64_t i = 0; i < width; ++i) {
        const float x = input[i], gaussian = exponential(-0.5f * x * x), cdf = normal_cdf(x, gaussian);
        dinput[i] = upstream[i] * gate[i] * (cdf + x * gaussian * 0.39894228040143268f);
        dgate[i] = upstream[i] * x * cdf;
    }
}

CLONED void rotate_head(float* __restrict__ x, const float* __restrict__ cosine, const float* __restrict__ sine, int64_t half, float direction) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half], c = cosine[i], s = direction * sine[i];
        x[i] = a * c - b * s;
        x[i + half] = b * c + a * s;
    }
}

CLONED void add_row(float* __restrict__ to, const float* __restrict__ from, int64_t width) {
    for (int64_t i = 0; i < width; ++i) to[i] += from[i];
}

CLONED float row_maximum(const float* __restrict__ x, int64_t width) {
    float lanes[16];
    std::fill(lanes, lanes + 16, -INFINITY);
    int64_t i = 0;
    for (; i + 16 <= width; i += 16)
        for (int lane = 0; lane < 16; ++lane) lanes[lane] = lanes[lane] > x[i + lane] ? lanes[lane] : x[i + lane];
    float maximum = *std::max_element(lanes, lanes + 16);
    for (; i < width; ++i) maximum = std::max(maximum, x[i]);
    return maximum;
}

// x becomes e^(x - maximum); returns the sum, kept in 16 lanes so that its order is fixed.
CLONED double row_exponentials(float* __restrict__ x, float maximum, int64_t width) {
    float lanes[16] = {};
    double sum = 0;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16)
        for (int lane = 0; lane < 16; ++lane) {
            const float e = exponential(x[i + lane] - maximum);
            x[i + lane] = e;
            lanes[lane] += e;
        }
    for (; i < width; ++i) {
        x[i] = exponential(x[i] - maximum);
        sum += x[i];
    }
    for (float lane : lanes) sum += lane;
    return sum;
}

CLONED void scale_row(float* __restrict__ x, float factor, int64_t width) {
    for (int64_t i = 0; i < width; ++i) x[i] *= factor;
}

// Rows per task: enough work to be worth a thread.
constexpr int64_t grain_elements = 16 * 1024;
int64_t grain_rows(int64_t width) { return std::max<int64_t>(1, grain_elements / std::max<int64_t>(1, width)); }

}  // namespace

void scatter_add_rows(float* gradient, const int64_t* ids, const float* upstream, int64_t num_tokens, int64_t width) {
    constexpr int64_t columns = 32;  // two cache lines, so that threads do not share one
    at::parallel_for(0, (width + columns - 1) / columns, 1, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * columns, count = std::min(width, end * columns) - first;
        for (int64_t t = 0; t < num_tokens; ++t) add_row(gradient + ids[t] * width + first, upstream + t * width + first, count);
    });
}

void geglu_forward(const float* x, float* y, int64_t rows, int64_t width) {
    at::parallel_for(0, rows, grain_rows(width), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) geglu_forward_row(x + 2 * r * width, x + (2 * r + 1) * width, y + r * width, width);
    });
}

void geglu_backward(const float* x, const float* upstream, float* dx, int64_t rows, int64_t width) {
    at::parallel_for(0, rows, grain_rows(width), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t input = 2 * r * width, gate = input + width;
            geglu_backward_row({x + input, x + gate, upstream + r * width, dx + input, dx + gate}, width);
        }
    });
}

void rotate(float* qkv, const float* cosine, const float* sine, const RotaryShape& shape, float direction) {
    const int64_t half = shape.head_width / 2, token_width = 3 * shape.num_heads * shape.head_width;
    at::parallel_for(0, shape.num_tokens, grain_rows(token_width), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            for (int64_t head = 0; head < 2 * shape.num_heads; ++head)  // q heads, then k heads
                rotate_head(qkv + t * token_width + head * shape.head_width, cosine + t * half, sine + t * half, half, direction);
    });
}

double cross_entropy_in_place(float* logits, const int64_t* target, const float* weight, int64_t rows, int64_t vocabulary) {
    std::vector<double> losses(rows);
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            float* row = logits + r * vocabulary;
            const float maximum = row_maximum(row, vocabulary), at_target = row[target[r]];
            const double sum = row_exponentials(row, maximum, vocabulary);
            losses[r] = weight[r] * (std::log(sum) + maximum - at_target);
            scale_row(row, static_cast<float>(weight[r] / sum), vocabulary);
            row[target[r]] -= weight[r];
        }
    });
    double total = 0;
    for (double loss : losses) total += loss;
    return total;
}

}  // namespace kernels
