"""Counting what attention costs: FLOPs, and bytes that travel to and from slow memory.

Slow memory is HBM on a GPU and DRAM on a CPU; fast memory ("on chip") is shared memory and
registers, or a cache. `traffic` counts every step of standard attention and of FlashAttention,
forward and backward, and `paper_table` holds the counts against those of the paper: Dao et al.,
"FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022.

What is counted:

- A product of [m, k] and [k, n] is 2 m k n FLOPs. Every add, multiply, divide, compare or exp of
  another step is one. The scale is free: it rides along in the product (`alpha` of a GEMM).
- Standard attention runs each step as a kernel of its own, which reads its inputs from slow memory
  and writes its outputs there, each once. Masked scores need no step in the backward: their P is 0,
  so their dS is 0 as well. Dropout keeps one byte an element for the backward.
- FlashAttention reads and writes as its loops say, with tiles that fit on chip; a cache between
  the two memories, such as a GPU's L2, is taken to catch nothing. Dropout multiplies by 0 or by
  1 / (1 - p), one FLOP; PyTorch's own multiplies by 0 or 1 and then by the factor, two.
- A bool mask is shared by all heads of a batch, so that reading it is not counted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

STATISTIC = 4  # bytes of one m, l, lse or delta: float32 whatever the inputs are
ON_CHIP = 128 * 1024  # bytes, of the 164 KiB of an A100's multiprocessor: 256 rows at d = 64, fp16


class Step(NamedTuple):
    """One line of the algorithm, for all batches and heads together."""

    name: str  # what is computed, as in the walkthroughs
    kind: str  # "product", "mask", "softmax", "dropout" or "statistics"
    phase: str  # "forward" or "backward"
    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs for each byte. Where it is low, the machine waits for its memory."""
        return self.flops / self.bytes if self.bytes else float("inf")


@dataclass(frozen=True)
class Traffic:
    """The steps of an algorithm in order, and their sums."""

    steps: tuple[Step, ...]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def only(self, condition: Callable[[Step], bool]) -> "Traffic":
        return Traffic(tuple(step for step in self.steps if condition(step)))

    def of_kind(self, *kinds: str) -> "Traffic":
        return self.only(lambda step: step.kind in kinds)

    @property
    def forward(self) -> "Traffic":
        return self.only(lambda step: step.phase == "forward")

    @property
    def backward(self) -> "Traffic":
        return self.only(lambda step: step.phase == "backward")

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def bytes(self) -> int:
        return sum(step.bytes for step in self.steps)

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes

    def __str__(self) -> str:
        rows = [("", "", "GFLOP", "GB")]
        rows += [
            (step.phase, step.name, f"{step.flops / 1e9:.2f}", f"{step.bytes / 1e9:.2f}")
            for step in self.steps
        ]
        rows.append(("", "sum", f"{self.flops / 1e9:.2f}", f"{self.bytes / 1e9:.2f}"))
        width = max(len(name) for _, name, *_ in rows)
        return "\n".join(
            f"{phase:9} {name:{width}} {flops:>9} {size:>9}" for phase, name, flops, size in rows
        )


class Shape(NamedTuple):
    batch: int
    heads: int
    seq_q: int
    seq_k: int
    head_dim: int
    element: int  # bytes
    mask: bool
    causal: bool  # a mask of which FlashAttention skips the tiles that see nothing
    dropout: bool


