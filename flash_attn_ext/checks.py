"""What scaled_dot_product_attention refuses, in PyTorch's words wherever PyTorch has some."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CPP_NAMES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "c10::Half",
    torch.bfloat16: "c10::BFloat16",
    torch.uint8: "unsigned char",
    torch.int8: "signed char",
    torch.int16: "short int",
    torch.int32: "int",
    torch.int64: "long int",
}


def types(
    query: object,
    key: object,
    value: object,
    attn_mask: object,
    is_causal: object,
    enable_gqa: object,
) -> None:
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        for name, argument in (("query", query), ("key", key), ("value", value)):
            if not isinstance(argument, Tensor):
                raise _type_error(name, "Tensor", argument)
    if not (attn_mask is None or isinstance(attn_mask, Tensor)):
        raise _type_error("attn_mask", "Tensor", attn_mask)
    if not isinstance(is_causal, (bool, torch.SymBool)):
        raise _type_error("is_causal", "bool", is_causal)
    if not isinstance(enable_gqa, (bool, torch.SymBool)):
        raise _type_error("enable_gqa", "bool", enable_gqa)


def number(name: str, x: object) -> float:
    """x as a float, if it is a number or a tensor that holds one."""
    if isinstance(x, (float, torch.SymFloat)):
        return x
    if isinstance(x, Tensor) and x.dim() == 0 and not x.requires_grad:
        x = x.item()
    if not isinstance(x, (Real, torch.SymInt)):
        raise _type_error(name, "float", x)
    return float(x)


def probability(dropout_p: object) -> float:
    dropout_p = number("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {dropout_p:g}")
    return dropout_p


def _type_error(name: str, expected: str, argument: object) -> TypeError:
    return TypeError(
        f"scaled_dot_product_attention(): argument '{name}' must be {expected}, "
        f"not {type(argument).__name__}"
    )


def tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    dtype, device = query.dtype, query.device
    if not dtype == key.dtype == value.dtype:
        raise RuntimeError(
            "Expected query, key, and value to have the same dtype, but got query.dtype: "
            f"{_name(dtype)} key.dtype: {_name(key.dtype)} and value.dtype: {_name(value.dtype)} "
            "instead."
        )
    if not device == key.device == value.device:
        raise RuntimeError(
            "Expected query, key, and value to have the same device type, but got query.device: "
            f"{device} key.device: {key.device} and value.device: {value.device} instead."
        )
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        raise RuntimeError(
            "Expected query, key, and value to all be  at least 2 dimensional, but got query.dim: "
            f"{query.dim()} key.dim: {key.dim()} and value.dim: {value.dim()} instead."
        )
    if dtype not in _FLOATS:
        raise RuntimeError(
            "Expected query, key, and value to have dtype float32, float64, bfloat16 or float16, "
            f"but got query.dtype: {_name(dtype)} instead."
        )
    if not query.layout == key.layout == value.layout == torch.strided:
        raise RuntimeError(
            "Expected query, key, and value to have layout torch.strided, but got query.layout: "
            f"{query.layout} key.layout: {key.layout} and value.layout: {value.layout} instead."
        )
    if query.size(-1) != key.size(-1):
        raise RuntimeError(
            "Expected query and key to have the same size of the last dimension, but got "
            f"query.size(-1): {query.size(-1)} and key.size(-1): {key.size(-1)} instead."
        )
    if key.size(-2) != value.size(-2):
        raise RuntimeError(
            "Expected key and value to have the same length, but got "
            f"key.size(-2): {key.size(-2)} and value.size(-2): {value.size(-2)} instead."
        )


def mask(attn_mask: Tensor, query: Tensor, is_causal: bool) -> None:
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            "Expected attn_mask dtype to be bool or float or to match query dtype, but got "
            f"attn_mask.dtype: {_name(attn_mask.dtype)} and  query.dtype: {_name(query.dtype)} "
            "instead."
        )
    if attn_mask.device != query.device:
        raise RuntimeError(
            "Expected attn_mask to be on the device of query, but got "
            f"attn_mask.device: {attn_mask.device} and query.device: {query.device} instead."
        )
    if is_causal:
        raise RuntimeError(
            "_scaled_dot_product_attention: Explicit attn_mask should not be set when "
            "is_causal=True"
        )


def _name(dtype: torch.dtype) -> str:
    """A dtype as C++ prints it."""
    return _CPP_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def divides(heads_k: int, heads_q: int) -> bool:
    return heads_k == heads_q or (heads_k > 0 and heads_q % heads_k == 0)


def groups(heads_q: int, heads_k: int, heads_v: int) -> None:
    if not (divides(heads_k, heads_q) and divides(heads_v, heads_q)):
        raise RuntimeError(
            "Number of heads in key and value must divide the number of heads in query, but got "
            f"{heads_k} heads in key, {heads_v} in value and {heads_q} in query."
        )


def broadcast_size(tensors: Sequence[Tensor], dim: int, ndim: int) -> int:
    """What query, key and value broadcast to in dimension `dim`, counted from the end."""
    size = 1
    for x in tensors:
        other = x.size(dim) if x.dim() >= -dim else 1
        if other != 1:
            if size not in (1, other):
                raise RuntimeError(
                    f"The size of tensor a ({size}) must match the size of tensor b ({other}) at "
                    f"non-singleton dimension {ndim + dim}: query, key and value must broadcast in "
                    "all but their last two dimensions (with enable_gqa=True the number of heads "
                    "in key and value may also divide that in query)"
                )
            size = other
    return size


def broadcasts(name: str, x: Tensor, shape: Sequence[int]) -> None:
    fits = x.dim() <= len(shape) and all(
        size in (1, full) for size, full in zip(reversed(x.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise RuntimeError(
            f"Expected {name} to be broadcastable to {list(shape)} (..., heads, query length, key "
            f"length), but got {name}.shape: {list(x.shape)} instead."
        )
