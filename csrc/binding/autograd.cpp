// attention_forward as a node of the autograd graph; its backward calls attention_backward.
#include "ops.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace flash_attn_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature> auto find_operator(const char *name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<Tensor, Tensor> forward_below_autograd(const Tensor &q, const Tensor &k, const Tensor &v,
                                                  const OptionalTensor &mask,
                                                  const OptionalTensor &rng_state, double scale,
                                                  c10::SymInt window_left, c10::SymInt window_right,
                                                  c10::SymInt diagonal_offset, double dropout_p) {
    static const auto op = find_operator<AttentionForward>("flash_attn_ext::attention_forward");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(q, k, v, mask, rng_state, scale, window_left, window_right, diagonal_offset,
                   dropout_p);
}

struct Attention : torch::autograd::Function<Attention> {
    // backward() reads saved variables and saved_data alone, as compiled autograd asks.
    static constexpr bool is_traceable = true;

    // lse comes back through a pointer rather than as a result: it has no gradient.
    static Tensor forward(AutogradContext *ctx, const Tensor &q, const Tensor &k, const Tensor &v,
                          const OptionalTensor &mask, const OptionalTensor &rng_state, double scale,
                          c10::SymInt window_left, c10::SymInt window_right,
                          c10::SymInt diagonal_offset, double dropout_p, Tensor *lse) {
        Tensor out;
        std::tie(out, *lse) = forward_below_autograd(q, k, v, mask, rng_state, scale, window_left,
                                                     window_right, diagonal_offset, dropout_p);
        ctx->save_for_backward(
            {q, k, v, mask.value_or(Tensor()), rng_state.value_or(Tensor()), out, *lse});
        ctx->saved_data["scale"] = scale;
        ctx->saved_data["window_left"] = window_left;
        ctx->saved_data["window_right"] = window_right;
        ctx->saved_data["diagonal_offset"] = diagonal_offset;
        ctx->saved_data["dropout_p"] = dropout_p;
        return out;
    }

    static variable_list backward(AutogradContext *ctx, const variable_list &grad_outputs) {
        static const auto op =
            find_operator<AttentionBackward>("flash_attn_ext::attention_backward");
        const variable_list saved = ctx->get_saved_variables();
        const auto given = [](const Tensor &t) {
            return t.defined() ? OptionalTensor(t) : std::nullopt;
        };
        const OptionalTensor mask = given(saved[3]), rng_state = given(saved[4]);
        // Only tensors that were given have an edge: the fourth is the mask's if there is a mask.
        const std::array<bool, 4> wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                            ctx->needs_input_grad(2),
                                            mask && ctx->needs_input_grad(3)};
        const auto &options = ctx->saved_data;
        // Autograd would look at every argument only to find that none is differentiated again.
        std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
        if (!at::GradMode::is_enabled())
            below_autograd.emplace();
        const auto [dq, dk, dv, dmask] =
            op.call(grad_outputs[0], saved[0], saved[1], saved[2], mask, rng_state, saved[5],
                    saved[6], options.at("scale").toDouble(), options.at("window_left").toSymInt(),
                    options.at("window_right").toSymInt(), options.at("diagonal_offset").toSymInt(),
                    options.at("dropout_p").toDouble(), wanted);
        variable_list grads = {dq, dk, dv, dmask};
        for (size_t i = 0; i < wanted.size(); i++) {
            if (!wanted[i])
                grads[i] = Tensor();
        }
        grads.resize(11); // one for each argument of forward
        return grads;
    }
};

// In reverse or in forward mode (which Attention refuses, with an error).
bool is_differentiated(const Tensor &t) {
    return (at::GradMode::is_enabled() && t.requires_grad()) || t._fw_grad(0).defined();
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor &q, const Tensor &k, const Tensor &v,
                                             const OptionalTensor &mask,
                                             const OptionalTensor &rng_state, double scale,
                                             c10::SymInt window_left, c10::SymInt window_right,
                                             c10::SymInt diagonal_offset, double dropout_p) {
    if (!is_differentiated(q) && !is_differentiated(k) && !is_differentiated(v) &&
        !(mask && is_differentiated(*mask)))
        return forward_below_autograd(q, k, v, mask, rng_state, scale, window_left, window_right,
                                      diagonal_offset, dropout_p);
    Tensor lse;
    Tensor out = Attention::apply(q, k, v, mask, rng_state, scale, window_left, window_right,
                                  diagonal_offset, dropout_p, &lse);
    return {std::move(out), std::move(lse)};
}

} // namespace

TORCH_LIBRARY_IMPL(flash_attn_ext, Autograd, m) {
    m.impl("attention_forward", attention_forward);
    // The backward of the backward raises "derivative ... is not implemented".
    m.impl("attention_backward", torch::autograd::autogradNotImplementedFallback());
}

} // namespace flash_attn_ext
