"""Measuring honestly: peers that take turns on the clock, and the peak of memory.

A timing alone means little on a machine that does other things too; a ratio of two peers that ran
turn by turn does. The benchmarks, the demo and the notebooks measure with what is here.
"""

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """One number a round: seconds, or a ratio of them."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def best(self) -> float:
        """Of times, what the machine takes when nothing else is in the way."""
        return min(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    @property
    def summary(self) -> dict[str, float]:
        """What a result file keeps."""
        low, high = self.quartiles
        return {"median": self.median, "p25": low, "p75": high}

    def __truediv__(self, other: "Samples") -> "Samples":
        """Round by round, so that what slowed down both of a round cancels out."""
        return Samples([a / b for a, b in zip(self.values, other.values, strict=True)])


def take_turns(
    peers: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    sample_seconds: float = 0.0,
    rest: float = 0.0,
) -> dict[str, Samples]:
    """Times the peers side by side: every round takes a sample of each, the first one rotating.

    A sample is one call, or as many as take about `sample_seconds`, and comes after a `rest`, in
    seconds. After a warm-up, rounds go on until `seconds` are spent, within the given bounds.
    """
    elapsed = _elapsed_cuda if torch.device(device).type == "cuda" else _elapsed_cpu
    calls = dict.fromkeys(peers, 1)
    for _ in range(3):
        for name, call in peers.items():
            calls[name] = max(1, round(sample_seconds / elapsed(call, 1)))

    names = list(peers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + seconds
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() > deadline:
            break
        for name in names:
            time.sleep(rest)
            samples[name].append(elapsed(peers[name], calls[name]))
        names.append(names.pop(0))
    return {name: Samples(samples[name]) for name in peers}


def _elapsed_cpu(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _elapsed_cuda(call: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The GPU waits about half a millisecond, in which the host gets ahead of it: what counts is
    # the time of the kernels, not that of their launches.
    torch.cuda._sleep(1_000_000)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


class PeakMemory:
    """By how many bytes memory peaked above where it stood on entry.

        with PeakMemory(device) as memory:
            ...
        memory.bytes

    On CUDA what PyTorch's allocator handed out, on the CPU what the process had resident. Freed
    memory may stay resident and then serve again unseen: on the CPU compare fresh processes.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self._cuda = torch.device(device).type == "cuda"
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # "5" sets Linux's high-water mark back to what is resident now
                Path("/proc/self/clear_refs").write_text("5")
        self._start = self._peak()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bytes = self._peak() - self._start

    def _peak(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        # Better than getrusage: a process inherits ru_maxrss from the one that started it.
        status = Path("/proc/self/status")
        high_water = status.exists() and re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if high_water:
            return int(high_water[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def saved_bytes(call: Callable[..., object], *arguments: object) -> int:
    """Bytes that autograd keeps for the backward of a call: exact, each memory counted once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(*arguments)  # alive until the sum is made, so that no address is used twice
    total = sum(storages.values())
    del result
    return total
