// What autograd.cpp and the devices (cpu.cpp, cuda.cpp) share of the operators (ops.cpp).
#pragma once

#include <array>
#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

#include "../flash_attention.h"

namespace flash_attn_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- the signatures, as called through the dispatcher: sizes are SymInt there, so that they stay
// symbolic under torch.compile and torch.export ---

using AttentionForward = std::tuple<Tensor, Tensor>(const Tensor &q, const Tensor &k,
                                                    const Tensor &v, const OptionalTensor &mask,
                                                    const OptionalTensor &rng_state, double scale,
                                                    c10::SymInt window_left,
                                                    c10::SymInt window_right,
                                                    c10::SymInt diagonal_offset, double dropout_p);

using AttentionBackward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor &grad_out, const Tensor &q, const Tensor &k, const Tensor &v,
    const OptionalTensor &mask, const OptionalTensor &rng_state, const Tensor &out,
    const Tensor &lse, double scale, c10::SymInt window_left, c10::SymInt window_right,
    c10::SymInt diagonal_offset, double dropout_p, std::array<bool, 4> grad_wanted);

// --- for the devices ---

// The arguments that forward and backward share: checked, with contiguous rows, described in
// `params`.
struct Inputs {
    Tensor q, k, v, mask, rng_state; // keep alive what params points to; undefined: none
    fa_params params{};

    Inputs(const Tensor &q, const Tensor &k, const Tensor &v, const OptionalTensor &mask,
           const OptionalTensor &rng_state, double scale, int64_t window_left, int64_t window_right,
           int64_t diagonal_offset, double dropout_p);

    at::DimVector lse_sizes() const { return {params.batch, params.heads_q, params.seq_q}; }
    bool no_scores() const {
        return params.batch * params.heads_q * params.seq_q * params.seq_k == 0;
    }

private:
    void set_qkv(const Tensor &q_, const Tensor &k_, const Tensor &v_);
    void set_mask(const Tensor &mask_);
    void set_window(int64_t left, int64_t right, int64_t diagonal_offset);
    void set_dropout(double dropout_p, const OptionalTensor &rng_state_);
};

struct BackwardInputs : Inputs {
    Tensor grad_out, out, lse;

    BackwardInputs(const Tensor &grad_out, const Tensor &out, const Tensor &lse, Inputs inputs);
};

// Runs the kernels of a device, with the workspace that they ask for; raises what goes wrong.
using Launch = void(fa_params &params);

// Of which types a device's kernels write the gradient of a mask that broadcasts nothing; others
// they add to an acc.
enum class MaskGrad { any, half };

// The operators, once their inputs are checked: allocate the results, launch.
std::tuple<Tensor, Tensor> run_forward(Inputs &inputs, Launch *launch);
std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(BackwardInputs &inputs,
                                                        std::array<bool, 4> grad_wanted,
                                                        Launch *launch, MaskGrad mask_grad);

} // namespace flash_attn_ext
