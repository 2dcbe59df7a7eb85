/* dQ = scale times the sum that the backward's blocks added up, in the type of the tensor. */
#include "operand.cuh"
#include "tile.cuh"
#include "workspace.cuh"

using DQTile = Tile<BLOCK_M, HEAD_DIM>;

extern __shared__ __align__(16) unsigned char shared_memory[];

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_backward_convert(const __grid_constant__ fa_kernel_params p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int h = blockIdx.x / p.blocks % p.heads_q, b = blockIdx.x / p.blocks / p.heads_q;
    const int first = blockIdx.x % p.blocks * BLOCK_M;
    const int rows = min(BLOCK_M, p.seq_q - first);

    /* A warp takes 8 columns of 16 queries at a time. */
    constexpr int WARPS = THREADS / 32, COLUMN_TILES = DQTile::WIDTH / 8;
    const DQTile dQ{shared_address(shared_memory)};
#pragma unroll
    for (int m = 0; m < BLOCK_M; m += 16) {
        if (m >= rows)
            break;
#pragma unroll
        for (int d = 0; d < COLUMN_TILES; d += WARPS) {
            if (d + warp >= COLUMN_TILES)
                break;
            float sum[4];
            load_dq_sum(sum, dq_sum_tile(p, b, h, first + m, 8 * (d + warp)));
#pragma unroll
            for (int r = 0; r < 2; r++)
                put_8_columns(dQ, m + g + 8 * r, 8 * (d + warp), t, sum, r, p.scale);
        }
    }
    __syncthreads();
    dQ.store(row_of(p.dq, b, h, first), p.dq.stride_row, rows, 0, BLOCK_M, threadIdx.x, THREADS);
}
