// Attention over packed documents: every document attends to itself only, globally or within a window. Three paths compute the same function:
// flash attention with variable lengths (CUDA, 16-bit), ATen's flash kernel document by document (CPU, float32), and plain matrix products
// (anything else, and the reference that the tests compare with).
#include "kernels.hpp"
#include "shim.hpp"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::tensor_list;

namespace attention {
namespace {

// Queries of one block of a local layer on a CPU: wide enough for efficient products, narrow enough that little outside the band is computed.
constexpr int64_t block_queries = 128;

// A run of queries and the keys they may see, as token positions in the pack. `banded` blocks need the window's mask as well.
struct Block {
    int64_t query_begin, query_end, key_begin, key_end;
    bool banded;
    int64_t queries() const { return query_end - query_begin; }
    int64_t keys() const { return key_end - key_begin; }
};

std::vector<Block> blocks_of_document(int64_t begin, int64_t end, int64_t window) {
    if (window < 0 || end - begin <= window + 1) return {{begin, end, begin, end, false}};
    std::vector<Block> blocks;
    for (int64_t query = begin; query < end; query += block_queries) {
        const int64_t query_end = std::min(end, query + block_queries);
        blocks.push_back({query, query_end, std::max(begin, query - window), std::min(end, query_end + window), true});
    }
    return blocks;
}

// 0 where the query of a row may see the key of a column and -inf elsewhere, for a block whose keys begin `window` before its queries.
Tensor band_mask(int64_t window, const Tensor& like) {
    const auto options = at::TensorOptions().device(like.device()).dtype(at::kLong);
    const Tensor distance = at::arange(block_queries, options).unsqueeze(1) + window - at::arange(block_queries + 2 * window, options).unsqueeze(0);
    return at::zeros(distance.sizes(), like.options().dtype(at::kFloat)).masked_fill_(distance.abs() > window, -INFINITY);
}

std::optional<Tensor> mask_of(const Block& block, const Tensor& band, int64_t window) {
    if (!block.banded) return std::nullopt;
    const int64_t offset = window - (block.query_begin - block.key_begin);
    return band.narrow(0, 0, block.queries()).narrow(1, offset, block.keys());
}

// One piece of work of the CPU path: some heads of one document.
struct Item { int64_t document, head_begin, head_end; };

// Documents in order of falling cost, the expensive ones head by head, so that threads that take the next item finish together.
std::vector<Item> items(const std::vector<int64_t>& cu, int64_t num_heads, int64_t window) {
    const int64_t num_documents = static_cast<int64_t>(cu.size()) - 1;
    const auto cost = [&](int64_t d) {
        const int64_t length = cu[d + 1] - cu[d];
        return length * (window < 0 ? length : std::min(length, block_queries + 2 * window));
    };
    std::vector<int64_t> order(num_documents);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
    int64_t total = 0;
    for (int64_t d : order) total += cost(d);
    std::vector<Item> result;
    for (int64_t d : order) {
        const bool split = cost(d) * 8 * at::get_num_threads() > total;
        for (int64_t head = 0; head < num_heads; head += split ? 1 : num_heads) result.push_back({d, head, split ? head + 1 : num_heads});
    }
    return result;
}

// Runs every item once; a thread that is done takes the next one.
template <class F>
void for_each_item(const std::vector<Item>& work, F run) {
    std::atomic<size_t> next{0};
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(work.size()));
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        for (size_t i = next++; i < work.size(); i = next++) run(work[i], i);
    });
}

// tokens [T, H, D] -> the heads and tokens of a block as [1, heads, tokens, D], without a copy.
Tensor piece(const Tensor& x_THD, int64_t begin, int64_t end, const Item& item) {
    return x_THD.narrow(0, begin, end - begin).narrow(1, item.head_begin, item.head_end - item.head_begin).transpose(0, 1).unsqueeze(0);
}

struct Shape { std::vector<int64_t> cu; int64_t window; double scale; };

struct CpuForward { Tensor out_THD; std::vector<Tensor> normalisers; };

