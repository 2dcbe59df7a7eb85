/* What the backward needs of every query before it starts: delta = rowsum(dO * O), and a sum of dQ
 * that is zero. A warp for each row. */
#include "elem.cuh"
#include "tile.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_backward_prepare(const __grid_constant__ fa_kernel_params p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int h = blockIdx.x / p.blocks % p.heads_q, b = blockIdx.x / p.blocks / p.heads_q;
    const int first = blockIdx.x % p.blocks * BLOCK_M;
    for (int i = first + warp; i < min(first + BLOCK_M, p.seq_q); i += THREADS / 32) {
        const elem *O = row_of(p.out, b, h, i), *dO = row_of(p.dout, b, h, i);
        float sum = 0;
        for (int d = lane; d < HEAD_DIM_V; d += 32)
            sum += to_float(O[d]) * to_float(dO[d]);
#pragma unroll
        for (int step = 16; step > 0; step /= 2)
            sum += __shfl_xor_sync(~0u, sum, step);
        const long long row = ((long long)b * p.heads_q + h) * p.seq_q + i;
        if (lane == 0)
            p.delta[row] = sum;
        if (p.dq_sum) {
            for (int d = lane; d < HEAD_DIM; d += 32)
                p.dq_sum[row * HEAD_DIM + d] = 0;
        }
    }
}
