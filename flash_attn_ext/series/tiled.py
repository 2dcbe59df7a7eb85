"""FlashAttention in plain PyTorch: exact attention that never holds the N x N matrix.

Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022,
with the loop order of "FlashAttention-2", 2023. The two ideas:

- Tiling (`forward`): S and P exist for block_m queries and block_n keys at a time. The softmax and
  the output are carried from tile to tile as in `online_softmax.online_attention`.
- Recomputation (`backward`): of the matrix P only one number a row is kept, the log-sum-exp.
  Each tile of P is built again from it when the gradients need it.

These functions work on any device, in any dtype and for every feature, in memory linear in the
sequence lengths. Half-precision inputs are computed with in float32. The kernels in C do the same
in the same order; where there is none for a device, this is what runs.
"""

from collections.abc import Iterator
from functools import wraps

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .dropout import keep_mask
from .naive import NO_WINDOW, visible


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
    """The same as `naive.attention`, with gradients for Q, K, V and a float mask."""
    options = (scale, window, diagonal_offset, dropout_p)
    return _Attention.apply(Q, K, V, mask, rng_state, options)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        mask: Tensor | None,
        rng_state: Tensor | None,
        options: tuple,
    ) -> Tensor:
        O, lse = forward(Q, K, V, mask, rng_state, *options)
        ctx.save_for_backward(Q, K, V, mask, rng_state, O, lse)  # O(N): no P among them
        ctx.options = options
        return O

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dO: Tensor) -> tuple[Tensor | None, ...]:
        mask_grad = ctx.needs_input_grad[3]
        dQ, dK, dV, dmask = backward(dO, *ctx.saved_tensors, *ctx.options, mask_grad=mask_grad)
        return dQ, dK, dV, dmask, None, None


def _without_autocast(function):
    """Products are in float32 on purpose: autocast must not make half-precision ones of them."""

    @wraps(function)
    def wrapper(tensor: Tensor, *args, **kwargs):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args, **kwargs)

    return wrapper


@_without_autocast
def forward(
    Q: Tensor,  # [B, Hq, Sq, D]
    K: Tensor,  # [B, Hk, Sk, D]
    V: Tensor,  # [B, Hk, Sk, Dv]
    mask: Tensor | None = None,  # [1|B, 1|Hq, 1|Sq, 1|Sk]
    rng_state: Tensor | None = None,  # [2]
    scale: float = 1.0,
    window: tuple[int, int] = NO_WINDOW,
    diagonal_offset: int = 0,
    dropout_p: float = 0.0,
    *,
    block_m: int = 256,
    block_n: int = 256,
) -> tuple[Tensor, Tensor]:
    """FlashAttention-2, algorithm 1.

    Returns O, [B, Hq, Sq, Dv] (a transposed view of [B, Sq, Hq, Dv], which is how models want it
    next) and lse, [B, Hq, Sq]: the logarithm of the sum of exp(S_ij) over each row, in the dtype
    of sums. A row that attends to nothing has O = 0 and lse = -inf.
    """
    B, Hq, Sq, _ = Q.shape
    tiles = _Tiles(Q, K, mask, rng_state, scale, window, diagonal_offset, dropout_p)
    O = Q.new_empty(B, Sq, Hq, V.size(-1)).transpose(1, 2)  # [B, Hq, Sq, Dv]
    lse = Q.new_empty(B, Hq, Sq, dtype=tiles.acc)

    for rows in blocks(Sq, block_m):
        Q_i = Q[:, :, _slice(rows)].to(tiles.acc)  # [B, Hq, block_m, D]
        m = Q_i.new_full((B, Hq, len(rows), 1), -torch.inf)  # running maximum of each row
        l = Q_i.new_zeros(B, Hq, len(rows), 1)  # running sum of exp(S - m)
        O_i = Q_i.new_zeros(B, Hq, len(rows), V.size(-1))  # running output, not yet divided by l

        for cols in blocks(K.size(2), block_n):
            if tiles.empty(rows, cols):
                continue
            K_j = tiles.per_query_head(K[:, :, _slice(cols)])  # [B, Hq, block_n, D]
            V_j = tiles.per_query_head(V[:, :, _slice(cols)])  # [B, Hq, block_n, Dv]
            S = tiles.scores(Q_i, K_j, rows, cols)  # [B, Hq, block_m, block_n]

            m_new = torch.maximum(m, S.amax(dim=-1, keepdim=True))  # [B, Hq, block_m, 1]
            # A row that has met no key yet: exp(-inf - 0) is the 0 that exp(-inf - -inf) is not.
            origin = m_new.masked_fill(m_new == -torch.inf, 0)
            P = torch.exp(S - origin)  # [B, Hq, block_m, block_n]
            rescale = torch.exp(m - origin)  # [B, Hq, block_m, 1]
            l = l * rescale + P.sum(dim=-1, keepdim=True)
            O_i = O_i * rescale + tiles.dropout(P, rows, cols) @ V_j
            m = m_new

        O[:, :, _slice(rows)] = O_i / l.masked_fill(l == 0, 1)
        lse[:, :, _slice(rows)] = (m + torch.log(l)).squeeze(-1)  # [B, Hq, block_m]
    return O, lse


