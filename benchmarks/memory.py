"""Peak memory of forward and backward against the length: naive attention, SDPA and ours.

Each measurement has a process of its own, so that no memory freed earlier serves again unseen.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from record import RESULTS, facts, save
from tqdm import tqdm

import flash_attn_ext
from flash_attn_ext.measure import PeakMemory
from flash_attn_ext.series import naive

PEERS = {
    "naive": lambda q, k, v: naive.attention(q, k, v, scale=HEAD_DIM**-0.5),
    "sdpa": F.scaled_dot_product_attention,
    "ours": flash_attn_ext.scaled_dot_product_attention,
}
HEADS, HEAD_DIM = 4, 64
NAIVE_LENGTH = 8192  # beyond, the naive one wants more memory than many machines have


def peak_bytes(peer: str, length: int, threads: int) -> int:
    """Above the inputs: what a forward, kept for its backward, and that backward take."""
    torch.set_num_threads(threads)

    def step(n: int) -> None:
        q, k, v = (torch.randn(1, HEADS, n, HEAD_DIM, requires_grad=True) for _ in range(3))
        with memory:
            PEERS[peer](q, k, v).sum().backward()

    memory = PeakMemory()
    step(64)  # what a first call sets up for good is not what grows with the length
    step(length)
    return memory.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    lengths = (512, 1024) if options.quick else (512, 1024, 2048, 4096, 8192, 16384)
    spawn = multiprocessing.get_context("spawn")
    cells = []
    for length in tqdm(lengths, unit="length"):
        for peer in PEERS:
            if peer == "naive" and length > NAIVE_LENGTH:
                continue
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                peak = process.submit(peak_bytes, peer, length, options.threads).result()
            cells.append({"peer": peer, "length": length, "bytes": peak})
            tqdm.write(f"N = {length:6} {peer:5} {peak / 2**20:10,.1f} MiB")
    record = facts() | {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "cells": cells}
    save("memory", record, options.out)


if __name__ == "__main__":
    main()
