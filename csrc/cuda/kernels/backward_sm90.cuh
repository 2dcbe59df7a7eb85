/* What the two kernels of the backward for sm_90a share: their tiles, products and exponentials.
 * The scores are transposed, keys x queries. A warpgroup has 64 keys of them, a warp 16.
 *
 * Compiled with the macros of backward_sm90.cu. */
#pragma once

#include "accumulators.cuh"
#include "backward_mask_sm90.cuh"
#include "block_keys.cuh"
#include "panels.cuh"
#include "ptx/bulk.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/warpgroup.cuh"
#include "query_tiles.cuh"
#include "ring.cuh"
#include "scores.cuh"
#include "workspace.cuh"

constexpr int KEYS = 64; /* of a warpgroup */
constexpr int DEPTH = (HEAD_DIM + 15) / 16 * 16, DEPTH_V = (HEAD_DIM_V + 15) / 16 * 16;
constexpr int QUERY_TILES = BLOCK_M / 8;
constexpr int FAR = 1 << 30; /* farther than any query */
static_assert(FA_STATS_ROWS % BLOCK_M == 0, "row_stats are there for whole tiles");

using KTile = Panels<BLOCK_N, HEAD_DIM>;
using VTile = Panels<BLOCK_N, HEAD_DIM_V>;
using QTile = Panels<BLOCK_M, HEAD_DIM>;
using OTile = Panels<BLOCK_M, HEAD_DIM_V>;
using STile = Panels<BLOCK_M, BLOCK_N>; /* dS: queries x keys */

/* Boxes of 64 columns; BLOCK_M rows of q, dout and dmask, BLOCK_N of k and v, 64 of dk and dv; see
 * MaskTile for mask. Heads and batch entries that are broadcast, with a stride of 0, are there
 * once. */
struct Maps {
    tensor_map q, k, v, dout, dk, dv, mask, dmask;
};

/* x as it is, but the compiler computes nothing from it ahead of this place, and keeps nothing that
 * it has computed before: for that there are no registers. */
static __device__ __forceinline__ int anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
static __device__ __forceinline__ Work anew(Work work) {
    work.first_key = anew(work.first_key), work.b = anew(work.b);
    return work;
}

/* --- what moves data: one thread. Shared is all of the kernel's shared memory. --- */

/* Heads and batch entries as a tensor map counts them. */
template <class Tensor> static __device__ __forceinline__ int head(const Tensor &t, int h) {
    return t.stride_head ? h : 0;
}
template <class Tensor> static __device__ __forceinline__ int entry(const Tensor &t, int b) {
    return t.stride_batch ? b : 0;
}

template <class Shared>
static __device__ __forceinline__ void bring_K(const fa_kernel_params &p, const Maps &maps,
                                               Shared &shared, const Work &work) {
    KTile{shared_address(shared.K)}.load(&maps.k, &shared.K_full, work.first_key, head(p.k, work.h),
                                         entry(p.k, work.b));
}
template <class Shared>
static __device__ __forceinline__ void bring_V(const fa_kernel_params &p, const Maps &maps,
                                               Shared &shared, const Work &work) {
    VTile{shared_address(shared.V)}.load(&maps.v, &shared.V_full, work.first_key, head(p.v, work.h),
                                         entry(p.v, work.b));
}

/* Of the n-th tile: Q, row_stats and the mask; dO. */
template <class Shared>
static __device__ __forceinline__ void bring_Q(const fa_kernel_params &p, const Maps &maps,
                                               Shared &shared, const Work &work, QueryTile tile,
                                               unsigned n) {
    const int buffer = n % Q_BUFFERS;
    mbarrier *full = &shared.Q_full[buffer];
    wait_empty(shared.Q_empty, n);
    QTile{shared_address(shared.Q[buffer])}.load(&maps.q, full, tile.i, head(p.q, tile.h),
                                                 entry(p.q, work.b));
    mbarrier_arrive_expect(full, sizeof shared.stats[buffer]);
    bulk_load(shared_address(shared.stats[buffer]), row_stats(p, work.b, tile.h, tile.i),
              sizeof shared.stats[buffer], full);
    if (HAS_MASK_TILE) {
        wait_empty(shared.mask_empty, n);
        MaskTile{shared_address(shared.mask)}.load(&maps.mask, &shared.mask_full[0], tile.i,
                                                   work.first_key, head(p.mask, tile.h),
                                                   entry(p.mask, work.b));
    }
}

/* A tile of dO comes and goes in PIECES, of as many panels each. */
template <int PIECES> using OPieces = Panels<BLOCK_M, 64 * OTile::COUNT / PIECES>;

