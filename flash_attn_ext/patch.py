"""Makes torch.nn.functional.scaled_dot_product_attention itself use flash_attn_ext.

So models use it unchanged: those that call the function, nn.MultiheadAttention and
nn.TransformerEncoderLayer. All of it is process-wide, and undone exactly by `disable`.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import scaled_dot_product_attention


class _Patch(NamedTuple):
    original: Callable[..., Tensor]
    replacement: Callable[..., Tensor]
    mha_fastpath: bool


_patch: _Patch | None = None
_lock = threading.RLock()


def enable() -> None:
    """From now on `F.scaled_dot_product_attention` is ours, in all modules that imported it too.

    Also turns off the fused inference path of nn.MultiheadAttention (torch.backends.mha), which
    would compute attention without calling that function. Enabling twice changes nothing.
    """
    global _patch
    with _lock:
        if _patch is not None:
            return
        original = F.scaled_dot_product_attention

        # Not our function itself: disable() must tell who got it from PyTorch's modules and who
        # imported it from here.
        @functools.wraps(original)
        def replacement(*args, **kwargs) -> Tensor:
            return scaled_dot_product_attention(*args, **kwargs)

        _patch = _Patch(original, replacement, torch.backends.mha.get_fastpath_enabled())
        _rebind(original, replacement)
        torch.backends.mha.set_fastpath_enabled(False)


def disable() -> None:
    """Undoes `enable`, also in modules that have imported the function since. Idempotent."""
    global _patch
    with _lock:
        if _patch is None:
            return
        _rebind(_patch.replacement, _patch.original)
        torch.backends.mha.set_fastpath_enabled(_patch.mha_fastpath)
        _patch = None


@contextmanager
def enabled() -> Iterator[None]:
    """`with enabled():` (or `@enabled()`) enables inside, and restores what was before. Nests."""
    was_enabled = _patch is not None
    enable()
    try:
        yield
    finally:
        if not was_enabled:
            disable()


def _rebind(old: object, new: object) -> None:
    """Replaces `old` in every module that has it under any name, save where PyTorch defines it."""
    for module in list(sys.modules.values()):
        if module is torch._C._nn:
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, name, new)
