"""CUDA kernels compiled ahead: into the directory where every later process finds them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

from . import _C

if TYPE_CHECKING:
    from ._C import CudaCall, CudaKernel


def standard_calls(
    dtypes: Iterable[str] = ("float16", "bfloat16", "float32"),
    head_dims: Iterable[int] = (64, 128, 256),
) -> Iterator[CudaCall]:
    """What most models call attention with: causal or not, each with dropout or a mask, or without.

    Each as a forward and as a backward.
    """
    for dtype in dtypes:
        for head_dim in head_dims:
            if dtype == "float32" and head_dim > 128:
                continue  # rare, and a few bytes short of registers
            plain: CudaCall = {
                "dtype": dtype,
                "head_dim": head_dim,
                "head_dim_v": head_dim,
                "aligned": head_dim * (4 if dtype == "float32" else 2) % 16 == 0,
                "seq_q": 4096,
                "mask": None,
                "window": False,
                "dropout": False,
                "backward": False,
                "mask_grad": False,
                "mask_broadcasts": False,
                "deterministic": False,
                "allow_tf32": False,
            }
            for features in (
                {},
                {"window": True},
                {"dropout": True},
                {"window": True, "dropout": True},
                {"mask": "bool"},
                {"mask": dtype},
            ):
                yield plain | features
                yield plain | features | {"backward": True}
            learned = {"mask": dtype, "backward": True, "mask_grad": True}
            yield plain | learned
            yield plain | learned | {"mask_broadcasts": True}
            yield plain | learned | {"mask_broadcasts": True, "deterministic": True}
            yield plain | {"window": True, "backward": True, "deterministic": True}
            for features in ({}, {"window": True}):
                yield plain | features | {"seq_q": 512}


def compile_calls(
    calls: Iterable[CudaCall], arch: int
) -> Iterator[tuple[CudaCall, list[CudaKernel]]]:
    """The kernels of each call, in the order in which they are done."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(_C.cuda_compile, call, arch): call for call in calls}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
