// attention_forward as a node of the autograd graph; its backward calls attention_backward.
#include "ops.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

namespace flash_attn_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Edge;
using torch::autograd::edge_list;
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

// What torch::autograd::CppNode, which compiled autograd knows, asks of a
// torch::autograd::Function.
struct Attention {
    // backward() reads saved variables and saved_data alone, as compiled autograd asks.
    static constexpr bool is_traceable = true;

    static variable_list backward(AutogradContext *ctx, const variable_list &grad_outputs) {
        static const auto op =
            find_operator<AttentionBackward>("flash_attn_ext::attention_backward");
        variable_list grads(4); // of q, k, v and the mask
        if (!grad_outputs[0].defined())
            return grads;
        const variable_list saved = ctx->get_saved_variables();
        const auto given = [](const Tensor &t) {
            return t.defined() ? OptionalTensor(t) : std::nullopt;
        };
        std::array<bool, 4> wanted;
        for (size_t i = 0; i < wanted.size(); i++)
            wanted[i] = ctx->needs_input_grad(i);
        const auto options = ctx->saved_data.at("options").toList();
        // Autograd would look at every argument only to find that none is differentiated again.
        std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
        if (!at::GradMode::is_enabled())
            below_autograd.emplace();
        std::tie(grads[0], grads[1], grads[2], grads[3]) =
            op.call(grad_outputs[0], saved[0], saved[1], saved[2], given(saved[3]), given(saved[4]),
                    saved[6], saved[5], options.get(0).toDouble(), options.get(1).toSymInt(),
                    options.get(2).toSymInt(), options.get(3).toSymInt(), options.get(4).toDouble(),
                    wanted);
        for (size_t i = 0; i < wanted.size(); i++) {
            if (!wanted[i])
                grads[i].reset();
        }
        return grads;
    }
};

// torch::autograd::Function::apply would describe every argument and result, and fill a map, which
// takes longer than a small attention.
struct AttentionNode final : torch::autograd::CppNode<Attention> {
    std::string name() const override { return "AttentionBackward"; }

    variable_list apply(variable_list &&grad_outputs) override {
        const std::lock_guard lock(mutex_); // threads can share a graph
        return Attention::backward(&ctx_, grad_outputs);
    }
};

} // namespace
} // namespace flash_attn_ext

// What AutogradContext::save_variables does, which looks for the output, the last, among the
// others, and lets the vector grow step by step.
template <> void torch::autograd::CppNode<flash_attn_ext::Attention>::save_variables_to_ctx() {
    auto &saved = ctx_.saved_variables_;
    saved.reserve(ctx_.to_save_.size());
    for (const at::Tensor &t : ctx_.to_save_)
        saved.emplace_back(t, &t == &ctx_.to_save_.back());
    ctx_.to_save_.clear();
}

namespace flash_attn_ext {
namespace {

// std::shared_ptr<Node>, or c10::intrusive_ptr<Node> from PyTorch 2.13 on.
using NodePtr = decltype(Edge::function);

template <class N, class Pointer> auto make_node() {
    if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
        return std::shared_ptr<N>(new N, [](N *node) { deleteNode(node); });
    else
        return c10::make_intrusive<N>();
}

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
    // torch.func has a way of its own: flash_attn_ext/ops.py.
    if (const auto &functorch = at::functorch::functorchTLSAccessor())
        functorch->checkSupportsCppAutogradFunction();
    for (const Tensor &t : {q, k, v, mask.value_or(Tensor())})
        TORCH_CHECK_NOT_IMPLEMENTED(!t.defined() || !t._fw_grad(0).defined(),
                                    "flash_attn_ext: forward-mode derivatives are not implemented");

    const auto node = make_node<AttentionNode, NodePtr>();
    node->set_ctx_grad_fn(node);
    edge_list edges;
    edges.reserve(4);
    for (const OptionalTensor &t : {OptionalTensor(q), OptionalTensor(k), OptionalTensor(v), mask})
        edges.push_back(t ? torch::autograd::impl::gradient_edge(*t) : Edge());
    node->set_next_edges(std::move(edges));
    node->is_variable_input_.assign(4, true);
    auto [out, lse] = [&] {
        const at::AutoGradMode no_grad(false);
        return forward_below_autograd(q, k, v, mask, rng_state, scale, window_left, window_right,
                                      diagonal_offset, dropout_p);
    }();
    torch::autograd::set_history(out, node);
    AutogradContext &ctx = node->ctx_;
    ctx.set_materialize_grads(false);
    ctx.save_for_backward(
        {q, k, v, mask.value_or(Tensor()), rng_state.value_or(Tensor()), lse, out});
    node->save_variables_to_ctx();
    c10::impl::GenericList options(c10::AnyType::get());
    options.reserve(5);
    for (c10::IValue option :
         {c10::IValue(scale), c10::IValue(window_left), c10::IValue(window_right),
          c10::IValue(diagonal_offset), c10::IValue(dropout_p)})
        options.push_back(std::move(option));
    ctx.saved_data["options"] = std::move(options);
    return {std::move(out), std::move(lse)};
}

} // namespace

TORCH_LIBRARY_IMPL(flash_attn_ext, Autograd, m) {
    m.impl("attention_forward", attention_forward);
    // The backward of the backward raises "derivative ... is not implemented".
    m.impl("attention_backward", torch::autograd::autogradNotImplementedFallback());
}

} // namespace flash_attn_ext
