// The operators on the CPU: csrc/cpu.
#include "ops.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/alignment.h>
#include <torch/library.h>

namespace flash_attn_ext {
namespace {

void run_on_torch_threads(void (*body)(void *, int), void *ctx, int num_threads) {
    at::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t id = begin; id < end; id++)
            body(ctx, static_cast<int>(id));
    });
}

// As many threads as have something to do: to wake one takes as long as kWorthAThread
// multiply-adds, and much longer where it sleeps or other programs run.
int useful_threads(const fa_params &p) {
    constexpr double kWorthAThread = 1 << 19;
    constexpr int64_t kLanes = 16; // few queries take as long as a vector of them
    if (at::in_parallel_region())
        return 1;
    const int64_t queries = std::max(p.heads_q / p.heads_k * p.seq_q, kLanes);
    const double multiply_adds = static_cast<double>(p.batch * p.heads_k * queries) *
                                 static_cast<double>(p.seq_k * (p.head_dim + p.head_dim_v));
    return static_cast<int>(
        std::clamp<double>(multiply_adds / kWorthAThread, 1, at::get_num_threads()));
}

// Runs fa_cpu_forward or fa_cpu_backward, with the workspace it asks for.
void launch(fa_params &params, size_t (*workspace_bytes)(const fa_params *),
            fa_status (*kernel)(const fa_params *)) {
    TORCH_CHECK(fa_cpu_isa(),
                "flash_attn_ext: FLASH_ATTN_EXT_ISA=", std::getenv("FLASH_ATTN_EXT_ISA"),
                " names an instruction set that is unknown or that this machine lacks");
    params.executor = {useful_threads(params), run_on_torch_threads};
    params.workspace_bytes = workspace_bytes(&params);
    alignas(64) std::byte small[32 * 1024]; // an allocation takes a while, for a small call
    at::DataPtr large;
    if (params.workspace_bytes <= sizeof small) {
        params.workspace_bytes = sizeof small;
        params.workspace = small;
    } else {
        static_assert(c10::gAlignment >= 64, "the kernels are promised an aligned workspace");
        large = c10::GetCPUAllocator()->allocate(params.workspace_bytes);
        params.workspace = large.get();
    }
    const fa_status status = kernel(&params);
    if (status == FA_OK)
        return;
    const char *reason = nullptr;
    TORCH_CHECK_NOT_IMPLEMENTED(
        fa_cpu_supports(&params, &reason) == FA_OK,
        "flash_attn_ext: the CPU kernels do not support this call: ", reason);
    TORCH_CHECK(false, "flash_attn_ext: the CPU kernel failed with status ",
                static_cast<int>(status));
}

void forward(fa_params &params) {
    launch(params, fa_cpu_forward_workspace, fa_cpu_forward);
}

void backward(fa_params &params) {
    launch(params, fa_cpu_backward_workspace, fa_cpu_backward);
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor &q, const Tensor &k, const Tensor &v,
                                             const OptionalTensor &mask,
                                             const OptionalTensor &rng_state, double scale,
                                             int64_t window_left, int64_t window_right,
                                             int64_t diagonal_offset, double dropout_p) {
    Inputs inputs(q, k, v, mask, rng_state, scale, window_left, window_right, diagonal_offset,
                  dropout_p);
    return run_forward(inputs, forward);
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
attention_backward(const Tensor &grad_out, const Tensor &q, const Tensor &k, const Tensor &v,
                   const OptionalTensor &mask, const OptionalTensor &rng_state, const Tensor &out,
                   const Tensor &lse, double scale, int64_t window_left, int64_t window_right,
                   int64_t diagonal_offset, double dropout_p, std::array<bool, 4> grad_wanted) {
    BackwardInputs inputs(grad_out, out, lse,
                          Inputs(q, k, v, mask, rng_state, scale, window_left, window_right,
                                 diagonal_offset, dropout_p));
    return run_backward(inputs, grad_wanted, backward, MaskGrad::any);
}

} // namespace

TORCH_LIBRARY_IMPL(flash_attn_ext, CPU, m) {
    m.impl("attention_forward", attention_forward);
    m.impl("attention_backward", attention_backward);
}

} // namespace flash_attn_ext
