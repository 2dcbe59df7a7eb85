"""Which kernel a call takes, and why."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _C
from .functional import Call, canonicalize, foreign


@dataclass(frozen=True)
class Explanation:
    """Prints as one readable paragraph.

    kernel: "cpu" (csrc/cpu), "tiled" (series/tiled.py), "pytorch" (PyTorch's own function) or
        "meta" (nothing is computed).
    isa: the instruction set of the CPU kernel, such as "avx512"; None for the others.
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
    kernel, reason = choose_kernel(call.query.device.type)
    return Explanation(kernel, _C.isa() if kernel == "cpu" else None, reason, _describe(call))


def choose_kernel(device_type: str) -> tuple[str, str]:
    """The kernel that PyTorch's dispatcher has for tensors of a device, and why."""
    if device_type == "meta":
        return "meta", "meta tensors hold no data: only shapes are computed"
    dispatch_key = torch._C._dispatch_key_for_device(device_type)
    if torch._C._dispatch_has_kernel_for_dispatch_key(
        "flash_attn_ext::attention_forward", dispatch_key
    ):
        return device_type, f"the tensors are on {device_type}, for which there are kernels"
    return "tiled", f"the tensors are on {device_type}, for which there is no kernel yet"


def _describe(call: Call) -> str:
    (B, Hq, Sq, D), (_, Hk, Sk, Dv) = call.query.shape, call.value.shape
    parts = [
        str(call.query.dtype).removeprefix("torch."),
        f"B={B} Hq={Hq} Hk={Hk} Sq={Sq} Sk={Sk} D={D} Dv={Dv}",
    ]
    if call.is_causal:
        corner = f", diagonal offset {call.diagonal_offset}" if call.diagonal_offset else ""
        parts.append(f"causal{corner}")
    if call.mask is not None:
        dtype = str(call.mask.dtype).removeprefix("torch.")
        gradient = " with gradient" if call.mask.requires_grad else ""
        parts.append(f"{dtype} mask {list(call.mask.shape)}{gradient}")
    if call.dropout_p > 0:
        parts.append(f"dropout {call.dropout_p:g}")
    return ", ".join(parts)
