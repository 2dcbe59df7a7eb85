/* The FlashAttention forward for sm_80 and up (Dao 2023, Algorithm 1), with mma.sync, ldmatrix and
 * cp.async.
 *
 * A block owns BLOCK_M queries of one head, a warp WARP_TILES times 16 of them; keys and values
 * pass by BLOCK_N at a time. While the warps multiply with K, V of the same tile is on its way, and
 * while they multiply with V, the next K.
 *
 * Compiled with: FA_DTYPE_BF16 or FA_DTYPE_FP16, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, THREADS,
 * FA_ALIGNED, FA_MASK (0 none, 1 bool, 2 dtype of q, 3 float), FA_WINDOW, FA_DROPOUT. */
#include "scores.cuh"
#include "tile.cuh"

constexpr int WARP_TILES = BLOCK_M / (THREADS / 32) / 16; /* of 16 queries */
constexpr int KEY_TILES = BLOCK_N / 8;
constexpr int OUT_TILES = round_up_16(HEAD_DIM_V) / 8;
constexpr int DEPTH = round_up_16(HEAD_DIM);
static_assert(WARP_TILES * 16 * (THREADS / 32) == BLOCK_M, "a warp has whole tiles of queries");
static_assert(BLOCK_N % 16 == 0, "keys come in pairs of tiles");

using QTile = Tile<BLOCK_M, HEAD_DIM>;
using KTile = Tile<BLOCK_N, HEAD_DIM>;
using VTile = Tile<BLOCK_N, HEAD_DIM_V>;
using OTile = Tile<BLOCK_M, HEAD_DIM_V>; /* takes the place of Q, K and V at the end */

extern __shared__ __align__(16) unsigned char shared_memory[];

/* S = Q K^T */
static __device__ __forceinline__ void multiply_scores(float (&S)[WARP_TILES][KEY_TILES][4],
                                                       const QTile &Q, const KTile &K,
                                                       int first_row) {
#pragma unroll
    for (int w = 0; w < WARP_TILES; w++)
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
            for (int x = 0; x < 4; x++)
                S[w][n][x] = 0;
#pragma unroll
    for (int d = 0; d < DEPTH; d += 16) {
        unsigned a[WARP_TILES][4];
#pragma unroll
        for (int w = 0; w < WARP_TILES; w++)
            Q.a(a[w], first_row + 16 * w, d);
#pragma unroll
        for (int n = 0; n < KEY_TILES; n += 2) {
            unsigned b[4];
            K.b_of_rows(b, 8 * n, d);
#pragma unroll
            for (int w = 0; w < WARP_TILES; w++) {
                mma_16x8x16(S[w][n], a[w], b[0], b[1]);
                mma_16x8x16(S[w][n + 1], a[w], b[2], b[3]);
            }
        }
    }
}