def traffic(
    algorithm: str,
    *,
    batch: int = 1,
    heads: int = 1,
    seq_q: int,
    seq_k: int | None = None,
    head_dim: int = 64,
    element: int = 2,
    on_chip: int = ON_CHIP,
    mask: bool = False,
    causal: bool = False,
    dropout: bool = False,
    block_m: int | None = None,
    block_n: int | None = None,
) -> Traffic:
    """What one call, forward and backward, asks of arithmetic and of slow memory.

    algorithm: "standard" (the paper's algorithms 0 and 3); "flash", with the loops of `tiled` and
    of the kernels in C and CUDA (FlashAttention-2: in the forward a tile of queries stays on chip
    while the keys pass by); or "flash_2022" (algorithms 1 and 4: in the forward, too, a tile of
    keys stays, so that O travels to and fro). element: bytes of a number of Q. on_chip: bytes of
    fast memory M, from which `block_sizes` follow where they are not given.

        traffic("flash", batch=64, heads=16, seq_q=1024, on_chip=128 * 1024).forward.bytes
    """
    shape = Shape(
        batch=batch,
        heads=heads,
        seq_q=seq_q,
        seq_k=seq_q if seq_k is None else seq_k,
        head_dim=head_dim,
        element=element,
        mask=mask or causal,
        causal=causal,
        dropout=dropout,
    )
    if algorithm == "standard":
        return _standard(shape)
    if algorithm not in ("flash", "flash_2022"):
        raise ValueError(f"algorithm is standard, flash or flash_2022, not {algorithm!r}")
    stays, passes = block_sizes(on_chip, head_dim, element)
    if algorithm == "flash_2022":
        sizes = (block_m or passes, block_n or stays)
        return Traffic((*_forward_2022(shape, *sizes), *_backward(shape, *sizes, fused=True)))
    sizes = (block_m or stays, block_n or passes)
    backward_sizes = (block_m or passes, block_n or stays)
    return Traffic((*_forward(shape, *sizes), *_backward(shape, *backward_sizes, fused=False)))


