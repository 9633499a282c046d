// Training operations over packed tokens that tch does not expose. Each adds its weight gradient straight into the flat gradient buffer:
// no temporary the size of the weight, no later copy. See shim.hpp for the interface and the shape legend.
#include "shim.hpp"
#include "kernels.hpp"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/autograd/custom_function.h>

#include <dlfcn.h>
#include <malloc.h>

#include <atomic>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::tensor_list;

namespace attention {
Tensor attend(const Tensor& qkv, const Tensor& cosine, const Tensor& sine, const Tensor& cu_device, const std::vector<int64_t>& cu, int64_t num_heads,
              int64_t window, bool force_plain);
}

namespace {

thread_local std::string last_error;

template <class F>
Tensor* tensor_or_null(F compute) {
    try {
        return new Tensor(compute());
    } catch (const std::exception& error) {
        last_error = error.what();
        return nullptr;
    }
}

template <class F>
int status_of(F run) {
    try {
        run();
        return 0;
    } catch (const std::exception& error) {
        last_error = error.what();
        return 1;
    }
}

Tensor norm_of(const Tensor& x_TE, const Tensor& weight_E, double epsilon) {
    return std::get<0>(at::native_layer_norm(x_TE, {x_TE.size(-1)}, weight_E, {}, epsilon));
}

// Who is told about a pass. libtorch hands this on from the thread that starts a backward pass to the threads that run it, which a plain
// thread-local variable would not do. Of the kinds there are, this one is left to programs.
constexpr auto listener_kind = c10::DebugInfoKind::TEST_INFO;
struct PassListener : c10::DebugInfoBase {
    PassListener(cloze_pass_listener function, void* context) : function(function), context(context) {}
    cloze_pass_listener function;
    void* context;
};

enum class Told : int { ValueNeeded = 0, GradientNeeded = 1, GradientAdded = 2 };

void tell(Told what, const Tensor& parameter) {
    const auto* listener = static_cast<const PassListener*>(c10::ThreadLocalDebugInfo::get(listener_kind));
    if (!listener) return;
    const void* storage = parameter.storage().unsafeGetStorageImpl();
    if (listener->function(listener->context, static_cast<int>(what), storage, parameter.storage_offset()) != 0)
        throw std::runtime_error("the pass was stopped: its exchange with the other workers failed");
}

// Bytes in use, now and at most.
struct Account {
    std::atomic<int64_t> now{0}, peak{0};
    void add(int64_t bytes) {
        const int64_t after = now.fetch_add(bytes, std::memory_order_relaxed) + bytes;
        int64_t seen = peak.load(std::memory_order_relaxed);
        while (after > seen && !peak.compare_exchange_weak(seen, after, std::memory_order_relaxed)) {
        }
    }
};

// Accounts are never freed: tensors may be freed after whatever wanted to know about them, also while the process ends.
Account& process_account() {
    static Account* account = new Account;
    return *account;
}
thread_local Account* thread_account = nullptr;

// libtorch's own allocator of host memory, with a count. What was counted stands in front of each allocation, so that it can be freed anywhere.
class CountingAllocator final : public c10::Allocator {
  public:
    c10::DataPtr allocate(size_t bytes) override {
        const c10::Device host(c10::kCPU);
        if (bytes == 0) return {nullptr, nullptr, &release, host};
        void* memory = c10::GetDefaultCPUAllocator()->raw_allocate(bytes + sizeof(Header));
        auto* header = new (memory) Header{static_cast<int64_t>(bytes), thread_account};
        process_account().add(header->bytes);
        if (header->account) header->account->add(header->bytes);
        void* data = header + 1;
        return {data, data, &release, host};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

  private:
    // As long as libtorch's alignment, which it therefore keeps.
    struct alignas(c10::gAlignment) Header {
        int64_t bytes;
        Account* account;
    };
    static void release(void* data) {
        if (!data) return;
        Header* header = static_cast<Header*>(data) - 1;
        process_account().add(-header->bytes);
        if (header->account) header->account->add(-header->bytes);
        c10::GetDefaultCPUAllocator()->raw_deallocate(header);
    }
};

// Before the first tensor: memory must be freed by the allocator that it came from.
[[maybe_unused]] const bool counting = [] {
    c10::SetCPUAllocator(new CountingAllocator, /*priority=*/1);
    return true;
}();

bool plain_float(const Tensor& tensor) { return tensor.is_cpu() && tensor.scalar_type() == at::kFloat; }

// gradient += productᵀ-like matrix product; float32 state takes bfloat16 products by promotion.
void add_matrix_product(Tensor gradient, const Tensor& left, const Tensor& right) {
    if (left.scalar_type() == gradient.scalar_type()) {
        gradient.addmm_(left, right);
    } else {
        gradient.add_(at::mm(left, right));
    }
}

struct Embed : Function<Embed> {
    static Tensor forward(AutogradContext* context, const Tensor& weight_VE, const Tensor& ids_T, const Tensor& gradient_VE) {
        context->saved_data["ids"] = ids_T;
        context->saved_data["gradient"] = gradient_VE;
        return weight_VE.index_select(0, ids_T);
    }
    static tensor_list backward(AutogradContext* context, tensor_list outputs) {
        const Tensor ids_T = context->saved_data["ids"].toTensor();
        Tensor gradient_VE = context->saved_data["gradient"].toTensor();
        const Tensor upstream_TE = outputs[0].contiguous();
        tell(Told::GradientNeeded, gradient_VE);
        if (plain_float(gradient_VE) && plain_float(upstream_TE)) {
            kernels::scatter_add_rows(gradient_VE.data_ptr<float>(), ids_T.data_ptr<int64_t>(), upstream_TE.data_ptr<float>(), ids_T.numel(), gradient_VE.size(1));
        } else {
            gradient_VE.index_add_(0, ids_T, upstream_TE.to(gradient_VE.scalar_type()));
        }
        tell(Told::GradientAdded, gradient_VE);
        return {Tensor(), Tensor(), Tensor()};
    }
};

struct Linear : Function<Linear> {
    static Tensor forward(AutogradContext* context, const Tensor& x_TI, const Tensor& weight_OI, const Tensor& gradient_OI) {
        context->save_for_backward({x_TI});
        context->saved_data["weight"] = weight_OI;
        context->saved_data["gradient"] = gradient_OI;
        tell(Told::ValueNeeded, weight_OI);
        return at::mm(x_TI, weight_OI.t());
    }
    static tensor_list backward(AutogradContext* context, tensor_list outputs) {
        const Tensor x_TI = context->get_saved_variables()[0];
        const Tensor upstream_TO = outputs[0].contiguous();
        const Tensor weight_OI = context->saved_data["weight"].toTensor(), gradient_OI = context->saved_data["gradient"].toTensor();
        // The value may be given back once the gradient is complete, so it is used first.
        tell(Told::ValueNeeded, weight_OI);
        const Tensor dx_TI = at::mm(upstream_TO, weight_OI);
        tell(Told::GradientNeeded, gradient_OI);
        add_matrix_product(gradient_OI, upstream_TO.t(), x_TI);
        tell(Told::GradientAdded, gradient_OI);
        return {dx_TI, Tensor(), Tensor()};
    }
};

struct LayerNorm : Function<LayerNorm> {
    static Tensor forward(AutogradContext* context, const Tensor& x_TE, const Tensor& weight_E, const Tensor& gradient_E, double epsilon) {
        auto [y_TE, mean_T, rstd_T] = at::native_layer_norm(x_TE, {x_TE.size(-1)}, weight_E, {}, epsilon);
        context->save_for_backward({x_TE, mean_T, rstd_T});
        context->saved_data["weight"] = weight_E;
        context->saved_data["gradient"] = gradient_E;
        return y_TE;
    }
    static tensor_list backward(AutogradContext* context, tensor_list outputs) {
        const auto saved = context->get_saved_variables();
        Tensor gradient_E = context->saved_data["gradient"].toTensor();
        auto [dx_TE, dweight_E, unused] = at::native_layer_norm_backward(outputs[0].contiguous(), saved[0], {saved[0].size(-1)}, saved[1], saved[2],
                                                                        context->saved_data["weight"].toTensor(), {}, {true, true, false});
        tell(Told::GradientNeeded, gradient_E);
        gradient_E.add_(dweight_E);
        tell(Told::GradientAdded, gradient_E);
        return {dx_TE, Tensor(), Tensor(), Tensor()};
    }
};

struct AddLayerNorm : Function<AddLayerNorm> {
    static tensor_list forward(AutogradContext* context, const Tensor& x_TE, const Tensor& delta_TE, const Tensor& weight_E, const Tensor& gradient_E,
                               double epsilon) {
        context->set_materialize_grads(false);  // the sum behind the last norm has no gradient, and need not get a zero one
        const Tensor sum_TE = at::add(x_TE, delta_TE);
        auto [y_TE, mean_T, rstd_T] = at::native_layer_norm(sum_TE, {sum_TE.size(-1)}, weight_E, {}, epsilon);
        context->save_for_backward({sum_TE, mean_T, rstd_T});
        context->saved_data["weight"] = weight_E;
        context->saved_data["gradient"] = gradient_E;
        return {sum_TE, y_TE};
    }
    static tensor_list backward(AutogradContext* context, tensor_list outputs) {
        const auto saved = context->get_saved_variables();
        Tensor gradient_E = context->saved_data["gradient"].toTensor();
        auto [dx_TE, dweight_E, unused] = at::native_layer_norm_backward(outputs[1].contiguous(), saved[0], {saved[0].size(-1)}, saved[1], saved[2],
                                                                        context->saved_data["weight"].toTensor(), {}, {true, true, false});
        tell(Told::GradientNeeded, gradient_E);
        gradient_E.add_(dweight_E);
        tell(Told::GradientAdded, gradient_E);
        if (outputs[0].defined()) dx_TE.add_(outputs[0]);
        return {dx_TE, dx_TE, Tensor(), Tensor(), Tensor()};
    }
};

struct Geglu : Function<Geglu> {
    static Tensor forward(AutogradContext* context, const Tensor& x_T2F) {
        context->save_for_backward({x_T2F});
        const int64_t width = x_T2F.size(1) / 2;
        if (!plain_float(x_T2F)) return at::gelu(x_T2F.narrow(1, 0, width)) * x_T2F.narrow(1, width, width);
        Tensor y_TF = at::empty({x_T2F.size(0), width}, x_T2F.options());
        kernels::geglu_forward(x_T2F.data_ptr<float>(), y_TF.data_ptr<float>(), x_T2F.size(0), width);
        return y_TF;
    }
    static tensor_list backward(AutogradContext* context, tensor_list outputs) {
        const Tensor x_T2F = context->get_saved_variables()[0];
        const Tensor upstream_TF = outputs[0].contiguous();
        const int64_t width = x_T2F.size(1) / 2;
        Tensor dx_T2F = at::empty_like(x_T2F);
        if (plain_float(x_T2F)) {
            kernels::geglu_backward(x_T2F.data_ptr<float>(), upstream_TF.data_ptr<float>(), dx_T2F.data_ptr<float>(), x_T2F.size(0), width);
            return {dx_T2F};
        }
        const Tensor input_TF = x_T2F.narrow(1, 0, width), gate_TF = x_T2F.narrow(1, width, width);
        dx_T2F.narrow(1, 0, width).copy_(at::gelu_backward(upstream_TF * gate_TF, input_TF));
        dx_T2F.narrow(1, width, width).copy_(upstream_TF * at::gelu(input_TF));
        return {dx_T2F};
    }
};

struct HeadLoss : Function<HeadLoss> {
    // Logits of one piece: at most this many bytes of float32, so that the three passes over them stay in the cache of a CPU.
    static constexpr int64_t piece_bytes_max_cpu = 32 << 20;
    static constexpr int64_t piece_bytes_max_cuda = 1 << 30;

