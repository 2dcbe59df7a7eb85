/* What the kernels of the backward hand on to each other in global memory. */
#pragma once

#include "elem.cuh"
#include "params.h"
#include "ptx/mma.cuh"
#include "ptx/reduce.cuh"

/* Of two queries next to each other: log2(e) lse, rowsum(dO * O). They lie as a thread of the main
 * kernels wants them, which hold the scores of both, and either number at a time. Where a query
 * attends to nothing, or there is none, lse is plus infinity: it makes P and dS zero. */
struct __align__(16) PairStats {
    float2 lse, delta;
};

/* Of queries i and i + 1; i is even. [B, Hq, Sq rounded up to FA_STATS_ROWS] queries. */
static __device__ __forceinline__ PairStats *row_stats(const fa_kernel_params &p, int b, int h,
                                                       int i) {
    const long long rows = (p.seq_q + FA_STATS_ROWS - 1) / FA_STATS_ROWS * FA_STATS_ROWS;
    return (PairStats *)p.row_stats + (((long long)b * p.heads_q + h) * rows + i) / 2;
}

/* The sum of dQ, to which all blocks of a head add: [B, Hq, Sq / 16, D / 16] of 16 queries x 16
 * columns, each as two accumulators of mma_16x8x16, so that a warp adds whole cache lines. They are
 * of 16 queries x 8 columns, or, FA_DQ_TRANSPOSED, of 16 columns x 8 queries. */
constexpr int DQ_TILE = 16 * 8; /* floats */

/* The tile of queries from i and columns from d on, multiples of 16 and of 8; if transposed, both
 * are multiples of 16, and the tile of the next eight queries comes next. */
static __device__ __forceinline__ float *dq_sum_tile(const fa_kernel_params &p, int b, int h, int i,
                                                     int d) {
    const long long row_tiles = (p.seq_q + 15) / 16;
    const long long row_tile = ((long long)b * p.heads_q + h) * row_tiles + i / 16;
    return p.dq_sum + (row_tile * ((HEAD_DIM + 15) / 16 * 2) + d / 8) * DQ_TILE;
}

static __device__ __forceinline__ void add_to_dq_sum(float *tile, const float (&dQ)[4]) {
    const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
    reduce_add_v4(tile + 4 * lane, dQ);
#else
#pragma unroll
    for (int x = 0; x < 4; x++)
        atomicAdd(tile + 32 * x + lane, dQ[x]);
#endif
}

static __device__ __forceinline__ void load_dq_sum(float (&dQ)[4], const float *tile) {
    const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
    const float4 sum = *(const float4 *)(tile + 4 * lane);
    dQ[0] = sum.x, dQ[1] = sum.y, dQ[2] = sum.z, dQ[3] = sum.w;
#else
#pragma unroll
    for (int x = 0; x < 4; x++)
        dQ[x] = tile[32 * x + lane];
#endif
}

#if !FA_DTYPE_FP32
/* Of two tiles, 16 queries x 16 columns: pair[c][r] is f times columns 8c + 2t and 8c + 2t + 1 of
 * query g + 8r, with g = lane / 4 and t = lane % 4. */
static __device__ __forceinline__ void round_dq(unsigned (&pair)[2][2], const float (&sum)[2][4],
                                                float f) {
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned two = pack(sum[tile][2 * half] * f, sum[tile][2 * half + 1] * f);
#if FA_DQ_TRANSPOSED
            pair[half][tile] = movmatrix_trans(two);
#else
            pair[tile][half] = two;
#endif
        }
}
#endif
