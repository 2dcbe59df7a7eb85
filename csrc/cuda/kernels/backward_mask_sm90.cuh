/* The mask in the backward for sm_90a, and its gradient. Scores are transposed there: a thread has
 * two keys of them, and of every eight queries two.
 *
 * Compiled with: FA_MASK, FA_MASK_TILES (0 the mask is read from global memory; 1 the copy engine
 * brings it in tiles; 2 it is the same for all queries: a thread reads its two keys'), FA_MASK_GRAD
 * (see backward_sm80.cu, and 4: as 3, stored by the copy engine). */
#pragma once

#include "backward_mask_tile.cuh"
#include "mask_tile.cuh"
#include "panels.cuh"
#include "ptx/mma.cuh"
#include "ptx/warpgroup.cuh"
#include "query_tiles.cuh"
#include "ring.cuh"

constexpr bool HAS_MASK_TILE = FA_MASK_TILES == 1;
constexpr int MASK_BYTES = HAS_MASK_TILE ? MaskTile::BYTES : 16;

/* What a mask adds to a score, both in log2. The product is not rounded: the lowest finite numbers
 * stay finite. A score that a bool mask hides may even be NaN. */
static __device__ __forceinline__ float add_mask(float score, mask_elem value) {
#if FA_MASK == 1
    return value ? score : NEGATIVE_INFINITY;
#elif FA_MASK == 2
    return fmaf(to_float(value), LOG2E, score);
#else
    return fmaf(value, LOG2E, score);
#endif
}

/* The mask of a warp's 16 keys and of a tile of queries. */
struct WarpMask {
    const fa_kernel_params &p;
    const mask_elem *memory; /* of the thread's first query and key */
    int queries, keys;       /* from these on */
    unsigned tile[2][2];     /* likewise, in shared memory: of queries 2t, 2t + 1; keys g, g + 8 */
    mask_elem of_key[2];

    __device__ __forceinline__ WarpMask(const fa_kernel_params &p_, MaskTile mask, int b, int h,
                                        int query, int first_key, int warp_row)
        : p(p_) {
        const int lane = lane_anew(), g = lane / 4, t = lane % 4;
        if (HAS_MASK_TILE && FA_MASK == 2) { /* where ldmatrix is to find its rows */
            tile[0][0] = mask.element(lane / 16 * 8 + lane % 8, warp_row + lane / 8 % 2 * 8);
        } else if (HAS_MASK_TILE) {
#pragma unroll
            for (int x = 0; x < 4; x++)
                tile[x % 2][x / 2] = mask.element(2 * t + x % 2, warp_row + g + x / 2 * 8);
        } else if (FA_MASK) {
            const int i = query + 2 * t, j = first_key + warp_row + g;
            queries = p.seq_q - i, keys = p.seq_k - j;
            memory =
                (const mask_elem *)p.mask.data + mask_row(p.mask, b, h, i) + j * p.mask.stride_col;
#pragma unroll
            for (int r = 0; r < 2; r++)
                of_key[r] = FA_MASK_TILES == 2 ? load(0, 8 * r) : 0;
        }
    }

    /* Where there is no such query or key it does not matter. */
    __device__ __forceinline__ mask_elem load(int query, int key) const {
        return query < queries && key < keys
                   ? memory[query * p.mask.stride_row + key * p.mask.stride_col]
                   : mask_elem(0);
    }

    /* Of the 16 queries from 8m on, in the order of accumulators. */
    __device__ __forceinline__ void get(mask_elem (&value)[8], int m) const {
        unsigned word[4];
        if (HAS_MASK_TILE && FA_MASK == 2)
            ldmatrix_x4_trans(word, tile[0][0] + 8 * m * 128);
#pragma unroll
        for (int x = 0; x < 8; x++) {
            const int query = 8 * m + x / 4 * 8, r = x % 4 / 2;
            value[x] = FA_MASK_TILES == 2 ? of_key[r]
                       : !HAS_MASK_TILE   ? load(query + x % 2, 8 * r)
                       : FA_MASK == 2     ? mask_elem(word[x / 2] >> 16 * (x % 2))
                                          : MaskTile::load_element(tile[x % 2][r] + query * 128);
        }
        if (!FA_MASK_TILES)
            asm volatile("" ::: "memory"); /* there are no registers to load more at once */
    }
};

/* By COUNT warps, from warp FIRST on, the gradient from a tile of dS: keys from j, queries from i
 * on. What a thread is to do is found out anew for each tile, for it has few registers. */
template <int FIRST, int COUNT, class STile>
static __device__ __forceinline__ void put_mask_gradient(STile dS, const fa_kernel_params &p, int b,
                                                         int h, int i, int j) {
    constexpr int LANES = BLOCK_N / 4, STEP = COUNT * 32 / LANES; /* of 4 keys; rows at once */
    const unsigned thread = thread_index() - 32 * FIRST, col = thread % LANES * 4;
    const bool aligned = is_aligned(p.dmask, 4, sizeof(mask_grad_elem));
    const int cols = p.seq_k - j - (int)col;
    mask_grad_elem *to = mask_grad_at(p, b, h, i + thread / LANES, j + col);
    const unsigned rows = min(BLOCK_M, p.seq_q - i);
#pragma unroll 1
    for (unsigned row = thread / LANES; row < rows; row += STEP) {
        unsigned pair[2];
        load_shared_2(pair[0], pair[1], dS.chunk(row, col / 8 * 8) + col % 8 * 2);
        put_gradient_of_mask(p, to, cols, aligned, pair);
        to += STEP * p.dmask.stride_row;
    }
}

/* Likewise; dS may not change until tma_store_wait_read. */
template <int FIRST, int COUNT, class STile, class Maps, class Work>
static __device__ __forceinline__ void take_mask_gradient(const fa_kernel_params &p,
                                                          const Maps &maps, STile dS,
                                                          const Work &work, QueryTile tile) {
    static_assert(STile::COUNT <= COUNT, "each warp stores a panel");
    if (FA_MASK_GRAD != 4) {
        put_mask_gradient<FIRST, COUNT>(dS, p, work.b, tile.h, tile.i, work.first_key);
    } else if (threadIdx.x % 32 == 0) {
        const int taker = thread_index() / 32 - FIRST;
        if (taker < STile::COUNT)
            tma_store(&maps.dmask, dS.address + taker * STile::PANEL_BYTES,
                      work.first_key + 64 * taker, tile.i, tile.h, work.b);
        tma_store_commit();
    }
}
