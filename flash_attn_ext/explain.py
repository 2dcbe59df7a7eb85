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
    files: in csrc/cuda/kernels, what runs there, in order: the forward, then the backward where
        an input requires a gradient; empty unless the kernel is "cuda".
    """

    kernel: str
    isa: str | None
    reason: str
    problem: str
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        kernel = f"{self.kernel} ({self.isa})" if self.isa else self.kernel
        files = f": {', '.join(self.files)}" if self.files else ""
        return f"kernel  {kernel}{files}\nreason  {self.reason}\nproblem {self.problem}"


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
    return _choose_kernel(call)


def _choose_kernel(call: Call) -> Explanation:
    """The kernel that PyTorch's dispatcher has for a call, what it is compiled for, and why it."""
    device, problem = call.query.device, _describe(call)
    if device.type == "meta":
        reason = "meta tensors hold no data: only shapes are computed"
        return Explanation("meta", None, reason, problem)
    if device.type == "cpu":
        reason = "the tensors are on cpu, for which there are kernels"
        return Explanation("cpu", _C.isa(), reason, problem)
    if device.type == "cuda":
        reason = _C.cuda_unsupported(_cuda_call(call, _wants_gradient(call)), device.index)
        if reason:
            return Explanation("tiled", None, reason, problem)
        _, arch = _C.cuda_info()["devices"][device.index]
        return _cuda_kernels(call, arch)
    reason = f"the tensors are on {device.type}, for which there are no kernels yet"
    return Explanation("tiled", None, reason, problem)


def _cuda_kernels(call: Call, arch: int) -> Explanation:
    """What a supported call takes on an architecture (90 for sm_90), wherever the tensors are."""
    chosen = _C.cuda_choice(_cuda_call(call, backward=False), arch)
    if _wants_gradient(call):
        chosen += _C.cuda_choice(_cuda_call(call, backward=True), arch)
    reasons = ["the tensors are on cuda, and there are kernels for the call"]
    reasons += [why_not for _, why_not in chosen if why_not]
    files = tuple(file for file, _ in chosen)
    return Explanation("cuda", f"sm_{arch}", "; ".join(reasons), _describe(call), files)


def _wants_gradient(call: Call) -> bool:
    tensors = (call.query, call.key, call.value, call.mask)
    return any(x is not None and x.requires_grad for x in tensors)


def _cuda_call(call: Call, backward: bool) -> CudaCall:
    scores = (*call.query.shape[:-1], call.key.size(-2))
    return {
        "dtype": _name(call.query.dtype),
        "head_dim": call.query.size(-1),
        "head_dim_v": call.value.size(-1),
        "aligned": _rows_are_aligned(call),
        "seq_q": call.query.size(-2),
        "mask": None if call.mask is None else _name(call.mask.dtype),
        "window": call.is_causal,
        "dropout": call.dropout_p > 0,
        "backward": backward,
        "mask_grad": call.mask is not None and call.mask.requires_grad,
        "mask_broadcasts": call.mask is not None and call.mask.shape != scores,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "allow_tf32": False,  # decides about the machine code, not about the kernel
    }


def _rows_are_aligned(call: Call) -> bool:
    """Whether all rows of query, key, value and output start at multiples of 16 bytes."""

    def is_aligned(x: Tensor) -> bool:
        if x.size(-1) > 1 and x.stride(-1) != 1:  # the kernels get a copy
            x = torch.empty(x.shape, dtype=x.dtype, device="meta")
        steps = [stride for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
        return x.data_ptr() % 16 == 0 and all(x.element_size() * n % 16 == 0 for n in steps)

    B, Hq, Sq, _ = call.query.shape
    out = call.query.new_empty(B, Sq, Hq, call.value.size(-1), device="meta")
    return all(is_aligned(x) for x in (call.query, call.key, call.value, out))


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
