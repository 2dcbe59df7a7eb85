// The operators' C++ signatures, as autograd.cpp calls them through the dispatcher. Sizes are
// SymInt there, so that they stay symbolic under torch.compile and torch.export.
#pragma once

#include <array>
#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace flash_attn_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

} // namespace flash_attn_ext
