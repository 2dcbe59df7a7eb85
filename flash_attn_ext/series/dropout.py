"""Which probabilities dropout keeps: the rule of csrc/dropout.h, in PyTorch.

The backward of FlashAttention recomputes P tile by tile and has to drop the same elements again,
without having stored which. So whether element (b, h, i, j) is kept is a function of its position
and a seed: any kernel, any tile size and any device come to the same answer.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-7: turns each counter of four 32-bit words into four random 32-bit words.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011. PyTorch computes little in
    uint32, so the words are int64 tensors (that broadcast) with values below 2^32.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(7):
        # Below 2^64, so int64 may wrap around: shift and mask find both halves all the same.
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0 = (product1 >> 32) & WORD ^ c1 ^ key0
        c1 = product1 & WORD
        c2 = (product0 >> 32) & WORD ^ c3 ^ key1
        c3 = product0 & WORD
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def keep_mask(
    rng_state: Tensor,  # [2] int64: seed, offset
    dropout_p: float,
    batch: int,
    heads: int,
    rows: range,
    cols: range,
) -> Tensor:  # [batch, heads, len(rows), len(cols)]
    """True where an element of P is kept, for a tile of `rows` x `cols` of every batch and head.

    Philox gives eight 15-bit numbers at a time. They serve the eight elements of a 16 x 16 tile
    with the same low three bits of the row and the same bits 1 and 2 of the column (see
    csrc/dropout.h): computed once each here, then laid out by the bits of row and column.
    """
    seed, offset = rng_state[0], rng_state[1]
    row_tiles = range(rows.start // 16, -(-rows.stop // 16))  # every 16 x 16 tile that is touched
    col_tiles = range(cols.start // 16, -(-cols.stop // 16))

    def numbers(start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=rng_state.device)

    counter = (
        numbers(8 * row_tiles.start, 8 * row_tiles.stop)[:, None],  # [8 * row_tiles, 1]
        numbers(4 * col_tiles.start, 4 * col_tiles.stop),  # [4 * col_tiles]
        numbers(0, batch * heads)[:, None, None],  # [batch * heads, 1, 1]
        offset & WORD,
    )
    words = philox(counter, (seed & WORD, (seed >> 32) & WORD))
    halves = [half for word in words for half in (word, word >> 16)]
    number, threshold = torch.stack(halves, dim=-1) & 0x7FFF, int(dropout_p * 32768 + 0.5)
    kept = number >= threshold if threshold <= 16384 else number < 32768 - threshold

    # Number n belongs to bit 3 of the row, bit 3 of the column and bit 0 of the column.
    kept = kept.view(batch, heads, len(row_tiles), 8, len(col_tiles), 4, 2, 2, 2)
    kept = kept.permute(0, 1, 2, 6, 3, 4, 7, 5, 8)  # rows: tile, bit 3, bits 2-0; columns likewise
    kept = kept.reshape(batch, heads, 16 * len(row_tiles), 16 * len(col_tiles))
    top, left = rows.start % 16, cols.start % 16
    return kept[:, :, top : top + len(rows), left : left + len(cols)]
