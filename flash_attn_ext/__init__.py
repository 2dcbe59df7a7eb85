"""Exact attention that never builds the N x N matrix: FlashAttention in C for PyTorch.

    from flash_attn_ext import scaled_dot_product_attention  # instead of torch.nn.functional's

    flash_attn_ext.enable()  # or: torch.nn.functional.scaled_dot_product_attention itself uses it

    print(flash_attn_ext.explain(query, key, value, is_causal=True))  # which kernel a call takes

`flash_attn_ext.series` is the algorithm taken apart in plain PyTorch.
"""

from importlib.metadata import version as _version

from . import fallback  # noqa: F401  (registers the operators for devices without kernels)
from .explain import Explanation, explain
from .functional import scaled_dot_product_attention
from .patch import disable, enable, enabled

__version__ = _version("flash_attn_ext")

__all__ = [
    "Explanation",
    "disable",
    "enable",
    "enabled",
    "explain",
    "scaled_dot_product_attention",
]