@_without_autocast
def backward(
    dO: Tensor,  # [B, Hq, Sq, Dv]
    Q: Tensor,  # [B, Hq, Sq, D]
    K: Tensor,  # [B, Hk, Sk, D]
    V: Tensor,  # [B, Hk, Sk, Dv]
    mask: Tensor | None,  # [1|B, 1|Hq, 1|Sq, 1|Sk]
    rng_state: Tensor | None,  # [2]
    O: Tensor,  # [B, Hq, Sq, Dv]
    lse: Tensor,  # [B, Hq, Sq]
    scale: float = 1.0,
    window: tuple[int, int] = NO_WINDOW,
    diagonal_offset: int = 0,
    dropout_p: float = 0.0,
    *,
    mask_grad: bool = False,
    block_m: int = 256,
    block_n: int = 256,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """FlashAttention-2, algorithm 2. Returns dQ, dK, dV and, if `mask_grad`, dmask (else None).

    With P = softmax(S) and O = P V (Z: dropout, kept / (1 - p), elementwise):

        dV = (P * Z)^T dO
        dP = (dO V^T) * Z
        dS = P * (dP - delta)       delta_i = sum_j P_ij dP_ij = dO_i . O_i
        dQ = scale dS K             dK = scale dS^T Q             dmask = dS

    delta needs only O, not a row of P: that is what makes a backward by tiles possible.
    """
    if mask_grad and mask is None:
        raise ValueError("mask must be given where mask_grad asks for its gradient")
    tiles = _Tiles(Q, K, mask, rng_state, scale, window, diagonal_offset, dropout_p)
    acc = tiles.acc
    dQ = torch.zeros_like(Q, dtype=acc)  # every tile of keys adds to it
    dK, dV = torch.empty_like(K), torch.empty_like(V)
    dmask = torch.zeros(mask.shape, dtype=acc, device=mask.device) if mask_grad else None

    delta = (dO.to(acc) * O.to(acc)).sum(dim=-1, keepdim=True)  # [B, Hq, Sq, 1]
    # exp(S - lse) is P. For a row that attends to nothing it is to be 0, so not -inf - -inf.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)  # [B, Hq, Sq, 1]

    for cols in blocks(K.size(2), block_n):
        K_j = tiles.per_query_head(K[:, :, _slice(cols)])  # [B, Hq, block_n, D]
        V_j = tiles.per_query_head(V[:, :, _slice(cols)])  # [B, Hq, block_n, Dv]
        dK_j, dV_j = torch.zeros_like(K_j), torch.zeros_like(V_j)

        for rows in blocks(Q.size(2), block_m):
            if tiles.empty(rows, cols):
                continue
            Q_i = Q[:, :, _slice(rows)].to(acc)  # [B, Hq, block_m, D]
            dO_i = dO[:, :, _slice(rows)].to(acc)  # [B, Hq, block_m, Dv]

            S = tiles.scores(Q_i, K_j, rows, cols)  # [B, Hq, block_m, block_n]
            P = torch.exp(S - lse[:, :, _slice(rows)])
            dP = tiles.dropout(dO_i @ V_j.transpose(-2, -1), rows, cols)
            dS = P * (dP - delta[:, :, _slice(rows)])

            dV_j += tiles.dropout(P, rows, cols).transpose(-2, -1) @ dO_i
            dK_j += scale * dS.transpose(-2, -1) @ Q_i
            dQ[:, :, _slice(rows)] += scale * dS @ K_j
            if dmask is not None:
                dmask_ij = _mask_tile(dmask, rows, cols)
                dmask_ij += dS.sum_to_size(dmask_ij.shape)

        dK[:, :, _slice(cols)] = tiles.per_key_head(dK_j)  # [B, Hk, block_n, D]
        dV[:, :, _slice(cols)] = tiles.per_key_head(dV_j)  # [B, Hk, block_n, Dv]
    return dQ.to(Q.dtype), dK, dV, dmask.to(mask.dtype) if mask_grad else None


class _Tiles:
    """What forward and backward do in the same way with a tile of `rows` x `cols`."""

    def __init__(
        self,
        Q: Tensor,
        K: Tensor,
        mask: Tensor | None,
        rng_state: Tensor | None,
        scale: float,
        window: tuple[int, int],
        diagonal_offset: int,
        dropout_p: float,
    ):
        if dropout_p > 0 and rng_state is None:
            raise ValueError("rng_state must be given where dropout_p > 0")
        self.mask, self.rng_state, self.scale, self.dropout_p = mask, rng_state, scale, dropout_p
        self.window, self.diagonal_offset = window, diagonal_offset
        self.acc = torch.float64 if Q.dtype == torch.float64 else torch.float32
        self.heads_k = K.size(1)
        self.group = Q.size(1) // max(K.size(1), 1)  # query heads that share a key head

    def empty(self, rows: range, cols: range) -> bool:
        """Whether the window hides every key of the tile from every query of it."""
        left, right = self.window
        first_row, last_row = rows[0] + self.diagonal_offset, rows[-1] + self.diagonal_offset
        return (left >= 0 and cols[-1] < first_row - left) or (
            right >= 0 and cols[0] > last_row + right
        )

    def per_query_head(self, X: Tensor) -> Tensor:
        """[B, Hk, block_n, D] -> [B, Hq, block_n, D], in the dtype of sums."""
        return X.to(self.acc).repeat_interleave(self.group, dim=1)

    def per_key_head(self, dX: Tensor) -> Tensor:
        """[B, Hq, block_n, D] -> [B, Hk, block_n, D]: the sum over the query heads that read it."""
        return dX.unflatten(1, (self.heads_k, self.group)).sum(dim=2)

    def scores(self, Q_i: Tensor, K_j: Tensor, rows: range, cols: range) -> Tensor:
        """S = scale * Q_i K_j^T + mask, -inf where the query must not look. [..., rows, cols]"""
        S = self.scale * (Q_i @ K_j.transpose(-2, -1))  # [B, Hq, block_m, block_n]
        if self.mask is not None:
            mask = _mask_tile(self.mask, rows, cols)
            S = S.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else S + mask
        if self.window != NO_WINDOW:
            seen = visible(rows, cols, self.window, self.diagonal_offset, S.device)
            S = S.masked_fill(~seen, -torch.inf)
        return S

    def dropout(self, X: Tensor, rows: range, cols: range) -> Tensor:
        """X * Z: 0 where P is dropped, divided by 1 - dropout_p where it is kept."""
        if self.dropout_p == 0:
            return X
        kept = keep_mask(self.rng_state, self.dropout_p, *X.shape[:2], rows, cols)
        X = X.masked_fill(~kept, 0)
        return X / (1 - self.dropout_p) if self.dropout_p < 1 else X


def blocks(length: int, block: int) -> Iterator[range]:
    """range(length) in pieces of `block`, the last one shorter if need be."""
    return (range(start, min(start + block, length)) for start in range(0, length, block))


def _slice(indices: range) -> slice:
    return slice(indices.start, indices.stop)


def _mask_tile(mask: Tensor, rows: range, cols: range) -> Tensor:
    """The part of the mask for a tile, as a view; a dimension of size 1 broadcasts, so stays."""
    if mask.size(2) > 1:
        mask = mask[:, :, _slice(rows)]
    if mask.size(3) > 1:
        mask = mask[:, :, :, _slice(cols)]
    return mask
