"""The checks of the notebooks' exercises: they say what is wrong, not only that something is.

A check takes the learner's function and calls it. One that returns nothing yet is told so and left
alone, so that a notebook runs from top to bottom; a wrong answer is an AssertionError that names
the likely mistake; a right one is praised.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from ..measure import saved_bytes
from . import naive
from .naive import visible


class _NothingYet(Exception):
    pass


def _exercise(check: Callable[[Callable], None]) -> Callable[[Callable], None]:
    """Makes of a check what is described above; it calls the answer through the `ask` it gets."""

    @wraps(check)
    def run(answer: Callable) -> None:
        def ask(*arguments):
            result = answer(*arguments)
            if result is None or result is ...:
                raise _NothingYet
            return result

        try:
            check(ask)
        except _NothingYet:
            print(
                f"{check.__name__}: nothing there yet. Fill in the function and run the cell again."
            )
        else:
            print(f"{check.__name__}: right!")

    return run


def _same(actual, expected) -> bool:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-4, atol=1e-6)


def _require(actual, expected, mistakes: dict[str, object], otherwise: str) -> None:
    """mistakes: what the result would be, by what the learner should hear then."""
    if _same(actual, expected):
        return
    for hint, wrong in mistakes.items():
        if _same(actual, wrong):
            raise AssertionError(hint)
    raise AssertionError(otherwise)


def _shape(result, expected: tuple[int, ...], what: str) -> None:
    assert isinstance(result, Tensor), f"{what} should be a tensor, not {type(result).__name__}."
    got = list(result.shape)
    assert got == list(expected), f"{what} should have the shape {list(expected)}, not {got}."


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- notebook 1 --------------------------------------------------------------------------------


@_exercise
def score_bytes(ask) -> None:
    """ask(batch, heads, n, element) -> bytes of S."""
    sizes = {"batch": 3, "heads": 5, "n": 7, "element": 2}
    b, h, n, e = sizes.values()
    _require(
        ask(b, h, n, e),
        b * h * n * n * e,
        {
            "That is how many numbers there are: each of them has `element` bytes.": b * h * n * n,
            "That is for one head: each head has a matrix of its own.": b * n * n * e,
            "That is for one example: the batch has `batch` of them.": h * n * n * e,
            "S has a row AND a column for each of the n tokens: n squared.": b * h * n * e,
        },
        f"For {sizes} S takes 3 * 5 * 7 * 7 * 2 = 1470 bytes.",
    )


@_exercise
def drop_in(ask) -> None:
    """ask(q, k, v) -> causal attention, without the N x N matrix."""
    q, k, v = (_normal(1, 2, 600, 16, seed=n).requires_grad_() for n in range(3))
    out = ask(q, k, v)
    _shape(out, q.shape, "The result")
    scale = q.size(-1) ** -0.5
    with torch.no_grad():
        expected = naive.attention(q, k, v, scale=scale, window=(-1, 0))
        hints = {
            "Every token sees the future: say is_causal=True.": naive.attention(
                q, k, v, scale=scale
            ),
            "The scores are not scaled by 1 / sqrt(d): leave scale out, or pass d ** -0.5.": (
                naive.attention(q, k, v, window=(-1, 0))
            ),
        }
        _require(
            out, expected, hints, "The numbers differ from softmax(Q K^T / sqrt(d)) V, causal."
        )
    kept = saved_bytes(ask, q, k, v)
    one_matrix = 2 * 600 * 600 * 4
    assert kept < one_matrix, (
        f"Right numbers, but {kept:,} bytes are kept for the backward: some N x N matrix is among "
        "them. Call flash_attn_ext.scaled_dot_product_attention instead of spelling it out."
    )


# --- notebook 2 --------------------------------------------------------------------------------


@_exercise
def one_query(ask) -> None:
    """ask(q, K, V) -> the output for one query. q: [D], K: [N, D], V: [N, Dv]."""
    q, K, V = _normal(8, seed=1) * 2, _normal(5, 8, seed=2), _normal(5, 3, seed=3)
    out = ask(q, K, V)
    _shape(out, (3,), "The output for one query")
    s = K @ q
    scaled = s / math.sqrt(8)
    _require(
        out,
        torch.softmax(scaled, 0) @ V,
        {
            "The scores are not divided by sqrt(D).": torch.softmax(s, 0) @ V,
            "They are divided by D, not by its square root.": torch.softmax(s / 8, 0) @ V,
            "The weights have not gone through a softmax: they need not add up to 1.": scaled @ V,
            "exp is there, but the weights are not divided by their sum.": scaled.exp() @ V,
        },
        "Compare with: weights = softmax(K @ q / sqrt(D)), output = weights @ V.",
    )


@_exercise
def causal_mask(ask) -> None:
    """ask(n) -> [n, n] bool, True where query i (row) may look at key j (column)."""
    mask = ask(5)
    _shape(mask, (5, 5), "The mask")
    assert mask.dtype == torch.bool, f"The mask should be bool, not {mask.dtype}."
    full = torch.ones(5, 5, dtype=torch.bool)
    _require(
        mask,
        full.tril(),
        {
            "This is turned round: row i is a query and may look at columns j <= i.": full.triu(),
            "These are the places to hide; True should mean 'may look'.": ~full.tril(),
            "A token may look at itself too: keep the diagonal.": full.tril(-1),
            "Each query sees one token of the future: keep j <= i only.": full.tril(1),
        },
        "Row i should be True in columns 0 to i and False behind them.",
    )


@_exercise
def split_heads(ask) -> None:
    """ask(x, heads): [B, N, C] -> [B, heads, N, C / heads]."""
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    out = ask(x, 4)
    _shape(out, (2, 4, 3, 2), "The result")
    _require(
        out,
        torch.stack(x.split(2, dim=-1), dim=1),
        {
            "view alone mixes tokens with heads: first [B, N, heads, C / heads], then swap the two "
            "in the middle.": x.reshape(2, 4, 3, 2),
            "Head h should have channels h * D to (h + 1) * D, next to each other: "
            "[..., heads, D], not [..., D, heads].": x.view(2, 3, 2, 4).permute(0, 3, 1, 2),
        },
        "Head h of token n should be x[:, n, h * D : (h + 1) * D].",
    )


# --- notebook 3 --------------------------------------------------------------------------------


@_exercise
def product_intensity(ask) -> None:
    """ask(m, k, n, element) -> FLOPs for each byte of a product [m, k] @ [k, n]."""
    m, k, n, element = 4, 6, 10, 2
    flops, numbers = 2 * m * k * n, m * k + k * n + m * n
    _require(
        ask(m, k, n, element),
        flops / (numbers * element),
        {
            "A product has a multiplication AND an addition for each of m k n: 2 m k n FLOPs.": (
                flops / 2 / (numbers * element)
            ),
            "FLOPs for each number: divide by the bytes of a number as well.": flops / numbers,
            "The result, m n numbers, is written too.": flops / ((m * k + k * n) * element),
            "That is bytes for each FLOP: turn it round.": numbers * element / flops,
        },
        "FLOPs: 2 m k n. Numbers moved: m k and k n are read, m n are written.",
    )


@_exercise
def flash_forward_bytes(ask) -> None:
    """ask(n, d, block_m, element) -> bytes of Q, K, V and O that one head moves."""
    n, d, block_m, element = 96, 8, 32, 2
    row = d * element
    _require(
        ask(n, d, block_m, element),
        2 * n * row + 3 * 2 * n * row,
        {
            "K and V are read again for every tile of queries: n / block_m times.": 4 * n * row,
            "Q and O are touched once: each query belongs to one tile.": 3 * 4 * n * row,
            "K is counted, V is missing, or the other way round.": 2 * n * row + 3 * n * row,
            "O is written, too.": n * row + 3 * 2 * n * row,
            "Those are numbers; each has `element` bytes.": (2 * n + 3 * 2 * n) * d,
        },
        "Q is read and O written once, 2 n d numbers; K and V are read n / block_m times.",
    )
    assert _same(ask(100, d, block_m, element), (2 + 4 * 2) * 100 * row), (
        "With n = 100 and block_m = 32 there are four tiles of queries: round up."
    )


@_exercise
def smallest_block_m(ask) -> None:
    """ask(ridge, element) -> block_m from which on the forward is no longer bound by memory."""
    _require(
        ask(200.0, 2),
        200,
        {
            "A number has two bytes: with block_m rows each byte of K or V serves 2 block_m / "
            "element FLOPs.": 400,
            "Turned round: FLOPs for each byte grow with block_m.": 1 / 200,
            "Each number of K serves a multiplication AND an addition for every row.": 100,
        },
        "K and V dominate: 4 N^2 d FLOPs against (N / block_m) * 2 N d * element bytes.",
    )
    assert _same(ask(200.0, 4), 400), "With element = 4 a byte serves half as many FLOPs."


# --- notebook 4 --------------------------------------------------------------------------------


@_exercise
def merge(ask) -> None:
    """ask(m1, l1, m2, l2) -> m, l of both parts of a row together."""
    x = torch.tensor([1.0, 3.0, -2.0, 5.0, 4.0])
    parts = [(part.max(), torch.exp(part - part.max()).sum()) for part in x.split([3, 2])]
    (m1, l1), (m2, l2) = parts
    result = ask(m1, l1, m2, l2)
    assert isinstance(result, tuple) and len(result) == 2, "Return two numbers: m, l."
    m, l = result
    assert _same(m, x.max()), f"m should be the larger one of m1 and m2, {x.max()}, not {m}."
    _require(
        l,
        torch.exp(x - x.max()).sum(),
        {
            "The two sums refer to different maxima: multiply each by exp(its m - m) first.": (
                l1 + l2
            ),
            "The first part's sum still refers to m1: multiply it by exp(m1 - m).": (
                l1 + l2 * torch.exp(m2 - m)
            ),
            "The exponent is turned round: exp(m1 - m) is at most 1.": (
                l1 * torch.exp(m - m1) + l2 * torch.exp(m - m2)
            ),
        },
        "l = l1 * exp(m1 - m) + l2 * exp(m2 - m)",
    )
    m, l = ask(m2, l2, m1, l1)
    assert _same(l, torch.exp(x - x.max()).sum()), (
        "Right where the second part has the larger maximum, wrong the other way round."
    )


@_exercise
def online_step(ask) -> None:
    """ask(m, l, O, S, V) -> m, l, O after one more tile of keys.

    m, l: [M, 1]. O: [M, Dv], not divided by l. S: [M, block_n]. V: [block_n, Dv].
    """
    S, V = _normal(4, 12, seed=1) * 3, _normal(12, 5, seed=2)
    S[:, 7] += 6  # so that the maximum moves late
    m, l, O = torch.full((4, 1), -torch.inf), torch.zeros(4, 1), torch.zeros(4, 5)
    for count, (S_j, V_j) in enumerate(zip(S.split(4, 1), V.split(4), strict=True)):
        result = ask(m, l, O, S_j, V_j)
        assert isinstance(result, tuple) and len(result) == 3, "Return three tensors: m, l, O."
        seen = S[:, : 4 * count + 4]
        m_new = seen.amax(1, keepdim=True)
        P, P_j, factor = torch.exp(seen - m_new), torch.exp(S_j - m_new), torch.exp(m - m_new)
        for name, x, like in zip("mlO", result, (m, l, O), strict=True):
            _shape(x, tuple(like.shape), name)
        where = f"After tile {count + 1} of 3: "
        _require(
            result[0],
            m_new,
            {where + "m forgets the tiles before: take the larger one of old and new.": S_j.amax(
                1, keepdim=True
            )},
            where + "m should be the maximum of each row over all keys so far.",
        )  # fmt: skip
        _require(
            result[1],
            P.sum(1, keepdim=True),
            {
                where + "the old l refers to the old m: multiply it by exp(m - m_new).": (
                    l + P_j.sum(1, keepdim=True)
                ),
                where + "the factor is turned round: exp(m - m_new), which is at most 1.": (
                    l / factor + P_j.sum(1, keepdim=True)
                ),
            },
            where + "l should be the sum of exp(S - m) over all keys so far.",
        )
        _require(
            result[2],
            P @ V[: 4 * count + 4],
            {
                where + "the old O refers to the old m: multiply it by the factor of l.": (
                    O + P_j @ V_j
                ),
                where + "O is divided by l here: leave that to the end, once.": (
                    P @ V[: 4 * count + 4] / P.sum(1, keepdim=True)
                ),
            },
            where + "O should be exp(S - m) @ V over all keys so far.",
        )
        m, l, O = m_new, P.sum(1, keepdim=True), P @ V[: 4 * count + 4]


@_exercise
def merge_outputs(ask) -> None:
    """ask(O1, lse1, O2, lse2) -> O, lse over all keys, from those over each half of the keys.

    O: [M, Dv], divided by its l. lse: [M, 1].
    """
    S, V = _normal(4, 12, seed=3) * 3, _normal(12, 5, seed=4)
    S[:, 2] += torch.tensor([0.0, 3.0, -3.0, 6.0])  # so that the halves weigh differently

    def attend(S, V):
        return torch.softmax(S, 1) @ V, torch.logsumexp(S, 1, keepdim=True)

    (O1, lse1), (O2, lse2) = attend(S[:, :5], V[:5]), attend(S[:, 5:], V[5:])
    O, lse = attend(S, V)
    result = ask(O1, lse1, O2, lse2)
    assert isinstance(result, tuple) and len(result) == 2, "Return two tensors: O, lse."
    _shape(result[0], (4, 5), "O")
    _shape(result[1], (4, 1), "lse")
    _require(
        result[1],
        lse,
        {
            "lse1 + lse2 is the logarithm of l1 TIMES l2: add the sums, exp(lse1) + exp(lse2).": (
                lse1 + lse2
            ),
            "That is the sum of the whole row; its logarithm is asked for.": lse.exp(),
            "The larger one alone is not the whole sum.": torch.maximum(lse1, lse2),
        },
        "lse = log(exp(lse1) + exp(lse2))",
    )
    _require(
        result[0],
        O,
        {
            "Each half is divided by its own l: added up, the weights come to 2.": O1 + O2,
            "The halves do not weigh the same: a half's share of the row is exp(lse1 - lse).": (
                (O1 + O2) / 2
            ),
            "Shares of the logarithms are not shares of the sums: exp(lse1 - lse).": (
                (lse1 * O1 + lse2 * O2) / (lse1 + lse2)
            ),
            "The shares are turned round: O1 has the share exp(lse1 - lse).": (
                (lse2 - lse).exp() * O1 + (lse1 - lse).exp() * O2
            ),
            "The sum still has to be divided by exp(lse).": lse1.exp() * O1 + lse2.exp() * O2,
        },
        "O = exp(lse1 - lse) O1 + exp(lse2 - lse) O2",
    )
    O_far, _ = ask(O1, lse1 + 200, O2, lse2 + 200)
    assert _same(O_far, O), (
        "Right for these numbers, but exp(200) overflows in float32: use torch.logaddexp, or take "
        "the larger lse off both first."
    )


@_exercise
def softmax_backward(ask) -> None:
    """ask(P, dP, O, dO) -> dS, all of one tile: [M, N], [M, N], [M, Dv], [M, Dv]."""
    S, V, dO = (_normal(*shape, seed=sum(shape)) for shape in ((4, 6), (6, 3), (4, 3)))
    S.requires_grad_()
    P = torch.softmax(S, 1)
    (P @ V).backward(dO)
    P = P.detach()
    O, dP = P @ V, dO @ V.T
    delta = (dO * O).sum(1, keepdim=True)
    dS = ask(P[:, :4], dP[:, :4], O, dO)
    _shape(dS, (4, 4), "dS of a tile of 4 x 4")
    part_P, part_dP = P[:, :4], dP[:, :4]
    _require(
        dS,
        S.grad[:, :4],
        {
            "delta is missing: raising one score lowers all other probabilities.": part_P * part_dP,
            "delta is a sum over the WHOLE row, of which a tile has only a part: use O and dO.": (
                part_P * (part_dP - (part_P * part_dP).sum(1, keepdim=True))
            ),
            "delta is added; it has to be subtracted.": part_P * (part_dP + delta),
            "delta is subtracted outside the bracket: dS = P * (dP - delta).": (
                part_P * part_dP - delta
            ),
        },
        "dS = P * (dP - delta), delta_i = sum over d of dO_id O_id.",
    )


@_exercise
def can_skip(ask) -> None:
    """ask(rows, cols) -> whether causal masking leaves nothing of the tile. Both are ranges."""
    for rows, cols in [
        (range(4), range(4, 8)),
        (range(4, 8), range(4)),
        (range(4), range(4)),
        (range(4, 8), range(6, 12)),
        (range(4, 8), range(7, 9)),
        (range(4, 8), range(8, 9)),
    ]:
        seen = visible(rows, cols, (-1, 0), 0, torch.device("cpu")).any().item()
        got = ask(rows, cols)
        assert got or seen, (
            f"Queries {rows} see none of the keys {cols}: this tile can be skipped. Compare the "
            "LAST query with the FIRST key."
        )
        assert not (got and seen), (
            f"Query {rows[-1]} does see key {cols[0]}: the tile of queries {rows} and keys {cols} "
            "must not be skipped, only masked in part."
        )