    static Tensor forward(AutogradContext* context, const Tensor& h_NE, const Tensor& weight_VE, const Tensor& bias_V, const Tensor& target_N,
                          const Tensor& label_weight_N, const Tensor& gradient_VE, const Tensor& gradient_V) {
        auto [loss, dh_NE] = compute(h_NE, weight_VE, bias_V, target_N, label_weight_N, &gradient_VE, &gradient_V);
        context->save_for_backward({dh_NE});
        return loss;
    }

    // The loss, and the gradient of h where the weight's gradient is wanted too.
    static std::pair<Tensor, Tensor> compute(const Tensor& h_NE, const Tensor& weight_VE, const Tensor& bias_V, const Tensor& target_N,
                                             const Tensor& label_weight_N, const Tensor* gradient_VE, const Tensor* gradient_V) {
        const int64_t num_rows = h_NE.size(0), vocabulary = weight_VE.size(0);
        const int64_t piece_bytes_max = h_NE.is_cpu() ? piece_bytes_max_cpu : piece_bytes_max_cuda;
        const int64_t piece_rows = std::max<int64_t>(1, piece_bytes_max / (vocabulary * 4));
        Tensor dh_NE = gradient_VE ? at::empty_like(h_NE) : Tensor();
        Tensor loss = at::zeros({}, h_NE.options().dtype(at::kFloat));
        if (gradient_VE) tell(Told::GradientNeeded, *gradient_VE);
        if (gradient_V) tell(Told::GradientNeeded, *gradient_V);
        for (int64_t begin = 0; begin < num_rows; begin += piece_rows) {
            const int64_t rows = std::min(piece_rows, num_rows - begin);
            const Tensor h = h_NE.narrow(0, begin, rows);
            Tensor logits = at::addmm(bias_V, h, weight_VE.t());
            loss.add_(loss_and_gradient(logits, target_N.narrow(0, begin, rows), label_weight_N.narrow(0, begin, rows)));
            if (!gradient_VE) continue;
            const Tensor dlogits = logits.to(h_NE.scalar_type());
            dh_NE.narrow(0, begin, rows).copy_(at::mm(dlogits, weight_VE));
            add_matrix_product(*gradient_VE, dlogits.t(), h);
            gradient_V->add_(logits.sum(0));
        }
        if (gradient_V) tell(Told::GradientAdded, *gradient_V);
        return {loss, dh_NE};
    }

