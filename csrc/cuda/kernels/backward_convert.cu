/* dQ = scale times the sum that the backward's blocks added up, in the type of the tensor. */
#include "elem.cuh"
#include "tile.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_backward_convert(const __grid_constant__ fa_kernel_params p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int h = blockIdx.x / p.blocks % p.heads_q, b = blockIdx.x / p.blocks / p.heads_q;
    const int first = blockIdx.x % p.blocks * BLOCK_M;
    for (int i = first + warp; i < min(first + BLOCK_M, p.seq_q); i += THREADS / 32) {
        const float *sum = p.dq_sum + (((long long)b * p.heads_q + h) * p.seq_q + i) * HEAD_DIM;
        elem *dQ = row_of(p.dq, b, h, i);
        for (int d = lane; d < HEAD_DIM; d += 32)
            dQ[d] = (elem)pack(sum[d] * p.scale, 0);
    }
}
