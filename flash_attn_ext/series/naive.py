"""Standard attention: four lines of mathematics, and a matrix of Sq x Sk numbers in memory.

Here is what everything else in this project is compared with. It is differentiated by autograd,
and every step happens in the dtype of Q: in float64 it is the reference that the tests hold for the
truth, in float32 or bfloat16 it is the accuracy to beat.
"""

import torch
from torch import Tensor

from .dropout import keep_mask

NO_WINDOW = (-1, -1)


def attention(
    Q: Tensor,  # [B, Hq, Sq, D]
    K: Tensor,  # [B, Hk, Sk, D]
    V: Tensor,  # [B, Hk, Sk, Dv]
    *,
    mask: Tensor | None = None,  # [1|B, 1|Hq, 1|Sq, 1|Sk]
    scale: float = 1.0,
    window: tuple[int, int] = NO_WINDOW,
    diagonal_offset: int = 0,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,  # [2]
) -> Tensor:  # [B, Hq, Sq, Dv]
    """softmax(scale * Q K^T + mask) V ("Attention is all you need", 2017, equation 1).

    Hq is a multiple of Hk: query head h reads key head h // (Hq // Hk). `mask` is bool (True: the
    key takes part) or a float that is added to the scores. `window` and `diagonal_offset` are
    explained at `visible`; causal attention is window (-1, 0). Dropout, if any, drops what
    `dropout.keep_mask(rng_state, ...)` says. A row that attends to nothing gives 0.
    """
    (B, Hq, Sq, _), (_, Hk, Sk, _) = Q.shape, K.shape
    group = Hq // max(Hk, 1)
    if group > 1:
        K = K.repeat_interleave(group, dim=1)  # [B, Hq, Sk, D]
        V = V.repeat_interleave(group, dim=1)  # [B, Hq, Sk, Dv]

    S = scale * (Q @ K.transpose(-2, -1))  # [B, Hq, Sq, Sk]
    if mask is not None and mask.dtype == torch.bool:
        S = S.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        S = (S + mask).to(Q.dtype)  # a float32 mask may come with half-precision queries
    if window != NO_WINDOW:
        seen = visible(range(Sq), range(Sk), window, diagonal_offset, Q.device)
        S = S.masked_fill(~seen, -torch.inf)
    P = softmax(S)  # [B, Hq, Sq, Sk]

    if dropout_p > 0:
        P = P.masked_fill(~keep_mask(rng_state, dropout_p, B, Hq, range(Sq), range(Sk)), 0)
        P = P / (1 - dropout_p) if dropout_p < 1 else P
    return P @ V  # [B, Hq, Sq, Dv]


def softmax(S: Tensor) -> Tensor:
    """Along the last dimension. A row of nothing but -inf, 0 / 0 by the formula, gives 0."""
    empty = torch.isneginf(S).all(dim=-1, keepdim=True)
    if not empty.any():
        return torch.softmax(S, dim=-1)
    return torch.softmax(S.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)


def visible(
    rows: range, cols: range, window: tuple[int, int], diagonal_offset: int, device: torch.device
) -> Tensor:  # [len(rows), len(cols)]
    """Whether query i may look at key j, for i in `rows` and j in `cols`.

    It may where i + diagonal_offset - left <= j <= i + diagonal_offset + right, with
    (left, right) = window; a negative number stands for no limit on its side. Offset 0 puts the
    diagonal into the top left corner, Sk - Sq into the bottom right one.
    """
    left, right = window
    i = torch.arange(rows.start, rows.stop, device=device)[:, None] + diagonal_offset
    j = torch.arange(cols.start, cols.stop, device=device)
    seen = torch.ones(len(rows), len(cols), dtype=torch.bool, device=device)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    return seen
