"""The yardsticks: how many operations and bytes a second this machine's cores are capable of."""

import ctypes
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from flash_attn_ext.measure import take_turns

SOURCE = Path(__file__).with_name("machine.c")
ROUNDS = 500_000


class Machine:
    """What `threads` threads reach together, each on its own (a call from ctypes has no GIL)."""

    def __init__(self, threads: int):
        self.threads = threads
        self._peaks: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(threads)
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "machine.so")
            flags = "-O2 -march=native -ffp-contract=fast -shared -fPIC".split()
            compiler = os.environ.get("CC", "cc")
            subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
            self._library = ctypes.CDLL(str(library))
        self._read = self._library.read_memory
        self._read.argtypes = ctypes.c_void_p, ctypes.c_size_t

    def peak_flops(self, dtype: str) -> float | None:
        """Multiply-adds in registers, a second; None where there is no instruction for dtype."""
        fma = getattr(self._library, f"fma_{dtype}")
        fma.argtypes, fma.restype = (ctypes.c_long,), ctypes.c_double
        flop = fma(ROUNDS) * self.threads
        if flop == 0:
            return None
        now = flop / self._best(lambda _: fma(ROUNDS))
        self._peaks[dtype] = max(now, self._peaks.get(dtype, 0))  # who disturbs it lowers it
        return self._peaks[dtype]

    def read(self, *tensors: torch.Tensor) -> None:
        """Reads contiguous tensors once, and does nothing with them."""
        starts, sizes = [], []
        for tensor in tensors:
            share = tensor.nbytes // self.threads // 64 * 64
            starts += [tensor.data_ptr() + i * share for i in range(self.threads)]
            sizes += [share] * self.threads
        list(self._pool.map(self._read, starts, sizes))

    def _best(self, work) -> float:
        samples = take_turns(
            {"machine": lambda: list(self._pool.map(work, range(self.threads)))}, seconds=0.5
        )
        return samples["machine"].best
