// The operators on the CPU: csrc/cpu.
#include "ops.h"

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

// Runs fa_cpu_forward or fa_cpu_backward, with the workspace it asks for.
void launch(fa_params &params, size_t (*workspace_bytes)(const fa_params *),
            fa_status (*kernel)(const fa_params *)) {
    TORCH_CHECK(fa_cpu_isa(),
                "flash_attn_ext: FLASH_ATTN_EXT_ISA=", std::getenv("FLASH_ATTN_EXT_ISA"),
                " names an instruction set that is unknown or that this machine lacks");
    const char *reason = nullptr;
    TORCH_CHECK_NOT_IMPLEMENTED(
        fa_cpu_supports(&params, &reason) == FA_OK,
        "flash_attn_ext: the CPU kernels do not support this call: ", reason);
    params.executor = {at::in_parallel_region() ? 1 : at::get_num_threads(), run_on_torch_threads};
    static_assert(c10::gAlignment >= 64, "the kernels are promised an aligned workspace");
    params.workspace_bytes = workspace_bytes(&params);
    const at::DataPtr workspace = c10::GetCPUAllocator()->allocate(params.workspace_bytes);
    params.workspace = workspace.get();
    const fa_status status = kernel(&params);
    TORCH_CHECK(status == FA_OK, "flash_attn_ext: the CPU kernel failed with status ",
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
    return run_backward(inputs, grad_wanted, backward, MaskGrad::acc);
}

} // namespace

TORCH_LIBRARY_IMPL(flash_attn_ext, CPU, m) {
    m.impl("attention_forward", attention_forward);
    m.impl("attention_backward", attention_backward);
}

} // namespace flash_attn_ext
