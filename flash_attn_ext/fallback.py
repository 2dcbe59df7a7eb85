"""The operators where no kernel fits: the tiled walkthrough, registered for all devices.

Exact and in O(N) memory like the kernels, only slower; so there is no call on which
scaled_dot_product_attention fails or turns quadratic. PyTorch's dispatcher prefers a kernel that is
registered for the device itself; that for CUDA comes back here with what its kernels do not take.
"""

import functools
import warnings

import torch
from torch import Tensor

from . import _C
from .series import tiled


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"flash_attn_ext computes attention with its tiled PyTorch walkthrough, exact and in O(N) "
        f"memory, but slow: {reason}",
        stacklevel=2,
    )


def _warn(device: torch.device) -> None:
    if device.type == "cuda":
        _warn_once(_C.cuda_last_error())
    else:
        _warn_once(f"it has no kernels for {device.type} yet")


@torch.library.impl("flash_attn_ext::attention_forward", "CompositeExplicitAutograd")
def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rng_state: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal_offset: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    _warn(q.device)
    window = (window_left, window_right)
    return tiled.forward(q, k, v, mask, rng_state, scale, window, diagonal_offset, dropout_p)


@torch.library.impl("flash_attn_ext::attention_backward", "CompositeExplicitAutograd")
def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rng_state: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal_offset: int,
    dropout_p: float,
    grad_wanted: list[bool],
) -> tuple[Tensor, ...]:
    window = (window_left, window_right)
    q, k, v = (x if x.size(-1) <= 1 or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    grads = tiled.backward(
        grad_out,
        q,
        k,
        v,
        mask,
        rng_state,
        out,
        lse,
        scale,
        window,
        diagonal_offset,
        dropout_p,
        mask_grad=grad_wanted[3],
    )
    return tuple(
        grad if wanted else q.new_empty(0) for grad, wanted in zip(grads, grad_wanted, strict=True)
    )