def block_sizes(on_chip: int, head_dim: int, element: int = 2) -> tuple[int, int]:
    """Rows of the tile that stays on chip, and of the one that passes by.

    Algorithm 1, line 1: ceil(M / 4d) and min(ceil(M / 4d), d) for M numbers of fast memory: four
    tiles of so many rows fill it (Q, K, V and O), and the second bound keeps S from being larger
    than they are.
    """
    stays = -(-on_chip // (4 * head_dim * element))
    return stays, min(stays, head_dim)


# --- standard attention ----------------------------------------------------------------------


def _standard(shape: Shape) -> Traffic:
    """Algorithms 0 and 3. One pass over S or P is B H Sq Sk numbers, one over Q is B H Sq d."""
    size = shape.element
    pairs = shape.batch * shape.heads * shape.seq_q * shape.seq_k  # numbers in S
    q = shape.batch * shape.heads * shape.seq_q * shape.head_dim * size  # bytes of Q, O, dO, dQ
    k = shape.batch * shape.heads * shape.seq_k * shape.head_dim * size  # bytes of K, V, dK, dV
    product = 2 * pairs * shape.head_dim
    steps = [Step("S = Q Kᵀ", "product", "forward", product, q + k + pairs * size)]
    if shape.mask:
        steps.append(Step("mask S", "mask", "forward", pairs, 2 * pairs * size))
    # maximum, subtract, exp, sum, divide; S is read once, as by the best of kernels
    steps.append(Step("P = softmax S", "softmax", "forward", 5 * pairs, 2 * pairs * size))
    if shape.dropout:  # times kept, times 1 / (1 - p); a byte says which were kept
        steps.append(Step("dropout of P", "dropout", "forward", 2 * pairs, pairs * (2 * size + 1)))
    steps += [
        Step("O = P V", "product", "forward", product, pairs * size + k + q),
        Step("dV = Pᵀ dO", "product", "backward", product, pairs * size + q + k),
        Step("dP = dO Vᵀ", "product", "backward", product, q + k + pairs * size),
    ]
    if shape.dropout:
        steps.append(
            Step("dropout of dP", "dropout", "backward", 2 * pairs, pairs * (2 * size + 1))
        )
    # P * (dP - rowsum(P * dP)): multiply, sum, subtract, multiply
    steps += [
        Step("dS = P (dP - δ)", "softmax", "backward", 4 * pairs, 3 * pairs * size),
        Step("dQ = dS K", "product", "backward", product, pairs * size + k + q),
        Step("dK = dSᵀ Q", "product", "backward", product, pairs * size + q + k),
    ]
    return Traffic(tuple(steps))


# --- FlashAttention --------------------------------------------------------------------------


def _forward(shape: Shape, block_m: int, block_n: int) -> Iterator[Step]:
    """FlashAttention-2, algorithm 1: Q and O once, K and V once for each tile of queries."""
    heads, row = shape.batch * shape.heads, shape.head_dim * shape.element
    keys = [_keys_seen(shape, end, block_n) for end in _ends(shape.seq_q, block_m)]
    lengths = list(_lengths(shape.seq_q, block_m))
    pairs = heads * sum(m * n for m, n in zip(lengths, keys, strict=True))
    slow = heads * row
    steps = _forward_steps(shape, pairs, _blocks(keys, lengths, block_n) * heads)
    yield steps["S"]._replace(bytes=slow * (shape.seq_q + sum(keys)))  # Q and K
    yield from steps["between"]
    yield steps["O"]._replace(bytes=slow * (shape.seq_q + sum(keys)))  # O and V
    yield steps["statistics"]._replace(bytes=heads * shape.seq_q * STATISTIC)  # lse


def _forward_2022(shape: Shape, block_m: int, block_n: int) -> Iterator[Step]:
    """Algorithm 1: K and V once; Q, and O to and fro, once for each tile of keys.

    The first tile of keys has no O, m and l to read: they start on chip.
    """
    heads, row = shape.batch * shape.heads, shape.head_dim * shape.element
    queries = [_queries_seeing(shape, start, block_m) for start in _starts(shape.seq_k, block_n)]
    lengths = list(_lengths(shape.seq_k, block_n))
    pairs = heads * sum(m * n for m, n in zip(queries, lengths, strict=True))
    slow, visits = heads * row, sum(queries)
    to_and_fro = 2 * visits - shape.seq_q
    steps = _forward_steps(shape, pairs, visits * heads)
    yield steps["S"]._replace(bytes=slow * (visits + shape.seq_k))  # Q and K
    yield from steps["between"]
    yield steps["O"]._replace(bytes=slow * (to_and_fro + shape.seq_k))  # O and V
    yield steps["statistics"]._replace(bytes=heads * to_and_fro * STATISTIC)  # lse


def _forward_steps(shape: Shape, pairs: int, rescaled_rows: int) -> dict:
    """FLOPs for `pairs` scores; `rescaled_rows` counts a row once for each tile that it meets."""
    product = 2 * pairs * shape.head_dim
    between = []
    if shape.mask:
        between.append(Step("mask S", "mask", "forward", pairs, 0))
    # maximum, subtract, exp, sum; then O and l, times exp(m - m_new), and O / l
    flops = 4 * pairs + rescaled_rows * (shape.head_dim + 2)
    between.append(Step("online softmax", "softmax", "forward", flops, 0))
    if shape.dropout:
        between.append(Step("dropout of P", "dropout", "forward", pairs, 0))
    return {
        "S": Step("S = Q Kᵀ", "product", "forward", product, 0),
        "between": between,
        "O": Step("O += P V", "product", "forward", product, 0),
        "statistics": Step("lse", "statistics", "forward", 0, 0),
    }


def _backward(shape: Shape, block_m: int, block_n: int, *, fused: bool) -> Iterator[Step]:
    """Algorithm 4: a tile of keys stays; Q and dO pass by, and dQ travels to and fro.

    delta = rowsum(dO * O) is a kernel of its own, or `fused`: computed while the first tile of keys
    meets dO. dQ is read where an earlier tile of keys wrote it.
    """
    heads, d = shape.batch * shape.heads, shape.head_dim
    queries = [_queries_seeing(shape, start, block_m) for start in _starts(shape.seq_k, block_n)]
    lengths = list(_lengths(shape.seq_k, block_n))
    pairs = heads * sum(m * n for m, n in zip(queries, lengths, strict=True))
    slow, visits = heads * d * shape.element, sum(queries)
    product = 2 * pairs * d

    def step(name: str, kind: str, flops: int, rows: int = 0) -> Step:
        return Step(name, kind, "backward", flops, slow * rows)

    delta = shape.seq_q * (1 if fused else 2)  # O, and dO
    yield step("δ = rowsum(dO O)", "softmax", 2 * heads * shape.seq_q * d, delta)
    yield step("S = Q Kᵀ, again", "product", product, visits + shape.seq_k)  # Q and K
    if shape.mask:
        yield step("mask S, again", "mask", pairs)
    yield step("P = exp(S - lse)", "softmax", 2 * pairs)
    if shape.dropout:
        yield step("dropout of P, again", "dropout", pairs)
    yield step("dV += Pᵀ dO", "product", product, shape.seq_k)  # dV
    yield step("dP = dO Vᵀ", "product", product, visits + shape.seq_k)  # dO and V
    if shape.dropout:
        yield step("dropout of dP", "dropout", pairs)
    yield step("dS = P (dP - δ)", "softmax", 2 * pairs)
    yield step("dQ += dS K", "product", product, 2 * visits - shape.seq_q)
    yield step("dK += dSᵀ Q", "product", product, shape.seq_k)
    statistics = (2 * visits + (0 if fused else shape.seq_q)) * heads * STATISTIC  # lse and delta
    yield Step("lse and δ", "statistics", "backward", 0, statistics)


def _starts(length: int, block: int) -> range:
    return range(0, length, block)


def _ends(length: int, block: int) -> Iterator[int]:
    return (min(start + block, length) for start in _starts(length, block))


def _lengths(length: int, block: int) -> Iterator[int]:
    return (min(block, length - start) for start in _starts(length, block))


def _keys_seen(shape: Shape, end: int, block_n: int) -> int:
    """How many keys, in whole tiles, the queries up to `end` meet."""
    return min(shape.seq_k, -(-end // block_n) * block_n) if shape.causal else shape.seq_k


def _queries_seeing(shape: Shape, start: int, block_m: int) -> int:
    """How many queries, in whole tiles, the keys from `start` on meet."""
    return max(0, shape.seq_q - start // block_m * block_m) if shape.causal else shape.seq_q


def _blocks(keys: list[int], lengths: list[int], block_n: int) -> int:
    """Rows, each counted once for each tile of keys that it meets."""
    return sum(m * -(-n // block_n) for m, n in zip(lengths, keys, strict=True))


# --- the paper -------------------------------------------------------------------------------

GPT2_MEDIUM = {
    "batch": 64, "heads": 16, "seq_q": 1024, "head_dim": 64, "element": 2,
    "mask": True, "dropout": True,
}  # fmt: skip

PAPER = {  # figure 2, left: GPT-2 medium's attention, forward and backward, on an A100
    "standard": {"GFLOP": 66.6, "GB": 40.3, "ms": 41.7},
    "flash": {"GFLOP": 75.2, "GB": 4.4, "ms": 7.3},
}


def paper_table() -> dict[str, dict[str, float]]:
    """The paper's figure 2 (left) beside what is counted here, for standard and flash.

    "GFLOP" and "GB" are counted so that they come to what is printed, to the last digit; "GFLOP,
    all" and "GB, all" by the rules at the top of this file. The paper does not say how it counted
    (or whether it measured), so this is what was found:

    - GB of standard attention needs no rule of its own: 18 passes over the N x N matrix and 12 over
      N x d are 40.27 GB, printed as 40.3.
    - GB of FlashAttention is algorithms 1 and 4 with tiles of 256 keys, as in the kernels that
      came with the paper: 4.43 GB for the matrices, printed as 4.4, and 4.49 GB with lse and delta
      ("all"), 2% more. Two liberties are taken with the algorithms as printed: what starts at zero
      starts on chip, and O is read once in the backward, not once for each tile.
    - GFLOP cannot be the whole count: six products are 824.6 GFLOP for 64 x 16 heads, not 66.6.
      The printed figures differ by 8.6, which is one product for 64 heads: the products seem to be
      those of one head of the 16. Six of them, and the 14 operations that standard attention does
      between them for each number of S of all 16 heads, are 66.57, printed as 66.6. One product
      more, S for the second time, makes 75.16, printed as 75.2.
    - So the second mask, exp and dropout, and the rescaling of O, are not in the paper's figure of
      FlashAttention. With them, and without what its tiles do not need (no P is divided by l, and
      dropout takes one operation), its own steps are 13 operations for a number of S and a little
      for each row of a tile: 74.50 GFLOP, 0.9% less than is printed. It makes no difference to
      what the table says.
    """
    counted = {
        "standard": traffic("standard", **GPT2_MEDIUM),
        "flash": traffic("flash_2022", **GPT2_MEDIUM, block_m=64, block_n=256),
    }
    between_products = counted["standard"].flops - counted["standard"].of_kind("product").flops
    table = {}
    for name, steps in counted.items():
        of_one_head = steps.of_kind("product").flops / GPT2_MEDIUM["heads"]
        table[name] = {
            "GFLOP": (of_one_head + between_products) / 1e9,
            "GFLOP, all": steps.flops / 1e9,
            "GB": (steps.bytes - steps.of_kind("statistics").bytes) / 1e9,
            "GB, all": steps.bytes / 1e9,
            "GFLOP, paper": PAPER[name]["GFLOP"],
            "GB, paper": PAPER[name]["GB"],
        }
    return table
