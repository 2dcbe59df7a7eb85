"""On a GPU, side by side with the backends of PyTorch's scaled_dot_product_attention.

    speed     every feature: --features, --dtype, --d, --length, --direction (both: a forward and
              its backward); portable: plain calls, by the kernels for every GPU
    host      how long the host is busy with a call so small that nothing else counts

Every cell is checked before it is timed. The peers then take turns in one process: --how hot, back
to back (a GPU at its power limit, as in training), cool, with a rest before each sample, or graph,
as replays of a CUDA graph, back to back. A run may be cut into pieces of any size: a piece replaces
its cells in the result file and leaves the others, each with the commit that it was measured at.
"""

import argparse
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from cell import BACKENDS, DTYPES, check, flop, forwards, inputs, title, within
from record import RESULTS, cuda_facts, facts, merge, save
from torch import Tensor
from tqdm import tqdm

import flash_attn_ext
from flash_attn_ext import _C
from flash_attn_ext.measure import Samples, take_turns

TOKENS, WIDTH = 16384, 2048  # B * N and H * D
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DIRECTIONS = ("forward", "backward", "both")
HOW = ("hot", "cool", "graph")


# --- cells -----------------------------------------------------------------------------------


def cells():
    """What is to be measured: the whole table for plain calls, a few of every other feature."""
    plain = {
        "feature": "plain",
        "dtype": "bfloat16",
        "causal": False,
        "dropout_p": 0.0,
        "bias": None,
        "directions": ("forward", "backward"),
        "peers": ("flash", "cudnn", "efficient"),
    }

    def shape(n: int, d: int) -> dict:
        heads = WIDTH // d
        return {"batch": TOKENS // n, "heads": heads, "heads_k": heads, "length": n, "head_dim": d}

    for d, causal, n in itertools.product((64, 128, 256), (False, True), LENGTHS):
        yield plain | shape(n, d) | {"causal": causal}
        yield plain | shape(n, d) | {"feature": "portable", "causal": causal, "peers": ("flash",)}
    for d, n, gradient in itertools.product((64, 128), (1024, 4096), (False, True)):
        yield (
            plain
            | shape(n, d)
            | {
                "feature": "bias",
                "bias": "with gradient" if gradient else "given",
                "directions": ("backward",) if gradient else ("forward", "backward"),
                "peers": ("efficient",) if gradient else ("efficient", "cudnn"),
            }
        )
    for d, causal, n in itertools.product((64, 128), (False, True), (1024, 4096)):
        yield (
            plain
            | shape(n, d)
            | {
                "feature": "dropout",
                "causal": causal,
                "dropout_p": 0.1,
                "peers": ("flash", "cudnn", "efficient"),
            }
        )
    for d, causal, n in itertools.product((64, 128), (False, True), (1024, 4096)):
        yield (
            plain
            | shape(n, d)
            | {
                "feature": "float32",
                "dtype": "float32",
                "causal": causal,
                "peers": ("efficient",),
            }
        )
    for heads, causal, n in itertools.product((32, 64), (False, True), (2048, 8192)):
        yield (
            plain
            | shape(n, 128)
            | {
                "feature": "grouped",
                "heads": heads,
                "heads_k": 8,
                "causal": causal,
                "peers": ("flash", "cudnn"),
            }
        )
    for d, causal, n in itertools.product((72, 80, 96, 192), (False, True), (1024, 8192)):
        yield plain | shape(n, d) | {"feature": "d", "causal": causal}
    for causal, n in itertools.product((False, True), (1024, 8192)):
        yield plain | shape(n, 192) | {"feature": "d", "head_dim_v": 128, "causal": causal}
    for d in (64, 128):
        yield plain | shape(1000, d) | {"feature": "lengths", "length_k": 3000}
    # Blocks of 128 queries: 32 and 64, for 132 multiprocessors.
    for d, causal, n in itertools.product((64, 128), (False, True), (512, 1024)):
        yield plain | shape(n, d) | {"feature": "small", "batch": 1, "heads": 8, "heads_k": 8,
                                     "causal": causal}  # fmt: skip


@contextmanager
def kernels_of(cell: dict) -> Iterator[None]:
    """Within it, calls take the kernels that the cell is about."""
    before = _C.cuda_kernels()
    _C.cuda_set_kernels("portable" if cell["feature"] == "portable" else before)
    try:
        yield
    finally:
        _C.cuda_set_kernels(before)


def measure(cell: dict, options: argparse.Namespace) -> dict:
    qkv, bias, grad_out = inputs(cell, options.device)
    leaves = [x for x in (*qkv, bias) if x is not None and x.requires_grad]
    calls = forwards(cell, qkv, bias)

    def gradients(out: Tensor, **how: bool) -> list[Tensor]:
        return torch.autograd.grad(out, leaves, grad_out, **how)

    outs = {name: call() for name, call in calls.items()}
    backwards = {name: partial(gradients, o, retain_graph=True) for name, o in outs.items()}
    check(cell, {name: [out, *backwards[name]()] for name, out in outs.items()})

    def forward_without_gradients(call: Callable) -> Tensor:
        with torch.no_grad():
            return call()

    result = dict(cell)
    for direction in (*cell["directions"], "both"):
        if direction not in options.directions:
            continue
        peers = {
            "forward": {n: partial(forward_without_gradients, c) for n, c in calls.items()},
            "backward": backwards,
            "both": {n: lambda call=c: gradients(call()) for n, c in calls.items()},
        }[direction]
        result[direction] = {}
        for how in options.how:
            if how == "graph" and direction == "backward":
                continue  # its forward would have to be in the graph
            mine = {n: captured(c) for n, c in peers.items()} if how == "graph" else peers
            rest = 0.2 if how == "cool" else 0
            result[direction][how] = timed(cell, direction, mine, options, rest)
    return {name: value for name, value in result.items() if value != {}}


def captured(call: Callable) -> Callable:
    """Replays a call as a CUDA graph."""
    with torch.cuda.stream(torch.cuda.Stream()):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def timed(cell: dict, direction: str, peers: dict, options: argparse.Namespace, rest: float):
    samples = take_turns(
        peers,
        device=options.device,
        seconds=options.seconds,
        sample_seconds=0.003 if rest else 0.02,
        rest=rest,
    )
    ours = samples["ours"]
    return {
        name: {
            "seconds": mine.summary,
            "tflops": flop(cell, direction) / mine.median / 1e12,
            "speedup": (mine / ours).summary,  # of ours
        }
        for name, mine in samples.items()
    }


# --- host ------------------------------------------------------------------------------------


def host(options: argparse.Namespace) -> list[dict]:
    """Microseconds until a call on 1 x 2 x 16 x 64 returns; the GPU may still be at work.

    addcmul, with three leaves, stands for what PyTorch takes by itself. Its autograd engine hands
    the backward of a GPU to a thread of its own, unless told to stay on the one that calls."""
    q, k, v, grad_out = (
        torch.randn(1, 2, 16, 64, dtype=torch.float16, device=options.device) for _ in range(4)
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    functions = {"ours": flash_attn_ext.scaled_dot_product_attention}
    functions |= dict.fromkeys(BACKENDS, F.scaled_dot_product_attention)
    functions["addcmul"] = torch.addcmul

    def microseconds(name: str, call: Callable, threads: bool, calls: int = 100) -> float:
        # entering these is not part of a call
        with within(name), torch.autograd.set_multithreading_enabled(threads):
            if options.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls * 1e6

    results = []
    for direction in ("forward without gradients", "forward", "both", "both on one thread"):
        calls, threads = {}, direction != "both on one thread"
        for name, attention in functions.items():
            if "both" in direction:

                def call(attention=attention):
                    torch.autograd.grad(attention(*leaves), leaves, grad_out)
            else:
                call = partial(attention, *((q, k, v) if "without" in direction else leaves))
            try:
                microseconds(name, call, threads, 3)
            except RuntimeError:
                continue
            calls[name] = call
        samples = {name: [] for name in calls}
        for _ in range(30):
            for name, call in calls.items():
                samples[name].append(microseconds(name, call, threads))
        for name, mine in samples.items():
            results.append({"direction": direction, "peer": name} | Samples(mine).summary)
            print(f"host {direction:26} {name:9} {Samples(mine).median:8.1f} us")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    features = list(dict.fromkeys(cell["feature"] for cell in cells()))
    parts = ["speed", "host"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--features", nargs="+", choices=features, default=features)
    parser.add_argument("--dtype", choices=DTYPES, help="instead of a cell's own")
    parser.add_argument("--d", nargs="+", type=int, help="head sizes; else all")
    parser.add_argument("--length", nargs="+", type=int, help="of queries; else all")
    parser.add_argument("--mask", nargs="+", choices=["full", "causal"], default=["full", "causal"])
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS[:2],
                        dest="directions")  # fmt: skip
    parser.add_argument("--peers", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--how", nargs="+", choices=HOW, default=HOW[:1])
    parser.add_argument("--seconds", type=float, default=1.0, help="for one timing of all peers")
    parser.add_argument("--quick", action="store_true", help="two lengths, little time for each")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a try")
    parser.add_argument("--shrink", type=int, default=1, help="divides batch sizes, for a try")
    parser.add_argument("--commit", help="of the code, where there is no git repository")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: there is no CUDA device here, nothing to measure.")
    if options.quick:
        options.seconds, options.length = 0.2, [1024, 4096]
    torch.manual_seed(0)

    record = facts() | (cuda_facts() if options.device == "cuda" else {"device": "try"})
    record["commit"] = options.commit or record["commit"]
    record["cells"] = []
    stamp = {name: record[name] for name in ("commit", "date")}
    chosen = [
        cell
        | {"peers": [peer for peer in cell["peers"] if peer in options.peers]}
        | ({"dtype": options.dtype} if options.dtype else {})
        for cell in cells()
        if cell["feature"] in options.features
        and cell["head_dim"] in (options.d or [cell["head_dim"]])
        and cell["length"] in (options.length or [cell["length"]])
        and ("causal" if cell["causal"] else "full") in options.mask
        and any(direction in options.directions for direction in (*cell["directions"], "both"))
    ]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:  # who ends a run keeps what it has measured
        if "speed" in options.parts:
            for cell in tqdm(chosen, unit="cell"):
                cell["batch"] = max(1, cell["batch"] // options.shrink)
                with kernels_of(cell):
                    result = measure(cell, options)
                for direction in (d for d in DIRECTIONS if d in result):
                    tqdm.write(line(result, direction))
                record["cells"].append(result | stamp)
        if "host" in options.parts:
            record["host_us"] = [result | stamp for result in host(options)]
    finally:
        save("gpu", merge("gpu", record, options.out, measured=set(DIRECTIONS)), options.out)


def line(result: dict, direction: str) -> str:
    text = f"{title(result)} {result['bias'] or '':13} {direction:8}"
    for how, peers in result[direction].items():
        text += f" {how}:"
        for name, mine in peers.items():
            text += f"  {name} {mine['tflops']:.3g}"
            if name != "ours":
                text += f" (x{mine['speedup']['median']:.2f})"
    return text


if __name__ == "__main__":
    main()
