"""scaled_dot_product_attention: PyTorch's meaning, brought into the one form that kernels know.

Whatever PyTorch accepts (2-D to n-D, broadcast batches, grouped heads, any mask, autocast, the
biases of torch.nn.attention.bias) becomes, by views where that is possible,

    Q [B, Hq, Sq, D], K [B, Hk, Sk, D], V [B, Hk, Sk, Dv], mask [1|B, 1|Hq, 1|Sq, 1|Sk]

and one call of an operator. PyTorch's dispatcher finds the kernel: that of csrc/cpu on the CPU, the
tiled walkthrough elsewhere (see `fallback`).
"""

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _C, checks
from .ops import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query @ key^T + attn_mask) @ value, without ever building the N x N matrix.

    A drop-in for :func:`torch.nn.functional.scaled_dot_product_attention`, with gradients for
    query, key, value and a float mask. L and S are the lengths of queries and keys, E and Ev the
    head sizes.

    Args:
        query: (..., Hq, L, E); float32, float64, bfloat16 or float16, as are key and value.
        key: (..., H, S, E). Dimensions before the last two broadcast between query, key and value.
        value: (..., H, S, Ev).
        attn_mask: broadcasts to (..., Hq, L, S). Bool: True where a key takes part. Float (of the
            dtype of query, or float32): added to the scores. Or what
            :func:`torch.nn.attention.bias.causal_lower_right` or `causal_upper_left` returns.
        dropout_p: the probability with which attention weights are dropped; applied whenever it
            is above 0. `torch.manual_seed` governs which.
        is_causal: query i attends to keys 0 to i, also where L != S. Excludes attn_mask.
        scale: 1 / sqrt(E) where it is None. May be zero or negative.
        enable_gqa: lets key and value have fewer heads, numbers that divide Hq.

    Returns:
        (..., Hq, L, Ev), in memory as (..., L, Hq, Ev): `transpose(-3, -2).flatten(-2)` is free.
        0 in rows that attend to nothing.

    Raises:
        TypeError, RuntimeError: with PyTorch's wording, for what PyTorch refuses as well.

    See Dao et al., "FlashAttention" (2022) and "FlashAttention-2" (2023);
    :mod:`flash_attn_ext.series` walks through it.
    """
    if not torch.compiler.is_dynamo_compiling():
        out = _C.attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )  # None: not one of the plain calls that need none of what follows
        if out is not None:
            return out

    if has_torch_function_variadic(query, key, value, attn_mask) or _is_nested(query):
        arguments = (query, key, value, attn_mask, dropout_p, is_causal)
        options = {"scale": scale, "enable_gqa": enable_gqa}
        if torch._C._is_torch_function_mode_enabled():
            return handle_torch_function(
                scaled_dot_product_attention, arguments[:4], *arguments, **options
            )
        if foreign(query, key, value, attn_mask):
            return torch._C._nn.scaled_dot_product_attention(*arguments, **options)

    call = canonicalize(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    rng_state = None
    if call.dropout_p > 0:
        rng_state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=call.query.device)
    out, _ = attention(
        call.query,
        call.key,
        call.value,
        call.mask,
        rng_state,
        call.scale,
        -1,
        0 if call.is_causal else -1,
        call.diagonal_offset,
        call.dropout_p,
    )  # [B, Hq, Sq, Dv]
    return out if call.shape is None else out.reshape(call.shape)


def foreign(*tensors: Tensor | None) -> str | None:
    """What PyTorch's own function has to handle among the tensors, None where there is no such.

    That is nested tensors, and types that override functions: they know PyTorch's function but
    not ours. (CausalBias is such a type, but we know what it means.)
    """
    plain = torch._C._disabled_torch_function_impl
    for tensor in tensors:
        kind = type(tensor)
        if _is_nested(tensor):
            return "a nested tensor"
        overrides = getattr(kind, "__torch_function__", plain) is not plain
        if overrides and kind is not Tensor and not _is_causal_bias(tensor):
            return f"a {kind.__name__}, a type that overrides functions"
    return None


def _is_nested(tensor: Tensor | None) -> bool:
    return getattr(tensor, "is_nested", False)


def _is_causal_bias(tensor: Tensor | None) -> bool:
    """Whether it is a CausalBias. Who has one has imported it; we do not: that takes a second."""
    bias = sys.modules.get("torch.nn.attention.bias")
    return bias is not None and isinstance(tensor, bias.CausalBias)


class Call(NamedTuple):
    """One attention in canonical form."""

    query: Tensor  # [B, Hq, Sq, D]
    key: Tensor  # [B, Hk, Sk, D]
    value: Tensor  # [B, Hk, Sk, Dv]
    mask: Tensor | None  # [1|B, 1|Hq, 1|Sq, 1|Sk]
    scale: float
    is_causal: bool
    diagonal_offset: int
    dropout_p: float
    shape: tuple[int, ...] | None  # what to reshape the output to; None: it is right as it is


def canonicalize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    """Checks the arguments of scaled_dot_product_attention and brings them into canonical form."""
    checks.types(query, key, value, attn_mask, is_causal, enable_gqa)
    dropout_p = checks.probability(dropout_p)

    bias = None
    if _is_causal_bias(attn_mask):
        if is_causal:
            raise ValueError("CausalBias should not be used with causal=True")
        bias, attn_mask, is_causal = attn_mask, None, True

    if torch._C._is_any_autocast_enabled():
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    checks.tensors(query, key, value)
    if attn_mask is not None:
        checks.mask(attn_mask, query, is_causal)
    diagonal_offset = 0 if bias is None else _diagonal_offset(bias, query.size(-2), key.size(-2))

    if scale is None:
        head_dim = query.size(-1)
        scale = head_dim**-0.5 if head_dim > 0 else 1.0  # a sum over nothing: all scores are 0
    else:
        scale = checks.number("scale", scale)

    query, key, value, shape = _broadcast(query, key, value, enable_gqa)
    if attn_mask is not None:
        attn_mask = _broadcast_mask(attn_mask, (*(shape or query.shape)[:-1], key.size(-2)))
    return Call(query, key, value, attn_mask, scale, is_causal, diagonal_offset, dropout_p, shape)


def _autocast(query: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast does for its list of lower-precision functions, to which attention belongs."""
    tensors, device = (query, *others), query.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta: unknown to autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def _diagonal_offset(bias: Tensor, L: int, S: int) -> int:
    """bias: a CausalBias."""
    if bias.variant.name == "UPPER_LEFT":
        return 0
    if (bias.seq_len_q, bias.seq_len_kv) != (L, S):
        raise RuntimeError(
            f"Expected attn_mask, a causal_lower_right({bias.seq_len_q}, {bias.seq_len_kv}), to "
            f"have the lengths of query and key, but got query.size(-2): {L} and "
            f"key.size(-2): {S}."
        )
    return S - L


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...] | None]:
    """[B, Hq, L, E], [B, Hk, S, E], [B, Hk, S, Ev] and the shape of the output (see Call)."""
    if query.dim() == key.dim() == value.dim() == 4:
        (batch_q, heads_q, _, _), (batch_k, heads_k, _, _) = query.shape, key.shape
        batch_v, heads_v, _, _ = value.shape
        if (
            batch_q == batch_k == batch_v
            and heads_k == heads_v
            and (heads_q == heads_k or (enable_gqa and checks.divides(heads_k, heads_q)))
        ):
            return query, key, value, None

    tensors = (query, key, value)
    ndim = max(x.dim() for x in tensors)
    heads_q, heads_k, heads_v = (x.size(-3) if x.dim() > 2 else 1 for x in tensors)
    if enable_gqa:
        checks.groups(heads_q, heads_k, heads_v)
        if heads_k != heads_v:
            key, value = _repeat_heads(key, heads_q), _repeat_heads(value, heads_q)
            heads_k = heads_q
    elif heads_k == heads_v == 1:
        pass  # a head that broadcasts over those of query is one that they share as a group
    else:
        heads_q = heads_k = checks.broadcast_size(tensors, -3, ndim)
    batch = [checks.broadcast_size(tensors, dim, ndim) for dim in range(-ndim, -3)]

    def canonical(x: Tensor, heads: int) -> Tensor:
        *_, length, head_dim = x.shape
        x = x.expand(*batch, heads, length, head_dim)
        return x.reshape(math.prod(batch), heads, length, head_dim)

    shape = (*batch, heads_q, query.size(-2), value.size(-1))[-ndim:]
    return (
        canonical(query, heads_q),
        canonical(key, heads_k),
        canonical(value, heads_k),
        None if ndim == 4 else shape,
    )


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[..., H, S, D] -> [..., heads, S, D]"""
    return x if x.size(-3) == heads else x.repeat_interleave(heads // x.size(-3), dim=-3)


def _broadcast_mask(mask: Tensor, scores: tuple[int, ...]) -> Tensor:
    """[1|B, 1|Hq, 1|L, 1|S] from a mask that broadcasts to the shape `scores`: (..., Hq, L, S)."""
    checks.broadcasts("attn_mask", mask, scores)
    if not mask.requires_grad:
        # What the caller expanded is read once, not Hq or L times.
        for dim, stride in enumerate(mask.stride()):
            if stride == 0 and mask.size(dim) > 1:
                mask = mask.narrow(dim, 0, 1)
    if mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    batch = scores[:-3]
    if len(batch) > 1:  # as many dimensions of query, key and value have become one
        if any(size != 1 for size in mask.shape[:-3]):
            mask = mask.expand(*batch, *mask.shape[-3:])
        mask = mask.flatten(0, -4)
    return mask
