"""Runs every CUDA kernel on small calls, for compute-sanitizer: `make sanitize`.

Without it, this tells whether all results are accurate and all kernels were run:

    python tests/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python tests/sanitize.py --run

The variable makes every tensor an allocation of its own: inside a block of PyTorch's allocator
nobody would notice who reads past the end of one, or what was never written. With
FLASH_ATTN_EXT_CUDA_KERNELS=portable in the environment it is the kernels for every GPU that run.
A tool takes minutes: --part 0/8 to --part 7/8 are processes of their own, side by side.
"""

import argparse
import itertools
import re
from pathlib import Path

import torch
from helpers import (
    FEATURES,
    Case,
    assert_accurate,
    contiguous,
    forward_backward,
    kernel_attention,
    make_case,
    packed,
    permuted,
    unaligned,
)
from tqdm import tqdm

from flash_attn_ext import _C

KERNELS = Path(__file__).parent.parent / "csrc" / "cuda" / "kernels"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
COMBINATIONS = [
    "",
    *FEATURES,
    "causal+dropout+grouped",
    "bias+dropout+wide_v",
    "bool_mask+window+narrow_v",
    "fp32_bias+bottom_right+one_kv_head",
    "head_bias+causal+dropout",
]
# Coprime in number, so that each meets each of the others.
HEAD_DIMS = [64, 128, 40, 256, 33, 16, 192]
LENGTHS = [(70, 90), (1, 130), (130, 65), (129, 3), (200, 200)]
LAYOUTS = [contiguous, permuted, packed, unaligned]

MIXED = [
    (dtype, features, head_dim, lengths, layout)
    for (dtype, features), head_dim, lengths, layout in zip(
        itertools.product(DTYPES, COMBINATIONS),
        itertools.cycle(HEAD_DIMS),
        itertools.cycle(LENGTHS),
        itertools.cycle(LAYOUTS),
    )
]
# What the copy engine of sm_90 can bring: masks with rows of whole 16 bytes.
MASKS = ["bool_mask", "key_mask", "bias+causal", "fp32_bias", "head_bias+dropout", "query_bias"]
WITH_TILES_OF_MASKS = [
    (dtype, features, head_dim, (200, 208), contiguous)
    for (features, head_dim), dtype in zip(
        itertools.product(MASKS, (64, 128, 256)), itertools.cycle((torch.float16, torch.bfloat16))
    )
]
# Tiles that only long calls take, and the map of a mask.
LONG = [(torch.bfloat16, "", head_dim, (1600, 200), contiguous) for head_dim in (64, 96, 128)]
LONG += [(torch.bfloat16, "bool_mask", 64, (200, 1104), contiguous)]
CASES = MIXED + WITH_TILES_OF_MASKS + LONG


def draw(dtype, features, head_dim, lengths, layout, device="cuda") -> Case:
    """A case as CASES describes it."""
    seq_q, seq_k = lengths
    case = make_case(
        features, dtype=dtype, device=device, batch=2, heads=4, seq_q=seq_q, seq_k=seq_k,
        head_dim=head_dim,
    )  # fmt: skip
    case.q, case.k, case.v = (layout(x) for x in (case.q, case.k, case.v))
    return case


def all_kernels(hopper: bool = True) -> set[str]:
    """The names of the kernels, from their sources; with or without those for sm_90a alone."""
    sources = "".join(path.read_text() for path in KERNELS.glob("*.cu"))
    names = set(re.findall(r"\b(fa_\w+)\(const __grid_constant__", sources))
    assert names, "no kernel was found in the sources"
    return names if hopper else {name for name in names if "sm90" not in name}


def run(part: int = 0, parts: int = 1) -> None:
    for i in tqdm(range(part, len(CASES), parts), unit="case"):
        case = draw(*CASES[i])
        torch.use_deterministic_algorithms(i % 5 == 4, warn_only=True)
        attention = case.bind(kernel_attention)
        grad_out = torch.randn_like(attention(*case.inputs))
        forward_backward(attention, case.inputs, grad_out)
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()


def check() -> None:
    for description in tqdm(CASES, unit="case"):
        assert_accurate(draw(*description))

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    ran = {event.name for event in profile.events()}
    hopper = _C.cuda_kernels() == "best" and torch.cuda.get_device_capability() == (9, 0)
    kernels = all_kernels(hopper)
    missing = kernels - ran
    assert not missing, f"never run: {missing}"
    print(f"accurate, and all were run: {', '.join(sorted(kernels))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="only run them, check nothing")
    parser.add_argument("--part", default="0/1", help="of the cases, every n-th: 0/n to (n-1)/n")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here.")
    torch.manual_seed(0)
    run(part, parts) if options.run else check()


if __name__ == "__main__":
    main()
