/* The FlashAttention backward for sm_80 and up (Dao 2023, Algorithm 2), with mma.sync, ldmatrix and
 * cp.async.
 *
 * A block owns BLOCK_N keys of one key head, a warp 16 of them; the queries of every head of the
 * group pass by BLOCK_M at a time, two tiles in flight, so that dK and dV stay in registers until
 * they are finished. Scores are computed transposed, S^T = K Q^T: as accumulators P^T and dS^T have
 * the layout that the products with dO and Q want as their first operand. Only dQ = dS K sums over
 * the keys of all warps: dS goes through shared memory, and the blocks add up their dQ in global
 * memory, in float.
 *
 * Compiled with the macros of forward_sm80.cu and FA_MASK_GRAD. */
#include "scores.cuh"
#include "tile.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int QUERY_TILES = BLOCK_M / 8;
constexpr int DEPTH = round_up_16(HEAD_DIM), DEPTH_V = round_up_16(HEAD_DIM_V);
/* Warps for dQ: 16 queries each, and the columns shared by those that are left. */
constexpr int DQ_ROWS = BLOCK_M / 16, DQ_SHARES = WARPS / DQ_ROWS;
constexpr int DQ_PAIRS = (DEPTH / 16 + DQ_SHARES - 1) / DQ_SHARES; /* of 8 columns, in a share */
static_assert(BLOCK_N == 16 * WARPS, "a warp has 16 keys");
static_assert(WARPS % DQ_ROWS == 0, "dQ is shared evenly");

using KTile = Tile<BLOCK_N, HEAD_DIM>;
using VTile = Tile<BLOCK_N, HEAD_DIM_V>;
using QTile = Tile<BLOCK_M, HEAD_DIM>;
using OTile = Tile<BLOCK_M, HEAD_DIM_V>;
using STile = Tile<BLOCK_N, BLOCK_M>; /* dS^T */

extern __shared__ __align__(16) unsigned char shared_memory[];
__shared__ float shared_lse[2][BLOCK_M], shared_delta[2][BLOCK_M];

/* C = A B^T: 16 rows of A against all rows of B. */
template <class A, class B>
static __device__ __forceinline__ void multiply_rows(float (&C)[QUERY_TILES][4], const A &a_tile,
                                                     int first_row, const B &b_tile) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int x = 0; x < 4; x++)
            C[m][x] = 0;
#pragma unroll 2
    for (int d = 0; d < A::WIDTH; d += 16) {
        unsigned a[4];
        a_tile.a(a, first_row, d);
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m += 2) {
            unsigned b[4];
            b_tile.b_of_rows(b, 8 * m, d);
            mma_16x8x16(C[m], a, b[0], b[1]);
            mma_16x8x16(C[m + 1], a, b[2], b[3]);
        }
    }
}

/* C += P B, P in registers as the accumulators of an earlier product. */
template <int TILES, class B>
static __device__ __forceinline__ void
multiply_columns(float (&C)[TILES][4], const float (&P)[QUERY_TILES][4], const B &b_tile) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m += 2) {
        const unsigned a[4] = {pack(P[m][0], P[m][1]), pack(P[m][2], P[m][3]),
                               pack(P[m + 1][0], P[m + 1][1]), pack(P[m + 1][2], P[m + 1][3])};
#pragma unroll
        for (int d = 0; d < TILES; d += 2) {
            unsigned b[4];
            b_tile.b_of_cols(b, 8 * m, 8 * d);
            mma_16x8x16(C[d], a, b[0], b[1]);
            mma_16x8x16(C[d + 1], a, b[2], b[3]);
        }
    }
}

/* Rows of a gradient, from accumulators. */
template <int TILES>
static __device__ __forceinline__ void
store_gradient(const fa_kernel_tensor &t, int b, int h, int first_row, int rows, int cols,
               const float (&C)[TILES][4], float scale, int g, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = first_row + g + 8 * r;
        if (row >= rows)
            continue;
        elem *to = row_of(t, b, h, row);
#pragma unroll
        for (int d = 0; d < TILES; d++) {
            const int col = 8 * d + 2 * lane;
            const unsigned pair = pack(C[d][2 * r] * scale, C[d][2 * r + 1] * scale);
            if (FA_ALIGNED && col + 1 < cols) {
                *(unsigned *)(to + col) = pair;
            } else {
                if (col < cols)
                    to[col] = (elem)pair;
                if (col + 1 < cols)
                    to[col + 1] = (elem)(pair >> 16);
            }
        }
    }
}

