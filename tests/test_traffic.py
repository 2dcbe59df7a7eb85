"""The counts of FLOPs and bytes: against the paper, against a run that counts, against theory."""

import math

import pytest

from flash_attn_ext.series import traffic
from flash_attn_ext.series.traffic import GPT2_MEDIUM, PAPER, block_sizes, paper_table

# --- the paper's figure 2 ----------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["standard", "flash"])
def test_the_papers_table_to_the_digit(algorithm):
    counted = paper_table()[algorithm]
    assert round(counted["GFLOP"], 1) == PAPER[algorithm]["GFLOP"]
    assert round(counted["GB"], 1) == PAPER[algorithm]["GB"]


def test_bytes_of_the_papers_table_need_no_rule_of_their_own():
    standard, flash = paper_table().values()
    assert standard["GB"] == standard["GB, all"]
    assert flash["GB, all"] == pytest.approx(PAPER["flash"]["GB"], rel=0.03)  # with lse and delta


def test_flash_attentions_own_steps_are_within_a_percent_of_the_papers():
    """With what it does twice, without what it need not do: 74.50 GFLOP, where 75.2 is printed."""
    steps = traffic("flash_2022", **GPT2_MEDIUM, block_m=64, block_n=256)
    products = steps.of_kind("product").flops
    own = products / GPT2_MEDIUM["heads"] + steps.flops - products
    assert own / 1e9 == pytest.approx(PAPER["flash"]["GFLOP"], rel=0.01)


# --- a run that counts ---------------------------------------------------------------------------


class SlowMemory:
    """Counts the rows that cross the border, in either direction."""

    def __init__(self):
        self.rows = {}

    def move(self, name, begin, end):
        self.rows[name] = self.rows.get(name, 0) + end - begin


def tiles(length, block):
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def run_forward(memory, seq_q, seq_k, block_m, block_n, causal):
    """The loops of tiled.forward."""
    for row, row_end in tiles(seq_q, block_m):
        memory.move("Q", row, row_end)
        for col, col_end in tiles(seq_k, block_n):
            if causal and col > row_end - 1:
                continue
            memory.move("K", col, col_end)
            memory.move("V", col, col_end)
        memory.move("O", row, row_end)
        memory.move("lse", row, row_end)


def run_forward_2022(memory, seq_q, seq_k, block_m, block_n, causal):
    """Algorithm 1; without the first read of what starts at zero."""
    met = set()
    for col, col_end in tiles(seq_k, block_n):
        memory.move("K", col, col_end)
        memory.move("V", col, col_end)
        for row, row_end in tiles(seq_q, block_m):
            if causal and col > row_end - 1:
                continue
            memory.move("Q", row, row_end)
            for name in ("O", "lse"):
                if row in met:
                    memory.move(name, row, row_end)
                memory.move(name, row, row_end)
            met.add(row)


def run_backward(memory, seq_q, seq_k, block_m, block_n, causal, fused):
    """The loops of tiled.backward."""
    memory.move("O", 0, seq_q)
    if not fused:
        memory.move("dO", 0, seq_q)
        memory.move("delta", 0, seq_q)
    met = set()
    for col, col_end in tiles(seq_k, block_n):
        for name in ("K", "V", "dK", "dV"):
            memory.move(name, col, col_end)
        for row, row_end in tiles(seq_q, block_m):
            if causal and col > row_end - 1:
                continue
            for name in ("Q", "dO", "lse", "delta"):
                memory.move(name, row, row_end)
            if row in met:
                memory.move("dQ", row, row_end)
            memory.move("dQ", row, row_end)
            met.add(row)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("algorithm", ["flash", "flash_2022"])
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "block_m", "block_n"),
    [(64, 64, 16, 16), (100, 100, 16, 24), (37, 90, 8, 64), (50, 50, 1, 1), (40, 40, 99, 99)],
)
def test_bytes_are_those_of_the_loops(algorithm, seq_q, seq_k, block_m, block_n, causal):
    d, element, heads = 8, 2, 6
    counted = traffic(
        algorithm, batch=2, heads=3, seq_q=seq_q, seq_k=seq_k, head_dim=d, element=element,
        causal=causal, block_m=block_m, block_n=block_n,
    )  # fmt: skip

    def bytes_of(memory):
        return heads * sum(
            rows * (4 if name in ("lse", "delta") else d * element)
            for name, rows in memory.rows.items()
        )

    sizes = (seq_q, seq_k, block_m, block_n, causal)
    forward, backward = SlowMemory(), SlowMemory()
    (run_forward if algorithm == "flash" else run_forward_2022)(forward, *sizes)
    run_backward(backward, *sizes, fused=algorithm == "flash_2022")
    assert counted.forward.bytes == bytes_of(forward)
    assert counted.backward.bytes == bytes_of(backward)


# --- theory ----------------------------------------------------------------------------------


def test_flops_are_those_of_the_products():
    """What the field calls the FLOPs of attention: 4 N^2 d forward, and 2.5 times that backward."""
    steps = traffic("flash", batch=2, heads=4, seq_q=512, head_dim=64).of_kind("product")
    assert steps.forward.flops == 4 * 2 * 4 * 512**2 * 64
    assert steps.backward.flops == 2.5 * steps.forward.flops


def test_bytes_of_standard_grow_with_the_square_and_flash_forgets_none():
    short, long = (traffic("standard", seq_q=n).bytes for n in (4096, 8192))
    assert long / short == pytest.approx(4, rel=0.02)
    # on_chip so large that there is one tile: everything is read and written once
    flash = traffic("flash", seq_q=256, head_dim=64, on_chip=2**30)
    matrices = flash.bytes - flash.of_kind("statistics").bytes
    assert matrices == 13 * 256 * 64 * 2  # Q K V O; O dO; Q K V dO dQ dK dV


@pytest.mark.parametrize("algorithm", ["flash", "flash_2022"])
def test_twice_the_fast_memory_halves_the_bytes(algorithm):
    """Theorem 2: Theta(N^2 d^2 / M), as long as N is far above M / d."""
    sizes = [2**k for k in range(13, 18)]
    counted = [traffic(algorithm, seq_q=2**16, on_chip=size).bytes for size in sizes]
    for less, more in zip(counted[1:], counted[:-1], strict=True):
        assert more / less == pytest.approx(2, rel=0.05)


def test_block_sizes_fill_the_fast_memory():
    stays, passes = block_sizes(128 * 1024, head_dim=64)
    assert (stays, passes) == (256, 64)
    assert block_sizes(4 * 64 * 2 * 10, head_dim=64) == (10, 10)


def test_causal_halves_the_products():
    full, causal = (
        traffic("flash", seq_q=8192, causal=causal).of_kind("product").flops
        for causal in (False, True)
    )
    assert causal / full == pytest.approx(0.5, abs=0.03)


def test_intensity_and_the_printed_table():
    steps = traffic("standard", seq_q=1024)
    softmax = next(step for step in steps if step.kind == "softmax")
    assert softmax.intensity == 5 / 4  # five operations for a number read and one written
    assert "P = softmax S" in str(steps) and "sum" in str(steps)
    assert math.isinf(next(s for s in traffic("flash", seq_q=64) if not s.bytes).intensity)


def test_an_unknown_algorithm_is_named():
    with pytest.raises(ValueError, match="'linear'"):
        traffic("linear", seq_q=8)
