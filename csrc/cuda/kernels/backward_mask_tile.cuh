/* Tiles of a mask of the dtype of q and of its gradient, in shared memory. The backward holds
 * scores transposed: what a warp of it wants of a mask lies scattered in global memory, but one
 * ldmatrix takes it from a tile there; and the same the other way. */
#pragma once

#include "ptx/reduce.cuh"
#include "query_tiles.cuh"
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

/* What the gradient is made of. */
#if FA_MASK_GRAD == 1 || FA_MASK_GRAD == 2
typedef float mask_grad_elem;

static __device__ __forceinline__ float to_mask_grad(elem dS) {
    return to_float(dS);
}
#else
typedef elem mask_grad_elem;

static __device__ __forceinline__ elem to_mask_grad(elem dS) {
    return dS;
}
#endif

static __device__ __forceinline__ mask_grad_elem *mask_grad_at(const fa_kernel_params &p, int b,
                                                               int h, int i, int j) {
    return (mask_grad_elem *)p.dmask.data + mask_row(p.dmask, b, h, i) + j * p.dmask.stride_col;
}

/* Four elements of a row of the gradient, of which `cols` are there, are added to it where
 * FA_MASK_GRAD is 1, else stored. */
static __device__ __forceinline__ void put_gradient_of_mask(const fa_kernel_params &p,
                                                            mask_grad_elem *to, int cols,
                                                            bool aligned,
                                                            const unsigned (&pair)[2]) {
    mask_grad_elem dS[4];
#pragma unroll
    for (int x = 0; x < 4; x++)
        dS[x] = to_mask_grad((elem)(pair[x / 2] >> 16 * (x % 2)));
    if (aligned && cols >= 4) {
#if FA_MASK_GRAD == 2
        *(float4 *)to = make_float4(dS[0], dS[1], dS[2], dS[3]);
        return;
#elif FA_MASK_GRAD != 1
        *(uint2 *)to = make_uint2(pair[0], pair[1]);
        return;
#elif __CUDA_ARCH__ >= 900
        reduce_add_v4(to, dS);
        return;
#endif
    }
#pragma unroll
    for (int x = 0; x < 4; x++)
        if (x < cols) {
#if FA_MASK_GRAD == 1
            atomicAdd(to + x * p.dmask.stride_col, dS[x]);
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
    const bool aligned = is_aligned(p.dmask, 4, sizeof(mask_grad_elem));
    /* Keys are dealt to the rows of the matrices so that a thread gets 4 neighbours of a query. */
    const int key = lane / 16 * 16 + lane % 8 / 2 * 4 + lane / 8 % 2 * 2 + lane % 2;
#pragma unroll 2
    for (int piece = warp; piece < QUERIES / 8 * (KEYS / 32); piece += THREADS / 32) {
        const int query = piece % (QUERIES / 8) * 8, first_key = piece / (QUERIES / 8) * 32;
        unsigned word[4];
        ldmatrix_x4_trans(word, dS.at(first_key + key, query));
        if (i + query + g < p.seq_q) {
            const int col = j + first_key + 4 * t;
            mask_grad_elem *to = mask_grad_at(p, b, h, i + query + g, col);
            put_gradient_of_mask(p, to, p.seq_k - col, aligned, {word[0], word[1]});
            put_gradient_of_mask(p, to + 16 * p.dmask.stride_col, p.seq_k - col - 16, aligned,
                                 {word[2], word[3]});
        }
        __syncwarp();
    }
}

/* Zeros for the queries [begin, end) and `keys` keys from j on. */
static __device__ __forceinline__ void clear_mask_gradient(const fa_kernel_params &p, int b, int h,
                                                           int begin, int end, int j, int keys) {
    const bool aligned = is_aligned(p.dmask, 4, sizeof(mask_grad_elem));
    const int last = min(j + keys, p.seq_k);
    for (int i = begin + (int)threadIdx.x / 32; i < end; i += THREADS / 32)
        for (int col = j + threadIdx.x % 32 * 4; col < last; col += 128)
            put_gradient_of_mask(p, mask_grad_at(p, b, h, i, col), last - col, aligned, {0, 0});
}

/* The gradient of the mask in the tiles that the block does not look at. */
static __device__ __forceinline__ void
clear_hidden(const fa_kernel_params &p, const QueryTiles &queries, int b, int hk, int first_key) {
    const int group = p.heads_q / p.heads_k;
    const bool any = queries.begin < queries.end;
    const int above = any ? queries.begin : p.seq_q;
    const int below = (queries.end + BLOCK_M - 1) / BLOCK_M * BLOCK_M;
    for (int h = hk * group; h < (hk + 1) * group; h++) {
        clear_mask_gradient(p, b, h, 0, min(above, p.seq_q), first_key, BLOCK_N);
        if (any)
            clear_mask_gradient(p, b, h, below, p.seq_q, first_key, BLOCK_N);
    }
}