CpuForward cpu_forward(const Tensor& rotated_T3HD, const Shape& shape) {
    const Tensor q = rotated_T3HD.select(1, 0), k = rotated_T3HD.select(1, 1), v = rotated_T3HD.select(1, 2);
    const Tensor band = shape.window >= 0 ? band_mask(shape.window, q) : Tensor();
    const auto work = items(shape.cu, q.size(1), shape.window);
    CpuForward result{at::empty(q.sizes(), q.options()), {}};
    std::vector<std::vector<Tensor>> normalisers(work.size());
    for_each_item(work, [&](const Item& item, size_t index) {
        for (const Block& block : blocks_of_document(shape.cu[item.document], shape.cu[item.document + 1], shape.window)) {
            auto [out, normaliser] = at::_scaled_dot_product_flash_attention_for_cpu(
                piece(q, block.query_begin, block.query_end, item), piece(k, block.key_begin, block.key_end, item),
                piece(v, block.key_begin, block.key_end, item), 0.0, false, mask_of(block, band, shape.window), shape.scale);
            piece(result.out_THD, block.query_begin, block.query_end, item).copy_(out);
            normalisers[index].push_back(normaliser);
        }
    });
    for (auto& of_item : normalisers) result.normalisers.insert(result.normalisers.end(), of_item.begin(), of_item.end());
    return result;
}

Tensor cpu_backward(const Tensor& upstream_THD, const Tensor& rotated_T3HD, const CpuForward& forward, const Shape& shape) {
    const Tensor q = rotated_T3HD.select(1, 0), k = rotated_T3HD.select(1, 1), v = rotated_T3HD.select(1, 2);
    const Tensor band = shape.window >= 0 ? band_mask(shape.window, q) : Tensor();
    const auto work = items(shape.cu, q.size(1), shape.window);
    std::vector<size_t> first_normaliser(work.size());
    size_t count = 0;
    for (size_t i = 0; i < work.size(); ++i) {
        first_normaliser[i] = count;
        count += blocks_of_document(shape.cu[work[i].document], shape.cu[work[i].document + 1], shape.window).size();
    }
    Tensor gradient_T3HD = at::empty_like(rotated_T3HD);
    const Tensor dq = gradient_T3HD.select(1, 0), dk = gradient_T3HD.select(1, 1), dv = gradient_T3HD.select(1, 2);
    for_each_item(work, [&](const Item& item, size_t index) {
        const int64_t begin = shape.cu[item.document], end = shape.cu[item.document + 1];
        const auto blocks = blocks_of_document(begin, end, shape.window);
        if (blocks.size() > 1) {  // keys of neighbouring blocks overlap, so their gradients are added up
            piece(dk, begin, end, item).zero_();
            piece(dv, begin, end, item).zero_();
        }
        for (size_t b = 0; b < blocks.size(); ++b) {
            const Block& block = blocks[b];
            auto [block_dq, block_dk, block_dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
                piece(upstream_THD, block.query_begin, block.query_end, item), piece(q, block.query_begin, block.query_end, item),
                piece(k, block.key_begin, block.key_end, item), piece(v, block.key_begin, block.key_end, item),
                piece(forward.out_THD, block.query_begin, block.query_end, item), forward.normalisers[first_normaliser[index] + b], 0.0, false,
                mask_of(block, band, shape.window), shape.scale);
            piece(dq, block.query_begin, block.query_end, item).copy_(block_dq);
            const Tensor to_k = piece(dk, block.key_begin, block.key_end, item), to_v = piece(dv, block.key_begin, block.key_end, item);
            blocks.size() > 1 ? to_k.add_(block_dk) : to_k.copy_(block_dk);
            blocks.size() > 1 ? to_v.add_(block_dv) : to_v.copy_(block_dv);
        }
    });
    return gradient_T3HD;
}

// [T, H, D] -> [H, tokens, D]
Tensor heads_first(const Tensor& x_THD, int64_t begin, int64_t end) { return x_THD.narrow(0, begin, end - begin).transpose(0, 1); }

Tensor plain_probabilities(const Tensor& q, const Tensor& k, const Block& block, const Shape& shape, const Tensor& band) {
    Tensor scores = at::matmul(heads_first(q, block.query_begin, block.query_end), heads_first(k, block.key_begin, block.key_end).transpose(1, 2)) * shape.scale;
    if (const auto mask = mask_of(block, band, shape.window)) scores = scores + mask->to(scores.scalar_type());
    return at::softmax(scores, -1);
}

template <class F>
void for_each_block(const Shape& shape, F run) {
    for (size_t d = 0; d + 1 < shape.cu.size(); ++d)
        for (const Block& block : blocks_of_document(shape.cu[d], shape.cu[d + 1], shape.window)) run(block);
}

