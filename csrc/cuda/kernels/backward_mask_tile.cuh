/* Tiles of a mask of the dtype of q and of its gradient, in shared memory. The backward holds
 * scores transposed: what a warp of it wants of a mask lies scattered in global memory, but one
 * ldmatrix takes it from a tile there; and the same the other way. */
#pragma once

#include "ptx/reduce.cuh"
#include "scores.cuh"
#include "tile.cuh"

/* Whether what `elements` elements are apart, of `bytes` each, in a row and rows of the mask are
 * apart, is aligned. */
static __device__ __forceinline__ bool is_aligned(const fa_kernel_mask &mask, int elements,
                                                  int bytes) {
    return mask.stride_col == 1 &&
           (mask.stride_batch | mask.stride_head | mask.stride_row) % elements == 0 &&
           (long long)mask.data % (elements * bytes) == 0;
}

/* Begins to copy the mask of the queries from i and the keys from j on. */
template <int ROWS, int COLS>
static __device__ __forceinline__ void
load_mask(const Tile<ROWS, COLS> &tile, const fa_kernel_params &p, int b, int h, int i, int j) {
    constexpr int LANES = COLS / 8, STEP = THREADS / LANES;
    static_assert(COLS % 8 == 0 && THREADS % LANES == 0 && ROWS % STEP == 0, "whole chunks");
    const int thread = thread_index(), col = thread % LANES * 8, first = thread / LANES;
    const int cols = max(0, min(8, p.seq_k - j - col));
    const bool aligned = is_aligned(p.mask, 8, sizeof(elem));
#pragma unroll 1 /* registers are few */
    for (int row = first; row < ROWS; row += STEP) {
        const bool valid = i + row < p.seq_q && cols > 0;
        const elem *from = (const elem *)p.mask.data;
        if (valid)
            from += mask_row(p.mask, b, h, i + row) + (j + col) * p.mask.stride_col;
        if (aligned) {
            cp_async_16(tile.at(row, col), from, valid ? cols * (int)sizeof(elem) : 0);
            continue;
        }
        unsigned word[4] = {};
#pragma unroll
        for (int x = 0; x < 8; x++)
            if (valid && x < cols)
                word[x / 2] |= (unsigned)from[x * p.mask.stride_col] << 16 * (x % 2);
        store_shared_4(tile.at(row, col), word[0], word[1], word[2], word[3]);
    }
}

/* Four elements of a row of the gradient from column j on: added to it as floats where
 * FA_MASK_GRAD is 1, else stored as they are. */
static __device__ __forceinline__ void put_gradient_of_mask(const fa_kernel_params &p,
                                                            long long row_start, int j,
                                                            bool aligned,
                                                            const unsigned (&pair)[2]) {
    const long long index = row_start + j * p.dmask.stride_col;
    elem dS[4];
#pragma unroll
    for (int x = 0; x < 4; x++)
        dS[x] = (elem)(pair[x / 2] >> 16 * (x % 2));
#if FA_MASK_GRAD == 1
    float *to = (float *)p.dmask.data + index;
#if __CUDA_ARCH__ >= 900
    if (aligned && j + 4 <= p.seq_k) {
        reduce_add_v4(to, {to_float(dS[0]), to_float(dS[1]), to_float(dS[2]), to_float(dS[3])});
        return;
    }
#endif
#else
    elem *to = (elem *)p.dmask.data + index;
    if (aligned && j + 4 <= p.seq_k) {
        *(uint2 *)to = make_uint2(pair[0], pair[1]);
        return;
    }
#endif
#pragma unroll
    for (int x = 0; x < 4; x++)
        if (j + x < p.seq_k) {
#if FA_MASK_GRAD == 1
            atomicAdd(to + x * p.dmask.stride_col, to_float(dS[x]));
#else
            to[x * p.dmask.stride_col] = dS[x];
#endif
        }
}

/* The gradient of a mask from a tile of dS^T: keys from j, queries from i on. */
template <int KEYS, int QUERIES>
static __device__ __forceinline__ void put_mask_gradient(const Tile<KEYS, QUERIES> &dS,
                                                         const fa_kernel_params &p, int b, int h,
                                                         int i, int j) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const bool aligned = is_aligned(p.dmask, 4, FA_MASK_GRAD == 1 ? sizeof(float) : sizeof(elem));
    /* Keys are dealt to the rows of the matrices so that a thread gets 4 neighbours of a query. */
    const int key = lane / 16 * 16 + lane % 8 / 2 * 4 + lane / 8 % 2 * 2 + lane % 2;
#pragma unroll 2
    for (int piece = warp; piece < QUERIES / 8 * (KEYS / 32); piece += THREADS / 32) {
        const int query = piece % (QUERIES / 8) * 8, first_key = piece / (QUERIES / 8) * 32;
        unsigned word[4];
        ldmatrix_x4_trans(word, dS.at(first_key + key, query));
        if (i + query + g < p.seq_q) {
            const long long row = mask_row(p.dmask, b, h, i + query + g);
            put_gradient_of_mask(p, row, j + first_key + 4 * t, aligned, {word[0], word[1]});
            put_gradient_of_mask(p, row, j + first_key + 16 + 4 * t, aligned, {word[2], word[3]});
        }
        __syncwarp();
    }
}

/* Zeros for the queries [begin, end) and `keys` keys from j on. */
static __device__ __forceinline__ void clear_mask_gradient(const fa_kernel_params &p, int b, int h,
                                                           int begin, int end, int j, int keys) {
    const bool aligned = is_aligned(p.dmask, 4, sizeof(elem));
    const int last = min(j + keys, p.seq_k);
    for (int i = begin + (int)threadIdx.x / 32; i < end; i += THREADS / 32)
        for (int col = j + threadIdx.x % 32 * 4; col < last; col += 128)
            put_gradient_of_mask(p, mask_row(p.dmask, b, h, i), col, aligned, {0, 0});
}
