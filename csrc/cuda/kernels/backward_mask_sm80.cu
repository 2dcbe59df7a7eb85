/* The gradient of a mask that broadcasts, with the same bits every run: the sum of dS over what it
 * broadcasts. A block owns BLOCK_M x BLOCK_N elements of the gradient, fewer where rows or columns
 * broadcast too, and computes every dS that belongs to them, in a fixed order.
 *
 * Compiled with the macros of forward_sm80.cu. */
#include "score_gradients.cuh"
#include "workspace.cuh"

constexpr int WARPS = THREADS / 32, TILES = BLOCK_N / 8;
static_assert(BLOCK_M == WARPS * 16, "a warp has 16 queries");

using QTile = Tile<BLOCK_M, HEAD_DIM>;
using OTile = Tile<BLOCK_M, HEAD_DIM_V>;
using KTile = Tile<BLOCK_N, HEAD_DIM>;
using VTile = Tile<BLOCK_N, HEAD_DIM_V>;

extern __shared__ __align__(16) unsigned char shared_memory[];
__shared__ float shared_sums[WARPS][BLOCK_N];

/* The part of a dimension that a block sums over: all of it where the mask broadcasts it. */
struct Range {
    int begin, end;

    __device__ __forceinline__ Range(bool broadcast, int size, int own, int own_size)
        : begin(broadcast ? 0 : own), end(broadcast ? size : min(own + own_size, size)) {}
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_backward_mask(const __grid_constant__ fa_kernel_params p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp_row = warp * 16;
    const bool sum_batch = !p.dmask.stride_batch, sum_heads = !p.dmask.stride_head;
    const bool sum_rows = !p.dmask.stride_row, sum_cols = !p.dmask.stride_col;

    const int own_h = blockIdx.x / p.blocks % p.heads_q;
    const int own_b = blockIdx.x / p.blocks / p.heads_q;
    const int row_blocks = sum_rows ? 1 : (p.seq_q + BLOCK_M - 1) / BLOCK_M;
    const int own_i = blockIdx.x % p.blocks % row_blocks * BLOCK_M;
    const int own_j = blockIdx.x % p.blocks / row_blocks * BLOCK_N;
    if ((sum_batch && own_b > 0) || (sum_heads && own_h > 0))
        return;

    const QTile Q{shared_address(shared_memory)};
    const OTile dO{Q.address + QTile::BYTES};
    const KTile K{dO.address + OTile::BYTES};
    const VTile V{K.address + KTile::BYTES};
    const Range batches(sum_batch, p.batch, own_b, 1), heads(sum_heads, p.heads_q, own_h, 1);
    const Range rows(sum_rows, p.seq_q, own_i, BLOCK_M), cols(sum_cols, p.seq_k, own_j, BLOCK_N);

    float sum[TILES][4] = {};
    for (int b = batches.begin; b < batches.end; b++)
        for (int h = heads.begin; h < heads.end; h++)
            for (int i = rows.begin; i < rows.end; i += BLOCK_M)
                for (int j = cols.begin; j < cols.end; j += BLOCK_N) {
                    if (FA_WINDOW &&
                        (j >= i + BLOCK_M - 1 + p.window_end || j + BLOCK_N <= i + p.window_begin))
                        continue; /* all hidden */
                    const int hk = h / (p.heads_q / p.heads_k);
                    __syncthreads(); /* nobody reads the tiles before these any more */
                    Q.load(row_of(p.q, b, h, i), p.q.stride_row, p.seq_q - i);
                    dO.load(row_of(p.dout, b, h, i), p.dout.stride_row, p.seq_q - i);
                    K.load(row_of(p.k, b, hk, j), p.k.stride_row, p.seq_k - j);
                    V.load(row_of(p.v, b, hk, j), p.v.stride_row, p.seq_k - j);
                    cp_async_commit();
                    const RowStats stats(p, b, h, i + warp_row + g);
                    cp_async_wait<0>();
                    __syncthreads();

                    float dS[TILES][4];
                    score_gradients(dS, p, stats, Q, dO, warp_row, K, V, b, h, i + warp_row, j);
#pragma unroll
                    for (int n = 0; n < TILES; n++)
#pragma unroll
                        for (int x = 0; x < 4; x++)
                            sum[n][x] += dS[n][x];
                }

    if (sum_cols) { /* into column 0 */
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float all = 0;
#pragma unroll
            for (int n = 0; n < TILES; n++)
                all += sum[n][2 * r] + sum[n][2 * r + 1];
            all += __shfl_xor_sync(~0u, all, 1);
            all += __shfl_xor_sync(~0u, all, 2);
            sum[0][2 * r] = all;
        }
    }
    if (sum_rows) { /* into row 0 */
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int x = 0; x < 2; x++) {
                float all = sum[n][x] + sum[n][2 + x];
#pragma unroll
                for (int step = 4; step < 32; step *= 2)
                    all += __shfl_xor_sync(~0u, all, step);
                if (g == 0)
                    shared_sums[warp][8 * n + 2 * t + x] = all;
            }
        __syncthreads();
    }

    float *dmask =
        (float *)p.dmask.data + mask_row(p.dmask, own_b, own_h, own_i) + own_j * p.dmask.stride_col;
    const int row_count = sum_rows ? 1 : min(BLOCK_M, p.seq_q - own_i);
    const int col_count = sum_cols ? 1 : min(BLOCK_N, p.seq_k - own_j);
    if (sum_rows) {
        for (int col = threadIdx.x; col < col_count; col += THREADS) {
            float all = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                all += shared_sums[w][col];
            dmask[col * p.dmask.stride_col] = all;
        }
        return;
    }
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const int row = warp_row + g + x / 2 * 8, col = 8 * n + 2 * t + x % 2;
            if (row < row_count && col < col_count)
                dmask[row * p.dmask.stride_row + col * p.dmask.stride_col] = sum[n][x];
        }
}