/* The queries that a block has to look at: of every head of the group those that see its keys. */
struct Queries {
    int first, blocks, count; /* first query, blocks of a head, of all heads */

    __device__ __forceinline__ Queries(const fa_kernel_params &p, int first_key) {
        int begin = 0, end = p.seq_q;
        if (FA_WINDOW) {
            begin = max(0, first_key - p.window_end + 1) / BLOCK_M * BLOCK_M;
            end = min(end, min(first_key + BLOCK_N, p.seq_k) - p.window_begin);
        }
        first = begin;
        blocks = max(0, (end - begin + BLOCK_M - 1) / BLOCK_M);
        count = blocks * (p.heads_q / p.heads_k);
    }
};

static __device__ __forceinline__ void load_queries(const fa_kernel_params &p, const QTile &Q,
                                                    const OTile &dO, int stage, int b, int h,
                                                    int i) {
    Q.load(row_of(p.q, b, h, i), p.q.stride_row, p.seq_q - i);
    dO.load(row_of(p.dout, b, h, i), p.dout.stride_row, p.seq_q - i);
    if (threadIdx.x < BLOCK_M) {
        const long long row = ((long long)b * p.heads_q + h) * p.seq_q + i + threadIdx.x;
        const bool valid = i + (int)threadIdx.x < p.seq_q;
        const float lse = valid ? p.lse[row] : NEGATIVE_INFINITY;
        /* A row that attends to nothing, or is none: an infinite lse makes its P and dS zero. */
        shared_lse[stage][threadIdx.x] = lse == NEGATIVE_INFINITY ? POSITIVE_INFINITY : lse * LOG2E;
        shared_delta[stage][threadIdx.x] = valid ? p.delta[row] : 0;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_backward(const __grid_constant__ fa_kernel_params p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    /* Under a causal mask the first keys have the most queries: they start first. */
    const int first_key = blockIdx.x % p.blocks * BLOCK_N, warp_key = 16 * warp;
    const int hk = blockIdx.x / p.blocks % p.heads_k, b = blockIdx.x / p.blocks / p.heads_k;
    const int group = p.heads_q / p.heads_k;

    const KTile K{shared_address(shared_memory)};
    const VTile V{K.address + KTile::BYTES};
    const STile shared_dS{V.address + VTile::BYTES};
    const unsigned stages = shared_dS.address + STile::BYTES;

    float dK[DEPTH / 8][4] = {}, dV[DEPTH_V / 8][4] = {};
    const Queries queries(p, first_key);
    if (queries.count > 0) {
        K.load(row_of(p.k, b, hk, first_key), p.k.stride_row, p.seq_k - first_key);
        V.load(row_of(p.v, b, hk, first_key), p.v.stride_row, p.seq_k - first_key);
        load_queries(p, QTile{stages}, OTile{stages + QTile::BYTES}, 0, b, hk * group,
                     queries.first);
    }
    cp_async_commit();

    for (int step = 0; step < queries.count; step++) {
        const int stage = step % 2;
        const QTile Q{stages + stage * (QTile::BYTES + OTile::BYTES)};
        const OTile dO{Q.address + QTile::BYTES};
        const int h = hk * group + step / queries.blocks;
        const int query = queries.first + step % queries.blocks * BLOCK_M;
        cp_async_wait<0>();
        __syncthreads(); /* this stage is there, and nobody reads the other one or dS any more */
        if (step + 1 < queries.count) {
            const QTile next{stages + (1 - stage) * (QTile::BYTES + OTile::BYTES)};
            load_queries(p, next, OTile{next.address + QTile::BYTES}, 1 - stage, b,
                         hk * group + (step + 1) / queries.blocks,
                         queries.first + (step + 1) % queries.blocks * BLOCK_M);
        }
        cp_async_commit();

        float S[QUERY_TILES][4], dP[QUERY_TILES][4]; /* transposed: [keys][queries] */
        multiply_rows(S, K, warp_key, Q);
        multiply_rows(dP, V, warp_key, dO);

        const bool cut = is_cut(p, query, BLOCK_M, first_key + warp_key, 16);
        const Dropout dropout(p, b, h);
        unsigned word[2][4];
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++) {
            if (FA_DROPOUT && m % 2 == 0) {
                /* The eight numbers of a position are those of two keys and of four queries; a
                 * thread has two of these keys, and half of the queries, of two positions. */
#pragma unroll
                for (int e = 0; e < 2; e++)
                    dropout.draw(word[e], query + 8 * m, first_key + warp_key, 2 * t + e, g / 2);
            }
#pragma unroll
            for (int x = 0; x < 4; x++) {
                const int column = 8 * m + 2 * t + x % 2;
                const int i = query + column, j = first_key + warp_key + g + x / 2 * 8;
                float s = S[m][x] * p.scale_log2e;
                if (FA_MASK)
                    s += mask_value(p, mask_row(p.mask, b, h, min(i, p.seq_q - 1)),
                                    min(j, p.seq_k - 1));
                if (cut && !is_visible(p, i, j))
                    s = NEGATIVE_INFINITY;
                /* At most 1, also where scores are so large that lse has lost the difference. */
                const float above = s - shared_lse[stage][column];
                const float P = exp2_approx(above > 0 ? 0 : above); /* a NaN stays */
                float kept = 1;
                if (FA_DROPOUT) {
                    const int number = m % 2 * 4 + x / 2 * 2 + g % 2;
                    kept = Dropout::keeps(p, word[x % 2], number) ? p.dropout_scale : 0;
                }
                const float dS = P * (dP[m][x] * kept - shared_delta[stage][column]);
                S[m][x] = P * kept;
                dP[m][x] = dS;
                if (FA_MASK_GRAD && i < p.seq_q && j < p.seq_k)
                    atomicAdd((float *)p.dmask.data + mask_row(p.dmask, b, h, i) +
                                  j * p.dmask.stride_col,
                              dS);
            }
#pragma unroll
            for (int r = 0; r < 2; r++)
                shared_dS.put(warp_key + g + 8 * r, 8 * m + 2 * t,
                              pack(dP[m][2 * r], dP[m][2 * r + 1]));
        }
        multiply_columns(dV, S, dO);
        multiply_columns(dK, dP, Q);

        __syncthreads(); /* dS of all warps */
        if (p.dq_sum) {
            const int first_row = warp % DQ_ROWS * 16, first_pair = warp / DQ_ROWS * DQ_PAIRS;
            float dQ[2 * DQ_PAIRS][4] = {};
#pragma unroll 1
            for (int n = 0; n < BLOCK_N; n += 16) {
                unsigned a[4];
                shared_dS.a_transposed(a, n, first_row);
#pragma unroll
                for (int d = 0; d < DQ_PAIRS; d++) {
                    if ((first_pair + d) * 16 >= DEPTH)
                        continue;
                    unsigned k[4];
                    K.b_of_cols(k, n, 16 * (first_pair + d));
                    mma_16x8x16(dQ[2 * d], a, k[0], k[1]);
                    mma_16x8x16(dQ[2 * d + 1], a, k[2], k[3]);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int i = query + first_row + g + 8 * r;
                if (i >= p.seq_q)
                    continue;
                float *to = p.dq_sum + (((long long)b * p.heads_q + h) * p.seq_q + i) * HEAD_DIM;
#pragma unroll
                for (int d = 0; d < 2 * DQ_PAIRS; d++) {
                    const int col = 16 * first_pair + 8 * d + 2 * t;
                    if (col < HEAD_DIM)
                        atomicAdd(to + col, dQ[d][2 * r]);
                    if (col + 1 < HEAD_DIM)
                        atomicAdd(to + col + 1, dQ[d][2 * r + 1]);
                }
            }
        }
    }
    cp_async_wait<0>();

    if (p.dk.data)
        store_gradient(p.dk, b, hk, first_key + warp_key, p.seq_k, HEAD_DIM, dK, p.scale, g, t);
    if (p.dv.data)
        store_gradient(p.dv, b, hk, first_key + warp_key, p.seq_k, HEAD_DIM_V, dV, 1, g, t);
}
