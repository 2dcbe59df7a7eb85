"""The compiled operators, as the rest of PyTorch sees them.

The schemas, the CPU implementation and autograd are C++ (csrc/binding). Here is what PyTorch wants
to know in Python: result shapes without running (fakes: torch.compile, torch.export, meta tensors),
batching rules (torch.vmap) and FLOP counts. `attention` is how the package calls the forward.

Shape comments: B batch, Hq and Hk heads of queries and of keys/values, Sq and Sk lengths, D and Dv
head sizes, V the size of the dimension that torch.vmap maps over.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _extension  # noqa: F401  (registers the operators)

_forward = torch.ops.flash_attn_ext.attention_forward.default
_backward = torch.ops.flash_attn_ext.attention_backward.default


def attention(
    q: Tensor,  # [B, Hq, Sq, D]
    k: Tensor,  # [B, Hk, Sk, D]
    v: Tensor,  # [B, Hk, Sk, Dv]
    mask: Tensor | None,  # [B or 1, Hq or 1, Sq or 1, Sk or 1]
    rng_state: Tensor | None,  # [2], int64
    scale: float,
    window_left: int,
    window_right: int,
    diagonal_offset: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:  # [B, Hq, Sq, Dv], [B, Hq, Sq]
    """Output and log-sum-exp. csrc/flash_attention.h tells what the arguments mean."""
    function = _forward
    if torch._C._are_functorch_transforms_active():
        function = _FunctorchAttention.apply
    return function(
        q, k, v, mask, rng_state, scale, window_left, window_right, diagonal_offset, dropout_p
    )


class _FunctorchAttention(torch.autograd.Function):
    """Autograd for torch.func.grad and its kin, which refuse a C++ torch::autograd::Function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, mask, rng_state, scale, left, right, offset, p):  # Dynamo needs the names
        return _forward(q, k, v, mask, rng_state, scale, left, right, offset, p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask, rng_state, *options = inputs
        out, lse = output
        ctx.save_for_backward(q, k, v, mask, rng_state, out, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse)

    @staticmethod
    def backward(ctx, grad_out, _grad_lse):
        q, k, v, mask, rng_state, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        grads = _backward(grad_out, q, k, v, mask, rng_state, out, lse, *ctx.options, wanted)
        return *(grad if want else None for grad, want in zip(grads, wanted)), *[None] * 6


# --- fakes: sizes, strides and dtypes as csrc/binding/ops.cpp has them ---


def _check_devices(q, **tensors):
    for name, t in {"q": q, **tensors}.items():
        if t is None and name not in ("mask", "rng_state"):
            raise RuntimeError(f"flash_attn_ext: {name} must be a Tensor, but got None")
        if t is not None and t.device != q.device:
            raise RuntimeError(
                f"flash_attn_ext: {name} must be on the device of q ({q.device}), "
                f"but is on {t.device}"
            )


@torch.library.register_fake("flash_attn_ext::attention_forward")
def _forward_fake(q, k, v, mask, rng_state, *options):
    _check_devices(q, k=k, v=v, mask=mask, rng_state=rng_state)
    (batch, heads, seq_q, _), dim_v = q.shape, v.shape[3]
    out = q.new_empty(batch, seq_q, heads, dim_v).transpose(1, 2)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty(batch, heads, seq_q, dtype=acc)


@torch.library.register_fake("flash_attn_ext::attention_backward")
def _backward_fake(grad_out, q, k, v, mask, rng_state, out, lse, *options):
    _check_devices(q, grad_out=grad_out, k=k, v=v, mask=mask, rng_state=rng_state, out=out, lse=lse)

    def rows_are_contiguous(t):
        return t.shape[-1] <= 1 or t.stride(-1) == 1

    def gradient_like(t):
        t = t if rows_are_contiguous(t) else t.contiguous()
        grad = torch.empty_like(t)
        return grad if rows_are_contiguous(grad) else t.new_empty(t.shape)

    *_, wanted = options
    torch._check(
        mask is not None or not wanted[3],
        lambda: "flash_attn_ext: grad_wanted asks for the gradient of mask, but there is none",
    )
    grads = [gradient_like(t) if want else t.new_empty(0) for t, want in zip((q, k, v), wanted)]
    return *grads, mask.new_empty(mask.shape) if wanted[3] else q.new_empty(0)


# --- vmap: V joins the batch dimension ---


def _fold(tensors, dims, size, batch):
    """Each [V, B, ...] as [V * B, ...], where it may lack V (its dim is None) or have 1 for B.

    Copies only what differs along B but not along V.
    """
    for t, dim in zip(tensors, dims):
        if t is None:
            yield None
        else:
            t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            yield t.expand(size, batch, *t.shape[2:]).flatten(0, 1)


def _call_for_each(op, size, in_dims, args):
    """One call for each element of V: what dropout keeps depends on the place in the batch."""

    def element(i):
        return (a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims))

    results = [torch.stack(parts) for parts in zip(*(op(*element(i)) for i in range(size)))]
    return tuple(results), (0,) * len(results)


@torch.library.register_vmap("flash_attn_ext::attention_forward")
def _forward_vmap(info, in_dims, *args):
    q, k, v, mask, _, *options, dropout_p = args
    size, batch = info.batch_size, q.shape[1 if in_dims[0] == 0 else 0]
    if dropout_p > 0:
        return _call_for_each(_forward, size, in_dims, args)
    q, k, v, mask = _fold((q, k, v, mask), in_dims, size, batch)
    results = _forward(q, k, v, mask, None, *options, dropout_p)
    return tuple(t.unflatten(0, (size, batch)) for t in results), (0, 0)


@torch.library.register_vmap("flash_attn_ext::attention_backward")
def _backward_vmap(info, in_dims, *args):
    grad_out, q, k, v, mask, _, out, lse, *options, dropout_p, wanted = args
    size, batch = info.batch_size, q.shape[1 if in_dims[1] == 0 else 0]
    if dropout_p > 0:
        return _call_for_each(_backward, size, in_dims, args)
    grad_out, q, k, v, folded_mask = _fold((grad_out, q, k, v, mask), in_dims, size, batch)
    out, lse = _fold((out, lse), in_dims[6:], size, batch)
    grads = _backward(grad_out, q, k, v, folded_mask, None, out, lse, *options, dropout_p, wanted)
    grads = [t.unflatten(0, (size, batch)) if want else t for t, want in zip(grads, wanted)]
    if wanted[3] and mask.shape[1 if in_dims[4] == 0 else 0] != batch:
        grads[3] = grads[3].sum(1, keepdim=True)  # the mask has one row for the whole of B
    return tuple(grads), tuple(0 if want else None for want in wanted)


# --- FLOPs, counted as for PyTorch's own attention: masked scores included ---


@register_flop_formula(torch.ops.flash_attn_ext.attention_forward)
def _forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    batch, heads, seq_q, dim = q_shape
    # Q K^T and P V
    return 2 * batch * heads * seq_q * k_shape[2] * (dim + v_shape[3])


@register_flop_formula(torch.ops.flash_attn_ext.attention_backward)
def _backward_flops(grad_out_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs):
    batch, heads, seq_q, dim = q_shape
    # Q K^T, dS K and dS^T Q over D; dO V^T and P^T dO over Dv
    return 2 * batch * heads * seq_q * k_shape[2] * (3 * dim + 2 * v_shape[3])
