"""Forward and backward on the CPU, side by side with PyTorch's scaled_dot_product_attention.

Every cell is checked before it is timed. The two then take turns in one process, and the speed-up
is the median over rounds of SDPA's time divided by ours.
"""

import argparse
import itertools
import statistics
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from cell import flop
from record import RESULTS, facts, save
from tqdm import tqdm

import flash_attn_ext
from flash_attn_ext.measure import take_turns

PEERS = {
    "sdpa": F.scaled_dot_product_attention,
    "ours": flash_attn_ext.scaled_dot_product_attention,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
ROWS = 8192  # B * H * N of every cell


def cases(quick: bool):
    lengths = (128, 1024) if quick else (128, 256, 512, 1024, 2048, 4096)
    for dtype, d, causal, n in itertools.product(DTYPES, (64, 128), (False, True), lengths):
        sequences = max(1, ROWS // n)
        heads = min(8, sequences)
        yield {
            "dtype": dtype,
            "batch": sequences // heads,
            "heads": heads,
            "length": n,
            "head_dim": d,
            "causal": causal,
        }


def run(case: dict, seconds: float) -> dict:
    shape = case["batch"], case["length"], case["heads"], case["head_dim"]
    q, k, v, grad_out = (
        torch.randn(shape).to(DTYPES[case["dtype"]]).transpose(1, 2) for _ in range(4)
    )  # [B, H, N, D] views of [B, N, H, D] memory, as a model makes them
    inputs = [x.requires_grad_() for x in (q, k, v)]

    forward = {name: partial(f, q, k, v, is_causal=case["causal"]) for name, f in PEERS.items()}
    outs = {name: call() for name, call in forward.items()}
    backward = {
        name: partial(torch.autograd.grad, out, inputs, grad_out, retain_graph=True)
        for name, out in outs.items()
    }
    tolerance = TOLERANCE[case["dtype"]]
    for ours, sdpa in zip(
        (outs["ours"], *backward["ours"]()), (outs["sdpa"], *backward["sdpa"]()), strict=True
    ):
        torch.testing.assert_close(ours, sdpa, rtol=tolerance, atol=tolerance)

    result = dict(case)
    for direction, calls in (("forward", forward), ("backward", backward)):
        samples = take_turns(calls, seconds=seconds)
        result[direction] = {
            **{f"{name}_seconds": s.summary for name, s in samples.items()},
            "speedup": (samples["sdpa"] / samples["ours"]).summary,
            "ours_gflops": flop(case, direction) / samples["ours"].median / 1e9,
        }
    return result


def matmul_gflops(dtype: torch.dtype, n: int = 2048) -> float:
    """What this machine's BLAS reaches here and now: a yardstick for the kernels' own GFLOP/s."""
    a, b = torch.randn(2, n, n).to(dtype)
    return 2 * n**3 / take_turns({"matmul": lambda: a @ b})["matmul"].median / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two lengths, little time for each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    matmul = {name: matmul_gflops(dtype) for name, dtype in DTYPES.items()}
    seconds = 0.3 if options.quick else 2.0
    cells = [run(case, seconds) for case in tqdm(list(cases(options.quick)), unit="cell")]
    mean = {
        direction: statistics.geometric_mean(c[direction]["speedup"]["median"] for c in cells)
        for direction in ("forward", "backward")
    }
    for direction, value in mean.items():
        print(f"{direction}: {value:.2f} times as fast as SDPA (geometric mean)")
    record = facts() | {"matmul_gflops": matmul, "geometric_mean": mean, "cells": cells}
    save("cpu", record, options.out)


if __name__ == "__main__":
    main()
