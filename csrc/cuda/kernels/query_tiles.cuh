/* The tiles of queries that pass by a block of the backward, which owns keys. */
#pragma once

#include "params.h"

/* A tile of queries of a head. */
struct QueryTile {
    int h, i; /* first query */
};

/* The tiles that a block has to look at: of every head of the group those that see its keys. */
struct QueryTiles {
    int begin, end, first_head, end_head;

    __device__ __forceinline__ QueryTiles(const fa_kernel_params &p, int hk, int first_key,
                                          int keys = BLOCK_N) {
        const int group = p.heads_q / p.heads_k;
        begin = 0, end = p.seq_q;
        if (FA_WINDOW) {
            begin = max(0, first_key - p.window_end + 1) / BLOCK_M * BLOCK_M;
            end = min(end, min(first_key + keys, p.seq_k) - p.window_begin);
        }
        first_head = hk * group;
        end_head = begin < end ? first_head + group : first_head;
    }
    __device__ __forceinline__ unsigned count() const {
        return (end_head - first_head) * ((end - begin + BLOCK_M - 1) / BLOCK_M);
    }
    __device__ __forceinline__ QueryTile first() const { return {first_head, begin}; }
    __device__ __forceinline__ QueryTile after(QueryTile tile) const {
        tile.i += BLOCK_M;
        return tile.i < end ? tile : QueryTile{tile.h + 1, begin};
    }
    __device__ __forceinline__ bool has(QueryTile tile) const { return tile.h < end_head; }
};