Tensor plain_forward(const Tensor& rotated_T3HD, const Shape& shape) {
    const Tensor q = rotated_T3HD.select(1, 0), k = rotated_T3HD.select(1, 1), v = rotated_T3HD.select(1, 2);
    const Tensor band = shape.window >= 0 ? band_mask(shape.window, q) : Tensor();
    Tensor out_THD = at::empty(q.sizes(), q.options());
    for_each_block(shape, [&](const Block& block) {
        const Tensor p = plain_probabilities(q, k, block, shape, band);
        heads_first(out_THD, block.query_begin, block.query_end).copy_(at::matmul(p, heads_first(v, block.key_begin, block.key_end)));
    });
    return out_THD;
}

Tensor plain_backward(const Tensor& upstream_THD, const Tensor& rotated_T3HD, const Shape& shape) {
    const Tensor q = rotated_T3HD.select(1, 0), k = rotated_T3HD.select(1, 1), v = rotated_T3HD.select(1, 2);
    const Tensor band = shape.window >= 0 ? band_mask(shape.window, q) : Tensor();
    Tensor gradient_T3HD = at::zeros_like(rotated_T3HD);
    for_each_block(shape, [&](const Block& block) {
        const Tensor p = plain_probabilities(q, k, block, shape, band);
        const Tensor dout = heads_first(upstream_THD, block.query_begin, block.query_end);
        const Tensor dp = at::matmul(dout, heads_first(v, block.key_begin, block.key_end).transpose(1, 2));
        const Tensor ds = p * (dp - (dp * p).sum(-1, true)) * shape.scale;
        heads_first(gradient_T3HD.select(1, 0), block.query_begin, block.query_end).add_(at::matmul(ds, heads_first(k, block.key_begin, block.key_end)));
        heads_first(gradient_T3HD.select(1, 1), block.key_begin, block.key_end).add_(at::matmul(ds.transpose(1, 2), heads_first(q, block.query_begin, block.query_end)));
        heads_first(gradient_T3HD.select(1, 2), block.key_begin, block.key_end).add_(at::matmul(p.transpose(1, 2), dout));
    });
    return gradient_T3HD;
}

// A copy of x with q and k rotated; `direction` -1 undoes it.
Tensor rotated(const Tensor& x_T3HD, const Tensor& cosine, const Tensor& sine, double direction) {
    if (x_T3HD.is_cpu() && x_T3HD.scalar_type() == at::kFloat) {
        Tensor result = x_T3HD.clone();
        kernels::rotate(result.data_ptr<float>(), cosine.data_ptr<float>(), sine.data_ptr<float>(), {x_T3HD.size(0), x_T3HD.size(2), x_T3HD.size(3)},
                        static_cast<float>(direction));
        return result;
    }
    const Tensor c = cosine.unsqueeze(1).unsqueeze(1), s = (sine * direction).unsqueeze(1).unsqueeze(1);
    const auto halves = x_T3HD.narrow(1, 0, 2).to(at::kFloat).chunk(2, -1);
    const Tensor qk = at::cat({halves[0] * c - halves[1] * s, halves[1] * c + halves[0] * s}, -1).to(x_T3HD.scalar_type());
    return at::cat({qk, x_T3HD.narrow(1, 2, 1)}, 1);
}

enum class Path { CudaFlash, CpuFlash, Plain };

Path path_for(const Tensor& qkv, int64_t head_width, bool force_plain) {
    const bool half = qkv.scalar_type() == at::kBFloat16 || qkv.scalar_type() == at::kHalf;
    // Flash attention takes head widths that are multiples of 8, up to 256.
    const bool fits_flash = head_width % 8 == 0 && head_width <= 256;
    if (!force_plain && qkv.is_cuda() && half && fits_flash) return Path::CudaFlash;
    if (!force_plain && qkv.is_cpu() && qkv.scalar_type() == at::kFloat) return Path::CpuFlash;
    return Path::Plain;
}

int64_t longest(const std::vector<int64_t>& cu) {
    int64_t length = 0;
    for (size_t d = 0; d + 1 < cu.size(); ++d) length = std::max(length, cu[d + 1] - cu[d]);
    return length;
}

std::optional<int64_t> window_argument(int64_t window) { return window < 0 ? std::nullopt : std::optional<int64_t>(window); }

