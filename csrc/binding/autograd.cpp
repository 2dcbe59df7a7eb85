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

struct Attention : torch::autograd::Function<Attention> {
    // backward() reads saved variables and saved_data alone, as compiled autograd asks.
    static constexpr bool is_traceable = true;

    // lse comes back through a pointer rather than as a result: it has no gradient.
    static Tensor forward(AutogradContext *ctx, const Tensor &q, const Tensor &k, const Tensor &v,
                          const OptionalTensor &mask, const OptionalTensor &rng_state,
                          double scale, c10::SymInt window_left,
                          c10::SymInt window_right, c10::SymInt diagonal_offset,
                          double dropout_p, Tensor *lse) {
        static const auto attention_forward =
            find_operator<AttentionForward>("flash_attn_ext::attention_forward");
        at::AutoDispatchBelowADInplaceOrView guard;
        Tensor out;
        std::tie(out, *lse) =
            attention_forward.call(q, k, v, mask, rng_state, scale, window_left, window_right,
                                   diagonal_offset, dropout_p);
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
        static const auto attention_backward =
            find_operator<AttentionBackward>("flash_attn_ext::attention_backward");
        const variable_list saved = ctx->get_saved_variables();
        const auto optional = [](const Tensor &t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
        const OptionalTensor mask = optional(saved[3]), rng_state = optional(saved[4]);
        // Only tensors that were given have an edge, so 3 is the mask's where there is a mask.
        const std::array<bool, 4> wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                            ctx->needs_input_grad(2),
                                            mask && ctx->needs_input_grad(3)};
        auto &options = ctx->saved_data;
        auto [dq, dk, dv, dmask] = attention_backward.call(
            grad_outputs[0], saved[0], saved[1], saved[2], mask, rng_state, saved[5], saved[6],
            options["scale"].toDouble(), options["window_left"].toSymInt(),
            options["window_right"].toSymInt(), options["diagonal_offset"].toSymInt(),
            options["dropout_p"].toDouble(), wanted);
        variable_list grads(11); // one for each argument of forward
        if (wanted[0])
            grads[0] = dq;
        if (wanted[1])
            grads[1] = dk;
        if (wanted[2])
            grads[2] = dv;
        if (wanted[3])
            grads[3] = dmask;
        return grads;
    }
};

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor &q, const Tensor &k, const Tensor &v, const OptionalTensor &mask,
    const OptionalTensor &rng_state, double scale, c10::SymInt window_left,
    c10::SymInt window_right, c10::SymInt diagonal_offset, double dropout_p) {
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
