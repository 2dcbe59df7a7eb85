/* What the backward needs of every query before it starts: its row_stats, and a sum of
 * dQ that is zero. */
#include "elem.cuh"
#include "tile.cuh"
#include "workspace.cuh"

/* A few lanes for each row, eight columns for each lane. */
constexpr int ROW_LANES = power_of_2_from(round_up_16(HEAD_DIM_V) / 8);
constexpr int ROWS_AT_ONCE = THREADS / ROW_LANES;
static_assert(ROW_LANES <= 32 && BLOCK_M % ROWS_AT_ONCE == 0, "no row is left out");
static_assert(BLOCK_M == FA_STATS_ROWS, "those that are none are filled in too");

/* Elements col .. col + 7 of a row, zeros past its end. */
static __device__ __forceinline__ void load_columns(float (&x)[8], const elem *row, int col) {
#if FA_ALIGNED
    if (col + 8 <= HEAD_DIM_V) {
#if FA_DTYPE_FP32
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const float4 v = *(const float4 *)(row + col + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
#else
        const uint4 v = *(const uint4 *)(row + col);
        const unsigned word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i] = to_float((elem)(word[i / 2] >> 16 * (i % 2)));
#endif
        return;
    }
#endif
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] = col + i < HEAD_DIM_V ? to_float(row[col + i]) : 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_backward_prepare(const __grid_constant__ fa_kernel_params p) {
    const int h = blockIdx.x / p.blocks % p.heads_q, b = blockIdx.x / p.blocks / p.heads_q;
    const int first = blockIdx.x % p.blocks * BLOCK_M;
    const long long head = (long long)b * p.heads_q + h;

    if (p.dq_sum) {
        float4 *to = (float4 *)dq_sum_tile(p, b, h, first, 0);
        const int tiles = (min(BLOCK_M, p.seq_q - first) + 15) / 16 * (round_up_16(HEAD_DIM) / 8);
        for (int x = threadIdx.x; x < tiles * (DQ_TILE / 4); x += THREADS)
            to[x] = make_float4(0, 0, 0, 0);
    }

    const int col = threadIdx.x % ROW_LANES * 8;
#pragma unroll 4
    for (int m = threadIdx.x / ROW_LANES; m < BLOCK_M; m += ROWS_AT_ONCE) {
        const int i = first + m;
        float delta = 0;
        if (i < p.seq_q) {
            float O[8], dO[8];
            load_columns(O, row_of(p.out, b, h, i), col);
            load_columns(dO, row_of(p.dout, b, h, i), col);
#pragma unroll
            for (int x = 0; x < 8; x++)
                delta += O[x] * dO[x];
        }
#pragma unroll
        for (int step = ROW_LANES / 2; step > 0; step /= 2)
            delta += __shfl_xor_sync(~0u, delta, step);
        if (col == 0) {
            const float lse = i < p.seq_q ? p.lse[head * p.seq_q + i] : NEGATIVE_INFINITY;
            PairStats *pair = row_stats(p, b, h, i / 2 * 2);
            (i % 2 ? pair->lse.y : pair->lse.x) =
                lse == NEGATIVE_INFINITY ? POSITIVE_INFINITY : lse * LOG2E;
            (i % 2 ? pair->delta.y : pair->delta.x) = delta;
        }
    }
}
