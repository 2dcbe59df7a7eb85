"""Which kernel a call takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _C
from .functional import Call, canonicalize, foreign

if TYPE_CHECKING:
    from ._C import CudaCall


@dataclass(frozen=True)
class Explanation:
    """Prints as one readable paragraph.

    kernel: "cpu" (csrc/cpu), "cuda" (csrc/cuda), "tiled" (series/tiled.py), "pytorch" (PyTorch's
        own function) or "meta" (nothing is computed).
    isa: what the kernel is compiled for, such as "avx512" or "sm_90"; None where there is none.
    reason: why this kernel.
    problem: the call as the kernel gets it: dtype, sizes, mask, dropout.
    """

    kernel: str
    isa: str | None
    reason: str
    problem: str

    def __str__(self) -> str:
        kernel = f"{self.kernel} ({self.isa})" if self.isa else self.kernel
        return f"kernel  {kernel}\nreason  {self.reason}\nproblem {self.problem}"


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Explanation:
    """Which kernel :func:`scaled_dot_product_attention` takes for these arguments, and why.

    Computes nothing. Raises what scaled_dot_product_attention raises.
    """
    stranger = foreign(query, key, value, attn_mask)
    if stranger:
        reason = f"among the arguments is {stranger}: left to PyTorch's own function"
        return Explanation("pytorch", None, reason, problem="not looked at")
    call = canonicalize(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return Explanation(*_choose_kernel(call), problem=_describe(call))


def _choose_kernel(call: Call) -> tuple[str, str | None, str]:
    """The kernel that PyTorch's dispatcher has for a call, what it is compiled for, and why it."""
    device = call.query.device
    if device.type == "meta":
        return "meta", None, "meta tensors hold no data: only shapes are computed"
    if device.type == "cpu":
        return "cpu", _C.isa(), "the tensors are on cpu, for which there are kernels"
    if device.type == "cuda":
        reason = _C.cuda_unsupported(_cuda_call(call), device.index)
        if reason:
            return "tiled", None, reason
        _, arch = _C.cuda_info()["devices"][device.index]
        return "cuda", f"sm_{arch}", "the tensors are on cuda, and there are kernels for the call"
    return "tiled", None, f"the tensors are on {device.type}, for which there are no kernels yet"


def _cuda_call(call: Call) -> CudaCall:
    tensors = (call.query, call.key, call.value, call.mask)
    return {
        "dtype": _name(call.query.dtype),
        "head_dim": call.query.size(-1),
        "head_dim_v": call.value.size(-1),
        "seq_q": call.query.size(-2),
        "mask": None if call.mask is None else _name(call.mask.dtype),
        "window": call.is_causal,
        "dropout": call.dropout_p > 0,
        "backward": any(x is not None and x.requires_grad for x in tensors),
        "mask_grad": call.mask is not None and call.mask.requires_grad,
        "mask_broadcasts": False,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "allow_tf32": False,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(call: Call) -> str:
    (B, Hq, Sq, D), (_, Hk, Sk, Dv) = call.query.shape, call.value.shape
    parts = [
        _name(call.query.dtype),
        f"B={B} Hq={Hq} Hk={Hk} Sq={Sq} Sk={Sk} D={D} Dv={Dv}",
    ]
    if call.is_causal:
        corner = f", diagonal offset {call.diagonal_offset}" if call.diagonal_offset else ""
        parts.append(f"causal{corner}")
    if call.mask is not None:
        gradient = " with gradient" if call.mask.requires_grad else ""
        parts.append(f"{_name(call.mask.dtype)} mask {list(call.mask.shape)}{gradient}")
    if call.dropout_p > 0:
        parts.append(f"dropout {call.dropout_p:g}")
    return ", ".join(parts)
