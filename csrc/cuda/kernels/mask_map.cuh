/* What a bool mask leaves of the tiles of the forward: a bit for each, 32 tiles of keys a word, for
 * every block of queries, broadcast as the mask is. */
#pragma once

#include "params.h"

struct MaskMap {
    int words, blocks, heads;

    __device__ __forceinline__ explicit MaskMap(const fa_kernel_params &p)
        : words((p.seq_k + 32 * BLOCK_N - 1) / (32 * BLOCK_N)),
          blocks(p.mask.stride_row ? (p.seq_q + BLOCK_M - 1) / BLOCK_M : 1),
          heads(p.mask.stride_head ? p.heads_q : 1) {}

    /* The words of a block of queries. */
    static __device__ __forceinline__ const unsigned *of(const fa_kernel_params &p, int b, int h,
                                                         int block) {
        if (!p.mask_map)
            return nullptr;
        const MaskMap map(p);
        const long long before = p.mask.stride_batch ? (long long)b * map.heads : 0;
        return p.mask_map + ((before + (p.mask.stride_head ? h : 0)) * map.blocks +
                             (p.mask.stride_row ? block : 0)) *
                                map.words;
    }
};

/* Goes through tiles from the last to the first, past those of which a bool mask leaves nothing. */
struct TilesDown {
    const unsigned *words; /* nullptr: there are none of those */
    unsigned word = 0;
    int loaded = -1;

    __device__ __forceinline__ explicit TilesDown(const unsigned *words_) : words(words_) {}

    /* The last tile up to this one; -1: there is none. */
    __device__ __forceinline__ int from(int tile) {
        if (FA_MASK != 1 || !words)
            return tile;
        while (tile >= 0) {
            if (tile / 32 != loaded) {
                loaded = tile / 32;
                word = words[loaded];
            }
            const unsigned left = word << (31 - tile % 32);
            if (left)
                return tile - __clz(left);
            tile = tile / 32 * 32 - 1;
        }
        return tile;
    }
};
