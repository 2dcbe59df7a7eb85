// The operators on NVIDIA GPUs: csrc/cuda. Needs neither CUDA's headers nor a CUDA build of
// PyTorch: what there is of both is found out at run time.
#include "ops.h"

#include <dlfcn.h>

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <torch/version.h>

namespace flash_attn_ext {
namespace {

// torch::cuda.current_stream(device), from libtorch_cuda, which the extension is not linked with.
void *current_stream(int device) {
    using Function = int32_t(int32_t device, void **stream);
    static const auto get = [] {
        void *library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
        return library ? reinterpret_cast<Function *>(
                             dlsym(library, "aoti_torch_get_current_cuda_stream"))
                       : nullptr;
    }();
    void *stream = nullptr;
    TORCH_CHECK(get && get(device, &stream) == 0,
                "flash_attn_ext: PyTorch does not tell its current CUDA stream");
    return stream;
}

// What torch.backends.cuda.matmul says.
bool allow_tf32() {
    const at::Context &context = at::globalContext();
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 10
    return context.allowTF32CuBLAS();
#else // the same raises if .fp32_precision was set
    return context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
           at::Float32Precision::TF32;
#endif
}

bool supported(Inputs &inputs) {
    if (inputs.no_scores())
        return true;
    fa_params &params = inputs.params;
    params.allow_tf32 = params.dtype == FA_FLOAT32 && allow_tf32();
    const fa_status status = fa_cuda_supports(&params);
    TORCH_CHECK(status == FA_OK || status == FA_UNSUPPORTED,
                "flash_attn_ext: ", fa_cuda_last_error());
    return status == FA_OK;
}

// What fallback.py registers for all devices, the tiled walkthrough; it warns, with the reason that
// fa_cuda_last_error() gives.
template <class... Arguments>
torch::jit::Stack walkthrough(const char *name, Arguments &&...arguments) {
    torch::jit::Stack stack;
    torch::jit::push(stack, std::forward<Arguments>(arguments)...);
    c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxedForDispatchKey(
        c10::DispatchKey::CompositeExplicitAutograd, stack);
    return stack;
}

// Runs fa_cuda_forward or fa_cuda_backward, with the workspace it asks for. Its memory is
// PyTorch's: freed here, it is used again only by what the stream does later.
void launch(fa_params &params, size_t (*workspace_bytes)(const fa_params *),
            fa_status (*kernels)(const fa_params *)) {
    params.stream = current_stream(params.device);
    params.workspace_bytes = workspace_bytes(&params);
    Tensor workspace;
    if (params.workspace_bytes > 0) {
        const at::Device device(at::kCUDA, static_cast<at::DeviceIndex>(params.device));
        workspace = at::empty({static_cast<int64_t>(params.workspace_bytes)},
                              at::TensorOptions(device).dtype(at::kByte));
        params.workspace = workspace.mutable_data_ptr();
    }
    const fa_status status = kernels(&params);
    // Of PyTorch's own cache the driver can take nothing.
    TORCH_CHECK_WITH(OutOfMemoryError, status != FA_OUT_OF_MEMORY,
                     "flash_attn_ext: ", fa_cuda_last_error(),
                     "; torch.cuda.empty_cache() may give the driver what it needs for a kernel");
    TORCH_CHECK(status == FA_OK, "flash_attn_ext: ", fa_cuda_last_error());
}

void forward(fa_params &params) {
    launch(params, fa_cuda_forward_workspace, fa_cuda_forward);
}

void backward(fa_params &params) {
    launch(params, fa_cuda_backward_workspace, fa_cuda_backward);
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor &q, const Tensor &k, const Tensor &v,
                                             const OptionalTensor &mask,
                                             const OptionalTensor &rng_state, double scale,
                                             int64_t window_left, int64_t window_right,
                                             int64_t diagonal_offset, double dropout_p) {
    Inputs inputs(q, k, v, mask, rng_state, scale, window_left, window_right, diagonal_offset,
                  dropout_p);
    if (supported(inputs))
        return run_forward(inputs, forward);
    const auto results = walkthrough("flash_attn_ext::attention_forward", q, k, v, mask, rng_state,
                                     scale, window_left, window_right, diagonal_offset, dropout_p);
    return {results[0].toTensor(), results[1].toTensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
attention_backward(const Tensor &grad_out, const Tensor &q, const Tensor &k, const Tensor &v,
                   const OptionalTensor &mask, const OptionalTensor &rng_state, const Tensor &out,
                   const Tensor &lse, double scale, int64_t window_left, int64_t window_right,
                   int64_t diagonal_offset, double dropout_p, std::array<bool, 4> grad_wanted) {
    BackwardInputs inputs(grad_out, out, lse,
                          Inputs(q, k, v, mask, rng_state, scale, window_left, window_right,
                                 diagonal_offset, dropout_p));
    if (supported(inputs))
        return run_backward(inputs, grad_wanted, backward, MaskGrad::half);
    const auto results =
        walkthrough("flash_attn_ext::attention_backward", grad_out, q, k, v, mask, rng_state, out,
                    lse, scale, window_left, window_right, diagonal_offset, dropout_p, grad_wanted);
    return {results[0].toTensor(), results[1].toTensor(), results[2].toTensor(),
            results[3].toTensor()};
}

} // namespace

TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
    m.impl("attention_forward", attention_forward);
    m.impl("attention_backward", attention_backward);
}

} // namespace flash_attn_ext