template <int PIECES = 1, class Shared>
static __device__ __forceinline__ void bring_dO(const fa_kernel_params &p, const Maps &maps,
                                                Shared &shared, const Work &work, QueryTile tile,
                                                unsigned n) {
#pragma unroll 1
    for (int piece = 0; piece < PIECES; piece++) {
        const unsigned m = PIECES * n + piece;
        wait_empty(shared.dO_empty, m);
        OPieces<PIECES>{shared_address(shared.dO[m % STAGES])}.load(
            &maps.dout, &shared.dO_full[m % STAGES], tile.i, head(p.dout, tile.h),
            entry(p.dout, work.b), 64 * OTile::COUNT / PIECES * piece);
    }
}

/* By one thread, first of all: the barriers of what is brought, to be used by so many warps, and
 * the mask by so many. */
template <class Shared>
static __device__ __forceinline__ void prepare_to_bring(const Maps &maps, Shared &shared, int warps,
                                                        int mask_warps) {
    tma_prefetch_map(&maps.k);
    tma_prefetch_map(&maps.q);
    tma_prefetch_map(&maps.v);
    tma_prefetch_map(&maps.dout);
    mbarrier_init(&shared.K_full, 1);
    mbarrier_init(&shared.V_full, 1);
    for (int i = 0; i < Q_BUFFERS; i++) {
        mbarrier_init(&shared.Q_full[i], 2); /* Q, row_stats */
        mbarrier_init(&shared.Q_empty[i], warps);
    }
    for (int i = 0; i < STAGES; i++) {
        mbarrier_init(&shared.dO_full[i], 1);
        mbarrier_init(&shared.dO_empty[i], warps);
    }
    mbarrier_init(&shared.mask_full[0], 1);
    mbarrier_init(&shared.mask_empty[0], mask_warps);
}

/* --- what a warpgroup computes --- */

using Scores = float[QUERY_TILES][4];         /* transposed: rows are keys, see mma_16x8x16 */
using Operand = unsigned[QUERY_TILES / 2][4]; /* P^T and dS^T, as operands A */
template <int COLS> using Gradient = float[COLS / 8][4];

/* C = A B^T, summed over columns. */
template <int DEPTH, class ATile, class BTile>
static __device__ __forceinline__ void multiply_rows(Scores &C, ATile A, BTile B) {
    /* Keeps the compiler from computing all operands ahead, for which there are no registers. */
    asm volatile("" : "+r"(A.address));
    wgmma_fence();
    Wgmma<BLOCK_M>::multiply(C, A.sum_over_cols(0), B.sum_over_cols(0));
#pragma unroll
    for (int d = 16; d < DEPTH; d += 16)
        Wgmma<BLOCK_M>::multiply_add(C, A.sum_over_cols(d), B.sum_over_cols(d));
    wgmma_commit();
}

/* C += A B, summed over queries. */
template <int COLS, class BTile>
static __device__ __forceinline__ void multiply_queries(Gradient<COLS> &C, const Operand &A,
                                                        BTile B) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES / 2; m++)
        Wgmma<COLS>::multiply_add(C, A[m], B.sum_over_rows(16 * m));
    wgmma_commit();
}

/* Of the queries whose scores a thread has. */
using QueryNumbers = float2[QUERY_TILES];

/* With a mask or dropout there are no registers to load lse ahead of its use. */
constexpr bool LSE_AHEAD = !FA_MASK && !FA_DROPOUT;

template <int BEGIN, int END>
static __device__ __forceinline__ void load_lse(QueryNumbers &lse, const PairStats *stats,
                                                unsigned lane) {
#pragma unroll
    for (int m = BEGIN; LSE_AHEAD && m < END; m++)
        lse[m] = stats[4 * m + lane % 4].lse;
}
static __device__ __forceinline__ void load_delta(QueryNumbers &delta, const PairStats *stats,
                                                  unsigned lane) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
        delta[m] = stats[4 * m + lane % 4].delta;
}

/* S of the n-th tile becomes P = exp(S - lse), with its sign changed where dropout drops it. The
 * warp's keys are those from row warp_row of the block's on. */
