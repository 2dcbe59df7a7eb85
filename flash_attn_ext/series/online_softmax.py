"""From the softmax of a row to attention that never holds a row: one small step after another.

The softmax looks as if it needed a whole row: its maximum, so that exp does not overflow, then its
sum. Online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018)
finds both in one pass. FlashAttention carries the output along in the same way.
"""

import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    """The definition. x: [N]. In float32, exp(x) is infinite from x = 89 on: then this is NaN."""
    return torch.exp(x) / torch.exp(x).sum()


def safe_softmax(x: Tensor) -> Tensor:
    """Three passes over x: [N]. No exponent is above 0, so nothing overflows.

    It is the same function: exp(x - m) / sum(exp(x - m)) has the factor exp(-m) above and below.
    """
    m = x.max()  # first pass
    l = torch.exp(x - m).sum()  # second pass
    return torch.exp(x - m) / l  # third pass


def online_softmax(x: Tensor) -> Tensor:
    """Two passes over x: [N]: maximum and sum together, one number at a time.

    l is the sum of exp(x_j - m) over the numbers met so far. That this stays true when the maximum
    grows from m to m_new takes two lines:

        sum_j exp(x_j - m_new)  =  sum_j exp(x_j - m) * exp(m - m_new)
                                =  l * exp(m - m_new)
    """
    m = x.new_tensor(-torch.inf)
    l = x.new_tensor(0.0)
    for x_j in x:
        m_new = torch.maximum(m, x_j)
        l = l * torch.exp(m - m_new) + torch.exp(x_j - m_new)
        m = m_new
    return torch.exp(x - m) / l


def online_softmax_blocks(x: Tensor, block_n: int = 4) -> Tensor:
    """The same for many rows at once and block_n columns at a time. x: [M, N]."""
    m = x.new_full((x.size(0), 1), -torch.inf)  # [M, 1]
    l = x.new_zeros(x.size(0), 1)  # [M, 1]
    for x_j in x.split(block_n, dim=1):  # [M, block_n]
        m_new = torch.maximum(m, x_j.amax(dim=1, keepdim=True))  # [M, 1]
        l = l * torch.exp(m - m_new) + torch.exp(x_j - m_new).sum(dim=1, keepdim=True)  # [M, 1]
        m = m_new
    return torch.exp(x - m) / l  # [M, N]


def online_attention(Q_i: Tensor, K: Tensor, V: Tensor, block_n: int = 4) -> Tensor:
    """softmax(Q_i K^T) V for one block of queries, in one pass over K and V.

    Q_i: [block_m, D]. K: [N, D]. V: [N, Dv]. Returns O_i: [block_m, Dv].

    No pass is left over for dividing by l, and none is needed: the unnormalised output
    O_i = sum_j exp(S_ij - m) V_j is a sum of the same exponentials as l, so that it follows a new
    maximum by the same factor, and one division at the end normalises it:

        sum_j exp(S_ij - m_new) V_j  =  sum_j exp(S_ij - m) * exp(m - m_new) V_j
                                     =  O_i * exp(m - m_new)
    """
    m = Q_i.new_full((Q_i.size(0), 1), -torch.inf)  # [block_m, 1]
    l = Q_i.new_zeros(Q_i.size(0), 1)  # [block_m, 1]
    O_i = Q_i.new_zeros(Q_i.size(0), V.size(1))  # [block_m, Dv]
    for K_j, V_j in zip(K.split(block_n), V.split(block_n), strict=True):
        S = Q_i @ K_j.T  # [block_m, block_n]: all there ever is of the N x N matrix
        m_new = torch.maximum(m, S.amax(dim=1, keepdim=True))  # [block_m, 1]
        P = torch.exp(S - m_new)  # [block_m, block_n]
        rescale = torch.exp(m - m_new)  # [block_m, 1]
        l = l * rescale + P.sum(dim=1, keepdim=True)  # [block_m, 1]
        O_i = O_i * rescale + P @ V_j  # [block_m, Dv]
        m = m_new
    return O_i / l  # [block_m, Dv]
