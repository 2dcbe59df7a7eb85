/* dQ = scale dS K with the same bits every run, where the main kernel of the backward leaves it out
 * (p.dq_sum is NULL). A block owns BLOCK_M queries, a warp 16 of them, and the keys pass by in
 * their order, BLOCK_N at a time: nothing is added atomically, at the price of computing S and dP
 * twice.
 *
 * Compiled with the macros of forward_sm80.cu. */
#include "block_order.cuh"
#include "score_gradients.cuh"
#include "workspace.cuh"

constexpr int DEPTH = round_up_16(HEAD_DIM);
static_assert(BLOCK_M == THREADS / 2, "a warp has 16 queries");

using QTile = Tile<BLOCK_M, HEAD_DIM>; /* and dQ */
using OTile = Tile<BLOCK_M, HEAD_DIM_V>;
using KTile = Tile<BLOCK_N, HEAD_DIM>;
using VTile = Tile<BLOCK_N, HEAD_DIM_V>;

extern __shared__ __align__(16) unsigned char shared_memory[];

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_backward_dq(const __grid_constant__ fa_kernel_params p) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp_row = threadIdx.x / 32 * 16;
    /* Under a causal mask the last queries have the most keys. */
    const OrderedBlock block = ordered_block(p, p.heads_q, blockIdx.x);
    const int first_query = (p.blocks - 1 - block.index) * BLOCK_M;
    const int h = block.head % p.heads_q, b = block.head / p.heads_q;
    const int hk = h / (p.heads_q / p.heads_k);

    int begin = 0, end = p.seq_k;
    if (FA_WINDOW) {
        begin = max(0, first_query + p.window_begin) / BLOCK_N * BLOCK_N;
        end = min(end, min(first_query + BLOCK_M, p.seq_q) - 1 + p.window_end);
    }

    const QTile Q{shared_address(shared_memory)};
    const OTile dO{Q.address + QTile::BYTES};
    const auto stage_address = [&](int key) {
        return dO.address + OTile::BYTES + key / BLOCK_N % STAGES * (KTile::BYTES + VTile::BYTES);
    };
    /* Where there is no such tile, nothing is loaded. */
    const auto load = [&](int key) {
        if (key < end) {
            const KTile K{stage_address(key)};
            const VTile V{K.address + KTile::BYTES};
            K.load(row_of(p.k, b, hk, key), p.k.stride_row, p.seq_k - key);
            V.load(row_of(p.v, b, hk, key), p.v.stride_row, p.seq_k - key);
        }
        cp_async_commit();
    };

    Q.load(row_of(p.q, b, h, first_query), p.q.stride_row, p.seq_q - first_query);
    dO.load(row_of(p.dout, b, h, first_query), p.dout.stride_row, p.seq_q - first_query);
    load(begin);
    const RowStats stats(p, b, h, first_query + warp_row + g);
    float dQ[DEPTH / 8][4] = {};

    for (int key = begin; key < end; key += BLOCK_N) {
        const KTile K{stage_address(key)};
        const VTile V{K.address + KTile::BYTES};
        cp_async_wait<0>();
        __syncthreads(); /* this tile is there, and nobody reads the one before it any more */
        if (STAGES == 2)
            load(key + BLOCK_N);

        float dS[BLOCK_N / 8][4];
        score_gradients(dS, p, stats, Q, dO, warp_row, K, V, b, h, first_query + warp_row, key);
#pragma unroll
        for (int n = 0; n < BLOCK_N / 8; n += 2) {
            unsigned factor[1][WORDS];
#pragma unroll
            for (int x = 0; x < 4; x++)
                put_pair(factor, x / 2, x % 2, dS[n + x / 2][x % 2 * 2],
                         dS[n + x / 2][x % 2 * 2 + 1]);
            Operand a;
            a.set(factor[0]);
#pragma unroll
            for (int d = 0; d < DEPTH / 8; d += 2) {
                Operand k;
                K.b_of_cols(k.part[0], 8 * n, 8 * d);
                k.split();
                multiply(dQ, d, a, k);
            }
        }
        if (STAGES == 1) {
            __syncthreads(); /* nobody reads K and V any more */
            load(key + BLOCK_N);
        }
    }
    cp_async_wait<0>();
    __syncthreads(); /* where there were no keys, Q was on its way until now */

#pragma unroll
    for (int d = 0; d < DEPTH / 8; d++)
#pragma unroll
        for (int r = 0; r < 2; r++)
            put_8_columns(Q, warp_row + g + 8 * r, 8 * d, t, dQ[d], r, p.scale);
    __syncwarp();
    Q.store(row_of(p.dq, b, h, first_query), p.dq.stride_row, p.seq_q - first_query, warp_row, 16,
            lane, 32);
}