/* O += P V */
static __device__ __forceinline__ void multiply_values(float (&O)[WARP_TILES][OUT_TILES][4],
                                                       const float (&P)[WARP_TILES][KEY_TILES][4],
                                                       const VTile &V) {
#pragma unroll
    for (int n = 0; n < KEY_TILES; n += 2) {
        unsigned a[WARP_TILES][4];
#pragma unroll
        for (int w = 0; w < WARP_TILES; w++) {
            a[w][0] = pack(P[w][n][0], P[w][n][1]);
            a[w][1] = pack(P[w][n][2], P[w][n][3]);
            a[w][2] = pack(P[w][n + 1][0], P[w][n + 1][1]);
            a[w][3] = pack(P[w][n + 1][2], P[w][n + 1][3]);
        }
#pragma unroll
        for (int d = 0; d < OUT_TILES; d += 2) {
            unsigned b[4];
            V.b_of_cols(b, 8 * n, 8 * d);
#pragma unroll
            for (int w = 0; w < WARP_TILES; w++) {
                mma_16x8x16(O[w][d], a[w], b[0], b[1]);
                mma_16x8x16(O[w][d + 1], a[w], b[2], b[3]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fa_forward(const __grid_constant__ fa_kernel_params p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    /* Under a causal mask the last queries have the most keys: they start first. */
    const int tile = p.blocks - 1 - (int)(blockIdx.x % p.blocks);
    const int h = blockIdx.x / p.blocks % p.heads_q, b = blockIdx.x / p.blocks / p.heads_q;
    const int hk = h / (p.heads_q / p.heads_k);
    const int first_query = tile * BLOCK_M, warp_row = warp * 16 * WARP_TILES;

    const QTile Q{shared_address(shared_memory)};
    const KTile K{Q.address + QTile::BYTES};
    const VTile V{K.address + KTile::BYTES};

    int begin = 0, end = p.seq_k;
    if (FA_WINDOW) {
        begin = max(0, first_query + p.window_begin) / BLOCK_N * BLOCK_N;
        end = min(end, min(first_query + BLOCK_M, p.seq_q) - 1 + p.window_end);
    }

    float O[WARP_TILES][OUT_TILES][4] = {};
    float m[WARP_TILES][2], l[WARP_TILES][2];
#pragma unroll
    for (int w = 0; w < WARP_TILES; w++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            m[w][r] = NEGATIVE_INFINITY;
            l[w][r] = 0;
        }

    Q.load(row_of(p.q, b, h, first_query), p.q.stride_row, p.seq_q - first_query);
    if (begin < end)
        K.load(row_of(p.k, b, hk, begin), p.k.stride_row, p.seq_k - begin);
    cp_async_commit();
    const Dropout dropout(p, b, h);

    for (int key = begin; key < end; key += BLOCK_N) {
        V.load(row_of(p.v, b, hk, key), p.v.stride_row, p.seq_k - key);
        cp_async_commit();
        cp_async_wait<1>(); /* K */
        __syncthreads();

        float S[WARP_TILES][KEY_TILES][4];
        multiply_scores(S, Q, K, warp_row);
        __syncthreads();
        if (key + BLOCK_N < end)
            K.load(row_of(p.k, b, hk, key + BLOCK_N), p.k.stride_row, p.seq_k - key - BLOCK_N);
        cp_async_commit();

        const bool cut = is_cut(p, first_query + warp_row, 16 * WARP_TILES, key, BLOCK_N);
        float c = p.scale_log2e;
        if (FA_MASK || c <= 0) { /* else the maximum of c S is c times that of S */
#pragma unroll
            for (int w = 0; w < WARP_TILES; w++)
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const int i = first_query + warp_row + 16 * w + g + x / 2 * 8;
                    const long long row = mask_row(p.mask, b, h, min(i, p.seq_q - 1));
#pragma unroll
                    for (int n = 0; n < KEY_TILES; n++) {
                        const int j = key + 8 * n + 2 * t + x % 2;
                        S[w][n][x] = S[w][n][x] * c + mask_value(p, row, min(j, p.seq_k - 1));
                    }
                }
            c = 1;
        }
        if (cut) {
#pragma unroll
            for (int w = 0; w < WARP_TILES; w++)
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                    for (int x = 0; x < 4; x++) {
                        const int i = first_query + warp_row + 16 * w + g + x / 2 * 8;
                        const int j = key + 8 * n + 2 * t + x % 2;
                        if (!is_visible(p, i, j))
                            S[w][n][x] = NEGATIVE_INFINITY;
                    }
        }

        /* Online softmax (Milakov and Gimelshein 2018), the four threads of a row together. */
#pragma unroll
        for (int w = 0; w < WARP_TILES; w++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float most = S[w][0][2 * r];
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
                    most = fmaxf(most, fmaxf(S[w][n][2 * r], S[w][n][2 * r + 1]));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
                const float m_new = fmaxf(m[w][r], most * c);
                const float origin = m_new == NEGATIVE_INFINITY ? 0 : m_new;
                const float rescale = exp2_approx(m[w][r] - origin);
                float sum = 0;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                    for (int x = 2 * r; x < 2 * r + 2; x++) {
                        S[w][n][x] = exp2_approx(fmaf(S[w][n][x], c, -origin));
                        sum += S[w][n][x];
                    }
                l[w][r] = l[w][r] * rescale + sum; /* of this thread's columns */
                m[w][r] = m_new;
#pragma unroll
                for (int d = 0; d < OUT_TILES; d++) {
                    O[w][d][2 * r] *= rescale;
                    O[w][d][2 * r + 1] *= rescale;
                }
            }
        if (FA_DROPOUT) {
#pragma unroll
            for (int w = 0; w < WARP_TILES; w++)
#pragma unroll
                for (int n = 0; n < KEY_TILES; n += 2) {
                    unsigned word[4];
                    dropout.draw(word, first_query + warp_row + 16 * w, key + 8 * n, g, t);
#pragma unroll
                    for (int x = 0; x < 8; x++) {
                        float &P = S[w][n + x / 4][x % 4];
                        const int number = x % 4 / 2 * 4 + x / 4 * 2 + x % 2;
                        P = Dropout::keeps(p, word, number) ? P * p.dropout_scale : 0;
                    }
                }
        }

        cp_async_wait<1>(); /* V */
        __syncthreads();
        multiply_values(O, S, V);
        __syncthreads();
    }
    cp_async_wait<0>();
    __syncthreads();

    const OTile out{Q.address};
#pragma unroll
    for (int w = 0; w < WARP_TILES; w++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = l[w][r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const float f = sum == 0 ? 0 : 1 / sum;
            const int row = warp_row + 16 * w + g + 8 * r;
#pragma unroll
            for (int d = 0; d < OUT_TILES; d++)
                out.put(row, 8 * d + 2 * t, pack(O[w][d][2 * r] * f, O[w][d][2 * r + 1] * f));
            if (t == 0 && first_query + row < p.seq_q)
                p.lse[((long long)b * p.heads_q + h) * p.seq_q + first_query + row] =
                    m[w][r] * LN2 + logf(sum);
        }
    __syncwarp();
    out.store(row_of(p.out, b, h, first_query), p.out.stride_row, p.seq_q - first_query, warp_row,
              16 * WARP_TILES, lane, 32);
}
