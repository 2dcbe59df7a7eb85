"""Forward and backward on the CPU, side by side with PyTorch's scaled_dot_product_attention.

Every cell is checked before it is timed. The two then take turns in one process, and the speed-up
is the median over rounds of SDPA's time divided by ours. Peaks are measured in the same process:
the FMA units' before each cell, the memory's for decoding.

A cell has a name, such as shapes/float32/causal/1x8x1024x64; --only takes those that a regular
expression finds, and the others stay in the result file as they were.
"""

import argparse
import itertools
import re
import statistics
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import Machine
from record import RESULTS, commit, facts, merge, save
from tqdm import tqdm

import flash_attn_ext
from flash_attn_ext.measure import take_turns

PEERS = {
    "sdpa": F.scaled_dot_product_attention,
    "ours": flash_attn_ext.scaled_dot_product_attention,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIRECTIONS = ("forward", "backward", "both")
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
ROWS = 8192  # B * H * N of the cells of "lengths"

SHAPES = (  # batch, heads, length, head size
    (4, 12, 512, 64),
    (1, 8, 1024, 64),
    (1, 8, 4096, 64),
    (1, 16, 2048, 128),
    (8, 8, 128, 64),
    (1, 1, 4096, 64),
)
# What else a call can have, and by which of its kernels PyTorch answers.
FEATURES = {"bool mask": "flash", "mask with gradient": "math", "dropout": "math"}


def case(group: str, dtype: str, feature: str, shape: tuple[int, ...], **options) -> dict:
    batch, heads, length, head_dim = shape
    cell = {
        "name": f"{group}/{dtype}/{feature}/{'x'.join(map(str, shape))}",
        "group": group,
        "dtype": dtype,
        "feature": feature,
        "peer": FEATURES.get(feature, "flash"),
        "batch": batch,
        "heads": heads,
        "heads_k": heads,
        "length": length,
        "length_k": length,
        "head_dim": head_dim,
    }
    return cell | options


def cases(quick: bool):
    for dtype, feature, shape in itertools.product(DTYPES, ("full", "causal"), SHAPES):
        yield case("shapes", dtype, feature, shape)
    for dtype, feature in itertools.product(DTYPES, FEATURES):
        yield case("features", dtype, feature, (1, 8, 1024, 64))
    for dtype in DTYPES:
        # one query for each of 32 heads, over 8 heads of keys
        yield case("decode", dtype, "full", (8, 32, 1, 128), heads_k=8, length_k=4096)
    for dtype in DTYPES:
        yield case("small", dtype, "full", (1, 2, 16, 64))
    lengths = (128, 1024) if quick else (128, 256, 512, 1024, 2048, 4096)
    for dtype, d, feature, n in itertools.product(DTYPES, (64, 128), ("full", "causal"), lengths):
        sequences = max(1, ROWS // n)
        heads = min(8, sequences)
        yield case("lengths", dtype, feature, (sequences // heads, heads, n, d))


def flop(cell: dict, direction: str) -> float:
    """Two matrix products forward, five backward; of the scores that a causal mask leaves."""
    scores = cell["length"] * cell["length_k"]
    if cell["feature"] == "causal":
        scores = cell["length"] * (cell["length"] + 1) / 2
    product = 2 * cell["batch"] * cell["heads"] * scores * cell["head_dim"]
    return product * {"forward": 2, "backward": 5, "both": 7}[direction]


def inputs_of(cell: dict) -> tuple[list[torch.Tensor], torch.Tensor, dict]:
    """q, k and v, the gradient of the output, and the other arguments of the call."""
    dtype, d = DTYPES[cell["dtype"]], cell["head_dim"]

    def draw(heads: int, length: int) -> torch.Tensor:
        if cell["group"] == "decode":  # a cache holds head after head
            return torch.randn(cell["batch"], heads, length, d).to(dtype)
        # [B, H, N, D] views of [B, N, H, D] memory, as a model makes them
        return torch.randn(cell["batch"], length, heads, d).to(dtype).transpose(1, 2)

    q, grad_out = (draw(cell["heads"], cell["length"]) for _ in range(2))
    k, v = (draw(cell["heads_k"], cell["length_k"]) for _ in range(2))
    options: dict = {"is_causal": cell["feature"] == "causal"}
    if cell["heads_k"] != cell["heads"]:
        options["enable_gqa"] = True
    scores = (1, cell["heads"], cell["length"], cell["length_k"])
    if cell["feature"] == "bool mask":
        options["attn_mask"] = torch.rand(scores) < 0.9
    elif cell["feature"] == "mask with gradient":
        options["attn_mask"] = torch.randn(scores).to(dtype).requires_grad_()
    elif cell["feature"] == "dropout":
        options["dropout_p"] = 0.1
    return [q, k, v], grad_out, options


def run(cell: dict, seconds: float, machine: Machine) -> dict:
    inputs, grad_out, options = inputs_of(cell)
    forward = {name: partial(f, *inputs, **options) for name, f in PEERS.items()}
    backwards = cell["group"] != "decode"
    leaves = [x.requires_grad_() for x in inputs] if backwards else []
    if options.get("attn_mask") is not None and options["attn_mask"].requires_grad:
        leaves.append(options["attn_mask"])
    outs = {name: call() for name, call in forward.items()}
    calls = {"forward": forward}
    if backwards:
        calls["backward"] = {
            name: partial(torch.autograd.grad, out, leaves, grad_out, retain_graph=True)
            for name, out in outs.items()
        }
    if cell["feature"] != "dropout":  # which drop different probabilities
        ours, sdpa = (
            (outs[name], *(calls["backward"][name]() if backwards else ())) for name in PEERS
        )
        tolerance = TOLERANCE[cell["dtype"]]
        for mine, other in zip(ours, sdpa, strict=True):
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    sample_seconds = 0.0
    if cell["group"] == "small":
        sample_seconds = 1e-3

        def step(f):
            return torch.autograd.grad(f(*inputs, **options), leaves, grad_out)

        def without_gradients(f):
            with torch.no_grad():
                return f(*inputs, **options)

        calls = {
            "forward": {name: partial(without_gradients, f) for name, f in PEERS.items()},
            "both": {name: partial(step, f) for name, f in PEERS.items()},
        }

    result = cell | {"commit": commit()}
    peak = machine.peak_flops(cell["dtype"]) or machine.peak_flops("float32")
    result["peak_gflops"] = peak / 1e9
    for direction, peers in calls.items():
        if cell["group"] == "decode":
            peers = peers | {"read": partial(machine.read, *inputs[1:])}
        samples = take_turns(peers, seconds=seconds, sample_seconds=sample_seconds)
        gflops = flop(cell, direction) / samples["ours"].median / 1e9
        result[direction] = {
            **{f"{name}_seconds": s.summary for name, s in samples.items()},
            "speedup": (samples["sdpa"] / samples["ours"]).summary,
            "ours_gflops": gflops,
            "of_peak": gflops * 1e9 / peak,
        }
        if "read" in samples:
            read = sum(x.nbytes for x in inputs[1:])
            result[direction] |= {
                "ours_gb_s": read / samples["ours"].median / 1e9,
                "of_read": (samples["read"] / samples["ours"]).median,
            }
    return result


def means(cells: list[dict]) -> dict[str, float]:
    """Of the speed-ups, by the kernel that PyTorch takes. "lengths" shows more of the same, and
    small calls are about the time before any kernel runs."""
    return {
        f"{peer} {direction}": statistics.geometric_mean(
            cell[direction]["speedup"]["median"] for cell in group
        )
        for peer, direction in itertools.product(("flash", "math"), ("forward", "backward"))
        if (
            group := [
                cell
                for cell in cells
                if cell["peer"] == peer
                and cell["group"] not in ("lengths", "small")
                and direction in cell
            ]
        )
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two lengths, little time for each")
    parser.add_argument("--only", default="", help="a regular expression that names cells")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="for each cell and direction")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    machine = Machine(options.threads)
    seconds = options.seconds or (0.3 if options.quick else 2.0)
    chosen = [cell for cell in cases(options.quick) if re.search(options.only, cell["name"])]
    cells = [run(cell, seconds, machine) for cell in tqdm(chosen, unit="cell")]
    for cell, direction in itertools.product(cells, DIRECTIONS):
        if direction in cell:
            took = cell[direction]
            print(
                f"{cell['name']:48} {direction:8} {took['ours_seconds']['median'] * 1e6:10.1f} us "
                f"{took['of_peak']:4.0%} of peak, {took['speedup']['median']:5.2f} times SDPA"
                + (f", {took['of_read']:.0%} of a plain read" if "of_read" in took else "")
            )

    measured = {*DIRECTIONS, "peak_gflops"}
    record = facts() | {"cells": cells}
    if options.only:
        record = merge("cpu", record, options.out, measured)
    record["geometric_mean"] = means(record["cells"])
    for name, value in record["geometric_mean"].items():
        print(f"{name}: {value:.2f} times as fast as SDPA (geometric mean)")
    save("cpu", record, options.out)


if __name__ == "__main__":
    main()