struct Attention : Function<Attention> {
    static Tensor forward(AutogradContext* context, const Tensor& qkv, const Tensor& cosine, const Tensor& sine, const Tensor& cu_device,
                          const std::vector<int64_t>& cu, int64_t num_heads, int64_t window, bool force_plain) {
        const int64_t tokens = qkv.size(0), head_width = qkv.size(1) / (3 * num_heads);
        const Tensor rotated_T3HD = rotated(qkv.view({tokens, 3, num_heads, head_width}), cosine, sine, 1.0);
        const Shape shape{cu, window, 1.0 / std::sqrt(static_cast<double>(head_width))};
        context->saved_data["cu"] = cu;
        context->saved_data["window"] = window;
        context->saved_data["path"] = static_cast<int64_t>(path_for(qkv, head_width, force_plain));
        std::vector<Tensor> kept{rotated_T3HD, cosine, sine, cu_device};
        Tensor out_THD;
        switch (path_for(qkv, head_width, force_plain)) {
            case Path::CudaFlash: {
                auto [out, normaliser, random_state, unused, debug] = at::_flash_attention_forward(
                    rotated_T3HD.select(1, 0), rotated_T3HD.select(1, 1), rotated_T3HD.select(1, 2), cu_device, cu_device, longest(cu), longest(cu), 0.0,
                    false, false, std::optional<double>(shape.scale), window_argument(window), window_argument(window));
                kept.insert(kept.end(), {out, normaliser, random_state, unused});
                out_THD = out;
                break;
            }
            case Path::CpuFlash: {
                CpuForward result = cpu_forward(rotated_T3HD, shape);
                kept.push_back(result.out_THD);
                kept.insert(kept.end(), result.normalisers.begin(), result.normalisers.end());
                out_THD = result.out_THD;
                break;
            }
            case Path::Plain: out_THD = plain_forward(rotated_T3HD, shape); break;
        }
        // Saved variables would tie the output to itself; these tensors are private to the function.
        context->saved_data["kept"] = kept;
        return out_THD.detach().reshape({tokens, num_heads * head_width});
    }

    static tensor_list backward(AutogradContext* context, tensor_list outputs) {
        const auto kept = context->saved_data["kept"].toTensorVector();
        context->saved_data.erase("kept");  // else the tensors of all layers would live until the whole graph is gone
        const Tensor& rotated_T3HD = kept[0];
        const Tensor& cu_device = kept[3];
        const Shape shape{context->saved_data["cu"].toIntVector(), context->saved_data["window"].toInt(),
                          1.0 / std::sqrt(static_cast<double>(rotated_T3HD.size(3)))};
        const Tensor upstream_THD = outputs[0].contiguous().view({rotated_T3HD.size(0), rotated_T3HD.size(2), rotated_T3HD.size(3)});
        Tensor gradient_T3HD;
        switch (static_cast<Path>(context->saved_data["path"].toInt())) {
            case Path::CudaFlash: {
                auto [dq, dk, dv] = at::_flash_attention_backward(
                    upstream_THD, rotated_T3HD.select(1, 0), rotated_T3HD.select(1, 1), rotated_T3HD.select(1, 2), kept[4], kept[5], cu_device, cu_device,
                    longest(shape.cu), longest(shape.cu), 0.0, false, kept[6], kept[7], std::optional<double>(shape.scale), window_argument(shape.window),
                    window_argument(shape.window));
                gradient_T3HD = at::stack({dq, dk, dv}, 1);
                break;
            }
            case Path::CpuFlash:
                gradient_T3HD = cpu_backward(upstream_THD, rotated_T3HD, {kept[4], {kept.begin() + 5, kept.end()}}, shape);
                break;
            case Path::Plain: gradient_T3HD = plain_backward(upstream_THD, rotated_T3HD, shape); break;
        }
        const Tensor dqkv = rotated(gradient_T3HD, kept[1], kept[2], -1.0);
        return {dqkv.view({dqkv.size(0), -1}), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
    }
};

}  // namespace

// Called from shim.cpp's C interface, which turns exceptions into error texts.
Tensor attend(const Tensor& qkv, const Tensor& cosine, const Tensor& sine, const Tensor& cu_device, const std::vector<int64_t>& cu, int64_t num_heads,
              int64_t window, bool force_plain) {
    return Attention::apply(qkv, cosine, sine, cu_device, cu, num_heads, window, force_plain);
}

}  // namespace attention