    // Replaces logits by the gradient of the loss with respect to them and returns the weighted loss.
    static Tensor loss_and_gradient(Tensor& logits, const Tensor& target, const Tensor& label_weight) {
        if (plain_float(logits)) {
            const double loss = kernels::cross_entropy_in_place(logits.data_ptr<float>(), target.data_ptr<int64_t>(), label_weight.data_ptr<float>(),
                                                                logits.size(0), logits.size(1));
            return at::scalar_tensor(loss, logits.options());
        }
        logits = logits.to(at::kFloat);
        const Tensor column = target.unsqueeze(1), weight = label_weight.unsqueeze(1);
        const Tensor normaliser = at::logsumexp(logits, {1}, true);
        const Tensor loss = ((normaliser - logits.gather(1, column)) * weight).sum();
        logits.sub_(normaliser).exp_().mul_(weight);
        logits.scatter_add_(1, column, -weight);
        return loss;
    }

    static tensor_list backward(AutogradContext* context, tensor_list outputs) {
        const Tensor dh_NE = context->get_saved_variables()[0];
        return {dh_NE * outputs[0].to(dh_NE.scalar_type()), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
    }
};

}  // namespace

const char* cloze_error() { return last_error.c_str(); }

Tensor* cloze_embed(const Tensor* ids_T, const Tensor* weight_VE, const Tensor* gradient_VE) {
    return tensor_or_null([&] {
        // A fresh leaf starts the graph; its own gradient stays undefined because backward adds to the buffer itself.
        if (!gradient_VE) return weight_VE->index_select(0, *ids_T);
        return Embed::apply(weight_VE->detach().requires_grad_(true), *ids_T, *gradient_VE);
    });
}

Tensor* cloze_linear(const Tensor* x_TI, const Tensor* weight_OI, const Tensor* gradient_OI) {
    return tensor_or_null([&] { return gradient_OI ? Linear::apply(*x_TI, *weight_OI, *gradient_OI) : at::mm(*x_TI, weight_OI->t()); });
}

Tensor* cloze_layer_norm(const Tensor* x_TE, const Tensor* weight_E, const Tensor* gradient_E, double epsilon) {
    return tensor_or_null([&] {
        if (!gradient_E) return norm_of(*x_TE, *weight_E, epsilon);
        return LayerNorm::apply(*x_TE, *weight_E, *gradient_E, epsilon);
    });
}

int cloze_add_layer_norm(const Tensor* x_TE, const Tensor* delta_TE, const Tensor* weight_E, const Tensor* gradient_E, double epsilon, Tensor** results) {
    return status_of([&] {
        tensor_list outputs;
        if (gradient_E) {
            outputs = AddLayerNorm::apply(*x_TE, *delta_TE, *weight_E, *gradient_E, epsilon);
        } else {
            const Tensor sum_TE = at::add(*x_TE, *delta_TE);
            outputs = {sum_TE, norm_of(sum_TE, *weight_E, epsilon)};
        }
        results[0] = new Tensor(outputs[0]);
        results[1] = new Tensor(outputs[1]);
    });
}

Tensor* cloze_geglu(const Tensor* x_T2F) {
    return tensor_or_null([&] { return Geglu::apply(*x_T2F); });
}

Tensor* cloze_attention(const Tensor* qkv_T3HD, const Tensor* cos, const Tensor* sin, const Tensor* cu_lengths, const int32_t* cu_lengths_host,
                        int64_t num_documents, int64_t num_heads, int64_t window, int force_plain) {
    return tensor_or_null([&] {
        const std::vector<int64_t> cu(cu_lengths_host, cu_lengths_host + num_documents + 1);
        return attention::attend(*qkv_T3HD, *cos, *sin, *cu_lengths, cu, num_heads, window, force_plain != 0);
    });
}

Tensor* cloze_head_loss(const Tensor* h_NE, const Tensor* weight_VE, const Tensor* bias_V, const Tensor* target_N, const Tensor* label_weight_N,
                        const Tensor* gradient_VE, const Tensor* gradient_V) {
    return tensor_or_null([&] {
        // Gradients are added in the forward pass, so that a loss without a graph must not take that path.
        if (!gradient_VE || !c10::GradMode::is_enabled()) return HeadLoss::compute(*h_NE, *weight_VE, *bias_V, *target_N, *label_weight_N, nullptr, nullptr).first;
        return HeadLoss::apply(*h_NE, *weight_VE, *bias_V, *target_N, *label_weight_N, *gradient_VE, *gradient_V);
    });
}

int cloze_adamw(const Tensor* parameter, const Tensor* gradient, const Tensor* first_moment, const Tensor* second_moment, const Tensor* step,
                const ClozeAdamW* options, const Tensor* gradient_divisor, const Tensor* skip) {
    return status_of([&] {
        at::NoGradGuard no_gradient;
        at::_fused_adamw_({*parameter}, {*gradient}, {*first_moment}, {*second_moment}, {}, {*step}, options->learning_rate, options->beta1, options->beta2,
                          options->weight_decay, options->epsilon, false, false, *gradient_divisor, *skip);
    });
}

int cloze_listen(cloze_pass_listener listener, void* context) {
    return status_of([&] { c10::ThreadLocalDebugInfo::_push(listener_kind, std::make_shared<PassListener>(listener, context)); });
}

int cloze_listen_no_more() {
    return status_of([&] { c10::ThreadLocalDebugInfo::_pop(listener_kind); });
}

const void* cloze_storage_of(const Tensor* tensor) { return tensor->storage().unsafeGetStorageImpl(); }

int cloze_storage_hold(const Tensor* whole, int hold) {
    return status_of([&] {
        c10::StorageImpl* storage = whole->storage().unsafeGetStorageImpl();
        TORCH_CHECK(storage->resizable() && storage->allocator(), "the memory of this tensor is not its own");
        const size_t bytes = hold ? static_cast<size_t>(whole->numel()) * whole->element_size() : 0;
        if (storage->nbytes() == bytes) return;
        // The old memory goes before the new one comes.
        storage->set_data_ptr_noswap(storage->allocator()->allocate(0));
        storage->set_nbytes(0);
        if (bytes == 0) return;
        storage->set_data_ptr_noswap(storage->allocator()->allocate(bytes));
        storage->set_nbytes(bytes);
    });
}

void* cloze_account_open() { return thread_account = new Account; }

void cloze_account_close() { thread_account = nullptr; }

int64_t cloze_peak_bytes(const void* account) {
    return (account ? static_cast<const Account*>(account) : &process_account())->peak.load(std::memory_order_relaxed);
}

void cloze_reset_peak(void* account) {
    Account* chosen = account ? static_cast<Account*>(account) : &process_account();
    chosen->peak.store(chosen->now.load(std::memory_order_relaxed), std::memory_order_relaxed);
}

void cloze_keep_freed_memory() {
    // The same shapes come back every step: mapping and zeroing fresh pages for each tensor would cost more than small layers' arithmetic.
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_TRIM_THRESHOLD, -1);
    mallopt(M_TOP_PAD, 64 << 20);
}

int cloze_cuda_open(const char* libtorch_cuda_path) {
    if (dlopen(libtorch_cuda_path, RTLD_NOW | RTLD_GLOBAL)) return 0;
    last_error = dlerror();
    return 1;
}

int cloze_use_deterministic_algorithms() {
    return status_of([] {
        at::Context& context = at::globalContext();
        context.setDeterministicAlgorithms(/*on=*/true, /*warn_only=*/false);
        // That memory is filled before it is written is for programs that read it too early.
        context.setDeterministicFillUninitializedMemory(false);
        context.setBenchmarkCuDNN(false);
    });
}

Tensor* cloze_copy_aside(const Tensor* host, int64_t device) {
    return tensor_or_null([&] {
        const c10::Device where(c10::kCUDA, static_cast<c10::DeviceIndex>(device));
        const c10::impl::VirtualGuardImpl cuda(c10::kCUDA);
        const c10::Stream current = cuda.getStream(where);
        thread_local const c10::Stream side = cuda.getStreamFromGlobalPool(where);
        const Tensor pinned = host->pin_memory();
        c10::Event copied(c10::kCUDA);
        Tensor result;
        {
            const c10::StreamGuard on_side(side);
            result = pinned.to(where, pinned.scalar_type(), /*non_blocking=*/true);
            copied.record(side);
        }
        copied.block(current);
        // The allocator gave the memory to the side stream; it must not be reused before the current stream is done with it.
        result.record_stream(current);
        return result;
    });
}

void* cloze_event_record(int64_t device) {
    try {
        const c10::Device where(c10::kCUDA, static_cast<c10::DeviceIndex>(device));
        auto event = std::make_unique<c10::Event>(c10::kCUDA);
        event->record(c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(where));
        return event.release();
    } catch (const std::exception& error) {
        last_error = error.what();
        return nullptr;
    }
}

int cloze_event_wait(void* event) {
    return status_of([&] { static_cast<c10::Event*>(event)->synchronize(); });
}

void cloze_event_free(void* event) { delete static_cast<c10::Event*>(event); }

int cloze_cuda_set_device(int64_t device) {
    return status_of([&] {
        const c10::Device where(c10::kCUDA, static_cast<c10::DeviceIndex>(device));
        c10::impl::VirtualGuardImpl(c10::kCUDA).setDevice(where);
        at::zeros({1}, at::TensorOptions().device(where).dtype(at::kFloat));
    });
}

int cloze_device_synchronize(int64_t device) {
    return status_of([&] { c10::impl::VirtualGuardImpl(c10::kCUDA).synchronizeDevice(static_cast<c10::DeviceIndex>(device)); });
}
