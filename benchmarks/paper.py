"""The headline tables of the FlashAttention paper (2022), on a GPU if there is one or on the CPU.

    runtime   forward and backward against the length: table 20
    memory    their peak against the length: table 21
    gpt2      attention of GPT-2 medium, forward and backward, causal, dropout: figure 2, left

Every cell is checked before it is timed; then the peers take turns in one process. A run may be
cut into pieces: a piece replaces its cells in the result file and leaves the others, each with the
commit that it was measured at. `report.py` makes docs/paper.md and its pictures of the file.
"""

import argparse
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from cell import check, forward_of, forwards, inputs, title
from record import RESULTS, cuda_facts, facts, merge, save
from tqdm import tqdm

from flash_attn_ext.measure import PeakMemory, take_turns

TABLES = ("runtime", "memory", "gpt2")
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
NAIVE_LENGTH = 4096  # beyond, naive attention wants more memory than many machines have
# On a GPU all is as in the paper; a CPU gets fewer texts, and the dtype that one trains with there.
SIZES = {
    "cuda": {
        "dtype": "float16",
        "texts": 16,
        "gpt2_texts": 64,
        "longest": {"runtime": 16384, "memory": 16384},
        "peers": ("flash", "efficient"),
    },
    "cpu": {
        "dtype": "float32",
        "texts": 1,
        "gpt2_texts": 4,
        "longest": {"runtime": 4096, "memory": 8192},
        "peers": ("sdpa",),
    },
}


def cells(device: str) -> Iterator[dict]:
    size = SIZES[device]
    plain = {"dtype": size["dtype"], "head_dim": 64, "bias": None}
    for table, longest in size["longest"].items():
        for n in (n for n in LENGTHS if n <= longest):
            yield plain | {
                "feature": table,
                "batch": size["texts"],
                "heads": 8,
                "heads_k": 8,
                "length": n,
                "causal": False,
                "dropout_p": 0.0,
                "peers": (*(["naive"] if n <= NAIVE_LENGTH else []), *size["peers"]),
            }
    yield plain | {
        "feature": "gpt2",
        "batch": size["gpt2_texts"],
        "heads": 16,
        "heads_k": 16,
        "length": 1024,
        "causal": True,
        "dropout_p": 0.1,
        "peers": ("naive", *size["peers"]),
    }


def seconds_of(cell: dict, device: str, seconds: float) -> dict[str, dict]:
    """By peer: what a forward and its backward take."""
    qkv, _, grad_out = inputs(cell, device)
    calls = {
        name: lambda call=call: [out := call(), *torch.autograd.grad(out, qkv, grad_out)]
        for name, call in forwards(cell, qkv, None).items()
    }
    check(cell, {name: call() for name, call in calls.items()})
    samples = take_turns(calls, device=device, seconds=seconds, sample_seconds=0.02)
    return {name: mine.summary for name, mine in samples.items()}


def peak_bytes(peer: str, cell: dict, device: str, threads: int) -> int:
    """Above the inputs. The second of two runs: a first one sets up what stays."""
    torch.set_num_threads(threads)
    # On the CPU what a first run of the same length has freed would serve again unseen.
    for each in (cell if device == "cuda" else cell | {"length": 64}, cell):
        qkv, _, grad_out = inputs(each, device)
        # On this thread: autograd's own may hold tensors of the first run into the second.
        with torch.autograd.set_multithreading_enabled(False), PeakMemory(device) as memory:
            torch.autograd.grad(forward_of(peer, each, qkv, None)(), qkv, grad_out)
    return memory.bytes


def bytes_of(cell: dict, device: str) -> dict[str, int]:
    """By peer: the peak of memory. Each has a process of its own, which has freed nothing yet."""
    peaks, spawn = {}, multiprocessing.get_context("spawn")
    for name in ("ours", *cell["peers"]):
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            threads = torch.get_num_threads()
            try:
                peaks[name] = process.submit(peak_bytes, name, cell, device, threads).result()
            except RuntimeError as error:
                tqdm.write(f"{name} does not take {title(cell)}: {error}".splitlines()[0])
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=SIZES, default="cuda" if has_gpu else "cpu")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--length", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=2.0, help="for one timing of all peers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--commit", help="of the code, where there is no git repository")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    record = facts() | (cuda_facts() if options.device == "cuda" else {})
    record["commit"] = options.commit or record["commit"]
    stamp = {name: record[name] for name in ("commit", "date")}
    chosen = [
        cell
        for cell in cells(options.device)
        if cell["feature"] in options.tables and cell["length"] in options.length
    ]
    record["cells"] = []
    for cell in tqdm(chosen, unit="cell"):
        if cell["feature"] == "memory":
            measured = {"bytes": bytes_of(cell, options.device)}
            text = [f"{name} {peak / 2**20:,.1f} MiB" for name, peak in measured["bytes"].items()]
        else:
            measured = {"seconds": seconds_of(cell, options.device, options.seconds)}
            text = [f"{name} {s['median'] * 1e3:.2f} ms" for name, s in measured["seconds"].items()]
        tqdm.write(f"{title(cell)}: {', '.join(text)}")
        record["cells"].append(cell | measured | stamp)
    save("paper", merge("paper", record, options.out, measured={"seconds", "bytes"}), options.out)


if __name__ == "__main__":
    main()
