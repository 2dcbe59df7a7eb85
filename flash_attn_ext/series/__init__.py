"""FlashAttention taken apart, in plain PyTorch. Read in this order:

1. `naive`: standard attention, which builds the N x N matrix.
2. `online_softmax`: how a softmax, and then attention, can be computed without seeing a whole row.
3. `tiled`: FlashAttention itself, forward and backward, in O(N) memory.
4. `dropout`: random numbers that depend on the position alone, so that tiles can be recomputed.
5. `traffic`: what all this costs in arithmetic and in bytes of slow memory, step by step.

The notebooks tell the story around them; `plots`, `exercises` and `quote` are their helpers.

`naive.attention` and `tiled.attention` take the same arguments: those of the kernels. Names are
those of the C and CUDA sources: Q K V S P O, m (row maximum), l (row sum), lse, block_m (rows of Q
in a tile) and block_n (rows of K and V in a tile). Letters in shape comments: B batch, Hq query
heads, Hk key/value heads, Sq and Sk sequence lengths, D head size of Q and K, Dv head size of V.
"""

from .traffic import traffic

__all__ = ["traffic"]
