/* Which tiles of the forward a bool mask leaves something of: MaskMap. A block makes a word, a warp
 * a bit of it; it stops reading where the first key is visible, so that what it costs is in
 * proportion to what the forward can leave out.
 *
 * Compiled with: BLOCK_M, BLOCK_N (of the forward), THREADS. */
#include "mask_map.cuh"

static_assert(THREADS == 32 * 32, "a warp for each bit");

__shared__ bool seen[32];

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_mask_map_sm90(const __grid_constant__ fa_kernel_params p) {
    const MaskMap map(p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int word = blockIdx.x % map.words, block = blockIdx.x / map.words % map.blocks;
    const int head = blockIdx.x / map.words / map.blocks; /* of the mask, through the batch */
    const int row = block * BLOCK_M, key = (32 * word + warp) * BLOCK_N;
    const int rows = p.mask.stride_row ? min(BLOCK_M, p.seq_q - row) : 1;
    const unsigned char *mask = (const unsigned char *)p.mask.data +
                                head / map.heads * p.mask.stride_batch +
                                head % map.heads * p.mask.stride_head + row * p.mask.stride_row;
    bool any = false;
    for (int i = 0; i < rows && !any; i += 4) {
        unsigned some = 0;
#pragma unroll
        for (int r = i; r < i + 4; r++)
#pragma unroll
            for (int j = key + lane; j < key + lane + BLOCK_N; j += 32)
                if (r < rows && j < p.seq_k)
                    some |= mask[r * p.mask.stride_row + j * p.mask.stride_col];
        any = __any_sync(~0u, some);
    }
    if (lane == 0)
        seen[warp] = any;
    __syncthreads();
    if (warp == 0) {
        const unsigned bits = __ballot_sync(~0u, seen[lane]);
        if (lane == 0)
            p.mask_map[blockIdx.x] = bits;
    }
}
