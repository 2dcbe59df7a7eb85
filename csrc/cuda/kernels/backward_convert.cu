/* dQ = scale times the sum that the backward's blocks added up, in the type of the tensor. */
#include "operand.cuh"
#include "tile.cuh"
#include "workspace.cuh"

using DQTile = Tile<BLOCK_M, HEAD_DIM>;

/* 16 queries x 16 columns of a sum, times f, into a tile. */
static __device__ __forceinline__ void put_dq(DQTile dQ, int m, int d, const float (&sum)[2][4],
                                              int g, int t, float f) {
#if FA_DTYPE_FP32
#pragma unroll
    for (int r = 0; r < 2; r++)
        put_row(dQ, m + g + 8 * r, d, t, sum[0], sum[1], r, f);
#else
    unsigned pair[2][2];
    round_dq(pair, sum, f);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int c = 0; c < 2; c++)
            dQ.put(m + g + 8 * r, d + 8 * c + 2 * t, pair[c][r]);
#endif
}

extern __shared__ __align__(16) unsigned char shared_memory[];

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_backward_convert(const __grid_constant__ fa_kernel_params p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int h = blockIdx.x / p.blocks % p.heads_q, b = blockIdx.x / p.blocks / p.heads_q;
    const int first = blockIdx.x % p.blocks * BLOCK_M;
    const int rows = min(BLOCK_M, p.seq_q - first);

    /* A warp takes 16 columns of 16 queries at a time. */
    constexpr int WARPS = THREADS / 32, COLUMN_TILES = DQTile::WIDTH / 16;
    const DQTile dQ{shared_address(shared_memory)};
#pragma unroll
    for (int x = 0; x < BLOCK_M / 16 * COLUMN_TILES; x += WARPS) {
        const int m = (x + warp) / COLUMN_TILES * 16, d = (x + warp) % COLUMN_TILES * 16;
        if (m >= rows)
            break;
        float sum[2][4];
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
            load_dq_sum(sum[tile], dq_sum_tile(p, b, h, first + m, d) + tile * DQ_TILE);
        put_dq(dQ, m, d, sum, g, t, p.scale);
    }
    __syncthreads();
    dQ.store(row_of(p.dq, b, h, first), p.dq.stride_row, rows, 0, BLOCK_M, threadIdx.x, THREADS);
}