template <class Shared>
static __device__ __forceinline__ void
exponentiate(const fa_kernel_params &p, Scores &S, const QueryNumbers &lse, Shared &shared,
             unsigned n, const Dropout &dropout, const Work &work, QueryTile tile, int warp_row,
             unsigned lane) {
    const int query = tile.i, warp_key = work.first_key + warp_row, g = lane / 4, t = lane % 4;
    const PairStats *stats = shared.stats[n % Q_BUFFERS];
    if (HAS_MASK_TILE)
        wait_full(shared.mask_full, n);
    const WarpMask mask(p, {shared_address(shared.mask)}, work.b, tile.h, query, work.first_key,
                        warp_row);
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m += 2) {
        mask_elem value[8];
        unsigned word[4];
        if (FA_MASK)
            mask.get(value, m);
        if (FA_DROPOUT)
            dropout.draw_transposed(word, query + 8 * m, warp_key, g, t);
#pragma unroll
        for (int x = 0; x < 8; x++) {
            const float2 pair = LSE_AHEAD ? lse[m + x / 4] : stats[4 * (m + x / 4) + t].lse;
            float &P = S[m + x / 4][x % 4];
            P = fmaf(P, p.scale_log2e, x % 2 ? -pair.y : -pair.x);
            if (FA_MASK)
                P = add_mask(P, value[x]);
            P = exp2_approx(P);
            if (FA_DROPOUT && !dropout.keeps(word, x % 2 * 4 + x / 4 * 2 + x % 4 / 2))
                P = -P;
        }
    }
    if (HAS_MASK_TILE)
        release(&shared.mask_empty[0]);
    if (is_cut(p, query, BLOCK_M, warp_key, 16)) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            /* The first query that sees the key, and the first after it that does not, counted from
             * the thread's first. So it takes fewer registers than is_visible. */
            const int key = warp_key + g + 8 * r, from = query + 2 * t;
            const int begin = FA_WINDOW ? key - p.window_end + 1 - from : -FAR;
            const int end = key >= p.seq_k ? -FAR
                            : FA_WINDOW    ? key - p.window_begin + 1 - from
                                           : FAR;
#pragma unroll
            for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
                for (int x = 0; x < 2; x++)
                    if (8 * m + x < begin || 8 * m + x >= end)
                        S[m][2 * r + x] = 0;
        }
    }
}

/* dS = P (dP - delta). P comes as it was rounded for dV: there are no registers to keep more of it.
 */
static __device__ __forceinline__ void differentiate(const fa_kernel_params &p, Operand &dS,
                                                     const Scores &dP, const Operand &P,
                                                     const QueryNumbers &delta) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const unsigned P_r = P[m / 2][m % 2 * 2 + r];
            float even = dP[m][2 * r], odd = dP[m][2 * r + 1];
            if (FA_DROPOUT) {
                even = P_r & 0x8000 ? 0 : even * p.dropout_scale;
                odd = P_r & 0x80000000 ? 0 : odd * p.dropout_scale;
            }
            dS[m / 2][m % 2 * 2 + r] =
                multiply_pairs(FA_DROPOUT ? P_r & 0x7fff7fff : P_r,
                               pack_finite(even - delta[m].x, odd - delta[m].y));
        }
    }
}

/* Of P what dropout keeps. dV is scaled in the end. */
static __device__ __forceinline__ void keep(Operand &P) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES / 2; m++)
#pragma unroll
        for (int x = 0; x < 4; x++)
            P[m][x] &= ~((P[m][x] >> 15 & 0x10001) * 0xffff);
}

/* P, rounded. It is at most 1, also where scores are so large that lse has lost the difference. */
static __device__ __forceinline__ void round_P(Operand &P, const Scores &S) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int r = 0; r < 2; r++)
            P[m / 2][m % 2 * 2 + r] = limit_pairs(pack(S[m][2 * r], S[m][2 * r + 1]));
}

/* What a warp has of dS^T, 16 keys, to shared memory. */
static __device__ __forceinline__ void put_dS(STile tile, int warp_row, const Operand &dS,
                                              unsigned lane) {
    const unsigned first = tile.chunk(lane / 16 * 8 + lane % 8, warp_row + lane / 8 % 2 * 8);
#pragma unroll
    for (int m = 0; m < QUERY_TILES / 2; m++)
        stmatrix_x4_trans(first + 16 * m * 128, dS[m][0], dS[m][1], dS[m][2], dS[m][3]);
}

/* The same from there: dS^T, or P^T, as put_dS has it. */
static __device__ __forceinline__ void get_dS(Operand &dS, STile tile, int warp_row,
                                              unsigned lane) {
    const unsigned first = tile.chunk(lane / 16 * 8 + lane % 8, warp_row + lane / 8 % 2 * 8);
#pragma unroll
    for (int m = 0; m < QUERY_TILES / 2; m++)
        ldmatrix_x4_trans(dS[m], first + 16 * m * 128);
}

/* dK or dV of a warp to shared memory, into its 16 rows of a tile of 64. */
template <int COLS, class Tile>
static __device__ __forceinline__ void put_gradient(Tile tile, Gradient<COLS> &C, float scale) {
    const int thread = thread_index() % 128, row = thread / 32 * 16 + thread % 16;
#pragma unroll
    for (int d = 0; d < COLS / 8; d += 2)
        stmatrix_x4(tile.chunk(row, 8 * d + thread % 32 / 16 * 8),
                    pack(C[d][0] * scale, C[d][1] * scale), pack(C[d][2] * scale, C[d][3] * scale),
                    pack(C[d + 1][0] * scale, C[d + 1][1] * scale),
                    pack(C[d + 1][2] * scale, C[d + 1][3] * scale));
}
